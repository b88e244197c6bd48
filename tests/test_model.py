"""Tests of model.py: parity with the authors' models and timm's, configs, loading, fusing, other libraries.

`parity/` holds float64 outputs of the authors' models for the weights that `made_weights` draws from a seed
(in the file name), and for normally distributed images drawn after them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import blocks
from blocks import SPACE, StochasticDepth, UsageError
from data import EvalTransform
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
    register_with_timm,
)

import examples
import numpy as np
import pytest
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor

HERE = Path(__file__).parent
OFFICIAL = json.loads((HERE / "parity" / "official_state_dicts.json").read_text())
PAPER_MODELS = tuple(OFFICIAL)
NANO = replace(MODELS["nexception_nano"], num_classes=6)
TRANSFORM = EvalTransform(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)


def made_weights(name: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The state dict behind the parity files, float64, with the authors' keys."""
    weights = {}
    for key, shape in OFFICIAL[name]["state_dict"]:
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
            continue
        if key.endswith(("running_mean", "bias")):
            value = rng.normal(0, 0.1, shape)
        elif key.endswith("running_var") or len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, np.sqrt(0.8 / np.prod(shape[1:])), shape)
        weights[key] = torch.from_numpy(value)
    return weights


def random_config(rng: random.Random, **fixed) -> ModelConfig:
    """A random point of the search space in either layout, small."""
    values = {name: rng.choice(tuple(choices)) for name, choices in SPACE.items()}
    values |= {"layout": rng.choice(("isotropic", "pyramid")), "stem_stride": rng.choice((2, 4))}
    values["drop_path_spread"] = rng.choice(("constant", "linear"))
    if values["layout"] == "isotropic":
        values |= {"widths": rng.choice([(16,), (12, 20)]), "depths": (2,), "exit_widths": (20, 24, 28)}
    else:
        values |= {"widths": (12, 16, 20), "depths": (1, 2, 1), "exit_widths": ()}
    values |= {"stem_width": 12, "num_classes": 5, "input_size": 32, "drop_path": rng.choice([0.0, 0.3])}
    return ModelConfig(**(values | fixed))


def with_statistics(model: torch.nn.Module, seed: int = 0):
    """Randomize the norms' weights, biases and running statistics; return the model in evaluation mode."""
    torch.manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
    return model.eval()


def equal(first: dict, second: dict) -> bool:
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_models_agree_with_the_authors(name):
    model = create_model(name, drop_path=0.0).double()
    for seed, batch, size in (("seed2022", 2, "224"), ("seed7", 3, "160_train")):
        rng = np.random.default_rng(int(seed[4:]))
        expected, weights = np.load(HERE / "parity" / f"{name}_{seed}_{size}.npz"), made_weights(name, rng)
        load_weights(model.eval(), weights)
        assert equal(export_official(model), weights)
        x = torch.from_numpy(rng.normal(size=(batch, 3, int(size[:3]), int(size[:3]))))
        with torch.inference_mode():
            np.testing.assert_allclose(model(x).numpy(), expected["logits"], rtol=1e-9, atol=1e-11)

    loss = F.cross_entropy(model.train()(x), torch.from_numpy(expected["labels"]))
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected["train_loss"], rtol=1e-9)
    norms = [p.grad.norm().item() for p in model.parameters()]
    np.testing.assert_allclose(norms, expected["grad_norms"], rtol=1e-6, atol=1e-9)
    for statistic in ("running_mean", "running_var"):
        sums = [v.sum().item() for k, v in model.state_dict().items() if k.endswith(statistic)]
        np.testing.assert_allclose(sums, expected[f"{statistic}_sums"], rtol=1e-9, atol=1e-9)


def test_xception_agrees_with_timm():
    theirs = with_statistics(timm.create_model("legacy_xception").double())
    ours = create_model("xception").double()
    load_weights(ours, theirs.state_dict())
    x, labels = torch.randn(2, 3, 107, 107, dtype=torch.float64), torch.tensor([1, 999])
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-10, atol=1e-12)
    for model in (ours, theirs):
        F.cross_entropy(model.train()(x), labels).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-12)


def test_authors_checkpoint_file_loads(tmp_path, capsys):
    weights = {k: v.float() for k, v in made_weights("nexception_t", np.random.default_rng(3)).items()}
    namespace = argparse.Namespace(model="nexception_t", lr=2e-3)
    content = {"epoch": 309, "arch": "nexception_t", "args": namespace, "metric": 81.5}
    content["state_dict"] = {f"module.{k}": v for k, v in weights.items()}
    torch.save(content, tmp_path / "official.pth.tar")
    model = load_checkpoint(tmp_path / "official.pth.tar")
    assert not model.training and model.config == MODELS["nexception_t"]
    assert model.classes is None and model.transform == EvalTransform(224)
    assert torch.equal(model.head.fc.weight, weights["fc.weight"])

    small = create_model("nexception_t", num_classes=10)
    before = small.head.fc.weight.clone()
    load_weights(small, tmp_path / "official.pth.tar")
    assert torch.equal(small.stem.conv.weight, weights["stem.0.weight"])
    assert torch.equal(small.head.fc.weight, before)
    assert "1000 classes" in capsys.readouterr().out


def test_weights_load_from_foreign_files(tmp_path, monkeypatch):
    """Averaged weights come first, as in timm; wrappers prefix the names."""
    model, raw, loaded = (NEXcepTion(NANO) for _ in range(3))
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("state_dict", "model"):
        torch.save({key: raw.state_dict(), f"{key}_ema": model.state_dict()}, tmp_path / f"{key}.pth")
        load_weights(loaded, f"~/{key}.pth")
        assert equal(loaded.state_dict(), model.state_dict())
        assert equal(loaded.state_dict(), timm.models.load_state_dict(tmp_path / f"{key}.pth"))
    average = torch.optim.swa_utils.AveragedModel
    parallel = torch.nn.DataParallel  # DistributedDataParallel's names
    for wrapper in (
        torch.compile(parallel(model)),
        parallel(torch.compile(model)),
        average(model),
        torch.compile(average(parallel(model))),
        torch.nn.ModuleDict({"model": torch.compile(model)}),  # as in a LightningModule with `self.model`
    ):
        loaded = NEXcepTion(NANO)
        load_weights(loaded, {"epoch": 3, "state_dict": wrapper.state_dict()})
        assert equal(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["nexception_nano", "xception"])
def test_rgb_weights_adapt_to_other_channels_as_in_timm(name, capsys):
    small = {"widths": (16,), "depths": (0,), "exit_widths": (8, 8, 8), "num_classes": 2}
    rgb = create_model(name, **small).state_dict()
    key = next(iter(rgb))
    for channels in (1, 2, 4, 7):
        other = create_model(name, in_channels=channels, **small)
        load_weights(other, rgb)
        torch.testing.assert_close(other.state_dict()[key], timm.models.adapt_input_conv(channels, rgb[key]))
        assert f"in_channels {channels}" in capsys.readouterr().out


def test_load_weights_names_what_does_not_fit():
    model = NEXcepTion(NANO)
    good = copy.deepcopy(model.state_dict())
    for weights, named in (
        ({k: v for k, v in good.items() if k != "stem.conv.bias"}, "stem.conv.bias is missing"),
        ({**good, "extra": torch.zeros(1)}, "extra is unexpected"),
        ({**good, "stem.conv.bias": torch.zeros(3)}, r"bias has shape \(3,\), not \(24,\)"),
    ):
        with pytest.raises(UsageError, match=named):
            load_weights(model, weights)
    assert equal(model.state_dict(), good)


def test_unsafe_and_truncated_files_are_refused(tmp_path):
    content = {"model": NEXcepTion(NANO).state_dict(), "config": asdict(NANO)}
    for broken, reason in (
        (
            {"model": NEXcepTion(NANO)},
            r"it pickles model.NEXcepTion, but only tensors and plain values are loaded$",
        ),
        (torch.zeros(3), "is not a checkpoint: it holds no dictionary but a Tensor"),
        (content | {"config": 3}, "holds no config or transform of a network"),
        (content | {"config": {"layers": 3}}, "holds no .* argument 'layers'"),
        (content | {"transform": [1]}, "holds no config or transform"),
        (content, "is not a readable checkpoint: damaged"),
    ):
        torch.save(broken, tmp_path / "foreign.pt")
        if broken is content:
            os.truncate(tmp_path / "foreign.pt", 5000)
        with pytest.raises(UsageError, match=f"foreign.pt .*{reason}"):
            load_checkpoint(tmp_path / "foreign.pt")
    (tmp_path / "foreign.pt").write_text("some text")
    with pytest.raises(UsageError, match="not a readable checkpoint: damaged"):
        load_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(UsageError, match="a folder, not a checkpoint"):
        load_checkpoint(tmp_path)


def test_blocks_and_model_alone_need_only_pytorch(tmp_path):
    """Copied into an empty folder, they build, load and fuse networks without NumPy and Pillow."""
    for name in ("blocks.py", "model.py"):
        shutil.copy(HERE.parent / name, tmp_path)
    torch.save({"state_dict": NEXcepTion(NANO).state_dict()}, tmp_path / "weights.pt")
    script = """
import sys
packages = ("numpy", "PIL", "matplotlib", "scipy", "sklearn", "timm", "torchvision")
sys.modules |= dict.fromkeys(packages)  # importing any of these now fails
from model import create_model, fuse, load_weights, main
import torch
model = create_model("nexception_nano", num_classes=6)
load_weights(model, "weights.pt")
assert fuse(model)(torch.ones(2, 3, 32, 32)).shape == (2, 6)
assert main([]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "fields",
    [
        {"stem": "convolution"}, {"kernel": 4}, {"kernel": 5.0}, {"activation_positions": (2, 1)},
        {"widths": ()}, {"widths": (64, 0)}, {"widths": 64}, {"depths": (3, 3)}, {"depths": (-1,)},
        {"exit_widths": ()}, {"exit_widths": (8, 8, 0.5)}, {"expansion": 0}, {"drop_path": 1.0},
        {"drop_path": "0.1"}, {"drop_path_spread": None}, {"in_channels": 0}, {"num_classes": -1},
        {"num_classes": True}, {"input_size": 224.0}, {"input_size": 1},
        {"stem_width": 3, "kernel": "mixed"},
        {"widths": (128, 256, 512), "layout": "pyramid", "exit_widths": (), "depths": (1, 1, 1)},
    ],
)  # fmt: skip
def test_impossible_configs_are_refused_by_field(fields):
    with pytest.raises(UsageError, match=rf"^{next(iter(fields))}: "):
        ModelConfig(**fields)


@pytest.mark.parametrize("seed", range(12))
def test_least_size_is_the_least_that_works(seed):
    config = random_config(random.Random(seed))
    with torch.device("meta"):
        model = NEXcepTion(config).eval()
        size = config.least_size
        assert model(torch.empty(1, 3, size, size)).shape == (1, 5)
        for smaller in ((size, size - 1), (size - 1, size)):
            with pytest.raises(RuntimeError):
                model(torch.empty(1, 3, *smaller))
    with pytest.raises(UsageError, match=rf"^input_size: {size - 1}, .* at least {size} pixels .*--size"):
        replace(config, input_size=size - 1)


def test_config_travels_through_a_json_file(tmp_path):
    config = replace(MODELS["nexception_reduced"], kernel="mixed", norm_positions=(), num_classes=7)
    config.to_json(tmp_path / "found.json")
    assert create_model(tmp_path / "found.json").config == config
    assert create_model(str(tmp_path / "found.json"), num_classes=3).config.num_classes == 3
    marked = b"\xef\xbb\xbf" + (tmp_path / "found.json").read_bytes()  # as some Windows editors save it
    (tmp_path / "marked.json").write_bytes(marked)
    assert create_model(tmp_path / "marked.json").config == config
    for broken in ('{"stem": "conv", "colour": 3}', "[3]", '{"stem": '):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(UsageError, match=r"broken.json is not a model config: "):
            create_model(tmp_path / "broken.json")
    with pytest.raises(UsageError, match="'nexception_l' is not one of nexception_t"):
        create_model("nexception_l")


@pytest.mark.parametrize("seed", range(24))
def test_any_config_builds_trains_fuses_and_has_the_maps_of_its_feature_info(seed):
    rng = random.Random(seed)
    config = random_config(rng)
    assert ModelConfig(**json.loads(json.dumps(asdict(config)))) == config
    model = with_statistics(NEXcepTion(config), seed)
    x = torch.randn(3, 3, rng.randrange(32, 80), rng.randrange(32, 80))

    maps = model.feature_maps(x)
    for info, found in zip(model.feature_info, maps, strict=True):
        assert found.shape[1] == info["num_chs"]
        for size, side in zip(x.shape[2:], found.shape[2:], strict=True):
            assert -3 <= side - size / info["reduction"] < 1  # Xception's unpadded stem loses three pixels
    logits = model(x)
    torch.testing.assert_close(model.forward_head(maps[-1]), logits)
    torch.testing.assert_close(fuse(model)(x), logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())

    loss = F.cross_entropy(model.train()(x), torch.tensor([0, 1, 4]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "channels", "parameters", "macs", "drop_path"),
    [
        ("nexception_t", [96, 128, 256, 512, 2048], 24_544_976, 4.600, [0.05] * 12),
        ("nexception_s", [96, 128, 256, 752, 2048], 43_386_944, 8.402, [0.05] * 12),
        ("nexception_tp", [96, 192, 384, 768], 26_559_112, 4.320, np.linspace(0, 0.05, 19)),
        ("xception", [64, 128, 256, 728, 2048], 22_855_952, 8.357, [0.0] * 12),
    ],
)
def test_named_models_are_the_papers(name, channels, parameters, macs, drop_path):
    with torch.device("meta"):
        model = create_model(name).eval()
        assert model(torch.empty(1, 3, 33, 32)).shape == (1, 1000)
    assert count_parameters(model) == parameters and round(count_macs(model) / 1e9, 3) == macs
    assert [info["num_chs"] for info in model.feature_info] == channels
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32][-len(channels) :]
    rates = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    np.testing.assert_allclose(rates, drop_path, atol=1e-12)


def test_new_parts_are_one_entry_each(tmp_path, monkeypatch):
    """Networks train, fuse, save and load with parts added at run time: ConvNeXt's block and others."""
    monkeypatch.setitem(blocks.BLOCKS, "convnext", examples.ConvNeXtBlock)
    monkeypatch.setitem(blocks.ACTIVATIONS, "hardswish", torch.nn.Hardswish)
    monkeypatch.setitem(blocks.NORMS, "group", lambda channels: torch.nn.GroupNorm(4, channels))
    monkeypatch.setitem(blocks.POOLINGS, "average", lambda channels: torch.nn.AvgPool2d(3, 2, 1))
    monkeypatch.setitem(SPACE, "kernel", (*blocks.KERNELS, 11, "mixed"))
    new = {"block": "convnext", "activation": "hardswish", "norm": "group", "pooling": "average"}
    new["kernel"] = 11
    for i, changes in enumerate((new, *({name: value} for name, value in new.items()))):
        widths = {"layout": "isotropic", "widths": (12, 20), "depths": (2,), "exit_widths": (20, 24, 28)}
        config = random_config(random.Random(i), stem="conv", **widths, **changes)
        model = with_statistics(NEXcepTion(replace(config, stem_width=16)))
        x, labels = torch.randn(4, 3, 40, 48), torch.arange(4)
        torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-5, atol=1e-5)
        before = F.cross_entropy(model(x), labels)
        before.backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        assert F.cross_entropy(model(x), labels) < before
        torch.save({"model": model.state_dict(), "config": asdict(model.config)}, tmp_path / "new.pt")
        loaded = load_checkpoint(tmp_path / "new.pt")
        assert loaded.config == model.config and equal(loaded.state_dict(), model.state_dict())
        with pytest.raises(UsageError, match=r"new.pt does not fit this model \(our names\): "):
            load_weights(create_model(model.config, stem_width=24), tmp_path / "new.pt")
    kinds = [type(module) for module in NEXcepTion(ModelConfig(**new)).modules()]
    assert {examples.ConvNeXtBlock, torch.nn.Hardswish, torch.nn.GroupNorm, torch.nn.AvgPool2d} <= set(kinds)
    assert not {torch.nn.GELU, torch.nn.BatchNorm2d, torch.nn.MaxPool2d} & set(kinds)
    assert kinds.count(blocks.ResidualBlock) == 4  # those that down-sample


@pytest.mark.parametrize(
    ("name", "left"),
    [("nexception_nano", 1), ("xception", 0), ("nexception_tp", 0)],  # the norm after a patchify stem's GELU
)
def test_fused_copies_have_no_foldable_norm_and_the_same_gradients(name, left):
    """Gradients with respect to the input and, as in Grad-CAM, to the last map alone."""
    small = {"num_classes": 5, "depths": (1,), "widths": (16, 24), "exit_widths": (16, 24, 32)}
    if name == "nexception_tp":
        small |= {"stem_width": 16, "depths": (1, 1), "exit_widths": ()}
    model = with_statistics(create_model(name, **small)).double()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model.train())
    assert model.training and not fused.training and equal(model.state_dict(), before)
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules()) == left
    x, slopes = torch.randn(2, 3, 64, 64, dtype=torch.float64), []
    for network in (model.eval(), fused):
        maps = network.forward_features(x)
        cam = torch.autograd.grad(network.forward_head(maps)[:, 2].sum(), maps)[0]
        leaf = x.clone().requires_grad_()
        slopes.append((cam, torch.autograd.grad(network(leaf)[:, 2].sum(), leaf)[0]))
    torch.testing.assert_close(slopes[0], slopes[1])


def test_classifiers_as_in_timm():
    model = with_statistics(NEXcepTion(NANO)).double()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    expected, pooled = model(x), model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), expected)
    headless = create_model(NANO, num_classes=0).double().eval()
    load_weights(headless, model.state_dict())
    assert headless.num_classes == 0 and torch.equal(headless(x), pooled)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled) and not list(model.get_classifier().parameters())
    model.reset_classifier(4)
    assert model(x).shape == (2, 4) and model.num_classes == model.config.num_classes == 4


def test_models_travel_through_hugging_face_hub_s_mixin(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")

    class Hub(NEXcepTion, hub.PyTorchModelHubMixin):
        pass

    for given in (NANO, asdict(NANO)):
        model = Hub(given).eval()
        model.save_pretrained(tmp_path / "hub")
        loaded = Hub.from_pretrained(tmp_path / "hub").eval()
        assert loaded.config == NANO and equal(loaded.state_dict(), model.state_dict())
    model.reset_classifier(2)
    model.classes, model.transform = ["ant", "bee"], TRANSFORM
    model.save_pretrained(tmp_path / "hub")
    loaded = Hub.from_pretrained(tmp_path / "hub")
    assert (loaded.config, loaded.classes) == (replace(NANO, num_classes=2), ["ant", "bee"])
    assert loaded.transform == TRANSFORM and equal(loaded.state_dict(), model.state_dict())


def test_models_register_with_timm(tmp_path, monkeypatch):
    theirs = timm.model_entrypoint("xception")
    register_with_timm()
    exec("from model import *")  # timm's changes to the module do not break this
    assert timm.model_entrypoint("xception") is theirs
    assert MODELS.keys() - {"xception"} <= set(timm.list_models(module="model"))
    with pytest.raises(UsageError, match="load_weights"):
        timm.create_model("nexception_nano", pretrained=True)
    model = timm.create_model("nexception_nano", num_classes=7, in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    config = timm.data.resolve_model_data_config(timm.create_model("nexception_tp", drop_path=0.1))
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 0.95
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN and config["interpolation"] == "bicubic"
    for given, field in (({"drop_rate": 0.1}, "drop_rate"), ({"global_pool": "max"}, "global_pool")):
        with pytest.raises(UsageError, match=f"^{field}: "):
            timm.create_model("nexception_nano", **given)
    fields = {"drop_rate": 0.0, "drop_path_rate": 0.2, "global_pool": "avg", "img_size": 64}
    model = with_statistics(timm.create_model("nexception_nano", **fields))
    assert (model.config.drop_path, model.config.input_size) == (0.2, 64)

    x = torch.randn(2, 3, 64, 64)
    maps = model.feature_maps(x)
    extractor = timm.create_model("nexception_nano", features_only=True, out_indices=(0, -1)).eval()
    weights = {key.replace("stages.", "stages_"): value for key, value in model.state_dict().items()}
    extractor.load_state_dict({key: weights[key] for key in extractor.state_dict()})
    torch.testing.assert_close(extractor(x), [maps[0], maps[-1]])
    assert extractor.feature_info.channels() == [24, 192]
    assert len(timm.create_model("nexception_tp", features_only=True)(x)) == 4
    hooked = timm.models.FeatureHookNet(copy.deepcopy(model), out_indices=(0, 1, 2))
    torch.testing.assert_close(hooked(x), maps)

    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    layers = ("stem.conv", "stages.0.0.skip", "stages.0.1.conv1.pointwise", "head.fc")
    found = [scales[id(model.get_parameter(f"{name}.weight"))] for name in layers]
    assert found == [0.5**9, 0.5**8, 0.5**7, 1.0]  # stem, five blocks, exit block, two convolutions, head
    timm.models.save_for_hf(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["architecture"], saved["num_classes"]) == ("nexception_nano", 1000)
    loaded = timm.create_model("nexception_nano")
    load_weights(loaded, tmp_path / "pytorch_model.bin")
    assert equal(loaded.state_dict(), model.state_dict())
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        register_with_timm()


def test_channels_last_maps_and_vmap_give_the_same_logits():
    model = with_statistics(NEXcepTion(NANO))
    x = torch.randn(2, 3, 64, 48)
    expected = model(x)
    one_by_one = torch.func.vmap(lambda image: model(image[None])[0])(x)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-4, atol=1e-5)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), [("nexception_nano", "aot_eager"), ("nexception_tp", "eager")])
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
    part = with_statistics(blocks.ExitConv(3, 4, blocks.Design()))  # few kernels to compile
    frozen, x = compile_frozen(part), torch.randn(2, 3, 32, 32)
    y = frozen(x)
    torch.testing.assert_close(y, part(x), rtol=1e-5, atol=1e-5)
    assert not y.requires_grad
    with torch.no_grad():
        part.conv.pointwise.weight.zero_()
    assert torch.equal(frozen(x), y)


@pytest.mark.parametrize("name", ["nexception_nano", "nexception_tp"])
def test_torch_export_with_any_batch_and_size(name):
    depths = (1, 1, 1, 1) if name == "nexception_tp" else (1,)
    model = with_statistics(create_model(name, num_classes=6, depths=depths))
    x, other = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(program.module()(other), model(other))


def test_torch_fx_traces_every_network_in_both_modes():
    rng, models = random.Random(3), []
    for config in MODELS.values():
        with torch.device("meta"):  # only shapes are compared, as the large models take long to compute
            models.append(NEXcepTion(replace(config, depths=tuple(min(d, 1) for d in config.depths))))
    models += [with_statistics(NEXcepTion(random_config(rng, drop_path=0.0))) for _ in range(10)]
    for model in models:
        x = torch.randn(2, 3, 32, 32, device=next(model.parameters()).device)
        torch.testing.assert_close(torch.fx.symbolic_trace(model.eval())(x), model(x))
        nodes = [info["module"] for info in model.feature_info]
        extractor = create_feature_extractor(model, nodes, suppress_diff_warning=True)
        torch.testing.assert_close(list(extractor(x).values()), model.feature_maps(x))
        extracted = extractor.train()(x)[nodes[-1]]  # the extractor has traced this mode, too
        torch.testing.assert_close(extracted, model.train().forward_features(x))
    model = with_statistics(NEXcepTion(replace(NANO, drop_path=0.5)))  # dropped in training only
    traced, x = torch.fx.symbolic_trace(copy.deepcopy(model).train()), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(traced.eval()(x), model(x))
    torch.manual_seed(0)
    first = traced.train()(x)
    assert not torch.equal(traced(x), first)


def test_a_model_from_the_meta_device_is_the_same():
    model = with_statistics(NEXcepTion(NANO))
    with torch.device("meta"):
        empty = NEXcepTion(NANO)
    empty.to_empty(device="cpu")
    for value in [*empty.parameters(), *empty.buffers()]:
        value.data.fill_(float("nan") if value.is_floating_point() else 7)  # uninitialized memory
    empty.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(empty.eval()(x), model(x))


def test_command_line_prints_the_table_and_classifies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([])
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in MODELS) and "24,544,976" in listed and "8.357 G" in listed

    model = with_statistics(NEXcepTion(NANO))
    model.head.fc.weight.data.mul_(100)  # for probabilities that differ between images
    content = {"model": model.state_dict(), "ema": None, "config": asdict(NANO), "classes": list("abcdef")}
    content["transform"] = asdict(replace(TRANSFORM, exif=True))
    torch.save(content, "best.pt")
    torch.save(content | {"classes": None}, "nameless.pt")
    broken = model.state_dict() | {"head.fc.bias": torch.full((6,), float("nan"))}
    torch.save(content | {"model": broken}, "damaged.pt")
    for name in "uvwxyz":
        Path("names", name).mkdir(parents=True)
    Path("five.txt").write_text("a\nb\nc\nd\ne\n")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    photo.save("photo.png")
    # The same picture as stored by a camera held sideways, with an EXIF orientation.
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90°
    photo.transpose(Image.Transpose.ROTATE_90).save("sideways.png", exif=exif)
    main(["best.pt", "photo.png", "sideways.png"])
    lines = capsys.readouterr().out.splitlines()
    most_likely = model(TRANSFORM(photo)[None]).argmax().item()
    assert len(lines) == 12 and lines[1].split()[-1] == "abcdef"[most_likely] and lines[7:] == lines[1:6]

    main(["nameless.pt", "photo.png", "--classes", "names"])
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "uvwxyz"[most_likely]
    assert main(["damaged.pt", "photo.png"]) == 1
    assert re.search(r"damaged.pt gives logits that are not finite for .*photo.png$", capsys.readouterr().err)

    header = struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
    Path("bomb.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)
    for arguments, message in (
        (("best.pt", "bomb.bmp"), "bomb.bmp is not a readable image"),
        (("best.pt", "best.pt"), "not a readable image"),
        (("nameless.pt", "photo.png", "--classes", "five.txt"), "not the 6 classes of"),
        (("best.pt", "photo.png", "--classes", "names"), "not the 6 classes of"),
        (("absent.pt", "photo.png"), "no such file"),
        (("names", "photo.png"), "a folder, not a checkpoint"),
        (("best.pt",), "name the photographs"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_command_line_ends_quietly_when_a_pipe_is_closed():
    script = f"{sys.executable} model.py | head -1"
    done = subprocess.run(["bash", "-c", script], cwd=HERE.parent, capture_output=True, text=True)
    assert done.stdout.startswith("model ") and done.stdout.count("\n") == 1 and not done.stderr
