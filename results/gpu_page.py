"""Judge the files of `results/gpu.sh`: does what only a GPU can show hold? Writes FOLDER/page.md.

python -m results.gpu_page FOLDER
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

from bench import markdown_table
from blocks import write_whole
from train import machine, pick_device


def judge(out: Path) -> str:
    """Return the page. A claim is open if nothing was measured for it."""
    parts = {name: int(status) for name, status, _ in map(str.split, (out / "parts.txt").open())}

    def said(part: str, pattern: str) -> list[str]:
        path = out / f"{part}.txt"
        return re.findall(pattern, path.read_text(errors="replace")) if path.exists() else []

    def column(folder: str, name: str) -> list[float]:
        path = out / folder / "metrics.jsonl"
        return [line[name] for line in map(json.loads, path.open()) if name in line] if path.exists() else []

    def apart(left: str, right: str) -> list[float]:
        """Return the relative differences of two runs' training losses by epoch."""
        pairs = zip(column(left, "train_loss"), column(right, "train_loss"), strict=False)
        return [abs(a / b - 1) for a, b in pairs]

    def ratios(pattern: str, label: str) -> list[float]:
        """Return the speed of the rows whose label contains `label` relative to their base rows."""
        rows = [row for path in sorted(out.glob(pattern)) for row in json.loads(path.read_text())["rows"]]
        return [row["ratio"]["mean"] for row in rows if "ratio" in row and label in row["label"]]

    models = sorted(path.name.removesuffix("-cpu") for path in out.glob("losses/*-cpu"))
    first = {
        amp: [loss for model in models for loss in apart(f"losses/{model}-{amp}", f"losses/{model}-cpu")[:1]]
        for amp in ("off", "bf16", "fp16")
    }
    failed = (
        [sum(map(int, said("tests", r"(\d+) (?:failed|error)")))]
        if said("tests", r"\d (?:passed|failed)")
        else []
    )
    halves = [loss for model in models for loss in column(f"losses/{model}-fp16", "val_loss")]
    lamb = [json.loads(path.read_text())["difference_from_timm"] for path in out.glob("lamb-*.json")]
    trials = [json.loads(line) for path in out.glob("search-*/trials.jsonl") for line in path.open()]
    trials = [float(sum(trial["status"] != "success" for trial in trials))] if trials else []
    tp, most, big = "NEXcepTion-TP", math.inf, sys.float_info.max
    claims = [  # a claim and its part; what was found, and the bounds within which it holds
        ("`pytest -m gpu`: no test fails", "tests", failed, 0, 0),
        ("float32: the CPU's losses of the first epoch to 1e-3", "losses", first["off"], 0, 1e-3),
        ("bf16: the same to 2e-2", "losses", first["bf16"], 0, 2e-2),
        ("fp16: the same to 2e-2", "losses", first["fp16"], 0, 2e-2),
        ("fp16: finite validation losses", "losses", halves, 0, big),
        ("LAMB: timm's weights to 1e-4", "lamb", lamb, 0, 1e-4),
        ("image folder: data wait near 0", "folder", column("folder", "data_wait")[-1:], 0, 0.05),
        ("stopped, resumed: same losses to 1e-3", "resume", apart("resume/stopped", "resume/whole"), 0, 1e-3),
        ("two processes, stopped: one's losses to 1e-3", "two", apart("two/both", "two/one"), 0, 1e-3),
        ("search, 1 and 4 workers a GPU: no trial fails", "search", trials, 0, 0),
        ("TP 1.27 × ConvNeXt-T, eager", "speed", ratios("speed-*16.json", tp), 1.27, most),
        ("the same compiled", "compiled-speed", ratios("speed-*-fuse.json", tp), 1.27, most),
        ("the same in training", "train-speed", ratios("speed-*-train.json", tp), 1.27, most),
        ("depthwise: channels last × contiguous", "depthwise", ratios("depthwise-*.json", ""), 1, most),
    ]
    lines = []
    for claim, part, found, low, high in claims:
        holds = all(low <= value <= high for value in found)
        verdict = "holds" if parts.get(part) == 0 else "incomplete"
        verdict = "open" if not found else verdict if holds else "**fails**"
        lines.append([claim, verdict, ", ".join(f"{value:.3g}" for value in found)])
    text = markdown_table(["claim", "", "found"], lines)
    text += f"\nLosses of {', '.join(models)}. Not tried: a killed process, an NCCL timeout.\n\n"
    text += markdown_table(["part", "status"], [[name, str(status)] for name, status in parts.items()])
    here = machine(pick_device("auto")) | {"driver": " ".join(said("machine", r"Driver Version: [\d.]+"))}
    return text + "\n" + "".join(f"- {name}: {value}\n" for name, value in here.items())


if __name__ == "__main__":
    page = judge(Path(sys.argv[1]))
    write_whole(Path(sys.argv[1], "page.md"), page)
    print(page)
