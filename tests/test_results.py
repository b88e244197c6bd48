"""Tests of the scripts in results/, whose figures are committed beside them."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import bench
import search
import train

import numpy as np
import pytest
from scipy import stats

ROOT = Path(bench.__file__).parent


def run(name: str, *arguments) -> int:
    script = importlib.import_module(f"results.{name}")
    return bench.run_command(script.compare, script.Options, name, [str(argument) for argument in arguments])


def test_evidence_beside_another_implementation(tmp_path):
    """Each ratio is that of a row's samples and its base row's, repetition by repetition."""
    (tmp_path / "set").mkdir()
    importlib.import_module("results.input_pipeline").make_pictures(tmp_path / "set", 8)
    small = ["--repetitions", 2, "--out", tmp_path]
    assert run("lamb", "--model", "nexception_nano", "--device", "cpu", *small) == 0
    assert run("input_pipeline", tmp_path / "set", *small) == 0
    assert run("depthwise", "--shapes", "16x7", "--kernels", 3, "--batch", 2, "--device", "cpu", *small) == 0
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(name.partition("-")[0] for name in records) == ["depthwise", "input", "lamb"]
    assert records["lamb-nexception_nano-cpu"]["difference_from_timm"] < 1e-4
    for record in records.values():
        samples = {row["label"]: row["samples"] for row in record["rows"]}
        ratios = [row for row in record["rows"] if "base" in row]
        assert ratios
        for row in ratios:
            expected = np.divide(samples[row["label"]], samples[row["base"]]).mean()
            assert row["ratio"]["mean"] == pytest.approx(expected)


def test_kernels_are_told_apart_by_their_weights(tmp_path):
    """nexception_nano has a patchify stem, 5 x 5 depthwise convolutions and blur pools of 3 x 3, and SE."""
    small = ["--models", "nexception_nano", "--batch", 2, "--repetitions", 1, "--device", "cpu"]
    assert run("kernels", *small, "--out", tmp_path) == 0
    (row,) = json.loads((tmp_path / "kernels-cpu-float32.json").read_text())["rows"]
    depthwise = {kind for kind in row if kind.startswith("depthwise")}
    assert depthwise == {"depthwise, 3 × 3", "depthwise, 5 × 5"}
    others = {"convolutions, 1 × 1", "convolutions, stem and skips", "norms", "squeeze-and-excitation"}
    assert all(row[kind] > 0 for kind in depthwise | others)


def test_the_surrogate_is_that_of_the_trained_networks(tmp_path, monkeypatch):
    """Each network of the table has its own place in the surrogate, which agrees with its training."""
    space = importlib.import_module("results.space")
    codes, top1 = space.load()
    assert len(set(map(tuple, codes))) == len(codes) > 100
    assert space.surrogate().size == 61_440
    fitted = space.surrogate()[tuple(codes.T)]
    assert np.corrcoef(fitted, top1)[0, 1] > 0.9
    monkeypatch.setattr(space, "TABLE", tmp_path / "space.csv")
    parts = slice(None), slice(2, 11), slice(9), slice(11), slice(1, 9)
    monkeypatch.setattr(space, "KINDS", dict(zip(space.KINDS, parts, strict=True)))
    monkeypatch.setattr(
        space, "train_config", lambda _, seed, n: (0.5, {"top1": seed % 89, "losses": [1.5] * n})
    )
    for count in (11, 12, 12):  # the second call continues, the third finds nothing to do
        space.main(space.Options(networks=count, out=str(tmp_path)))
        for kind, part in space.KINDS.items():
            found = space.rows(*kind)
            assert [float(row["top1"]) for row in found] == [int(row["seed"]) % 89 for row in found]
            assert {row["losses"] for row in found} == {" ".join(["1.5"] * kind[0])}
            assert len(found) == len(range(count)[part])


def test_samplers_are_compared_at_equal_epochs(tmp_path, monkeypatch):
    samplers = importlib.import_module("results.samplers")
    arms = {name: samplers.ARMS[name] for name in ("Hyperband, 2 and 5 epochs", "random search")}
    monkeypatch.setattr(samplers, "ARMS", arms)  # SMAC's take half a minute
    assert run("samplers", "--searches", 2, "--epochs", 300, "--noise", 0, "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "samplers.json").read_text())["rows"]
    assert [row["label"] for row in rows] == list(samplers.ARMS)
    curve = samplers.regrets("random search", 0, 300, 0.0)
    assert (np.diff(curve) <= 0).all() and curve[:4].min() == curve[0] > curve[-1] >= 0
    assert rows[-1]["regrets"][0] == pytest.approx(curve[[149, 299]], abs=1e-4)


def test_full_trainings_are_ranked_beside_their_trials(tmp_path, monkeypatch):
    """With made-up accuracies, half of those of the trials: ranks agree, Welch's t-test is that by hand."""
    full = importlib.import_module("results.full")
    options = full.Options(epochs=1, out=str(tmp_path / "out"), runs=str(tmp_path))
    found = full.networks(options)
    assert len(found) == 22 and {*search.points()} < {*found}
    name = "Xception"
    _, top1 = full.train(options, name, found[name], 2)
    record = json.loads((tmp_path / "Xception-2/run/config.json").read_text())
    assert record["options"]["seed"] == 2 and record["config"]["widths"] == [48]
    assert {k: record["config"][k] for k in ("stem", "block", "se")} == {
        "stem": "conv", "block": "xception", "se": False,
    }  # fmt: skip
    assert f'"test_top1": {top1}' in (tmp_path / "Xception-2/run/metrics.jsonl").read_text()

    noise = (0, 0, 0.1, -0.1)

    def made(_, name, row, seed):  # the third has the best validation top-1
        return 1.0 * (name == "found 3"), float(row["top1"]) / 2 + noise[seed]

    monkeypatch.setattr(full, "train", made)
    full.compare(options)
    page = (tmp_path / "out/full.md").read_text()
    assert "Spearman correlation of both: 1.00" in page and "on validation in full: found 3" in page
    for ours in ("found 1", "found 3"):
        gap = (float(found[ours]["top1"]) - float(found[name]["top1"])) / 2
        p = 2 * stats.t.sf(gap / (2 * 0.1**2 / 3) ** 0.5, 4)
        assert f"{ours} - {name}: {gap:+.1f} points (Welch's t-test, p = {p:.2g})" in page


def test_searches_are_compared_seed_by_seed(tmp_path, monkeypatch):
    """With made-up accuracies; the paired t-test is that by hand."""
    seeds = importlib.import_module("results.seeds")
    made = [
        {"SMAC": [90, 92], "random": [86], "NEXcepTion": [80], "Xception": [70]},
        {"SMAC": [90], "random": [89], "NEXcepTion": [80], "Xception": [95]},
    ]
    monkeypatch.setattr(
        seeds,
        "compare_seed",
        lambda seed, _: {"label": str(seed), "found": "", "by_model": 9, **made[seed - 1]},
    )
    seeds.compare(seeds.Options(seeds=2, out=str(tmp_path)))
    page = (tmp_path / "seeds.md").read_text()
    assert "better than both of the paper's in 1 of 2 searches" in page
    p = 2 * stats.t.sf(3 / (8 / 2) ** 0.5, 1)  # differences 5 and 1: mean 3, variance 8
    assert f"SMAC - random: +3.00 points on average (paired t-test, p = {p:.2g})" in page


def verdicts(page: str) -> dict[str, str]:
    """Return the verdict on each claim."""
    cells = [line.split("|") for line in page.splitlines() if line.count("|") == 4]
    return {claim.strip(): verdict.strip() for _, claim, verdict, *_ in cells[2:]}


def test_gpu_script_runs_every_part_it_is_asked_for(tmp_path):
    """On a CPU, without a model that exists: a failed part does not stop the next."""
    environment = os.environ | {"DEVICE": "cpu", "OUT": str(tmp_path), "PYTHON": sys.executable, "SLOW": "9"}
    command = ["bash", str(ROOT / "results" / "gpu.sh")]
    asked = {"PARTS": "speed lamb", "SPEED": "--models nothing"}
    done = subprocess.run(command, env=environment | asked, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    parts = [line.split()[:2] for line in (tmp_path / "parts.txt").read_text().splitlines()]
    assert parts == [["speed", "2"], ["lamb", "0"]]
    assert "unknown model 'nothing'" in (tmp_path / "speed.txt").read_text()
    found = verdicts((tmp_path / "page.md").read_text())
    assert found.pop("LAMB: timm's weights to 1e-4") == "holds"
    assert set(found.values()) == {"open"}


def test_gpu_page_judges_what_it_finds(tmp_path):
    from results.gpu_page import judge

    def write(path: str, *rows: dict) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    (tmp_path / "parts.txt").write_text("tests 1 60\nspeed 0 50\nlosses 124 80\n")
    (tmp_path / "tests.txt").write_text("1 failed, 6 passed in 20.1s\n")
    for run, loss in (("cpu", 2.0), ("off", 2.001), ("bf16", 2.1), ("fp16", 2.0)):
        losses = {"train_loss": loss, "val_loss": 1.0, "data_wait": 0.01}
        write(f"losses/nexception_tp-{run}/metrics.jsonl", losses, {"test_top1": 9.0})
    row = {"label": "NEXcepTion-TP", "base": "ConvNeXt-T", "ratio": {"mean": 1.3}}
    write("speed-h200-bfloat16.json", {"rows": [row, {"label": "Xception", "missing": "out of memory"}]})
    write("speed-h200-bfloat16-train.json", {"rows": [row | {"ratio": {"mean": 1.2}}]})
    write("search-1/trials.jsonl", {"status": "success"}, {"status": "timeout"})
    found = verdicts(judge(tmp_path))
    assert {claim.partition(":")[0]: verdict for claim, verdict in found.items() if verdict != "open"} == {
        "`pytest -m gpu`": "**fails**",
        "float32": "incomplete",
        "bf16": "**fails**",
        "fp16": "incomplete",
        "search, 1 and 4 workers a GPU": "**fails**",
        "TP 1.27 × ConvNeXt-T, eager": "holds",
        "the same in training": "**fails**",
    }


def parse_command(command: str) -> None:
    """Parse the command of a result as its script does; raises UsageError."""
    words = shlex.split(command)
    script, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    if script == "bench.py":
        train.parse(bench.COMMANDS[arguments[0]][1], arguments[1:], script)
    elif script == "search.py" and arguments and arguments[0] in search.COMMANDS:
        assert (ROOT / arguments[1]).is_dir()
    elif script in ("train.py", "search.py"):
        train.parse((train if script == "train.py" else search).Options, arguments, script)
    elif hasattr(module := importlib.import_module(script), "Options"):
        train.parse(module.Options, arguments, script)


def test_readme_names_every_result_and_a_command_that_parses():
    """Of all tables whose first column is called `files`; their second column may be called `command`."""
    blocks = re.split(r"\n\s*\n", (ROOT / "results" / "README.md").read_text())
    tables = [block.splitlines() for block in blocks if re.match(r"\| *files *\|", block)]
    named = set()
    for head, _, *lines in tables:
        for line in lines:
            files, second = (re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3])
            for name in files:
                found = list((ROOT / "results").glob(name))
                assert found, f"results/{name} does not exist"
                named.update(found)
            for command in second if "command" in head.split("|")[2] else ():
                if command.startswith("python "):
                    parse_command(command)
    others = {"README.md", "LOG.md", "__pycache__"} | {p.name for p in named}
    made = [p for p in (ROOT / "results").iterdir() if p.suffix not in (".py", ".sh", ".pyc")]
    missing = [p for p in made if p.name not in others]
    assert not missing, "README.md does not say how these were made"
