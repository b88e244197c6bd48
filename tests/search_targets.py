"""Cheap targets for the tests of search.py, and a long test to run by hand:

    python tests/search_targets.py kill OUT 30 2    # kill a search of two workers thirty times

`search OUT TRIALS WORKERS TARGET` runs the search that is killed.
"""

import json
import math
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired

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
    command = [sys.executable, __file__, "search", str(out), str(trials), str(workers), target]
    return Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, text=True)


def finished_line(line):
    """Return configuration and budget from the line of a finished trial, None for other lines."""
    found = re.match(r" *\d+/\d+ (.+?) epochs? ", line)
    return " ".join(found[1].split()) if found else None


def killed(out, trials, workers, wait, from_first_trial=True):
    """Run a search and SIGKILL it `wait` seconds after its first trial or its start (None: never).

    Returns its exit status and its output, line by line.
    """

    def size():
        journal = Path(out) / "trials.jsonl"
        return journal.stat().st_size if journal.exists() else 0

    before, search = size(), start(out, trials, workers)
    while wait is not None and from_first_trial and size() <= before and search.poll() is None:
        time.sleep(0.05)
    try:
        said, _ = search.communicate(timeout=wait)
    except TimeoutExpired:
        search.send_signal(signal.SIGKILL)
        said, _ = search.communicate()
    return search.returncode, said.splitlines()


def survive(out, trials, workers, kills, seed=0):
    """Kill a search at random moments, then let it end; compare its output with its journal."""
    from search import rows_of, short

    rng, said = random.Random(seed), []
    for kill in range(1, kills + 1):
        # Two thirds of the kills come during the trials, one third at any time after the start.
        code, lines = killed(out, trials, workers, rng.uniform(0.0, 4.0), rng.random() < 2 / 3)
        assert code == -signal.SIGKILL, (code, lines[-5:])
        said += lines
        print(f"kill {kill} of {kills}", file=sys.stderr, flush=True)
    code, lines = killed(out, trials, workers, None)
    announced = {finished_line(line) for line in said + lines} - {None}
    rows = rows_of(Path(out))
    kept = {(short(row["config"]), row["budget"]) for row in rows}
    history = json.loads((Path(out) / "smac/0/runhistory.json").read_text())
    return {
        "kills": kills, "workers": workers, "asked_for": trials, "exit_status": code,
        "finished": len(rows), "run_twice": len(rows) - len(kept),
        "announced_and_lost": len(announced - {f"{config} {budget:g}" for config, budget in kept}),
        "in_smac_run_folder": history["stats"]["finished"],
        "still_running_there": history["stats"]["running"],
        "incumbent": next((line for line in lines if line.startswith("incumbent")), None),
    }  # fmt: skip


def main(command, out, *numbers):
    if command == "kill":
        print(json.dumps(survive(out, 400, workers=int(numbers[1]), kills=int(numbers[0])), indent=1))
        return
    import search

    import search_targets  # the module name by which trial processes find the target

    trials, workers, target = numbers
    options = search.Options(out=out, trials=int(trials), workers=int(workers), min_epochs=1, max_epochs=9)
    sys.exit(search.Search(options, target=getattr(search_targets, target)).run())


if __name__ == "__main__":
    main(*sys.argv[1:])
