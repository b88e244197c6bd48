"""Searches the NEXcepTion design space with SMAC, as the paper did (section 3), and explains what it found.

    python search.py                                  # digits: a real search, 10 minutes on 2 CPU cores
    python search.py --data cifar100 --walltime 3d    # the paper's search: three days on one GPU
    python search.py importance runs/search-digits    # which choices matter: the paper's Figure 4
    python search.py report runs/search-digits        # one page: progress, importance, the ten best

It ends with the best configuration, its test accuracy beside NEXcepTion's and Xception's own choices trained
alike, and the command that trains the network found in full. Kill it at any moment: the same command goes on
with every finished trial. `--trials` and `--walltime` may grow; `--workers 2` runs two trials at once.

A run folder holds `search.json` (what is searched), `trials.jsonl` (the finished trials, one a line),
`state.json` (Hyperband's brackets), `smac/` (a SMAC3 run folder, for DeepCAVE), `incumbent.json` (the network
found, for `train.py --model`), `final.json` (test accuracies), `importance.png` and `report.html`.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import html
import importlib
import io
import itertools
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from ConfigSpace import CategoricalHyperparameter, Configuration, ConfigurationSpace
from distributed import Client, KilledWorker, LocalCluster
from sklearn.ensemble import RandomForestRegressor
from smac import MultiFidelityFacade, Scenario
from smac.acquisition.function import EI
from smac.acquisition.maximizer.abstract_acquisition_maximizer import AbstractAcquisitionMaximizer
from smac.initial_design import RandomInitialDesign
from smac.intensifier.hyperband import Hyperband
from smac.main.config_selector import ConfigSelector
from smac.main.exceptions import ConfigurationSpaceExhaustedException
from smac.model.random_forest.random_forest import RandomForest
from smac.multi_objective.parego import ParEGO
from smac.random_design import ProbabilityRandomDesign
from smac.runhistory import StatusType, TrialInfo, TrialValue
from smac.runhistory.encoder import RunHistoryEncoder
from tqdm import tqdm

import train as recipe
from data import Data, normalize, open_data
from model import MODELS, ModelConfig, count_macs, count_parameters, create_model, keep_large_buffers
from train import RunError, UsageError, option, parse, write_whole

ETA = 3  # Hyperband keeps the best third for three times the epochs
OBJECTIVES = ("accuracy", "throughput", "macs", "parameters")
FAILURES_THAT_STOP = 5  # a search whose first trials all fail has a fault of its own
SCHEDULER_PATIENCE = 30  # seconds to wait for a Dask scheduler that exists
RANDOM_START = 16  # random configurations before the forest has anything to learn from
TREES = 100  # of the importance's forest

# ----------------------------------------------------------------------------------------------------------
# The space
# ----------------------------------------------------------------------------------------------------------

POSITIONS = ("none", "1", "2", "3", "12", "13", "23", "123")
# All values are strings: ConfigSpace hands choices back as numpy types, and strings survive JSON unchanged.
SPACE: dict[str, tuple[str, ...]] = {
    "stem": ("conv", "patchify"),
    "kernel": ("3", "5", "7", "9", "mixed"),
    "pooling": ("max", "conv", "blur"),
    "block": ("xception", "bottleneck"),
    "se": ("no", "yes"),
    "activation": ("relu", "gelu", "elu", "celu"),
    "activation_positions": POSITIONS,
    "norm": ("batch", "layer"),
    "norm_positions": POSITIONS,
}
POINTS = {
    "NEXcepTion": ("patchify", "5", "blur", "bottleneck", "yes", "gelu", "2", "batch", "12"),
    "Xception": ("conv", "3", "max", "xception", "no", "relu", "123", "batch", "123"),
}
POINTS = {name: dict(zip(SPACE, values, strict=True)) for name, values in POINTS.items()}


def configspace(choices: dict[str, tuple[str, ...]] = SPACE, seed: int = 0) -> ConfigurationSpace:
    """The space of section 3, 61,440 configurations; or another one of unordered choices."""
    space = ConfigurationSpace(name="nexception", seed=seed)
    space.add([CategoricalHyperparameter(name, list(values)) for name, values in choices.items()])
    return space


def overrides(config: dict) -> dict:
    """The `ModelConfig` fields that a configuration of the space sets."""
    fields = {name: str(config[name]) for name in SPACE}
    if fields["kernel"] != "mixed":
        fields["kernel"] = int(fields["kernel"])
    fields["se"] = fields["se"] == "yes"
    for name in ("activation_positions", "norm_positions"):
        fields[name] = () if fields[name] == "none" else tuple(int(digit) for digit in fields[name])
    return fields


def model_config(config: dict, base: str) -> ModelConfig:
    """The network of a configuration, in the macro-architecture of the named model `base`."""
    return replace(MODELS[base], **overrides(config))


def short(config: dict) -> str:
    """A configuration in a few characters: `patchify 5 blur bottleneck SE gelu@2 batch@12`."""
    if set(config) != set(SPACE):
        return " ".join(f"{name}={value}" for name, value in config.items())
    c = {name: str(value).replace("none", "-") for name, value in config.items()}
    se = "SE" if c["se"] == "yes" else "--"
    shape = f"{c['stem']} {c['kernel']} {c['pooling']} {c['block']} {se}"
    return f"{shape} {c['activation']}@{c['activation_positions']} {c['norm']}@{c['norm_positions']}"


# ----------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    """Search for the best network of the design space. The same command goes on with a search that ended."""

    data: str = option("digits", "digits, cifar10, cifar100, or an image folder with train/ and val/")
    root: str = option("data", "folder of CIFAR's files")
    model: str = option(
        "", "the trials' shape (default: nexception_nano for digits, else nexception_reduced)"
    )
    out: str = option("", "run folder (default: runs/search-DATA)")
    trials: int = option(0, "stop after so many trials in all (default: none but the wall time)")
    walltime: str = option("", "stop after so long in all: 90s, 10m, 3d (default without --trials: 7m or 3d)")
    min_epochs: int = option(0, "lowest budget, epochs (default: 1 for digits, else 5)")
    max_epochs: int = option(0, "highest budget, epochs: the lowest times a power of 3 (default: times 9)")
    single_fidelity: bool = option(False, "every trial runs the highest budget")
    objectives: str = option("accuracy", "for a Pareto front: accuracy,throughput or macs or parameters")
    priors: bool = option(True, "begin with NEXcepTion's and Xception's own choices")
    batch: int = option(64, "images in a training batch")
    workers: int = option(0, "trials at once (default: one a GPU, or one a CPU core up to four)")
    workers_per_gpu: int = option(1, "trials at once on each GPU")
    scheduler: str = option("", "address of a Dask cluster that runs the trials, tcp://host:8786")
    time_limit: str = option("", "end a trial that takes longer (default: 2m for digits, else 2h)")
    memory_limit: float = option(0.0, "end a trial whose process takes more, GB (default: 0.9 RAM / workers)")
    compile: bool = option(False, "torch.compile each trial's network; pays in long trials on GPUs")
    device: str = option("auto", "auto (every GPU, else the CPU), cpu or cuda")
    grow: str = option("", "write the network found as a -T, -S or -TP", choices=("", "t", "s", "tp"))
    seed: int = option(0, "of SMAC; the trials' own is drawn from it")

    def resolved(self) -> Options:
        """Defaults that depend on the data filled in; UsageError for what contradicts itself."""
        digits = self.data == "digits"
        o = replace(self)
        o.model = o.model or ("nexception_nano" if digits else "nexception_reduced")
        o.out = o.out or f"runs/search-{Path(o.data).name}"
        if not o.trials and not o.walltime:
            o.walltime = "7m" if digits else "3d"
        o.min_epochs = o.min_epochs or (1 if digits else 5)
        o.max_epochs = o.max_epochs or 9 * o.min_epochs
        o.time_limit = o.time_limit or ("2m" if digits else "2h")
        check_budgets(o.min_epochs, o.max_epochs)
        names = o.objectives.split(",")
        if names[0] != "accuracy" or len(set(names)) < len(names) or set(names) - set(OBJECTIVES):
            raise UsageError(
                f"--objectives {o.objectives}: takes accuracy first, then any of {', '.join(OBJECTIVES[1:])}"
            )
        if o.model not in MODELS:
            raise UsageError(f"--model {o.model}: is none of {', '.join(MODELS)}")
        for name in ("trials", "workers", "workers_per_gpu", "batch", "min_epochs"):
            if getattr(self, name) < (name in ("workers_per_gpu", "batch")):
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        return o


def seconds(text: str) -> float:
    """`90s`, `10m`, `12h`, `3d` or plain seconds, as seconds; an empty text is no limit."""
    if not text:
        return math.inf
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        value = float(text[:-1]) * unit[text[-1]] if text[-1] in unit else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise UsageError(f"{text!r} is no time: write it as 90s, 10m, 12h or 3d")
    return value


def clock(span: float) -> str:
    """Seconds as a person reads them: 4.2 s, 3:20, 2:03:20."""
    if span < 60:
        return f"{span:.1f} s"
    minutes, rest = divmod(round(span), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def check_budgets(lowest: int, highest: int) -> list[int]:
    """The budgets from lowest to highest, times 3 each; UsageError, with the nearest, if they do not fit."""
    if highest < lowest:
        raise UsageError(f"--max-epochs {highest} is below --min-epochs {lowest}")
    budgets = [lowest]
    while budgets[-1] * ETA <= highest:
        budgets.append(budgets[-1] * ETA)
    if budgets[-1] != highest:
        raise UsageError(
            f"--max-epochs {highest} is not --min-epochs {lowest} times a power of {ETA}; the nearest that "
            f"fit are {budgets[-1]} and {budgets[-1] * ETA}"
        )
    return budgets


# ----------------------------------------------------------------------------------------------------------
# The trial
# ----------------------------------------------------------------------------------------------------------

_opened: dict[tuple, Data] = {}  # the data set stays on its device between the trials of a process


def train(config: dict, seed: int, budget: float, settings: dict):
    """SMAC's target function: build the reduced network, train it for `budget` epochs, score it.

    config: a value for each choice of `SPACE`. settings: data, root, model, batch, device, threads, compile,
    objectives, and split ("val", held-out training data; "test" for the final comparison). Returns the
    costs, one an objective (1 - top-1, -images/s, millions of MACs and of parameters), and what else is
    worth knowing. Raises FloatingPointError when the loss is not finite.
    """
    epochs, device = round(budget), prepared_device(settings)
    options = trial_options(settings, epochs, seed)
    if device.type == "cpu" and settings["model"] != "nexception_nano" and torch.cpu._is_amx_tile_supported():
        options = replace(options, amp="bf16")  # 1.6 times as fast at the paper's width; at nano's, no faster
    data = opened(options, device)
    torch.manual_seed(seed)
    network = model_config(config, settings["model"])
    network = create_model(network, num_classes=len(data.classes), input_size=data.size)
    training = recipe.Training(network, options, recipe.Process(device=device))
    curve, spent, begun = [], 0.0, time.perf_counter()
    for epoch in range(epochs):
        epoch_begun = time.perf_counter()
        loss = recipe.train_one_epoch(training, data, epoch).mean().item()
        spent += time.perf_counter() - epoch_begun
        if not math.isfinite(loss):
            raise FloatingPointError(f"diverged: the mean loss of epoch {epoch + 1} is {loss}")
        scores = recipe.evaluate(network, data, "val", training.amp)
        curve.append([round(loss, 5), round(scores["top1"], 3)])
    if settings["split"] in data.splits and settings["split"] != "val":
        scores = recipe.evaluate(network, data, settings["split"], training.amp)
    info = {
        "top1": scores["top1"],
        "parameters": count_parameters(network),
        "macs": count_macs(network),
        "training_images_per_second": epochs * data.steps * options.batch / spent,
        "inference_images_per_second": inference_speed(network, data, training.amp, settings["objectives"]),
        "seconds": time.perf_counter() - begun,
        "curve": curve,  # of each epoch: mean training loss, validation top-1 in percent
        "device": f"cpu, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        info["device"] = torch.cuda.get_device_name(device)
        info["peak_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    costs = {"accuracy": 1 - info["top1"] / 100, "throughput": -info["inference_images_per_second"]}
    costs |= {"macs": info["macs"] / 1e6, "parameters": info["parameters"] / 1e6}
    return [costs[name] for name in settings["objectives"]], info


TRAIN = f"{train.__module__}:{train.__qualname__}"


def prepared_device(settings: dict) -> torch.device:
    """The device of a trial, with threads, allocator and counters as the trial wants them."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name if settings["device"] == "auto" else settings["device"])
    if device.type == "cpu":
        torch.set_num_threads(settings["threads"] or torch.get_num_threads())
        keep_large_buffers()
    else:
        torch.backends.cudnn.benchmark = True
        torch.cuda.reset_peak_memory_stats(device)
    return device


def trial_options(settings: dict, epochs: int, seed: int) -> recipe.Options:
    """The recipe of `train.py` for the data, its cosine over the trial's epochs, a quarter of it warm-up."""
    usual = recipe.resolve(recipe.Options(data=settings["data"], model=settings["model"]))
    return replace(
        usual, epochs=epochs, warmup_epochs=min(usual.warmup_epochs, epochs // 4), cooldown_epochs=0,
        batch=settings["batch"], accumulate=1, repeats=1, seed=seed, channels_last=True,
        compile=settings["compile"], root=settings["root"],
    )  # fmt: skip


def opened(o: recipe.Options, device: torch.device) -> Data:
    """The data set, opened once a process and kept for its next trials."""
    key = (o.data, o.root, o.size, o.batch, o.seed, device)
    if key not in _opened:
        for data in _opened.values():
            data.close()
        _opened.clear()
        shape = {"size": o.size, "batch": o.batch, "augment": recipe.augmentation(o)}
        _opened[key] = open_data(o.data, seed=o.seed, device=device, root=o.root, **shape)
    return _opened[key]


@torch.inference_mode()
def inference_speed(network: torch.nn.Module, data: Data, amp: torch.dtype | None, objectives: list) -> float:
    """Images a second in evaluation mode: the median of ten batches, of three where it is no objective.

    On a CPU, ten batches take a sixth of the time of a short trial. One goes before them to warm up.
    """
    device = next(network.parameters()).device
    images, _ = next(iter(data.eval_batches("val")))
    images = normalize(images, data.mean, data.std)
    network.eval()
    times = []
    for _ in range(11 if "throughput" in objectives else 4):
        begun = time.perf_counter()
        with torch.autocast(device.type, amp, enabled=amp is not None):
            network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return len(images) / float(np.median(times[1:]))


# ----------------------------------------------------------------------------------------------------------
# Trial processes: warm, killable, each with one trial at a time
# ----------------------------------------------------------------------------------------------------------


def resolve(target: str):
    """The function that `module:name` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def serve_trials() -> None:
    """What a trial process runs: one JSON answer for each JSON job on standard input, until that closes."""
    answers, questions = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)  # what a trial prints must not mix with the answers
    # A forked loader worker closes sys.stdin, and would wait for ever on the thread that reads it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    jobs: queue.Queue[dict] = queue.Queue()

    def read():
        for line in questions:
            jobs.put(json.loads(line))
        os._exit(0)  # whoever asked is gone: nobody waits for the trial that may be running

    threading.Thread(target=read, daemon=True).start()
    answer = {"status": "ready"}
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        answer = answered(jobs.get())


def answered(job: dict) -> dict:
    """Run one job; whatever it does, return {"status", "cost", "info"} ("stale": replace this process)."""
    try:
        arguments = [job["config"], job["seed"], job["budget"]]
        result = resolve(job["target"])(*arguments, *([job["settings"]] if job["settings"] else []))
        cost, info = result if isinstance(result, tuple) else (result, {})
        costs = [float(value) for value in (cost if isinstance(cost, (list, tuple)) else [cost])]
        if not all(math.isfinite(value) for value in costs):
            raise FloatingPointError(f"diverged: the cost is {costs}")
        json.dumps(info)
        return {"status": "success", "cost": costs, "info": info}
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: no trial may end the search
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        info = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-4000:]}
        stale = memory or "CUDA" in str(error)
        return {"status": "memoryout" if memory else "crashed", "info": info, "stale": stale}


class TrialProcess:
    """A spawned Python process that has imported everything and waits for jobs.

    It belongs to no process group of ours (Ctrl-C is for the search to act on) and ends by itself when its
    standard input closes, however we died.
    """

    START_LIMIT = 300  # seconds for the imports; the clock of a trial starts after them

    def __init__(self, path: list[str], threads: int):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        # OpenMP's threads spin while they wait: beside another busy process two take ten times as long.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": os.pathsep.join(path)}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import search; search.serve_trials()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        started = self._answer(self.START_LIMIT, math.inf)
        self.broken = None if started["status"] == "ready" else started

    def _read(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def run(self, job: dict) -> dict:
        """The outcome of one trial, within the job's limits on time (seconds) and memory (bytes)."""
        if self.broken:
            return self.broken
        with contextlib.suppress(OSError):  # a process that has just died answers by its end
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        outcome = self._answer(job["time_limit"], job["memory_limit"])
        if outcome.pop("stale", False):
            self.kill()
        return outcome

    def _answer(self, time_limit: float, memory_limit: float) -> dict:
        """Wait for a line, watching the clock and the resident memory; kill the process that oversteps."""
        deadline, peak = time.monotonic() + time_limit, 0
        while True:
            try:
                line = self.answers.get(timeout=0.05)
            except queue.Empty:
                with contextlib.suppress(psutil.Error):
                    peak = max(peak, psutil.Process(self.process.pid).memory_info().rss)
                if peak > memory_limit:
                    return self._ended("memoryout", f"above the memory limit of {memory_limit / 1e9:.2f} GB")
                if time.monotonic() > deadline:
                    return self._ended("timeout", f"not finished within the time limit of {time_limit:g} s")
                continue
            if line is None:
                return self._died()
            outcome = json.loads(line)
            outcome.setdefault("info", {})["peak_rss_mb"] = round(peak / 1e6)
            return outcome

    def _ended(self, status: str, error: str) -> dict:
        self.kill()
        return {"status": status, "info": {"error": error}}

    def _died(self) -> dict:
        code = self.process.wait()
        self.errors.seek(0)
        tail = self.errors.read()[-2000:].decode(errors="replace")
        if code == -signal.SIGKILL:  # on Linux the kernel's way to free memory
            return {
                "status": "memoryout",
                "info": {"error": "killed by the system, most likely out of memory"},
            }
        return {
            "status": "crashed",
            "info": {"error": f"the trial's process died, status {code}", "traceback": tail},
        }

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


_idle: dict[tuple, list[TrialProcess]] = {}  # by (target, device, threads); of this Dask worker's process
_busy: set[TrialProcess] = set()


def run_trial(job: dict) -> dict:
    """The task that Dask runs: hand the job to a warm trial process, start one where none is idle."""
    key = (job["target"], job["device"], job["threads"])
    pool = _idle.setdefault(key, [])
    worker = None
    while pool and worker is None:
        candidate = pool.pop()
        worker = candidate if candidate.alive else None
    worker = worker or TrialProcess(job["path"], job["threads"])
    _busy.add(worker)
    started = time.time()
    try:
        outcome = worker.run(job)
    finally:
        _busy.discard(worker)
    if worker.alive:
        pool.append(worker)
    return {**outcome, "start": started, "end": time.time()}


def close_trial_processes() -> None:
    """Kill every trial process that this process started."""
    for worker in [*_busy, *itertools.chain(*_idle.values())]:
        worker.kill()
    _idle.clear()


atexit.register(close_trial_processes)

# ----------------------------------------------------------------------------------------------------------
# What survives: the journal of finished trials, and one search a folder
# ----------------------------------------------------------------------------------------------------------


def lock(file, folder: Path) -> None:
    """Hold `file` for this process alone; UsageError when another search has it. Does nothing on Windows."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(
            f"another search is running in {folder}: wait for it, or take another --out"
        ) from None


def parsed(line: bytes) -> dict | None:
    """A JSON object, or None for what a fault of the disk left."""
    try:
        return json.loads(line)
    except ValueError:
        return None


class Journal:
    """The finished trials, one JSON object a line, on the disk before SMAC hears of them.

    A row: config, seed, budget (epochs), status ("success", "crashed", "timeout", "memoryout"), cost (a list,
    one value an objective, smaller is better; finite for failures too), start and end (seconds since 1970),
    elapsed (seconds of search so far), origin (who proposed it), info (what the trial said). UsageError when
    another search holds the folder.
    """

    def __init__(self, path: Path):
        path.touch()
        self.file = open(path, "r+b")  # noqa: SIM115 (open as long as the search)
        lock(self.file, path.parent)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a line that a kill cut short is no finished trial
        self.rows = [row for row in map(parsed, whole.splitlines()) if row]
        self.file.truncate(len(whole))
        self.file.seek(len(whole))

    def append(self, row: dict) -> None:
        try:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write {self.file.name}: {error.strerror}; make room and start again"
            ) from None
        self.rows.append(row)

    def set_aside(self) -> None:
        """Empty the journal, its rows kept in `failed.jsonl` beside it."""
        path = Path(self.file.name)
        write_whole(path.with_name("failed.jsonl"), path.read_bytes())
        self.file.truncate(0)
        self.file.seek(0)
        self.rows.clear()


def rows_of(folder: Path) -> list[dict]:
    """The finished trials of a run folder, also while its search goes on."""
    lines = (folder / "trials.jsonl").read_bytes().splitlines()
    return [row for row in map(parsed, lines) if row]


def settings_of(folder: Path) -> dict:
    """What a run folder searches: see `Search.settings`."""
    try:
        return json.loads((folder / "search.json").read_text())
    except (OSError, ValueError):
        raise UsageError(f"{folder} is no search's run folder: it has no readable search.json") from None


def check_unchanged(folder: Path, settings: dict) -> None:
    """UsageError, with every difference, when the folder holds a search for something else."""
    if not (folder / "search.json").exists():
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} holds files that are no search's: take another --out")
        return
    before, now = settings_of(folder), json.loads(json.dumps(settings))
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        lines = "; ".join(f"{k} was {before.get(k)}, is now {now.get(k)}" for k in changed)
        raise UsageError(
            f"{folder} holds another search ({lines}): take another --out, or the options it began with"
        )


# ----------------------------------------------------------------------------------------------------------
# SMAC
# ----------------------------------------------------------------------------------------------------------


def one_hot(codes: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Codes of unordered choices, (N, P), as indicator columns, (N, sum of sizes): no order to split by."""
    codes = codes.astype(int)
    return np.concatenate(
        [np.eye(size, dtype=np.float32)[codes[:, i]] for i, size in enumerate(sizes)], axis=1
    )


def every_point(sizes: list[int]) -> np.ndarray:
    """The codes of all configurations, (product of sizes, P)."""
    return np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, sizes), indexing="ij")], axis=1)


class OneHotForest(RandomForest):
    """SMAC's random forest, on indicator columns instead of the choices' arbitrary integer codes.

    Its default of at most 2**20 leaves has scikit-learn set aside room for all of them: a second a forest.
    """

    def __init__(self, space: ConfigurationSpace, seed: int):
        super().__init__(space, min_samples_leaf=1, n_trees=50, n_jobs=1, max_leaf_nodes=None, seed=seed)
        self._sizes = [len(space[name].choices) for name in space]
        self._rf_opts["max_features"] = 5 / 6  # of the indicator columns

    def _train(self, X, y):
        return super()._train(one_hot(X, self._sizes), y)

    def _predict(self, X, covariance_type="diagonal"):
        mean, variance = self._rf.predict(one_hot(X, self._sizes))
        return mean.reshape(-1, 1), variance.reshape(-1, 1)

    def _impute_inactive(self, X):
        return X  # no choice of ours depends on another


class BestOfAll(AbstractAcquisitionMaximizer):
    """Scores every configuration of the space: exact where local search samples, and faster.

    SMAC falls back on random configurations when its candidates run out; these do not before the space does.
    """

    CANDIDATES = 8  # SMAC takes one, or draws a random configuration, and asks again
    DISTANCE = 3  # choices in which the configurations of one batch differ, where they can

    def __init__(self, space: ConfigurationSpace, seed: int):
        super().__init__(space, seed=seed)
        self._points = every_point([len(space[name].choices) for name in space]).astype(float)
        self._forest = None
        self.proposed = list  # a function that returns all configurations proposed so far

    def _maximize(self, previous_configs, n_points):
        proposed, forest = self.proposed(), self._acquisition_function.model._rf
        if forest is not self._forest:
            self._forest, self._values = forest, self._acquisition_function._compute(self._points).ravel()
        elif proposed:  # one batch of Hyperband's, from one forest: let it not be one idea in nine variations
            last = proposed[-1].get_array()
            self._values[(self._points != last).sum(axis=1) < self.DISTANCE] = -1.0
        known = {tuple(config.get_array()) for config in proposed}
        best = []
        for i in np.lexsort((self._rng.rand(len(self._values)), -self._values)):
            if tuple(self._points[i]) not in known:
                config = Configuration(self._configspace, vector=self._points[i])
                config.origin = "expected improvement"
                best.append((self._values[i], config))
            if len(best) == self.CANDIDATES:
                break
        return best or [(0.0, previous_configs[0])]  # SMAC skips what it knows, but wants a list


class ExactHyperband(Hyperband):
    """Hyperband with the right number of brackets: SMAC's floor(log 243 / log 3) is 4."""

    @staticmethod
    def _get_max_iterations(eta, max_budget, min_budget):
        return round(math.log(max_budget / min_budget, eta))


def build_smac(folder: Path, settings: dict, crash_cost: list[float]) -> MultiFidelityFacade:
    """SMAC's facade, to ask and tell: it runs nothing itself and reads nothing from the folder.

    One budget makes Hyperband plain Bayesian optimisation. The configurations asked for first are
    NEXcepTion's and Xception's (`priors`), then random ones, then the forest's.
    """
    choices, seed, names = settings["space"], settings["seed"], settings["objectives"]
    space = configspace(choices, seed)
    start = [Configuration(space, point) for point in settings["priors"]]
    for config in start:
        config.origin = "prior"
    start += configspace(choices, seed).sample_configuration(RANDOM_START)
    start = [Configuration(space, dict(config), origin=config.origin or "random") for config in start]
    scenario = Scenario(
        space,
        name="smac",
        output_directory=folder,
        deterministic=True,
        objectives=names if len(names) > 1 else names[0],
        crash_cost=crash_cost if len(names) > 1 else crash_cost[0],
        n_trials=10**9,  # the search's own loop counts
        min_budget=settings["budgets"][0],
        max_budget=settings["budgets"][-1],
        seed=seed,
    )
    # A budget's trials teach the forest once there are as many as choices.
    selector = ConfigSelector(scenario, retrain_after=1, max_new_config_tries=10_000, min_trials=len(choices))
    return MultiFidelityFacade(
        scenario,
        model=OneHotForest(space, seed),
        acquisition_function=EI(),
        acquisition_maximizer=BestOfAll(space, seed),
        initial_design=RandomInitialDesign(scenario, n_configs=0, additional_configs=start),
        random_design=ProbabilityRandomDesign(0.2, seed=seed),
        intensifier=ExactHyperband(scenario, eta=ETA, incumbent_selection="highest_budget"),
        multi_objective_algorithm=ParEGO(scenario) if len(names) > 1 else None,
        runhistory_encoder=RunHistoryEncoder(scenario),
        config_selector=selector,
        logging_level=False,
        overwrite=True,
    )


# ----------------------------------------------------------------------------------------------------------
# The search
# ----------------------------------------------------------------------------------------------------------


def crash_costs(names: list[str], model: str) -> list[float]:
    """Finite costs of a failed trial, one an objective: no accuracy, no speed, twice NEXcepTion's size."""
    with torch.device("meta"):
        network = create_model(model_config(POINTS["NEXcepTion"], model))
    costs = {"accuracy": 1.0, "throughput": 0.0}
    costs |= {"macs": 2 * count_macs(network) / 1e6, "parameters": 2 * count_parameters(network) / 1e6}
    return [costs[name] for name in names]


def best_rows(rows: list[dict], budget: float) -> list[dict]:
    """The incumbents: the trials at `budget` that no other beats in every objective, most accurate first."""
    front: list[dict] = []
    done = [row for row in rows if row["status"] == "success" and row["budget"] == budget]
    for row in sorted(done, key=lambda row: row["cost"]):
        costs = [zip(other["cost"], row["cost"], strict=True) for other in front]
        if not any(all(a <= b for a, b in pairs) for pairs in costs):
            front.append(row)
    return front


def trial_devices(o: Options) -> list[tuple[str, int]]:
    """Where each of the trials at once runs: (device, threads; 0 is as many as torch likes)."""
    if o.scheduler:
        return [("auto", 0)] * (o.workers or 1)
    gpus = torch.cuda.device_count() if o.device != "cpu" else 0
    if o.device == "cuda" and not gpus:
        raise UsageError("--device cuda: torch finds no GPU here")
    if gpus:
        workers = o.workers or gpus * o.workers_per_gpu
        if workers > gpus * o.workers_per_gpu:
            raise UsageError(
                f"--workers {o.workers}: {gpus} GPUs with --workers-per-gpu {o.workers_per_gpu} take "
                f"{gpus * o.workers_per_gpu}"
            )
        return [(f"cuda:{i % gpus}", 1) for i in range(workers)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = o.workers or min(cores, 4)
    return [("cpu", max(1, cores // workers))] * workers


def trial_value(row: dict) -> TrialValue:
    """A row of the journal as SMAC wants to be told it."""
    return TrialValue(
        cost=row["cost"] if len(row["cost"]) > 1 else row["cost"][0], time=row["end"] - row["start"],
        status=StatusType[row["status"].upper()], starttime=row["start"], endtime=row["end"],
        additional_info=row["info"],
    )  # fmt: skip


def replay(smac: MultiFidelityFacade, rows: list[dict], state: dict) -> None:
    """Tell a fresh SMAC all finished trials, and give Hyperband's brackets back where they stood.

    Nothing is ever "running" afterwards: what a kill interrupted is a bracket's trial without a result, which
    SMAC asks for again. Without brackets (no or a broken `state.json`) new ones begin.
    """
    space, intensifier = smac.scenario.configspace, smac.intensifier
    for row in rows:
        config = Configuration(space, row["config"], origin=row["origin"])
        smac.optimizer._start_time = time.time() - row["elapsed"]  # of the trajectory that SMAC keeps
        info = TrialInfo(config, seed=row["seed"], budget=row["budget"])
        smac.runhistory.add_trial(info, trial_value(row))
        intensifier.update_incumbents(config)
    try:
        intensifier.set_state(state["intensifier"])
    except (KeyError, TypeError, ValueError):
        intensifier.set_state({"tracker": {"0,0": []}, "next_bracket": 0})
    waiting = [c for groups in intensifier._tracker.values() for _, configs in groups for c in configs]
    selector = smac._config_selector
    selector._initial_design_configs = [c for c in selector._initial_design_configs if c not in waiting]
    smac._acquisition_maximizer.proposed = lambda: [*waiting, *selector._processed_configs]


class Search:
    """SMAC proposes, trial processes run through Dask, the journal remembers.

    `target` is a function of a module, `target(config, seed, budget)` -> cost, list of costs, or either with
    a dictionary of plain values; `train` gets the settings of the trials too. `choices` is the space.
    """

    def __init__(self, options: Options, choices: dict[str, tuple[str, ...]] = SPACE, target=train):
        self.options = o = options.resolved()
        self.target = f"{target.__module__}:{target.__qualname__}"
        if "<" in self.target or target.__module__ == "__main__":
            raise UsageError(f"the target {self.target} is no function of an importable module")
        budgets = check_budgets(o.min_epochs, o.max_epochs)
        self.settings = {
            "space": {name: list(values) for name, values in choices.items()},
            "target": self.target,
            "data": o.data,
            "model": o.model,
            "batch": o.batch,
            "budgets": budgets[-1:] if o.single_fidelity else budgets,
            "objectives": o.objectives.split(","),
            "priors": list(POINTS.values()) if o.priors and choices is SPACE else [],
            "seed": o.seed,
        }
        self.devices = trial_devices(o)
        if self.target == TRAIN and not o.scheduler:  # no search for data that is not there
            open_data(o.data, batch=o.batch, root=o.root, workers=0).close()
        self.trials, self.seconds = o.trials or math.inf, seconds(o.walltime)
        self.limits = {"time_limit": seconds(o.time_limit), "memory_limit": o.memory_limit * 1e9}
        if not o.memory_limit:
            self.limits["memory_limit"] = 0.9 * psutil.virtual_memory().total / len(self.devices)
        self.failed = crash_costs(self.settings["objectives"], o.model)
        self.folder = Path(o.out)
        check_unchanged(self.folder, self.settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.folder / "trials.jsonl")
        write_whole(self.folder / "search.json", json.dumps(self.settings, indent=1))
        self.running: dict = {}  # future -> (TrialInfo, (device, threads))
        self.outcomes: list[dict] = []  # of this start
        self.smac_seconds, self.saved_at, self.exhausted, self.signal = 0.0, 0.0, False, 0
        self.bar = tqdm(disable=None, total=100, bar_format="{percentage:3.0f}%|{bar:40}| {postfix}")
        self.restore()

    # What is known

    @property
    def rows(self) -> list[dict]:
        return self.journal.rows

    @property
    def elapsed(self) -> float:
        """Seconds of search so far, earlier starts included."""
        return self.earlier + time.monotonic() - self.begun

    def incumbents(self) -> list[dict]:
        return best_rows(self.rows, self.settings["budgets"][-1])

    def restore(self) -> None:
        """Bring SMAC to where the journal and the brackets say that the search stood."""
        if len(self.rows) >= FAILURES_THAT_STOP and all(row["status"] != "success" for row in self.rows):
            print(f"all {len(self.rows)} trials had failed: they are run again (kept in failed.jsonl)")
            self.journal.set_aside()
        path = self.folder / "state.json"
        state = (parsed(path.read_bytes()) if path.exists() else None) or {}
        self.earlier = max([state.get("elapsed", 0.0), *(row["elapsed"] for row in self.rows)])
        self.begun = time.monotonic()
        self.smac = build_smac(self.folder, self.settings, self.failed)
        replay(self.smac, self.rows, state)
        self.smac.optimizer._start_time = time.time() - self.earlier
        self.save(force=True)
        if self.rows:
            print(f"going on with {self.folder}: {len(self.rows)} trials finished in {clock(self.earlier)}")

    def save(self, force: bool = False) -> None:
        """Write the brackets, and SMAC's own folder where that takes no more than a twentieth of the time."""
        begun = time.monotonic()
        state = {"elapsed": self.elapsed, "intensifier": self.smac.intensifier.get_state()}
        write_whole(self.folder / "state.json", json.dumps(state))
        if force or begun > self.saved_at:
            save_smac(self.smac)
            self.saved_at = begun + 20 * (time.monotonic() - begun)
        self.smac_seconds += time.monotonic() - begun

    # The loop

    def run(self) -> int:
        """Search until the trials or the time are used up, then compare and explain; 130 after Ctrl-C."""
        with self.signals():
            with dask_client(self.options.scheduler, len(self.devices)) as client:
                self.executor = client.get_executor(pure=False)
                try:
                    while not self.signal:
                        self.fill()
                        if not self.running:
                            break
                        self.collect()
                    self.save(force=True)
                    if not self.signal:
                        conclude(self)
                finally:
                    self.bar.close()
                    close_trial_processes()
                    if self.options.scheduler:
                        client.run(close_trial_processes)
            if not self.signal:
                explain(self)
        if self.signal:
            print(f"stopped by signal {self.signal}; the same command goes on from {len(self.rows)} trials")
            show_incumbents(self)
        return 128 + self.signal if self.signal else 0

    @contextlib.contextmanager
    def signals(self):
        """Ctrl-C and SIGTERM end the search between two steps; a second Ctrl-C at once."""

        def receive(number, _frame):
            if self.signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def fill(self) -> None:
        """Give every free worker a trial, as long as there are trials and time left."""
        while self.devices and not self.exhausted and self.elapsed < self.seconds:
            if len(self.rows) + len(self.running) >= self.trials:
                return
            begun = time.monotonic()
            try:
                trial = self.smac.ask()
            except (StopIteration, ConfigurationSpaceExhaustedException):
                self.exhausted = True
                print(f"every configuration of the space was proposed, {len(self.rows)} trials")
                return
            self.smac_seconds += time.monotonic() - begun
            self.save()
            config = {name: str(value) for name, value in trial.config.items()}
            self.submit(config, trial.seed, trial.budget, "val", trial)

    def submit(self, config: dict, seed: int, budget: float, split: str, trial) -> None:
        """Send a trial to the next free worker; `trial` comes back with its outcome from `finished`."""
        device, threads = self.devices.pop()
        path = [str(Path(__file__).parent), *(entry for entry in sys.path if entry)]
        job = {"target": self.target, "config": config, "seed": seed, "budget": budget, "settings": None}
        job |= {"device": device, "threads": threads, "path": path, **self.limits}
        if self.target == TRAIN:
            job["settings"] = {
                **{name: self.settings[name] for name in ("data", "model", "batch", "objectives")},
                **{"root": self.options.root, "compile": self.options.compile},
                **{"device": device, "threads": threads, "split": split},
            }
        self.running[self.executor.submit(run_trial, job)] = (trial, (device, threads))

    def finished(self):
        """Wait a moment; yield (trial, outcome) of what has finished."""
        done, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            trial, device = self.running.pop(future)
            self.devices.append(device)
            try:
                outcome = future.result()
            except KilledWorker as error:
                now = time.time()
                outcome = {"status": "crashed", "info": {"error": str(error)}, "start": now, "end": now}
            except (CancelledError, OSError) as error:
                raise RunError(
                    f"lost the Dask cluster ({type(error).__name__} {error}); the same command goes on with "
                    "every finished trial"
                ) from None
            costs = outcome.setdefault("cost", self.failed)
            if len(costs) != len(self.failed):
                error = f"the target returned {len(costs)} costs for {len(self.failed)} objectives"
                outcome |= {"status": "crashed", "cost": self.failed, "info": {"error": error}}
            yield trial, outcome

    def collect(self) -> None:
        """Write down what has finished, then tell SMAC."""
        for trial, outcome in self.finished():
            row = {
                "config": {name: str(value) for name, value in trial.config.items()},
                **{"seed": int(trial.seed), "budget": float(trial.budget), "origin": trial.config.origin},
                **{name: outcome[name] for name in ("status", "cost", "start", "end", "info")},
                "elapsed": self.elapsed,
            }
            self.journal.append(row)
            begun = time.monotonic()
            self.smac.tell(trial, trial_value(row), save=False)
            self.smac_seconds += time.monotonic() - begun
            self.outcomes.append(row)
            say(self, row)
            first = self.outcomes[:FAILURES_THAT_STOP]
            if len(first) == FAILURES_THAT_STOP and all(row["status"] != "success" for row in first):
                info = first[0]["info"]
                raise RunError(
                    f"the first {FAILURES_THAT_STOP} trials all failed; the first one: {info['error']}\n"
                    f"{info.get('traceback', '')}"
                )


def save_smac(smac: MultiFidelityFacade) -> None:
    """SMAC's run folder, as its own `save` writes it, but each file whole or not at all."""
    optimizer, folder = smac.optimizer, smac.scenario.output_directory
    used = {"used_walltime": optimizer.used_walltime, "used_target_function_walltime": 0.0}
    used |= {"used_target_function_cputime": 0.0, "last_update": time.time(), "finished": False}
    write_whole(folder / "optimization.json", json.dumps(used, indent=2))
    for part, name in ((smac.runhistory, "runhistory.json"), (smac.intensifier, "intensifier.json")):
        part.save(folder / f"next-{name}")
        os.replace(folder / f"next-{name}", folder / name)


@contextlib.contextmanager
def dask_client(scheduler: str, workers: int):
    """A Dask client: of the cluster that exists at `scheduler`, or of one in this process, a thread a trial.

    The threads only watch trial processes, so they need no process of their own. Dask's chatter about closing
    connections is no news.
    """
    for name in ("distributed", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if scheduler:
        try:
            client = Client(scheduler, timeout=SCHEDULER_PATIENCE)
        except (OSError, ValueError) as error:
            raise UsageError(f"--scheduler {scheduler}: no Dask scheduler answers there: {error}") from None
        with client:
            yield client
        return
    here = {"processes": False, "dashboard_address": "127.0.0.1:0"}
    cluster = LocalCluster(n_workers=1, threads_per_worker=workers, **here)
    with cluster, Client(cluster) as client:
        yield client


def say(search: Search, row: dict) -> None:
    """One line about a trial that has finished, and how long the search will go on."""
    n, best, objectives = len(search.rows), search.incumbents(), search.settings["objectives"]
    failure = f"{row['status']}: {row['info'].get('error', '').split(chr(10))[0][:80]}"
    result = result_text(row["cost"], objectives) if row["status"] == "success" else failure
    spent = clock(row["end"] - row["start"])
    done = f"{n}/{search.trials}" if search.trials < math.inf else f"{n}"
    line = f"{done:>7} {short(row['config']):58} {row['budget']:3g} epochs {result:>8} {spent:>8}"
    line += f"  best {result_text(best[0]['cost'][:1], objectives)}" if best else ""
    left = max(0.0, min(search.seconds - search.elapsed, search.elapsed / n * (search.trials - n)))
    search.bar.n = 100 * search.elapsed / (search.elapsed + left)
    search.bar.set_postfix_str(f"{clock(left)} left")
    tqdm.write(line if search.bar.disable is False else f"{line}  left {clock(left)}")
    sys.stdout.flush()


def result_text(costs: list[float], objectives: list[str]) -> str:
    """Costs as a person reads them: 98.15%  2,310 images/s  12.3 MMACs  0.41 M."""
    forms = {
        "accuracy": lambda c: f"{100 - 100 * c:.2f}%",
        "throughput": lambda c: f"{-c:,.0f} images/s",
        "macs": lambda c: f"{c:.1f} MMACs",
        "parameters": lambda c: f"{c:.3f} M parameters",
    }
    return "  ".join(forms[name](cost) for name, cost in zip(objectives, costs, strict=False))


def show_incumbents(search: Search) -> None:
    """Print the best at the highest budget, or of what there is."""
    found = search.incumbents()
    for row in found:
        result = result_text(row["cost"], search.settings["objectives"])
        print(f"incumbent: {short(row['config'])}  {result} after {row['budget']:g} epochs")
    if not found:
        print("no incumbent yet: no trial has finished the highest budget")


# ----------------------------------------------------------------------------------------------------------
# The end: what was found, its test accuracy, how to train it in full
# ----------------------------------------------------------------------------------------------------------


def conclude(search: Search) -> None:
    """Write the incumbent as a network for `train.py`, and compare it on the test split."""
    best, o = search.incumbents(), search.options
    share = 100 * search.smac_seconds / (search.elapsed - search.earlier)
    print(f"\n{len(search.rows)} trials in {clock(search.elapsed)}, {share:.1f}% of it SMAC's")
    show_incumbents(search)
    if best and set(best[0]["config"]) == set(SPACE):
        network = model_config(best[0]["config"], f"nexception_{o.grow}" if o.grow else o.model)
        write_whole(search.folder / "incumbent.json", json.dumps(network.to_dict(), indent=2) + "\n")
    if best and search.target == TRAIN:
        compare(search, best[0])


def explain(search: Search) -> None:
    """Draw what there is to draw, and say what to run next."""
    try:
        print(f"report: {report(search.folder)}")
    except UsageError as error:
        print(error)
    if (search.folder / "incumbent.json").exists():
        network = search.folder / "incumbent.json"
        print(f"train it in full: python train.py --data {search.options.data} --model {network}")


def compare(search: Search, best: dict) -> None:
    """Train the incumbent and the two known points alike; score them on the test split, once a network."""
    path, budget = search.folder / "final.json", search.settings["budgets"][-1]
    scored = (parsed(path.read_bytes()) if path.exists() else None) or {}
    waiting = [("incumbent", best["config"]), *POINTS.items()]
    names = {name: short(config) for name, config in waiting}
    waiting = [(name, config) for name, config in waiting if names[name] not in scored]
    print(f"test split, {budget} epochs of training each:")
    while (waiting or search.running) and not search.signal:
        while waiting and search.devices:
            name, config = waiting.pop(0)
            search.submit(config, best["seed"], budget, "test", name)
        for name, outcome in search.finished():
            scored[names[name]] = {"status": outcome["status"], **outcome["info"]}
            write_whole(path, json.dumps(scored, indent=1))
    for name, key in names.items():
        if key in scored:
            score = scored[key]
            result = f"{score['top1']:.2f}%" if score["status"] == "success" else score["error"]
            print(f"  {name:10} {key:58} {result}")


# ----------------------------------------------------------------------------------------------------------
# Importance
# ----------------------------------------------------------------------------------------------------------


def importances(codes: np.ndarray, costs: np.ndarray, sizes: list[int], seed: int = 0) -> dict:
    """What each choice weighs, by a forest of the costs: local (LPI) and over the whole space (fANOVA).

    codes: (N, P) integers, row i of cost costs[i] (N,); sizes: how many values each of the P choices has.
    Returns {"lpi": (trees, P), "fanova": (trees, P)}, float64. LPI of a tree: the variance of its predictions
    over a choice's whole domain, around the incumbent (the row of least cost) and its own value included,
    divided by the sum over the choices (Biedenkapp et al., 2018). fANOVA of a tree: the variance of a
    choice's marginal mean over all configurations, divided by the variance of all predictions (Hutter et al.,
    2014; main effects alone, so that a row may sum to less than 1).
    """
    forest = RandomForestRegressor(TREES, min_samples_leaf=1, max_features=5 / 6, random_state=seed)
    forest.fit(one_hot(codes, sizes), costs)
    incumbent, points = codes[np.argmin(costs)], every_point(sizes)
    around = np.repeat(incumbent[None], sum(sizes), axis=0)
    choice, value = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(n) for n in sizes])
    around[np.arange(sum(sizes)), choice] = value
    around, everywhere, edges = one_hot(around, sizes), one_hot(points, sizes), np.cumsum(sizes)[:-1]
    local, effects = np.zeros((TREES, len(sizes))), np.zeros((TREES, len(sizes)))
    for t, tree in enumerate(forest.estimators_):
        variances = np.array([part.var() for part in np.split(tree.predict(around), edges)])
        local[t] = variances / (variances.sum() or 1)
        predictions = tree.predict(everywhere)
        for i, size in enumerate(sizes):
            marginal = np.bincount(points[:, i], predictions, size) / np.bincount(points[:, i])
            effects[t, i] = marginal.var() / (predictions.var() or 1)
    return {"lpi": local, "fanova": effects}


def importance(folder: Path) -> dict:
    """Importances per budget of a run folder, from its successful trials; writes importance.json and .png.

    UsageError when no budget has twice as many trials as there are choices: a forest of fewer says nothing.
    """
    settings = settings_of(folder)
    space = settings["space"]
    least, sizes, found, few = 2 * len(space), [len(values) for values in space.values()], {}, []
    for budget in settings["budgets"]:
        rows = [row for row in rows_of(folder) if row["status"] == "success" and row["budget"] == budget]
        if len(rows) < least:
            few.append(f"{len(rows)} at {budget:g} epochs")
            continue
        codes = np.array([[space[name].index(row["config"][name]) for name in space] for row in rows])
        result = importances(codes, np.array([row["cost"][0] for row in rows]), sizes)
        found[budget] = {"trials": len(rows)} | {
            kind: {n: [m, s] for n, m, s in zip(space, v.mean(0).tolist(), v.std(0).tolist(), strict=True)}
            for kind, v in result.items()
        }
    if not found:
        raise UsageError(
            f"{folder}: too few successful trials for {len(space)} choices ({', '.join(few)}); "
            f"a budget needs {least}"
        )
    if few:
        print(f"left out, below {least} successful trials: {', '.join(few)}")
    write_whole(folder / "importance.json", json.dumps(found, indent=1))
    draw_importance(found, folder / "importance.png")
    return found


def draw_importance(found: dict, path: Path) -> None:
    """Figure 4: a bar a choice and budget, with its deviation over trees; fANOVA's main effects beside."""
    plt = pyplot()
    last = found[max(found)]
    names = sorted(last["lpi"], key=lambda name: last["lpi"][name][0])
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.55 * len(names) + 1.5), sharey=True)
    titles = {"lpi": "LPI: around the best configuration", "fanova": "fANOVA: main effect over the space"}
    thickness, colours = 0.8 / len(found), plt.colormaps["viridis"](np.linspace(0.75, 0.15, len(found)))
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for i, (budget, result) in enumerate(found.items()):
            means, deviations = zip(*(result[kind][name] for name in names), strict=True)
            places = np.arange(len(names)) + thickness * ((len(found) - 1) / 2 - i)
            label = f"{budget:g} epoch{'s' * (budget != 1)}, {result['trials']} trials"
            means, deviations = np.array(means), np.array(deviations)
            spread = np.minimum(deviations, means), np.minimum(deviations, 1 - means)  # a share is in [0, 1]
            axis.barh(
                places, means, thickness, xerr=spread, color=colours[i], label=label,
                error_kw={"elinewidth": 0.8, "ecolor": "0.4"},
            )  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    save_figure(figure, path)


def pyplot():
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    pyplot().close(figure)
    write_whole(path, buffer.getbuffer())


# ----------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------


def report(folder: Path) -> Path:
    """Write report.html: progress, importance, Pareto front, the ten best in words, in one page."""
    settings, rows = settings_of(folder), rows_of(folder)
    budget = settings["budgets"][-1]
    front = best_rows(rows, budget)
    if not front:
        raise UsageError(f"{folder}: no trial has finished the highest budget, {budget:g} epochs, yet")
    draw_progress(rows, settings, folder / "progress.png")
    pictures = {"Best so far": "progress.png"}
    if len(settings["objectives"]) > 1:
        draw_front(rows, front, settings, folder / "front.png")
        pictures["Pareto front"] = "front.png"
    reason = None
    try:
        importance(folder)
        pictures["Which choices matter"] = "importance.png"
        print(f"importance: {folder / 'importance.png'}")
    except UsageError as error:
        reason = str(error)
        print(f"no importance: {reason}")
    states = [row["status"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    page = [
        f"<h1>Search on {html.escape(settings['data'])}</h1>",
        f"<p>{len(rows)} trials ({counts}) in {clock(rows[-1]['elapsed'])}; networks of the "
        f"shape of {settings['model']}; budgets {', '.join(f'{b:g}' for b in settings['budgets'])} epochs; "
        f"objectives: {', '.join(settings['objectives'])}.</p>",
        "<h2>The ten best</h2>",
        table_of_best(rows, settings),
    ]
    for title, name in pictures.items():
        data = base64.b64encode((folder / name).read_bytes()).decode()
        page.append(f"<h2>{title}</h2><img alt='{title}' src='data:image/png;base64,{data}'>")
    if reason:
        page.append(f"<p>No importance: {html.escape(reason)}.</p>")
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "img{max-width:100%}table{border-collapse:collapse}td,th{padding:.2rem .7rem;text-align:left;"
        "border-bottom:1px solid #ddd}td.number{text-align:right;white-space:nowrap}"
    )
    head = f"<!doctype html><meta charset='utf-8'><title>Search on {html.escape(settings['data'])}</title>"
    write_whole(folder / "report.html", "\n".join([head, f"<style>{style}</style>", *page]))
    return folder / "report.html"


def in_words(config: dict) -> str:
    """A configuration as a sentence."""
    if set(config) != set(SPACE):
        return short(config)

    def at(positions: str) -> str:
        return "no convolution" if positions == "none" else "convolution " + ", ".join(positions)

    c = {**config, "kernel": config["kernel"].replace("mixed", "mixed-size")}
    se = "with" if c["se"] == "yes" else "without"
    return (
        f"{c['stem']} stem, {c['block']} blocks with {c['kernel']} kernels, {c['pooling']} pooling, {se} "
        f"squeeze-and-excitation; {c['activation'].upper()} before {at(c['activation_positions'])}; "
        f"{c['norm']} norm after {at(c['norm_positions'])}"
    )


def table_of_best(rows: list[dict], settings: dict) -> str:
    """The ten best configurations at the highest budget, as an HTML table."""
    budget, objectives = settings["budgets"][-1], settings["objectives"]
    done = [row for row in rows if row["status"] == "success" and row["budget"] == budget]
    known = {tuple(config.values()): name for name, config in POINTS.items()}
    lines = ["<table><tr><th>top-1</th><th>configuration</th><th>parameters</th><th>MACs</th></tr>"]
    for row in sorted(done, key=lambda row: row["cost"])[:10]:
        info, name = row["info"], known.get(tuple(row["config"].values()), "")
        sizes = [f"{info[key] / 1e6:.3g} M" if key in info else "" for key in ("parameters", "macs")]
        words = html.escape(in_words(row["config"])) + (f" <b>({name}'s)</b>" if name else "")
        cells = "".join(f"<td class=number>{size}</td>" for size in sizes)
        accuracy = result_text(row["cost"][:1], objectives[:1])
        lines.append(f"<tr><td class=number>{accuracy}</td><td>{words}</td>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def draw_progress(rows: list[dict], settings: dict, path: Path) -> None:
    """The best accuracy at the highest budget against trials and time; all successful trials as dots."""
    plt = pyplot()
    budgets = settings["budgets"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    colours = plt.colormaps["viridis"](np.linspace(0.75, 0.15, len(budgets)))
    unit, length = ("hours", 3600) if rows[-1]["elapsed"] > 2 * 3600 else ("minutes", 60)
    scales = {"trials": range(1, len(rows) + 1), unit: [row["elapsed"] / length for row in rows]}
    for axis, (name, places) in zip(axes, scales.items(), strict=True):
        for budget, colour in zip(budgets, colours, strict=True):
            dots = [
                (x, 100 - 100 * row["cost"][0])
                for x, row in zip(places, rows, strict=True)
                if row["status"] == "success" and row["budget"] == budget
            ]
            label = f"{budget:g} epoch{'s' * (budget != 1)}"
            if dots:
                axis.scatter(*zip(*dots, strict=True), s=14, color=colour, label=label)
        best, steps = math.inf, []
        for x, row in zip(places, rows, strict=True):
            if row["status"] == "success" and row["budget"] == budgets[-1]:
                best = min(best, row["cost"][0])
                steps.append((x, 100 - 100 * best))
        xs, ys = zip(*steps, (places[-1], 100 - 100 * best), strict=True)
        axis.step(xs, ys, where="post", color="crimson", label="best at the highest budget")
        axis.set_xlabel(name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation top-1, %")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)
    save_figure(figure, path)


def draw_front(rows: list[dict], front: list[dict], settings: dict, path: Path) -> None:
    """The Pareto front at the highest budget: each further objective against top-1."""
    plt = pyplot()
    units = {"throughput": "images/s", "macs": "millions of MACs", "parameters": "millions of parameters"}
    others = settings["objectives"][1:]
    figure, axes = plt.subplots(1, len(others), figsize=(5 * len(others), 3.8), squeeze=False)
    budget = settings["budgets"][-1]
    done = [row for row in rows if row["status"] == "success" and row["budget"] == budget]
    for i, (axis, name) in enumerate(zip(axes[0], others, strict=True), start=1):
        sign = -1 if name == "throughput" else 1
        for group, colour, label in ((done, "0.7", "other trials"), (front, "crimson", "Pareto front")):
            points = sorted((sign * row["cost"][i], 100 - 100 * row["cost"][0]) for row in group)
            axis.plot(*zip(*points, strict=True), "o", markersize=5, color=colour, label=label)
        if len(others) == 1:
            where = "pre" if sign < 0 else "post"
            axis.step(*zip(*points, strict=True), where=where, color="crimson", linewidth=1)
        axis.set(xlabel=units[name], ylabel="validation top-1, %")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Search, or explain a run folder; what the user can mend is one sentence and status 2."""
    try:
        if argv and argv[0] in ("importance", "report"):
            if len(argv) != 2 or argv[1].startswith("-"):
                raise UsageError(f"write: python search.py {argv[0]} RUN")
            folder = Path(argv[1])
            if argv[0] == "report":
                print(report(folder))
                return 0
            print(importance_text(importance(folder)))
            print(folder / "importance.png")
            return 0
        return Search(parse(Options, argv, "search.py")).run()
    except ValueError as error:
        print(f"search.py: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"search.py: {error}", file=sys.stderr)
        return 1


def importance_text(found: dict) -> str:
    """The importances as a table: LPI and fANOVA of each choice at each budget, percent."""
    names = sorted(next(iter(found.values()))["lpi"], key=lambda name: -found[max(found)]["lpi"][name][0])
    lines = [" " * 22 + "".join(f"{f'{b:g} epochs':>24}" for b in found)]
    lines.append(f"{'choice':22}" + f"{'LPI':>14}{'fANOVA':>10}" * len(found))
    for name in names:
        cells = [
            "{:6.1f} ± {:4.1f}{:10.1f}".format(*(100 * x for x in (*r["lpi"][name], r["fanova"][name][0])))
            for r in found.values()
        ]
        lines.append(f"{name:22}" + " ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    import search  # by its name, by which Dask's workers and the trial processes know its functions

    sys.exit(search.main(sys.argv[1:]))
