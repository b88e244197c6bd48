"""Reproduce the measurements of the paper and the README on this machine.

    python bench.py speed        # throughput of all models in Table 1, timed in turns
    python bench.py accuracy MODEL imagenet=/data/imagenet/val imagenet-a=/data/imagenet-a
    python bench.py figures      # the paper's figures 2 and 3; with measured speed: results/speed-*.json
    python bench.py export CHECKPOINT
    python bench.py data FOLDER  # images/s of the input pipeline; workers needed to feed a GPU

`python bench.py COMMAND --help` lists the options of a command. Results go to `runs/bench`: JSON with every
sample, versions, hardware and the command line, and a Markdown table. On two CPU cores, all of Table 1 takes
about half an hour in float32, most other commands a few minutes.

Rows to be compared take turns in one run, so that other load affects them alike; ratios are computed within
each repetition.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path

if __name__ == "__main__":  # end without a traceback on Ctrl-C, also during the imports below
    sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)

from data import (
    Augmentation,
    Data,
    EvalTransform,
    Plan,
    RunError,
    UsageError,
    cpu_count,
    import_function,
    list_images,
    open_data,
    read_classes,
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
    read_checkpoint,
    weights_of,
)
from train import (
    AMP,
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
from torch import nn
from tqdm import tqdm

TURN_SECONDS = 0.1  # minimum of a turn of `speed`, in which short passes are repeated
WORKER_SECONDS = 6.0  # of a turn of `data` with worker processes

# --------------------------------------------------------------------------------------------------
# Timing: rows that take turns


@dataclass
class Row:
    """Code to be timed and its measurements; the JSON files contain every field that is set."""

    label: str
    work: Callable[[], float] | None = None  # one turn; returns the number of units (images, steps) done
    before: Callable[[], object] | None = None  # called before each turn, not timed
    base: str = ""  # label of the row to compare with
    missing: str = ""  # reason if there are no samples
    samples: list[float] = field(default_factory=list)  # units per second, one per repetition
    ratio: dict | None = None  # `summary` of the speed relative to `base`


def stopwatch(device: torch.device | None) -> Callable:
    """Return a function that runs `work()` and returns its result and the seconds it took.

    It synchronizes with the device before and after. device None: CPU time of this process, which other
    programs do not affect.
    """
    read = time.perf_counter if device else time.process_time
    asynchronous = device and device.type != "cpu"
    wait = partial(torch.accelerator.synchronize, device) if asynchronous else lambda: None

    def timed(work):
        wait()
        begun = read()
        result = work()
        wait()
        return result, read() - begun

    return timed


def take_turns(rows: list[Row], repetitions: int, timed: Callable) -> None:
    """Time every row once per repetition, in random order; set the samples and the ratios.

    timed: a `stopwatch`. One more repetition warms up. A row that fails is dropped, with the reason in
    `missing`; only UsageError and RunError stop the run. Ctrl-C keeps the finished repetitions.
    """
    order, done = random.Random(0), 0  # finished repetitions
    tqdm.monitor_interval = 0  # its thread would be forked into data-loading processes
    running = [row for row in rows if not row.missing]
    try:
        for _ in tqdm(range(repetitions + 1), disable=None, unit="repetition"):
            for row in order.sample(running, len(running)):
                try:
                    if row.before:
                        row.before()
                    units, seconds = timed(row.work)
                    row.samples.append(units / seconds)
                except (UsageError, RunError):
                    raise
                except Exception as error:
                    row.missing = failure(error)
                    running.remove(row)
            done += 1
    except KeyboardInterrupt:
        if done < 2:
            raise
        print(f"stopped: {done - 1} of {repetitions} repetitions are kept")
    if not running:
        raise RunError("; ".join(f"{row.label}: {row.missing}" for row in rows))
    for row in rows:
        row.samples = [] if row.missing else row.samples[1:done]
    samples = {row.label: row.samples for row in running}
    for row in running:
        if row.base in samples:
            pairs = zip(row.samples, samples[row.base], strict=True)
            row.ratio = summary([ours / base for ours, base in pairs])


def summary(samples: list[float]) -> dict[str, float]:
    """Return mean, standard deviation and median."""
    deviation = statistics.stdev(samples) if len(samples) > 1 else 0.0
    return {"mean": statistics.fmean(samples), "deviation": deviation, "median": statistics.median(samples)}


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
    found = summary(row.samples)
    digits = 0 if found["mean"] >= 100 else 1 if found["mean"] >= 10 else 2
    mean, deviation, median = (f"{value:,.{digits}f}" for value in found.values())
    ratio = "{mean:.2f} ± {deviation:.2f}".format(**row.ratio) if row.ratio else ""
    return [f"{mean} ± {deviation}", median, ratio]


def entry_of(path: Path, key: str):
    """Return the value of `key` in a JSON file, None if there is none or the file is damaged."""
    try:
        return json.loads(path.read_text())[key]
    except (ValueError, TypeError, KeyError):
        return None


def write_results(name: str, options, device: torch.device, text: str, rows: list, **more) -> None:
    """Write `name`.json (all measurements) and `name`.md (`text`) to `options.out`, and say so.

    rows: of Row or dict. Files with results of other options are not overwritten: the name then ends in -2,
    -3, ...
    """
    ours = json.loads(json.dumps(asdict(options)))
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (Path(options.out, f"{name}{ending}.json") for ending in endings)
    path = next(path for path in paths if not path.exists() or entry_of(path, "options") == ours)
    record = {"machine": machine(device), "options": ours, **more, "rows": []}
    for row in rows:  # of a Row, the fields that are set, without its functions
        fields = (row if isinstance(row, dict) else vars(row)).items()
        record["rows"].append({k: v for k, v in fields if v not in (None, "", []) and not callable(v)})
    table = path.with_suffix(".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1) + "\n")
    write_whole(table, f"`{record['machine']['command']}`\n\n{text}")
    print(f"written: {path}, {table}")


# --------------------------------------------------------------------------------------------------
# The paper's tables


@dataclass(frozen=True)
class Published:
    """A row of the paper's Table 1 (appendix): ImageNet-1K, one RTX 2080 Ti, batch 256, mixed precision."""

    label: str
    kind: str  # a key of COLOURS
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
    "nexception_tp": Published("NEXcepTion-TP", "NEXcepTion", 224, "26.6", "4.5", 1428, 9, 81.8),
    "convnext_tiny": Published("ConvNeXt-T", "conv", 224, "29", "4.5", 1125, 5, 82.1),
    "vit_small": Published("ViT-S", "transformer", 224, "22", "4.6", 1330, 8, 79.8),
    "deit_small": Published("DeiT-S", "transformer", 224, "22", "4.6", 1332, 13, 79.8),
    "nexception_t": Published("NEXcepTion-T", "NEXcepTion", 224, "24.5", "4.7", 965, 6, 81.5),
    "nat_small": Published("NAT-S", "transformer", 224, "51", "7.8", 359, 1, 83.7),
    "resnet101": Published("ResNet-101", "conv", 224, "44.5", "7.9", 1157, 6, 81.5),
    "xception": Published("Xception", "conv", 299, "23.6", "8.4", 756, 5, 79.0),
    "nexception_s": Published("NEXcepTion-S", "NEXcepTion", 224, "43.4", "8.5", 772, 3, 82.0),
    "swin_s": Published("Swin-S", "transformer", 224, "50", "8.7", 472, 1, 83.0),
    "convnext_small": Published("ConvNeXt-S", "conv", 224, "50", "8.7", 753, 3, 83.1),
    "efficientnet_v2_s": Published("EfficientNetV2-S", "conv", 384, "22", "8.8", 543, 6, 83.9),
    "efficientnet_b5": Published("EfficientNet-B5", "conv", 456, "30", "9.9", 476, 2, 83.6),
}

# Table 3: top-1 in %, with that of Table 1.
TABLE_3_SETS = ("imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch")
TABLE_3 = {
    "NEXcepTion-T": (81.5, 17.65, 45.99, 34.73),
    "NEXcepTion-TP": (81.8, 22.75, 47.37, 34.70),
    "NEXcepTion-S": (82.0, 21.36, 47.82, 36.60),
    "Xception": (79.0, 9.83, 40.79, 29.88),
    "Swin-T": (81.3, 21.60, 41.30, 29.10),
    "ConvNeXt-T": (82.1, 24.20, 47.20, 33.80),
    "RVT-S": (None, 25.70, 47.70, 34.70),
}


# --------------------------------------------------------------------------------------------------
# Models: ours, the paper's peers, the user's own


def isotropic_convnext(_: int) -> nn.Module:
    """ConvNeXt-S (isotropic): 16 × 16 stem, 18 blocks of width 384 ("A ConvNet for the 2020s", 3.3)."""
    from torchvision.models.convnext import CNBlock

    stem, blocks = nn.Conv2d(3, 384, kernel_size=16, stride=16), [CNBlock(384, 1e-6, 0.0) for _ in range(18)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(384, eps=1e-6), nn.Linear(384, 1000)
    return nn.Sequential(stem, *blocks, *head)


def nat(depths: tuple[int, ...], width: int, mlp_ratio: float) -> nn.Module:
    """NAT ("Neighborhood Attention Transformer", table 1): four stages after 3 × 3 convolutions of stride 2.

    Its blocks are Swin's with attention over 7 × 7 neighbours, here without the relative position bias (0.02M
    parameters), which natten dropped in release 0.17.
    """
    from natten import NeighborhoodAttention2D
    from torchvision.models.swin_transformer import SwinTransformerBlock
    from torchvision.ops import Permute

    def attention(width: int, window: list[int], shift: list[int], heads: int, **_) -> nn.Module:
        return NeighborhoodAttention2D(width, num_heads=heads, kernel_size=7)

    layers = [nn.Conv2d(3, width // 2, 3, 2, 1), nn.Conv2d(width // 2, width, 3, 2, 1)]
    for stage, depth in enumerate(depths):
        if stage:
            layers += [Permute([0, 3, 1, 2]), nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)]
            width *= 2
        layers += [Permute([0, 2, 3, 1]), nn.LayerNorm(width)]
        block = partial(SwinTransformerBlock, width, width // 32, [7, 7], [0, 0], mlp_ratio)
        layers += [block(attn_layer=attention) for _ in range(depth)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)
    return nn.Sequential(*layers, nn.LayerNorm(width), Permute([0, 3, 1, 2]), *head)


def small_vit(size: int) -> nn.Module:
    """ViT-S/16, which is DeiT-S: width 384, six heads, twelve layers."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(size, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)


HAND_BUILT = {  # key of Table 1 -> function of the input size
    "vit_small": small_vit,
    "deit_small": small_vit,
    "convnext_small_isotropic": isotropic_convnext,
    "nat_mini": lambda size: nat((3, 4, 6, 5), 64, 3.0),
    "nat_tiny": lambda size: nat((3, 4, 18, 5), 64, 3.0),
    "nat_small": lambda size: nat((3, 4, 18, 5), 96, 2.0),
}


def find_model(spec: str, pretrained: bool = False) -> tuple[str, int, Callable[[], nn.Module]]:
    """Look up `NAME` or `NAME@SIZE`; return the name, the input size and a function that builds the model.

    NAME is a key of Table 1 or MODELS, a JSON config, a model of torchvision or timm, or the user's own
    MODULE:CALLABLE, also from the current folder. pretrained: with the weights of torchvision or timm.
    Raises UsageError if there is no such model, or there are no such weights.
    """
    import torchvision.models  # takes a second to import

    name, _, size = spec.partition("@")
    if size and not (size.isdecimal() and int(size) >= 32):
        raise UsageError(f"{spec!r}: the input size after @ must be a whole number of pixels, at least 32")
    default = TABLE_1[name].size if name in TABLE_1 else 224
    if pretrained and (name in HAND_BUILT or name in MODELS or name.endswith(".json")):
        raise UsageError(f"{name}: no package has its weights: give a checkpoint file")
    if name in HAND_BUILT:
        make = partial(HAND_BUILT[name], int(size or default))
    elif name in MODELS or name.endswith(".json"):
        config = MODELS.get(name) or ModelConfig.from_json(name)
        default = int(size or config.input_size)
        make = partial(create_model, replace(config, input_size=default))  # refuses too small a size
    elif ":" in name:
        make = import_function(name)
    elif name in torchvision.models.list_models(torchvision.models):
        make = partial(torchvision.models.get_model, name, weights="DEFAULT" if pretrained else None)
    elif importlib.util.find_spec("timm") and (timm := importlib.import_module("timm")).is_model(name):
        default = timm.get_pretrained_cfg(name).input_size[-1]
        make = partial(timm.create_model, name, pretrained=pretrained)
    else:
        known = ", ".join({**TABLE_1, **MODELS})
        raise UsageError(f"unknown model {name!r}: choose from torchvision, timm (if installed) or {known}")
    return name, int(size or default), make


# --------------------------------------------------------------------------------------------------
# speed: Table 1's throughput


def precision_of(amp: str, device: torch.device) -> str:
    """Return the name of the dtype that most of a pass computes in."""
    return str(amp_dtype(amp, device) or torch.float32).removeprefix("torch.")


@dataclass(frozen=True)
class SpeedOptions:
    """Measure images/s of NEXcepTion and its peers, timed in turns.

    Ratios refer to ConvNeXt-T, or without it to the first model.
    """

    models: tuple[str, ...] = option(
        (), "NAME or NAME@SIZE,...: of Table 1 (default: all), ours, torchvision's, timm's, JSON configs, "
        "your own MODULE:CALLABLE",
    )  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    amp: str = option("auto", "mixed precision; auto: bf16 or fp16 on GPUs, off on CPUs", choices=AMP)
    batch: int | None = option(None, "images per batch, halved when out of memory (default: 256, CPU: 16)", 1)
    repetitions: int = option(30, "timed turns per model", least=1)
    train: bool = option(False, "time forward, backward and a LAMB step instead of evaluation")
    compile: bool = option(False, "compile every model (evaluation: with inductor's freezing, and --fuse)")
    fuse: bool = option(False, "fold NEXcepTion's batch norms into its convolutions")
    out: str = option("runs/bench", "folder of the results")


@dataclass
class ModelRow(Row):
    """A model to be timed: what it is, and what a pass costs."""

    name: str = ""  # key of Table 1 or MODELS, JSON file, timm's name, or MODULE:CALLABLE
    size: int = 0  # input pixels per side
    batch: int = 0
    parameters: int = 0
    macs: int = 0  # of convolutions and linear layers, for one image
    attention_macs: int = 0  # of the matrix products inside attention
    memory: int = 0  # peak bytes of a pass on a GPU, including weights and optimizer state
    paper: dict | None = None  # the paper's row of Table 1


@cache
def random_images(count: int, size: int, device: torch.device) -> torch.Tensor:
    """Return random images, float32 (count, 3, size, size), channels last, shared by models of one size."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    return pixels.to(device, memory_format=torch.channels_last)


def prepare(row: ModelRow, make: Callable[[], nn.Module], options: SpeedOptions) -> None:
    """Build the row's model, count its operations, warm it up, and set the row's `before` and `work`.

    The batch is halved until it fits into memory. The weights are random, with a fixed seed.
    """
    device = torch.device(options.device)
    amp = amp_dtype(options.amp, device)
    images = random_images(options.batch, row.size, device)
    on_gpu = device.type == "cuda"
    held = torch.cuda.memory_allocated(device) if on_gpu else 0  # by images and the models before this one
    torch.manual_seed(0)
    model = make()
    row.parameters = count_parameters(model)
    if not row.name.startswith("nat_"):  # natten does not run on the meta device, where MACs are counted
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
        autocast = torch.autocast(device.type, amp, enabled=amp is not None)
        with torch.set_grad_enabled(options.train), autocast:
            logits = network(images[: row.batch])
        if options.train:
            bce_loss(logits, torch.zeros_like(logits), 0.2).backward()
            optimizer.step()
            optimizer.zero_grad()

    def turn() -> int:
        for _ in range(passes):
            step()
        return passes * row.batch

    row.batch = options.batch
    while True:
        try:
            step()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                step()
                row.memory = torch.cuda.max_memory_allocated(device) - held
            break
        except (RuntimeError, MemoryError) as error:
            # PyTorch's CPU allocator raises a plain RuntimeError.
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if row.batch == 1 or not (memory or "DefaultCPUAllocator" in str(error)):
                raise
        row.batch //= 2
        torch.cuda.empty_cache()  # does nothing on a CPU
    seconds = min(stopwatch(device)(step)[1] for _ in range(2))
    passes = max(1, math.ceil(TURN_SECONDS / seconds))
    # An untimed pass refills the caches after another model's turn.
    row.before, row.work = step, turn


def speed(options: SpeedOptions) -> None:
    """Measure, print and write the table of images/s."""
    device = pick_device(options.device)
    options = replace(
        options,
        device=str(device),
        batch=options.batch or (16 if device.type == "cpu" else 256),
        models=tuple(dict.fromkeys(options.models or TABLE_1)),
        fuse=options.fuse or (options.compile and not options.train),
    )
    if options.train and options.fuse:
        raise UsageError("--fuse is for evaluation: leave it out, or leave out --train")
    found = [find_model(spec) for spec in options.models]  # all, before building any
    if device.type == "cpu":
        keep_large_buffers()
    if options.compile and options.train:  # as in compile_frozen; halving the batch adds a shape
        from torch._dynamo import config as dynamo_config

        dynamo_config.recompile_limit = 2**16
        dynamo_config.fail_on_recompile_limit_hit = True
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # pick the fastest algorithms while warming up
        torch.backends.cuda.matmul.allow_tf32 = True  # in float32, as in cuDNN's convolutions by default
    rows = []
    for spec, (name, size, make) in zip(options.models, found, strict=True):
        row = ModelRow(spec, name=name, size=size)
        rows.append(row)
        if name in TABLE_1 and size == TABLE_1[name].size:
            row.label, row.paper = TABLE_1[name].label, asdict(TABLE_1[name])
        try:
            prepare(row, make, options)
        except Exception as error:  # the other models are still measured
            row.missing = failure(error)
        print(f"{row.label}: {row.missing or f'ready, batch {row.batch}'}", file=sys.stderr)
    base = min(rows, key=lambda row: (bool(row.missing), row.name != "convnext_tiny"))
    for row in rows:
        row.base = base.label
    take_turns(rows, options.repetitions, stopwatch(device))
    text = f"{speed_table(rows, base, options.batch)}\n"
    here, precision = machine(device), precision_of(options.amp, device)
    products = " (autocast)" if precision != "float32" else " (products in TF32)" * (device.type == "cuda")
    text += (
        f"{here.get('gpu', here['processor'])}, {here['threads']} CPU threads, torch {here['torch']}, "
        f"{precision}{products}, batch {options.batch}, channels last, "
        f"{'training step (LAMB)' if options.train else 'evaluation'}"
        f"{', compiled' if options.compile else ''}{', batch norms folded' if options.fuse else ''}; "
        f"mean ± standard deviation of {max(len(row.samples) for row in rows)} repetitions in turns.\n"
    )
    print(f"\n{text}")
    where = re.sub(r"\W+", "-", here["gpu"].lower()) if "gpu" in here else device.type
    flags = [flag for flag in ("train", "compile", "fuse") if getattr(options, flag)]
    name = "-".join(["speed", where, precision, *flags])
    write_results(name, options, device, text, rows, precision=precision)


def speed_table(rows: list[ModelRow], base: ModelRow, batch: int) -> str:
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
        lowered = str(row.batch) if row.batch < batch and row.samples else ""
        memory = f"{row.memory / 2**20:.0f} MiB" if row.memory else ""
        both = row.samples and row.paper and base.paper
        ratio = f"{row.paper['speed'] / base.paper['speed']:.2f}" if both else ""
        facts = [row.label, str(row.size), params, macs, paper, lowered, memory]
        lines.append([*facts, *timing_cells(row), ratio])
    return markdown_table([*header, f"× {base.label}", "paper's ×"], lines)


# --------------------------------------------------------------------------------------------------
# accuracy: top-1 and top-5, also on Table 3's robustness sets


@dataclass(frozen=True)
class AccuracyOptions:
    """Measure the top-1 and top-5 accuracy of a model on image folders, beside the paper's Table 3.

    For folders with a subset of the model's classes (ImageNet-A, -R), predictions are restricted to it. A
    model of torchvision or timm has its pretrained weights (or --weights) and their transform, the one that
    MODULE:CALLABLE returns its own weights and an attribute `transform`, an EvalTransform (default: ours).
    """

    model: str = option(
        MISSING, "checkpoint (train.py's, the authors' or timm's xception), model of torchvision or timm, or "
        "your own MODULE:CALLABLE", positional=True,
    )  # fmt: skip
    folders: tuple[str, ...] = option(
        MISSING, "folders of class folders, PATH or NAME=PATH; the names imagenet, imagenet-a, imagenet-r "
        "and imagenet-sketch add the paper's figures", positional=True,
    )  # fmt: skip
    weights: str | None = option(None, "state dict to load into a model that is not a checkpoint")
    classes: str | None = option(None, "class names in output order: a folder of class folders, a text file")
    size: int | None = option(None, "input pixels per side (default: the model's)", 8, 4096)
    crop_pct: float | None = option(None, "crop / resized side (default: the model's)", above=0, most=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    amp: str = option("off", "mixed precision; auto: bf16 or fp16 on GPUs, off on CPUs", choices=AMP)
    batch: int = option(64, "images per batch", least=1)
    workers: int | None = option(None, "data-loading processes (default: one per core)", least=0)
    out: str = option("runs/bench", "folder of the results")


def trained_model(spec: str, weights: str | None) -> tuple[nn.Module, Published | None]:
    """Return a network in evaluation mode, with `transform` and `classes`, and its row of Table 1, if any."""
    if Path(spec).is_file() or Path(spec).suffix in (".pt", ".pth"):
        if weights:
            raise UsageError(f"--weights: {spec} has weights of its own")
        model = load_checkpoint(spec, fuse=True)
        check_channels(model.config, spec)
        ignored = {"num_classes": 1000, "drop_path": 0.0}  # the paper's networks are recognized without them
        configs = {replace(config, **ignored): name for name, config in MODELS.items()}
        return model, TABLE_1.get(configs.get(replace(model.config, **ignored)))
    name, size, make = find_model(spec, pretrained=weights is None)
    try:
        model = make()
        if weights:
            model.load_state_dict(weights_of(read_checkpoint(weights)))
    except (OSError, RuntimeError) as error:  # offline, no such weights; tensors that do not fit
        if ":" in name and not weights:  # the user's own code
            raise
        what = f"{weights} does not fit" if weights else "no pretrained weights: give --weights"
        raise UsageError(f"{name}: {what} ({' '.join(str(error).split())[:200]})") from error
    model.classes, model.transform = getattr(model, "classes", None), transform_of(name, model)
    if "@" in spec:
        model.transform = replace(model.transform, size=size)
    return model.eval(), TABLE_1.get(name)


def transform_of(name: str, model: nn.Module) -> EvalTransform:
    """Return a model's own transform, timm's or torchvision's for its weights, or the default."""
    import torchvision.models

    if isinstance(getattr(model, "transform", None), EvalTransform):
        return model.transform
    if hasattr(model, "pretrained_cfg"):
        from timm.data import resolve_model_data_config

        found = resolve_model_data_config(model)
        if found["crop_mode"] != "center":
            raise UsageError(f"{name}: its weights need crop mode {found['crop_mode']}; only center is known")
        size = found["input_size"][-1]
        return EvalTransform(size, *(found[key] for key in ("crop_pct", "interpolation", "mean", "std")))
    if name not in torchvision.models.list_models(torchvision.models):
        return EvalTransform()
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    (size,), (resized,) = preset.crop_size, preset.resize_size
    return EvalTransform(size, size / resized, preset.interpolation.value, preset.mean, preset.std)


def results_name(model: str) -> str:
    """Return a name for the results of a model: of a checkpoint among a run's files, that of the run."""
    file = Path(model).absolute()
    if file.stem in ("best", "last", "previous") and (file.parent / "config.json").exists():
        return file.parent.name if file.stem == "best" else f"{file.parent.name}-{file.stem}"
    return file.stem if file.is_file() else model


def accuracy(options: AccuracyOptions) -> None:
    """Evaluate on every folder; print and write the table."""
    device = pick_device(options.device)
    if device.type == "cpu":
        keep_large_buffers()
    model, paper = trained_model(options.model, options.weights)
    asked = {"size": options.size, "crop_pct": options.crop_pct}
    transform = replace(model.transform, **{name: value for name, value in asked.items() if value})
    if isinstance(model, NEXcepTion):
        replace(model.config, input_size=transform.size)  # refuses too small a size
    classes = read_classes(options.classes) if options.classes else model.classes
    if model.classes and list(classes) != list(model.classes):
        raise UsageError(f"--classes {options.classes}: {options.model} has other class names; leave it out")
    with torch.inference_mode():
        outputs = model(torch.zeros(1, 3, transform.size, transform.size)).shape[1]
    model.to(device, memory_format=torch.channels_last)
    settings = {"train": False, "transform": transform, "device": device, "workers": options.workers}
    sets = []
    for text in options.folders:  # open all and match their classes before evaluating any
        name, _, path = text.partition("=")
        if not path or "/" in name:
            name, path = Path(text).name, text
        folder = open_data(path, Plan(batch=options.batch), **settings)
        order = list(classes or folder.classes)  # without names, the folder must hold all in output order
        if len(order) != outputs:
            what = f"{options.classes or path} has {len(order)} classes and the model {outputs} outputs"
            raise UsageError(f"{what}: give --classes FOLDER_OR_FILE with names for all")
        if unknown := [label for label in folder.classes if label not in order]:
            shown = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
            raise UsageError(f"{path}: no class of the model is called {shown}")
        columns = torch.tensor([order.index(label) for label in folder.classes], device=device)
        sets.append((name, path, folder, columns))

    file_name = re.sub(r"[^\w.]+", "-", f"accuracy-{results_name(options.model)}")
    shown = f"{options.model}: {transform.size} pixels, {transform.crop_pct:.3g} of the resized shorter "
    shown += f"side, {transform.interpolation}, {precision_of(options.amp, device)}"
    row = TABLE_3.get(paper.label, (paper.top1,)) if paper else ()
    published = dict(zip(TABLE_3_SETS, row, strict=False))
    lines = [[label, *(str(top1 or "not given") for top1 in row)] for label, row in TABLE_3.items()]
    table_3 = f"\nThe paper's top-1, %:\n\n{markdown_table(['', *TABLE_3_SETS], lines)}"
    table_3 += "\nRVT-S is in no package: give its own code as MODULE:CALLABLE.\n"
    rows, cells = [], []
    for name, path, folder, columns in sets:
        try:
            found = evaluate(model, folder, "val", amp_dtype(options.amp, device), columns=columns)
        except RunError as error:
            raise RunError(f"{options.model} on {name}: {error}") from None
        folder.close()
        theirs = published.get(name.lower())
        rows.append({"set": name, "folder": path, "classes": len(columns), **found, "paper_top1": theirs})
        top1, top5 = f"{found['top1']:.2f}", f"{found['top5']:.2f}"
        print(f"{name}: top-1 {top1}%, top-5 {top5}%", flush=True)
        cells.append([name, f"{found['count']:,}", str(len(columns)), top1, str(theirs or ""), top5])
        text = markdown_table(["set", "images", "classes", "top-1, %", "paper's", "top-5, %"], cells)
        text = f"{shown}\n\n{text}{table_3 if {row['set'].lower() for row in rows} & {*TABLE_3_SETS} else ''}"
        # Written after each set, so that results are kept if a later set fails.
        write_results(file_name, options, device, text, rows, transform=asdict(transform))
    print(f"\n{text}")


# --------------------------------------------------------------------------------------------------
# figures: the paper's figures 2 and 3


@dataclass(frozen=True)
class FiguresOptions:
    """Draw the paper's figures 2 and 3: accuracy against MACs and throughput, bubble area = parameters.

    Figure 3 is drawn from the paper's throughput, and again from that measured in each given file.
    """

    results: tuple[str, ...] = option((), "JSON files written by `bench.py speed`", positional=True)
    out: str = option("runs/bench", "folder of the figures, SVG and PNG")


COLOURS = {"NEXcepTion": "#a01c1c", "conv": "#4d94c7", "transformer": "#f3c650"}  # distinct in grey, too
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
            if row["size"] == TABLE_1[row["name"]].size  # the paper's accuracy holds at this size only
        }
        where = here.get("gpu") or f"{here['threads']} CPU threads"
        how = [where, f"batch {options['batch']}", record["precision"]]
        how += [word for word in ("compile", "fuse") if options.get(word)]
        title = f"{'trained ' * options['train']}images/s (measured: {', '.join(how)})"
        if missing := [row["label"] for row in record["rows"] if row.get("missing")]:
            title += f"\nnot measured: {', '.join(missing)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        speeds = {}
    if not speeds:
        raise UsageError(f"{path} is no JSON file of `bench.py speed` with a model of the paper's Table 1")
    return speeds, title


def draw(values: dict[str, float], title: str, stem: Path) -> tuple[list, np.ndarray]:
    """Write `stem`.svg and .png with a labelled disc for each key of `values`.

    Returns the labels and the discs, (N, 3): centre and radius in pixels.
    """
    figure, (axes,) = subplots(1, 8.3, 5.6)
    figure.set_dpi(200)
    keys = sorted(values, key=lambda key: -float(TABLE_1[key].parameters))
    rows = [TABLE_1[key] for key in keys]
    areas = AREA_PER_MILLION * np.array([float(row.parameters) for row in rows])
    points = np.array([(values[key], TABLE_1[key].top1) for key in keys])
    colours = [COLOURS[row.kind] for row in rows]
    axes.scatter(*points.T, areas, colours, alpha=0.8, linewidths=0.8, edgecolors="white")
    axes.set(xlabel=title, ylabel="ImageNet-1K top-1, % (published)")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.margins(0.09, 0.11)
    handles = [axes.scatter([], [], 70, colour, label=kind, alpha=0.8) for kind, colour in COLOURS.items()]
    for millions, label in (10, "10M"), (25, "25M"), (50, "50M parameters"):
        handles.append(axes.scatter([], [], millions * AREA_PER_MILLION, "0.75", label=label))
    legend = {"loc": "outside upper center", "ncols": 6, "frameon": False, "fontsize": 9, "borderpad": 1.0}
    figure.legend(handles=handles, **legend)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # nothing may move after labels are placed
    axes.autoscale(False)
    radii = np.sqrt(areas / math.pi) * figure.dpi / 72  # pixels
    discs = np.column_stack([axes.transData.transform(points), radii])
    texts = place_labels(axes, rows, discs)
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".svg", ".png"):
        save_figure(figure, Path(f"{stem}{suffix}"))
    print(f"written: {stem}.svg, {stem}.png")
    return texts, discs


def place_labels(axes, rows: list[Published], discs: np.ndarray) -> list:
    """Label each disc at the nearest place that touches no disc, axis or label before it; return the labels.

    One that is not next to its disc gets a line to it. discs: (N, 3), centre and radius in pixels.
    """
    from matplotlib.transforms import Bbox

    gap, frame, to_data = 6, axes.get_window_extent(), axes.transData.inverted().transform  # gap: pixels
    taken, texts = [Bbox([disc[:2] - disc[2], disc[:2] + disc[2]]) for disc in discs], []
    for row, (*centre, radius) in zip(rows, discs, strict=True):
        weight = "bold" if row.kind == "NEXcepTion" else "normal"
        texts.append(axes.text(0, 0, row.label, fontsize=9, ha="center", va="center", weight=weight))
        half = texts[-1].get_window_extent().size / 2 + gap
        for away, angle in itertools.product(range(0, 400, 8), np.arange(32) * math.tau / 32):
            place = centre + (radius + away + half) * (math.cos(angle), math.sin(angle))
            box = Bbox([place - half, place + half])
            inside = frame.contains(*box.min) and frame.contains(*box.max)
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box.padded(-gap))
        texts[-1].set_position(to_data(place))
        if away > 2 * gap:
            line = np.clip(centre, *taken[-1].get_points()) - centre  # from the disc's centre to the label
            ends = centre + np.stack([line * radius / np.hypot(*line), line])
            axes.plot(*to_data(ends).T, color="0.5", linewidth=0.6)
    return texts


# --------------------------------------------------------------------------------------------------
# export: files for other runtimes


@dataclass(frozen=True)
class ExportOptions:
    """Export a checkpoint with torch.export and to ONNX, and check both against the eager outputs."""

    checkpoint: str = option(MISSING, "train.py's, the authors' or timm's xception", positional=True)
    size: int | None = option(None, "input pixels per side (default: the checkpoint's)", 8, 4096)
    out: str | None = option(None, "folder of the files (default: the checkpoint's)")


def export(options: ExportOptions) -> None:
    """Write NAME.pt2, NAME.onnx (both with a dynamic batch size) and NAME.export.json (classes, transform).

    NAME is that of the run or file. Batch norms are folded first. Files whose outputs differ from the
    checkpoint's are not written.
    """
    model = load_checkpoint(options.checkpoint, fuse=True).requires_grad_(False)
    size = options.size or model.transform.size
    replace(model.config, input_size=size)  # refuses too small a size
    checkpoint = Path(options.checkpoint).resolve()
    stem = Path(options.out or checkpoint.parent) / results_name(options.checkpoint)
    facts_file = Path(f"{stem}.export.json")
    if facts_file.exists() and entry_of(facts_file, "checkpoint") != str(checkpoint):
        raise UsageError(f"{facts_file} is of another checkpoint: give another --out")
    images = torch.randn(3, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    exported = {".pt2": (file.getvalue(), lambda x: reloaded(x).numpy())}  # content, what computes the logits
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

    wanted = model(images).numpy()
    for suffix, (content, run) in exported.items():
        path = Path(f"{stem}{suffix}")
        difference = max(np.abs(run(images[:count]) - wanted[:count]).max() for count in (len(images), 1))
        relative = difference / np.abs(wanted).max()
        if not relative <= 1e-4:
            raise RunError(f"{path} not written: its logits differ from the checkpoint's by {relative:.1e}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        print(f"{path}: logits within {relative:.1e} of the checkpoint's, relative to the largest")
    transform = asdict(replace(model.transform, size=size))
    facts = {"checkpoint": str(checkpoint), "classes": model.classes, "transform": transform}
    write_whole(facts_file, json.dumps(facts, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------
# data: the input pipeline


@dataclass(frozen=True)
class DataOptions:
    """Measure images/s of the input pipeline on one core and by number of workers."""

    path: str = option(MISSING, "image folder, with or without train/", positional=True)
    repetitions: int = option(20, "timed turns on one core; five with workers", least=1)
    workers: tuple[int, ...] = option((), "worker counts to time (default: 1, 2, 4, ..., all cores)", least=1)
    rate: float = option(1000.0, "GPU training speed in images/s, to estimate the workers it needs", least=0)
    out: str = option("runs/bench", "folder of the results")


DATA_BATCH = 64  # images


def open_pipeline(path: str, workers: int = 0, **augment) -> Data:
    """Open the images of a folder (those of train/, if there is one), each for training and for evaluation.

    As train.py does, but without repeated augmentation.
    """
    folder = Path(path, "train")
    files = list_images(folder if folder.is_dir() else path, train=False)["val"]
    source, plan = {"train": files, "val": files}, Plan(batch=min(DATA_BATCH, len(files)))
    augment = Augmentation(repeats=1, **augment)
    return open_data(source, plan, augment=augment, workers=workers, max_bad_files=0)


def take_from(epochs: Callable[[int], Iterator]) -> Callable[[], int]:
    """Return a function that takes the next batch of `epochs(0)`, `epochs(1)`, ... and returns its length."""
    batches = itertools.chain.from_iterable(map(epochs, itertools.count()))
    return lambda: len(next(batches)[0])


def input_speed(options: DataOptions) -> None:
    """Time the input pipeline; print and write the table and the advice."""
    cores, many = cpu_count(), {}
    counts = options.workers or sorted({2**n for n in range(8) if 2**n < cores} | {cores})
    keep_large_buffers()  # as training on a CPU does
    for n in counts:  # workers first, as they must be forked before this process starts threads
        with contextlib.closing(open_pipeline(options.path, n)) as data:
            take = take_from(data.train_batches)

            def turn(take=take) -> int:
                end, images = time.perf_counter() + WORKER_SECONDS, 0
                while time.perf_counter() < end:
                    images += take()
                return images

            many[n] = Row(f"training, {n} worker{'s' * (n > 1)}", turn)
            print(f"{data.count('train'):,} images, {many[n].label}", flush=True)
            take_turns([many[n]], 5, stopwatch(torch.device("cpu")))

    print("one core", flush=True)
    torch.set_num_threads(1)
    data, plain, scored = (open_pipeline(options.path, policy=p) for p in ("rand_augment", "none", "none"))
    single = [
        Row("training", take_from(data.train_batches)),
        Row("training without RandAugment", take_from(plain.train_batches)),
        Row("evaluation", take_from(lambda _: scored.eval_batches())),
    ]
    take_turns(single, options.repetitions, stopwatch(None))
    rows = [*single, *many.values()]
    text = markdown_table(["", "images/s", "median"], [[row.label, *timing_cells(row)[:2]] for row in rows])
    speeds = {n: statistics.fmean(row.samples) for n, row in many.items()}
    most = max(speeds, key=speeds.get)
    enough = [f"{n}, as measured" for n in sorted(speeds) if speeds[n] >= options.rate]
    enough.append(f"{math.ceil(options.rate * most / speeds[most])}, extrapolated from {most}")
    text += f"\nA GPU that trains at {options.rate:,.0f} images/s needs --workers {enough[0]}.\n"
    print(f"\n{text}")
    write_results(f"data-{cores}-core", options, torch.device("cpu"), text, rows)


# --------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[Callable, type]] = {  # name -> function of its options, options
    "speed": (speed, SpeedOptions),
    "accuracy": (accuracy, AccuracyOptions),
    "figures": (figures, FiguresOptions),
    "export": (export, ExportOptions),
    "data": (input_speed, DataOptions),
}


def run_command(command: Callable, options_class: type, prog: str, argv: list[str]) -> int:
    """Run one command; return 0, 1 (failure), 2 (usage error) or 130 (Ctrl-C)."""
    try:
        options = parse(options_class, argv, prog)
        if folder := getattr(options, "out", None):  # checked before measuring, made when there is a result
            out = Path(folder).absolute()
            nearest = next(path for path in (out, *out.parents) if path.exists())
            if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
                raise UsageError(f"--out {folder}: {nearest} is no folder that can be written to")
        command(options)
    except (UsageError, RunError, KeyboardInterrupt) as error:
        print(f"{prog}: {str(error) or 'stopped'}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1 if isinstance(error, RunError) else 130
    return 0


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if not argv or argv[0] not in COMMANDS:
        print(f"bench.py: give a command, one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(*COMMANDS[argv[0]], f"bench.py {argv[0]}", argv[1:])


if __name__ == "__main__":
    run_script(main)
