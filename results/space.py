"""The design space as a small benchmark: random networks, trained, and a surrogate of all 61,440.

    python -m results.space --out results     # what results/space.csv shows: surrogate, importance of choices
    python -m results.space --networks 1200   # train more first: five hours of one core; repeat to continue

In Python, `surrogate()[code_of(config)]` is the validation top-1, in percent, that a network is expected to
reach in a trial of the default search; `surrogate()` is an array with an axis for each choice of `SPACE`.

A row of the table is a network trained as such a trial: its choices, epochs, the seed of its training, CPU
seconds, the validation top-1 in percent, and the mean training loss of each epoch (see `KINDS`).
"""

from __future__ import annotations

import csv
import functools
import time
from dataclasses import dataclass
from pathlib import Path

from bench import run_command, write_results
from data import lock_file
from search import (
    configspace,
    current_space,
    draw_importance,
    importance_text,
    importances,
    one_hot,
    train_config,
    trial_seed,
    whole_space,
)
from train import option, run_script

import numpy as np
import torch
from scipy.stats import spearmanr

EPOCHS = 5  # of a trial of the default search
KINDS = {  # epochs and repetition -> which of the networks drawn are trained so
    (EPOCHS, 0): slice(None),
    (EPOCHS, 1): slice(1000),
    (2, 0): slice(150),
    (9, 0): slice(1000),
    (9, 1): slice(960, 1000),
}
TABLE = Path(__file__).with_name("space.csv")
CHOICES = current_space()
SIZES = [len(values) for values in CHOICES.values()]


@dataclass(frozen=True)
class Options:
    """Train random networks and evaluate the surrogate."""

    networks: int = option(0, "train as many as are missing of this number of networks", least=0)
    part: int = option(0, "train networks PART, PART + PARTS, ... only: for several processes", least=0)
    parts: int = option(1, "processes that train parts of the networks", least=1)
    out: str = option("runs/bench", "folder of the results")


def rows(epochs: int = EPOCHS, repeat: int = 0) -> list[dict]:
    """Return the rows of the table with these epochs and seeds, values as strings."""
    if not TABLE.exists():
        return []
    with open(TABLE, newline="") as file:
        found = [row for row in csv.DictReader(file) if int(row["epochs"]) == epochs]
    return [row for row in found if int(row["seed"]) == trial_seed(repeat, choices(row))]


def choices(row) -> dict[str, str]:
    """Return the choices of a row of the table, or of ConfigSpace's configuration."""
    return {name: str(row[name]) for name in CHOICES}


def train(config: dict, epochs: int = EPOCHS, repeat: int = 0) -> None:
    """Train a network and append its row to the table."""
    seed, begun = trial_seed(repeat, config), time.process_time()
    info = train_config(config, seed, epochs)[1]
    row = config | {"epochs": epochs, "seed": seed, "seconds": round(time.process_time() - begun, 2)}
    row |= {"top1": info["top1"], "losses": " ".join(map(str, info["losses"]))}
    with open(TABLE, "a", newline="") as file:
        lock_file(file, wait=True)
        table = csv.DictWriter(file, row, lineterminator="\n")
        if file.seek(0, 2) == 0:
            table.writeheader()
        table.writerow(row)


def code_of(config: dict) -> tuple[int, ...]:
    """Return the position of a configuration in the array of `surrogate`."""
    return tuple(values.index(config[name]) for name, values in CHOICES.items())


def load(epochs: int = EPOCHS, repeats: tuple[int, ...] = (0, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes (N, 9) of trained networks and the mean top-1 of their trainings in percent, (N,)."""
    found = {}
    for row in (row for repeat in repeats for row in rows(epochs, repeat)):
        found.setdefault(code_of(row), []).append(float(row["top1"]))
    return np.array([*found]), np.array([np.mean(top1s) for top1s in found.values()])


def predict(codes: np.ndarray, top1: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Fit the surrogate to networks (N, 9) and predict the top-1 of others, given as indicator columns."""
    from sklearn.ensemble import ExtraTreesRegressor, GradientBoostingRegressor

    settings = {"n_estimators": 1000, "max_depth": 4, "learning_rate": 0.03, "subsample": 0.5}
    boosting = GradientBoostingRegressor(**settings, max_features=0.3, random_state=0)
    trees = ExtraTreesRegressor(300, max_features=0.5, random_state=0)
    models = [model.fit(one_hot(codes, SIZES), top1) for model in (boosting, trees)]
    return np.mean([model.predict(columns) for model in models], axis=0).clip(0, 100)


@functools.cache
def surrogate(epochs: int = EPOCHS) -> np.ndarray:
    """Return the expected top-1 of all networks in percent, with an axis for each choice."""
    return predict(*load(epochs), whole_space(tuple(SIZES))).reshape(SIZES)


def cross_validation(epochs: int) -> str:
    """Describe how ranks agree in trainings and by the surrogate of the other nine tenths of the networks."""
    codes, top1 = load(epochs)
    again = set(map(tuple, load(epochs, (1,))[0]))
    twice = np.array([tuple(code) in again for code in codes])
    fold, predicted = np.random.default_rng(0).permutation(len(top1)) % 10, np.zeros(len(top1))
    for i in range(10):
        known, new = fold != i, fold == i
        predicted[new] = predict(codes[known], top1[known], one_hot(codes[new], SIZES))
    texts = []
    for trainings, part in (("the mean of two trainings", twice), ("one", ~twice)):
        if part.sum() > 1:
            rank, error = (
                spearmanr(predicted[part], top1[part]).statistic,
                np.abs(predicted - top1)[part].mean(),
            )
            texts.append(f"{rank:.3f} with {trainings} ({part.sum()} networks, error {error:.1f} points)")
    return ", ".join(texts)


def agreement(usual: tuple[int, int], other: tuple[int, int]) -> str:
    """Describe how ranks agree in two kinds of trainings of the same networks, and how far these differ."""
    first, second = (
        {tuple(code): top1 for code, top1 in zip(*load(epochs, (repeat,)), strict=True)}
        for epochs, repeat in (usual, other)
    )
    pairs = np.array([(first[code], top1) for code, top1 in second.items() if code in first]).T
    text = f"{spearmanr(*pairs).statistic:.3f} ({pairs.shape[1]} networks"
    if usual[0] == other[0]:  # two draws differ by sqrt(2) standard deviations of the noise
        best = pairs[:, pairs.mean(0) >= np.quantile(pairs.mean(0), 0.75)]
        spreads = [np.sqrt(np.mean((a - b) ** 2) / 2) for a, b in (pairs, best)]
        text += ", noise {:.1f} points, of the best quarter {:.1f}".format(*spreads)
    return text + ")"


def main(options: Options) -> None:
    """Train the networks that are missing, then cross-validate the surrogate on those of the table."""
    drawn = map(choices, configspace(seed=0).sample_configuration(2 * options.networks + 2))
    drawn = [dict(pairs) for pairs in dict.fromkeys(tuple(c.items()) for c in drawn)][: options.networks]
    plan = [(config, *kind) for kind, part in KINDS.items() for config in drawn[part]]
    done = [(choices(row), *kind) for kind in KINDS for row in rows(*kind)]
    for training in plan[options.part :: options.parts]:
        if training not in done:
            train(*training)
    codes, top1 = load()
    marks = ", ".join(f"{mark:.1f}%" for mark in np.quantile(top1, [0.1, 0.5, 0.9, 1]))
    found = importances(codes, 1 - top1 / 100, CHOICES)
    spearman = "; nine epochs: ".join(cross_validation(epochs) for epochs in (EPOCHS, 9))
    text = f"""{len(top1)} networks, means of two trainings or one; 10%, 50%, 90% quantile and best: {marks}

Spearman correlation with other trainings of the same networks:

- another seed: {agreement((EPOCHS, 0), (EPOCHS, 1))}; both with nine epochs: {agreement((9, 0), (9, 1))}
- two epochs: {agreement((EPOCHS, 0), (2, 0))}; nine epochs: {agreement((EPOCHS, 0), (9, 0))}
- the surrogate, tenfold cross-validation: {spearman}

```text
{importance_text({EPOCHS: found})}
```
"""
    print(text)
    write_results("space", options, torch.device("cpu"), text, [found])
    draw_importance({EPOCHS: found}, Path(options.out, "space.png"))


if __name__ == "__main__":
    run_script(functools.partial(run_command, main, Options, "results.space"))
