"""Search the NEXcepTion design space with SMAC (section 3 of the paper) and show which choices matter.

    python search.py                                  # clutter: a search of 6 minutes on 2 CPU cores
    python search.py --data cifar100 --walltime 3d    # the paper's search: three days on one GPU
    python search.py status runs/search-clutter       # progress of a search, from another terminal
    python search.py importance runs/search-clutter   # importance of each choice: Figure 4 of the paper
    python search.py report runs/search-clutter       # report.md: progress, importance, the ten best

A search ends with its best configuration, its test accuracy beside that of NEXcepTion's and Xception's
choices, and the command that trains the best in full. It may be killed at any time: repeat the command to
resume it, with larger `--trials` or `--walltime` if needed.

A run folder holds `search.json` (the settings), `trials.jsonl` (the finished trials, one per line),
`trials.csv` (the same as a table), `trials.log` (what trials print), `state.json` (the sampler's state),
`smac/` (a SMAC3 run folder, for DeepCAVE), `incumbent.json` (the network found, for `train.py --model`),
`final.json` (the comparison) and `report.md` with its figures.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pkgutil
import random
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, CancelledError, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # end without a traceback on Ctrl-C, also during the imports below
    sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)

import train
from blocks import SPACE
from data import SMALL_SETS, Data, Plan, RunError, UsageError, cpu_count, lock_file, open_data, write_whole
from model import MODELS, POINTS, ModelConfig, count_macs, count_parameters, create_model, keep_large_buffers
from train import option, parse, pick_device, run_script, save_figure, subplots

import numpy as np
import psutil
import torch
from pebble import ProcessExpired, ProcessPool
from threadpoolctl import threadpool_limits

ETA = 3  # Hyperband promotes the best third of a stage to three times the epochs
FAILURES_THAT_STOP = 5  # a search stops if its first trials all fail
SCHEDULER_PATIENCE = 30  # seconds to connect to a Dask scheduler
RANDOM_START = 8  # random configurations before SMAC's first model is fitted
CANDIDATES = 500  # random configurations of which SMAC's model proposes the best
TREES, FEW_TREES = 100, 10  # per forest: for the importances; for their intervals and noise levels
RESAMPLES, SHUFFLES = 100, 10  # bootstrap samples for the intervals; shuffles per choice for the noise levels
FINALISTS = 5  # networks of the final comparison beside the paper's, at most one for each ten trials
REPEATS = 3  # training runs of each of them
OUT_OF_MEMORY = 251  # exit status of a trial process that runs out of memory

# objective -> cost of a trial's results (smaller is better), value of a cost, format of a value, axis label
# fmt: off
OBJECTIVES = {
    "accuracy": (lambda t: 1 - t["top1"] / 100, lambda c: 100 - 100 * c, "{:.2f}%", "validation top-1, %"),
    "throughput": (lambda t: -t["inference_images_per_second"], lambda c: -c, "{:,.0f} images/s", "images/s"),
    "macs": (lambda t: t["macs"] / 1e6, lambda c: c, "{:.1f} MMACs", "MACs, M"),
    "parameters": (lambda t: t["parameters"] / 1e6, lambda c: c, "{:.3f} M parameters", "parameters, M"),
}
# fmt: on
IMPORTANCES = {  # kind (see `importances`) -> title, axis label
    "local": ("local variance share", "share of the variance around the incumbent"),
    "fanova": ("fANOVA main effect", "share of the variance over all configurations"),
    "improvement": ("improvement ratio (DeepCAVE's)", "loss by other values / loss by the default"),
}

# --------------------------------------------------------------------------------------------------
# The space


def encode(value) -> str:
    """Write a value of `SPACE` as a string: "yes" for True, "12" for the positions (1, 2), "none" for ().

    ConfigSpace returns choices as numpy types; strings survive JSON unchanged.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ("".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def current_space() -> dict[str, list[str]]:
    """Return the values of each choice as strings, with those added to `blocks.py` at run time."""
    return {name: [encode(value) for value in values] for name, values in SPACE.items()}


def points() -> dict[str, dict[str, str]]:
    """Return NEXcepTion's and Xception's choices as configurations."""
    return {name: {c: encode(getattr(model, c)) for c in SPACE} for name, model in POINTS.items()}


def network_config(config: dict, base: str) -> ModelConfig:
    """Return the network of a configuration in the macro-architecture of the model named `base`."""
    values = {name: {encode(value): value for value in SPACE[name]}[str(config[name])] for name in SPACE}
    return replace(MODELS[base], **values)


def configspace(space: dict | None = None, seed: int = 0):
    """Return a ConfigurationSpace for SMAC (default: `SPACE`, 61,440 configurations)."""
    # Here and below, what takes seconds to import is imported where it is used.
    from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace

    values = (space or current_space()).items()
    result = ConfigurationSpace(name="nexception", seed=seed)
    result.add([CategoricalHyperparameter(name, list(names)) for name, names in values])
    return result


def short(config: dict) -> str:
    """Abbreviate a configuration: `patchify 5 blur bottleneck SE gelu@2 batch@12`."""
    if set(config) != set(SPACE):
        return " ".join(f"{name}={value}" for name, value in config.items())
    c = {name: str(value).replace("none", "-") for name, value in config.items()}
    se = "SE" if c["se"] == "yes" else "--"
    shape = f"{c['stem']} {c['kernel']} {c['pooling']} {c['block']} {se}"
    return f"{shape} {c['activation']}@{c['activation_positions']} {c['norm']}@{c['norm_positions']}"


# --------------------------------------------------------------------------------------------------
# Samplers


@dataclass(frozen=True)
class Trial:
    """A network to train: a value for each choice of the space, the epochs, and who proposed it."""

    config: dict[str, str]
    budget: int
    origin: str  # "random", "model", or the name of one of the paper's points


class RandomSearch:
    """Uniformly random configurations at the highest budget, none twice.

    A sampler is a class with these methods and an entry in SAMPLERS. Of the `settings` in `search.json`,
    space, objectives, budgets and seed describe the problem. A row is a finished trial (see `rows_of`).
    """

    def __init__(self, folder: Path, settings: dict):
        """Prepare for a search; the sampler may write files of its own to the folder."""
        self.space, self.budget = settings["space"], settings["budgets"][-1]
        self.rng, self.drawn = random.Random(settings["seed"]), set()

    def replay(self, rows: list[dict], state: dict | None) -> None:
        """Learn of the trials of earlier starts, and of what `state` returned last (None: not known)."""
        self.drawn |= {tuple(row["config"][name] for name in self.space) for row in rows}

    def ask(self) -> Trial | None:
        """Return the next trial; None if a running trial must finish first, or if nothing is left."""
        while len(self.drawn) < math.prod(map(len, self.space.values())):
            config = {name: self.rng.choice(values) for name, values in self.space.items()}
            if tuple(config.values()) not in self.drawn:
                self.drawn.add(tuple(config.values()))
                return Trial(config, self.budget, "random")
        return None

    def tell(self, trial: Trial, row: dict) -> None:
        """Learn of a finished trial, which need not be one that was asked for."""

    def state(self) -> dict:
        """Return what `replay` needs beside the rows, for `state.json`."""
        return {}


class Smac:
    """SMAC: random configurations, then those of its model; Hyperband allots several budgets.

    Writes `smac/SEED`, a SMAC3 run folder. When a small space runs out amid its brackets, all configurations
    that have not run at the highest budget do. `model`: "process", a Gaussian process; "forest", SMAC's
    default; "none": all configurations are random.
    """

    def __init__(self, folder: Path, settings: dict, model: str = "process"):
        import smac
        from ConfigSpace import Configuration

        self.space, names = configspace(settings["space"], settings["seed"]), settings["objectives"]
        self.stages = len(settings["budgets"])
        self.seed = 0  # of the trials in SMAC's run history: SMAC adopts that of the trials it is told first
        self.asked = {}  # SMAC's own objects: equal configurations of other string types hash differently
        logging.getLogger("smac").setLevel(logging.ERROR)
        scenario = smac.Scenario(
            self.space, name="smac", output_directory=folder, deterministic=True, seed=settings["seed"],
            objectives=names if len(names) > 1 else names[0],
            min_budget=settings["budgets"][0], max_budget=settings["budgets"][-1],
            n_trials=10**9,  # the search itself counts them
        )  # fmt: skip
        # Drawn by another generator than SMAC's own, which would draw the same configurations once more.
        first, self.rest = RandomSearch(folder, settings), RandomSearch(folder, settings)
        drawn = filter(None, (first.ask() for _ in range(RANDOM_START)))
        start = [Configuration(self.space, trial.config, origin=trial.origin) for trial in drawn]
        facade, parts = smac.HyperbandFacade, {}
        if model != "none":
            facade = smac.MultiFidelityFacade
            parts["acquisition_maximizer"] = best_of_many(self.space, settings["seed"])
        if model == "forest":  # the facade's, without threads and room for 2**20 leaves: seven times as fast
            parts["model"] = smac.model.random_forest.RandomForest(
                self.space, log_y=True, n_trees=10, ratio_features=1.0, min_samples_split=2,
                min_samples_leaf=1, n_jobs=1, max_leaf_nodes=None, seed=settings["seed"],
            )  # fmt: skip
        if model == "process":  # of costs, not of their logarithms
            parts["model"] = gaussian_process(self.space, settings["seed"])
            parts["acquisition_function"] = smac.acquisition.function.EI()
            parts["runhistory_encoder"] = smac.runhistory.encoder.RunHistoryEncoder(scenario)
        if len(names) > 1:
            parts["multi_objective_algorithm"] = smac.multi_objective.parego.ParEGO(scenario)
        self.smac = facade(
            scenario, intensifier=exact_hyperband(scenario),
            initial_design=smac.initial_design.RandomInitialDesign(
                scenario, n_configs=0, additional_configs=start
            ),
            config_selector=smac.main.config_selector.ConfigSelector(
                scenario, retrain_after=1, max_new_config_tries=10_000, min_trials=len(start)
            ),  # the model is fitted to the highest budget with that many trials
            logging_level=False, overwrite=True, **parts,
        )  # fmt: skip

    def replay(self, rows: list[dict], state: dict | None) -> None:
        for row in rows:
            self.tell(Trial(row["config"], row["budget"], row["origin"]), row)
        # A group without configurations in the last stage: SMAC fills an empty tracker with what it was told.
        begin = {"tracker": {f"0,{self.stages - 1}": [[0, []]]}, "next_bracket": 0}
        self.smac.intensifier.set_state(state or begin)
        self.trials = iter(self.smac.intensifier)

    def ask(self) -> Trial | None:
        from smac.main.exceptions import ConfigurationSpaceExhaustedException

        for _ in range(2):  # an iterator that finds no new configuration ends, with promotions still due
            # The model's small matrices are faster on one thread, beside trials twice as fast.
            with threadpool_limits(1, "blas"), contextlib.suppress(ConfigurationSpaceExhaustedException):
                info = next(self.trials, None)
                if info is not None:
                    self.smac.runhistory.add_running_trial(info)
                    self.seed = info.seed
                    origin = "model" if info.config.origin == "BestOfMany" else "random"
                    config = {name: str(info.config[name]) for name in self.space}
                    trial = Trial(config, round(info.budget), origin)
                    self.asked[str(trial)] = info
                    return trial
            self.trials = iter(self.smac.intensifier)
        return None if self.asked else self.rest.ask()

    def tell(self, trial: Trial, row: dict) -> None:
        from ConfigSpace import Configuration
        from smac.runhistory import StatusType, TrialInfo, TrialValue

        if trial.budget == self.rest.budget:
            self.rest.replay([{"config": trial.config}], None)
        info = self.asked.pop(str(trial), None)
        if info is None:
            config = Configuration(self.space, trial.config, origin=trial.origin)
            info = TrialInfo(config, seed=self.seed, budget=float(trial.budget))
        value = TrialValue(
            cost=row["cost"] if len(row["cost"]) > 1 else row["cost"][0], time=row["end"] - row["start"],
            status=StatusType[row["status"].upper()], starttime=row["start"], endtime=row["end"],
            additional_info=row["info"],
        )  # fmt: skip
        self.smac.tell(info, value, save=False)

    def state(self) -> dict:
        self.smac.optimizer.save()
        return self.smac.intensifier.get_state()


def gaussian_process(space, seed: int):
    """Return SMAC's Gaussian process; the more choices two networks share, the more alike it expects them.

    It estimates the noise of trials, which a forest takes for differences between networks. One length scale
    for all choices finds better networks than SMAC's default of one for each (results/LOG.md).
    """
    from smac.model.gaussian_process import GaussianProcess, kernels

    shared = kernels.ConstantKernel(1.0, (0.01, 10)) * kernels.HammingKernel(1.0, (0.3, 5))
    noise = kernels.WhiteKernel(0.1, (1e-3, 2))  # of costs scaled to a variance of 1
    return GaussianProcess(space, shared + noise, n_restarts=0, seed=seed)


def best_of_many(space, seed: int):
    """Return an acquisition maximizer that draws CANDIDATES configurations and offers the best unknown ones.

    SMAC's local search ends in the few local maxima of a space of choices. Once they are known, it offers
    nothing, and most trials after the fiftieth are random; nor does it repeat with the seed.
    """
    from smac.acquisition.maximizer.abstract_acquisition_maximizer import AbstractAcquisitionMaximizer

    class BestOfMany(AbstractAcquisitionMaximizer):
        def _maximize(self, previous_configs, n_points):
            # By their bytes: ConfigSpace compares configurations a hundred times as slowly.
            known = {config.get_array().tobytes() for config in previous_configs}
            drawn = self._configspace.sample_configuration(CANDIDATES)
            drawn = {config.get_array().tobytes(): config for config in drawn}
            new = [config for key, config in drawn.items() if key not in known]
            new = new or [*drawn.values()]  # SMAC passes over known ones, and fails if there are none
            for config in new:
                config.origin = type(self).__name__
            values = self.acquisition_function(new).ravel()
            return sorted(zip(values, new, strict=True), key=lambda pair: -pair[0])[:n_points]

    return BestOfMany(space, seed=seed)


def exact_hyperband(scenario):
    """Return SMAC's Hyperband with exactly the brackets of its paper.

    SMAC computes them with floating-point logarithms and powers: from 1 to 243 epochs a bracket is missing,
    and from 1 to 729 the last stage of the first is empty.
    """
    from smac.intensifier.hyperband import Hyperband

    class ExactHyperband(Hyperband):
        @staticmethod
        def _get_max_iterations(eta, max_budget, min_budget):
            return round(math.log(max_budget / min_budget, eta))

        @staticmethod
        def _compute_configs_and_budgets_for_stages(eta, max_budget, max_iter, s_max=None):
            brackets = (max_iter if s_max is None else s_max) + 1
            first = -(-brackets * eta**max_iter // (max_iter + 1))
            budgets = [max_budget / eta ** (max_iter - stage) for stage in range(max_iter + 1)]
            return budgets, [first // eta**stage for stage in range(max_iter + 1)]

    return ExactHyperband(scenario, eta=ETA, incumbent_selection="highest_budget")


SAMPLERS = {
    "smac": Smac,
    "forest": functools.partial(Smac, model="forest"),
    "hyperband": functools.partial(Smac, model="none"),
    "random": RandomSearch,
}

# --------------------------------------------------------------------------------------------------
# Options


# What a search of a data set uses unless options say otherwise; the time limit is a trial's. On clutter, a
# network has hardly left chance after two epochs: one budget (results/README.md).
# fmt: off
USUAL = ("model", "min_epochs", "max_epochs", "walltime", "time_limit", "batch")
PAPERS = ("nexception_reduced", 5, 45, "3d", "2h", 64)
DEFAULTS = {
    "clutter": ("nexception_pico", 5, 5, "5m", "2m", 32),
    "digits": ("nexception_nano", 1, 9, "7m", "2m", 64),
    "cifar10": PAPERS, "cifar100": PAPERS,
}
# fmt: on


def defaults(data: str) -> dict:
    """Return the defaults of a data set: other small sets use those of digits, others the paper's."""
    values = DEFAULTS.get(data, DEFAULTS["digits"] if data in SMALL_SETS else PAPERS)
    return dict(zip(USUAL, values, strict=True))


# fmt: off
@dataclass
class Options:
    """Search for the best network of the design space. Repeat the command to continue a search."""

    data: str = option("clutter", f"{', '.join(SMALL_SETS)}, an image folder with train/ and val/, or "
                       "MODULE:FUNCTION, which returns a source of images (see data.py)")
    root: str = option("data", "folder of the CIFAR files")
    model: str | None = option(None, "macro-architecture (default: clutter nexception_pico, digits "
                               "nexception_nano, others nexception_reduced)", choices=tuple(MODELS))
    out: str | None = option(None, "run folder (default: runs/search-DATA)")
    trials: int | None = option(None, "stop after this many trials in total (default: no limit)", 1)
    walltime: str | None = option(None, "total time, 90s or 10m (default without --trials: 5m to 3d)")
    sampler: str = option("smac", "SMAC with a Gaussian process, or with its default, a forest; Hyperband "
                          "without a model; random search at the highest budget", choices=tuple(SAMPLERS))
    min_epochs: int | None = option(None, "lowest budget (default: digits 1, others 5 epochs)", 1)
    max_epochs: int | None = option(None, "highest: the lowest times a power of 3 (default: 5, 9 or 45)", 1)
    objectives: str = option("accuracy", "several give a Pareto front: accuracy,throughput,macs,parameters")
    points: bool = option(True, "begin with NEXcepTion's and Xception's choices, at the highest budget")
    batch: int | None = option(None, "images per training batch; batch norm, one of the choices, needs 2 "
                               "(default: 32 for clutter, else 64)", 2)
    workers: int | None = option(None, "concurrent trials (default: CPU cores up to 4, or by GPU; with "
                                 "--scheduler 1)", 1)
    workers_per_gpu: int = option(1, "concurrent trials per GPU", 1)
    scheduler: str | None = option(None, "address of a Dask cluster that runs the trials, tcp://host:8786")
    time_limit: str | None = option(None, "time limit of a trial (default: 2m to 2h)")
    memory_limit: float | None = option(None, "memory limit of a trial in GB, its loader processes included "
                                        "(default: 0.9 RAM / workers)", above=0)
    compile: bool = option(False, "torch.compile the network of each trial; pays off in long trials on GPUs")
    device: str = option("auto", "auto (all GPUs, else the CPU), cpu, cuda, cuda:1, ...")
    grow: str | None = option(None, "NEXcepTion size in which to write the best network", choices=tuple(
                              name.removeprefix("nexception_") for name in MODELS if name != "xception"))
    seed: int = option(0, "seed of the sampler, from which the trials' seeds are derived", 0, 2**32 - 1)
    # fmt: on

    def resolved(self) -> Options:
        """Fill in the defaults that depend on the data. Raises UsageError for contradictions."""
        o, usual = replace(self), defaults(self.data)
        if o.trials is not None:
            usual["walltime"] = None
        if o.max_epochs is not None and usual["min_epochs"] == usual["max_epochs"]:
            usual["min_epochs"] = o.max_epochs  # one budget, as usual
        for name, value in usual.items():
            if getattr(o, name) is None:
                setattr(o, name, value)
        if o.sampler == "hyperband" and o.min_epochs == o.max_epochs:
            raise UsageError("--sampler hyperband needs several budgets, as --min-epochs 2 --max-epochs 6")
        o.out = o.out or f"runs/search-{Path(o.data).resolve().name.replace(':', '-')}"
        names = o.objectives.split(",")
        if names[0] != "accuracy" or len(set(names)) < len(names) or set(names) - set(OBJECTIVES):
            known = ", ".join(name for name in OBJECTIVES if name != "accuracy")
            raise UsageError(f"--objectives {o.objectives}: give accuracy first, then any of {known}")
        return o


def seconds(text: str | None, name: str) -> float:
    """Parse `90s`, `10m`, `12h`, `3d` or plain seconds; None means no limit."""
    if text is None:
        return math.inf
    found = re.fullmatch(r"(\d*\.?\d+)([smhd]?)", text)
    if not found or not float(found[1]):
        raise UsageError(f"{name} {text}: write a time as 90s, 10m, 12h or 3d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def clock(span: float) -> str:
    """Format seconds: 4.2 s, 3:20, 2:03:20."""
    return f"{span:.1f} s" if span < 60 else str(timedelta(seconds=round(span))).lstrip("0:")


def epochs_text(budget: float) -> str:
    """Format a budget: 1 epoch, 9 epochs."""
    return f"{budget:g} epoch{'s' * (budget != 1)}"


def check_budgets(lowest: int, highest: int) -> list[int]:
    """Return the budgets from lowest to highest by factors of 3. Raises UsageError if they do not fit."""
    budgets = [lowest]
    while budgets[-1] * ETA <= highest:
        budgets.append(budgets[-1] * ETA)
    if budgets[-1] != highest:
        raise UsageError(
            f"--max-epochs {highest} is not --min-epochs {lowest} times a power of {ETA}; the nearest that "
            f"fit are {budgets[-1]} and {budgets[-1] * ETA}"
        )
    return budgets


def trial_devices(o: Options) -> list[tuple[str, int]]:
    """Return (device, CPU threads) of each concurrent trial; 0 threads: PyTorch's default."""
    if o.scheduler:
        return [("auto", 0)] * (o.workers or 1)
    device = str(pick_device(o.device))
    if device.startswith("cpu"):
        workers = o.workers or min(cpu_count(), 4)
        return [("cpu", max(1, cpu_count() // workers))] * workers
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else [device]
    return [(gpus[i % len(gpus)], 1) for i in range(o.workers or len(gpus) * o.workers_per_gpu)]


# --------------------------------------------------------------------------------------------------
# The trial

open_once = functools.cache(open_data)  # keeps the data on their device for later trials of the process


@functools.cache
def trial_facts(data: str, root: str, model: str, batch: int, device: str) -> dict:
    """Return what all trials of a search share, found where they run: amp, recipe, classes and image counts.

    amp: the fastest precision there; with one for all, accuracies of unlike machines are comparable. recipe:
    the one that `train.py` would choose. Raises UsageError if the data cannot be opened.
    """
    opened = open_data(data, Plan(batch), root=root, workers=0)
    images, classes = {split: opened.count(split) for split in opened.splits}, list(opened.classes)
    opened.close()
    usual = train.resolve(train.Options(data=data, model=model, device=device), images=images["train"])
    narrow = model in ("nexception_nano", "nexception_pico")
    if usual.device == "cpu" and torch.cpu._is_amx_tile_supported() and not narrow:
        usual.amp = "bf16"  # 1.6 times as fast at the paper's width, no faster at nano's
    return {"amp": usual.amp, "recipe": usual.recipe, "classes": classes, "images": images}


def train_config(config: dict, seed: int = 0, budget: float | None = None, settings: dict | None = None):
    """Train the network of a configuration for `budget` epochs and evaluate it.

    This is the target function of the search; any SMAC facade can use it.

    Args:
        config: a value for each choice of `SPACE`, as strings (see `encode`).
        seed: of initial weights, data order and augmentation.
        budget: epochs, at least one (default: the highest budget of a search).
        settings: changes to the default search's settings: data, root, model, batch, recipe (of `train.py`;
            None: the one that it would choose), device, compile, amp ("auto", "bf16", "fp16" or "off"),
            objectives, workers (data-loading processes), and the split to evaluate ("val"; "test" for the
            final comparison, if the data have one).

    Returns:
        The cost (a list for several objectives) and a dictionary of further results.

    Raises:
        RunError: the loss or the scores are not finite.
        UsageError: a setting is unknown, or the data cannot be opened.
    """
    changes = settings or {}
    usual = defaults(changes.get("data", Options.data))
    s = {
        "data": Options.data, "root": Options.root, "model": usual["model"], "batch": usual["batch"],
        "recipe": None, "device": "auto", "compile": False, "amp": "auto", "objectives": ["accuracy"],
        "split": "val", "workers": None,
    }  # fmt: skip
    if unknown := changes.keys() - s:
        raise UsageError(f"no settings of a trial: {', '.join(unknown)}; they are {', '.join(s)}")
    s |= changes
    if s["amp"] == "auto" or s["recipe"] is None:
        facts = trial_facts(*(s[name] for name in ("data", "root", "model", "batch", "device")))
        s |= {name: facts[name] for name in ("amp", "recipe") if s[name] in ("auto", None)}
    epochs = max(1, round(budget or usual["max_epochs"]))
    device = pick_device(s["device"])
    if device.type == "cpu":
        keep_large_buffers()
    elif device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # initializes CUDA; resetting its statistics needs that
        torch.backends.cudnn.benchmark = True
        torch.cuda.reset_peak_memory_stats(device)
    options = trial_options(s, epochs, seed, device)
    how = {"size": options.size, "augment": train.augmentation(options), "root": options.root}
    how |= {"device": device, "workers": s["workers"]}
    data = open_once(options.data, Plan(options.batch), **how)
    data.plan = Plan(options.batch, seed=seed)
    begun = time.perf_counter()
    torch.manual_seed(seed)
    network = network_config(config, s["model"])
    network = create_model(network, num_classes=len(data.classes), input_size=data.transform.size)
    training = train.Training(network, options, train.Process(device=device))
    curve = train.fit(training, data, score_after=[epochs])
    split = s["split"] if s["split"] in data.splits else "val"
    scores = {"top1": curve[-1]["val_top1"], "loss": curve[-1]["val_loss"]}
    if split != "val":
        scores = train.evaluate(training.scored, data, split, training.amp)
    info = {
        "top1": scores["top1"],
        "val_top1": curve[-1]["val_top1"],
        "loss": scores["loss"],
        "split": split,
        "parameters": count_parameters(network),
        "macs": count_macs(network),
        "training_images_per_second": float(np.median([epoch["images_per_second"] for epoch in curve])),
        "seconds": time.perf_counter() - begun,
        "losses": [round(epoch["train_loss"], 5) for epoch in curve],  # mean of each epoch of training
        "amp": options.amp,
        "device": f"cpu, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        info["device"] = torch.cuda.get_device_name(device)
        info["peak_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    if "throughput" in s["objectives"]:
        info["inference_images_per_second"] = inference_speed(network, data, training.amp)
    costs = [OBJECTIVES[name][0](info) for name in s["objectives"]]
    return costs if len(costs) > 1 else costs[0], info


def trial_options(settings: dict, epochs: int, seed: int, device: torch.device) -> train.Options:
    """Return the recipe of `train.py` with the trial's batch and epochs, at most a quarter of them warm-up.

    There is no cool-down, accumulation or repeated augmentation.
    """
    s = settings
    usual = train.resolve(train.Options(data=s["data"], model=s["model"], recipe=s["recipe"]))
    return replace(
        usual, epochs=epochs, warmup_epochs=min(usual.warmup_epochs, epochs // 4), cooldown_epochs=0,
        batch=s["batch"], accumulate=1, repeats=1, seed=seed, compile=s["compile"], root=s["root"],
        amp=s["amp"], device=str(device),
    )  # fmt: skip


@torch.inference_mode()
def inference_speed(network: torch.nn.Module, data: Data, amp: torch.dtype | None) -> float:
    """Return images per second in evaluation mode: the median of ten batches after one for warm-up."""
    device = next(network.parameters()).device
    images = data.transform.normalize(next(iter(data.eval_batches("val")))[0])
    network.eval()
    times = []
    for _ in range(11):
        begun = time.perf_counter()
        with torch.autocast(device.type, amp, enabled=amp is not None):
            network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return len(images) / float(np.median(times[1:]))


# --------------------------------------------------------------------------------------------------
# Trial processes


@dataclass(frozen=True)
class Job:
    """A training of a trial in a trial process: a call of a target, and its limits."""

    trial: Trial
    seed: int  # of the training
    target: str  # "module:function"
    settings: dict | None  # the target's fourth argument, if not None
    device: str
    threads: int  # on the CPU; 0: PyTorch's default
    time_limit: float  # seconds
    memory_limit: float  # bytes, loader processes included
    log: str | None  # file for what trials print; None: the output of the parent
    submitted: float  # seconds, of the search's monotonic clock


_memory = {"peak": 0, "limit": math.inf}  # of a trial process and its children, bytes
_pools: dict[tuple, ProcessPool] = {}  # of this process


def prepare_process(target: str, threads: int, log: str | None) -> None:
    """Initialize a trial process, before the time of its first trial starts to count."""
    os.setsid()  # only the search handles signals to its process group
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if threads:
        torch.set_num_threads(threads)
    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(Exception):  # the trial raises the same error again and reports it
        pkgutil.resolve_name(target)


def watch() -> None:
    """End this process when its parent dies or when it and its children exceed the memory limit."""
    parent, process = multiprocessing.parent_process(), psutil.Process()
    for tick in itertools.count():
        if not parent.is_alive():
            os._exit(1)
        if tick % 20 == 0:  # the children's private memory takes milliseconds to read: once a second
            loaders = 0
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended
                    loaders += child.memory_full_info().uss
        _memory["peak"] = max(_memory["peak"], process.memory_info().rss + loaders)
        if _memory["peak"] > _memory["limit"]:
            os._exit(OUT_OF_MEMORY)
        parent.join(0.05)


def answer(job: Job) -> dict:
    """Run a job in a trial process; return its outcome: status, cost (of a success), info, start, end.

    What may spoil later trials, too, ends the process.
    """
    _memory.update(peak=0, limit=job.memory_limit)
    start, begun = time.time(), time.monotonic()
    try:
        arguments = [job.trial.config, job.seed, job.trial.budget]
        arguments += [] if job.settings is None else [job.settings]
        result = pkgutil.resolve_name(job.target)(*arguments)
        cost, info = result if isinstance(result, tuple) else (result, {})
        costs = np.atleast_1d(cost).astype(float).tolist()
        if not np.isfinite(costs).all():
            raise FloatingPointError(f"diverged: the cost is {costs}")
        json.dumps(info)  # the journal must be able to hold it
        info = {**info, "peak_rss_mb": round(_memory["peak"] / 1e6)}
        outcome = {"status": "success", "cost": costs, "info": info}
    except BaseException as error:  # including SystemExit and KeyboardInterrupt: no trial ends the search
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if memory or "CUDA" in str(error):
            traceback.print_exc()
            os._exit(OUT_OF_MEMORY if memory else 1)
        info = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-4000:]}
        outcome = {"status": "crashed", "info": info}
    finally:
        _memory["limit"] = math.inf
    return {**outcome, "start": start, "end": start + time.monotonic() - begun}


def schedule(job: Job, workers: int):
    """Schedule a job in a pool of `workers` processes; return its future (see `outcome_of`).

    Each device and thread has a pool of its own, started at the first call, and again if it has broken.
    """
    key = (job.device, threading.get_ident())
    if key not in _pools or not _pools[key].active:
        arguments, spawn = (job.target, job.threads, job.log), multiprocessing.get_context("spawn")
        _pools[key] = ProcessPool(workers, initializer=prepare_process, initargs=arguments, context=spawn)
        # Only the search handles Ctrl-C, also while a process starts: it inherits the signal mask of this
        # thread (which starting multiprocessing's resource tracker would reset).
        multiprocessing.resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            _ = _pools[key].active  # starts it
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return _pools[key].schedule(answer, (job,), timeout=job.time_limit)


def outcome_of(future, job: Job) -> dict:
    """Return the outcome of a finished job (see `answer`); if its process has died, without start and end."""
    try:
        return future.result()
    except TimeoutError:
        status, error = "timeout", f"not finished within --time-limit, {clock(job.time_limit)}"
    except ProcessExpired as end:
        status, error = "memoryout", f"out of memory; --memory-limit is {job.memory_limit / 1e9:.2f} GB"
        if end.exitcode == -signal.SIGKILL:  # as sent by Linux when memory runs out
            error = "killed by the system, most likely out of memory"
        elif end.exitcode != OUT_OF_MEMORY:
            status, error = "crashed", f"the trial process died with status {end.exitcode}"
            error += f", see {job.log}" if job.log else ""
    return {"status": status, "info": {"error": error}}


def run_on_dask(job: Job) -> dict:
    """Run a job in a trial process of a Dask worker, one per thread of the worker; return its outcome."""
    # Dask's nanny starts its workers as daemons, which multiprocessing does not allow to have children.
    multiprocessing.current_process().daemon = False
    future = schedule(job, 1)
    wait([future])
    return outcome_of(future, job)


def close_pools() -> None:
    """Kill all trial processes of this process."""
    for pool in _pools.values():
        pool.stop()
        pool.join()
    _pools.clear()


# Runs before multiprocessing waits for its children; in Dask's workers, atexit functions run too late.
multiprocessing.util.Finalize(None, close_pools, exitpriority=100)

# --------------------------------------------------------------------------------------------------
# The run folder


def read_json(path: Path) -> dict:
    """Return the JSON object of a file, an empty one if the file is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def writing(folder: Path):
    """Turn failures to write to a run folder into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror}; the trials before are safe: remove the cause and "
            "repeat the command"
        ) from None


def rows_of(folder: Path) -> list[dict]:
    """Return the finished trials of a run folder, also while its search is running.

    A row: config, seed (of the training), budget (epochs), status ("success", "crashed", "timeout",
    "memoryout"), cost (a list, one value per objective, smaller is better; finite for failures too), start
    and end (seconds since 1970), elapsed (seconds of search so far), origin (see `Trial`), info (the trial's
    results).
    """
    path = folder / "trials.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # a kill may have cut the last one


def settings_of(folder: Path) -> dict:
    """Return the settings of a run folder. Raises UsageError if it has none."""
    found = read_json(folder / "search.json")
    if not found:
        raise UsageError(f"{folder} is not the folder of a search: it has no readable search.json")
    return found


def differences(before, now, name: str = "") -> list[str]:
    """Describe where two JSON values differ: each entry of a dictionary, what a list has more or less."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = {**before, **now}
        return [text for key in names for text in differences(before.get(key), now.get(key), f"{name} {key}")]
    if before == now:
        return []
    if isinstance(before, list) and isinstance(now, list):
        more, less = ([str(v) for v in a if v not in b] for a, b in ((now, before), (before, now)))
        texts = ["now with " + ", ".join(more)] * bool(more) + ["now without " + ", ".join(less)] * bool(less)
        return [f"{name.strip()} {' and '.join(texts) or 'in another order'}"]
    return [f"{name.strip()} was {before}, is now {now}"]


def best_rows(rows: list[dict], budget: int) -> list[dict]:
    """Return the Pareto front at a budget, best top-1 first; with one objective, the incumbent alone."""
    front: list[dict] = []
    for row in sorted(successes(rows, budget), key=lambda row: row["cost"]):
        if not any(np.less_equal(other["cost"], row["cost"]).all() for other in front):
            front.append(row)
    return front


def successes(rows: list[dict], budget: int) -> list[dict]:
    """Return the successful trials at a budget."""
    return [row for row in rows if row["status"] == "success" and row["budget"] == budget]


def top1(row: dict) -> float:
    """Return the validation top-1 of a successful trial, in percent."""
    return 100 - 100 * row["cost"][0]


def result_texts(costs: list[float], objectives: list[str]) -> list[str]:
    """Format the values of costs: 98.15%, 2,310 images/s, 12.3 MMACs, 0.410 M parameters."""
    entries = [OBJECTIVES[name] for name in objectives]
    return [text.format(value(cost)) for cost, (_, value, text, _) in zip(costs, entries, strict=True)]


def incumbent_text(rows: list[dict], settings: dict) -> str:
    """Format the incumbent, or the Pareto front of several objectives, one network per line."""
    texts = [
        "  ".join([f"incumbent: {short(row['config'])}", *result_texts(row["cost"], settings["objectives"])])
        for row in best_rows(rows, settings["budgets"][-1])
    ]
    return "\n".join(texts) or "no incumbent yet at the highest budget"


def write_csv(folder: Path, rows: list[dict], settings: dict) -> None:
    """Write trials.csv, one row per trial."""
    results = ("top1", "loss", "parameters", "macs", "training_images_per_second", "amp", "error")
    columns = [*settings["space"], "budget", "seed", "status", "seconds", "elapsed", *results]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row in rows:
        times = {"seconds": round(row["end"] - row["start"], 3), "elapsed": round(row["elapsed"], 3)}
        table.writerow(row["info"] | row["config"] | row | times)
    write_whole(folder / "trials.csv", text.getvalue())


# --------------------------------------------------------------------------------------------------
# The search


def connect(address: str):
    """Return a client of a Dask scheduler. Raises UsageError if none answers."""
    from distributed import Client

    try:
        return Client(address, timeout=SCHEDULER_PATIENCE)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--scheduler {address}: no Dask scheduler answers there: {reason}") from None


class Search:
    """A search: a sampler proposes trials, trial processes run them, the journal records them.

    `choices` is the space (default: `SPACE`). `target` is a function of an importable module, `target(config,
    seed, budget)` -> cost, list of costs, or either with a dictionary of plain values; `train_config` also
    gets the settings of the trials.
    """

    def __init__(self, options: Options, choices: dict | None = None, target=train_config):
        self.options = o = options.resolved()
        self.default_target = target is train_config
        budgets = check_budgets(o.min_epochs, o.max_epochs)
        space = current_space() if choices is None else choices
        self.settings = {
            "space": {name: [str(value) for value in values] for name, values in space.items()},
            "target": f"{target.__module__}:{target.__qualname__}", "data": o.data, "model": o.model,
            "batch": o.batch, "budgets": budgets[-1:] if o.sampler == "random" else budgets,
            "objectives": o.objectives.split(","), "sampler": o.sampler,
            "points": points() if o.points and choices is None else {}, "seed": o.seed,
        }  # fmt: skip
        self.devices = trial_devices(o)  # of trials that may start
        self.slots = Counter(device for device, _ in self.devices)
        self.loaders = None if o.scheduler else max(1, cpu_count() // len(self.devices))  # per trial
        self.trials, self.seconds = o.trials or math.inf, seconds(o.walltime, "--walltime")
        self.time_limit, memory = seconds(o.time_limit, "--time-limit"), psutil.virtual_memory().total
        self.memory_limit = (o.memory_limit or 0.9 * memory / 1e9 / len(self.devices)) * 1e9
        self.folder, self.stop = Path(o.out), None
        self.running: dict = {}  # future -> job, see `submit`
        self.client = connect(o.scheduler) if o.scheduler else None
        if self.default_target:
            find = functools.partial(trial_facts, o.data, o.root, o.model, o.batch, self.devices[0][0])
            self.settings |= self.client.submit(find).result() if self.client else find()
        self.open_folder()
        self.replay()

    @functools.cached_property
    def failed(self) -> list[float]:
        """The costs of a failed trial: no accuracy, and twice the size of NEXcepTion."""
        with torch.device("meta"):
            network = create_model(network_config(points()["NEXcepTion"], self.options.model))
        worst = {"top1": 0.0, "inference_images_per_second": 0.0}
        worst |= {"macs": 2 * count_macs(network), "parameters": 2 * count_parameters(network)}
        return [OBJECTIVES[name][0](worst) for name in self.settings["objectives"]]

    def open_folder(self) -> None:
        """Lock the run folder, read its trials and write the settings.

        The precision is that of the folder's trials. Raises UsageError if the folder holds something else, or
        if another search holds it.
        """
        path, now = self.folder / "trials.jsonl", self.settings
        try:
            if rows_of(self.folder):
                before = settings_of(self.folder)
                if "amp" in now:
                    now["amp"] = before.get("amp")
                if not {before["data"], now["data"]} & {*SMALL_SETS}:
                    before["data"] = now["data"]  # a folder of images may have moved
                if changed := "; ".join(differences(before, now)):
                    raise UsageError(f"{self.folder} holds another search ({changed}): give another --out")
            names = {found.name for found in self.folder.iterdir()} if self.folder.exists() else set()
            if names and not names & {"trials.jsonl", "search.json"}:
                raise UsageError(f"{self.folder} is not the folder of a search: give another --out")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.journal = open(path, "ab")  # noqa: SIM115 (open as long as the search)
        except OSError as error:
            raise UsageError(f"--out {self.options.out}: {error.strerror}") from None
        if not lock_file(self.journal):
            raise UsageError(f"another search is running in {self.folder}: wait, or give another --out")
        self.rows = rows_of(self.folder)
        self.journal.truncate(path.read_bytes().rfind(b"\n") + 1)  # a line that a kill has cut
        write_whole(self.folder / "search.json", json.dumps(now, indent=1))

    def replay(self) -> None:
        """Create the sampler in the state given by the journal and its own last state."""
        self.kept = len(self.rows)  # trials of earlier starts
        state = read_json(self.folder / "state.json") if self.rows else {}
        elapsed = max([state.get("elapsed", 0.0), *(row["elapsed"] for row in self.rows)])
        self.begun = time.monotonic() - elapsed
        self.sampler = SAMPLERS[self.settings["sampler"]](self.folder, self.settings)
        self.sampler.replay(self.rows, state.get("sampler"))
        highest = self.settings["budgets"][-1]
        had = [row["config"] for row in self.rows if row["budget"] == highest]
        given = self.settings["points"].items()
        self.queue = [Trial(config, highest, name) for name, config in given if config not in had]
        self.save()
        if self.rows:
            print(f"continuing {self.folder}: {len(self.rows)} trials finished in {clock(elapsed)}")

    @property
    def elapsed(self) -> float:
        """Seconds of search so far, including earlier starts."""
        return time.monotonic() - self.begun

    def save(self) -> None:
        """Write state.json and trials.csv."""
        with writing(self.folder):
            state = {"elapsed": self.elapsed, "sampler": self.sampler.state()}
        trials = [job.trial for job in self.running.values()]
        state["running"] = [f"{short(trial.config)}, {epochs_text(trial.budget)}" for trial in trials]
        state |= {"trials": self.options.trials, "walltime": self.options.walltime}
        write_whole(self.folder / "state.json", json.dumps(state))
        write_csv(self.folder, self.rows, self.settings)

    @property
    def signal(self) -> int:
        """The first signal received: it ends the search after the current step, a second Ctrl-C at once."""
        return self.stop.signal if self.stop else 0

    def run(self) -> int:
        """Search until the trials or the time are used up, compare, report; return the exit status."""
        self.executor = self.client.get_executor(pure=False) if self.client else None
        self.stop = train.StopSignal(train.Process())
        try:
            while not self.signal:
                before = len(self.rows), len(self.running)
                self.fill()
                if not self.running:
                    break
                self.collect()
                if before != (len(self.rows), len(self.running)):
                    self.save()
            self.running.clear()
            if not self.signal:
                self.conclude()
        finally:
            self.stop.close()
            close_pools()
            if self.client is not None:
                with contextlib.suppress(Exception):  # a lost cluster must not hide the first error
                    if self.client.status == "running":
                        self.client.run(close_pools)
                    self.client.close(timeout=2)
        if not self.signal:
            return 0
        print(f"ended by signal {self.signal} after {len(self.rows)} trials; repeat the command to continue")
        print(incumbent_text(self.rows, self.settings))
        return 128 + self.signal

    def fill(self) -> None:
        """Submit a trial for each free worker while trials and time are left."""
        while self.devices and self.elapsed < self.seconds:
            if len(self.rows) + len(self.running) >= self.trials:
                break
            if (trial := self.next_trial()) is None:
                if not self.running:
                    print(f"nothing is left to try: {len(self.rows)} trials")
                break
            self.submit(trial, min(self.time_limit, self.seconds - self.elapsed))

    def next_trial(self) -> Trial | None:
        """Return the next trial: a point of the paper, or the sampler's next one that has not run yet.

        None: a running trial must finish first, or nothing is left.
        """
        for _ in range(1000):  # a sampler that proposes what it has been told so often has nothing else
            trial = self.queue.pop(0) if self.queue else self.sampler.ask()
            if trial is None:
                return None
            what = trial.config, trial.budget
            if any((job.trial.config, job.trial.budget) == what for job in self.running.values()):
                self.queue.insert(0, trial)  # until the same trial has finished
                return None
            row = next((row for row in self.rows if (row["config"], row["budget"]) == what), None)
            if row is None:
                return trial
            self.sampler.tell(trial, row)
        return None

    def submit(self, trial: Trial, time_limit: float, *repeat: int) -> None:
        """Start a trial on a free worker, or its `repeat`-th training for the final comparison."""
        device, threads = self.devices.pop()
        settings, log = None, None if self.client else str(self.folder / "trials.log")
        if self.default_target:
            names = ("data", "model", "batch", "recipe", "amp", "objectives")
            settings = {name: self.settings[name] for name in names} | {"workers": self.loaders}
            settings |= {"root": self.options.root, "compile": self.options.compile}
            settings |= {"device": device, "split": "test" if repeat else "val"}
        job = Job(
            trial, trial_seed(self.options.seed, trial.config, *repeat), self.settings["target"], settings,
            device, threads, time_limit, self.memory_limit, log, time.monotonic(),
        )  # fmt: skip
        if self.client is not None:
            future = self.executor.submit(run_on_dask, job)
        else:
            future = schedule(job, self.slots[device])
        self.running[future] = job

    def finished(self):
        """Wait for up to 0.2 s; yield the job and the outcome of each finished training."""
        killed = ()
        if self.client is not None:  # Dask runs the trials of lost workers on others, up to four times
            from distributed import KilledWorker as killed
        for future in wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED).done:
            job = self.running.pop(future)
            self.devices.append((job.device, job.threads))
            try:
                outcome = outcome_of(future, job)
            except killed as error:
                outcome = {"status": "crashed", "info": {"error": str(error)}}
            except (CancelledError, OSError, BrokenProcessPool) as error:
                what = "lost the Dask cluster" if self.client else f"no trial process starts, see {job.log}"
                why = " ".join(f"{type(error).__name__} {error}".split())
                raise RunError(f"{what} ({why}); repeat the command to continue") from None
            now, took = time.time(), time.monotonic() - job.submitted
            yield job, {"cost": self.failed, "start": now - took, "end": now, **outcome}

    def collect(self) -> None:
        """Record finished trials in the journal, then tell the sampler."""
        for job, outcome in self.finished():
            trial, failed = job.trial, outcome["status"] != "success"
            if failed and self.signal:
                continue  # not a failure of the network
            if outcome["status"] == "timeout" and job.time_limit < self.time_limit:
                print("stopped a trial at the end of --walltime; it runs again if the search continues")
                continue
            row = {"config": trial.config, "seed": job.seed, "budget": trial.budget}
            row |= {"elapsed": self.elapsed, "origin": trial.origin, **outcome}
            with writing(self.folder):  # on the disk before the sampler is told
                self.journal.write(json.dumps(row).encode() + b"\n")
                self.journal.flush()
                os.fsync(self.journal.fileno())
            self.rows.append(row)
            self.sampler.tell(trial, row)
            self.say(row)
            first = self.rows[self.kept :][:FAILURES_THAT_STOP]
            if len(first) == FAILURES_THAT_STOP and all(row["status"] != "success" for row in first):
                if not self.kept:  # run them again in the next search
                    (self.folder / "trials.jsonl").replace(self.folder / "failed.jsonl")
                error, trace = first[0]["info"]["error"], first[0]["info"].get("traceback", "")
                raise RunError(f"the first {len(first)} trials all failed; the first one: {error}\n{trace}")

    def say(self, row: dict) -> None:
        """Print one line about a finished trial, with an estimate of the time left."""
        n, objectives = len(self.rows), self.settings["objectives"]
        result = f"{row['status']}: {first_line(row['info'])}"
        if row["status"] == "success":
            result = "  ".join(result_texts(row["cost"], objectives))
        done = f"{n}/{self.trials}" if self.trials < math.inf else f"{n}"
        line = f"{done:>7} {short(row['config']):58} {epochs_text(row['budget']):>9} {result:>8}"
        best = best_rows(self.rows, self.settings["budgets"][-1])
        best = f"  best {top1(best[0]):.2f}%" if best else ""
        left = max(0.0, min(self.seconds - self.elapsed, self.elapsed / n * (self.trials - n)))
        print(f"{line} {clock(row['end'] - row['start']):>8}{best}  left {clock(left)}", flush=True)

    def conclude(self) -> None:
        """Write the networks found for `train.py`, compare the best with the paper's points, and report."""
        o, highest = self.options, self.settings["budgets"][-1]
        front = best_rows(self.rows, highest)
        print(f"\n{len(self.rows)} trials in {clock(self.elapsed)}")
        if not front:
            hint = f"see python search.py status {self.folder}"
            if self.elapsed >= self.seconds:
                usual = defaults(o.data)["walltime"]
                hint = f"repeat the command with more than --walltime {o.walltime}; the default is {usual}"
            raise RunError(f"no trial has succeeded after {epochs_text(highest)}: {hint}")
        print(incumbent_text(self.rows, self.settings))
        incumbent = front[0]["config"]
        ours = set(incumbent) == set(SPACE)
        for path in self.folder.glob("front-*.json"):
            path.unlink()  # of a smaller search
        for number, row in enumerate(front if ours else [], start=1):
            self.write_network(row["config"], "incumbent" if number == 1 else f"front-{number}")
        if self.default_target:
            networks = finalists(self.rows, self.settings)
            self.compare(networks)
            if self.signal:
                return
            text, best = comparison(self.folder, networks)
            print(text)
            incumbent = networks[best]
        print(f"report: {report(self.folder)}")
        if ours:
            network = self.write_network(incumbent, "incumbent")
            command = ["python", "train.py", "--data", o.data, "--model", str(network)]
            command += ["--out", str(self.folder / "full")]
            command += ["--root", o.root] if o.root != Options.root else []
            classes = len(self.settings.get("classes", ())) or 1000  # a target of one's own has not said
            size = count_parameters(create_model(network, num_classes=classes)) / 1e6
            print(f"{network}: {size:.2g} M parameters\ntrain it in full: {shlex.join(command)}")

    def write_network(self, config: dict, name: str) -> Path:
        """Write the network of a configuration, for `train.py --model`."""
        path, o = self.folder / f"{name}.json", self.options
        network_config(config, f"nexception_{o.grow}" if o.grow else o.model).to_json(path)
        return path

    def compare(self, networks: dict[str, dict]) -> None:
        """Train networks (see `finalists`) REPEATS times each; write the results to final.json.

        They are evaluated on the test split, too, of data that have one.
        """
        path, budget = self.folder / "final.json", self.settings["budgets"][-1]
        scored = read_json(path)
        waiting = missing_runs(networks, scored)
        if waiting:
            names = ", ".join(networks)
            print(f"training {names}: {REPEATS} times {epochs_text(budget)} each", flush=True)
        while (waiting or self.running) and not self.signal:
            while waiting and self.devices:
                name = next(iter(waiting))
                config, repeat = waiting.pop(name)
                self.submit(Trial(config, budget, name), self.time_limit, repeat)
            for job, outcome in self.finished():
                if outcome["status"] == "success" or not self.signal:
                    result = {"status": outcome["status"], "seed": job.seed, **outcome["info"]}
                    scored[job.trial.origin] = result
                    write_whole(path, json.dumps(scored, indent=1))


def trial_seed(seed: int, config: dict, *repeat: int) -> int:
    """Return the training seed of a configuration in a search, or of a run of its final comparison."""
    return zlib.crc32(json.dumps([seed, *repeat, sorted(config.items())]).encode())


def repeat_name(config: dict, repeat: int) -> str:
    """Return the name of a run in the final comparison."""
    return f"{short(config)} #{repeat}"


def missing_runs(networks: dict[str, dict], scored: dict) -> dict[str, tuple[dict, int]]:
    """Return name -> configuration and repetition of the final trainings that `scored` lacks."""
    runs = [(config, repeat) for repeat in range(1, REPEATS + 1) for config in networks.values()]
    return {repeat_name(*run): run for run in runs if repeat_name(*run) not in scored}


def finalists(rows: list[dict], settings: dict) -> dict[str, dict]:
    """Return name -> configuration of the networks of the final comparison: the best found, then the paper's.

    One trial is not enough to choose by. With several objectives, only the most accurate is compared.
    """
    done, papers = successes(rows, settings["budgets"][-1]), points()
    count = min(FINALISTS, max(1, len(done) // 10)) if len(settings["objectives"]) == 1 else 1
    found = [row["config"] for row in sorted(done, key=lambda row: row["cost"])]
    found = [config for config in found if config not in papers.values()][:count]
    return {f"found {i}": config for i, config in enumerate(found, start=1)} | papers


def comparison(folder: Path, networks: dict[str, dict]) -> tuple[str, str]:
    """Return the accuracies of the final trainings as text, and the name of the best network on validation.

    The text has mean and deviation of each network, and Welch's t-test of the best that was found and
    NEXcepTion's and Xception's choices, on the test split of data that have one.
    """
    from scipy.stats import ttest_ind

    scored, means, top1s = read_json(folder / "final.json"), {}, {}
    width, lines, splits = max(len(short(config)) for config in networks.values()), [], set()
    for name, config in networks.items():
        runs = [scored.get(repeat_name(config, repeat), {}) for repeat in range(1, REPEATS + 1)]
        done = top1s[name] = [run["top1"] for run in runs if "top1" in run]
        means[name] = np.mean([run.get("val_top1", 0) for run in runs])  # 0: that of a failure
        splits |= {run["split"] for run in runs if "top1" in run}
        text = f"{np.mean(done):.2f}%" if done else "no result"
        text += f" ± {np.std(done, ddof=1):.2f}" if len(done) > 1 else ""
        failed = "".join(f"  {first_line(run)}" for run in runs if "top1" not in run)
        lines.append(f"  {name:10} {short(config):{width}}  {means[name]:.2f}%  {text} ({len(done)}){failed}")
    best = max(means, key=means.get)
    found = [name for name in networks if name not in points()]
    lines.append(f"best on validation: {best}" + "'s choices, not what the search found" * (best in points()))
    for name in points() if found else ():
        ours = max(found, key=means.get)
        if min(len(top1s[ours]), len(top1s[name])) < 2:
            continue
        with warnings.catch_warnings():  # SciPy's, of scores that are all the same
            warnings.simplefilter("ignore")
            p = ttest_ind(top1s[ours], top1s[name], equal_var=False).pvalue
        verdict = f"{'more' if p < 0.05 else 'not more'} than the noise between seeds (Welch's t-test, "
        verdict += "p < 0.001)" if p < 0.001 else f"p = {p:.2g})"
        gap = np.mean(top1s[ours]) - np.mean(top1s[name])
        lines.append(f"{ours} - {name}: " + (f"{gap:+.2f} points, {verdict}" if gap else "equal"))
    split = "test split" if splits <= {"test"} else "validation split, which the search has seen"
    head = f"accuracy: mean on the validation split, then mean ± deviation (trainings) on the {split}:"
    return "\n".join([head, *lines]), best


def first_line(info: dict) -> str:
    """Return the first line of a failed trial's error."""
    return info.get("error", "").partition("\n")[0][:100]


def process_of(folder: Path) -> str | None:
    """Return the id of the process of this machine that locks a run folder, without taking the lock.

    Returns "" if there is none, and None where it cannot be told: Linux alone lists the locks.
    """
    path, locks = folder / "trials.jsonl", Path("/proc/locks")
    if not (path.exists() and locks.exists()):
        return None
    found = re.search(rf"ADVISORY +WRITE (\d+) \S+:{path.stat().st_ino} ", locks.read_text())
    return found[1] if found else ""


def status_text(folder: Path) -> str:
    """Format progress, incumbent and failures of a running or finished search; takes no lock."""
    settings, rows, state = settings_of(folder), rows_of(folder), read_json(folder / "state.json")
    failures = [row for row in rows if row["status"] != "success"]
    process = process_of(folder)
    runs = {None: "", "": ", not running on this machine"}.get(process, f", running as process {process}")
    of = [f" of {state[name]}" if state.get(name) else "" for name in ("trials", "walltime")]
    elapsed = max([state.get("elapsed", 0.0), *(row["elapsed"] for row in rows)])
    counts = [f"{len(successes(rows, b))} succeeded after {epochs_text(b)}" for b in settings["budgets"]]
    counts = ", ".join([*counts, f"{len(failures)} failed"])
    lines = [
        f"{folder}: {settings['sampler']} on {settings['data']}{runs}",
        f"{len(rows)}{of[0]} trials in {clock(elapsed)}{of[1]}; {counts}",
        incumbent_text(rows, settings),
    ]
    lines += [f"now: {trial}" for trial in state.get("running", []) if process]
    for row in failures[-5:]:
        where = f"{short(row['config'])}, {epochs_text(row['budget'])}"
        lines.append(f"  {row['status']}: {where}: {first_line(row['info'])}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Importance


def one_hot(codes: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Encode unordered choices, (N, P) integers, as indicator columns, (N, sum of sizes)."""
    codes = codes.astype(int)
    columns = [np.eye(size, dtype=np.float32)[codes[:, i]] for i, size in enumerate(sizes)]
    return np.concatenate(columns, axis=1)


@functools.cache
def whole_space(sizes: tuple[int, ...]) -> np.ndarray:
    """Return all configurations as indicator columns, (product of sizes, sum of sizes)."""
    return one_hot(np.indices(sizes).reshape(len(sizes), -1).T, sizes)


def effects(codes: np.ndarray, costs: np.ndarray, sizes: list, best: np.ndarray, trees: int) -> np.ndarray:
    """Return the estimates of `importances`, (3, P), from one forest; best: the incumbent's codes, (P,)."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(trees, max_features=5 / 6, random_state=0)
    forest.fit(one_hot(codes, sizes), costs)
    choices, space = range(len(sizes)), whole_space(tuple(sizes))
    others = [tuple(j for j in choices if j != i) for i in choices]
    lines = [(*best[:i], slice(None), *best[i + 1 :]) for i in choices]  # a choice's values around the best
    shares, mean = [], np.zeros(sizes)
    for tree in forest.estimators_:
        grid = tree.tree_.predict(space).reshape(sizes)  # of every configuration
        local = np.array([grid[line].var() for line in lines])
        main = np.array([grid.mean(axis=axes).var() for axes in others])
        shares.append([local / (local.sum() or 1), main / (grid.var() or 1)])
        mean += grid / trees
    least, default = mean[tuple(best)], mean.flat[0]
    losses = [(mean[line] - least).sum() / max(n - 1, 1) for line, n in zip(lines, sizes, strict=True)]
    return np.stack([*np.mean(shares, axis=0), np.array(losses) / ((default - least) or 1)])


def importances(codes: np.ndarray, costs: np.ndarray, space: dict[str, list[str]]) -> dict:
    """Return three importances of each choice, from random forests of the costs of N trials.

    codes: (N, P) integers, positions in the values of each of the P choices of the space; costs: (N,). The
    result: {"trials": N, kind: {choice: [estimate, low, high, noise]}}, with these kinds:

    - local: the variance of a tree's predictions over all values of a choice, around the incumbent (the row
      of least cost), divided by the sum over the choices; mean over the trees (Biedenkapp et al., 2018).
    - fanova: the variance of the marginal mean of a choice over all configurations, divided by the variance
      of all predictions; mean over the trees (Hutter et al., 2014).
    - improvement: (mean prediction of a choice's other values around the incumbent - the incumbent's) / (the
      default's - the incumbent's), the default being the first value of each choice. DeepCAVE showed this
      ratio up to release 1.2, and so did the paper's Figure 4 (with negative ratios as 0).

    low and high are the ends of a 90% interval (5% and 95% of forests of resampled trials), noise is the
    median of forests of trials in which the values of that choice are shuffled.
    """
    rng, least, sizes = np.random.default_rng(0), costs.argmin(), [len(values) for values in space.values()]
    estimate = effects(codes, costs, sizes, codes[least], TREES)
    draws = rng.integers(len(costs), size=(RESAMPLES, len(costs)))
    resampled = [effects(codes[rows], costs[rows], sizes, codes[least], FEW_TREES) for rows in draws]
    noise, shuffled = np.zeros_like(estimate), np.zeros((SHUFFLES, len(IMPORTANCES)))
    for i in range(len(sizes)):
        mixed = codes.copy()
        for k in range(SHUFFLES):
            mixed[:, i] = rng.permutation(codes[:, i])
            shuffled[k] = effects(mixed, costs, sizes, mixed[least], FEW_TREES)[:, i]
        noise[:, i] = np.median(shuffled, axis=0)
    cells = np.stack([estimate, *np.quantile(resampled, [0.05, 0.95], axis=0), noise], axis=2)  # (3, P, 4)
    kinds = zip(IMPORTANCES, cells.tolist(), strict=True)
    return {"trials": len(costs)} | {kind: dict(zip(space, rows, strict=True)) for kind, rows in kinds}


def importance(folder: Path) -> dict:
    """Return the importances for accuracy at each budget; write importance.json and importance.png.

    {budget: importances}, without budgets that have fewer successful trials than twice the number of choices.
    Raises UsageError if none is left.
    """
    settings, rows = settings_of(folder), rows_of(folder)
    space, found = settings["space"], {}
    for budget in settings["budgets"]:
        done = successes(rows, budget)
        if len(done) >= 2 * len(space):
            codes = np.array([[space[name].index(row["config"][name]) for name in space] for row in done])
            found[budget] = importances(codes, np.array([row["cost"][0] for row in done]), space)
    if not found:
        raise UsageError(f"{folder}: importance needs {2 * len(space)} successful trials of one budget")
    write_whole(folder / "importance.json", json.dumps(found, indent=1))
    draw_importance(found, folder / "importance.png")
    return found


def importance_text(found: dict) -> str:
    """Format the importances as one table per kind: each choice at each budget, with its interval."""
    lines = []
    for kind, (title, _) in IMPORTANCES.items():
        lines.append(f"{title:34}" + "".join(f"{epochs_text(budget):>28}" for budget in found))
        last = found[max(found)][kind]
        for name in sorted(last, key=last.get, reverse=True):
            cells = [result[kind][name] for result in found.values()]
            texts = ["{:.3f} [{:.3f}, {:.3f}]{}".format(*c[:3], " ~"[c[1] <= c[3]]) for c in cells]
            lines.append(f"  {name:32}" + "".join(f"{text:>28}" for text in texts))
    lines.append("[ ]: 90% interval from resampled trials; ~: it reaches the noise level.")
    lines.append("Only the improvement ratio is comparable with the paper's Figure 4 (DeepCAVE up to 1.2).")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Figures and report


def finish(figure, axis, columns: int, path: Path) -> None:
    """Put the legend of one of the axes below them, each label once, and save the figure."""
    handles, labels = axis.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, ncols=columns, frameon=False, loc="outside lower center")
    save_figure(figure, path)


def shades(budgets) -> dict:
    """Return a colour for each budget; the higher the budget, the darker."""
    from matplotlib import colormaps

    return dict(zip(budgets, colormaps["viridis"](np.linspace(0.5, 0.9, len(budgets))[::-1]), strict=True))


def draw_importance(found: dict, path: Path) -> None:
    """Draw one panel per kind, with a bar for each choice and budget; long bars end with their value."""
    last = found[max(found)]
    names = sorted(last["local"], key=last["local"].get)
    figure, axes = subplots(len(IMPORTANCES), 12, 0.55 * len(names) + 1.8, sharey=True)
    thickness, colours = 0.8 / len(found), shades(found)
    for axis, (kind, (title, label)) in zip(axes, IMPORTANCES.items(), strict=True):
        largest = max(cell[2] for result in found.values() for cell in result[kind].values())
        low, high = (-0.5, min(max(1.1, 1.1 * largest), 3)) if kind == "improvement" else (0, 1)
        for i, (budget, result) in enumerate(found.items()):
            values, lows, highs, noise = np.array([result[kind][name] for name in names]).T
            places = np.arange(len(names)) + thickness * ((len(found) - 1) / 2 - i)
            bars = f"{epochs_text(budget)}, {result['trials']} trials"
            axis.barh(places, values, thickness, color=colours[budget], label=bars)
            axis.hlines(places, lows, highs, color="black", linewidth=0.8, label="90% interval")
            axis.plot(noise, places, "|", color="crimson", markersize=24 * thickness, label="noise level")
            for place, value in zip(places[values > high], values[values > high], strict=True):
                axis.text(high, place, f"{value:.1f} ", color="white", ha="right", va="bottom")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlim=(low, high), xlabel=label, title=title)
    axes[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    finish(figure, axes[-1], 3 + len(found), path)


def papers_name(row: dict) -> str:
    """Return "NEXcepTion's choices" or "Xception's choices" if a trial has them, else an empty string."""
    return next((f"{name}'s choices" for name, point in points().items() if point == row["config"]), "")


def draw_trials(axis, rows: list[dict], x: list[float], **style) -> None:
    """Draw the accuracy of trials against x; NEXcepTion's and Xception's choices get a hollow marker."""
    axis.plot(x, [top1(row) for row in rows], linestyle="", **style)
    for row, place in zip(rows, x, strict=True):
        if name := papers_name(row):
            marker = "D" if name.startswith("N") else "s"
            axis.plot(place, top1(row), marker, color="black", fillstyle="none", label=name)


def draw_progress(rows: list[dict], settings: dict, path: Path) -> None:
    """Draw the accuracy of all successful trials against time, and the best so far at the highest budget."""
    end = rows[-1]["elapsed"]
    unit, length = ("hours", 3600) if end > 3 * 3600 else ("minutes", 60) if end > 180 else ("seconds", 1)
    figure, (axis,) = subplots(1, 6.5, 4)
    for budget, colour in shades(settings["budgets"]).items():
        done, label = successes(rows, budget), f"trials, {epochs_text(budget)}"
        times = [row["elapsed"] / length for row in done]
        draw_trials(axis, done, times, marker="o", markersize=4, color=colour, label=label)
    best = np.maximum.accumulate([top1(row) for row in done])  # at the highest budget
    label = f"best after {epochs_text(budget)}"
    axis.step([*times, end / length], [*best, best[-1]], "crimson", where="post", label=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel=f"{unit} of search", ylabel=OBJECTIVES["accuracy"][3])
    finish(figure, axis, 3, path)


def draw_front(done: list[dict], front: list[dict], settings: dict, path: Path) -> None:
    """Draw top-1 against each other objective: all trials at the highest budget, and the numbered front."""
    names = settings["objectives"][1:]
    figure, axes = subplots(len(names), 5 * len(names), 4)
    for i, (axis, name) in enumerate(zip(axes, names, strict=True), start=1):
        _, value, _, label = OBJECTIVES[name]
        axis.set(xlabel=label, ylabel=OBJECTIVES["accuracy"][3])
        for rows, colour, label in ((done, "0.7", "other trials"), (front, "crimson", "Pareto front")):
            x = [value(row["cost"][i]) for row in rows]
            draw_trials(axis, rows, x, marker=".", color=colour, label=label)
        if len(names) == 1:  # with more, the front is a surface
            axis.plot(x, [top1(row) for row in front], color="crimson", linewidth=0.7, drawstyle="steps-pre")
        for number, row in enumerate(front, start=1):
            axis.annotate(f" {number}", (value(row["cost"][i]), top1(row)), color="crimson")
    finish(figure, axes[0], 4, path)


def draw_marginals(done: list[dict], space: dict, path: Path) -> None:
    """Draw the accuracies of the trials with each value of each choice, and their mean."""
    columns = 3
    rows = -(-len(space) // columns)
    figure, axes = subplots(columns, 11, 2.6 * rows + 0.4, rows, sharey=True)
    for axis, (name, values) in zip(axes, space.items(), strict=False):
        ticks = []
        for place, value in enumerate(values):
            group = [row for row in done if row["config"][name] == value]
            draw_trials(axis, group, [place] * len(group), marker=".", color="0.7", label="trials")
            ticks.append(f"{value}\n({len(group)})")
            if group:
                mean = np.mean([top1(row) for row in group])
                axis.plot(place, mean, "_", color="crimson", markersize=14, label="mean of (n) trials")
        axis.set_xticks(range(len(values)), ticks)
        axis.set(xlim=(-0.5, len(values) - 0.5), title=name.replace("_", " "))
    for axis in axes[::columns]:
        axis.set_ylabel(OBJECTIVES["accuracy"][3])
    finish(figure, axes[0], 4, path)


def best_table(done: list[dict], front: list[dict], settings: dict) -> str:
    """Format the ten best trials and the rest of the Pareto front as a Markdown table."""
    objectives, space = settings["objectives"], settings["space"]
    listed = sorted(done, key=lambda row: row["cost"])[:10]
    listed += [row for row in front if row not in listed]
    sizes = [name for name in ("parameters", "macs") if name not in objectives]
    heads = ["top-1", *(name.replace("_", " ") for name in space), *objectives[1:], *sizes, ""]
    table = [heads, ["---"] * len(heads)]
    for row in listed:
        accuracy, *others = result_texts(row["cost"], objectives)
        cells = [accuracy, *(row["config"][name] for name in space), *others]
        cells += [f"{row['info'][name] / 1e6:.3g} M" if name in row["info"] else "" for name in sizes]
        number = f"front {front.index(row) + 1}" if len(objectives) > 1 and row in front else ""
        table.append([*cells, ", ".join(filter(None, (papers_name(row), number)))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def report(folder: Path) -> Path:
    """Write report.md and its figures: comparison, the ten best, Pareto front, progress, importance."""
    settings, rows = settings_of(folder), rows_of(folder)
    budgets, objectives, space = settings["budgets"], settings["objectives"], settings["space"]
    done, front = successes(rows, budgets[-1]), best_rows(rows, budgets[-1])
    highest = epochs_text(budgets[-1])
    if not done:
        raise UsageError(f"{folder}: no trial has finished at the highest budget, {highest}, yet")
    states, origins = (
        ", ".join(f"{n} {name}" for name, n in Counter(row[key] for row in rows).items())
        for key in ("status", "origin")
    )
    page = [
        f"# Search on {settings['data']}",
        f"- {len(rows)} trials in {clock(rows[-1]['elapsed'])}: {states}\n- proposed by: {origins}\n"
        f"- sampler {settings['sampler']}, budgets: {', '.join(map(epochs_text, budgets))}, objectives: "
        f"{', '.join(objectives)}\n- macro-architecture {settings['model']}, recipe "
        f"{settings.get('recipe', 'of its own')}, batch {settings['batch']}",
    ]
    if (folder / "final.json").exists():
        text, _ = comparison(folder, finalists(rows, settings))
        page.append(f"## Final comparison\n\n```text\n{text}\n```")
    page.append(f"## The ten best\n\n{best_table(done, front, settings)}")
    if len(objectives) > 1:
        draw_front(done, front, settings, folder / "front.png")
        page.append("![Pareto front, numbered as in the table](front.png)")
    draw_progress(rows, settings, folder / "progress.png")
    page.append("## Progress\n\n![Accuracy of trials against time](progress.png)\n\n## Which choices matter")
    try:
        text = importance_text(importance(folder))
        page.append(f"![Importance](importance.png)\n\n```text\n{text}\n```")
    except UsageError as error:
        page.append(f"No importance: {error}.")
    draw_marginals(done, space, folder / "marginals.png")
    page.append(f"## Mean accuracy of each value after {highest}\n\n![Mean accuracy](marginals.png)")
    if settings["sampler"] != "random":
        page.append("The sampler prefers good configurations: these are not means over the space.")
    write_whole(folder / "report.md", "\n\n".join(page) + "\n")
    return folder / "report.md"


# --------------------------------------------------------------------------------------------------
# Command line

COMMANDS = {
    "importance": lambda folder: f"{importance_text(importance(folder))}\n{folder / 'importance.png'}",
    "report": report,
    "status": status_text,
}


def main(argv: list[str]) -> int:
    """Run a search or a command; return 0, 1 (it failed), 2 (a mistake of the user's) or 128 + a signal."""
    usage = f"python search.py [OPTIONS], or python search.py {'|'.join(COMMANDS)} RUN"
    try:
        if argv and not argv[0].startswith("-"):
            if argv[0] not in COMMANDS or len(argv) != 2 or argv[1].startswith("-"):
                raise UsageError(f"{' '.join(argv)}: write {usage}")
            print(COMMANDS[argv[0]](Path(argv[1])))
            return 0
        return Search(parse(Options, argv, "search.py", __doc__.partition("\n\n")[2])).run()
    except (UsageError, RunError) as error:
        usage = f": write {usage}" if "unrecognized" in str(error) else ""
        print(f"search.py: {error}{usage}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:  # before the search handles signals
        return 130


if __name__ == "__main__":
    import search  # the module name by which Dask's workers and trial processes find its functions

    run_script(search.main)
