"""Ten searches beside random search of as many trials: does what they find win on the test pictures?

    python -m results.seeds    # an hour of two cores; repeat to continue

Random search has the same trials of the paper's points and, for each seed, other networks of
results/space.csv. Both choose among their best trials by three trainings of each, on the validation pictures.
"""

from __future__ import annotations

import functools
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import search
from bench import markdown_table, run_command, write_results
from data import RunError, UsageError, write_whole
from results.space import EPOCHS, choices, rows
from train import option, run_script

import numpy as np
import torch
from scipy.stats import ttest_rel


@dataclass(frozen=True)
class Options:
    """Compare what SMAC and random search find, over several seeds, on the test pictures."""

    seeds: int = option(10, "searches of each kind", least=2)
    trials: int = option(120, "trials of a search, the paper's two points included", least=3)
    epochs: int = option(EPOCHS, "epochs of a trial", least=1)
    runs: str = option("runs/seeds", "folder of the searches")
    out: str = option("runs/bench", "folder of the results")


def retrain(config: dict, repeat: int, seed: int, epochs: int) -> dict:
    """Train a network as the comparison that ends a search does; return its results."""
    torch.set_num_threads(1)
    return search.train_config(config, search.trial_seed(seed, config, repeat), epochs, {"split": "test"})[1]


def choose(folder: Path, trials: list[dict], options: Options, seed: int) -> tuple[dict, dict]:
    """Compare the best of the trials as a search does, with what is missing in final.json.

    Returns the network chosen on validation, and the test top-1 of each training of it and of the points.
    """
    networks = search.finalists(trials, {"budgets": [options.epochs], "objectives": ["accuracy"]})
    path = folder / "final.json"
    scored = search.read_json(path)
    missing = search.missing_runs(networks, scored)
    with ProcessPoolExecutor() as workers:
        jobs = {name: workers.submit(retrain, *run, seed, options.epochs) for name, run in missing.items()}
        for name, job in jobs.items():
            scored[name] = job.result()
            write_whole(path, json.dumps(scored))
    best = networks[search.comparison(folder, networks)[1]]
    top1s = {
        name: [scored[search.repeat_name(config, repeat)]["top1"] for repeat in range(1, search.REPEATS + 1)]
        for name, config in {"found": best, **search.points()}.items()
    }
    return best, top1s


def compare_seed(seed: int, options: Options) -> dict:
    """Run or continue a search; return the test top-1 of its find, of random search's, and of the points."""
    folder, count = Path(options.runs, str(seed)), options.trials - len(search.points())
    arguments = f"--seed {seed} --trials {options.trials} --walltime 1d --max-epochs {options.epochs}".split()
    if search.main([*arguments, "--min-epochs", str(options.epochs), "--out", str(folder)]):
        raise RunError(f"{folder}: the search failed or was stopped")
    done, other = search.rows_of(folder), folder / "random"
    best, scores = choose(folder, done, options, seed)
    drawn = [
        {"config": choices(row), "cost": [1 - float(row["top1"]) / 100]}
        for row in rows(options.epochs)[(seed - 1) * count : seed * count]
    ]
    if len(drawn) < count:
        more = f"python -m results.space --networks {options.seeds * count}"
        raise UsageError(f"results/space.csv has too few networks for seed {seed}: {more} trains more")
    trial = {"status": "success", "budget": options.epochs}
    drawn = [row | trial for row in drawn] + [row for row in done if row["origin"] in search.points()]
    other.mkdir(exist_ok=True)
    if not (other / "final.json").exists():  # the trainings of the points are the same
        shutil.copy(folder / "final.json", other)
    scores["SMAC"], scores["random"] = scores.pop("found"), choose(other, drawn, options, seed)[1]["found"]
    by_model = sum(row["origin"] == "model" for row in done)
    return {"label": f"seed {seed}", "found": search.short(best), "by_model": by_model} | scores


def compare(options: Options) -> None:
    """Run all searches; write a table and paired tests."""
    values = [compare_seed(seed, options) for seed in range(1, options.seeds + 1)]
    names = ("SMAC", "random", *search.points())
    means = {name: np.array([np.mean(row[name]) for row in values]) for name in names}
    table = [
        [row["label"], *(f"{means[name][i]:.1f}" for name in names), str(row["by_model"]), row["found"]]
        for i, row in enumerate(values)
    ]
    table.append(["mean", *(f"{means[name].mean():.1f}" for name in names), "", ""])
    text = markdown_table(["", *names, "trials by SMAC's model", "SMAC's network"], table)
    both = (means["SMAC"] > np.maximum(*(means[name] for name in search.points()))).sum()
    text += f"\nSMAC's network is better than both of the paper's in {both} of {len(values)} searches.\n"
    for name in names[1:]:
        gap, p = (means["SMAC"] - means[name]).mean(), ttest_rel(means["SMAC"], means[name]).pvalue
        text += f"\nSMAC - {name}: {gap:+.2f} points on average (paired t-test, p = {p:.2g})\n"
    print(text)
    write_results("seeds", options, torch.device("cpu"), text, values)


if __name__ == "__main__":
    run_script(functools.partial(run_command, compare, Options, "results.seeds"))
