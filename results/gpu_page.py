"""Judge the files of `results/gpu.sh`: does each line of LOG.md's checklist hold? Writes FOLDER/page.md.

python -m results.gpu_page FOLDER
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

from bench import markdown_table
from blocks import write_whole
from train import machine, pick_device


def judge(out: Path) -> str:
    """Return the page. A line of the checklist is open if nothing was measured for it."""
    parts = {name: int(status) for name, status, _ in map(str.split, (out / "parts.txt").open())}

    def said(part: str, pattern: str) -> list[str]:
        path = out / f"{part}.txt"
        return re.findall(pattern, path.read_text(errors="replace")) if path.exists() else []

    def column(folder: str, name: str) -> list[float]:
        path = out / folder / "metrics.jsonl"
        lines = map(json.loads, path.open()) if path.exists() else ()
        return [line[name] for line in lines if name in line]

    def apart(left: str, right: str) -> list[float]:
        """Return the relative differences of two runs' training losses by epoch."""
        pairs = zip(column(left, "train_loss"), column(right, "train_loss"), strict=False)
        return [abs(a / b - 1) for a, b in pairs]

    def ratios(pattern: str, labels: str) -> dict[str, float]:
        """Return the speed of rows of a results file relative to their base row."""
        rows = [row for path in sorted(out.glob(pattern)) for row in json.loads(path.read_text())["rows"]]
        rows = [row for row in rows if row.get("base") and "ratio" in row and re.search(labels, row["label"])]
        return {row["label"]: row["ratio"]["mean"] for row in rows}

    models = sorted(path.name.removesuffix("-cpu") for path in out.glob("losses/*-cpu"))
    first = {"off": {}, "bf16": {}, "fp16": {}}
    for amp, model in itertools.product(first, models):
        if found := apart(f"losses/{model}-{amp}", f"losses/{model}-cpu"):
            first[amp][model] = found[0]
    halves = [loss for model in models for loss in column(f"losses/{model}-fp16", "val_loss")]
    lamb = [json.loads(path.read_text())["difference_from_timm"] for path in out.glob("lamb-*.json")]
    journals = sorted(out.glob("search-*/trials.jsonl"))
    trials = Counter(json.loads(line)["status"] for path in journals for line in path.open())
    speed = {end: ratios(f"speed-*{end}.json", "NEXcepTion|Xception") for end in ("16", "-fuse", "-train")}

    def most(bound: float):
        return lambda found: max(found.values() if isinstance(found, dict) else found) <= bound

    def as_published(found: dict) -> bool:
        return found.get("NEXcepTion-TP", 0) >= 1.27

    claims = [  # a line of the checklist and its part; what was found; whether that holds
        ("`pytest -m gpu` passes", "tests", said("tests", r"\d+ passed.*"), lambda _: parts["tests"] == 0),
        ("float32: the CPU's losses of the first epoch to 1e-3", "losses", first["off"], most(1e-3)),
        ("bf16: the same to 2e-2", "losses", first["bf16"], most(2e-2)),
        ("fp16: the same to 2e-2", "losses", first["fp16"], most(2e-2)),
        ("fp16: finite validation losses", "losses", halves, lambda found: all(map(math.isfinite, found))),
        ("LAMB: timm's weights to 1e-4", "lamb", lamb, most(1e-4)),
        ("image folder: data wait near 0", "folder", column("folder", "data_wait"),
         lambda found: found[-1] < 0.05),
        ("stopped and resumed: same losses to 1e-3", "resume",
         apart("resume/stopped", "resume/whole"), most(1e-3)),
        ("two processes, stopped: one's losses to 1e-3", "two", apart("two/both", "two/one"), most(1e-3)),
        ("a process killed, an NCCL timeout: the second start trains", "", [], None),
        ("all-reduce runs during the backward pass", "", [], None),
        ("search, 1 and 4 workers a GPU: no trial fails", "search", trials,
         lambda found: {*found} == {"success"}),
        ("TP 1.27 × ConvNeXt-T, eager", "speed", speed["16"], as_published),
        ("the same compiled", "compiled-speed", speed["-fuse"], as_published),
        ("the same in training", "train-speed", speed["-train"], as_published),
        ("depthwise: channels last at least as fast as contiguous", "depthwise",
         ratios("depthwise-*.json", ""), lambda found: min(found.values()) >= 1),
    ]  # fmt: skip
    lines = []
    for claim, part, found, holds in claims:
        verdict = "open" if not found else "holds" if holds(found) else "**fails**"
        if verdict == "holds" and parts.get(part) != 0:
            verdict = "incomplete"
        lines.append([claim, verdict, short(found)])
    here = machine(pick_device("auto")) | {"driver": " ".join(said("machine", r"Driver Version: [\d.]+"))}
    text = markdown_table(["checklist", "", "found"], lines)
    text += "\n" + markdown_table(["part", "status"], [[name, str(status)] for name, status in parts.items()])
    return text + "\n" + "".join(f"- {name}: {value}\n" for name, value in here.items())


def short(found) -> str:
    """Return a finding as the text of a table cell, numbers with three digits."""
    if isinstance(found, dict):
        return ", ".join(f"{key} {short(value)}" for key, value in found.items())
    if isinstance(found, list):
        return ", ".join(map(short, found))
    return f"{found:.3g}" if isinstance(found, float) else str(found)


if __name__ == "__main__":
    page = judge(Path(sys.argv[1]))
    write_whole(Path(sys.argv[1], "page.md"), page)
    print(page)
