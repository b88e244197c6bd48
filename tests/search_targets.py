"""Cheap targets for the tests of search.py, and searches of them in this or in another process.

python tests/search_targets.py OUT TRIALS WORKERS TARGET
"""

import math
import os
import re
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


def formula(config, seed, budget):
    """A cost with known effects: block 0.2, kernel 0.1, norm after convolution 1 0.05, epochs little."""
    cost = 0.5 - 0.2 * (config["block"] == "bottleneck") - 0.1 * (config["kernel"] in ("5", "7"))
    return cost - 0.05 * ("1" in config["norm_positions"]) - 0.002 * budget, {"seed": seed}


def slow(config, seed, budget):
    time.sleep(0.05 + 0.02 * budget)
    return formula(config, seed, budget)


def endless(config, seed, budget):
    time.sleep(3600)


def loading(config, seed, budget):
    """Start a loader worker, as trials on image folders do."""
    assert len(list(torch.utils.data.DataLoader(range(4), num_workers=1))) == 4
    return formula(config, seed, budget)


class Hoard(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.hoard = np.ones(250_000_000)  # 2 GB
        time.sleep(60)


def hoarding_loader(config, seed, budget):
    next(iter(torch.utils.data.DataLoader(Hoard(), num_workers=1)))


def two_costs(config, seed, budget):
    """Two objectives that prefer opposite kernels and the same block."""
    size = {"3": 0, "5": 1, "7": 2, "9": 3, "mixed": 4}[config["kernel"]]
    block = 0.3 * (config["block"] == "xception")
    return [0.5 - 0.1 * size + block, -100.0 + 20 * size + 50 * block], {}


def moody(config, seed, budget):
    """Bottleneck blocks succeed; with Xception's, each kernel fails in a different way."""
    if config["block"] == "bottleneck":
        return formula(config, seed, budget)
    if config["kernel"] == "3":
        return float("nan")
    if config["kernel"] == "5":
        raise SystemExit("a target that wants out")
    if config["kernel"] == "7":
        os._exit(7)
    hoard = [np.ones(10_000_000) for _ in range(50 * (config["kernel"] == "9"))]  # 4 GB
    time.sleep(3600)
    return float(len(hoard))


def broken(config, seed, budget):
    raise RuntimeError("the data set is not where it should be")


def play(out, sampler="smac", space=None, trials=math.inf, workers=1, target=formula):
    """Let a sampler propose and a target answer, without a Search; a cost of 1 is a failure.

    Returns the sampler and its trials, in the order in which they finished.
    """
    import search

    settings = {"space": space or search.current_space(), "seed": 3, "objectives": ["accuracy"]}
    proposes = search.SAMPLERS[sampler](Path(out), settings | {"budgets": [1, 3, 9]})
    proposes.replay([], None)
    running, played = [], []
    while len(played) < trials:
        while len(running) < workers and (trial := proposes.ask()) is not None:
            running.append(trial)
        if not running:
            break
        played.append(running.pop(0))
        cost, _ = target(played[-1].config, 0, played[-1].budget)
        row = {"cost": [cost], "status": "crashed" if cost == 1 else "success", "info": {}}
        proposes.tell(played[-1], row | {"start": 0, "end": 1})
    return proposes, played


def start(out, trials, workers, target="slow"):
    """Start a search in a process of its own, with its output in a pipe."""
    command = [sys.executable, __file__, str(out), str(trials), str(workers), target]
    return Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, text=True)


def finished_line(line):
    """Return configuration and budget from the line of a finished trial, None for other lines."""
    found = re.match(r" *\d+/\d+ (.+?) epochs? ", line)
    return " ".join(found[1].split()) if found else None


if __name__ == "__main__":
    import search

    import search_targets  # the module name by which trial processes find the target

    out, trials, workers, target = sys.argv[1:]
    options = search.Options(out=out, trials=int(trials), workers=int(workers), min_epochs=1, max_epochs=9)
    sys.exit(search.Search(options, target=getattr(search_targets, target)).run())
