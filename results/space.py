"""The design space as a small benchmark: random networks, trained, and a surrogate of all 61,440.

    python -m results.space                   # how well the surrogate fits that results/space.csv gives
    python -m results.space --networks 1000   # train more first: two hours of one core; repeat to continue

In Python, `surrogate()[code_of(config)]` is the validation top-1, in percent, that a network is expected to
reach in a trial of the default search; `surrogate()` is an array with an axis for each choice of `SPACE`.

A row of the table is a network trained like such a trial: its choices, the seed of its training, CPU seconds,
the training loss of each epoch and the validation top-1 after epochs 3 and 9.
"""

from __future__ import annotations

import csv
import functools
import time
from dataclasses import dataclass
from pathlib import Path

from bench import run_command
from data import lock_file
from search import configspace, current_space, one_hot, train_config, trial_seed, whole_space
from train import option, run_script

import numpy as np
from scipy.stats import spearmanr

EPOCHS, SCORED = 9, (3, 9)
TABLE = Path(__file__).with_name("space.csv")
CHOICES = current_space()
SIZES = [len(values) for values in CHOICES.values()]


@dataclass(frozen=True)
class Options:
    """Train random networks and evaluate the surrogate."""

    networks: int = option(0, "train as many as are missing of this number of networks", least=0)
    part: int = option(0, "train networks PART, PART + PARTS, ... only: for several processes", least=0)
    parts: int = option(1, "processes that train parts of the networks", least=1)


def rows() -> list[dict]:
    """Return the rows of the table, values as strings."""
    if not TABLE.exists():
        return []
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def train(config: dict) -> None:
    """Train a network and append its row to the table."""
    seed, begun = trial_seed({"seed": 0}, config), time.process_time()
    curve = train_config(config, seed, EPOCHS)[1]["curve"]
    row = config | {"seed": seed, "seconds": round(time.process_time() - begun, 2)}
    row |= {f"loss{i}": loss for i, (loss, _) in enumerate(curve, 1)}
    row |= {f"top1_{i}": curve[i - 1][1] for i in SCORED}
    with open(TABLE, "a", newline="") as file:
        lock_file(file, wait=True)
        table = csv.DictWriter(file, row, lineterminator="\n")
        if file.seek(0, 2) == 0:
            table.writeheader()
        table.writerow(row)


def code_of(config: dict) -> tuple[int, ...]:
    """Return the position of a configuration in the array of `surrogate`."""
    return tuple(values.index(config[name]) for name, values in CHOICES.items())


def load(column: str = "top1_9") -> tuple[np.ndarray, np.ndarray]:
    """Return the codes (N, 9) of the trained networks and a column of the table, (N,) of float."""
    return np.array([code_of(row) for row in rows()]), np.array([float(row[column]) for row in rows()])


def predict(codes: np.ndarray, top1: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Fit the surrogate to networks (N, 9) and predict the top-1 of others, given as indicator columns."""
    from sklearn.ensemble import GradientBoostingRegressor

    settings = {"n_estimators": 600, "max_depth": 4, "learning_rate": 0.05, "subsample": 0.5}
    model = GradientBoostingRegressor(**settings, random_state=0).fit(one_hot(codes, SIZES), top1)
    return model.predict(columns).clip(0, 100)


@functools.cache
def surrogate(column: str = "top1_9") -> np.ndarray:
    """Return the expected top-1 of all networks in percent, with an axis for each choice."""
    return predict(*load(column), whole_space(tuple(SIZES))).reshape(SIZES)


def main(options: Options) -> None:
    """Train the networks that are missing, then cross-validate the surrogate on those of the table."""
    drawn = configspace(seed=0).sample_configuration(max(2, options.networks))[: options.networks]
    for config in drawn[options.part :: options.parts]:
        config = {name: str(config[name]) for name in CHOICES}
        if code_of(config) not in map(code_of, rows()):
            train(config)
    codes, top1 = load()
    fold, predicted = np.random.default_rng(0).permutation(len(top1)) % 10, np.zeros(len(top1))
    for i in range(10):
        known, new = fold != i, fold == i
        predicted[new] = predict(codes[known], top1[known], one_hot(codes[new], SIZES))
    early, found = spearmanr(load("top1_3")[1], top1).statistic, spearmanr(predicted, top1).statistic
    print(f"{len(top1)} networks; p10, median, p90, best: {np.quantile(top1, [0.1, 0.5, 0.9, 1]).round(1)}%")
    print(f"Spearman correlation of top-1 after epochs 3 and {EPOCHS}: {early:.3f}")
    print(f"of the surrogate, by tenfold cross-validation, with training: {found:.3f}")
    print(f"mean absolute error of the surrogate: {np.abs(predicted - top1).mean():.2f} points")


if __name__ == "__main__":
    run_script(functools.partial(run_command, main, Options, "results.space"))
