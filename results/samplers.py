"""Compare samplers on the surrogate of the whole space (results/space.py), where a trial takes no time.

    python -m results.samplers --out results    # 30 searches of 600 epochs each: five minutes of two cores

A trial sees the surrogate's top-1 with noise, as between two trainings of a good network. Regret is the top-1
of the best of the 61,440 networks minus that of the network which a search that ended then would return, both
according to the surrogate, in points: of its best trials, the one with the best mean of three more trainings.
All samplers spend the same number of epochs, without those trainings.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import markdown_table, run_command, write_results
from results.space import CHOICES, EPOCHS, code_of, surrogate
from search import ETA, FINALISTS, REPEATS, SAMPLERS
from train import option, run_script, save_figure, subplots

import numpy as np
import torch
from scipy.stats import wilcoxon

ARMS = {  # name -> sampler, lowest budget, colour and style of its line
    "SMAC": (SAMPLERS["smac"], EPOCHS, "black", "-"),
    "SMAC, its random forest": (SAMPLERS["forest"], EPOCHS, "#d95f02", "--"),
    "Hyperband, 2 and 5 epochs": (SAMPLERS["hyperband"], EPOCHS / ETA, "#7570b3", "-."),
    "random search": (SAMPLERS["random"], EPOCHS, "#66a61e", ":"),
}
MARK = 150  # epochs between the columns of the table


@dataclass(frozen=True)
class Options:
    """Compare samplers on the surrogate of the whole space."""

    searches: int = option(30, "searches of each sampler", least=2)
    noise: float = option(4.0, "standard deviation of a trial's top-1, points", least=0)
    epochs: int = option(600, "epochs per search, including trials at low budgets", least=MARK)
    out: str = option("runs/bench", "folder of the results")


def regrets(name: str, seed: int, epochs: int, noise: float) -> np.ndarray:
    """Return the regret of one search after each epoch spent, (epochs,)."""
    sampler, lowest, *_ = ARMS[name]
    budgets = [lowest, EPOCHS] if lowest < EPOCHS else [EPOCHS]
    truth = {round(budget): surrogate(round(budget)) for budget in budgets}
    settings = {"space": CHOICES, "objectives": ["accuracy"], "budgets": budgets, "seed": seed}
    spent, done, found = 0, [], np.full(epochs, truth[EPOCHS].max())
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        searcher = sampler(Path(folder), settings)
        searcher.replay([], None)
        while spent < epochs and (trial := searcher.ask()) is not None:
            true = truth[trial.budget][code_of(trial.config)]
            top1 = min(true + rng.normal(0, noise), 99.9)
            row = {"config": trial.config, "budget": trial.budget, "cost": [1 - top1 / 100], "info": {}}
            searcher.tell(trial, row | {"status": "success", "start": spent, "end": spent + trial.budget})
            spent += trial.budget
            if trial.budget == EPOCHS:
                done = sorted([*done, (top1, true)], reverse=True)
                finalists = np.array([true for _, true in done[: max(1, min(FINALISTS, len(done) // 10))]])
                means = finalists + rng.normal(0, noise / REPEATS**0.5, len(finalists))
                found[spent - 1 :] = truth[EPOCHS].max() - finalists[means.argmax()]
    return found


def compare(options: Options) -> None:
    """Run all searches; write their regrets, a figure, and paired tests of each sampler against random."""
    n, curves = options.searches, {}
    with ProcessPoolExecutor() as workers:
        for name in ARMS:
            jobs = [workers.submit(regrets, name, seed, options.epochs, options.noise) for seed in range(n)]
            curves[name] = np.stack([job.result() for job in jobs])
    marks = np.arange(MARK, options.epochs + 1, MARK)
    figure, (axis,) = subplots(1, 6.5, 4)
    values, base = [], curves["random search"]
    for i, (name, curve) in enumerate(curves.items()):
        *_, colour, style = ARMS[name]
        at, mean = curve[:, marks - 1], curve.mean(0)
        ends = 1.96 * at.std(axis=0, ddof=1) / n**0.5
        # Bonferroni: all samplers but random search are tested. Equal regrets have no test.
        others = zip(at.T, base[:, marks - 1].T, strict=True)
        p = [min(1, (len(ARMS) - 1) * wilcoxon(a, b).pvalue) if (a != b).any() else 1 for a, b in others]
        values.append({"label": name, "mean": mean[marks - 1], "interval": ends, "p": p, "regrets": at})
        axis.plot(np.arange(1, options.epochs + 1), mean, linestyle=style, color=colour, label=name)
        axis.errorbar(marks - 4 * i, mean[marks - 1], ends, fmt="none", color=colour)  # beside one another
    axis.set(xlabel="epochs spent", ylabel="regret, points of top-1", ylim=(0, 25), xlim=(0, None))
    axis.legend(frameon=False, title=f"mean of {n} searches and its 95% interval")
    table = [
        [row["label"], *map("{:.2f} ± {:.2f} (p = {:.1g})".format, row["mean"], row["interval"], row["p"])]
        for row in values
    ]
    text = markdown_table(["regret after", *(f"{mark} epochs" for mark in marks)], table)
    print(text)
    values = [{k: np.round(v, 5).tolist() if k != "label" else v for k, v in row.items()} for row in values]
    write_results("samplers", options, torch.device("cpu"), text, values, epochs=marks.tolist())
    save_figure(figure, Path(options.out, "samplers.png"))


if __name__ == "__main__":
    run_script(partial(run_command, compare, Options, "results.samplers"))
