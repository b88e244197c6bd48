"""Reproduce the measurements of the paper and the README on this machine.

    python bench.py speed        # throughput of all models in Table 1, timed in turns
    python bench.py accuracy CHECKPOINT imagenet=/data/imagenet/val imagenet-a=/data/imagenet-a
    python bench.py figures      # the paper's figures 2 and 3; with measured speed: results/speed-*.json
    python bench.py export CHECKPOINT
    python bench.py data FOLDER  # images/s of the input pipeline and of timm's; workers needed to feed a GPU
    python bench.py lamb         # steps/s of LAMB, timm's LAMB and PyTorch's AdamW
    python bench.py trial        # seconds per trial of search.py, and of a plain loop with timm's loader
    python bench.py samplers RUN # SMAC, Hyperband and random search on the trials of a random search
    python bench.py versions OTHER # whole commands of this checkout and of another one

`python bench.py COMMAND --help` lists the options of a command. Results go to `results/`: JSON with every
sample, versions, hardware and the command line, and a Markdown table. On two CPU cores, all of Table 1 takes
about half an hour in float32, most other commands a few minutes.

Rows to be compared are timed alternately in one run (see `take_turns`), so that other load affects them
alike; ratios are computed within each repetition.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from data import (
    SMALL_SETS,
    Augmentation,
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
)
from train import (
    Lamb,
    amp_dtype,
    bce_loss,
    check_channels,
    evaluate,
    machine,
    option,
    parameter_groups,
    parse,
    pick_device,
    run_script,
    save_figure,
    subplots,
)

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TURN_SECONDS = 0.1  # minimum of a turn of `speed`, in which short passes are repeated
WORKER_SECONDS = 6.0  # of a turn of `data` with worker processes

# --------------------------------------------------------------------------------------------------
# Timing: rows that take turns


@dataclass
class Row:
    """Code to be timed and its measurements; the JSON files contain every field that is set."""

    label: str
    work: Callable[[], float] | None = None  # one turn; returns the number of units (images, trials) done
    before: Callable[[], object] | None = None  # called before each turn, not timed
    base: str = ""  # label of the row to compare with
    missing: str = ""  # reason if there are no samples
    samples: list[float] = field(default_factory=list)  # one per repetition
    ratio: dict | None = None  # speed relative to `base`: mean, deviation, median
    # Set by `speed` only:
    name: str = ""  # key of Table 1 or MODELS, JSON file, timm's name, or MODULE:CALLABLE
    size: int = 0  # input pixels per side
    batch: int = 0
    passes: int = 0  # per turn
    parameters: int = 0
    macs: int = 0  # of convolutions and linear layers, for one image
    attention_macs: int = 0  # of the matrix products inside attention
    memory: int = 0  # peak bytes of a pass on a GPU, including weights and optimizer state
    paper: dict | None = None  # the paper's row of Table 1

    def to_dict(self) -> dict:
        code = ("work", "before")
        return {k: v for k, v in vars(self).items() if k not in code and v not in (None, "", [], 0)}


def stopwatch(device: torch.device | None) -> Callable:
    """Return a function that runs `work()` and returns its result and the seconds it took.

    It synchronizes with the device before and after. device None: CPU time of this process, which other
    programs do not affect.
    """
    read = time.process_time if device is None else time.perf_counter
    asynchronous = device is not None and device.type != "cpu"
    wait = partial(torch.accelerator.synchronize, device) if asynchronous else lambda: None

    def timed(work):
        wait()
        begun = read()
        result = work()
        wait()
        return result, read() - begun

    return timed


def take_turns(rows: list[Row], repetitions: int, timed: Callable, *, rate=True, warm_up=1) -> None:
    """Time every row once per repetition, in random order; set the samples and ratios.

    timed: a `stopwatch`. rate: samples are units per second, else seconds per unit. warm_up: repetitions at
    the start that are not recorded. A row that fails is dropped, with the reason in `missing`; only
    UsageError and RunError stop the run. Ctrl-C keeps the finished repetitions.
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
                    measured.append((row, units / seconds if rate else seconds / units))
                except (UsageError, RunError):
                    raise
                except Exception as error:
                    row.missing, row.samples = failure(error), []
                    running.remove(row)
            done += 1
            for row, sample in measured if done > 0 else ():
                row.samples.append(sample)
    except KeyboardInterrupt:
        if done <= 0:
            raise
        print(f"stopped: {done} of {repetitions} repetitions are kept")
    if not any(row.samples for row in rows):
        raise RunError("; ".join(f"{row.label}: {row.missing}" for row in rows))
    compare(rows, rate)


def compare(rows: list[Row], rate: bool = True) -> None:
    """Set each row's speed relative to its `base`, from the pairs of samples in each repetition."""
    samples = {row.label: row.samples for row in rows}
    for row in rows:
        if row.samples and samples.get(row.base):
            pairs = zip(row.samples, samples[row.base], strict=True)
            ratios = [ours / base if rate else base / ours for ours, base in pairs]
            mean, deviation = mean_and_deviation(ratios)
            row.ratio = {"mean": mean, "deviation": deviation, "median": statistics.median(ratios)}


def mean_and_deviation(samples: list[float]) -> tuple[float, float]:
    return statistics.fmean(samples), statistics.stdev(samples) if len(samples) > 1 else 0.0


def failure(error: Exception) -> str:
    """Return the reason for a missing row; print the traceback unless it is a missing package."""
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}"
    traceback.print_exception(error)
    return f"fails, {type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --------------------------------------------------------------------------------------------------
# Results: one record, one table, one writer


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, padded to be readable as text, without empty columns."""
    columns = []
    for head, *cells in zip(header, *rows, strict=True):
        if any(cells):
            width = max(map(len, (head, *cells)))
            align, rule = (str.rjust, "-" * (width - 1) + ":") if columns else (str.ljust, "-" * width)
            columns.append([align(head, width), rule, *(align(cell, width) for cell in cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*columns, strict=True))


def timing_cells(row: Row) -> list[str]:
    """Return mean ± standard deviation, median and ratio ± standard deviation, or why the row is missing."""
    if not row.samples:
        return [row.missing, "", ""]
    mean, deviation = mean_and_deviation(row.samples)
    digits = 0 if mean >= 100 else 1 if mean >= 10 else 2
    median = f"{statistics.median(row.samples):,.{digits}f}"
    ratio = "{mean:.2f} ± {deviation:.2f}".format(**row.ratio) if row.ratio else ""
    return [f"{mean:,.{digits}f} ± {deviation:,.{digits}f}", median, ratio]


def write_results(name: str, options, device: torch.device, text: str, rows: list, **more) -> Path:
    """Write `name`.json (all measurements) and `name`.md (`text`) to `options.out`; return their common stem.

    Results of other options are not overwritten: the name then ends in -2, -3, ...
    """
    ours = json.loads(json.dumps(asdict(options)))
    for number in itertools.count(1):
        stem = Path(options.out) / (name if number == 1 else f"{name}-{number}")
        path = stem.with_name(stem.name + ".json")
        if not path.exists() or json.loads(path.read_text()).get("options") == ours:
            break
    record = {"machine": machine(device), "options": ours, **more}
    record["rows"] = [row.to_dict() if isinstance(row, Row) else row for row in rows]
    write_whole(path, json.dumps(record, indent=1) + "\n")
    write_whole(stem.with_name(stem.name + ".md"), f"`{record['machine']['command']}`\n\n{text}")
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

# Table 3, the paper's models: top-1 in % on ImageNet-A, -R and -Sketch; Table 1 has that of ImageNet.
TABLE_3 = {
    "nexception_t": {"imagenet-a": 17.65, "imagenet-r": 45.99, "imagenet-sketch": 34.73},
    "nexception_tp": {"imagenet-a": 22.75, "imagenet-r": 47.37, "imagenet-sketch": 34.70},
    "nexception_s": {"imagenet-a": 21.36, "imagenet-r": 47.82, "imagenet-sketch": 36.60},
    "xception": {"imagenet-a": 9.83, "imagenet-r": 40.79, "imagenet-sketch": 29.88},
}


# --------------------------------------------------------------------------------------------------
# Models: ours, the paper's peers, the user's own


def isotropic_convnext(size: int) -> nn.Module:
    """ConvNeXt-S (isotropic): 16 × 16 stem, 18 blocks of width 384 ("A ConvNet for the 2020s", 3.3)."""
    from torchvision.models.convnext import CNBlock

    stem, blocks = nn.Conv2d(3, 384, kernel_size=16, stride=16), [CNBlock(384, 1e-6, 0.0) for _ in range(18)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(384, eps=1e-6), nn.Linear(384, 1000)
    return nn.Sequential(stem, *blocks, *head)


class NatBlock(nn.Module):
    """A block of "Neighborhood Attention Transformer": attention over 7 × 7 neighbours, then an MLP.

    Without the relative position bias (0.02M parameters), which natten dropped in release 0.17.
    """

    def __init__(self, width: int, mlp_ratio: float):
        from natten import NeighborhoodAttention2D

        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.attention = NeighborhoodAttention2D(width, num_heads=width // 32, kernel_size=7)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Nat(nn.Sequential):
    """NAT: four stages of `NatBlock`, each after 3 × 3 convolutions of stride 2 (its paper, table 1)."""

    def __init__(self, depths: tuple[int, ...], width: int, mlp_ratio: float):
        from torchvision.ops import Permute

        layers = [nn.Conv2d(3, width // 2, 3, 2, 1), nn.Conv2d(width // 2, width, 3, 2, 1)]
        for stage, depth in enumerate(depths):
            if stage:
                layers += [Permute([0, 3, 1, 2]), nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)]
                width *= 2
            layers += [Permute([0, 2, 3, 1]), nn.LayerNorm(width)]
            layers += [NatBlock(width, mlp_ratio) for _ in range(depth)]
        layers += [nn.LayerNorm(width), Permute([0, 3, 1, 2])]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def small_vit(size: int) -> nn.Module:
    """ViT-S/16, which is DeiT-S: width 384, six heads, twelve layers."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(size, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)


HAND_BUILT = {  # key of Table 1 -> function of the input size
    "vit_small": small_vit,
    "deit_small": small_vit,
    "convnext_small_isotropic": isotropic_convnext,
    "nat_mini": lambda size: Nat((3, 4, 6, 5), 64, 3.0),
    "nat_tiny": lambda size: Nat((3, 4, 18, 5), 64, 3.0),
    "nat_small": lambda size: Nat((3, 4, 18, 5), 96, 2.0),
}


def find_model(spec: str) -> tuple[str, int, Callable[[], nn.Module]]:
    """Look up `NAME` or `NAME@SIZE`; return the name, the input size and a function that builds the model.

    NAME is a key of Table 1 or MODELS, a JSON config, a model of torchvision or timm, or the user's own
    MODULE:CALLABLE, also from the current folder. Raises UsageError if there is no such model.
    """
    import torchvision.models  # takes a second to import

    name, _, size = spec.partition("@")
    if size and not (size.isdecimal() and int(size) >= 32):
        raise UsageError(f"{spec!r}: the input size after @ must be a whole number of pixels, at least 32")
    default = TABLE_1[name].size if name in TABLE_1 else 224
    if name in HAND_BUILT:
        make = partial(HAND_BUILT[name], int(size or default))
    elif name in MODELS or name.endswith(".json"):
        default = (MODELS.get(name) or ModelConfig.from_json(name)).input_size
        make = partial(create_model, name)
    elif ":" in name:
        module, _, function = name.partition(":")
        sys.path.append(os.getcwd())
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(f"{name}: {error}") from error
    elif name in torchvision.models.list_models(torchvision.models):
        make = partial(torchvision.models.get_model, name, weights=None)
    elif importlib.util.find_spec("timm") and (timm := importlib.import_module("timm")).is_model(name):
        default = timm.get_pretrained_cfg(name).input_size[-1]
        make = partial(timm.create_model, name)
    else:
        known = ", ".join({**TABLE_1, **MODELS})
        raise UsageError(f"unknown model {name!r}: choose from torchvision, timm (if installed) or {known}")
    return name, int(size or default), make


# --------------------------------------------------------------------------------------------------
# speed: Table 1's throughput


@dataclass(frozen=True)
class SpeedOptions:
    """Measure images/s of NEXcepTion and its peers, timed in turns.

    Ratios refer to ConvNeXt-T, or without it to the first model.
    """

    models: tuple[str, ...] = option(
        (),
        "NAME or NAME@SIZE,...: keys of Table 1, our models, torchvision's, timm's, JSON configs, your own "
        "MODULE:CALLABLE (default: all of Table 1)",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option("", "autocast type (default: float32, on a GPU a 16-bit type)", choices=DTYPES)
    batch: int = option(0, "images per batch, halved when out of memory (default: 256, on a CPU 16)", least=0)
    repetitions: int = option(30, "timed turns per model", least=1)
    train: bool = option(False, "time forward, backward and a LAMB step instead of evaluation")
    compile: bool = option(False, "compile every model (evaluation: with inductor's freezing, and --fuse)")
    fuse: bool = option(False, "fold NEXcepTion's batch norms into its convolutions")
    out: str = option("results", "folder of the results")


@cache
def random_images(count: int, size: int, device: torch.device) -> torch.Tensor:
    """Return random images, float32 (count, 3, size, size), channels last, shared by models of one size."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    return pixels.to(device, memory_format=torch.channels_last)


def prepare(row: Row, make: Callable[[], nn.Module], options: SpeedOptions) -> None:
    """Build the row's model, count its operations, warm it up, and set the row's `before` and `work`.

    The batch is halved until it fits into memory. The weights are random, with a fixed seed.
    """
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    torch.manual_seed(0)
    model = make()
    row.parameters = count_parameters(model)
    if not isinstance(model, Nat):  # natten's kernels do not run on the meta device, where MACs are counted
        row.macs, row.attention_macs = (count_macs(model, row.size, attention) for attention in (False, True))
    if options.fuse and isinstance(model, NEXcepTion):
        model = fuse(model)
    model.to(device, memory_format=torch.channels_last).train(options.train)
    network = model
    if options.compile:
        network = torch.compile(model, dynamic=False) if options.train else compile_frozen(model)
    optimizer = Lamb(parameter_groups(model, 0.02), lr=2e-3) if options.train else None

    def step() -> None:
        """Run one forward pass, or forward, backward and optimizer step."""
        amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with torch.set_grad_enabled(options.train), amp:
            logits = network(images)
        if options.train:
            bce_loss(logits, torch.zeros_like(logits), 0.2).backward()
            optimizer.step()
            optimizer.zero_grad()

    def turn() -> int:
        for _ in range(row.passes):
            step()
        return row.passes * row.batch

    row.batch = options.batch
    while True:
        try:
            images = random_images(row.batch, row.size, device)
            step()
            if device.type == "cuda":
                held = [*model.parameters(), *model.buffers()]
                held += [t for state in optimizer.state.values() for t in state.values()] if optimizer else []
                held = sum(t.nbytes for t in held if torch.is_tensor(t))
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                step()
                row.memory = torch.cuda.max_memory_allocated(device) - before + held
            break
        except (RuntimeError, MemoryError) as error:
            # PyTorch's CPU allocator raises a plain RuntimeError.
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not memory and "DefaultCPUAllocator" not in str(error):
                raise
        if row.batch == 1:
            row.missing = "out of memory at batch 1"
            return
        row.batch //= 2
        torch.cuda.empty_cache()  # does nothing on a CPU
    if row.batch < options.batch:
        print(f"{row.label}: out of memory at batch {options.batch}, measured at {row.batch}")
    seconds = min(stopwatch(device)(step)[1] for _ in range(2))
    row.passes = max(1, math.ceil(TURN_SECONDS / seconds))
    # An untimed pass refills the caches after another model's turn.
    row.before, row.work = step, turn


def speed(options: SpeedOptions) -> None:
    """Measure, print and write the table of images/s."""
    device = pick_device(options.device)
    options = replace(
        options,
        device=str(device),
        dtype=options.dtype or str(amp_dtype("auto", device) or torch.float32).removeprefix("torch."),
        batch=options.batch or (16 if device.type == "cpu" else 256),
        models=tuple(dict.fromkeys(options.models or TABLE_1)),
        fuse=options.fuse or (options.compile and not options.train),
    )
    if options.train and options.fuse:
        raise UsageError("--fuse is for evaluation: leave it out, or leave out --train")
    rows, makers = [], []
    for spec in options.models:  # look all up before building any
        name, size, make = find_model(spec)
        rows.append(Row(spec, name=name, size=size))
        makers.append(make)
        if name in TABLE_1 and size == TABLE_1[name].size:
            rows[-1].label, rows[-1].paper = TABLE_1[name].label, asdict(TABLE_1[name])

    if device.type == "cpu":
        keep_large_buffers()
    if options.compile and options.train:  # as in compile_frozen; halving the batch adds a shape
        from torch._dynamo import config as dynamo_config

        dynamo_config.recompile_limit = 2**16
        dynamo_config.fail_on_recompile_limit_hit = True
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # pick the fastest algorithms while warming up
        torch.backends.cuda.matmul.allow_tf32 = True  # in float32, as in cuDNN's convolutions by default
    for row, make in zip(rows, makers, strict=True):
        try:
            prepare(row, make, options)
        except Exception as error:  # the other models are still measured
            row.missing = failure(error)
        print(f"{row.label}: {row.missing or 'ready'}", file=sys.stderr)
    take_turns(rows, options.repetitions, stopwatch(device), warm_up=0)
    timed = [row for row in rows if row.samples]
    base = next((row for row in timed if row.name == "convnext_tiny"), timed[0])
    for row in timed:
        row.base = base.label
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
    text = f"{speed_table(rows, base, options.batch)}\n{method}"
    where = re.sub(r"\W+", "-", here["gpu"].lower()) if "gpu" in here else device.type
    flags = [flag for flag in ("train", "compile", "fuse") if getattr(options, flag)]
    name = "-".join(["speed", where, options.dtype, *flags])
    print(f"\n{text}")
    stem = write_results(name, options, device, text, rows, method=method, baseline=base.label)
    print(f"written: {stem}.json, {stem}.md")


def speed_table(rows: list[Row], base: Row, batch: int) -> str:
    """Return the Markdown table; a row's batch is shown if it is below `batch`, the requested one.

    MACs are those of convolutions and linear layers, + those of the matrix products inside attention.
    """
    header = ["", "input", "params", "MACs", "paper's", "batch", "memory", "images/s", "median"]
    lines = []
    for row in rows:
        params = f"{row.parameters / 1e6:.1f}M" if row.parameters else ""
        macs = f"{row.macs / 1e9:.2f}G" if row.macs else ""
        macs += f" + {row.attention_macs / 1e9:.2f}G" if row.attention_macs else ""
        paper = "{parameters}M, {macs}G".format(**row.paper) if row.paper else ""
        lowered = str(row.batch) if row.samples and row.batch < batch else ""
        memory = f"{row.memory / 2**20:.0f} MiB" if row.memory else ""
        both = row.samples and row.paper and base.paper
        paper_ratio = f"{row.paper['speed'] / base.paper['speed']:.2f}" if both else ""
        facts = [str(row.size), params, macs, paper, lowered, memory]
        lines.append([row.label, *facts, *timing_cells(row), paper_ratio])
    return markdown_table([*header, f"× {base.label}", "paper's ×"], lines)


# --------------------------------------------------------------------------------------------------
# accuracy: top-1 and top-5 of a checkpoint, also on Table 3's robustness sets


@dataclass(frozen=True)
class AccuracyOptions:
    """Measure the top-1 and top-5 accuracy of a checkpoint on image folders.

    For folders with a subset of the model's classes (ImageNet-A, -R), predictions are restricted to it.
    """

    checkpoint: str = option(MISSING, "train.py's, the authors' or timm's xception", positional=True)
    folders: tuple[str, ...] = option(
        MISSING,
        "folders of class folders, PATH or NAME=PATH; the names imagenet, imagenet-a, imagenet-r and "
        "imagenet-sketch add the paper's figures",
        positional=True,
    )
    classes: str = option("", "class names in output order: a folder of class folders or a text file")
    size: int = option(0, "input pixels per side (default: the checkpoint's)", least=0)
    crop_pct: float = option(0.0, "crop / resized shorter side (default: the checkpoint's)", least=0, most=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option("float32", "autocast type", choices=DTYPES)
    batch: int = option(64, "images per batch", least=1)
    workers: int | None = option(None, "data-loading processes (default: one per core)", least=0)
    out: str = option("results", "folder of the results")


def read_classes(source: str) -> list[str]:
    """Read class names in output order: sub-folders in natural order, or the lines of a file."""
    path = Path(source)
    if path.is_dir():
        names = sorted((entry.name for entry in path.iterdir() if entry.is_dir()), key=natural_key)
    elif path.is_file():
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if all(re.match(r"n\d{8}\b", name) for name in names):  # ImageNet's lists: `n01440764 tench, ...`
            names = [name.split()[0] for name in names]
    else:
        raise UsageError(f"--classes {source}: neither a folder nor a file")
    if len(set(names)) < len(names):
        raise UsageError(f"--classes {source}: a name appears twice")
    return names


def class_columns(classes, outputs: int, folder: str, names: tuple[str, ...]) -> torch.Tensor:
    """Return the output index of each class folder in `names`, int64.

    classes: names of the outputs; None if unknown, and the folder must then hold all classes in output order.
    """
    if classes is None and len(names) != outputs:
        raise UsageError(
            f"{folder} has {len(names)} class folders and the model {outputs} outputs without names: "
            "give --classes FOLDER_OR_FILE"
        )
    classes = list(classes or names)
    if len(classes) != outputs:
        raise UsageError(f"{len(classes)} class names for a model with {outputs} outputs: check --classes")
    if unknown := [name for name in names if name not in classes]:
        shown = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise UsageError(f"{folder}: no class of the model is called {shown}")
    return torch.tensor([classes.index(name) for name in names])


def accuracy(options: AccuracyOptions) -> None:
    """Evaluate on every folder; print and write the table."""
    device = pick_device(options.device)
    if device.type == "cpu":
        keep_large_buffers()
    model = load_checkpoint(options.checkpoint, fuse=True).to(device, memory_format=torch.channels_last)
    check_channels(model.config, options.checkpoint)
    plain = {"num_classes": 1000, "drop_path": 0.0}  # ignored in recognizing the paper's networks
    ours = replace(model.config, **plain)
    key = next((key for key, config in MODELS.items() if replace(config, **plain) == ours), "")
    asked = {"size": options.size, "crop_pct": options.crop_pct}
    transform = replace(model.transform, **{name: value for name, value in asked.items() if value})
    classes = read_classes(options.classes) if options.classes else model.classes
    settings = {"train": False, "transform": transform, "device": device, "workers": options.workers}
    sets = []
    for text in options.folders:  # open all and match their classes before evaluating any
        name, _, path = text.partition("=")
        if not path or "/" in name:
            name, path = Path(text).name, text
        folder = open_data(path, Plan(batch=options.batch), **settings)
        columns = class_columns(classes, model.num_classes, path, folder.classes)
        sets.append((name, path, folder, columns.to(device)))

    published = {"imagenet": TABLE_1[key].top1, **TABLE_3[key]} if key in TABLE_3 else {}
    file = Path(options.checkpoint).absolute()
    in_run = file.stem in ("best", "last", "previous") and (file.parent / "config.json").exists()
    result_name = f"accuracy-{file.parent.name if in_run else file.stem}"  # the run's name rather than `best`
    shown = f"{options.checkpoint}: {transform.size} pixels, {transform.crop_pct:.3g} of the resized shorter "
    shown += f"side, {transform.interpolation}, {options.dtype}"
    amp = None if options.dtype == "float32" else DTYPES[options.dtype]
    rows, cells = [], []
    for name, path, folder, columns in sets:
        found = evaluate(model, folder, "val", amp, columns=columns)
        folder.close()
        paper = published.get(name.lower())
        rows.append({"set": name, "folder": path, "classes": len(columns), **found, "paper_top1": paper})
        top1, top5 = f"{found['top1']:.2f}", f"{found['top5']:.2f}"
        cells.append([name, f"{found['count']:,}", str(len(columns)), top1, str(paper or ""), top5])
        table = markdown_table(["set", "images", "classes", "top-1, %", "paper's", "top-5, %"], cells)
        text = f"{shown}\n\n{table}"
        # Written after each set, so that results are kept if a later set fails.
        write_results(result_name, options, device, text, rows, transform=asdict(transform))
    print(text)


# --------------------------------------------------------------------------------------------------
# figures: the paper's figures 2 and 3


@dataclass(frozen=True)
class FiguresOptions:
    """Draw the paper's figures 2 and 3: accuracy against MACs and throughput, bubble area = parameters.

    Figure 3 is drawn from the paper's throughput, and again from that measured in each given file.
    """

    results: tuple[str, ...] = option((), "JSON files written by `bench.py speed`", positional=True)
    out: str = option("results", "folder of the figures, SVG and PNG")


COLOURS = {"NEXcepTion": "#c0392b", "conv": "#5b93bd", "transformer": "#d9a441"}
AREA_PER_MILLION = 11.0  # points²: 50M parameters make a bubble 26 points wide


def figures(options: FiguresOptions) -> None:
    """Draw figures 2 and 3 from the paper's table, and figure 3 from each results file."""
    macs = {key: float(row.macs) for key, row in TABLE_1.items()}
    speeds = {key: float(row.speed) for key, row in TABLE_1.items()}
    pictures = [(f"figure-3-{Path(p).stem.removeprefix('speed-')}", *measured(p)) for p in options.results]
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
            if row.get("samples") and row["name"] in TABLE_1
            if not row.get("variant")  # in older files: other settings of the same model
            if row["size"] == TABLE_1[row["name"]].size  # the paper's accuracy holds at this size only
        }
        how = [f"batch {options['batch']}", options["dtype"]]
        how += [word for word in ("compile", "fuse") if options.get(word)]
        title = f"{'trained ' if options['train'] else ''}images/s (measured: "
        title += f"{here.get('gpu') or str(here['threads']) + ' CPU threads'}, {', '.join(how)})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a results file of `bench.py speed`: {error!r}") from error
    if not speeds:
        raise UsageError(f"{path} has no measured model of the paper's Table 1")
    return speeds, title


def draw(values: dict[str, float], title: str, stem: Path) -> list:
    """Write `stem`.svg and .png with a labelled bubble for each key of `values`; return the labels."""
    from adjustText import adjust_text

    figure, (axes,) = subplots(1, 8.3, 5.6)
    figure.set_dpi(200)
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
    lines = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6}
    # Limited by iterations, as a limit in seconds would not be reproducible.
    adjust_text(texts, xs, ys, objects=bubbles, ax=axes, arrowprops=lines, expand=(1.05, 1.15), iter_lim=150)
    for suffix in (".svg", ".png"):
        save_figure(figure, stem.with_name(stem.name + suffix))
    print(f"written: {stem}.svg, {stem}.png")
    return texts


# --------------------------------------------------------------------------------------------------
# export: files for other runtimes


@dataclass(frozen=True)
class ExportOptions:
    """Export a checkpoint with torch.export and to ONNX, and check both against the eager outputs."""

    checkpoint: str = option(MISSING, "train.py's, the authors' or timm's xception", positional=True)
    size: int = option(0, "input pixels per side (default: the checkpoint's)", least=0)
    out: str = option("", "folder of the files (default: the checkpoint's)")


def export(options: ExportOptions) -> None:
    """Write NAME.pt2, NAME.onnx (both with a dynamic batch size) and NAME.export.json (classes, transform).

    Batch norms are folded first. Files whose outputs differ from the checkpoint's are not written.
    """
    model = load_checkpoint(options.checkpoint, fuse=True).requires_grad_(False)
    size = options.size or model.transform.size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, model.config.in_channels, size, size, generator=generator)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    exported = {".pt2": (file.getvalue(), lambda x: reloaded(x).numpy())}
    packages = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        print(f"no ONNX file, which needs `pip install {' '.join(missing)}`")
    else:
        import onnxruntime

        names = {"input_names": ["images"], "output_names": ["logits"]}
        content = torch.onnx.export(program, (images,), **names, verbose=False)
        content = content.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        exported[".onnx"] = content, lambda x: session.run(None, {"images": x.numpy()})[0]

    stem = Path(options.out or Path(options.checkpoint).parent) / Path(options.checkpoint).stem
    with torch.no_grad():
        wanted = model(images).numpy()
    for suffix, (content, run) in exported.items():
        path = stem.with_name(stem.name + suffix)
        difference = max(np.abs(run(images[:count]) - wanted[:count]).max() for count in (len(images), 1))
        relative = difference / np.abs(wanted).max()
        if not relative <= 1e-4:
            raise RunError(f"{path} not written: its logits differ from the checkpoint's by {relative:.1e}")
        write_whole(path, content)
        print(f"{path}: logits within {relative:.1e} of the checkpoint's, relative to the largest")
    facts = {"classes": model.classes, "transform": asdict(replace(model.transform, size=size))}
    write_whole(stem.with_name(stem.name + ".export.json"), json.dumps(facts, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------
# data: the input pipeline


@dataclass(frozen=True)
class DataOptions:
    """Measure images/s of the input pipeline and of timm's, on one core and by number of workers."""

    path: str = option(MISSING, "image folder, with or without train/", positional=True)
    repetitions: int = option(20, "timed turns on one core; five with workers", least=1)
    workers: tuple[int, ...] = option((), "worker counts to time (default: 1, 2, 4, ..., all cores)", least=1)
    rate: float = option(1000.0, "GPU training speed in images/s, to estimate the workers it needs", least=0)
    out: str = option("results", "folder of the results")


DATA_BATCH = 64  # images


def take_from(epochs: Callable[[int], Iterator]) -> Callable[[], int]:
    """Return a function that takes the next batch of `epochs(0)`, `epochs(1)`, ... and returns its length."""
    batches = itertools.chain.from_iterable(map(epochs, itertools.count()))
    return lambda: len(next(batches)[0])


def input_speed(options: DataOptions) -> None:
    """Time the input pipeline; print and write the table and the advice."""
    cores, cpu = cpu_count(), torch.device("cpu")
    counts = options.workers or sorted({2**n for n in range(8) if 2**n < cores} | {cores})
    keep_large_buffers()  # as training on a CPU does
    with contextlib.ExitStack() as stack:
        folder = Path(options.path)
        folder = folder / "train" if (folder / "train").is_dir() else folder
        files = list_images(folder, train=False)["val"]

        def ours(workers: int = 0, **augment):
            settings = {"files": {"train": files, "val": files}, "workers": workers, "max_bad_files": 0}
            augmentation = Augmentation(repeats=1, **augment)
            opened = open_data(folder, Plan(batch=DATA_BATCH), augment=augmentation, **settings)
            stack.callback(opened.close)
            return opened

        timm_sets = {}
        with contextlib.suppress(ModuleNotFoundError):
            from timm.data import create_dataset, create_transform
            from timm.data.loader import fast_collate

            recipe = {"auto_augment": "rand-m7-mstd0.5-inc1", "interpolation": "random", "is_training": True}
            recipes = {"training": recipe, "evaluation": {"interpolation": "bicubic", "crop_pct": 0.95}}
            for use, settings in recipes.items():
                transform = create_transform((3, 224, 224), use_prefetcher=True, **settings)
                timm_sets[use] = create_dataset("", root=str(folder), transform=transform)

        rows, speeds = [], {}
        for n in counts:  # workers first, as they must be forked before this process starts threads
            label = f"training, {n} worker{'s' * (n > 1)}"
            takes = {label: take_from(ours(n).train_batches)}
            if timm_sets:
                loader = torch.utils.data.DataLoader(
                    timm_sets["training"], batch_size=DATA_BATCH, shuffle=True, num_workers=n,
                    collate_fn=fast_collate, drop_last=True, persistent_workers=True,
                )  # fmt: skip
                takes[f"{label}, timm"] = take_from(lambda _, loader=loader: iter(loader))

            def settle(take, n=n):
                # Wait until the other row's workers have filled their queue and are idle, then discard the
                # batches that this row's workers prepared during the other turn.
                time.sleep(WORKER_SECONDS / 4)
                for _ in range(3 * n):
                    take()

            def turn(take) -> int:
                begun, images = time.perf_counter(), 0
                while not images or time.perf_counter() - begun < WORKER_SECONDS:
                    images += take()
                return images

            pair = []
            for name, take in takes.items():
                pair.append(Row(name, partial(turn, take), partial(settle, take)))
            pair[0].base = f"{label}, timm"
            take_turns(pair, 5, stopwatch(cpu))
            rows += pair
            if pair[0].samples:
                speeds[n] = statistics.fmean(pair[0].samples)

        rng = np.random.default_rng(0)

        def drawn() -> list[int]:
            return rng.permutation(len(files))[:DATA_BATCH].tolist()

        def collate(images) -> int:
            return len(fast_collate([images[n] for n in drawn()])[0])

        scored = ours()
        works = {
            "training": take_from(ours().train_batches),
            "evaluation": take_from(lambda _: scored.eval_batches()),
            "training without RandAugment": take_from(ours(policy="none").train_batches),
            "decoding alone": lambda: len(
                [decode(bytearray(Path(files.path(n)).read_bytes())) for n in drawn()]
            ),
        }
        single = []
        for label, work in works.items():
            single.append(Row(label, work, base=f"{label}, timm"))
            if label in timm_sets:
                single.append(Row(f"{label}, timm", partial(collate, timm_sets[label])))
        # CPU time of one process with one thread, which other programs do not affect.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        take_turns(single, options.repetitions, stopwatch(None))
        torch.set_num_threads(threads)
        sizes = [os.path.getsize(files.path(n)) for n in range(min(2000, len(files)))]
    rows = [*single, *rows]
    table = [[row.label, *timing_cells(row)] for row in rows]
    text = markdown_table(["", "images/s", "median", "× timm"], table)
    if speeds:
        most, best = max(speeds.items(), key=lambda item: item[1])
        enough = [n for n, speed in sorted(speeds.items()) if speed >= options.rate]
        needed = enough[0] if enough else math.ceil(options.rate * most / best)
        text += f"\nA GPU that trains at {options.rate:,.0f} images/s needs --workers {needed}, "
        text += "as measured.\n" if enough else f"extrapolated from {most}.\n"
    print(text)
    mean = statistics.fmean(sizes)
    write_results(f"data-{cores}-core", options, cpu, text, rows, mean_file_bytes=mean)


# --------------------------------------------------------------------------------------------------
# lamb: a step of the optimizer


@dataclass(frozen=True)
class LambOptions:
    """Time a step of LAMB beside timm's and PyTorch's fused AdamW, in turns."""

    model: str = option("nexception_t", "one of MODELS or a JSON config, whose parameters are updated")
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    repetitions: int = option(20, "timed turns of each", least=1)
    out: str = option("results", "folder of the results")


def lamb(options: LambOptions) -> None:
    """Time the optimizers on parameters of their own with random gradients; print and write the table."""
    device, label = pick_device(options.device), "LAMB"
    optimizers = {label: Lamb, "AdamW, PyTorch's fused": partial(torch.optim.AdamW, fused=True)}
    with contextlib.suppress(ModuleNotFoundError):
        from timm.optim import Lamb as TimmLamb

        optimizers["LAMB, timm's"] = TimmLamb
    rows = []
    for name, make in optimizers.items():
        torch.manual_seed(0)
        model = create_model(options.model).to(device, memory_format=torch.channels_last)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        step = make(parameter_groups(model, 0.02), lr=2e-3).step
        rows.append(Row(name, lambda step=step: step() or 1, before=step, base=label))
    take_turns(rows, options.repetitions, stopwatch(device))
    header = ["", "steps/s", "median", "× as fast as ours"]
    text = markdown_table(header, [[row.label, *timing_cells(row)] for row in rows])
    print(text)
    name = f"lamb-{Path(options.model).stem}-{device.type}"
    write_results(name, options, device, text, rows, unit="steps/s")


# --------------------------------------------------------------------------------------------------
# trial: one trial of the search


@dataclass(frozen=True)
class TrialOptions:
    """Measure the seconds per trial of `search.py` and of the same training in a plain loop."""

    data: str = option("digits", "data set", choices=SMALL_SETS)
    model: str = option("nexception_reduced", "network that sets the macro-architecture")
    epochs: int = option(1, "epochs per trial", least=1)
    repetitions: int = option(3, "trials of each kind", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    out: str = option("results", "folder of the results")


class SmallImages(torch.utils.data.Dataset):
    """A split of a small set as (PIL image, label) pairs, as timm's loader expects."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images.permute(0, 2, 3, 1).cpu().numpy(), labels.tolist()
        self.transform = None  # set by timm's loader

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def plain_trial(config: dict, seed: int, budget: float, settings: dict):
    """Train NEXcepTion with timm's loader, mixup, loss and LAMB in a plain loop.

    The interface is that of `search.train_config`, so that the same processes run both; `config` is ignored.
    """
    from search import trial_options

    import timm.data
    from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
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
    mixes = float(recipe.mixup + recipe.cutmix > 0)
    mixup = timm.data.Mixup(recipe.mixup, recipe.cutmix, prob=mixes, label_smoothing=0.0, num_classes=classes)
    loss_of = SoftTargetCrossEntropy()
    if recipe.loss == "bce":
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
    network.eval()
    hits = 0
    with torch.no_grad():
        for images, labels in scored:
            hits += (network(images.to(device)).argmax(1) == labels.to(device)).sum().item()
    top1 = 100 * hits / opened.count("val")
    return 1 - top1 / 100, {"top1": top1, "seconds": time.perf_counter() - begun}


def trial(options: TrialOptions) -> None:
    """Time trials of both kinds in turns, each in its own warm process; print and write the table."""
    device, threads = pick_device(options.device), torch.get_num_threads()
    from search import points, run_trial, trial_settings  # takes seconds, with SMAC

    settings = trial_settings({"data": options.data, "model": options.model, "device": str(device)})
    job = {"config": points()["NEXcepTion"], "seed": 1, "budget": options.epochs, "settings": settings}
    job |= {"device": str(device), "threads": threads, "time_limit": 1e6, "memory_limit": math.inf}
    runs = []

    def run(target: str) -> float:
        outcome = run_trial({**job, "target": target})
        if outcome["status"] != "success":
            raise RunError(f"{target}: {outcome['info']['error']}")
        runs.append({"target": target, **{key: outcome["info"][key] for key in ("seconds", "top1")}})
        print(runs[-1], flush=True)
        return outcome["info"]["seconds"]

    plain = "timm's loader, plain loop"
    rows = [Row("search.py", partial(run, "search:train_config"), base=plain)]
    rows.append(Row(plain, partial(run, "bench:plain_trial"), base=plain))
    # The seconds reported by the trials exclude starting their processes.
    take_turns(rows, options.repetitions, lambda work: (1, work()), rate=False, warm_up=0)
    header = ["", "seconds per trial", "median", "× as fast as the plain loop"]
    text = markdown_table(header, [[row.label, *timing_cells(row)] for row in rows])
    print(text)
    write_results(f"search-trial-{device.type}", options, device, text, rows, unit="s", runs=runs)


# --------------------------------------------------------------------------------------------------
# samplers: SMAC, Hyperband and random search on finished trials


@dataclass(frozen=True)
class SamplersOptions:
    """Compare the samplers of search.py on finished trials, which are looked up instead of trained."""

    run: str = option(MISSING, "folder of a `search.py --sampler random` run", positional=True)
    seeds: int = option(10, "searches per sampler", least=2)
    epochs: int = option(450, "epochs per search, including trials at low budgets", least=1)
    out: str = option("results", "folder of the results")


SAMPLERS = {  # name -> --sampler, number of budgets
    "SMAC, three budgets": ("smac", 3),
    "SMAC, two budgets": ("smac", 2),
    "SMAC, the highest budget": ("smac", 1),
    "Hyperband, three budgets": ("hyperband", 3),
    "Hyperband, two budgets": ("hyperband", 2),
    "random search": ("random", 1),
}


def simulate(rows: list[dict], settings: dict, epochs: int) -> np.ndarray:
    """Search among finished trials; return the regret after each epoch spent, (epochs,), in points of top-1.

    The regret is the best accuracy of all trials minus the best found so far at the highest budget (at the
    start: minus the worst of all). At a lower budget, a trial returns its accuracy after that many epochs.
    """
    from search import Sampler, short

    known = {short(row["config"]): row for row in rows}
    final = [row["info"]["top1"] for row in rows]
    highest, spent, best, regrets = settings["budgets"][-1], 0, min(final), np.zeros(epochs)
    with tempfile.TemporaryDirectory() as folder:
        sampler = Sampler(Path(folder), settings, [1.0], pool=[row["config"] for row in rows])
        sampler.replay([], {})
        while spent < epochs and (trial := sampler.ask()) is not None:
            row, budget = known[short(dict(trial.config))], round(trial.budget)
            top1 = row["info"]["curve"][budget - 1][1]
            sampler.tell(trial, {**row, "cost": [1 - top1 / 100]})
            regrets[spent : spent + budget] = max(final) - best
            spent += budget
            best = max(best, top1) if budget == highest else best
        regrets[spent:] = max(final) - best
    return regrets


def samplers(options: SamplersOptions) -> None:
    """Run all searches; write their regrets, a figure, and a paired test of each sampler against random."""
    from search import budgets_up_to, rows_of, settings_of, successes

    from scipy.stats import wilcoxon

    folder = Path(options.run)
    settings = settings_of(folder)
    highest = settings["budgets"][-1]
    rows = successes(rows_of(folder), highest)
    budgets = budgets_up_to(highest)
    if len(rows) < 20:
        raise UsageError(f"{folder} has {len(rows)} successful trials of {highest} epochs; 20 are needed")
    regrets = {}
    for name, (sampler, count) in SAMPLERS.items():
        own = settings | {"sampler": sampler, "budgets": budgets[-count:], "priors": []}
        simulated = [simulate(rows, own | {"seed": seed}, options.epochs) for seed in range(options.seeds)]
        regrets[name] = np.stack(simulated)
        print(f"{name}: {np.median(regrets[name][:, -1]):.2f} points from the best", flush=True)
    figure, (axis,) = subplots(1, 6.5, 4)
    epochs, third, table = range(1, options.epochs + 1), options.epochs // 3 - 1, []
    base = regrets["random search"][:, third:].mean(1)
    for name, curves in regrets.items():
        late = curves[:, third:].mean(1)  # without the start, whose large regrets would dominate the mean
        low, median, high = np.quantile(curves, [0.25, 0.5, 0.75], axis=0)
        (line,) = axis.step(epochs, median, where="post", label=name)
        axis.fill_between(epochs, low, high, step="post", color=line.get_color(), alpha=0.15, linewidth=0)
        cells = [f"{median[i]:.2f} ({low[i]:.2f} to {high[i]:.2f})" for i in (third, -1)]
        p = "" if name == "random search" else f"{wilcoxon(late, base).pvalue:.2g}"
        table.append([name, *cells, f"{late.mean():.2f}", p])
    axis.set(xlabel="epochs spent", ylabel="regret, points of top-1", yscale="symlog")
    axis.legend(frameon=False)
    header = ["sampler", *(f"regret after {i} epochs" for i in (third + 1, options.epochs))]
    text = markdown_table([*header, "mean in between", "p against random search"], table)
    print(text)
    values = [
        {"label": name, "mean": c[:, third:].mean(1).tolist(), "last": c[:, -1].tolist()}
        for name, c in regrets.items()
    ]
    stem = write_results("samplers", options, torch.device("cpu"), text, values)
    save_figure(figure, stem.with_name(stem.name + ".png"))


# --------------------------------------------------------------------------------------------------
# versions: whole commands of this checkout and of another one


@dataclass(frozen=True)
class VersionsOptions:
    """Time whole commands of this checkout and of another one, which take turns."""

    other: str = option(MISSING, "another checkout: git worktree add FOLDER COMMIT", positional=True)
    commands: tuple[str, ...] = option((), "which to time: help, first-epoch, ... (default: all)")
    repetitions: int = option(5, "timed turns of each command", least=1)
    out: str = option("results", "folder of the results")


# name -> command line, start of the line of output that stops the clock ("": the end of the command)
COMMAND_LINES = {
    "import-torch": ("-c 'import torch'", ""),
    "help": ("train.py --help", ""),
    "first-epoch": ("train.py --out {out}", "epoch 1/"),
    "four-epochs": ("train.py --out {out} --epochs 4", ""),
    "first-trial": ("search.py --out {out} --data digits", "1 "),
    "ten-trials": ("search.py --out {out} --data digits", "10 "),
}


def time_command(checkout: Path, line: str, ending: str) -> tuple[int, float]:
    """Run a command of a checkout in a new run folder; return 1 and the seconds that it took."""
    begun, said, seconds = time.perf_counter(), [], 0.0
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-u", *shlex.split(line.format(out=out))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=checkout, **pipes) as process:
            for text in process.stdout:
                said.append(text)
                if ending and not seconds and text.lstrip().startswith(ending):
                    seconds = time.perf_counter() - begun
                    process.terminate()
        if not seconds and (ending or process.returncode):
            raise RunError(f"{checkout}: python {line}: {' '.join(''.join(said[-5:]).split())}")
    return 1, seconds or time.perf_counter() - begun


def versions(options: VersionsOptions) -> None:
    """Time each command of both checkouts in turn; print and write the table."""
    checkouts = {"other": Path(options.other).resolve(), "this": Path(__file__).resolve().parent}
    if not (checkouts["other"] / "train.py").is_file():
        raise UsageError(f"{options.other}: not a checkout of this repository (no train.py)")
    if unknown := ", ".join(set(options.commands) - set(COMMAND_LINES)):
        raise UsageError(f"--commands {unknown}: takes {', '.join(COMMAND_LINES)}")
    rows = []
    for name in options.commands or COMMAND_LINES:
        for which, folder in checkouts.items():
            work = partial(time_command, folder, *COMMAND_LINES[name])
            rows.append(Row(f"{name}, {which}", work, base=f"{name}, other"))
    take_turns(rows, options.repetitions, lambda work: work(), rate=False)
    text = markdown_table(
        ["", "seconds", "median", "× as fast"], [[row.label, *timing_cells(row)] for row in rows]
    )
    print(text)
    command = ["git", "-C", str(checkouts["other"]), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    write_results("versions", options, torch.device("cpu"), text, rows, unit="s", other_commit=commit)


# --------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[Callable, type]] = {  # name -> function of its options, options
    "speed": (speed, SpeedOptions),
    "accuracy": (accuracy, AccuracyOptions),
    "figures": (figures, FiguresOptions),
    "export": (export, ExportOptions),
    "data": (input_speed, DataOptions),
    "lamb": (lamb, LambOptions),
    "trial": (trial, TrialOptions),
    "samplers": (samplers, SamplersOptions),
    "versions": (versions, VersionsOptions),
}


def main(argv: list[str]) -> int:
    """Run one command; return 0, 1 (failure), 2 (usage error) or 130 (Ctrl-C)."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if not argv or argv[0] not in COMMANDS:
        print(f"bench.py: give a command, one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command, options_class = COMMANDS[argv[0]]
    made = ""
    try:
        options = parse(options_class, argv[1:], prog=f"bench.py {argv[0]}")
        if options.out:  # created first, to fail before measuring rather than after
            made = "" if os.path.isdir(options.out) else options.out
            try:
                os.makedirs(options.out, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--out {options.out}: {error.strerror}") from None
        command(options)
    except (UsageError, RunError, KeyboardInterrupt) as error:
        status = 2 if isinstance(error, UsageError) else 1 if isinstance(error, RunError) else 130
        if made:
            with contextlib.suppress(OSError):  # it holds results
                os.rmdir(made)
        print(f"bench.py {argv[0]}: {str(error) or 'stopped'}", file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    run_script(main)
