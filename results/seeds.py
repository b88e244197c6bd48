"""Ten searches beside random search of as many trials: does what they find win on the test pictures?

    python -m results.seeds    # an hour of two cores; repeat to continue

Random search has the same trials of the paper's points and, for each seed, other networks of
results/space.csv. What either finds and the paper's points are trained three times each.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import markdown_table, run_command, write_results
from data import RunError, write_whole
from results.space import EPOCHS, choices, rows
from search import REPEATS, best_rows, points, repeat_name, rows_of, short, top1, train_config, trial_seed
from search import main as search_main
from train import option, run_script

import numpy as np
import torch
from scipy.stats import ttest_rel


@dataclass(frozen=True)
class Options:
    """Compare what SMAC and random search find, over several seeds, on the test pictures."""

    seeds: int = option(10, "searches of each kind", least=2)
    trials: int = option(60, "trials of a search, the paper's two points included", least=3)
    epochs: int = option(EPOCHS, "epochs of a trial", least=1)
    runs: str = option("runs/seeds", "folder of the searches")
    out: str = option("runs/bench", "folder of the results")


def retrain(config: dict, seed: int, repeat: int, epochs: int) -> float:
    """Train a network as the comparison that ends a search does; return its top-1 on the test pictures."""
    torch.set_num_threads(1)
    seed = trial_seed({"seed": seed}, config, repeat)
    return train_config(config, seed, epochs, {"split": "test"})[1]["top1"]


def search(seed: int, options: Options) -> dict:
    """Run or continue a search; return the test top-1 of its find, of random search's, and of the points."""
    folder, repeats = Path(options.runs, str(seed)), range(1, REPEATS + 1)
    arguments = f"--seed {seed} --trials {options.trials} --walltime 1d --max-epochs {options.epochs}".split()
    if search_main([*arguments, "--min-epochs", str(options.epochs), "--out", str(folder)]):
        raise RunError(f"{folder}: the search failed or was stopped")
    done, count = rows_of(folder), options.trials - len(points())
    drawn = rows()[(seed - 1) * count : seed * count]
    pairs = [(float(row["top1"]), choices(row)) for row in drawn]
    pairs += [(top1(row), row["config"]) for row in done if row["origin"] in points()]
    found, path = {"SMAC": best_rows(done, options.epochs)[0]["config"], **points()}, folder / "random.json"
    if not path.exists():
        best = max(pairs, key=lambda pair: pair[0])[1]
        with ProcessPoolExecutor() as workers:
            jobs = [workers.submit(retrain, best, seed, repeat, options.epochs) for repeat in repeats]
        write_whole(path, json.dumps([job.result() for job in jobs]))
    final = json.loads((folder / "final.json").read_text())
    scores = {name: [final[repeat_name(c, i)]["top1"] for i in repeats] for name, c in found.items()}
    scores["random"] = json.loads(path.read_text())
    by_model = sum(row["origin"] == "model" for row in done)
    return {"label": f"seed {seed}", "found": short(found["SMAC"]), "by_model": by_model} | scores


def compare(options: Options) -> None:
    """Run all searches; write a table and paired tests."""
    values, names = (
        [search(seed, options) for seed in range(1, options.seeds + 1)],
        ("SMAC", "random", *points()),
    )
    means = {name: np.array([np.mean(row[name]) for row in values]) for name in names}
    table = [
        [row["label"], *(f"{means[name][i]:.1f}" for name in names), str(row["by_model"]), row["found"]]
        for i, row in enumerate(values)
    ]
    table.append(["mean", *(f"{means[name].mean():.1f}" for name in names), "", ""])
    text = markdown_table(["", *names, "trials by SMAC's model", "SMAC's network"], table)
    both = (means["SMAC"] > np.maximum(*(means[name] for name in points()))).sum()
    text += f"\nSMAC's network is better than both of the paper's in {both} of {len(values)} searches.\n"
    for name in names[1:]:
        gap, p = (means["SMAC"] - means[name]).mean(), ttest_rel(means["SMAC"], means[name]).pvalue
        text += f"\nSMAC - {name}: {gap:+.2f} points on average (paired t-test, p = {p:.2g})\n"
    print(text)
    write_results("seeds", options, torch.device("cpu"), text, values)


if __name__ == "__main__":
    run_script(functools.partial(run_command, compare, Options, "results.seeds"))
