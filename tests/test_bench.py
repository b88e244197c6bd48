"""bench.py: counts against published figures and other counters, and every subcommand on tiny inputs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import bench
import model as models
from data import EvalTransform

ROOT = Path(__file__).parent.parent


def run(*arguments) -> int:
    return bench.main([str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small network with four classes, in train.py's format."""
    network = models.create_model("nexception_nano", num_classes=4)
    bench.fill(network)
    content = {
        "model": network.state_dict(),
        "config": network.config.to_dict(),
        "classes": ["ant", "bee", "cat", "dog"],
        "transform": EvalTransform(32, 0.875, "bilinear").to_dict(),
    }
    torch.save(content, tmp_path / "best.pt")
    return tmp_path / "best.pt"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven noise images of two of the classes."""
    rng = np.random.default_rng(0)
    for name, count in (("bee", 4), ("dog", 3)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


# --------------------------------------------------------------------------------------------------
# Models and counts

# Table 1's figures that a count of the built models does not round to. EfficientNet's and ResNet's own papers
# round otherwise or count other layers too, and so does NEXcepTion's for ours.
KNOWN_DIFFERENCES = [
    "EfficientNet-B2: parameters 9.11M counted, 9.2M printed",
    "EfficientNet-B4: MACs 4.39G counted, 4.2G printed",
    "ResNet-101: MACs 7.80G counted, 7.9G printed",
    "NEXcepTion-TP: MACs 4.32G counted, 4.5G printed",
    "NEXcepTion-T: MACs 4.60G counted, 4.7G printed",
    "NEXcepTion-S: MACs 8.40G counted, 8.5G printed",
    "Xception: parameters 22.86M counted, 23.6M printed",
    "EfficientNetV2-S: parameters 21.46M counted, 22M printed",
    "EfficientNetV2-S: MACs 8.37G counted, 8.8G printed",
    "EfficientNet-B5: MACs 10.27G counted, 9.9G printed",
]


def test_peers_have_the_papers_parameters_and_macs(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", type(sys)("natten"))
    monkeypatch.setattr(
        sys.modules["natten"], "NeighborhoodAttention2D", bench.NeighborhoodShapes, raising=False
    )
    found = []
    for key, row in bench.TABLE_1.items():
        with torch.device("meta"):
            network = bench.build_model(key)
        macs = sum(bench.count_macs(network, row.size))
        found += bench.differences(row, models.count_parameters(network), macs)
    assert sorted(found) == sorted(KNOWN_DIFFERENCES)


@pytest.mark.parametrize("name", ["nexception_tp", "xception", "nexception_nano"])
def test_both_counters_of_macs_agree(name):
    with torch.device("meta"):
        network = models.create_model(name)
    size = network.config.input_size
    assert bench.count_macs(network, size) == (models.count_macs(network, size), 0)


def test_macs_of_attention_by_hand():
    tokens, width, classes = 4 * 4 + 1, 64, 1000
    network = torchvision.models.VisionTransformer(32, 8, 2, 4, width, 128, num_classes=classes)
    layers = 16 * 3 * 8 * 8 * width + 2 * tokens * (4 * width * width + 2 * width * 128) + width * classes
    assert bench.count_macs(network, 32) == (layers, 2 * 2 * tokens * tokens * width)


def test_small_vit_is_timms():
    import timm

    with torch.device("meta"):
        ours, theirs = bench.build_model("deit_small"), timm.create_model("deit_small_patch16_224")
    assert sorted(p.shape for p in ours.parameters()) == sorted(p.shape for p in theirs.parameters())


def test_specs_and_unknown_models():
    assert bench.parse_spec("xception") == ("xception", 299)
    assert bench.parse_spec("convnext_tiny@64") == ("convnext_tiny", 64)
    assert bench.parse_spec("nexception_nano") == ("nexception_nano", 32)
    with pytest.raises(bench.UsageError, match=r"'xception@x'.*whole number"):
        bench.parse_spec("xception@x")
    with pytest.raises(bench.UsageError, match=r"unknown model 'resnext'.*convnext_tiny"):
        bench.build_model("resnext")
    assert isinstance(bench.build_model("resnet10t"), nn.Module)  # timm's
    assert bench.parse_spec("tf_efficientnet_b7") == ("tf_efficientnet_b7", 600)


def test_peers_of_the_reader(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def tiny(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "number = 3\n"
    )
    (tmp_path / "broken.py").write_text("def tiny(:")
    monkeypatch.chdir(tmp_path)
    network = bench.build_model("peer:mine:tiny")
    assert bench.count_macs(network, 32) == (8 * 27 * 30 * 30, 0)
    for path, message in (
        ("mine", "MODULE:CALLABLE"),
        ("mine:huge", "huge"),
        ("yours:tiny", "yours"),
        ("mine:number", "can't be called"),
        ("broken:tiny", "SyntaxError"),
    ):
        with pytest.raises(bench.UsageError, match=message):
            bench.model_maker("peer:" + path)


# --------------------------------------------------------------------------------------------------
# speed


def speed_options(**overrides) -> bench.SpeedOptions:
    values = {"device": "cpu", "dtype": "float32", "batch": 8, "seconds": 0.0, **overrides}
    return bench.SpeedOptions(models=("nexception_nano",), **values)


def test_speed_writes_every_sample(tmp_path):
    command = [sys.executable, "bench.py", "speed", "--models", "nexception_nano,resnet18@32,nat_mini"]
    command += "--batch 2 --repetitions 2 --fuse --plain --threads 1 --seconds 0 --device cpu".split()  # noqa: SIM905
    command += ["--peer", "torchvision.models:squeezenet1_1@64", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "speed-cpu-float32-fuse-plain.json").read_text())
    rows = {row["label"]: row for row in record["rows"]}
    if importlib.util.find_spec("natten") is None:
        assert "natten" in rows["NAT-Mini"]["missing"]
    for name in ("nexception_nano", "resnet18", "torchvision.models:squeezenet1_1"):
        tuned, plain = rows[name], rows[f"{name}, plain"]
        for row in (tuned, plain):
            assert len(row["samples"]) == 2
            assert len(row["latencies"]) == 6
            assert min(row["samples"] + row["latencies"]) > 0
        assert plain["logit_difference"] < 1e-5
        ratio = np.mean(np.array(tuned["samples"]) / plain["samples"])
        assert tuned["to_plain"][0] == pytest.approx(ratio)
    assert record["machine"]["threads"] == 1
    assert record["machine"]["torch"] == torch.__version__
    text = (tmp_path / "speed-cpu-float32-fuse-plain.md").read_text()
    assert all(label in text and label in done.stdout for label in rows)


def test_speed_in_training_updates_the_weights():
    timed = bench.Timed("nexception_nano", speed_options(train=True, batch=2))
    before = {name: value.clone() for name, value in timed.model.state_dict().items()}
    speed, latencies = timed.turn()
    after = timed.model.state_dict()
    assert speed > 0
    assert latencies == []
    assert all(not torch.equal(before[name], after[name]) for name, _ in timed.model.named_parameters())


def test_batch_halves_when_out_of_memory(monkeypatch):
    step = bench.Timed.step

    def scarce(self):
        if self.batch > 2:
            raise torch.OutOfMemoryError("no room")
        step(self)

    monkeypatch.setattr(bench.Timed, "step", scarce)
    timed = bench.Timed("nexception_nano", speed_options())
    assert timed.batch == len(timed.inputs) == 2


def test_the_cpu_s_own_error_of_memory_halves_the_batch(monkeypatch):
    step = bench.Timed.step

    def scarce(self):
        if self.batch > 2:
            torch.empty(2**60)
        step(self)

    monkeypatch.setattr(bench.Timed, "step", scarce)
    timed = bench.Timed("nexception_nano", speed_options())
    assert timed.batch == 2
    row = {"label": "A", "size": 32, "samples": [1.0], "ratio": (1.0, 0.0), "latencies": [], "share": 0.5}
    table = bench.speed_table([row | timed.facts()], "A", 8)
    assert "1.00 ± 0.00 (batch 2)" in table


def test_a_model_that_fails_costs_the_others_nothing(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text("def broken(): raise OSError('no weights here')\nwrong = int\n")
    monkeypatch.chdir(tmp_path)
    turn, turns = bench.Timed.turn, []

    def scarce(self):
        turns.append(self.size)
        if self.size == 64 and len(turns) > 3:
            raise torch.OutOfMemoryError("no room\nfor this one")
        return turn(self)

    monkeypatch.setattr(bench.Timed, "turn", scarce)
    arguments = ["--models", "nexception_nano,nexception_nano@64", "--peer", "failing:broken,failing:wrong"]
    arguments += ["--batch", "2", "--repetitions", "4", "--seconds", "0", "--device", "cpu"]
    assert run("speed", *arguments, "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "speed-cpu-float32.json").read_text())["rows"]
    assert len(rows[0]["samples"]) == 4
    assert [row.get("missing") for row in rows] == [
        None,
        "fails, OutOfMemoryError: no room for this one",
        "fails, OSError: no weights here",
        "fails, TypeError: gives a int, not a torch.nn.Module",
    ]


def test_training_memory_includes_the_optimizer_s_moments(monkeypatch):
    monkeypatch.setattr(bench, "PeakMemory", lambda device: contextlib.nullcontext(SimpleNamespace(bytes=7)))
    timed = bench.Timed("nexception_nano", speed_options(train=True, batch=2))
    moments = 2 * 4 * timed.parameters
    assert moments <= timed.memory - timed.weights - 7 < 1.01 * moments


def test_results_of_other_options_are_not_overwritten(tmp_path):
    command = [
        "speed",
        "--models",
        "nexception_nano",
        "--repetitions",
        "1",
        "--seconds",
        "0",
        "--device",
        "cpu",
    ]
    for batch in (1, 2, 2):
        assert run(*command, "--batch", batch, "--out", tmp_path) == 0
    batches = {
        path.name: json.loads(path.read_text())["options"]["batch"] for path in tmp_path.glob("*.json")
    }
    assert batches == {"speed-cpu-float32.json": 1, "speed-cpu-float32-2.json": 2}


def test_ctrl_c_is_one_sentence(monkeypatch, capsys):
    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.COMMANDS, "lamb", (stopped, bench.LambOptions))
    assert run("lamb") == 130
    assert capsys.readouterr().err == "bench.py lamb: stopped\n"


def test_files_are_not_written_behind_a_file(tmp_path, capsys):
    (tmp_path / "afile").write_text("")
    for command in (["speed"], ["figures"], ["lamb"], ["trial"]):
        assert run(*command, "--out", tmp_path / "afile" / "results") == 2
        assert f"{tmp_path / 'afile'} is a file" in capsys.readouterr().err


def test_a_model_too_large_for_one_image_gets_a_row(monkeypatch):
    def scarce(self):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench.Timed, "step", scarce)
    assert bench.build_rows(speed_options())[0]["missing"] == "out of memory at batch 1"


def test_models_take_turns_in_changing_order():
    log = []
    rows = [{"timed": lambda i=i: (log.append(i), (10.0 * i, [0.1]))[1]} for i in (1, 2, 3)]
    rows.append({"missing": "needs the package natten"})
    bench.take_turns(rows, 8)
    orders = [tuple(log[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(order) == [1, 2, 3] for order in orders)
    assert len(set(orders)) > 1
    assert [row.get("samples") for row in rows] == [[10.0] * 8, [20.0] * 8, [30.0] * 8, None]


def test_ctrl_c_keeps_whole_repetitions(capsys):
    calls = []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 5.0, []

    rows = [{"timed": interrupted}, {"timed": lambda: (7.0, [])}]
    bench.take_turns(rows, 10)
    assert [row["samples"] for row in rows] == [[5.0, 5.0], [7.0, 7.0]]
    assert "2 of 10" in capsys.readouterr().out


def test_ratios_by_hand():
    rows = [
        {"name": "a", "spec": "a", "label": "A", "variant": "", "samples": [10.0, 20.0]},
        {"name": "a", "spec": "a", "label": "A, plain", "variant": "plain", "samples": [5.0, 5.0]},
        {"name": "b", "spec": "b@64", "label": "B", "variant": "", "samples": [20.0, 20.0]},
    ]
    assert bench.add_ratios(rows, "b") == "B"
    assert rows[0]["ratio"] == (0.75, pytest.approx(math.sqrt(0.125)))
    assert rows[0]["to_plain"] == (3.0, pytest.approx(math.sqrt(2)))
    assert rows[2]["ratio"] == (1.0, 0.0)
    assert bench.add_ratios(rows, "absent") == "A"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_a_known_tensor():
    with bench.PeakMemory(torch.device("cpu")) as peak:
        torch.ones(16 * 2**20).sum()
    assert 60 * 2**20 < peak.bytes < 80 * 2**20


@pytest.mark.gpu
def test_speed_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.blocks.DepthwiseConv2d, "use_triton", False)  # and back behind --triton
    arguments = ["--models", "nexception_t@64,convnext_tiny@64", "--batch", "4", "--repetitions", "2"]
    for more in ([], ["--triton"]):
        assert (
            run("speed", *arguments, "--device", "cuda", "--fuse", "--compile", *more, "--out", tmp_path) == 0
        )
    assert len(list(tmp_path.glob("speed-*-compile-fuse-triton.json"))) == 1
    (path,) = tmp_path.glob("speed-*-compile-fuse.json")
    rows = json.loads(path.read_text())["rows"]
    assert all(row["memory"] > row["parameters"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a command"),
        (["fly"], "speed, accuracy"),
        (["speed", "--models", "nexception_q"], "unknown model 'nexception_q'"),
        (["speed", "--models", "xception,xception"], "each model once"),
        (["speed", "--repetitions", "0"], "--repetitions 0"),
        (["speed", "--seconds", "inf"], "--seconds inf"),
        (["speed", "--seconds", "-1"], "--seconds -1.0: must be at least 0"),
        (["speed", "--threads", "100000"], "at most"),
        (["speed", "--baseline", "covnext"], "--baseline covnext"),
        (["speed", "--models", "resnet50", "--peer", "math:pi"], "pi can't be called"),
        (["speed", "--device", "meta"], "--device meta"),
        (["accuracy", "absent.pt", "absent", "--batch", "0"], "--batch 0"),
        (["data", "--workers", "two"], "--workers two"),
        (["lamb", "--repetitions", "0"], "--repetitions 0"),
        (["trial", "--device", "gpu"], "gpu"),
        (["speed", "--train", "--fuse"], "--fuse is for evaluation"),
        (["speed", "--triton", "--device", "cpu"], "--device cuda, not cpu"),
        (["speed", "--device", "abacus"], "--device abacus"),
        (["speed", "--dtype", "int8"], "int8"),
        (["speed", "--speed", "3"], "--speed"),
        (["accuracy", "absent.pt", "absent"], "absent.pt"),
        (["accuracy", "absent.pt", "absent", "--model", "resnet18"], "absent.pt"),
        (["accuracy", "absent.pt", "absent", "--model", "nexception_t"], "leave it out"),
        (["figures", "absent.json"], "absent.json"),
        (["export", "absent.pt", "--formats", "tflite"], "tflite"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# accuracy


def logits_by_hand(checkpoint: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) logits of the images one by one, unfused, through PIL; and (N,) labels in the model's order."""
    network = models.load_checkpoint(checkpoint)
    logits, labels = [], []
    for path in sorted(folder.glob("*/*.png")):
        with torch.no_grad(), Image.open(path) as image:
            logits.append(network(network.transform(image)[None])[0].numpy())
        labels.append(network.classes.index(path.parent.name))
    return np.stack(logits), np.array(labels)


def test_accuracy_masks_classes_without_a_folder(checkpoint, folder, tmp_path, capsys):
    arguments = ["--calibration", "--per-class", "--batch", 3, "--workers", 0, "--out", tmp_path / "results"]
    assert run("accuracy", checkpoint, f"imagenet-a={folder}", *arguments, "--device", "cpu") == 0
    record = json.loads((tmp_path / "results" / "accuracy-best.json").read_text())
    (row,) = record["rows"]
    logits, labels = logits_by_hand(checkpoint, folder)
    two = np.exp(logits[:, [1, 3]]) / np.exp(logits[:, [1, 3]]).sum(1, keepdims=True)
    hits = two.argmax(1) == (labels == 3)
    assert row["images"] == 7
    assert row["top1"] == pytest.approx(100 * hits.mean())
    assert row["top5"] == 100
    assert row["per_class"] == {
        "bee": pytest.approx(100 * hits[labels == 1].mean()),
        "dog": pytest.approx(100 * hits[labels == 3].mean()),
    }
    bins = np.minimum((two.max(1) * 15).astype(int), 14)
    gaps = [
        abs(hits[bins == b].mean() - two.max(1)[bins == b].mean()) * (bins == b).mean() for b in set(bins)
    ]
    assert row["ece"] == pytest.approx(
        100 * sum(gaps), abs=0.1
    )  # decoding and resizing differ by a grey level
    assert f"{row['top1']:.2f}" in capsys.readouterr().out


def test_accuracy_names_a_folder_that_is_no_class(checkpoint, folder, tmp_path, capsys):
    (folder / "bee").rename(folder / "emu")
    assert run("accuracy", checkpoint, folder, "--workers", 0, "--out", tmp_path) == 2
    assert "no class of the model is called emu" in capsys.readouterr().err


def test_accuracy_refuses_what_is_no_state_dict(folder, tmp_path, capsys):
    for content in (torch.ones(2), {"model": torch.ones(2)}, {}):
        torch.save(content, tmp_path / "odd.pt")
        assert run("accuracy", tmp_path / "odd.pt", folder, "--model", "resnet18", "--out", tmp_path) == 2
        assert "odd.pt" in capsys.readouterr().err
    (tmp_path / "odd.pt").write_text("text")
    assert run("accuracy", tmp_path / "odd.pt", folder, "--model", "resnet18", "--out", tmp_path) == 2
    assert "no readable checkpoint" in capsys.readouterr().err


def test_timm_s_files_fit_names_that_torchvision_has_too(tmp_path):
    timm = pytest.importorskip("timm")
    for name in ("efficientnet_b0", "swin_b"):  # the second is torchvision's alone
        make = timm.create_model if timm.is_model(name) else torchvision.models.get_model
        torch.save(make(name).state_dict(), tmp_path / "file.pt")
        options = bench.AccuracyOptions(str(tmp_path / "file.pt"), (), model=name)
        assert bench.open_peer(options).transform.size == 224


def test_accuracy_of_a_torchvision_file(folder, tmp_path, capsys):
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "resnet18-f37072fd.pth")
    names = [f"n{i:08}" for i in range(1000)]
    names[5], names[800] = "dog", "bee"
    (tmp_path / "names.txt").write_text("\n".join(names))
    arguments = [
        "accuracy",
        tmp_path / "resnet18-f37072fd.pth",
        folder,
        "--model",
        "resnet18",
        "--workers",
        0,
    ]
    arguments += ["--out", tmp_path, "--device", "cpu"]
    assert run(*arguments) == 2
    assert "give --classes" in capsys.readouterr().err
    assert run(*arguments, "--classes", tmp_path / "names.txt", "--size", 64) == 0
    record = json.loads((tmp_path / "accuracy-resnet18-f37072fd.json").read_text())
    assert record["rows"][0]["images"] == 7
    assert record["transform"]["size"] == 64
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert record["transform"]["interpolation"] == preset.interpolation.value
    options = bench.AccuracyOptions(str(tmp_path / "resnet18-f37072fd.pth"), (), model="resnet18")
    transform = bench.open_network(options).transform
    assert transform.resized(300, 400)[0] == preset.resize_size[0]
    with pytest.raises(bench.UsageError, match="does not fit --model resnet50"):
        bench.open_network(replace(options, model="resnet50"))


def test_paper_figures_stand_beside_ours(tmp_path, monkeypatch, capsys):
    network = models.create_model("nexception_tp")
    torch.save({"state_dict": models.export_official(network)}, tmp_path / "tp.pth")
    found = {"images": 5, "classes": 200, "top1": 20.0, "top5": 40.0, "unreadable": []}
    sets = [bench.TestSet(name, "/x", None, None) for name in ("imagenet", "ImageNet-A", "other")]
    monkeypatch.setattr(bench, "open_sets", lambda network, options: sets)
    monkeypatch.setattr(bench, "evaluate_set", lambda network, test, options: dict(found))
    assert run("accuracy", tmp_path / "tp.pth", "/x", "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "accuracy-tp.json").read_text())["rows"]
    assert [row["paper_top1"] for row in rows] == [81.8, 22.75, None]
    assert "22.75" in capsys.readouterr().out


def test_accuracy_on_two_folders_checks_both_first(checkpoint, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    arguments = ["accuracy", checkpoint, folder, f"again={tmp_path / 'copy'}", "--workers", 0]
    assert run(*arguments, "--out", tmp_path / "results", "--fuse", "--dtype", "bfloat16") == 0
    first, second = json.loads((tmp_path / "results" / "accuracy-best.json").read_text())["rows"]
    assert (first["set"], second["set"]) == ("set", "again")
    assert first["top1"] == second["top1"]
    (tmp_path / "copy" / "bee").rename(tmp_path / "copy" / "emu")
    assert run(*arguments, "--out", tmp_path / "none") == 2
    assert not (tmp_path / "none").exists()


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.6, 1.0])
    correct = np.array([True, False, True, True])
    # Bins of 1/15: {0.95, 0.95, 1.0} has accuracy 2/3 and confidence 2.9/3, {0.6} has 1 and 0.6.
    assert bench.calibration_error(confidence, correct) == pytest.approx((0.9 + 0.4) / 4)


# --------------------------------------------------------------------------------------------------
# export


def test_export_computes_what_the_checkpoint_does(checkpoint, tmp_path, capsys):
    assert run("export", checkpoint, "--out", tmp_path / "files", "--formats", "program") == 0
    program = torch.export.load(tmp_path / "files" / "best.pt2").module()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            program(images), models.load_checkpoint(checkpoint)(images), rtol=1e-4, atol=1e-4
        )
    side = json.loads((tmp_path / "files" / "best.export.json").read_text())
    assert side["classes"] == ["ant", "bee", "cat", "dog"]
    assert EvalTransform.from_dict(side["transform"]) == EvalTransform(32, 0.875, "bilinear")
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"best.pt2", "best.export.json"}


def test_export_to_onnx_or_says_what_it_needs(checkpoint, tmp_path, capsys):
    assert run("export", checkpoint, "--formats", "onnx", "--out", tmp_path) == 0
    out = capsys.readouterr().out
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        assert "pip install" in out
        return
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(tmp_path / "best.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        wanted = models.load_checkpoint(checkpoint)(images).numpy()
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], wanted, rtol=1e-3, atol=1e-4)


def test_export_refuses_a_file_that_differs(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x")
    wanted = np.ones((3, 4), dtype=np.float32)
    with pytest.raises(RuntimeError, match="computes something else"):
        bench.check_outputs(
            file, wanted, lambda images: wanted[: len(images)] + 0.01, torch.zeros(3, 3, 8, 8)
        )


# --------------------------------------------------------------------------------------------------
# lamb


def test_lamb_times_every_optimizer(tmp_path):
    arguments = ["--model", "nexception_nano", "--repetitions", 2, "--device", "cpu"]
    assert run("lamb", *arguments, "--out", tmp_path) == 0
    seconds = json.loads((tmp_path / "lamb-nexception_nano-cpu.json").read_text())["seconds"]
    assert {"Lamb, ours", "Lamb, timm", "AdamW, PyTorch, fused"} <= set(seconds)
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())


# --------------------------------------------------------------------------------------------------
# figures


def test_figures_of_the_paper_and_of_results(tmp_path):
    rows = [
        {"name": key, "variant": "", "size": row.size, "samples": [float(i + 1), float(i + 3)]}
        for i, (key, row) in enumerate(bench.TABLE_1.items())
    ]
    rows.append(rows[0] | {"size": 32})  # of another size, for which the paper has no accuracy
    record = {"rows": rows, "machine": {"threads": 2}}
    record["options"] = {"train": False, "batch": 16, "dtype": "float32"}
    (tmp_path / "speed-cpu-float32.json").write_text(json.dumps(record))
    assert run("figures", tmp_path / "speed-cpu-float32.json", "--out", tmp_path) == 0
    for name in ("figure-2", "figure-3", "figure-3-cpu-float32"):
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
        assert Image.open(tmp_path / f"{name}.png").width == 1660
    bubbles, _ = bench.measured_bubbles(tmp_path / "speed-cpu-float32.json")
    assert [bubble.x for bubble in bubbles] == [i + 2.0 for i in range(len(bench.TABLE_1))]
    damaged = [[], record | {"rows": [1]}, record | {"rows": {}}, record | {"options": {}}]
    damaged += [
        record | {"rows": [rows[0] | change]} for change in ({"samples": "fast"}, {"variant": "plain"})
    ]
    for content in damaged:
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(bench.UsageError, match=r"other\.json (is no results file|has no measured)"):
            bench.measured_bubbles(tmp_path / "other.json")
    (tmp_path / "more").mkdir()
    twice = [
        shutil.copy(tmp_path / "speed-cpu-float32.json", tmp_path / "more"),
        f"{tmp_path}/speed-cpu-float32.json",
    ]
    assert run("figures", *twice, "--out", tmp_path) == 2


@pytest.mark.parametrize("case", ["macs", "speed", "crowd"])
def test_labels_do_not_overlap(case):
    from matplotlib import pyplot

    if case == "crowd":  # every model within a tenth of the axes
        rng = np.random.default_rng(0)
        bubbles = [
            bench.bubble(key, float(x)) for key, x in zip(bench.TABLE_1, rng.uniform(0, 10, 22), strict=True)
        ]
        bubbles = [*bubbles[1:], bubbles[0]._replace(x=100.0)]
    else:
        bubbles = [bench.bubble(key, float(getattr(row, case))) for key, row in bench.TABLE_1.items()]
    figure, axes = pyplot.subplots(figsize=(8.3, 5.6), dpi=100)
    axes.scatter([bubble.x for bubble in bubbles], [bubble.top1 for bubble in bubbles])
    axes.margins(0.09, 0.11)
    texts = bench.place_labels(axes, bubbles)
    boxes = [text.get_window_extent() for text in texts]
    frame = axes.get_window_extent()
    pyplot.close(figure)
    bold = {text.get_text() for text in texts if text.get_weight() == "bold"}
    assert bold == {"NEXcepTion-T", "NEXcepTion-S", "NEXcepTion-TP"}
    overlapping = [
        (a.get_text(), b.get_text())
        for i, a in enumerate(texts)
        for j, b in enumerate(texts[:i])
        if boxes[i].overlaps(boxes[j])
    ]
    assert overlapping == []
    assert all(frame.contains(*box.p0) and frame.contains(*box.p1) for box in boxes)


# --------------------------------------------------------------------------------------------------
# data


def test_data_times_the_input_pipeline(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / "train" / name / f"{i}.jpg")
    short = ["--size", 32, "--batch", 4, "--repetitions", 1, "--seconds", 0.05, "--workers", "1,2"]
    assert run("data", tmp_path / "set", *short, "--name", "here", "--rate", 1e6, "--out", tmp_path) == 0
    record = json.loads((tmp_path / "data-here.json").read_text())
    assert set(record["workers"]) == {"1", "2"}
    for rates in (record["core"], record["small"], *record["workers"].values()):
        assert all(rate > 0 for samples in rates.values() for rate in samples)
    assert sum(record["stages"].values()) == pytest.approx(1)
    table = (tmp_path / "data-here.md").read_text()
    assert "training, 2 workers" in table
    assert "A GPU that trains at 1,000,000 images/s needs --workers" in table
    assert table in capsys.readouterr().out
    assert bench.advice({1: {"ours": [100.0]}, 2: {"ours": [190.0]}}, 150).endswith(
        "--workers 2 here (measured)."
    )


def test_data_refuses_a_missing_folder_and_a_broken_file(tmp_path, capsys):
    assert run("data", tmp_path / "nowhere") == 2
    assert "there is no folder" in capsys.readouterr().err
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.jpg").write_bytes(b"not an image")
    assert run("data", tmp_path / "set", "--batch", 1, "--workers", "1", "--out", tmp_path) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_made_photographs_are_as_large_as_imagenets(tmp_path):
    bench.make_photographs(tmp_path, count=12, links=2)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 24
    assert 60_000 < np.mean([file.stat().st_size for file in files]) < 180_000
    assert {Image.open(file).size for file in files} <= set(bench.PHOTOGRAPH_SIZES)
