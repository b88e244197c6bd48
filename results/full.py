"""Does the ranking of a search hold when networks are trained in full (section 4 of the paper)?

    python -m results.full    # half an hour of two cores; repeat to continue

Trains, with nexception_nano's macro-architecture and train.py's own recipe, the ten best networks of a
search, ten random ones (the first with nine epochs in results/space.csv), and NEXcepTion's and Xception's
choices. Of each ten the first and the best on validation in full, and the paper's, are trained with three
seeds, the others with one.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import markdown_table, run_command, write_results
from data import UsageError
from results.space import choices, rows
from search import network_config, points, short
from train import RECIPES, option, run_script

import numpy as np
import torch
from scipy.stats import spearmanr, ttest_ind


@dataclass(frozen=True)
class Options:
    """Train networks of a search in full."""

    search: str = option("results/search-clutter", "run folder of a search of clutter")
    networks: int = option(10, "networks of the search, and random ones", least=1)
    seeds: int = option(3, "runs of each ten's first and best and of the paper's; of the others one", least=2)
    epochs: int = option(RECIPES["clutter"].values["epochs"], "epochs of a run", least=1)
    workers: int = option(2, "runs at a time, with a thread each", least=1)
    runs: str = option("runs/full", "folder of the runs")
    out: str = option("runs/bench", "folder of the results")


def networks(options: Options) -> dict[str, dict]:
    """Return name -> row of a trial, as strings: the choices, and the top-1 on validation in percent."""
    path = Path(options.search, "trials.csv")
    if not path.exists():
        raise UsageError(f"--search {options.search}: there is no {path}, which a search writes")
    with open(path, newline="") as file:
        trials = [row for row in csv.DictReader(file) if row["status"] == "success"]
    papers = {name: row for name, point in points().items() for row in trials if choices(row) == point}
    found = sorted((row for row in trials if row not in papers.values()), key=lambda row: -float(row["top1"]))
    first = [choices(row) for row in rows(9)[: options.networks]]
    drawn = sorted((row for row in rows() if choices(row) in first), key=lambda row: -float(row["top1"]))
    result = {f"found {i}": row for i, row in enumerate(found[: options.networks], 1)}
    return result | {f"random {i}": row for i, row in enumerate(drawn, 1)} | papers


def train(options: Options, name: str, row: dict, seed: int) -> tuple[float, float]:
    """Train a network with train.py, or continue; return its best validation top-1 and its test top-1."""
    out = Path(options.runs, f"{name.replace(' ', '-')}-{seed}")
    out.mkdir(parents=True, exist_ok=True)
    network_config(choices(row), "nexception_nano").to_json(out / "network.json")
    command = [sys.executable, "train.py", "--data", "clutter", "--model", str(out / "network.json")]
    command += ["--out", str(out / "run"), "--seed", str(seed), "--epochs", str(options.epochs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    *epochs, final = map(json.loads, (out / "run/metrics.jsonl").open())
    return max(epoch["val_top1"] for epoch in epochs), final["test_top1"]


def train_all(options: Options, found: dict[str, dict]) -> tuple[dict[str, list], list[str]]:
    """Return the test top-1 of each network's runs, and the names of those with several, the choice first.

    The choice is the network of the search with the best validation top-1 of the first runs.
    """
    with ThreadPoolExecutor(options.workers) as workers:

        def runs(names, seeds) -> list[tuple[str, float, float]]:
            pairs = [(name, seed) for seed in seeds for name in names]
            scores = workers.map(lambda pair: train(options, pair[0], found[pair[0]], pair[1]), pairs)
            return [(name, *score) for (name, _), score in zip(pairs, scores, strict=True)]

        first = runs(found, [1])
        validation = {name: val for name, val, _ in first}
        tens = [[name for name in found if name.startswith(kind)] for kind in ("found", "random")]
        chosen = [max(ten, key=validation.get) for ten in tens]
        several = list(dict.fromkeys([*chosen, "found 1", "random 1", *points()]))
        further = runs(several, range(2, options.seeds + 1))
    tests = {name: [test for other, _, test in first + further if other == name] for name in found}
    return tests, several


def compare(options: Options) -> None:
    """Train all networks; write their accuracies, the rank correlation with the search, and tests."""
    found = networks(options)
    scores, several = train_all(options, found)
    trials = {name: float(row["top1"]) for name, row in found.items()}
    epochs = {name: int(row.get("budget") or row["epochs"]) for name, row in found.items()}  # of a trial
    order = sorted(found, key=lambda name: -np.mean(scores[name]))
    table = [
        [
            name,
            short(choices(found[name])),
            f"{trials[name]:.1f} ({epochs[name]})",
            ", ".join(f"{x:.1f}" for x in scores[name]),
        ]
        for name in order
    ]
    text = markdown_table(["network", "choices", "in a trial, validation (epochs)", "in full, test"], table)
    alike = [name for name in found if epochs[name] == epochs["found 1"]]
    rank = spearmanr([trials[name] for name in alike], [np.mean(scores[name]) for name in alike])
    text += (
        f"\nSpearman correlation of both: {rank.statistic:.2f} ({len(alike)} networks with trials alike)\n"
    )
    text += f"\nBest on validation in full: {several[0]}\n"
    for ours in dict.fromkeys([several[0], "found 1"]):
        for name in (name for name in several if name != ours):
            gap = np.mean(scores[ours]) - np.mean(scores[name])
            p = ttest_ind(scores[ours], scores[name], equal_var=False).pvalue
            text += f"\n{ours} - {name}: {gap:+.1f} points (Welch's t-test, p = {p:.2g})\n"
    print(text)
    values = [{"label": name, **choices(found[name]), "top1": scores[name]} for name in order]
    write_results("full", options, torch.device("cpu"), text, values)


if __name__ == "__main__":
    run_script(functools.partial(run_command, compare, Options, "results.full"))
