"""Tests of bench.py: counts against published figures and other counters, and all commands on tiny inputs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import bench
import model as models
from data import EvalTransform

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn


def run(*arguments) -> int:
    return bench.main([str(argument) for argument in arguments])


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(bench, "WORKER_SECONDS", 0.05)
    monkeypatch.setattr(bench, "DATA_BATCH", 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small network with four classes and random running statistics, in train.py's format."""
    torch.manual_seed(0)
    network = models.create_model("nexception_nano", num_classes=4)
    for name, tensor in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    content = {"model": network.state_dict(), "config": asdict(network.config)}
    content |= {"classes": ["ant", "bee", "cat", "dog"]}
    content |= {"transform": asdict(EvalTransform(32, 0.875, "bilinear"))}
    folder = tmp_path_factory.mktemp("run-7", numbered=False)
    (folder / "config.json").write_text("{}")
    torch.save(content, folder / "best.pt")
    return folder / "best.pt"


def make_images(folder: Path, counts: dict[str, int], suffix: str = "png") -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.{suffix}")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven noise images of two of the classes."""
    return make_images(tmp_path / "set", {"bee": 4, "dog": 3})


# Counts that do not round to Table 1's figures, as the papers of EfficientNet, ResNet and NEXcepTion round
# differently or count other layers, too.
KNOWN_DIFFERENCES = {
    "EfficientNet-B2": "9.11M 0.99G",
    "EfficientNet-B4": "19.34M 4.39G",
    "ResNet-101": "44.55M 7.80G",
    "NEXcepTion-TP": "26.56M 4.32G",
    "NEXcepTion-T": "24.54M 4.60G",
    "NEXcepTion-S": "43.39M 8.40G",
    "Xception": "22.86M 8.36G",
    "EfficientNetV2-S": "21.46M 8.37G",
    "EfficientNet-B5": "30.39M 10.27G",
}


class NeighborhoodShapes(nn.Module):
    """natten's attention for counting: its own kernels do not run on the meta device."""

    def __init__(self, width: int, num_heads: int, kernel_size: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.neighbours = kernel_size**2

    def forward(self, x):  # (B, H, W, C) -> (B, H, W, C)
        query = self.qkv(x).flatten(0, 2)[:, None, : x.shape[-1]]  # (B, H, W, 3C) -> (BHW, 1, C)
        keys = query.new_empty(len(query), x.shape[-1], self.neighbours)
        return self.proj(torch.bmm(torch.bmm(query, keys), keys.mT).view_as(x))


def test_peers_have_the_papers_parameters_and_macs(monkeypatch):
    natten = type(sys)("natten")
    natten.NeighborhoodAttention2D = NeighborhoodShapes
    monkeypatch.setitem(sys.modules, "natten", natten)
    found = {}
    for key, row in bench.TABLE_1.items():
        _, size, make = bench.find_model(key)
        assert size == row.size
        with torch.device("meta"):
            network = make()
        # Attention is counted only where there is any, as each count takes a third of a second.
        kinds = (False, True) if row.kind == "transformer" else (False,)
        macs = sum(models.count_macs(network, size, attention) for attention in kinds) / 1e9
        counts = models.count_parameters(network) / 1e6, macs
        for count, printed in zip(counts, (row.parameters, row.macs), strict=True):
            if abs(count - float(printed)) > 0.5005 * 10.0 ** -len(printed.partition(".")[2]):
                found[row.label] = f"{counts[0]:.2f}M {counts[1]:.2f}G"
    assert found == KNOWN_DIFFERENCES


def test_models_are_found_by_name_and_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("from torch import nn\ndef tiny(): return nn.Flatten()\n")
    replace(models.MODELS["nexception_nano"], input_size=48).to_json("own.json")
    replace(models.MODELS["nexception_tp"], stem="conv").to_json("least.json")
    sizes = {"xception": 299, "convnext_tiny@64": 64, "nexception_nano": 32, "own.json": 48, "resnet50": 224}
    sizes |= {"tf_efficientnet_b7": 600, "mine:tiny@40": 40}  # the first is timm's
    assert {spec: bench.find_model(spec)[1] for spec in sizes} == sizes
    for spec in ("resnet10t", "mine:tiny", "timm.models:resnet10t"):
        assert isinstance(bench.find_model(spec)[2](), nn.Module)
    for spec, message in (
        ("xception@x", "whole number"),
        ("resnext", "unknown model 'resnext'.*convnext_tiny"),
        ("least.json@32", "input_size: 32, but this network needs at least 35 pixels"),
        ("mine:huge", "huge"),
        ("yours:tiny", "yours"),
        (":tiny", "MODULE:FUNCTION"),
    ):
        with pytest.raises(bench.UsageError, match=message):
            bench.find_model(spec)


def test_rows_take_turns_in_changing_order():
    log, rows = [], []
    for i in (1, 2, 3):
        rows.append(bench.Row(str(i), work=lambda i=i: log.append(i) or 10 * i, base="2"))
    rows.append(bench.Row("4", missing="needs the package natten"))
    bench.take_turns(rows, 8, lambda work: (work(), 2.0))
    orders = [tuple(log[i : i + 3]) for i in range(0, 27, 3)]
    assert all(sorted(order) == [1, 2, 3] for order in orders)
    assert len(set(orders)) > 1
    assert [row.samples for row in rows] == [[5.0] * 8, [10.0] * 8, [15.0] * 8, []]
    assert [row.ratio and row.ratio["mean"] for row in rows] == [0.5, 1.0, 1.5, None]


def test_ctrl_c_keeps_whole_repetitions(capsys):
    """The first repetition, which warms up, is not recorded; ratios are those within each repetition."""
    rows = [
        bench.Row("a", Mock(side_effect=[7, 10, 20, KeyboardInterrupt]), base="b"),
        bench.Row("b", lambda: 20),
    ]
    bench.take_turns(rows, 10, lambda work: (work(), 1.0))
    assert [row.samples for row in rows] == [[10.0, 20.0], [20.0, 20.0]]
    assert rows[0].ratio == {"mean": 0.75, "deviation": pytest.approx(0.125**0.5), "median": 0.75}
    assert "2 of 10" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        bench.take_turns(
            [bench.Row("a", Mock(side_effect=[5, KeyboardInterrupt]))], 10, lambda work: (work(), 1)
        )


def test_a_gpu_is_timed_from_idle_to_idle(monkeypatch):
    log = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append(str(device)))
    assert bench.stopwatch(torch.device("cuda:1"))(lambda: log.append("work") or 3)[0] == 3
    assert log == ["cuda:1", "work", "cuda:1"]


SPEED = ["speed", "--device", "cpu", "--batch", 8, "--repetitions", 2]


def test_speed_writes_every_sample(tmp_path, capsys):
    names = "nexception_nano,resnet18@32,nat_mini,torchvision.models:squeezenet1_1@64"
    assert run(*SPEED, "--fuse", "--models", names, "--out", tmp_path) == 0
    record = read_json(tmp_path / "speed-cpu-float32-fuse.json")
    rows = {row["label"]: row for row in record["rows"]}
    if importlib.util.find_spec("natten") is None:
        assert rows.pop("NAT-Mini")["missing"] == "needs the package natten"
    assert list(rows) == [name for name in names.split(",") if name != "nat_mini"]
    assert all(len(row["samples"]) == 2 and min(row["samples"]) > 0 for row in rows.values())
    assert rows["resnet18@32"]["base"] == "nexception_nano" and "ratio" in rows["resnet18@32"]
    assert record["machine"]["torch"] == torch.__version__
    text, shown = (tmp_path / "speed-cpu-float32-fuse.md").read_text(), capsys.readouterr().out
    assert all(label in text and label in shown for label in (*rows, "NAT-Mini", "needs the package natten"))


def test_speed_in_training_updates_the_weights():
    row, network = bench.ModelRow("nano", size=32), models.create_model("nexception_nano")
    before = {name: value.clone() for name, value in network.named_parameters()}
    options = bench.SpeedOptions(device="cpu", amp="off", batch=2, train=True)
    bench.prepare(row, lambda: network, options)
    assert row.work() == 2
    assert all(not torch.equal(before[name], value) for name, value in network.named_parameters())


# Models whose passes fail in several ways, and one that fails to build.
SCARCE = """
import torch
def checked(check):
    network = torch.nn.Flatten()
    def hook(_, images):
        if not images[0].is_meta:
            check(len(images[0]))
    network.register_forward_pre_hook(hook)
    return network
def out_of_memory(count): raise torch.OutOfMemoryError()
def two(): return checked(lambda count: count > 2 and out_of_memory(count))
def two_on_cpu(): return checked(lambda count: count > 2 and torch.empty(2**60))  # a plain RuntimeError
def none(): return checked(out_of_memory)
def later(passes=iter(range(6))): return checked(lambda count: next(passes))
def broken(): raise OSError("no weights\\nhere")
"""


def test_a_model_that_fails_costs_only_its_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("scarce.py").write_text(SCARCE)
    names = ["two", "two_on_cpu", "none", "later", "broken"]
    specs = ",".join(f"scarce:{name}@32" for name in names)
    assert run(*SPEED, "--models", f"nexception_nano,{specs}", "--out", tmp_path) == 0
    reasons = ["fails, OutOfMemoryError: ", "fails, StopIteration: ", "fails, OSError: no weights here"]
    rows = read_json(tmp_path / "speed-cpu-float32.json")["rows"]
    assert [row.get("missing") for row in rows] == [None, None, None, *reasons]
    assert [len(row.get("samples", [])) for row in rows] == [2, 2, 2, 0, 0, 0]
    assert [row["batch"] for row in rows[:3]] == [8, 2, 2]
    out, err = capsys.readouterr()
    assert "scarce:two@32: ready, batch 2" in err
    assert 'scarce.py", line 15, in broken' in err  # in the traceback
    (line,) = (line for line in out.splitlines() if line.startswith("| scarce:two@32 "))
    assert line.split("|")[5].strip() == "2"  # the batch, after input, parameters and MACs


def test_results_of_other_options_and_damaged_files_are_not_overwritten(tmp_path):
    names = ["speed", "speed-2", "speed-3", "speed-4", "speed-5"]
    damaged = dict(zip(names[1:4], ("", "<<<<<<< HEAD", "[]"), strict=True))
    for name, content in damaged.items():
        (tmp_path / f"{name}.json").write_text(content)
    for batch in (1, 2, 2):
        options = bench.SpeedOptions(batch=batch, out=str(tmp_path))
        bench.write_results("speed", options, torch.device("cpu"), "", [])
    contents = {name: (tmp_path / f"{name}.json").read_text() for name in names}
    assert [json.loads(contents.pop(name))["options"]["batch"] for name in ("speed", "speed-5")] == [1, 2]
    assert contents == damaged


@pytest.mark.gpu
def test_speed_on_a_gpu(tmp_path):
    arguments = ["--models", "nexception_t@64,convnext_tiny@64", "--batch", 4, "--device", "cuda"]
    assert run(*SPEED, *arguments, "--fuse", "--compile", "--out", tmp_path) == 0
    (path,) = tmp_path.glob("speed-*-compile-fuse.json")
    assert all(row["memory"] > 4 * row["parameters"] for row in read_json(path)["rows"])


def test_ctrl_c_is_one_sentence_and_errors_of_pytorch_are_not(monkeypatch, capsys):
    command = Mock(side_effect=[KeyboardInterrupt, RuntimeError("inconsistent tensor size")])
    monkeypatch.setitem(bench.COMMANDS, "export", (command, bench.ExportOptions))
    assert run("export", "x") == 130
    assert capsys.readouterr().err == "bench.py export: stopped\n"
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run("export", "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a command"),
        (["fly"], "speed, accuracy"),
        (["figures", "--out", __file__], "--out"),
        (["speed", "--models", "nexception_q"], "unknown model 'nexception_q'"),
        (["accuracy", "nothing.pt", "imagenet=."], "nothing.pt: no such file"),
        (["speed", "--repetitions", "0"], "--repetitions"),
        (["speed", "--train", "--fuse"], "--fuse is for evaluation"),
        (["speed", "--device", "abacus"], "--device abacus"),
        (["speed", "--amp", "int8"], "int8"),
        (["accuracy", "absent.pt", "absent"], "absent.pt"),
        (["data", ".", "--workers", "1,0"], "--workers"),
        (["accuracy", "nexception_t", "absent"], "give a checkpoint file"),
        (["data", "nowhere"], "there is no folder"),
        (["figures", "absent.json"], "absent.json is no JSON file of `bench.py speed`"),
        (["figures", __file__], "is no JSON file of"),
        (["export", "absent.pt", "--out", "a/b/c"], "absent.pt"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


ACCURACY = ["--workers", 0, "--device", "cpu"]


def test_accuracy_masks_classes_without_a_folder(checkpoint, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    arguments = ["accuracy", checkpoint, folder, f"again={tmp_path / 'copy'}", "--batch", 3, *ACCURACY]
    assert run(*arguments, "--out", tmp_path / "results") == 0
    first, second = read_json(tmp_path / "results" / "accuracy-run-7.json")["rows"]  # named after the run
    assert (first["set"], second["set"]) == ("set", "again")
    # Expected: logits (7, 4) of the unfused model, image by image through PIL; labels in the model's order.
    network = models.load_checkpoint(checkpoint)
    paths = sorted(folder.glob("*/*.png"))
    labels = np.array([network.classes.index(path.parent.name) for path in paths])
    with torch.no_grad():
        logits = np.stack([network(network.transform(Image.open(path))[None])[0].numpy() for path in paths])
    hits = (logits[:, 3] > logits[:, 1]) == (labels == 3)
    assert 0 < hits.mean() < 1
    for row in (first, second):
        assert (row["count"], row["classes"], row["top5"]) == (7, 2, 100)
        assert row["top1"] == pytest.approx(100 * hits.mean())
    out = capsys.readouterr().out
    assert f"{first['top1']:.2f}" in out and "results/accuracy-run-7.json" in out and "Swin-T" not in out

    (tmp_path / "names.txt").write_text("bee\nant\ncat\ndog")
    assert run(*arguments, "--classes", tmp_path / "names.txt") == 2
    assert "has other class names" in capsys.readouterr().err
    (tmp_path / "copy" / "bee").rename(tmp_path / "copy" / "emu")
    assert run(*arguments, "--out", tmp_path / "none") == 2  # before the first is evaluated
    assert "no class of the model is called emu" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_papers_figures_stand_beside_ours(folder, tmp_path, monkeypatch, capsys):
    network = models.create_model("nexception_tp")
    torch.save({"state_dict": models.export_official(network)}, tmp_path / "tp.pth")
    found = {"count": 7, "top1": 20.0, "top5": 40.0, "unreadable": 0}
    monkeypatch.setattr(bench, "evaluate", lambda *arguments, columns: found)
    names = [f"n{i:08} {i}" for i in range(998)]
    (tmp_path / "names.txt").write_text("\n".join(["bee", "dog", *names]))
    sets = [f"{name}={folder}" for name in ("imagenet", "ImageNet-A", "other")]
    arguments = ["accuracy", tmp_path / "tp.pth", *sets, "--size", 32, *ACCURACY, "--out", tmp_path]
    assert run(*arguments) == 2 and "give --classes" in capsys.readouterr().err
    for command in (arguments, ["export", tmp_path / "tp.pth"]):
        assert run(*command, "--size", 16) == 2
        assert "input_size: 16, but this network needs at least 32" in capsys.readouterr().err
    assert run(*arguments, "--classes", folder) == 2
    assert f"{folder} has 2 classes and the model 1000 outputs" in capsys.readouterr().err
    assert run(*arguments, "--classes", tmp_path / "names.txt") == 0
    rows = read_json(tmp_path / "accuracy-tp.json")["rows"]
    assert [row.get("paper_top1") for row in rows] == [81.8, 22.75, None]
    out = capsys.readouterr().out
    for row in (r"ConvNeXt-T +\| +82.1 \| +24.2 ", r"RVT-S +\| not given \| +25.7 "):
        assert re.search(row, out)


OWN = """
import torch, data
def flat():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 24, 2))
    network.transform = data.EvalTransform(24, 1.0, "bilinear")
    return network
def nan():
    network = flat()
    torch.nn.init.constant_(network[1].bias, torch.nan)
    return network
def broken(): raise OSError("no weights here")
"""


def test_accuracy_of_models_that_are_no_checkpoints(folder, tmp_path, monkeypatch, capsys):
    """Torchvision's and timm's networks get their transforms, one's own has it as an attribute."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    assert run("accuracy", "own:flat", folder, *ACCURACY) == 0
    record = read_json(Path("runs/bench/accuracy-own-flat.json"))
    assert (record["transform"]["size"], record["rows"][0]["count"]) == (24, 7)
    assert run("accuracy", "own:nan", f"noise={folder}", *ACCURACY) == 1
    assert "own:nan on noise: the outputs for 7 of 7 images" in capsys.readouterr().err
    with pytest.raises(OSError, match="no weights here"):  # the user's own error
        run("accuracy", "own:broken", folder, *ACCURACY)
    network = torchvision.models.squeezenet1_1(num_classes=1000)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, "squeeze.pt")
    Path("names.txt").write_text("\n".join(["bee", "dog", *map(str, range(998))]))
    names = ["--classes", "names.txt", *ACCURACY]
    assert run("accuracy", "squeezenet1_1@64", folder, "--weights", "squeeze.pt", *names) == 0
    assert read_json(Path("runs/bench/accuracy-squeezenet1_1-64.json"))["transform"]["size"] == 64
    assert run("accuracy", "resnet18", folder, "--weights", "squeeze.pt", *names) == 2
    assert "resnet18: squeeze.pt does not fit" in capsys.readouterr().err
    offline = Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    assert run("accuracy", "swin_t", folder, *names) == 2
    assert "no pretrained weights: give --weights (no route to host)" in capsys.readouterr().err
    offline.assert_called_with("swin_t", weights="DEFAULT")


def test_transforms_of_packages_are_theirs():
    import timm

    for name in torchvision.models.list_models(torchvision.models):
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        found = bench.transform_of(name, nn.Identity())
        resized = math.floor(found.size / found.crop_pct)
        assert (found.size, resized) == (preset.crop_size[0], preset.resize_size[0])
        assert (found.mean, found.interpolation) == (tuple(preset.mean), preset.interpolation.value)
    found = bench.transform_of("resnet10t", timm.create_model("resnet10t"))
    assert found == EvalTransform(176, 0.875, "bicubic")
    assert bench.transform_of("nothing", nn.Identity()) == EvalTransform()


def test_export_computes_what_the_checkpoint_does(checkpoint, tmp_path, capsys):
    assert run("export", checkpoint, "--out", tmp_path) == 0
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        wanted = models.load_checkpoint(checkpoint)(images).numpy()
    found = {"run-7.pt2": torch.export.load(tmp_path / "run-7.pt2").module()(images).numpy()}
    if "pip install" not in capsys.readouterr().out:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(tmp_path / "run-7.onnx", providers=["CPUExecutionProvider"])
        found["run-7.onnx"] = session.run(None, {"images": images.numpy()})[0]
    for logits in found.values():
        np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {*found, "run-7.export.json"}
    side = read_json(tmp_path / "run-7.export.json")
    assert side["classes"] == ["ant", "bee", "cat", "dog"]
    assert EvalTransform(**side["transform"]) == EvalTransform(32, 0.875, "bilinear")
    other = tmp_path / "run-7.pt"
    shutil.copy(checkpoint, other)
    assert run("export", other, "--out", tmp_path) == 2
    assert "run-7.export.json is of another checkpoint" in capsys.readouterr().err


def test_export_refuses_what_differs(checkpoint, tmp_path, monkeypatch, capsys):
    load = torch.export.load
    wrong = type("Wrong", (), {"module": lambda self: lambda x: torch.zeros(len(x), 4)})
    monkeypatch.setattr(torch.export, "load", lambda file: load(file) and wrong())
    assert run("export", checkpoint, "--out", tmp_path) == 1
    assert "run-7.pt2 not written" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_figures_of_the_paper_and_of_results(tmp_path, monkeypatch):
    draw, drawn = bench.draw, []
    monkeypatch.setattr(bench, "draw", lambda *arguments: drawn.append((arguments[1], *draw(*arguments))))
    rows = [
        {"name": key, "size": row.size, "samples": [float(i + 1), float(i + 3)]}
        for i, (key, row) in enumerate(bench.TABLE_1.items())
    ]
    rows.append(rows[0] | {"size": 32})  # ignored, as the paper has no accuracy at this size
    rows.append({"name": "mine:huge", "label": "mine:huge", "missing": "out of memory at batch 1"})
    options = {"train": False, "batch": 16, "amp": "off"}
    record = {"rows": rows, "machine": {"threads": 2}, "options": options, "precision": "float32"}
    file = tmp_path / "speed-cpu-float32.json"
    file.write_text(json.dumps(record))
    assert run("figures", file, "--out", tmp_path) == 0
    for name in ("figure-2", "figure-3", "figure-3-cpu-float32"):
        svg = (tmp_path / f"{name}.svg").read_text()
        assert all(f"<!-- {row.label} -->" in svg for row in bench.TABLE_1.values())
        assert Image.open(tmp_path / f"{name}.png").width == 1660
    assert "not measured: mine:huge" in drawn[0][0]
    for _, texts, discs in drawn:  # labels are apart from each other, from all discs and from the axes
        boxes = np.array([text.get_window_extent().get_points() for text in texts])  # (N, 2, 2)
        frame = texts[0].axes.get_window_extent().get_points()
        assert (boxes[:, 0] > frame[0] + 4).all() and (boxes[:, 1] < frame[1] - 4).all()
        for i, (low, high) in enumerate(boxes):
            others = np.delete(boxes, i, axis=0)
            assert np.maximum(others[:, 0] - high, low - others[:, 1]).max(1).min() > 4  # pixels
            nearest = np.clip(discs[:, :2], low, high)
            assert (np.hypot(*(nearest - discs[:, :2]).T) > discs[:, 2] + 2).all()
    speeds, _ = bench.measured(str(file))
    assert list(speeds.values()) == [i + 2.0 for i in range(len(bench.TABLE_1))]
    for content in ([], record | {"options": {}}, record | {"rows": rows[-1:]}):
        file.write_text(json.dumps(content))
        with pytest.raises(bench.UsageError, match=r"32\.json is no JSON file of"):
            bench.measured(str(file))
    committed = list(Path(bench.__file__).parent.glob("results/speed-*.json"))
    assert committed and all(bench.measured(str(path))[0] for path in committed)


def test_data_times_the_input_pipeline(tmp_path, capsys):
    make_images(tmp_path / "set" / "train", {"ant": 4, "bee": 4}, "jpg")
    arguments = ["data", tmp_path / "set", "--repetitions", 1, "--workers", "1,2", "--out", tmp_path]
    for rate, advice in (
        (1e6, r"1,000,000 images/s needs --workers \d{3}"),
        (1, "needs --workers 1, as measured"),
    ):
        assert run(*arguments, "--rate", rate) == 0
        assert re.search(advice, capsys.readouterr().out)
    (path, _) = sorted(tmp_path.glob("data-*.json"))
    rows = {row["label"]: row["samples"] for row in read_json(path)["rows"]}
    one_core = ["training", "training without RandAugment", "evaluation"]
    assert list(rows) == [*one_core, "training, 1 worker", "training, 2 workers"]
    assert all(min(samples) > 0 for samples in rows.values())
