"""Measure the claims of the paper and the README on the machine at hand.

    python bench.py speed      # Table 1's throughput: NEXcepTion and every peer take turns in one run
    python bench.py accuracy CHECKPOINT imagenet=/data/imagenet/val imagenet-a=/data/imagenet-a
    python bench.py figures    # the paper's figures 2 and 3; with measured speed: results/speed-*.json
    python bench.py export CHECKPOINT
    python bench.py data [PATH]  # images/s of the input pipeline beside timm's; how many workers feed a GPU
    python bench.py trial      # seconds of a trial of search.py beside timm's loader and a plain loop

`python bench.py COMMAND --help` lists the options of a command. Results go to `results/`: JSON with every
sample, the versions, the hardware and the command line, and a Markdown table beside it. On two CPU cores,
all of Table 1 takes about half an hour in float32, the other commands take a few minutes.

Everything that is compared is timed alternately in one run (see `take_turns`): other load on the machine
then affects all of it alike, and ratios are taken within a repetition.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, replace
from pathlib import Path

from data import (
    Augmentation,
    EvalTransform,
    Plan,
    RunError,
    UsageError,
    cpu_count,
    decode,
    list_images,
    natural_key,
    open_data,
    write_whole,
)
from model import (
    MODELS,
    ModelConfig,
    NEXcepTion,
    compile_frozen,
    count_macs,
    count_parameters,
    create_model,
    fuse,
    keep_large_buffers,
    load_checkpoint,
    read_weights,
)
from train import (
    Lamb,
    bce_loss,
    check_channels,
    evaluate,
    option,
    parameter_groups,
    parse,
    pick_device,
    run_script,
)

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEER = "peer:"  # prefix of models that the user brings
TURN_SECONDS = 0.1  # `speed` repeats short passes within a turn until it takes about this long
WORKER_SECONDS = 6.0  # of one turn of `data` with worker processes

# --------------------------------------------------------------------------------------------------
# Timing: rows that take turns


@dataclass
class Row:
    """One thing to be timed, with its measurements; the JSON files hold every field that is set."""

    label: str
    work: Callable[[], float] | None = None  # one turn; returns how many units (images, steps) it did
    before: Callable[[], object] | None = None  # untimed, ahead of each turn
    after: Callable[[], list[float]] | None = None  # untimed, after each turn; its values go to `latencies`
    base: str = ""  # label of the row that this one is compared with
    missing: str = ""  # why there are no samples
    samples: list[float] = field(default_factory=list)  # one per repetition, in the record's unit
    latencies: list[float] = field(default_factory=list)  # seconds of single images
    ratio: dict | None = None  # how many times as fast as `base`: mean, deviation, median
    # The rest is set by `speed`.
    name: str = ""  # key of Table 1 or MODELS, JSON file, timm's name, or peer:MODULE:CALLABLE
    spec: str = ""  # the name with @SIZE, if one was given
    size: int = 0  # input pixels per side
    batch: int = 0
    passes: int = 0  # passes over the batch in a turn
    parameters: int = 0
    macs: int = 0  # of convolutions and linear layers, for one image
    attention_macs: int = 0  # of attention's own matrix products
    memory: int | None = None  # peak bytes of a pass, weights and optimizer state included
    paper: dict | None = None  # the paper's row of Table 1
    paper_ratio: float = 0.0

    def to_dict(self) -> dict:
        code = ("work", "before", "after")
        return {k: v for k, v in vars(self).items() if k not in code and v not in (None, "", [], 0)}


def stopwatch(device: torch.device | None) -> Callable:
    """Return a function that runs `work()` and returns (its result, the seconds it took).

    On a GPU between two CUDA events on that device, from an idle device to an idle device; elsewhere by the
    wall clock. device None: CPU seconds of this process, which other programs on the machine do not change.
    """

    def timed(work):
        if device is not None and device.type == "cuda":
            with torch.cuda.device(device):  # events are recorded on the current device
                torch.cuda.synchronize()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                units = work()
                end.record()
                end.synchronize()
            return units, start.elapsed_time(end) / 1000
        read = time.process_time if device is None else time.perf_counter
        wait = torch.mps.synchronize if device is not None and device.type == "mps" else lambda: None
        wait()
        begun = read()
        units = work()
        wait()
        return units, read() - begun

    return timed


def take_turns(rows: list[Row], repetitions: int, timed: Callable, *, rate=True, warm_up=1) -> None:
    """Time every row once per repetition, in a new random order each time; add the samples and ratios.

    timed: a `stopwatch`. rate: samples are units per second, else seconds per unit. warm_up: repetitions
    ahead that are not counted. A row that fails is left out from then on, with the reason in `missing`.
    Ctrl-C keeps the repetitions that are finished, and is passed on where there are none. UsageError and
    RunError stop the run.
    """
    order, done = random.Random(0), -warm_up
    tqdm.monitor_interval = 0  # its thread would be forked into data-loading processes
    running = [row for row in rows if row.work and not row.missing]
    try:
        for _ in tqdm(range(repetitions + warm_up), disable=None, unit="repetition"):
            measured = []
            for row in order.sample(running, len(running)):
                try:
                    if row.before:
                        row.before()
                    units, seconds = timed(row.work)
                    latencies = row.after() if row.after else None
                    measured.append((row, units / seconds if rate else seconds / units, latencies or []))
                except (UsageError, RunError):
                    raise
                except Exception as error:  # one row's failure does not cost the others theirs
                    row.missing, row.samples, row.latencies = failure(error), [], []
                    running.remove(row)
            done += 1
            for row, sample, latencies in measured if done > 0 else ():
                row.samples.append(sample)
                row.latencies += latencies
    except KeyboardInterrupt:
        if done <= 0:
            raise
        print(f"stopped: {done} of {repetitions} repetitions are kept")
    if not any(row.samples for row in rows):
        raise RunError("; ".join(f"{row.label}: {row.missing}" for row in rows))
    compare(rows, rate)


def compare(rows: list[Row], rate: bool = True) -> None:
    """Set each row's ratio: how many times as fast as its `base`, from the pairs within each repetition."""
    samples = {row.label: row.samples for row in rows}
    for row in rows:
        if row.samples and samples.get(row.base):
            pairs = zip(row.samples, samples[row.base], strict=True)
            ratios = [ours / base if rate else base / ours for ours, base in pairs]
            mean, deviation = mean_and_deviation(ratios)
            row.ratio = {"mean": mean, "deviation": deviation, "median": statistics.median(ratios)}


def mean_and_deviation(samples: list[float]) -> tuple[float, float]:
    return statistics.fmean(samples), statistics.stdev(samples) if len(samples) > 1 else 0.0


def one_line(error: BaseException) -> str:
    """Return an error's type and message, shortened to one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def failure(error: Exception) -> str:
    """Return why a row is missing; errors other than a missing package print their traceback on stderr."""
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}"
    traceback.print_exception(error)
    return f"fails, {one_line(error)}"


# --------------------------------------------------------------------------------------------------
# Results: one record, one table, one writer


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table without the columns that no row fills; padded, to read as text too."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[row[i] for i in kept] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width + ":" * (i > 0) for i, width in enumerate(widths)]
    rule = [cell[-width:] for cell, width in zip(rule, widths, strict=True)]
    for line in lines:
        line[:] = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def timing_table(rows: list[Row], unit: str, ratio: str, *, scale=1.0, left=None, right=None) -> str:
    """Return the Markdown table of timed rows: mean ± standard deviation, median, ratio ± its deviation.

    unit: title of the samples' column, after multiplication by `scale`. ratio: title of the ratio's column.
    left, right: further columns on either side, title -> function of a row that returns the cell's text.
    """
    left, right = left or {}, right or {}
    lines = []
    for row in rows:
        cells = [row.missing, "", ""]
        if row.samples:
            mean, deviation = (scale * value for value in mean_and_deviation(row.samples))
            digits = 0 if mean >= 100 else 1 if mean >= 10 else 2
            cells = [f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"]
            cells.append(f"{scale * statistics.median(row.samples):,.{digits}f}")
            cells.append("{mean:.2f} ± {deviation:.2f}".format(**row.ratio) if row.ratio else "")
        further = [[cell(row) for cell in columns.values()] for columns in (left, right)]
        lines.append([row.label, *further[0], *cells, *further[1]])
    return markdown_table(["", *left, unit, "median", ratio, *right], lines)


def machine(device: torch.device) -> dict:
    """Return everything that a timing depends on: processor, accelerator, threads, versions and command."""
    info: dict[str, str] = {}
    with contextlib.suppress(OSError):  # Linux tells more than `platform` does
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        info = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", first, re.MULTILINE))
    has = info.get("flags", "").split()  # the vector extensions decide how fast a processor multiplies
    telling = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in has]
    record = {
        "processor": " ".join([info.get("model name", platform.processor() or platform.machine()), *telling]),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("torchvision", "timm", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            record[package] = importlib.metadata.version(package)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(command, capture_output=True, text=True, check=True)
        record["commit"] = commit.stdout.strip()
    record["command"] = "python bench.py " + shlex.join(sys.argv[1:])
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return record


def check_writable(folder: str) -> None:
    """Raise UsageError where files cannot be written to `folder`, before anything is measured for them."""
    path = Path(folder).absolute()
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UsageError(f"--out {folder}: file name too long")
    there = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
    if not there.is_dir():
        raise UsageError(f"--out {folder}: {there} is a file, not a folder; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder}: {there} cannot be written to; name another folder")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; make its folder where it is missing. RunError where neither works."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    write_whole(path, content)


def write_results(name: str, options, device: torch.device, text: str, rows: list, **more) -> Path:
    """Write `name`.json (everything that was measured) and `name`.md (`text`) to `options.out`.

    Results of other options are not overwritten: the name then ends in -2, -3, ... Returns the path without
    its suffix.
    """
    ours = json.loads(json.dumps(asdict(options)))
    for number in itertools.count(1):
        stem = Path(options.out) / (name if number == 1 else f"{name}-{number}")
        try:
            theirs = json.loads(stem.with_name(stem.name + ".json").read_text())["options"]
        except (OSError, ValueError, KeyError, TypeError):
            break
        if {**ours, "out": ""} == {**theirs, "out": ""}:
            break
    record = {"machine": machine(device), "options": asdict(options), **more}
    record["rows"] = [row.to_dict() if isinstance(row, Row) else row for row in rows]
    write_file(stem.with_name(stem.name + ".json"), json.dumps(record, indent=1) + "\n")
    write_file(stem.with_name(stem.name + ".md"), f"`{record['machine']['command']}`\n\n{text}")
    return stem


# --------------------------------------------------------------------------------------------------
# The paper's tables


@dataclass(frozen=True)
class Published:
    """A row of the paper's Table 1 (appendix): ImageNet-1K, one RTX 2080 Ti, batch 256, mixed precision."""

    label: str
    kind: str  # "conv" | "transformer"
    size: int  # input pixels per side
    parameters: str  # as printed, in millions
    macs: str  # as printed, in 10^9 multiply-accumulates ("FLOPs" there)
    speed: int  # images/s, mean of 30 repetitions
    deviation: int  # images/s, standard deviation
    top1: float  # %


# A new row is one line here; the key is torchvision's name, timm's, one of MODELS or of HAND_BUILT.
TABLE_1 = {
    "efficientnet_b1": Published("EfficientNet-B1", "conv", 240, "7.8", "0.7", 1618, 24, 79.1),
    "efficientnet_b2": Published("EfficientNet-B2", "conv", 260, "9.2", "1.0", 1308, 9, 80.1),
    "efficientnet_b3": Published("EfficientNet-B3", "conv", 300, "12", "1.8", 867, 6, 81.6),
    "nat_mini": Published("NAT-Mini", "transformer", 224, "20", "2.7", 713, 3, 81.8),
    "resnet50": Published("ResNet-50", "conv", 224, "25.6", "4.1", 1633, 26, 80.4),
    "efficientnet_b4": Published("EfficientNet-B4", "conv", 380, "19", "4.2", 937, 6, 82.9),
    "convnext_small_isotropic": Published("ConvNeXt-S (iso.)", "conv", 224, "22", "4.3", 1677, 77, 79.7),
    "nat_tiny": Published("NAT-T", "transformer", 224, "28", "4.3", 527, 1, 83.2),
    "swin_t": Published("Swin-T", "transformer", 224, "28", "4.5", 867, 7, 81.3),
    "nexception_tp": Published("NEXcepTion-TP", "conv", 224, "26.6", "4.5", 1428, 9, 81.8),
    "convnext_tiny": Published("ConvNeXt-T", "conv", 224, "29", "4.5", 1125, 5, 82.1),
    "vit_small": Published("ViT-S", "transformer", 224, "22", "4.6", 1330, 8, 79.8),
    "deit_small": Published("DeiT-S", "transformer", 224, "22", "4.6", 1332, 13, 79.8),
    "nexception_t": Published("NEXcepTion-T", "conv", 224, "24.5", "4.7", 965, 6, 81.5),
    "nat_small": Published("NAT-S", "transformer", 224, "51", "7.8", 359, 1, 83.7),
    "resnet101": Published("ResNet-101", "conv", 224, "44.5", "7.9", 1157, 6, 81.5),
    "xception": Published("Xception", "conv", 299, "23.6", "8.4", 756, 5, 79.0),
    "nexception_s": Published("NEXcepTion-S", "conv", 224, "43.4", "8.5", 772, 3, 82.0),
    "swin_s": Published("Swin-S", "transformer", 224, "50", "8.7", 472, 1, 83.0),
    "convnext_small": Published("ConvNeXt-S", "conv", 224, "50", "8.7", 753, 3, 83.1),
    "efficientnet_v2_s": Published("EfficientNetV2-S", "conv", 384, "22", "8.8", 543, 6, 83.9),
    "efficientnet_b5": Published("EfficientNet-B5", "conv", 456, "30", "9.9", 476, 2, 83.6),
}

# Table 3: top-1 in % on ImageNet-A, -R and -Sketch; Table 1's column is that of the validation set.
TABLE_3 = {
    "nexception_t": {"imagenet-a": 17.65, "imagenet-r": 45.99, "imagenet-sketch": 34.73},
    "nexception_tp": {"imagenet-a": 22.75, "imagenet-r": 47.37, "imagenet-sketch": 34.70},
    "nexception_s": {"imagenet-a": 21.36, "imagenet-r": 47.82, "imagenet-sketch": 36.60},
    "xception": {"imagenet-a": 9.83, "imagenet-r": 40.79, "imagenet-sketch": 29.88},
    "swin_t": {"imagenet-a": 21.60, "imagenet-r": 41.30, "imagenet-sketch": 29.10},
    "convnext_tiny": {"imagenet-a": 24.20, "imagenet-r": 47.20, "imagenet-sketch": 33.80},
    "rvt_small": {"imagenet-a": 25.70, "imagenet-r": 47.70, "imagenet-sketch": 34.70},
}


# --------------------------------------------------------------------------------------------------
# Models: ours, the paper's peers, the user's own


class IsotropicConvNeXt(nn.Sequential):
    """ConvNeXt-S (isotropic): 16 × 16 stem, 18 blocks of width 384 ("A ConvNet for the 2020s", 3.3)."""

    def __init__(self, width: int = 384, depth: int = 18, num_classes: int = 1000):
        from torchvision.models.convnext import CNBlock

        super().__init__(
            nn.Conv2d(3, width, kernel_size=16, stride=16),
            *[CNBlock(width, 1e-6, 0.0) for _ in range(depth)],
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, num_classes),
        )


class NatBlock(nn.Module):
    """A block of "Neighborhood Attention Transformer": attention over 7 × 7 neighbours, then an MLP.

    natten's attention has no relative position bias since release 0.17; it would be some 0.02M parameters.
    """

    def __init__(self, width: int, mlp_ratio: float, attention: type):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention(width, num_heads=width // 32, kernel_size=7)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NeighborhoodShapes(nn.Module):
    """natten's attention for counting only: its own kernels cannot run on the meta device."""

    def __init__(self, width: int, num_heads: int, kernel_size: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.neighbours = kernel_size**2

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        query = self.qkv(x).flatten(0, 2)[:, None, : x.shape[-1]]  # (B, H, W, 3C) -> (BHW, 1, C)
        keys = query.new_empty(len(query), x.shape[-1], self.neighbours)
        return self.proj(torch.bmm(torch.bmm(query, keys), keys.mT).view_as(x))


class Permute(nn.Module):
    """Reorder the dimensions of a tensor."""

    def __init__(self, *order: int):
        super().__init__()
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.order)


class Nat(nn.Sequential):
    """NAT: four stages of `NatBlock`, each after 3 × 3 convolutions of stride 2 (its paper, table 1)."""

    def __init__(self, depths: tuple[int, ...], width: int, mlp_ratio: float):
        from natten import NeighborhoodAttention2D

        layers = [nn.Conv2d(3, width // 2, 3, 2, 1), nn.Conv2d(width // 2, width, 3, 2, 1)]
        for stage, depth in enumerate(depths):
            if stage:
                layers += [Permute(0, 3, 1, 2), nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)]
                width *= 2
            layers += [Permute(0, 2, 3, 1), nn.LayerNorm(width)]
            layers += [NatBlock(width, mlp_ratio, NeighborhoodAttention2D) for _ in range(depth)]
        layers += [nn.LayerNorm(width), Permute(0, 3, 1, 2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def small_vit(size: int) -> nn.Module:
    """ViT-S/16, which is DeiT-S: width 384, six heads, twelve layers."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=size, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )


HAND_BUILT = {  # key of Table 1 -> function of the input size
    "vit_small": small_vit,
    "deit_small": small_vit,
    "convnext_small_isotropic": lambda size: IsotropicConvNeXt(),
    "nat_mini": lambda size: Nat((3, 4, 6, 5), 64, 3.0),
    "nat_tiny": lambda size: Nat((3, 4, 18, 5), 64, 3.0),
    "nat_small": lambda size: Nat((3, 4, 18, 5), 96, 2.0),
}


@functools.cache
def torchvision_classifiers() -> frozenset[str]:
    import torchvision.models  # takes a second: only where it is needed

    return frozenset(torchvision.models.list_models(module=torchvision.models))


def timm_with(name: str):
    """Return the package timm if it is installed and has a model of that name, else None."""
    try:
        import timm
    except ModuleNotFoundError:
        return None
    return timm if timm.is_model(name) else None


def parse_spec(spec: str) -> tuple[str, int]:
    """Split `NAME` or `NAME@SIZE` into name and input size in pixels (default: Table 1's, the model's)."""
    name, _, size = spec.partition("@")
    if size:
        if not size.isdigit() or int(size) < 32:
            raise UsageError(
                f"{spec!r}: the input size after @ must be a whole number of pixels, at least 32"
            )
        return name, int(size)
    if name in TABLE_1:
        return name, TABLE_1[name].size
    if name in MODELS:
        return name, MODELS[name].input_size
    if name.endswith(".json"):
        return name, ModelConfig.from_json(name).input_size
    if not name.startswith(PEER) and name not in torchvision_classifiers() and (timm := timm_with(name)):
        return name, timm.get_pretrained_cfg(name).input_size[-1]
    return name, 224


def model_maker(spec: str) -> Callable[[], nn.Module]:
    """Return a function that builds a model with random weights; UsageError if the spec is unknown."""
    name, size = parse_spec(spec)
    if name in HAND_BUILT:
        return functools.partial(HAND_BUILT[name], size)
    if name in MODELS or name.endswith(".json"):
        return functools.partial(create_model, name)
    if name.startswith(PEER):
        return peer_maker(name.removeprefix(PEER))
    if name in torchvision_classifiers():
        import torchvision

        return functools.partial(torchvision.models.get_model, name, weights=None)
    if timm := timm_with(name):
        return functools.partial(timm.create_model, name)
    known = ", ".join({**TABLE_1, **MODELS})
    raise UsageError(
        f"unknown model {name!r}, neither torchvision's nor (if it is installed) timm's; known here: {known}"
    )


def peer_maker(path: str) -> Callable[[], nn.Module]:
    """Return the user's own `MODULE:CALLABLE`, which takes no arguments; the current folder is searched."""
    module_name, _, callable_name = path.partition(":")
    if not module_name or not callable_name:
        raise UsageError(f"--peer {path!r}: write it as MODULE:CALLABLE, for instance mymodels:tiny")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), callable_name)
    except Exception as error:  # the module is the user's: anything may happen
        raise UsageError(f"--peer {path!r}: {one_line(error)}") from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UsageError(f"--peer {path!r}: {callable_name} cannot be called")
    return function


def build_model(spec: str) -> nn.Module:
    """Build a model with random weights, the same every time.

    Raises UsageError if it is unknown, ModuleNotFoundError without natten, and whatever a peer raises.
    """
    maker = model_maker(spec)
    torch.manual_seed(0)
    model = maker()
    if not isinstance(model, nn.Module):
        raise TypeError(f"gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def count_all_macs(model: nn.Module, size: int) -> tuple[int, int]:
    """Count multiply-accumulates of one image: of convolutions and linear layers, and of attention alone."""
    if any(isinstance(block, NatBlock) for block in model.modules()):
        model = copy.deepcopy(model).to("meta")
        for block in model.modules():
            if isinstance(block, NatBlock):
                block.attention = NeighborhoodShapes(block.norm1.weight.numel(), 1, 7).to("meta")
    return count_macs(model, size), count_macs(model, size, attention=True)


# --------------------------------------------------------------------------------------------------
# speed: Table 1's throughput


@dataclass(frozen=True)
class SpeedOptions:
    """Measure images/s of NEXcepTion and its peers, which take turns within each repetition."""

    models: tuple[str, ...] = option(
        (), "Table 1's keys, our models, timm's or JSON configs, NAME[@SIZE],... (default: all of Table 1)"
    )
    peer: tuple[str, ...] = option((), "your own models, MODULE:CALLABLE[@SIZE],...")
    baseline: str = option("convnext_tiny", "model that ratios refer to; the first one if it is not measured")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "", "autocast type (default: bfloat16 or float16 on a GPU, float32 on a CPU)", choices=tuple(DTYPES)
    )
    batch: int = option(0, "images per batch, halved when out of memory (default: 256, on a CPU 16)", least=0)
    repetitions: int = option(30, "timed turns of each model", least=1)
    train: bool = option(False, "time forward, backward and a LAMB step instead of evaluation")
    compile: bool = option(False, "compile every model (evaluation: with inductor's freezing, and --fuse)")
    fuse: bool = option(False, "fold NEXcepTion's batch norms into its convolutions")
    out: str = option("results", "folder of the results")


class Timed:
    """One model on its device, warmed up, ready to be timed in turns.

    Raises what building the model raises; out of memory at one image is torch.OutOfMemoryError.
    """

    def __init__(self, spec: str, options: SpeedOptions):
        self.options, self.device, self.dtype = options, torch.device(options.device), DTYPES[options.dtype]
        self.size, self.batch = parse_spec(spec)[1], options.batch
        model = build_model(spec)
        self.parameters = count_parameters(model)
        self.macs, self.attention_macs = count_all_macs(model, self.size)
        if options.fuse and isinstance(model, NEXcepTion):
            model = fuse(model)
        model.to(self.device, memory_format=torch.channels_last)
        self.model = model.train(options.train)
        if options.train:
            self.optimizer = Lamb(parameter_groups(model, 0.02), lr=2e-3)
        if options.compile:
            self.model = torch.compile(model, dynamic=False) if options.train else compile_frozen(model)

        while not self.fits():
            if self.batch == 1:
                raise torch.OutOfMemoryError("out of memory at batch 1")
            self.batch //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        static = [*model.parameters(), *model.buffers()]
        if options.train:
            static += [t for state in self.optimizer.state.values() for t in state.values()]
        static = sum(t.numel() * t.element_size() for t in static if torch.is_tensor(t))
        self.memory = None if self.peak is None else self.peak + static
        seconds = min(stopwatch(self.device)(self.step)[1] for _ in range(2))
        self.passes = max(1, math.ceil(TURN_SECONDS / seconds))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(images)

    def step(self) -> None:
        """Run one pass over the batch: forward, or forward, backward and the optimizer's step."""
        if not self.options.train:
            with torch.no_grad():
                self.forward(self.inputs)
            return
        logits = self.forward(self.inputs)
        bce_loss(logits, torch.zeros_like(logits), 0.2).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fits(self) -> bool:
        """Run two steps and return whether memory suffices for the batch; keep the peak of the second."""
        try:
            self.inputs = random_images(self.batch, self.size, self.device)
            self.step()
            self.peak = peak_bytes(self.step, self.device)
        except (RuntimeError, MemoryError) as error:
            # PyTorch's CPU allocator raises a plain RuntimeError.
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not memory and "DefaultCPUAllocator" not in str(error):
                raise
            self.inputs = None
            return False
        return True

    def turn(self) -> int:
        """Run a turn's passes; return the number of images."""
        for _ in range(self.passes):
            self.step()
        return self.batch * self.passes

    def latencies(self) -> list[float]:
        """Return the seconds of three single images, after an untimed one."""
        if self.options.train:
            return []
        image = random_images(1, self.size, self.device)
        with torch.no_grad():
            return [stopwatch(self.device)(lambda: self.forward(image))[1] for _ in range(4)][1:]


@functools.cache
def random_images(count: int, size: int, device: torch.device) -> torch.Tensor:
    """Return random images, float32 (count, 3, size, size), channels last; models of one size share them."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    return pixels.to(device, memory_format=torch.channels_last)


def peak_bytes(work: Callable, device: torch.device) -> int | None:
    """Run `work()` and return the most memory that it added, in bytes; None where the system does not tell.

    On a GPU: tensors of PyTorch's allocator. On Linux: the high-water mark of the resident set, which
    includes the scratch buffers of the kernels.
    """

    def resident(name: str) -> int:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024

    before = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    elif device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # else buffers that the allocator kept would hide new ones
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
    work()
    if before is None:
        return None
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")) - before


def settle(options: SpeedOptions) -> SpeedOptions:
    """Return the options with device, dtype, batch and models filled in; UsageError for contradictions."""
    device = pick_device(options.device)
    fast = "bfloat16" if device.type != "cuda" or torch.cuda.is_bf16_supported(False) else "float16"
    models = (options.models or tuple(TABLE_1)) + tuple(PEER + peer for peer in options.peer)
    if options.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UsageError("--compile on a CPU needs a C++ compiler: install g++, or name another in CXX")
    if options.train and options.fuse:
        raise UsageError("--fuse is for evaluation: leave it out, or leave out --train")
    if len(set(models)) < len(models):
        raise UsageError(f"--models {','.join(models)}: name each model once")
    for spec in models:
        model_maker(spec)  # an unknown one is found before the others are built
    names = {*models, *(parse_spec(spec)[0] for spec in models)}
    if options.baseline not in {*names, SpeedOptions.baseline}:
        raise UsageError(
            f"--baseline {options.baseline}: choose one of the measured models, {','.join(models)}"
        )
    return replace(
        options,
        device=str(device),
        dtype=options.dtype or ("float32" if device.type == "cpu" else fast),
        batch=options.batch or (16 if device.type == "cpu" else 256),
        models=models,
        fuse=options.fuse or (options.compile and not options.train),
    )


def build_rows(options: SpeedOptions) -> list[Row]:
    """Build and warm up every model; a row for each, which says why where one cannot be timed."""
    rows = []
    for spec in options.models:
        name, size = parse_spec(spec)
        row = Row(spec.removeprefix(PEER), name=name, spec=spec, size=size)
        rows.append(row)
        if name in TABLE_1 and size == TABLE_1[name].size:
            row.label, row.paper = TABLE_1[name].label, asdict(TABLE_1[name])
        try:
            timed = Timed(spec, options)
        except torch.OutOfMemoryError:
            row.missing = "out of memory at batch 1"
        except Exception as error:  # a model that fails does not cost the others their rows
            row.missing = failure(error)
        else:
            for fact in ("parameters", "macs", "attention_macs", "batch", "passes", "memory"):
                setattr(row, fact, getattr(timed, fact))
            # The models before it have emptied the caches: an untimed pass fills them.
            row.before, row.work, row.after = timed.step, timed.turn, timed.latencies
            if timed.batch < options.batch:
                print(f"{row.label}: out of memory at batch {options.batch}, measured at {timed.batch}")
        print(f"{row.label}: {row.missing or 'ready'}", file=sys.stderr)
    return rows


def speed(options: SpeedOptions) -> None:
    """Measure, print and write the table of images/s."""
    options = settle(options)
    device = torch.device(options.device)
    if device.type == "cpu":
        keep_large_buffers()
    if options.compile:  # models of one class share a count of compilations, and halving a batch adds one
        from torch._dynamo import config as dynamo_config

        dynamo_config.recompile_limit = 2**16
        dynamo_config.fail_on_recompile_limit_hit = True
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the fastest algorithm for each shape, chosen while warming up
        torch.backends.cuda.matmul.allow_tf32 = True  # in float32, as cuDNN's convolutions do by default
    rows = build_rows(options)
    if not any(row.work for row in rows):
        raise UsageError("; ".join(f"{row.label}: {row.missing}" for row in rows))
    take_turns(rows, options.repetitions, stopwatch(device), warm_up=0)
    timed = [row for row in rows if row.samples]
    base = next((row for row in timed if options.baseline in (row.name, row.spec)), timed[0])
    for row in timed:
        row.base = base.label
        row.paper_ratio = row.paper["speed"] / base.paper["speed"] if row.paper and base.paper else 0.0
    compare(rows)

    here = machine(device)
    precision = " (products in TF32)" if device.type == "cuda" else ""
    precision = precision if options.dtype == "float32" else " (autocast)"
    method = (
        f"{here.get('gpu', here['processor'])}, {here['threads']} CPU threads, torch {here['torch']}, "
        f"{options.dtype}{precision}, batch {options.batch}, channels last, "
        f"{'training step (LAMB)' if options.train else 'evaluation'}"
        f"{', compiled' if options.compile else ''}{', batch norms folded' if options.fuse else ''}; "
        f"mean ± standard deviation of {len(base.samples)} repetitions in turns.\n"
    )
    text = f"{speed_table(rows, base.label, options.batch)}\n{method}"
    where = re.sub(r"\W+", "-", here["gpu"].lower()) if "gpu" in here else device.type
    flags = [flag for flag in ("train", "compile", "fuse") if getattr(options, flag)]
    name = "-".join(["speed", where, options.dtype, *flags])
    stem = write_results(name, options, device, text, rows, method=method, baseline=base.label)
    print(f"\n{text}written: {stem}.json, {stem}.md")


def speed_table(rows: list[Row], base: str, batch: int) -> str:
    """Return the Markdown table of rows that were to be measured at `batch`.

    MACs are those of convolutions and linear layers, + those of attention's own products.
    """

    def macs(row: Row) -> str:
        attention = f" + {row.attention_macs / 1e9:.2f}G" if row.attention_macs else ""
        return f"{row.macs / 1e9:.2f}G{attention}" if row.macs else ""

    def late(row: Row) -> str:
        late = [1000 * seconds for seconds in row.latencies]
        return f"{statistics.median(late):.1f} ({np.percentile(late, 95):.1f})" if late else ""

    left = {
        "input": lambda row: str(row.size),
        "params": lambda row: f"{row.parameters / 1e6:.1f}M" if row.parameters else "",
        "MACs": macs,
        "paper's": lambda row: "{parameters}M, {macs}G".format(**row.paper) if row.paper else "",
        "batch": lambda row: str(row.batch) if 0 < row.batch < batch else "",
    }
    right = {
        "paper's ×": lambda row: f"{row.paper_ratio:.2f}" if row.paper_ratio else "",
        "batch 1, ms (p95)": late,
        "memory": lambda row: f"{row.memory / 2**20:.0f} MiB" if row.memory else "",
    }
    return timing_table(rows, "images/s", f"× {base}", left=left, right=right)


# --------------------------------------------------------------------------------------------------
# accuracy: top-1 and top-5 of a checkpoint, Table 3's robustness


@dataclass(frozen=True)
class AccuracyOptions:
    """Measure top-1, top-5 and calibration of a checkpoint on image folders; every image counts once.

    A folder may hold a subset of the model's classes (ImageNet-A and -R do): the prediction is then the best
    of those classes' logits.
    """

    checkpoint: str = option(
        MISSING, "a file of train.py, the authors', timm's Xception, or of --model", positional=True
    )
    folders: tuple[str, ...] = option(
        MISSING,
        "folders of class folders, PATH or NAME=PATH; the paper has figures for the names imagenet, "
        "imagenet-a, imagenet-r and imagenet-sketch",
        positional=True,
    )
    model: str = option("", "torchvision's or timm's model that the file belongs to (default: one of ours)")
    classes: str = option(
        "", "class names in the order of the outputs: a folder of class folders or a text file"
    )
    size: int = option(0, "input pixels per side (default: the checkpoint's own)", least=0)
    crop_pct: float = option(
        0.0, "share of the resized shorter side that is kept (default: the checkpoint's own)", least=0, most=1
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option("float32", "autocast type", choices=tuple(DTYPES))
    batch: int = option(64, "images per batch", least=1)
    workers: int | None = option(None, "data-loading processes (default: one per core)", least=0)
    out: str = option("results", "folder of the results")


@dataclass(frozen=True)
class Network:
    """A model to evaluate: the names of its outputs (None: unknown), transform, key in the paper's tables."""

    model: nn.Module
    classes: list[str] | None
    transform: EvalTransform
    key: str


def open_network(options: AccuracyOptions) -> Network:
    """Load the checkpoint's network in evaluation mode; UsageError where it does not fit the options."""
    if options.model:
        network = open_peer(options)
    else:
        model = load_checkpoint(options.checkpoint, fuse=True)
        check_channels(model.config, options.checkpoint)
        plain = replace(model.config, num_classes=1000, drop_path=0.05)
        key = next((key for key, config in MODELS.items() if replace(config, drop_path=0.05) == plain), "")
        network = Network(model, model.classes, model.transform, key)
    asked = {name: getattr(options, name) for name in ("size", "crop_pct")}
    transform = replace(network.transform, **{name: value for name, value in asked.items() if value})
    classes = read_classes(options.classes) if options.classes else network.classes
    return replace(network, transform=transform, classes=classes)


def open_peer(options: AccuracyOptions) -> Network:
    """Load a torchvision or timm model with a local file's weights and the transform published with them."""
    import torchvision

    if options.model in MODELS:
        raise UsageError(f"--model {options.model}: leave it out, checkpoints of our models are recognised")
    weights = read_weights(options.checkpoint)
    makers = [model_maker(options.model)]
    if options.model in torchvision_classifiers() and (timm := timm_with(options.model)):
        makers.append(functools.partial(timm.create_model, options.model))  # its layers have other names
    misfits = []
    for maker in makers:
        model = maker()
        try:
            model.load_state_dict(weights)
            break
        except RuntimeError as error:
            misfits.append(one_line(error))
    else:
        raise UsageError(f"{options.checkpoint} does not fit --model {options.model}: {misfits[0]}")
    if options.model in torchvision_classifiers() and maker is makers[0]:
        published = torchvision.models.get_model_weights(options.model)
        file = Path(options.checkpoint).name
        preset = next((w for w in published if w.url.endswith("/" + file)), published.DEFAULT).transforms()
        size, short = preset.crop_size[0], preset.resize_size[0]
        share = size / (short + 1e-6)  # so that size / share, rounded down, is the short side
        rest = (preset.interpolation.value, tuple(preset.mean), tuple(preset.std))
    else:
        import timm

        preset = timm.data.resolve_model_data_config(model)
        size, share = preset["input_size"][-1], preset["crop_pct"]
        rest = (preset["interpolation"], preset["mean"], preset["std"])
    return Network(model.eval(), None, EvalTransform(size, share, *rest), options.model)


def read_classes(source: str) -> list[str]:
    """Read class names in the order of the outputs: sub-folders in natural order, or the lines of a file."""
    path = Path(source)
    if path.is_dir():
        names = sorted((entry.name for entry in path.iterdir() if entry.is_dir()), key=natural_key)
    elif path.is_file():
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if all(re.match(r"n\d{8}\b", name) for name in names):  # ImageNet's lists: `n01440764 tench, ...`
            names = [name.split()[0] for name in names]
    else:
        raise UsageError(f"--classes {source}: neither a folder nor a file")
    if len(set(names)) < max(2, len(names)):
        raise UsageError(f"--classes {source}: needs at least two names, each once; found {len(names)}")
    return names


def class_columns(classes: list[str] | None, outputs: int, folder: str, names: tuple[str, ...]):
    """Return the model's output for each class folder in `names`, int64; UsageError if one has none."""
    if classes is None:
        if len(names) != outputs:
            raise UsageError(
                f"{folder} has {len(names)} class folders and the model {outputs} outputs without names: "
                "give --classes FOLDER_OR_FILE"
            )
        classes = list(names)
    if len(classes) != outputs:
        raise UsageError(f"{len(classes)} class names for a model with {outputs} outputs: check --classes")
    place = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in place]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UsageError(f"{folder}: no class of the model is called {', '.join(unknown[:5])}{more}")
    return torch.tensor([place[name] for name in names])


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error: |accuracy - confidence| per bin, weighted by the bin's count.

    confidence: (N,) probability of the predicted class, in `bins` bins of equal width; correct: (N,) bool
    ("On Calibration of Modern Neural Networks", equation 3).
    """
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def accuracy(options: AccuracyOptions) -> None:
    """Evaluate on every folder; print and write the table."""
    device = pick_device(options.device)
    if device.type == "cpu":
        keep_large_buffers()
    network = open_network(options)
    network.model.to(device, memory_format=torch.channels_last)
    size, dtype = network.transform.size, DTYPES[options.dtype]
    with torch.no_grad():
        outputs = network.model(torch.zeros(1, 3, size, size, device=device)).shape[1]
    settings = {"train": False, "device": device, "workers": options.workers}
    plan, sets = Plan(batch=options.batch), []
    for text in options.folders:  # all are opened and their classes found before any is evaluated
        name, _, path = text.partition("=")
        if not path or "/" in name:
            name, path = Path(text).name, text
        folder = open_data(path, plan, transform=network.transform, **settings)
        columns = class_columns(network.classes, outputs, path, folder.classes)
        sets.append((name, path, folder, columns.to(device)))

    published = {**TABLE_3.get(network.key, {})}
    if network.key in TABLE_1:
        published["imagenet"] = TABLE_1[network.key].top1
    file = Path(options.checkpoint).absolute()
    in_run = file.stem in ("best", "last", "previous") and (file.parent / "config.json").exists()
    name = f"accuracy-{file.parent.name if in_run else file.stem}"  # a run's folder says more than `best`
    shown = f"{options.checkpoint}: {size} pixels, {network.transform.crop_pct:.3g} of the resized shorter "
    shown += f"side, {network.transform.interpolation}, {options.dtype}"
    rows, header = [], ["set", "images", "classes", "top-1, %", "paper's", "top-5, %", "ECE, %"]
    for set_name, path, folder, columns in sets:
        seen = []

        def collect(labels, logits, seen=seen):
            confidence, predicted = logits.float().softmax(1).max(1)
            seen.append(torch.stack([labels, predicted == labels, confidence], 1).cpu().double())

        amp = None if dtype == torch.float32 else dtype
        found = evaluate(network.model, folder, "val", amp, columns=columns, collect=collect)
        folder.close()
        labels, correct, confidence = torch.cat(seen).numpy().T  # (N, 3) -> 3 x (N,)
        places = [(label, labels == i) for i, label in enumerate(folder.classes)]
        row = {
            "set": set_name,
            "folder": path,
            "images": found["count"],
            "classes": len(folder.classes),
            "top1": found["top1"],
            "top5": found["top5"],
            "paper_top1": published.get(set_name.lower()),
            "ece": 100 * calibration_error(confidence, correct == 1),
            "per_class": {label: 100 * correct[at].mean() for label, at in places if at.any()},
            "unreadable": [list(bad) for bad in folder.bad_files],
        }
        rows.append(row)
        cells = []
        for row in rows:
            paper = "" if row["paper_top1"] is None else str(row["paper_top1"])
            cells.append([row["set"], f"{row['images']:,}", str(row["classes"]), f"{row['top1']:.2f}", paper])
            cells[-1] += [f"{row['top5']:.2f}", f"{row['ece']:.2f}"]
        text = f"{shown}\n\n{markdown_table(header, cells)}"
        # After each set, so that results are kept if a later one fails.
        write_results(name, options, device, text, rows, transform=network.transform.to_dict())
    print(text)
    for row in rows:
        for path, reason in row["unreadable"]:
            print(f"left out, unreadable: {path} ({reason})")
        lowest = sorted(row["per_class"].items(), key=lambda item: item[1])[:10]
        print(f"{row['set']}, lowest top-1: " + ", ".join(f"{name} {value:.1f}" for name, value in lowest))


# --------------------------------------------------------------------------------------------------
# figures: the paper's figures 2 and 3


@dataclass(frozen=True)
class FiguresOptions:
    """Draw accuracy against MACs and throughput, bubble area = parameters: the paper's figures 2 and 3.

    From the paper's numbers, and figure 3 once more from the measured speed in each given file.
    """

    results: tuple[str, ...] = option((), "JSON files that `bench.py speed` wrote", positional=True)
    out: str = option("results", "folder of the figures, SVG and PNG")


COLOURS = {"NEXcepTion": "#c0392b", "conv": "#5b93bd", "transformer": "#d9a441"}
AREA_PER_MILLION = 11.0  # points²: 50M parameters make a bubble 26 points wide


def figures(options: FiguresOptions) -> None:
    """Draw figures 2 and 3 from the paper's table, and figure 3 from every results file."""
    names = [Path(path).stem.removeprefix("speed-") for path in options.results]
    if len(set(names)) < len(names):
        raise UsageError(f"two files of one name would give one figure: {' '.join(options.results)}")
    pictures = [(f"figure-3-{n}", *measured(path)) for n, path in zip(names, options.results, strict=True)]
    macs = {key: float(row.macs) for key, row in TABLE_1.items()}
    speeds = {key: float(row.speed) for key, row in TABLE_1.items()}
    pictures.append(("figure-2", macs, "10⁹ multiply-accumulates per image (the paper's “FLOPs”)"))
    pictures.append(("figure-3", speeds, "images/s (the paper's: RTX 2080 Ti, batch 256, mixed precision)"))
    for name, values, title in pictures:
        draw(values, title, Path(options.out) / name)


def measured(path: str) -> tuple[dict[str, float], str]:
    """Read the speed of Table 1's models and the axis title from a results file, or raise UsageError."""
    try:
        record = json.loads(Path(path).read_text())
        options, here = record["options"], record["machine"]
        speeds = {
            row["name"]: statistics.fmean(row["samples"])
            for row in record["rows"]
            if row.get("samples") and not row.get("variant") and row["name"] in TABLE_1
            if row["size"] == TABLE_1[row["name"]].size  # at another one, the accuracy is not the paper's
        }
        how = [f"batch {options['batch']}", options["dtype"]]
        how += [word for word in ("compile", "fuse") if options.get(word)]
        title = f"{'trained ' if options['train'] else ''}images/s (measured: "
        title += f"{here.get('gpu') or str(here['threads']) + ' CPU threads'}, {', '.join(how)})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no results file of `bench.py speed`: {error!r}") from error
    if not speeds:
        raise UsageError(f"{path} has no measured model of the paper's Table 1")
    return speeds, title


def draw(values: dict[str, float], title: str, stem: Path) -> list:
    """Write `stem`.svg and .png with a labelled bubble for each key of `values`; return the labels."""
    try:
        import matplotlib
        from adjustText import adjust_text
    except ModuleNotFoundError as error:
        raise UsageError(f"figures need `pip install {error.name}`") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nexception"  # the same picture gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.3, 5.6), dpi=200, layout="constrained")
    kinds = {k: "NEXcepTion" if k.startswith("nexception") else row.kind for k, row in TABLE_1.items()}
    keys = sorted(values, key=lambda key: -float(TABLE_1[key].parameters))
    areas = [AREA_PER_MILLION * float(TABLE_1[key].parameters) for key in keys]
    xs, ys = [values[key] for key in keys], [TABLE_1[key].top1 for key in keys]
    colours = [COLOURS[kinds[key]] for key in keys]
    bubbles = axes.scatter(xs, ys, areas, colours, alpha=0.65, linewidths=0.8, edgecolors="white")
    axes.set_xlabel(title, fontsize=10)
    axes.set_ylabel("ImageNet-1K top-1, % (published)", fontsize=10)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.margins(0.09, 0.11)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.scatter([], [], 70, colour, label=kind, alpha=0.65) for kind, colour in COLOURS.items()]
    for millions in (10, 25, 50):
        label = f"{millions}M" + " parameters" * (millions == 50)
        handles.append(axes.scatter([], [], millions * AREA_PER_MILLION, "0.75", label=label))
    legend = {"loc": "outside upper center", "ncols": 6, "frameon": False, "fontsize": 9, "borderpad": 1.0}
    figure.legend(handles=handles, **legend)
    texts = []
    for key, x, y in zip(keys, xs, ys, strict=True):
        weight = "bold" if kinds[key] == "NEXcepTion" else "normal"
        texts.append(axes.text(x, y, TABLE_1[key].label, fontsize=9, weight=weight, ha="center", va="center"))
    figure.draw_without_rendering()  # the layout must be final before labels are placed
    lines = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6}  # iterations, not seconds, end the search:
    adjust_text(texts, xs, ys, objects=bubbles, ax=axes, arrowprops=lines, expand=(1.05, 1.15), iter_lim=150)
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        file = io.BytesIO()
        figure.savefig(file, format=suffix[1:], metadata=metadata)
        write_file(stem.with_name(stem.name + suffix), file.getvalue())
    pyplot.close(figure)
    print(f"written: {stem}.svg, {stem}.png")
    return texts


# --------------------------------------------------------------------------------------------------
# export: files for other runtimes


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint as a torch.export program and as ONNX, and check both against eager outputs."""

    checkpoint: str = option(MISSING, "a file of train.py, the authors' or timm's Xception", positional=True)
    formats: tuple[str, ...] = option(
        ("program", "onnx"), "program (torch.export, .pt2), onnx (needs the packages onnx and onnxscript)"
    )
    size: int = option(0, "input pixels per side (default: the checkpoint's own)", least=0)
    out: str = option("", "folder of the files (default: the checkpoint's)")


def export(options: ExportOptions) -> None:
    """Write NAME.pt2, NAME.onnx and NAME.export.json (classes, transform); the batch size stays free.

    Batch norms are folded first. A file that computes something else than the checkpoint is not kept.
    """
    unknown = set(options.formats) - {"program", "onnx"}
    if unknown or not options.formats:
        raise UsageError(f"--formats {','.join(options.formats)}: choose from program, onnx")
    model = load_checkpoint(options.checkpoint, fuse=True).requires_grad_(False)
    folder = Path(options.out or Path(options.checkpoint).parent)
    check_writable(str(folder))
    size = options.size or model.transform.size
    shape = (3, model.config.in_channels, size, size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        wanted = model(images).numpy()
    stem = Path(options.checkpoint).stem
    if "program" in options.formats:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        reloaded = torch.export.load(file).module()
        path = folder / f"{stem}.pt2"
        check_outputs(path, wanted, lambda x: reloaded(torch.from_numpy(x)).numpy(), images)
        write_file(path, file.getvalue())
    if "onnx" in options.formats:
        path = folder / f"{stem}.onnx"
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            print(f"{path}: not written, needs `pip install {' '.join(missing)}`")
        else:
            names = {"input_names": ["images"], "output_names": ["logits"]}
            content = torch.onnx.export(program, (images,), **names, verbose=False)
            content = content.model_proto.SerializeToString()
            if importlib.util.find_spec("onnxruntime") is None:
                print(f"{path}: written, not checked: needs `pip install onnxruntime`")
            else:
                import onnxruntime

                session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
                check_outputs(path, wanted, lambda x: session.run(None, {"images": x})[0], images)
            write_file(path, content)
    transform = replace(model.transform, size=size).to_dict()
    facts = json.dumps({"classes": model.classes, "transform": transform}, indent=1)
    write_file(folder / f"{stem}.export.json", facts + "\n")


def check_outputs(path: Path, wanted: np.ndarray, run: Callable, images: torch.Tensor) -> None:
    """Compare an exported program with eager outputs, for the whole batch and for its first image alone."""
    worst = 0.0
    for count in (len(images), 1):
        difference = np.abs(run(images[:count].numpy()) - wanted[:count]).max()
        worst = max(worst, float(difference / np.abs(wanted).max()))
    if not worst <= 1e-4:
        raise RunError(f"{path} is not written: it would differ from the checkpoint, by {worst:.1e}")
    print(f"{path}: logits within {worst:.1e} of eager's, relatively")


# --------------------------------------------------------------------------------------------------
# data: the input pipeline


@dataclass(frozen=True)
class DataOptions:
    """Measure images/s of the input pipeline, on one core and by number of workers, beside timm's."""

    path: str = option(
        "", "folder of class folders, or one with train/ (default: made photographs)", positional=True
    )
    batch: int = option(64, "images per batch", least=1)
    repetitions: int = option(20, "timed turns of each, on one core; five with workers", least=1)
    workers: tuple[int, ...] = option(
        (), "numbers of workers to time (default: 1, 2, 4, ... all cores)", least=1
    )
    rate: float = option(1000.0, "images/s at which a GPU trains, for the advice on workers", least=0)
    out: str = option("results", "folder of the results")


# ImageNet's most common sizes, by frequency
PHOTOGRAPH_SIZES = [(500, 375)] * 11 + [(500, 333)] * 4 + [(375, 500)] * 3 + [(333, 500), (640, 480)]


def make_photographs(folder: Path, count: int = 300, links: int = 8) -> None:
    """Write `count` JPEG files, about 100 KB each, cut from scikit-learn's and scikit-image's photographs.

    Crops, zooms, flips and a little sensor noise make them differ; every file is linked `links` times, so
    that an epoch is long enough to time.
    """
    try:
        import skimage.data as sk
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError:
        raise UsageError("made photographs need `pip install scikit-image`; or name a PATH") from None
    photographs = [load_sample_image("china.jpg"), load_sample_image("flower.jpg"), sk.astronaut()]
    photographs += [sk.coffee(), sk.chelsea(), sk.rocket(), sk.retina()]
    photographs += [*sk.stereo_motorcycle()[:2], sk.hubble_deep_field()]
    rng = np.random.default_rng(0)
    for n in range(count):
        image = Image.fromarray(photographs[n % len(photographs)])
        width, height = PHOTOGRAPH_SIZES[rng.integers(len(PHOTOGRAPH_SIZES))]
        part = min(image.width / width, image.height / height) * rng.uniform(0.7, 1)
        left, top = rng.uniform(0, image.width - part * width), rng.uniform(0, image.height - part * height)
        box = (left, top, left + part * width, top + part * height)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image, dtype=np.float32)
        pixels = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255)[:, :: rng.choice([-1, 1])]
        place = folder / f"class_{n % 10}" / f"{n}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place, quality=95)
        for link in range(1, links):
            os.link(place, place.with_name(f"{n}_{link}.jpg"))


class SmallImages(torch.utils.data.Dataset):
    """A split of a small set as (PIL image, label), as loaders of image files see it."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Callable | None = None):
        self.images, self.labels = images.permute(0, 2, 3, 1).cpu().numpy(), labels.tolist()
        self.transform = transform  # timm's loader sets it

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def take_from(epochs: Callable[[int], Iterator]) -> Callable[[], int]:
    """Return a function that takes the next batch of `epochs(0)`, `epochs(1)`, ... and returns its length."""
    batches = itertools.chain.from_iterable(map(epochs, itertools.count()))
    return lambda: len(next(batches)[0])


def beside_timm(ours: dict[str, Callable], theirs: dict[str, Callable]) -> list[Row]:
    """Return a row for each of ours, each followed by timm's of the same label, if it has one."""
    rows = []
    for label, work in ours.items():
        rows.append(Row(label, work, base=f"{label}, timm"))
        if label in theirs:
            rows.append(Row(f"{label}, timm", theirs[label]))
    return rows


def for_a_while(take: Callable[[], int]) -> int:
    """Take batches for WORKER_SECONDS; return the number of images."""
    begun, count = time.perf_counter(), 0
    while not count or time.perf_counter() - begun < WORKER_SECONDS:
        count += take()
    return count


def input_speed(options: DataOptions) -> None:
    """Time the input pipeline; print and write the table and the advice."""
    cores, cpu = cpu_count(), torch.device("cpu")
    counts = options.workers or sorted({2**n for n in range(8) if 2**n < cores} | {cores})
    keep_large_buffers()  # as training on a CPU does
    with contextlib.ExitStack() as stack:
        folder = Path(options.path or stack.enter_context(tempfile.TemporaryDirectory()))
        if not options.path:
            print("making photographs ...", flush=True)
            make_photographs(folder)
        folder = folder / "train" if (folder / "train").is_dir() else folder
        files = list_images(folder, train=False)["val"]

        def ours(workers: int = 0, **augment):
            settings = {"augment": Augmentation(repeats=1, **augment), "max_bad_files": 0}
            splits = {"train": files, "val": files}
            opened = open_data(folder, Plan(batch=options.batch), files=splits, workers=workers, **settings)
            stack.callback(opened.close)
            return opened

        timm_sets = {}
        with contextlib.suppress(ModuleNotFoundError):
            from timm.data import create_dataset, create_transform
            from timm.data.loader import fast_collate

            shape = {"input_size": (3, 224, 224), "use_prefetcher": True}
            recipe = {"auto_augment": "rand-m7-mstd0.5-inc1", "interpolation": "random", "is_training": True}
            for use, settings in (
                ("training", recipe),
                ("evaluation", {"interpolation": "bicubic", "crop_pct": 0.95}),
            ):
                transform = create_transform(**shape, **settings)
                timm_sets[use] = create_dataset("", root=str(folder), transform=transform)

        by_workers = []
        for n in counts:  # first: workers are forked before this process starts threads
            label = f"training, {n} worker{'s' * (n > 1)}"
            takes = {label: take_from(ours(n).train_batches)}
            if timm_sets:
                loader = torch.utils.data.DataLoader(
                    timm_sets["training"], batch_size=options.batch, shuffle=True, num_workers=n,
                    collate_fn=fast_collate, drop_last=True, persistent_workers=True,
                )  # fmt: skip
                takes[f"{label}, timm"] = take_from(lambda _, loader=loader: iter(loader))
            rows = []
            for name, take in takes.items():
                row = Row(name, functools.partial(for_a_while, take))
                row.base = f"{label}, timm" if name == label else ""
                # Batches that were prepared while the other row was timed do not count; and when a turn is
                # over, its workers get time to prepare the next ones, not to disturb the other row.
                row.before = lambda take=take, n=n: [take() for _ in range(3 * n)]
                row.after = lambda: time.sleep(WORKER_SECONDS / 4)
                rows.append(row)
            take_turns(rows, 5, stopwatch(cpu))
            by_workers += rows

        rng = np.random.default_rng(0)

        def draw() -> list[int]:
            return rng.permutation(len(files))[: options.batch].tolist()

        scored = ours()
        one_core = {
            "training": take_from(ours().train_batches),
            "evaluation": take_from(lambda _: scored.eval_batches()),
            "training without RandAugment": take_from(ours(layers=0).train_batches),
            "decoding alone": lambda: len(
                [decode(bytearray(Path(files.path(n)).read_bytes())) for n in draw()]
            ),
        }
        theirs = {
            use: lambda images=images: len(fast_collate([images[n] for n in draw()])[0])
            for use, images in timm_sets.items()
        }
        # In CPU seconds of one process with one thread, on which other programs have no influence.
        single, small, threads = beside_timm(one_core, theirs), small_rows(), torch.get_num_threads()
        torch.set_num_threads(1)
        take_turns(single, options.repetitions, stopwatch(None))
        take_turns(small, options.repetitions, stopwatch(None))
        torch.set_num_threads(threads)
        sizes = [os.path.getsize(files.path(n)) for n in range(min(2000, len(files)))]
    ours_by_workers = [row for row in by_workers if row.base]
    speeds = {n: row.samples for n, row in zip(counts, ours_by_workers, strict=True) if row.samples}
    speeds = {n: statistics.fmean(samples) for n, samples in speeds.items()}
    rows = [*single, *by_workers, *small]
    text = f"{timing_table(rows, 'images/s', '× timm')}\n"
    text += f"{advice(speeds, options.rate)}\n" if speeds else ""
    print(text)
    processor = machine(cpu)["processor"].lower()
    families = ("xeon", "epyc", "ryzen", "core", "apple", "neoverse")
    family = next((family for family in families if family in processor), platform.machine())
    write_results(
        f"data-{cores}-core-{family}", options, cpu, text, rows, mean_file_bytes=statistics.fmean(sizes)
    )


def small_rows() -> list[Row]:
    """Return rows of 32 x 32 training batches: the digits, augmented by us and by timm."""
    ours, theirs, rng = {}, {}, np.random.default_rng(0)
    for label, layers in (("crop and flip", 0), ("crop, flip and RandAugment", 2)):
        label = f"32 x 32, {label}"
        opened = open_data(
            "digits", Plan(batch=512), augment=Augmentation(padding=4, layers=layers, repeats=1)
        )
        ours[label] = take_from(opened.train_batches)
        with contextlib.suppress(ModuleNotFoundError):
            from timm.data.auto_augment import rand_augment_transform
            from timm.data.loader import fast_collate
            from timm.data.transforms import ToNumpy
            from torchvision import transforms

            steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
            if layers:
                steps.append(rand_augment_transform("rand-m7-mstd0.5-inc1", {"img_mean": (128, 128, 128)}))
            images = SmallImages(*opened.tensors("train"), transforms.Compose([*steps, ToNumpy()]))
            theirs[label] = lambda images=images: len(
                fast_collate([images[n] for n in rng.permutation(len(images))[:512]])[0]
            )
    return beside_timm(ours, theirs)


def advice(speeds: dict[int, float], rate: float) -> str:
    """Say how many workers feed a GPU that trains at `rate` images/s; speeds: workers -> images/s."""
    enough = [workers for workers, speed in sorted(speeds.items()) if speed >= rate]
    if enough:
        return f"A GPU that trains at {rate:,.0f} images/s is fed by --workers {enough[0]} here (measured)."
    workers, best = max(speeds.items(), key=lambda entry: entry[1])
    needed = math.ceil(rate * workers / best)
    return (
        f"A GPU that trains at {rate:,.0f} images/s needs --workers {needed} on as many cores: "
        f"{workers} gave {best:,.0f} images/s here, {best / workers:,.0f} each."
    )


# --------------------------------------------------------------------------------------------------
# trial: one trial of the search


@dataclass(frozen=True)
class TrialOptions:
    """Measure seconds of a trial of `search.py` beside the same training in a plain loop."""

    data: str = option("digits", "digits, cifar10 or cifar100: 32 x 32 images")
    model: str = option("nexception_reduced", "the trial's macro-architecture (default: the paper's width)")
    epochs: int = option(1, "epochs of a trial", least=1)
    repetitions: int = option(3, "trials of each kind; they take turns", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    out: str = option("results", "folder of the results")


def plain_trial(config: dict, seed: int, budget: float, settings: dict):
    """Train NEXcepTion as is common: timm's loader, mixup, loss and LAMB in a plain loop.

    Takes and returns what `search.train` does, so that the same process can run either; `config` is ignored.
    """
    from search import trial_options

    import timm.data
    from timm.loss import BinaryCrossEntropy
    from timm.optim import Lamb as TimmLamb

    device = torch.device(settings["device"])
    recipe = trial_options(settings, round(budget), seed, device)
    opened = open_data(settings["data"], size=recipe.size, device=device, root=settings["root"])
    begun = time.perf_counter()
    torch.manual_seed(seed)
    classes = len(opened.classes)
    network = create_model(settings["model"], num_classes=classes, input_size=recipe.size).to(device)
    shape = {"input_size": (3, recipe.size, recipe.size), "batch_size": recipe.batch, "device": device}
    shape |= {"mean": opened.transform.mean, "std": opened.transform.std, "num_workers": 2}
    loader = timm.data.create_loader(
        SmallImages(*opened.tensors("train")), is_training=True, hflip=0.0, scale=(0.8, 1.0), **shape
    )
    scored = timm.data.create_loader(SmallImages(*opened.tensors("val")), is_training=False, **shape)
    mixup = timm.data.Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)
    loss_of = BinaryCrossEntropy(target_threshold=recipe.loss_threshold, smoothing=0.0)
    optimizer = TimmLamb(parameter_groups(network, recipe.weight_decay), lr=recipe.lr)
    for _ in range(recipe.epochs):
        network.train()
        for images, labels in loader:
            images, targets = mixup(images.to(device), labels.to(device))
            loss = loss_of(network(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"diverged: the loss is {loss.item()}")
    network.eval()
    hits = 0
    with torch.no_grad():
        for images, labels in scored:
            hits += (network(images.to(device)).argmax(1) == labels.to(device)).sum().item()
    top1 = 100 * hits / opened.count("val")
    return 1 - top1 / 100, {"top1": top1, "seconds": time.perf_counter() - begun}


def trial(options: TrialOptions) -> None:
    """Run trials of both kinds by turns, each in a warm process of its own; print and write the seconds."""
    device, threads = pick_device(options.device), torch.get_num_threads()
    from search import points, run_trial  # takes seconds, with SMAC

    settings = {"data": options.data, "root": "data", "model": options.model, "batch": 64, "split": "val"}
    settings |= {"device": str(device), "threads": threads, "compile": False, "precision": "auto"}
    settings |= {"objectives": ["accuracy"]}
    job = {"config": points()["NEXcepTion"], "seed": 1, "budget": options.epochs, "settings": settings}
    job |= {"device": str(device), "threads": threads, "time_limit": 1e6, "memory_limit": math.inf}
    job |= {"path": [str(Path(__file__).parent)]}
    rows, runs = [], {}
    for label, target in (("search.py", "search:train"), ("timm's loader, plain loop", "bench:plain_trial")):
        runs[label] = []

        def work(label=label, target=target) -> float:
            outcome = run_trial({**job, "target": target})
            if outcome["status"] != "success":
                raise RunError(f"{label}: {outcome['info']['error']}")
            runs[label].append({key: outcome["info"][key] for key in ("seconds", "top1")})
            print(f"{label}: {runs[label][-1]}", flush=True)
            return outcome["info"]["seconds"]

        rows.append(Row(label, work, base="timm's loader, plain loop"))
    # Trials measure themselves: the start of their processes does not count.
    take_turns(rows, options.repetitions, lambda work: (1, work()), rate=False, warm_up=0)
    text = timing_table(rows, "seconds per trial", "× as fast as the plain loop")
    print(text)
    name = f"search-trial-{device.type}"
    write_results(name, options, device, text, rows, unit="s", runs=runs)


# --------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[Callable, type]] = {  # name -> function of its options, options
    "speed": (speed, SpeedOptions),
    "accuracy": (accuracy, AccuracyOptions),
    "figures": (figures, FiguresOptions),
    "export": (export, ExportOptions),
    "data": (input_speed, DataOptions),
    "trial": (trial, TrialOptions),
}


def main(argv: list[str]) -> int:
    """Run one command; return 0, 1 (it failed), 2 (a mistake of the user's) or 130 (Ctrl-C)."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if not argv or argv[0] not in COMMANDS:
        print(f"bench.py: give a command, one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command, options_class = COMMANDS[argv[0]]
    try:
        options = parse(options_class, argv[1:], prog=f"bench.py {argv[0]}")
        if options.out:
            check_writable(options.out)
        command(options)
    except (UsageError, RunError, KeyboardInterrupt) as error:
        status = 2 if isinstance(error, UsageError) else 1 if isinstance(error, RunError) else 130
        print(f"bench.py {argv[0]}: {str(error) or 'stopped'}", file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    run_script(main)
