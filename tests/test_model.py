"""Tests of model.py: parity with the authors' models and timm's, configs, loading, what a backbone offers.

`parity/` holds the outputs of the authors' models in float64 for weights and inputs made by a rule from a
seed (in the file name): `made_weights` and `made_input` are that rule.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import random
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import blocks
from data import EvalTransform, UsageError
from blocks import SPACE, StochasticDepth
from model import (
    MODELS,
    ModelConfig,
    NEXcepTion,
    compile_frozen,
    count_macs,
    count_parameters,
    create_model,
    export_official,
    fuse,
    load_checkpoint,
    load_weights,
    main,
    published_transform,
)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).parent
OFFICIAL = json.loads((HERE / "parity" / "official_state_dicts.json").read_text())
PAPER_MODELS = tuple(OFFICIAL)


def made_weights(name: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The parity files' state dict of a model, float64, under the authors' names."""
    weights = {}
    for entry, shape in OFFICIAL[name]["state_dict"]:
        if entry.endswith("num_batches_tracked"):
            weights[entry] = torch.tensor(0)
            continue
        if entry.endswith(("running_mean", "bias")):
            value = rng.normal(0, 0.1, shape)
        elif entry.endswith("running_var") or len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, np.sqrt(0.8 / np.prod(shape[1:])), shape)
        weights[entry] = torch.from_numpy(value)
    return weights


def made_input(rng: np.random.Generator, batch: int, size: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(batch, 3, size, size)))


def random_config(rng: random.Random, **fixed) -> ModelConfig:
    """Any point of the search space, in one of the two layouts, small."""
    values = {name: rng.choice(tuple(choices)) for name, choices in SPACE.items()}
    values |= {"layout": rng.choice(("isotropic", "pyramid")), "stem_stride": rng.choice((2, 4))}
    values["drop_path_spread"] = rng.choice(("constant", "linear"))
    if values["layout"] == "isotropic":
        values |= {"widths": rng.choice([(16,), (12, 20)]), "depths": (2,), "exit_widths": (20, 24, 28)}
    else:
        values |= {"widths": (12, 16, 20), "depths": (1, 2, 1), "exit_widths": ()}
    values |= {"stem_width": 12, "num_classes": 5, "input_size": 32, "drop_path": rng.choice([0.0, 0.3])}
    return ModelConfig(**(values | fixed))


def model_with_statistics(config: ModelConfig, seed: int) -> NEXcepTion:
    """An untrained network whose norms have random weights, biases and running statistics."""
    torch.manual_seed(seed)
    model = NEXcepTion(config)
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith("running_mean") or name.endswith("bias"):
            value.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_logits_agree_with_the_authors(name):
    rng = np.random.default_rng(2022)
    model = create_model(name).double().eval()
    load_weights(model, made_weights(name, rng))
    expected = np.load(HERE / "parity" / f"{name}_seed2022_224.npz")["logits"]
    with torch.inference_mode():
        logits = model(made_input(rng, 2, 224))
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_training_step_agrees_with_the_authors(name):
    rng = np.random.default_rng(7)
    model = create_model(name, drop_path=0.0).double().eval()
    load_weights(model, made_weights(name, rng))
    x = made_input(rng, 3, 160)
    expected = np.load(HERE / "parity" / f"{name}_seed7_160_train.npz")
    labels = rng.integers(0, 1000, size=3)
    np.testing.assert_array_equal(labels, expected["labels"])
    with torch.inference_mode():
        np.testing.assert_allclose(model(x).numpy(), expected["logits"], rtol=1e-9, atol=1e-11)

    loss = F.cross_entropy(model.train()(x), torch.from_numpy(labels))
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected["train_loss"], rtol=1e-9)
    norms = [p.grad.norm().item() for p in model.parameters()]
    np.testing.assert_allclose(norms, expected["grad_norms"], rtol=1e-6, atol=1e-9)
    for statistic in ("running_mean", "running_var"):
        sums = [v.sum().item() for k, v in model.state_dict().items() if k.endswith(statistic)]
        np.testing.assert_allclose(sums, expected[f"{statistic}_sums"], rtol=1e-9, atol=1e-9)


def test_xception_agrees_with_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("legacy_xception").double()
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            value.normal_(0, 0.1)
    ours = create_model("xception").double()
    load_weights(ours, theirs.state_dict())
    x, labels = torch.randn(2, 3, 107, 107, dtype=torch.float64), torch.tensor([1, 999])
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-10, atol=1e-12)
    for model in (ours, theirs):
        F.cross_entropy(model.train()(x), labels).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-12)


def test_parameters_and_macs_are_the_counted_ones():
    counts = {"nexception_t": 24_544_976, "nexception_s": 43_386_944, "nexception_tp": 26_559_112}
    macs = {"nexception_t": 4.600, "nexception_s": 8.402, "nexception_tp": 4.320, "xception": 8.357}
    for name, count in (counts | {"xception": 22_855_952}).items():
        model = create_model(name)
        assert count_parameters(model) == count
        assert round(count_macs(model) / 1e9, 3) == macs[name]


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_export_gives_back_the_official_state_dict(name):
    weights = {k: v.float() for k, v in made_weights(name, np.random.default_rng(1)).items()}
    weights = {k: v.long() if k.endswith("tracked") else v for k, v in weights.items()}
    model = create_model(name)
    load_weights(model, weights)
    exported = export_official(model)
    assert list(exported) == list(weights)
    for entry, value in weights.items():
        assert torch.equal(exported[entry], value) and exported[entry].dtype == value.dtype


def test_authors_checkpoint_file_loads_whatever_surrounds_it(tmp_path, capsys):
    weights = {k: v.float() for k, v in made_weights("nexception_t", np.random.default_rng(3)).items()}
    namespace = argparse.Namespace(model="nexception_t", lr=2e-3)
    content = {"epoch": 309, "arch": "nexception_t", "args": namespace, "metric": 81.5}
    content["state_dict"] = {f"module.{k}": v for k, v in weights.items()}
    torch.save(content, tmp_path / "official.pth.tar")
    model = load_checkpoint(tmp_path / "official.pth.tar")
    assert not model.training and model.config == MODELS["nexception_t"] and model.classes is None
    assert model.transform == EvalTransform(224)
    assert torch.equal(model.head.fc.weight, weights["fc.weight"])

    small = create_model("nexception_t", num_classes=10)
    before = small.head.fc.weight.clone()
    load_weights(small, tmp_path / "official.pth.tar")
    assert torch.equal(small.stem.conv.weight, weights["stem.0.weight"])
    assert torch.equal(small.head.fc.weight, before)
    assert "1000 classes" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_averaged_weights_of_foreign_checkpoints_come_first_as_in_timm(tmp_path, key):
    timm = pytest.importorskip("timm")
    raw, averaged, loaded = (create_model("nexception_nano", num_classes=2) for _ in range(3))
    torch.save({key: raw.state_dict(), f"{key}_ema": averaged.state_dict()}, tmp_path / "foreign.pth")
    load_weights(loaded, tmp_path / "foreign.pth")
    theirs = timm.models.load_state_dict(tmp_path / "foreign.pth")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, averaged.state_dict()[name]) and torch.equal(value, theirs[name])


def test_weights_load_under_the_prefixes_of_wrappers(tmp_path, monkeypatch):
    class Wrapper(torch.nn.Module):  # as a LightningModule with `self.model`
        def __init__(self, model):
            super().__init__()
            self.model = model

    average = torch.optim.swa_utils.AveragedModel
    parallel = torch.nn.DataParallel  # DistributedDataParallel's names
    model = create_model("nexception_nano", num_classes=3)
    wrapped = [
        torch.compile(parallel(model)),
        parallel(torch.compile(model)),
        average(model),
        torch.compile(average(parallel(model))),
        Wrapper(torch.compile(model)),
    ]
    for wrapper in wrapped:
        loaded = create_model("nexception_nano", num_classes=3)
        load_weights(loaded, {"epoch": 3, "state_dict": wrapper.state_dict()})
        for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_weights(loaded, "~/weights.pt")


@pytest.mark.parametrize("name", ["nexception_nano", "xception"])
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_rgb_weights_adapt_to_other_channels_as_in_timm(name, channels, capsys):
    timm = pytest.importorskip("timm")
    small = {"widths": (16,), "depths": (0,), "exit_widths": (8, 8, 8), "num_classes": 2}
    rgb, other = create_model(name, **small), create_model(name, in_channels=channels, **small)
    load_weights(other, rgb.state_dict())
    entry = next(iter(rgb.state_dict()))
    expected = timm.models.adapt_input_conv(channels, rgb.state_dict()[entry])
    torch.testing.assert_close(other.state_dict()[entry], expected)
    assert f"in_channels {channels}" in capsys.readouterr().out
    if channels == 1:  # a grey image and its RGB copy have the same logits
        grey = torch.randn(2, 1, 40, 40)
        torch.testing.assert_close(
            other.eval()(grey), rgb.eval()(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
        )


def test_load_weights_names_what_does_not_fit():
    config = replace(MODELS["nexception_nano"], num_classes=10)
    model = NEXcepTion(config)
    good = {k: v.clone() for k, v in model.state_dict().items()}
    for change, named in (
        (lambda w: w.pop("stem.conv.bias"), "missing stem.conv.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda w: w.update({"stem.conv.bias": torch.zeros(3)}), r"shape stem.conv.bias \(3,\) for \(24,\)"),
        (lambda w: w.update({"head.fc.weight": torch.zeros(7, 5)}), r"shape head.fc.weight \(7, 5\)"),
    ):
        weights = dict(good)
        change(weights)
        with pytest.raises(UsageError, match=named):
            load_weights(model, weights)
    assert all(torch.equal(v, good[k]) for k, v in model.state_dict().items())
    with pytest.raises(UsageError, match="no such file"):
        load_weights(model, "absent.pt")


def test_unsafe_and_truncated_files_are_refused(tmp_path):
    torch.save({"model": create_model("nexception_nano")}, tmp_path / "pickled.pt")
    torch.save(create_model("nexception_nano").state_dict(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("some text")
    for name, reason in (
        ("pickled.pt", r"it pickles model.NEXcepTion, but only tensors and plain values are loaded$"),
        ("text.pt", "damaged"),
        ("half.pt", "damaged"),
        ("empty.pt", "damaged"),
    ):
        with pytest.raises(UsageError, match=f"{name} is not a readable checkpoint: {reason}"):
            load_checkpoint(tmp_path / name)


def test_our_checkpoint_brings_classes_and_transform(tmp_path):
    model = model_with_statistics(replace(MODELS["nexception_nano"], num_classes=3), seed=0)
    transform = EvalTransform(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
    content = {"model": model.state_dict(), "ema": None, "config": model.config.to_dict()}
    content |= {"classes": ["a", "b", "c"], "transform": transform.to_dict(), "epoch": 3}
    torch.save(content, tmp_path / "last.pt")
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert loaded.classes == ["a", "b", "c"] and loaded.transform == transform
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    averaged = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(content | {"ema": averaged}, tmp_path / "last.pt")
    assert torch.equal(load_checkpoint(tmp_path / "last.pt").head.fc.bias, model.head.fc.bias + 1)


@pytest.mark.parametrize("seed", range(40))
def test_any_config_builds_trains_keeps_its_resolutions_and_fuses(seed):
    rng = random.Random(seed)
    config = random_config(rng)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = model_with_statistics(config, seed)
    height, width = rng.randrange(32, 80), rng.randrange(32, 80)
    x = torch.randn(3, 3, height, width)

    maps = model.feature_maps(x)
    heights, widths = config.resolutions(height), config.resolutions(width)
    assert [tuple(m.shape[2:]) for m in maps] == list(zip(heights, widths, strict=True))
    torch.testing.assert_close(model.forward_head(maps[-1]), model(x))

    fused = fuse(model)
    logits = model(x)
    torch.testing.assert_close(fused(x), logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())

    loss = F.cross_entropy(model.train()(x), torch.tensor([0, 1, 4]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_new_parts_are_one_entry_each(monkeypatch):
    """Networks with an activation, a norm, a pooling and a kernel added at run time train and fuse."""
    monkeypatch.setitem(blocks.ACTIVATIONS, "hardswish", torch.nn.Hardswish)
    monkeypatch.setitem(blocks.NORMS, "group", lambda channels: torch.nn.GroupNorm(1, channels))
    monkeypatch.setitem(blocks.POOLINGS, "average", lambda channels: torch.nn.AvgPool2d(3, 2, 1))
    monkeypatch.setitem(SPACE, "kernel", (*blocks.KERNELS, 11, "mixed"))
    new = {"activation": "hardswish", "norm": "group", "pooling": "average", "kernel": 11}
    for i, (name, value) in enumerate(new.items()):
        assert value in SPACE[name] and value in [
            getattr(random_config(random.Random(s)), name) for s in range(40)
        ]
        for changes in (new, {name: value}):
            config = random_config(random.Random(i), stem="conv", **changes)
            model = model_with_statistics(config, seed=i)
            x = torch.randn(4, 3, 40, 48)
            assert [m.shape[2] for m in model.feature_maps(x)] == list(config.resolutions(40))
            torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-5, atol=1e-5)
            optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
            before = F.cross_entropy(model.eval()(x), torch.arange(4))
            before.backward()
            optimizer.step()
            assert F.cross_entropy(model(x), torch.arange(4)) < before
    kinds = {type(module) for module in NEXcepTion(ModelConfig(**new)).modules()}
    assert {torch.nn.Hardswish, torch.nn.GroupNorm, torch.nn.AvgPool2d} <= kinds
    assert not kinds & {torch.nn.GELU, torch.nn.BatchNorm2d, torch.nn.MaxPool2d}


def test_fuse_leaves_no_foldable_norm_and_the_original_untouched():
    model = model_with_statistics(replace(MODELS["nexception_tp"], widths=(96, 100, 104, 108)), seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = fuse(model.train())
    assert model.training and not fused.training
    assert not [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["nexception_nano", "xception"])
def test_gradients_through_a_fused_network_are_those_of_the_network(name):
    """Of the input and, as Grad-CAM takes them, of the last map, where the input needs none."""
    small = replace(MODELS[name], widths=(16, 24), depths=(1,), exit_widths=(16, 24, 32), num_classes=5)
    model, x = model_with_statistics(small, 0).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    slopes = []
    for network in (model, fuse(model)):
        maps = network.forward_features(x)
        cam = torch.autograd.grad(network.forward_head(maps)[:, 2].sum(), maps)[0]
        leaf = x.clone().requires_grad_()
        slopes.append((cam, torch.autograd.grad(network(leaf)[:, 2].sum(), leaf)[0]))
    for plain, fused in zip(*slopes, strict=True):
        torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("name", MODELS)
def test_each_activation_module_runs_once(name):
    """So that hooks on one of them see one map, Xception's stem included."""
    model, calls = create_model(name).eval(), []
    activations = [m for m in model.modules() if isinstance(m, tuple(blocks.ACTIVATIONS.values()))]
    for activation in activations:
        activation.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))
    assert len(calls) == len(set(calls)) == len(activations) > 0


def test_impossible_configs_are_refused_by_field():
    for values, name in (
        ({"stem": "convolution"}, "stem"),
        ({"kernel": 4}, "kernel"),
        ({"kernel": "5"}, "kernel"),
        ({"se": 1}, "se"),
        ({"activation_positions": (2, 1)}, "activation_positions"),
        ({"norm_positions": (4,)}, "norm_positions"),
        ({"norm_positions": 2}, "norm_positions"),
        ({"widths": ()}, "widths"),
        ({"widths": (64, 0)}, "widths"),
        ({"kernel": "mixed", "widths": (2,)}, "widths"),
        ({"layout": "pyramid", "exit_widths": (), "depths": (1, 1, 1)}, "widths"),
        ({"depths": (3, 3)}, "depths"),
        ({"exit_widths": ()}, "exit_widths"),
        ({"stem_width": 0}, "stem_width"),
        ({"stem": "conv", "stem_width": 1}, "stem_width"),
        ({"widths": (8,) * 7}, "widths"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"drop_path_spread": "cosine"}, "drop_path_spread"),
        ({"num_classes": -1}, "num_classes"),
        ({"stem_width": 10**12}, "stem_width"),
        ({"widths": (10**9,)}, "widths"),
        ({"depths": (10**7,)}, "depths"),
        ({"in_channels": True}, "in_channels"),
    ):
        with pytest.raises(UsageError, match=rf"^{name}: "):
            ModelConfig(**values)
    with pytest.raises(UsageError, match=r"^widths: the weights take [\d,]{5,} GiB, this machine has "):
        create_model("nexception_t", widths=(2**20, 2**20))
    with pytest.raises(UsageError, match="width: not a field"):
        create_model("nexception_t", width=3)
    with pytest.raises(UsageError, match="in_chans: not a field of ModelConfig, which calls it in_channels"):
        create_model("nexception_t", in_chans=1)
    with pytest.raises(UsageError, match="'nexception_l' is not one of nexception_t"):
        create_model("nexception_l")


def test_config_travels_through_a_json_file(tmp_path):
    config = replace(MODELS["nexception_reduced"], kernel="mixed", norm_positions=(), num_classes=7)
    config.to_json(tmp_path / "found.json")
    assert create_model(tmp_path / "found.json").config == config
    assert create_model(str(tmp_path / "found.json"), num_classes=3).config.num_classes == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "found.json"]
    (tmp_path / "broken.json").write_text('{"stem": "conv", "colour": 3}')
    with pytest.raises(UsageError, match=r"broken.json holds no model config: colour: not a field"):
        create_model(tmp_path / "broken.json")
    (tmp_path / "deep.json").write_text('{"widths": ' + "[" * 10**5 + "]" * 10**5 + "}")
    with pytest.raises(UsageError, match=r"deep.json holds no model config: "):
        create_model(tmp_path / "deep.json")


def test_stochastic_depth_is_spread_as_the_authors_did():
    def rates(name):
        return [m.rate for m in create_model(name).modules() if isinstance(m, StochasticDepth)]

    assert rates("nexception_t") == [0.05] * 12
    np.testing.assert_allclose(rates("nexception_tp"), np.linspace(0, 0.05, 19), atol=1e-12)
    assert rates("xception") == [0.0] * 12
    assert replace(MODELS["nexception_tp"], drop_path=0.2).drop_path_rates(3) == [0.0, 0.1, 0.2]


@pytest.mark.parametrize("name", ["nexception_t", "nexception_tp", "xception"])
def test_small_and_odd_inputs(name):
    model = create_model(name, num_classes=4).eval()
    with torch.inference_mode():
        for height, width in ((32, 32), (33, 47)):
            x = torch.randn(1, 3, height, width).contiguous(memory_format=torch.channels_last)
            assert model(x).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("nexception_t", [96, 128, 256, 512, 2048]),
        ("xception", [64, 128, 256, 728, 2048]),
        ("nexception_tp", [96, 192, 384, 768]),
    ],
)
def test_feature_maps_have_the_channels_and_strides_that_feature_info_states(name, channels):
    model = create_model(name).eval()
    strides = [2, 4, 8, 16, 32][-len(channels) :]
    with torch.inference_mode():
        maps = model.feature_maps(torch.randn(1, 3, 320, 320))
    assert [m.shape[1] for m in maps] == channels == [info["num_chs"] for info in model.feature_info]
    assert list(model.config.strides) == strides == [info["reduction"] for info in model.feature_info]
    # Xception's unpadded stem loses three pixels.
    assert all(
        320 / stride - 3 <= m.shape[2] <= 320 / stride for m, stride in zip(maps, strides, strict=True)
    )
    for info, m in zip(model.feature_info, maps, strict=True):
        assert isinstance(model.get_submodule(info["module"]), torch.nn.Module) and m.dim() == 4


def test_classifiers_as_in_timm():
    config = replace(MODELS["nexception_nano"], num_classes=10)
    model = model_with_statistics(config, 0).double()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    expected, pooled = model(x), model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), expected)
    headless = create_model(config, num_classes=0).double().eval()
    load_weights(headless, model.state_dict())
    assert headless.num_classes == 0 and torch.equal(headless(x), pooled)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled) and not list(model.get_classifier().parameters())
    assert torch.equal(fuse(model)(x), fuse(headless)(x))
    model.reset_classifier(4)
    assert model(x).shape == (2, 4) and model.num_classes == model.config.num_classes == 4


def test_models_travel_through_hugging_face_hub_s_mixin(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")

    class Hub(NEXcepTion, hub.PyTorchModelHubMixin):
        pass

    config = replace(MODELS["nexception_nano"], num_classes=3)
    for given in (config, config.to_dict()):
        model = Hub(given).eval()
        model.save_pretrained(tmp_path / "hub")
        loaded = Hub.from_pretrained(tmp_path / "hub").eval()
        x = torch.randn(2, 3, 32, 32)
        assert loaded.config == config and torch.equal(loaded(x), model(x))


def test_models_register_with_timm():
    timm = pytest.importorskip("timm")

    def register(name):
        def entry(
            pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **fields
        ):
            assert not pretrained, "weights come with load_weights"
            model = create_model(name, in_channels=fields.pop("in_chans", 3), **fields)
            cfg = vars(published_transform(model.config))
            model.pretrained_cfg = cfg | {"input_size": (model.config.in_channels, cfg["size"], cfg["size"])}
            return model

        entry.__name__ = name
        timm.models.register_model(entry)

    for name in ("nexception_nano", "nexception_tp"):
        register(name)
    with pytest.raises(AssertionError, match="load_weights"):
        timm.create_model("nexception_nano", pretrained=True)
    model = timm.create_model("nexception_nano", num_classes=7, in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    config = timm.data.resolve_model_data_config(timm.create_model("nexception_tp", drop_path=0.1))
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 0.95
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN and config["interpolation"] == "bicubic"


def test_channels_last_maps_and_vmap_give_the_same_logits():
    model = model_with_statistics(MODELS["nexception_nano"], 0)
    x = torch.randn(2, 3, 64, 48)
    expected = model(x)
    one_by_one = torch.func.vmap(lambda image: model(image[None])[0])(x)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-4, atol=1e-5)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    model = model_with_statistics(replace(MODELS["nexception_nano"], drop_path=0.3), 0).double().train()
    x, gradients, statistics = torch.randn(4, 3, 32, 32, dtype=torch.float64), [], []
    before = copy.deepcopy(model.state_dict())
    for enable in (False, True):
        model.load_state_dict(before)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        statistics.append([buffer.clone() for buffer in model.buffers()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    for plain, recomputed in zip(*statistics, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize(
    ("name", "backend"), [("nexception_nano", "aot_eager"), ("nexception_tp", "eager"), ("xception", "eager")]
)
def test_dynamo_captures_a_training_pass_without_graph_breaks(name, backend):
    overrides = {"depths": (1, 1, 0, 0)} if name == "nexception_tp" else {"depths": (1,)}
    model = create_model(name, drop_path=0.2, num_classes=5, **overrides)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.manual_seed(0)
    expected = model(torch.ones(2, 3, 32, 32))
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(torch.ones(2, 3, 32, 32)), expected)
    compiled(torch.ones(2, 3, 32, 32)).sum().backward()


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_frozen_network_is_the_same_and_has_its_weights_inside():
    small = {"depths": (0,), "se": False, "pooling": "max", "kernel": 3, "activation": "relu"}
    model = model_with_statistics(
        replace(MODELS["nexception_nano"], **small), seed=0
    )  # few kernels to compile
    fused = fuse(model)
    frozen, x = compile_frozen(fused), torch.randn(2, 3, 32, 32)
    logits = frozen(x)
    torch.testing.assert_close(logits, model(x), rtol=1e-5, atol=1e-5)
    assert not logits.requires_grad
    with torch.no_grad():
        fused.head.fc.weight.zero_()
    assert torch.equal(frozen(x), logits)  # compiled code that reads the weights would return the bias


def test_frozen_networks_compile_however_many_shapes_there_are(monkeypatch):
    compilations = []

    def backend(graph, inputs):
        compilations.append(inputs[-1].shape)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    frozen = [compile_frozen(blocks.ExitConv(3, 4, blocks.Design())) for _ in range(2)]
    for batch in range(1, 8):  # PyTorch stops at eight of one class
        for network in frozen:
            network(torch.randn(batch, 3, 32, 32))
    assert len(compilations) == 14


@pytest.mark.parametrize("name", ["nexception_nano", "nexception_tp"])
def test_torch_export_with_any_batch_and_size(name):
    model = model_with_statistics(replace(MODELS[name], num_classes=6), 0)
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    other = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(program.module()(other), model(other))


def test_command_line_prints_the_table_and_classifies(tmp_path, capsys):
    main([])
    listed = capsys.readouterr().out
    for name, config in MODELS.items():
        assert f"{name} " in listed and str(config.input_size) in listed
    assert "24,544,976" in listed and "8.357 G" in listed

    model = model_with_statistics(replace(MODELS["nexception_nano"], num_classes=6), 0)
    model.head.fc.weight.data.mul_(100)  # probabilities that tell images apart
    transform = EvalTransform(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
    content = {"model": model.state_dict(), "config": model.config.to_dict(), "classes": list("abcdef")}
    torch.save(content | {"transform": transform.to_dict()}, tmp_path / "best.pt")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    most_likely = model(transform(photo)[None]).argmax().item()
    main([str(tmp_path / "best.pt"), str(tmp_path / "photo.png")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[1].split()[-1] == "abcdef"[most_likely]

    # The same picture as a camera stores it that was held sideways: turned, and an EXIF entry that says so.
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90°
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=exif)
    main([str(tmp_path / "best.pt"), str(tmp_path / "sideways.png")])
    assert capsys.readouterr().out.splitlines()[1:] == lines[1:]

    sixteen = np.random.default_rng(0).integers(0, 65536, (50, 70), dtype=np.uint16)
    for name, values in (("16.png", sixteen), ("8.png", (sixteen >> 8).astype(np.uint8))):
        Image.fromarray(values).save(tmp_path / name)
    main([str(tmp_path / name) for name in ("best.pt", "16.png", "8.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:6] == lines[7:]

    # 60,000 × 60,000 pixels, a text of 2 MB, and a frame of an animation that is larger than its image.
    header = struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "bomb.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)
    frame = struct.pack(">IIIIIHHBB", 0, 10**5, 10**5, 0, 0, 1, 1, 0, 0)
    for name, *chunks in (
        ("text.png", b"zTXtk\0\0" + zlib.compress(bytes(2 * 10**6))),
        ("apng.png", b"acTL" + struct.pack(">II", 2, 0), b"fcTL" + frame),
    ):
        chunks.insert(0, b"IHDR" + struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
        chunks += [b"IDAT" + zlib.compress(bytes(32 * 97)), b"IEND"]
        sealed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(sealed))
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "float.tiff")
    torch.save({"model": model.state_dict(), "config": {"layers": 3}}, tmp_path / "foreign.pt")

    for arguments, message in (
        (("best.pt", "bomb.bmp"), "bomb.bmp is not a readable image"),
        (("best.pt", "text.png"), "text.png is not a readable image"),
        (("best.pt", "apng.png"), "apng.png is not a readable image"),
        (("best.pt", "float.tiff"), "float.tiff: 32-bit pixels"),
        (("foreign.pt", "photo.png"), "layers: not a field of ModelConfig"),
        (("absent.pt", "photo.png"), "no such file"),
        (("best.pt", "best.pt"), "not a readable image"),
        (("best.pt",), "name the photographs"),
    ):
        assert main([str(tmp_path / name) for name in arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1


# Prints the heap's size and the bytes in use (fields 0 and 7 of glibc's mallinfo2), and the number of buffers
# that are mapped for themselves alone (field 3): with a buffer of 64 MiB, and after it was freed.
LARGE_BUFFER = """
import ctypes
from model import keep_large_buffers
import torch
class MallInfo(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]
inspect = ctypes.CDLL(None).mallinfo2
inspect.restype = MallInfo
keep_large_buffers()
before, buffer = inspect(), torch.ones(2**24)
during = inspect()
del buffer
after = inspect()
print(during.field3 - before.field3, during.field7 - before.field7, after.field0 - during.field0)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc from 2.33 on")
def test_large_buffers_are_kept():
    """glibc by default maps a buffer of 64 MiB for itself alone, and unmaps it when it is freed."""
    command = [sys.executable, "-c", LARGE_BUFFER]  # in a new process: threads of earlier tests have heaps
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True)
    mapped, used, given_back = map(int, done.stdout.split())
    assert mapped == given_back == 0 and used >= 2**26


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_from_the_meta_device_is_the_same(assign):
    model = model_with_statistics(replace(MODELS["nexception_nano"], pooling="blur"), 0)
    with torch.device("meta"):
        empty = NEXcepTion(model.config)
    if not assign:
        empty.to_empty(device="cpu")
        for value in [*empty.parameters(), *empty.buffers()]:
            value.data.fill_(float("nan") if value.is_floating_point() else 7)  # whatever memory holds
    empty.load_state_dict(model.state_dict(), assign=assign)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(empty.eval()(x), model(x))


def test_torch_fx_traces_every_network_in_both_modes():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    rng, models = random.Random(3), []
    for config in MODELS.values():
        with torch.device("meta"):  # shapes alone: the large ones take long to compute
            models.append(NEXcepTion(replace(config, depths=tuple(min(d, 1) for d in config.depths))))
    models += [model_with_statistics(random_config(rng, drop_path=0.0), 0) for _ in range(10)]
    for model in models:
        x = torch.randn(2, 3, 32, 32, device=next(model.parameters()).device)
        torch.testing.assert_close(torch.fx.symbolic_trace(model.eval())(x), model(x))
        nodes = [info["module"] for info in model.feature_info]
        extractor = extraction.create_feature_extractor(model, nodes, suppress_diff_warning=True)
        torch.testing.assert_close(list(extractor(x).values()), model.feature_maps(x))
        extracted = extractor.train()(x)[nodes[-1]]  # the extractor traces this mode, too
        torch.testing.assert_close(extracted, model.train().forward_features(x))
