"""Measures what the paper claims, on the machine at hand: one subcommand a question.

    python bench.py speed      # Table 1's throughput: NEXcepTion and every peer take turns in one run
    python bench.py accuracy CHECKPOINT imagenet=/data/imagenet/val imagenet-a=/data/imagenet-a
    python bench.py figures    # the paper's figures 2 and 3; with measured speed: results/speed-*.json
    python bench.py export CHECKPOINT
    python bench.py data [PATH]  # images/s of the input pipeline beside timm's, and how many workers you need
    python bench.py lamb       # milliseconds of a LAMB step beside timm's and PyTorch's fused AdamW
    python bench.py trial      # seconds of a trial of search.py, beside timm's loader and a plain loop

`python bench.py COMMAND --help` lists a command's options. What was measured goes to `results/` as JSON
(every sample, versions, hardware, command line) with a Markdown table beside it.
"""

from __future__ import annotations

import argparse
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
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
import typing
import weakref
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops.misc import Permute
from tqdm import tqdm

import blocks
import data as pipeline
from data import (
    Augmentation,
    Data,
    EvalFolder,
    EvalTransform,
    FileList,
    FolderDataset,
    FolderSource,
    Job,
    Plan,
    TensorSource,
    eval_folder,
    natural_key,
    normalize,
)
from model import (
    MODELS,
    ModelConfig,
    NEXcepTion,
    compile_frozen,
    count_parameters,
    create_model,
    fuse,
    keep_large_buffers,
    load_checkpoint,
    read_weights,
)
from train import Lamb, Parser, RunError, UsageError, bce_loss, option, parameter_groups, write_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# --------------------------------------------------------------------------------------------------
# Command line, results: shared by all subcommands


def argument(help: str, default=MISSING, **argparse_arguments):
    """A dataclass field that becomes a positional argument; one with a default may be left out."""
    return field(default=default, metadata={"help": help, "positional": True, **argparse_arguments})


def comma_separated(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse(options: type, argv: list[str], prog: str):
    """The dataclass `options` filled from a command line; its fields declare every option (see `option`).

    `least` and `most` in a field's metadata are the numbers' bounds. `UsageError` for one beyond them.
    """
    parser = Parser(prog=prog, description=options.__doc__, allow_abbrev=False)
    types = typing.get_type_hints(options)
    for entry in fields(options):
        settings = {key: value for key, value in entry.metadata.items() if key not in ("least", "most")}
        positional = settings.pop("positional", False)
        kind = types[entry.name]
        many = typing.get_origin(kind) is tuple
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif many and not positional:
            settings["type"] = comma_separated
        elif not many:
            settings["type"] = kind
        if positional and entry.default is not MISSING:
            settings.setdefault("nargs", "*" if many else "?")
        elif positional and many:
            settings.setdefault("nargs", "+")
        if entry.default is not MISSING:
            settings["default"] = entry.default
            shown = ",".join(entry.default) if many else entry.default
            settings["help"] += f" (default: {shown})" if shown not in ("", 0, None, False) else ""
        parser.add_argument(entry.name if positional else "--" + entry.name.replace("_", "-"), **settings)
    values = vars(parser.parse_args(argv))
    for entry in fields(options):
        value, least, most = values[entry.name], entry.metadata.get("least"), entry.metadata.get("most")
        name = f"--{entry.name.replace('_', '-')} {value}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{name}: must be a finite number")
        if least is not None and value < least:
            raise UsageError(f"{name}: must be at least {least}")
        if most is not None and value > most:
            raise UsageError(f"{name}: must be at most {most}")
    return options(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def write_result(path: Path, content: str | bytes) -> None:
    """Write a results file whole or not at all; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def check_writable(folder: str) -> None:
    """`UsageError` where files can't be written to `folder`, before anything is measured for them."""
    there = next(
        path for path in [Path(folder).absolute(), *Path(folder).absolute().parents] if path.exists()
    )
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "can't be written to" if there.is_dir() else "is a file, not a folder"
        raise UsageError(f"--out {folder}: {there} {what}; name another folder")


def results_stem(folder: str, name: str, options) -> Path:
    """`folder`/`name`, or with -2, -3 ... behind it: files of other options' results are not overwritten."""
    ours = json.loads(json.dumps(asdict(options)))
    for number in itertools.count(1):
        stem = Path(folder) / (name if number == 1 else f"{name}-{number}")
        try:
            theirs = json.loads(stem.with_name(stem.name + ".json").read_text())["options"]
        except (OSError, ValueError, KeyError, TypeError):
            return stem
        if {**ours, "out": ""} == {**theirs, "out": ""}:
            return stem


def write_json(path: Path, record: dict) -> None:
    write_result(path, json.dumps(record, indent=1) + "\n")


def write_both(stem: Path, record: dict, text: str) -> None:
    """Write `stem`.json and the Markdown `stem`.md."""
    write_json(stem.with_name(stem.name + ".json"), record)
    write_result(stem.with_name(stem.name + ".md"), text)


def markdown_table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table, its first `left` columns flush left, the others right; padded to read as text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        padded = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def filled_columns(header: list[str], rows: list[list[str]]) -> str:
    """The Markdown table without the columns that no row fills."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return markdown_table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def machine(device: torch.device) -> dict:
    """What a timing depends on: processor, accelerator, threads, versions, and the command that was run."""
    record = {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": "python bench.py " + shlex.join(sys.argv[1:]),
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
        record["cudnn"] = torch.backends.cudnn.version()
    return record


def processor_name() -> str:
    """The processor's model name, and the vector extensions that decide how fast it multiplies."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    info = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    has = info.get("flags", "").split()
    telling = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in has]
    return " ".join([info.get("model name", platform.machine()), *telling])


# --------------------------------------------------------------------------------------------------
# The paper's tables


@dataclass(frozen=True)
class Published:
    """A row of the paper's Table 1 (appendix): ImageNet-1K, one RTX 2080 Ti, batch 256, mixed precision."""

    label: str
    kind: str  # "conv" | "transformer"
    size: int  # input pixels a side
    parameters: str  # as printed, in millions
    macs: str  # as printed, in 10^9 multiply-accumulates ("FLOPs" there)
    speed: int  # images/s, mean of 30 repetitions
    deviation: int  # images/s, standard deviation
    top1: float  # %


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

# Table 3: top-1 in % on ImageNet-A, -R and -Sketch; Table 1's column is the validation set's.
TABLE_3 = {
    "nexception_t": {"imagenet-a": 17.65, "imagenet-r": 45.99, "imagenet-sketch": 34.73},
    "nexception_tp": {"imagenet-a": 22.75, "imagenet-r": 47.37, "imagenet-sketch": 34.70},
    "nexception_s": {"imagenet-a": 21.36, "imagenet-r": 47.82, "imagenet-sketch": 36.60},
    "xception": {"imagenet-a": 9.83, "imagenet-r": 40.79, "imagenet-sketch": 29.88},
    "swin_t": {"imagenet-a": 21.60, "imagenet-r": 41.30, "imagenet-sketch": 29.10},
    "convnext_tiny": {"imagenet-a": 24.20, "imagenet-r": 47.20, "imagenet-sketch": 33.80},
}


# --------------------------------------------------------------------------------------------------
# Models: ours, the paper's peers, the reader's own


class IsotropicConvNeXt(nn.Sequential):
    """ConvNeXt-S (isotropic): 18 blocks of width 384, 16 × 16 stem ("A ConvNet for the 2020s", 3.3)."""

    def __init__(self, width: int = 384, depth: int = 18, num_classes: int = 1000):
        super().__init__(
            nn.Conv2d(3, width, kernel_size=16, stride=16),
            *[torchvision.models.convnext.CNBlock(width, 1e-6, 0.0) for _ in range(depth)],
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
    """natten's attention as far as counting goes: its own kernels can't run on shapes alone."""

    def __init__(self, width: int, num_heads: int, kernel_size: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.neighbours = kernel_size**2

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H, W, C)
        query = self.qkv(x).flatten(0, 2)[:, None, : x.shape[-1]]  # (B, H, W, 3C) -> (BHW, 1, C)
        keys = query.new_empty(len(query), x.shape[-1], self.neighbours)
        return self.proj(torch.bmm(torch.bmm(query, keys), keys.mT).view_as(x))


class Nat(nn.Sequential):
    """NAT: four stages of `NatBlock`, each behind 3 × 3 convolutions with stride 2 (its paper, table 1)."""

    def __init__(self, depths: tuple[int, ...], width: int, mlp_ratio: float, attention: type | None = None):
        if attention is None:
            from natten import NeighborhoodAttention2D as attention
        layers = [nn.Conv2d(3, width // 2, 3, 2, 1), nn.Conv2d(width // 2, width, 3, 2, 1)]
        for stage, depth in enumerate(depths):
            stage_width = width * 2**stage
            if stage:
                layers += [nn.Conv2d(stage_width // 2, stage_width, 3, 2, 1, bias=False)]
            layers += [Permute([0, 2, 3, 1]), nn.LayerNorm(stage_width)]
            layers += [NatBlock(stage_width, mlp_ratio, attention) for _ in range(depth)]
            layers += [Permute([0, 3, 1, 2])]
        layers += [Permute([0, 2, 3, 1]), nn.LayerNorm(stage_width), Permute([0, 3, 1, 2])]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(stage_width, 1000))


def small_vit(size: int) -> nn.Module:
    """ViT-S/16, which is DeiT-S: width 384, six heads, twelve layers."""
    return torchvision.models.VisionTransformer(
        image_size=size, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )


HAND_BUILT = {  # key -> function of the input size
    "vit_small": small_vit,
    "deit_small": small_vit,
    "convnext_small_isotropic": lambda size: IsotropicConvNeXt(),
    "nat_mini": lambda size: Nat((3, 4, 6, 5), 64, 3.0),
    "nat_tiny": lambda size: Nat((3, 4, 18, 5), 64, 3.0),
    "nat_small": lambda size: Nat((3, 4, 18, 5), 96, 2.0),
}
TORCHVISION = set(torchvision.models.list_models(module=torchvision.models))  # its classifiers
PEER_PREFIX = "peer:"


def parse_spec(spec: str) -> tuple[str, int]:
    """`NAME` or `NAME@SIZE` -> name and input size in pixels (Table 1's, a config's, timm's, 224)."""
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
    if name not in TORCHVISION and not name.startswith(PEER_PREFIX) and (timm := timm_with(name)):
        return name, timm.get_pretrained_cfg(name).input_size[-1]
    return name, 224


def timm_with(name: str):
    """The package timm, if it is installed and has a model of that name; else None."""
    try:
        import timm
    except ModuleNotFoundError:
        return None
    return timm if timm.is_model(name) else None


def model_maker(spec: str) -> Callable[[], nn.Module]:
    """What builds a model with random weights, by its spec; `UsageError` if it is unknown."""
    name, size = parse_spec(spec)
    if name in HAND_BUILT:
        return functools.partial(HAND_BUILT[name], size)
    if name in TORCHVISION:
        return functools.partial(torchvision.models.get_model, name, weights=None)
    if name in MODELS or name.endswith(".json"):
        return functools.partial(create_model, name)
    if name.startswith(PEER_PREFIX):
        return peer_maker(name.removeprefix(PEER_PREFIX))
    if timm := timm_with(name):
        return functools.partial(timm.create_model, name)
    known = ", ".join({**TABLE_1, **MODELS})
    raise UsageError(
        f"unknown model {name!r}, neither torchvision's nor (if it is installed) timm's; known here: {known}"
    )


def build_model(spec: str) -> nn.Module:
    """A model with random weights by its spec, the same in every process.

    UsageError if it is unknown, ModuleNotFoundError without natten, and whatever a peer raises.
    """
    maker = model_maker(spec)
    torch.manual_seed(0)
    model = maker()
    if not isinstance(model, nn.Module):
        raise TypeError(f"gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def peer_maker(path: str) -> Callable[[], nn.Module]:
    """The reader's own model: `MODULE:CALLABLE`, called without arguments; the current folder is searched."""
    module_name, _, callable_name = path.partition(":")
    if not module_name or not callable_name:
        raise UsageError(f"--peer {path!r}: write it as MODULE:CALLABLE, for instance mymodels:tiny")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), callable_name)
    except Exception as error:  # the module is the reader's: anything may happen
        raise UsageError(f"--peer {path!r}: {one_line(error)}") from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UsageError(f"--peer {path!r}: {callable_name} can't be called")
    return function


def one_line(error: BaseException) -> str:
    """An error's type and message, shortened to one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def count_macs(model: nn.Module, size: int) -> tuple[int, int]:
    """Multiply-accumulates of one (3, size, size) image: of convolutions and linear layers, and of attention.

    Counted by PyTorch's flop counter, which sees functional layers too. The batched matrix products are the
    attention's (queries with keys, weights with values).
    """
    counter = FlopCounterMode(display=False)
    shapes = copy.deepcopy(model).to("meta").eval()
    for block in shapes.modules():
        if isinstance(block, NatBlock):
            block.attention = NeighborhoodShapes(block.norm1.weight.numel(), 1, 7).to("meta")
    with counter:  # gradients stay on: attention's fast path without them is not counted
        shapes(torch.empty(1, 3, size, size, device="meta"))
    counts = {str(key): flops // 2 for key, flops in counter.get_flop_counts().get("Global", {}).items()}
    attention = sum(macs for key, macs in counts.items() if "bmm" in key or "attention" in key)
    return sum(counts.values()) - attention, attention


def differences(published: Published, parameters: int, macs: int) -> list[str]:
    """Where a count differs from the printed figure by more than that one's rounding; empty: it agrees."""
    found = []
    for what, printed, count in (
        ("parameters", published.parameters, parameters / 1e6),
        ("MACs", published.macs, macs / 1e9),
    ):
        rounding = 0.5 * 10.0 ** -len(printed.partition(".")[2])
        if abs(count - float(printed)) > rounding * 1.001:
            unit = "M" if what == "parameters" else "G"
            found.append(f"{published.label}: {what} {count:.2f}{unit} counted, {printed}{unit} printed")
    return found


# --------------------------------------------------------------------------------------------------
# speed: Table 1's throughput


@dataclass(frozen=True)
class SpeedOptions:
    """Images/s of NEXcepTion and its peers; the models take turns within each repetition."""

    models: tuple[str, ...] = option(
        (),
        "Table 1's keys, our models', timm's or JSON configs, NAME[@SIZE],...; empty: all of Table 1",
    )
    peer: tuple[str, ...] = option((), "the reader's own models, MODULE:CALLABLE[@SIZE],...")
    baseline: str = option(
        "convnext_tiny", "the model that ratios refer to; the first one where it is not measured"
    )
    device: str = option("", "cpu, cuda, cuda:1, mps; empty: a GPU where there is one")
    dtype: str = option(
        "", "autocast's type; empty: bfloat16 or float16 on a GPU, float32 on a CPU", choices=DTYPES
    )
    batch: int = option(0, "images a batch, halved when out of memory; 0: 256 on a GPU, 16 on a CPU", least=0)
    repetitions: int = option(30, "timed turns of each model", least=1)
    threads: int = option(0, "CPU threads; 0: PyTorch's choice", least=0, most=1024)
    seconds: float = option(
        0.1, "least time of one turn, in seconds: short passes are repeated within it", least=0
    )
    latency: bool = option(True, "time single images as well")
    channels_last: bool = option(True, "memory format of images and weights")
    train: bool = option(False, "time forward, backward and a LAMB step instead of evaluation")
    compile: bool = option(False, "compile every model (evaluation: with inductor's freezing, and --fuse)")
    fuse: bool = option(False, "fold NEXcepTion's batch norms into its convolutions")
    triton: bool = option(False, "our Triton kernels for NEXcepTion's depthwise convolutions; GPU only")
    plain: bool = option(
        False, "time each model also as plain eager code in a process whose allocator is left alone; CPU only"
    )
    out: str = option("results", "folder of the results")


class Timed:
    """One model on its device, warmed up, ready to be timed in turns.

    tuned: apply what the options ask for (compile, fuse); False gives the plain eager model.
    Raises what building the model raises; out of memory at one image is torch.OutOfMemoryError.
    """

    shared: typing.ClassVar = weakref.WeakValueDictionary()  # batches that several models are timed on

    def __init__(self, spec: str, options: SpeedOptions, tuned: bool = True):
        self.options, self.device, self.dtype = options, torch.device(options.device), DTYPES[options.dtype]
        self.size, self.batch = parse_spec(spec)[1], options.batch
        self.format = torch.channels_last if options.channels_last else torch.contiguous_format
        model = build_model(spec)
        if isinstance(model, NEXcepTion):
            fill(model)
        self.parameters = count_parameters(model)
        self.macs, self.attention_macs = count_macs(model, self.size)
        if tuned and options.fuse and isinstance(model, NEXcepTion):
            model = fuse(model)
        model.to(self.device, memory_format=self.format)
        self.weights = tensor_bytes([*model.parameters(), *model.buffers()])
        if options.train:
            self.optimizer = Lamb(parameter_groups(model, 0.02), lr=2e-3)
        self.model = model.train(options.train)
        if tuned and options.compile:
            self.model = torch.compile(model, dynamic=False) if options.train else compile_frozen(model)
        self.warm_up()

    def images(self, count: int) -> torch.Tensor:
        """(count, 3, size, size) float32, the same for every process; models of one size share them."""
        key = (count, self.size, self.device, self.format)
        images = self.shared.get(key)
        if images is None:
            generator = torch.Generator().manual_seed(count)
            images = torch.randn(count, 3, self.size, self.size, generator=generator)
            images = self.shared[key] = images.to(self.device, memory_format=self.format)
        return images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(images)

    def step(self) -> None:
        """One pass over the batch: forward, or forward, backward and the optimizer's step."""
        if not self.options.train:
            with torch.no_grad():
                self.forward(self.inputs)
            return
        logits = self.forward(self.inputs)
        loss = bce_loss(logits, torch.zeros_like(logits), 0.2)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warm_up(self) -> None:
        """Find the batch that fits, have kernels chosen and compiled, count passes a turn and the memory."""
        while not self.fits():
            if self.batch == 1:
                raise torch.OutOfMemoryError("out of memory at batch 1")
            self.batch //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.passes = 1
        seconds = min(self.elapsed(self.step) for _ in range(2))
        self.passes = max(1, math.ceil(self.options.seconds / seconds))

    def fits(self) -> bool:
        """Whether the memory suffices for the batch; the first steps, and the memory of the second."""
        try:
            self.inputs = self.images(self.batch)
            self.step()
            with PeakMemory(self.device) as peak:
                self.step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.inputs = None
            return False
        moments = []
        if self.options.train:
            moments = [t for state in self.optimizer.state.values() for t in state.values()]
        static = self.weights + tensor_bytes([t for t in moments if torch.is_tensor(t)])
        self.memory = None if peak.bytes is None else peak.bytes + static
        return True

    def elapsed(self, work: Callable, passes: int = 1) -> float:
        """Seconds for `passes` calls of work: device events on a GPU, a synchronised clock elsewhere."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(passes):
                work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
        if self.device.type == "mps":
            torch.mps.synchronize()
        start = time.perf_counter()
        for _ in range(passes):
            work()
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - start

    def turn(self) -> tuple[float, list[float]]:
        """One repetition: images/s of the batch and seconds of three images alone, behind untimed passes."""
        self.step()  # the models before it have emptied the caches
        speed = self.batch * self.passes / self.elapsed(self.step, self.passes)
        if self.options.train or not self.options.latency:
            return speed, []
        image = self.images(1)
        with torch.no_grad():
            self.forward(image)
            return speed, [self.elapsed(lambda: self.forward(image)) for _ in range(3)]

    def logits(self) -> np.ndarray:
        """(B, classes) float32 of the batch: to see that two variants of a model compute the same."""
        with torch.no_grad():
            return self.forward(self.inputs).float().cpu().numpy()

    def facts(self) -> dict:
        """What the results say of the model besides its times; memory in bytes."""
        names = ("parameters", "macs", "attention_macs", "batch", "passes", "memory")
        return {name: getattr(self, name) for name in names}


def tensor_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def fill(model: nn.Module) -> None:
    """Give NEXcepTion weights and statistics of a trained network's scale, the same in every process.

    As initialised, batch norms are the identity and folding them proves nothing.
    """
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1:
            tensor.normal_(0, 0.1, generator=generator)
        elif tensor.dim() > 1:
            tensor.normal_(0, (0.8 / tensor[0].numel()) ** 0.5, generator=generator)


class PeakMemory:
    """Context whose `bytes` is the most memory that its body added, None where the system does not tell.

    A GPU: tensors of PyTorch's allocator. Linux: the resident set's high-water mark, which includes the
    kernels' own scratch buffers.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu" and platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # else buffers that the allocator kept would hide new ones
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
                self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif hasattr(self, "before"):
            self.bytes = self.resident("VmHWM") - self.before

    @staticmethod
    def resident(field: str) -> int:
        found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024


class PlainProcess:
    """The same models as plain eager code in a child process: `mallopt` holds for a whole process.

    `call(spec, method)` runs a method of the child's `Timed` and returns its answer.
    """

    def __init__(self, specs: list[str], options: SpeedOptions):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_plain, args=(theirs, specs, options), daemon=True)
        with default_environment():
            self.process.start()
        theirs.close()
        self.answer()  # built and warmed up

    def call(self, spec: str, method: str):
        self.pipe.send((spec, method))
        return self.answer()

    def answer(self):
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError("the process of the plain models has ended; its reason stands above") from None

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


@contextlib.contextmanager
def default_environment() -> Iterator[None]:
    """Take back what `keep_large_buffers` put into the environment, while a process is started from it."""
    kept = os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ["THP_MEM_ALLOC_ENABLE"] = kept


def serve_plain(pipe, specs: list[str], options: SpeedOptions) -> None:
    """The child's part of `PlainProcess`: build, then answer until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends this process
    if options.threads:
        torch.set_num_threads(options.threads)
    timed = {spec: Timed(spec, options, tuned=False) for spec in specs}
    with contextlib.suppress(EOFError, BrokenPipeError):
        pipe.send("ready")
        while True:
            spec, method = pipe.recv()
            pipe.send(getattr(timed[spec], method)())


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-accumulates/s of the machine's own best large matrix product in that dtype."""
    best = 0.0
    for n in (2048, 4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for _ in range(4):
            start = time.perf_counter()
            c = a @ b
            c[0, 0].item()  # waits for the device
            best = max(best, n**3 / (time.perf_counter() - start))
    return best


def resolved(options: SpeedOptions) -> SpeedOptions:
    """The options with device, dtype, batch and models settled; `UsageError` for what can't be."""
    device = pick_device(options.device)
    fast = "bfloat16" if device.type != "cuda" or torch.cuda.is_bf16_supported(False) else "float16"
    dtype = options.dtype or ("float32" if device.type == "cpu" else fast)
    models = (options.models or tuple(TABLE_1)) + tuple(PEER_PREFIX + peer for peer in options.peer)
    if options.plain and device.type != "cpu":
        raise UsageError(f"--plain measures the C allocator's part and needs --device cpu, not {device}")
    if options.triton and device.type != "cuda":
        raise UsageError(f"--triton needs --device cuda, not {device}: leave it out")
    if options.triton and blocks.triton is None:
        raise UsageError("--triton needs the package triton: install it, or leave the flag out")
    if options.triton and not options.channels_last:
        raise UsageError("--triton is for channels-last maps: leave out --no-channels-last")
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
    batch = options.batch or (16 if device.type == "cpu" else 256)
    settled = {
        "dtype": dtype,
        "batch": batch,
        "fuse": options.fuse or (options.compile and not options.train),
    }
    return replace(options, device=str(device), models=models, **settled)


def pick_device(name: str) -> torch.device:
    """The device of that name, or the best there is; `UsageError` where it is none of this machine's."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing; choose cpu or cuda")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def build_rows(options: SpeedOptions) -> list[dict]:
    """Build and warm up every model; one dictionary each, "timed" in it, or "missing" with the reason."""
    rows = []
    for spec in options.models:
        name = parse_spec(spec)[0]
        label = TABLE_1[name].label if name in TABLE_1 else name.removeprefix(PEER_PREFIX)
        row = {"name": name, "label": label, "size": parse_spec(spec)[1], "spec": spec, "variant": ""}
        rows.append(row)
        try:
            timed = Timed(spec, options)
        except ModuleNotFoundError as error:
            row["missing"] = f"needs the package {error.name}"
        except torch.OutOfMemoryError:
            row["missing"] = "out of memory at batch 1"
        except Exception as error:  # a model that fails does not cost the others their rows
            row["missing"] = f"fails, {one_line(error)}"
        else:
            row |= {"timed": timed.turn, "logits": timed.logits} | timed.facts()
            if timed.batch < options.batch:
                print(f"{label}: out of memory at batch {options.batch}, measured at {timed.batch}")
        if name in TABLE_1 and row["size"] == TABLE_1[name].size:
            row["paper"] = asdict(TABLE_1[name])
        print(f"{label}: {row.get('missing', 'ready')}", file=sys.stderr)
    return rows


def add_plain_rows(rows: list[dict], options: SpeedOptions) -> PlainProcess:
    """A row more behind each model's, for its plain variant in another process."""
    specs = [row["spec"] for row in rows if "timed" in row]
    process = PlainProcess(specs, options)
    for row in [row for row in rows if "timed" in row]:
        spec = row["spec"]
        plain = {
            **row,
            **process.call(spec, "facts"),
            "label": f"{row['label']}, plain",
            "variant": "plain",
            "timed": functools.partial(process.call, spec, "turn"),
        }
        ours, theirs = row["logits"](), process.call(spec, "logits")
        plain["logit_difference"] = float(abs(ours - theirs).max() / max(1e-12, abs(theirs).max()))
        rows.insert(rows.index(row) + 1, plain)
    return process


def take_turns(rows: list[dict], repetitions: int) -> None:
    """Time every model once in each repetition, in another order each; Ctrl-C keeps the finished ones.

    A model that fails in a turn (out of memory beside the others, say) is left out from then on.
    """
    measured = [row for row in rows if "timed" in row]
    for row in measured:
        row["samples"], row["latencies"] = [], []
    order = random.Random(0)
    done = 0
    try:
        for _ in tqdm(range(repetitions), disable=None, unit="repetition"):
            turns = []
            for row in order.sample(measured, len(measured)):
                try:
                    turns.append((row, *row["timed"]()))
                except Exception as error:
                    row["missing"] = f"fails, {one_line(error)}"
                    for key in ("timed", "logits", "samples", "latencies"):
                        row.pop(key, None)
                    measured.remove(row)
            for row, speed, latencies in turns:
                row["samples"].append(speed)
                row["latencies"] += latencies
            done += 1
    except KeyboardInterrupt:
        if not done:
            raise
        print(f"stopped: {done} of {repetitions} repetitions are kept")


def mean_and_deviation(samples: list[float]) -> tuple[float, float]:
    return statistics.fmean(samples), statistics.stdev(samples) if len(samples) > 1 else 0.0


def add_ratios(rows: list[dict], baseline: str) -> str:
    """Each row's ratio to the baseline within every repetition, mean and deviation; the baseline's label.

    A plain row's ratio is to the same baseline; a tuned row gets its ratio to its own plain row too.
    """
    measured = [row for row in rows if "samples" in row]
    base = next((row for row in measured if baseline in (row["name"], row["spec"])), measured[0])
    plain = {row["spec"]: row["samples"] for row in measured if row["variant"] == "plain"}
    for row in measured:
        pairs = zip(row["samples"], base["samples"], strict=True)
        row["ratio"] = mean_and_deviation([ours / theirs for ours, theirs in pairs])
        if row["spec"] in plain and row["variant"] != "plain":
            pairs = zip(row["samples"], plain[row["spec"]], strict=True)
            row["to_plain"] = mean_and_deviation([ours / theirs for ours, theirs in pairs])
        if "paper" in row and "paper" in base:
            row["paper_ratio"] = row["paper"]["speed"] / base["paper"]["speed"]
    return base["label"]


def speed_table(rows: list[dict], baseline: str, batch: int) -> str:
    """The Markdown table of rows that were to be measured at `batch`; columns that no row fills are left out.

    MACs are those of convolutions and linear layers, + those of attention's own products.
    """
    header = ["model", "input", "params", "MACs", "paper's", "images/s", f"× {baseline}", "paper's ×"]
    header += ["× plain", "batch 1, ms (p95)", "memory", "of peak"]
    table = []
    for row in rows:
        paper = row.get("paper")
        cells = [row["label"], str(row["size"])]
        if "macs" in row:
            attention = f" + {row['attention_macs'] / 1e9:.2f}G" if row["attention_macs"] else ""
            cells += [f"{row['parameters'] / 1e6:.1f}M", f"{row['macs'] / 1e9:.2f}G{attention}"]
        else:
            cells += ["", ""]
        cells.append(f"{paper['parameters']}M, {paper['macs']}G" if paper else "")
        if "samples" not in row:
            table.append([*cells, row["missing"], *[""] * (len(header) - len(cells) - 1)])
            continue
        speed, deviation = mean_and_deviation(row["samples"])
        digits = 0 if speed >= 100 else 1 if speed >= 10 else 2
        halved = f" (batch {row['batch']})" if row["batch"] < batch else ""
        cells.append(f"{speed:.{digits}f} ± {deviation:.{digits}f}{halved}")
        cells.append("{:.2f} ± {:.2f}".format(*row["ratio"]))
        cells.append(f"{row['paper_ratio']:.2f}" if "paper_ratio" in row else "")
        cells.append("{:.2f} ± {:.2f}".format(*row["to_plain"]) if "to_plain" in row else "")
        late = [1000 * seconds for seconds in row["latencies"]]
        cells.append(f"{statistics.median(late):.1f} ({np.percentile(late, 95):.1f})" if late else "")
        cells.append("" if row["memory"] is None else f"{row['memory'] / 2**20:.0f} MiB")
        cells.append(f"{row['share']:.0%}")
        table.append(cells)
    return filled_columns(header, table)


def speed(options: SpeedOptions) -> None:
    """Measure, print and write the table of images/s."""
    options = resolved(options)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    if device.type == "cpu":
        keep_large_buffers()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.compile:  # models of one class share a count of compilations, and halving a batch adds one
        from torch._dynamo import config as dynamo_config

        dynamo_config.recompile_limit = 2**16
        dynamo_config.fail_on_recompile_limit_hit = True
    if device.type == "cuda":
        blocks.DepthwiseConv2d.use_triton = options.triton
        torch.cuda.set_device(device)  # events are recorded on the current device
        torch.backends.cudnn.benchmark = True  # the fastest algorithm for each shape, chosen while warming up
        torch.backends.cuda.matmul.allow_tf32 = True  # in float32, as cuDNN's convolutions do by default
    peak = matmul_peak(device, dtype)
    rows = build_rows(options)
    if not any("timed" in row for row in rows):
        raise UsageError("; ".join(f"{row['label']}: {row['missing']}" for row in rows))
    plain = add_plain_rows(rows, options) if options.plain else None
    take_turns(rows, options.repetitions)
    if plain:
        plain.close()
    if not any("samples" in row for row in rows):
        raise RunError("; ".join(f"{row['label']}: {row['missing']}" for row in rows))
    peak = max(peak, matmul_peak(device, dtype))
    baseline = add_ratios(rows, options.baseline)
    notes = []
    for row in rows:
        row.pop("timed", None)
        row.pop("logits", None)
        if "samples" in row:
            passes = 3 if options.train else 1  # a backward pass multiplies twice as much as a forward one
            macs = row["macs"] + row["attention_macs"]
            row["share"] = passes * macs * statistics.fmean(row["samples"]) / peak
            if row["variant"] == "" and "paper" in row:
                notes += differences(TABLE_1[row["name"]], row["parameters"], macs)
    write_speed(rows, baseline, notes, peak, options)


def write_speed(
    rows: list[dict], baseline: str, notes: list[str], peak: float, options: SpeedOptions
) -> None:
    """Print the table; write it with its method as Markdown, and everything measured as JSON."""
    device = torch.device(options.device)
    here = machine(device)
    where = re.sub(r"\W+", "-", here["gpu"].lower()) if "gpu" in here else device.type
    flags = [flag for flag in ("train", "compile", "fuse", "triton", "plain") if getattr(options, flag)]
    stem = results_stem(options.out, "-".join(["speed", where, options.dtype, *flags]), options)
    done = len(next(row["samples"] for row in rows if "samples" in row))
    in_tf32 = " (products in TF32)" if device.type == "cuda" else ""
    precision = in_tf32 if options.dtype == "float32" else " (autocast)"
    method = (
        f"{here.get('gpu', here['processor'])}, {here['threads']} CPU threads, torch {here['torch']}, "
        f"{options.dtype}{precision}, batch {options.batch}, "
        f"{'channels last' if options.channels_last else 'contiguous'}, "
        f"{'training step (LAMB)' if options.train else 'evaluation'}"
        f"{', compiled' if options.compile else ''}{', batch norms folded' if options.fuse else ''}"
        f"{', depthwise convolutions by Triton' if options.triton else ''}; "
        f"mean ± standard deviation of {done} repetitions in turns; matrix products peak at "
        f"{peak / 1e9:.0f} GMAC/s."
    )
    table = speed_table(rows, baseline, options.batch)
    different = [row for row in rows if "logit_difference" in row]
    if different:
        listed = ", ".join(f"{row['label']} {row['logit_difference']:.1e}" for row in different)
        notes = [*notes, f"largest difference of the logits, relative to the largest logit: {listed}"]
    closing = "".join(f"- {note}\n" for note in notes)
    print(f"\n{table}\n{method}\n{closing}", end="")
    record = {"method": method, "machine": here, "options": asdict(options), "peak_macs_per_second": peak}
    text = f"`{here['command']}`\n\n{method}\n\n{table}\n{closing}"
    write_both(stem, record | {"baseline": baseline, "notes": notes, "rows": rows}, text)
    print(f"written: {stem}.json, {stem}.md")


# --------------------------------------------------------------------------------------------------
# accuracy: top-1 and top-5 of a checkpoint, Table 3's robustness


@dataclass(frozen=True)
class AccuracyOptions:
    """Top-1 and top-5 of a checkpoint on image folders; every image counts once.

    A folder may hold a subset of the model's classes (ImageNet-A and -R do): the prediction is then the best
    of those classes' logits.
    """

    checkpoint: str = argument("a file of train.py, the authors', timm's Xception, or --model's state dict")
    folders: tuple[str, ...] = argument(
        "folders of class folders, PATH or NAME=PATH; the paper has figures for the names imagenet, "
        "imagenet-a, imagenet-r and imagenet-sketch"
    )
    model: str = option("", "torchvision's or timm's model that the file belongs to; empty: one of ours")
    classes: str = option(
        "", "class names in the order of the outputs: a folder of class folders or a text file"
    )
    size: int = option(0, "input pixels a side; 0: the checkpoint's own", least=0)
    crop_pct: float = option(
        0.0, "share of the resized shorter side that is kept; 0: the checkpoint's own", least=0, most=1
    )
    interpolation: str = option("", "of the resize; empty: the checkpoint's", choices=("bilinear", "bicubic"))
    calibration: bool = option(False, "expected calibration error, 15 bins")
    per_class: bool = option(False, "top-1 of each class: the ten lowest printed, all in the JSON file")
    fuse: bool = option(True, "fold our models' batch norms, which is faster and gives the same")
    device: str = option("", "cpu, cuda, ...; empty: a GPU where there is one")
    dtype: str = option("float32", "autocast's type", choices=DTYPES)
    batch: int = option(64, "images a batch", least=1)
    workers: int = option(-1, "processes that decode images; -1: one a CPU core", least=-1)
    out: str = option("results", "folder of the results")


@dataclass(frozen=True)
class Network:
    """A model to evaluate: its outputs' names (None: unknown), transform and key in the paper's tables."""

    model: nn.Module
    classes: list[str] | None
    transform: EvalTransform
    key: str


def open_network(options: AccuracyOptions) -> Network:
    """The checkpoint's network in evaluation mode, by the options; `UsageError` for what does not fit."""
    if options.model:
        network = open_peer(options)
    else:
        model = load_checkpoint(options.checkpoint, fuse=options.fuse)
        plain = replace(model.config, num_classes=1000, drop_path=0.05)
        key = next((key for key, config in MODELS.items() if replace(config, drop_path=0.05) == plain), "")
        network = Network(model, model.classes, model.transform, key)
    asked = {name: getattr(options, name) for name in ("size", "crop_pct", "interpolation")}
    transform = replace(network.transform, **{name: value for name, value in asked.items() if value})
    classes = read_classes(options.classes) if options.classes else network.classes
    return replace(network, transform=transform, classes=classes)


def open_peer(options: AccuracyOptions) -> Network:
    """A torchvision or timm model with a local file's weights, and the transform published with them."""
    if options.model in MODELS:
        raise UsageError(f"--model {options.model}: leave it out, checkpoints of our models are recognised")
    weights = read_weights(options.checkpoint)
    makers = [model_maker(options.model)]
    if options.model in TORCHVISION and (timm := timm_with(options.model)):
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
    if options.model in TORCHVISION and maker is makers[0]:
        published = torchvision.models.get_model_weights(options.model)
        file = Path(options.checkpoint).name
        preset = next((w for w in published if w.url.endswith("/" + file)), published.DEFAULT).transforms()
        size, short = preset.crop_size[0], preset.resize_size[0]
        share = size / (short + 1e-6)  # so that size / share, rounded down, is the short side
        resize = (preset.interpolation.value, tuple(preset.mean), tuple(preset.std))
    else:
        import timm

        preset = timm.data.resolve_model_data_config(model)
        size, share = preset["input_size"][-1], preset["crop_pct"]
        resize = (preset["interpolation"], preset["mean"], preset["std"])
    return Network(model.eval(), None, EvalTransform(size, share, *resize), options.model)


def read_classes(source: str) -> list[str]:
    """Class names in the order of the outputs: a folder's sub-folders in natural order, or a file's lines."""
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


def class_columns(
    classes: list[str] | None, outputs: int, folder: str, names: tuple[str, ...]
) -> torch.Tensor:
    """The model's output for each class folder in `names`, int64; UsageError naming a folder with none."""
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
    """Expected calibration error: |accuracy - confidence| of equally wide bins, weighted by their counts.

    confidence: (N,) probability of the predicted class; correct: (N,) bool ("On Calibration of Modern Neural
    Networks", equation 3).
    """
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


class TestSet(typing.NamedTuple):
    """A folder to evaluate on; `columns` is the model's output, int64, for each of its class folders."""

    name: str
    path: str
    data: EvalFolder
    columns: torch.Tensor


def open_sets(network: Network, options: AccuracyOptions) -> list[TestSet]:
    """Every folder, opened and its classes found, before any is evaluated."""
    workers = None if options.workers < 0 else options.workers
    size, found = network.transform.size, []
    with torch.no_grad():
        outputs = network.model(torch.zeros(1, 3, size, size, device=options.device)).shape[1]
    for text in options.folders:
        name, _, path = text.partition("=")
        if not path or "/" in name:
            name, path = Path(text).name, text
        data = eval_folder(
            path, network.transform, batch=options.batch, workers=workers, device=options.device
        )
        columns = class_columns(network.classes, outputs, path, data.classes)
        found.append(TestSet(name, path, data, columns.to(options.device)))
    return found


def evaluate_set(network: Network, test: TestSet, options: AccuracyOptions) -> dict:
    """Accuracies in % on one folder; checks that every image was counted once."""
    dtype, seen = DTYPES[options.dtype], []
    device, batches = torch.device(options.device), -(-test.data.count // options.batch)
    try:
        for images, labels in tqdm(test.data, total=batches, disable=None, unit="batch"):
            inputs = normalize(images, network.transform.mean, network.transform.std)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = network.model(inputs).float()[:, test.columns]
            logits, order = logits.sort(descending=True, stable=True)
            hits = order[:, :5] == labels[:, None]
            confidence = logits.softmax(1)[:, 0]
            seen.append(torch.stack([labels, hits[:, 0], hits.any(1), confidence], 1).cpu().double())
        bad = test.data.bad_files
    finally:
        test.data.close()
    label, first, five, confidence = torch.cat(seen).numpy().T  # (N, 4) -> 4 x (N,)
    if len(label) + len(bad) != test.data.count:
        counts = f"{len(label)} images evaluated, {len(bad)} unreadable, of {test.data.count}"
        raise RuntimeError(f"{test.path}: {counts}")
    if not len(label):
        raise UsageError(f"{test.path} has no readable image")
    found = {"images": len(label), "top1": 100 * first.mean(), "top5": 100 * five.mean()}
    if options.calibration:
        found["ece"] = 100 * calibration_error(confidence, first == 1)
    if options.per_class:
        places = [(name, label == i) for i, name in enumerate(test.data.classes)]
        found["per_class"] = {name: 100 * first[at].mean() for name, at in places if at.any()}
    return found | {"classes": len(test.data.classes), "unreadable": [list(item) for item in bad]}


def accuracy(options: AccuracyOptions) -> None:
    """Evaluate on every folder; print and write the table."""
    options = replace(options, device=str(pick_device(options.device)))
    if options.device == "cpu":
        keep_large_buffers()
    network = open_network(options)
    network.model.to(options.device, memory_format=torch.channels_last)
    published = {**TABLE_3.get(network.key, {})}
    if network.key in TABLE_1:
        published["imagenet"] = TABLE_1[network.key].top1
    rows, stem = [], results_stem(options.out, f"accuracy-{Path(options.checkpoint).stem}", options)
    for test in open_sets(network, options):
        found = evaluate_set(network, test, options)
        paper = published.get(test.name.lower())
        rows.append({"set": test.name, "folder": test.path, **found, "paper_top1": paper})
        write_accuracy(stem, rows, network.transform, options)  # what is known stays if a later folder fails
    print(accuracy_text(rows, network.transform, options), end="")
    for row in rows:
        for path, reason in row["unreadable"]:
            print(f"left out, unreadable: {path} ({reason})")
        lowest = sorted(row.get("per_class", {}).items(), key=lambda item: item[1])[:10]
        if lowest:
            print(f"{row['set']}, lowest top-1: " + ", ".join(f"{n} {value:.1f}" for n, value in lowest))


def accuracy_text(rows: list[dict], transform: EvalTransform, options: AccuracyOptions) -> str:
    """The Markdown table, with what was evaluated above it."""
    header = ["set", "images", "classes", "top-1, %", "paper's", "top-5, %", "ECE, %"]
    table = []
    for row in rows:
        cells = [row["set"], f"{row['images']:,}", str(row["classes"]), f"{row['top1']:.2f}"]
        cells += ["" if row["paper_top1"] is None else str(row["paper_top1"]), f"{row['top5']:.2f}"]
        table.append([*cells, f"{row['ece']:.2f}" if "ece" in row else ""])
    shown = f"{transform.size} pixels, {transform.crop_pct:.3g} of the resized shorter side"
    shown += f", {transform.interpolation}, {options.dtype}"
    return f"{options.checkpoint}: {shown}\n\n{filled_columns(header, table)}"


def write_accuracy(stem: Path, rows: list[dict], transform: EvalTransform, options: AccuracyOptions) -> None:
    record = {"machine": machine(torch.device(options.device)), "options": asdict(options)}
    record |= {"transform": transform.to_dict(), "rows": rows}
    write_both(stem, record, accuracy_text(rows, transform, options))


# --------------------------------------------------------------------------------------------------
# figures: the paper's figures 2 and 3


@dataclass(frozen=True)
class FiguresOptions:
    """Accuracy against MACs and throughput, bubble area = parameters: the paper's figures 2 and 3.

    From the paper's numbers, and figure 3 once more from the measured speed in each given file.
    """

    results: tuple[str, ...] = argument("JSON files that `bench.py speed` wrote", default=())
    out: str = option("results", "folder of the figures, SVG and PNG")


class Bubble(typing.NamedTuple):
    """One model in a figure; `top1` in %, `parameters` in millions, `kind` a key of COLOURS."""

    label: str
    kind: str
    x: float
    top1: float
    parameters: float


COLOURS = {"NEXcepTion": "#c0392b", "conv": "#5b93bd", "transformer": "#d9a441"}
AREA_PER_MILLION = 11.0  # points²: 50M parameters make a bubble 26 points wide


def figures(options: FiguresOptions) -> None:
    """Draw figures 2 and 3 from the paper's table, and figure 3 from every results file."""
    out = Path(options.out)
    names = [result_name(path) for path in options.results]
    if len(set(names)) < len(names):
        raise UsageError(f"two files of one name would give one figure: {' '.join(options.results)}")
    pictures = [(*measured_bubbles(Path(path)), f"figure-3-{result_name(path)}") for path in options.results]
    for number, quantity, axis in (
        (2, "macs", "10⁹ multiply-accumulates an image (the paper's “FLOPs”)"),
        (3, "speed", "images/s (the paper's: RTX 2080 Ti, batch 256, mixed precision)"),
    ):
        bubbles = [bubble(key, float(getattr(row, quantity))) for key, row in TABLE_1.items()]
        pictures.append((bubbles, axis, f"figure-{number}"))
    for bubbles, axis, name in pictures:
        draw(bubbles, axis, out / name)


def result_name(path: str) -> str:
    """`cpu-float32` for `results/speed-cpu-float32.json`."""
    return Path(path).stem.removeprefix("speed-")


def bubble(key: str, x: float) -> Bubble:
    row = TABLE_1[key]
    kind = "NEXcepTion" if key.startswith("nexception") else row.kind
    return Bubble(row.label, kind, x, row.top1, float(row.parameters))


def measured_bubbles(path: Path) -> tuple[list[Bubble], str]:
    """Table 1's models with a results file's speed, and the axis' title; `UsageError` if it has none."""
    try:
        record = json.loads(path.read_text())
        rows, options, here = record["rows"], record["options"], record["machine"]
        bubbles = [
            bubble(row["name"], statistics.fmean(row["samples"]))
            for row in rows
            if row.get("samples") and row["variant"] == "" and row["name"] in TABLE_1
            if row["size"] == TABLE_1[row["name"]].size  # at another one, the accuracy is not the paper's
        ]
        what = "trained images/s" if options["train"] else "images/s"
        how = [f"batch {options['batch']}", options["dtype"]]
        how += [word for word in ("compile", "fuse", "triton") if options.get(word)]
        where = here.get("gpu") or f"{here['threads']} CPU threads"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no results file of `bench.py speed`: {error!r}") from error
    if not bubbles:
        raise UsageError(f"{path} has no measured model of the paper's Table 1")
    return bubbles, f"{what} (measured: {where}, {', '.join(how)})"


def draw(bubbles: list[Bubble], axis_title: str, stem: Path) -> None:
    """Write `stem`.svg and .png: bubbles with labels that overlap neither each other nor the frame."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nexception"  # the same picture gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.3, 5.6), dpi=200, layout="constrained")
    for item in sorted(bubbles, key=lambda item: -item.parameters):
        area = item.parameters * AREA_PER_MILLION
        axes.scatter(
            item.x, item.top1, area, COLOURS[item.kind], alpha=0.65, linewidths=0.8, edgecolors="white"
        )
    axes.set_xlabel(axis_title, fontsize=10)
    axes.set_ylabel("ImageNet-1K top-1, % (published)", fontsize=10)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.margins(0.09, 0.11)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = [axes.scatter([], [], 70, colour, label=kind, alpha=0.65) for kind, colour in COLOURS.items()]
    sizes = [
        axes.scatter(
            [],
            [],
            millions * AREA_PER_MILLION,
            "0.75",
            label=f"{millions}M" + " parameters" * (millions == 50),
        )
        for millions in (10, 25, 50)
    ]
    figure.legend(
        handles=kinds + sizes,
        loc="outside upper center",
        ncols=6,
        frameon=False,
        fontsize=9,
        borderpad=1.0,
    )
    place_labels(axes, bubbles)
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        file = io.BytesIO()
        figure.savefig(file, format=suffix[1:], metadata=metadata)
        write_result(stem.with_name(stem.name + suffix), file.getvalue())
    pyplot.close(figure)
    print(f"written: {stem}.svg, {stem}.png")


def place_labels(axes, bubbles: list[Bubble]) -> list:
    """Write every bubble's label where it covers least, with a thin line from where it is away; the texts.

    Each label in turn moves to the cheapest of its candidate places (around its bubble, at growing distances)
    until none moves any more.
    """
    axes.figure.draw_without_rendering()
    scale = axes.figure.dpi / 72
    centres = axes.transData.transform([(item.x, item.top1) for item in bubbles])
    radii = np.array([math.sqrt(item.parameters * AREA_PER_MILLION / math.pi) * scale for item in bubbles])
    texts = []
    for item in bubbles:
        weight = "bold" if item.kind == "NEXcepTion" else "normal"
        texts.append(
            axes.text(item.x, item.top1, item.label, fontsize=9, weight=weight, ha="center", va="center")
        )
    halves = np.array([text.get_window_extent().size for text in texts]) / 2 + 3 * scale
    frame = axes.get_window_extent().extents
    places = [
        [
            centre
            + (radius + gap * scale) * direction
            + np.sign(direction.round(6)) * half * abs(direction) ** 0.5
            for gap in (1, 6, 12, 20, 30, 42, 56)
            for direction in (np.array([math.cos(a), math.sin(a)]) for a in np.arange(24) * math.pi / 12)
        ]
        for centre, radius, half in zip(centres, radii, halves, strict=True)
    ]
    at = np.array([own[0] for own in places])
    for _ in range(20):
        before = at.copy()
        for i, own in enumerate(places):
            at[i] = min(own, key=lambda place, i=i: crowding(place, i, at, halves, (centres, radii), frame))
        if (before == at).all():
            break
    to_data = axes.transData.inverted().transform
    for text, place, half, centre, radius in zip(texts, at, halves, centres, radii, strict=True):
        text.set_position(to_data(place))
        nearest = np.clip(centre, place - half, place + half)
        away = np.linalg.norm(nearest - centre)
        if away > radius + 8 * scale:
            ends = to_data([centre + (nearest - centre) * radius / away, nearest])
            axes.plot(*ends.T, color="0.5", linewidth=0.6, zorder=1)
    return texts


def crowding(place, i: int, at, halves, circles: tuple, frame) -> float:
    """What label i costs at `place`: its overlap with labels, lines, bubbles and frame, and its distance."""
    low, high = place - halves[i], place + halves[i]
    centres, radii = circles
    others = np.arange(len(at)) != i
    outside = np.maximum(0, np.concatenate([frame[:2] - low, high - frame[2:]])).sum()
    overlap = np.minimum(high, at + halves) - np.maximum(low, at - halves)
    covered = np.maximum(0, overlap).prod(1)[others].sum()
    reach = np.maximum(0, radii - np.linalg.norm(np.clip(centres, low, high) - centres, axis=1)).sum()
    own, lines = line(centres[i], place, halves[i]), line(centres, at, halves)
    crossed = (abs(own - at) < halves).all(-1).sum(0) + (abs(lines - place) < halves[i]).all(-1).sum(0)
    crossed += (np.linalg.norm(own - centres, axis=-1) < radii).sum(0)
    distance = np.linalg.norm(place - centres[i])
    return 1000 * outside + 100 * covered + 60 * crossed[others].sum() + 30 * reach + 3 * distance


def line(centre, place, half) -> np.ndarray:
    """(10, N, 2): ten points on the line from each bubble's centre to its label's box."""
    nearest = np.clip(centre, place - half, place + half)
    return centre + (nearest - centre) * np.linspace(0.1, 1, 10)[:, None, None]


# --------------------------------------------------------------------------------------------------
# export: files for other runtimes


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint as a torch.export program and as ONNX, and check both against eager outputs."""

    checkpoint: str = argument("a file of train.py, the authors' or timm's Xception")
    formats: tuple[str, ...] = option(
        ("program", "onnx"), "program (torch.export, .pt2), onnx (needs the packages onnx and onnxscript)"
    )
    fuse: bool = option(True, "fold the batch norms first")
    size: int = option(0, "input pixels a side; 0: the checkpoint's own", least=0)
    out: str = option("", "folder of the files; empty: the checkpoint's")


def export(options: ExportOptions) -> None:
    """Write NAME.pt2, NAME.onnx and NAME.export.json (classes, transform); the batch size stays free."""
    unknown = set(options.formats) - {"program", "onnx"}
    if unknown or not options.formats:
        raise UsageError(f"--formats {','.join(options.formats)}: choose from program, onnx")
    model = load_checkpoint(options.checkpoint, fuse=options.fuse).requires_grad_(False)
    size = options.size or model.transform.size
    images = torch.randn(3, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    folder = Path(options.out) if options.out else Path(options.checkpoint).parent
    folder.mkdir(parents=True, exist_ok=True)
    program_file, onnx_file, facts_file = (
        folder / (Path(options.checkpoint).stem + suffix) for suffix in (".pt2", ".onnx", ".export.json")
    )
    with torch.no_grad():
        wanted = model(images).numpy()
    if "program" in options.formats:
        with written_whole(program_file) as file:
            torch.export.save(program, file)
        reloaded = torch.export.load(program_file).module()
        check_outputs(program_file, wanted, lambda x: reloaded(torch.from_numpy(x)).numpy(), images)
    if "onnx" in options.formats:
        export_onnx(program, onnx_file, wanted, images)
    transform = replace(model.transform, size=size).to_dict()
    write_json(facts_file, {"classes": model.classes, "transform": transform})


@contextlib.contextmanager
def written_whole(path: Path):
    """A temporary path beside `path`, which takes its place when the body has succeeded."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # torch.export.save wants the suffix
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def export_onnx(
    program: torch.export.ExportedProgram, path: Path, wanted: np.ndarray, images: torch.Tensor
) -> None:
    """Write and check the ONNX file; says so where the packages for one or the other are not installed."""
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        print(f"{path}: not written, needs `pip install {' '.join(missing)}`")
        return
    onnx = torch.onnx.export(
        program, (images,), input_names=["images"], output_names=["logits"], verbose=False
    )
    with written_whole(path) as file:
        onnx.save(file, external_data=False)
    if importlib.util.find_spec("onnxruntime") is None:
        print(f"{path}: written, not checked: needs `pip install onnxruntime`")
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    check_outputs(path, wanted, lambda x: session.run(None, {"images": x})[0], images)


def check_outputs(path: Path, wanted: np.ndarray, run: Callable, images: torch.Tensor) -> None:
    """Compare a written file with eager outputs, for the whole batch and for its first image alone."""
    worst = 0.0
    for count in (len(images), 1):
        difference = np.abs(run(images[:count].numpy()) - wanted[:count]).max()
        worst = max(worst, float(difference / np.abs(wanted).max()))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, logits within {worst:.1e} of eager's, relatively")
    if not worst <= 1e-4:
        raise RuntimeError(f"{path} computes something else than the checkpoint: {worst:.1e} away")


# --------------------------------------------------------------------------------------------------
# data: the input pipeline


@dataclass
class DataOptions:
    """Images/s of the input pipeline, a core and by number of workers, beside timm's with the same recipe."""

    path: str = argument("a folder of class folders, or one with train/; none: photographs made here", "")
    batch: int = option(64, "images in a batch", least=1)
    size: int = option(224, "pixels a side", least=8)
    repetitions: int = option(20, "turns of each, a batch a turn in one process", least=1)
    workers: tuple[str, ...] = option(
        (), "numbers of workers to time, 1,2,...; empty: 1, 2, 4, ... all cores"
    )
    seconds: float = option(
        6.0, "least time of one turn with workers, in seconds; they take five turns each", least=0
    )
    rate: float = option(1000.0, "images/s at which a GPU trains, for the advice on workers", least=0)
    name: str = option("", "the machine's name in the files written; empty: cores and processor family")
    out: str = option("results", "folder of the JSON and Markdown files")


# Sizes of made photographs and how often: ImageNet's commonest ones.
PHOTOGRAPH_SIZES = {
    (500, 375): 11,
    (500, 333): 4,
    (375, 500): 3,
    (333, 500): 1,
    (640, 480): 1,
}  # width, height


def make_photographs(folder: Path, count: int = 300, links: int = 8) -> None:
    """Write `count` JPEG files, about 100 KB each, cut from scikit-learn's and scikit-image's photographs.

    Crops, zooms, flips and a little sensor noise make them differ; every file is linked `links` times, so
    that an epoch is long enough to time.
    """
    from sklearn.datasets import load_sample_image

    try:
        import skimage.data
    except ModuleNotFoundError:
        raise UsageError("made photographs: pip install scikit-image, or name a PATH") from None

    photographs = [load_sample_image("china.jpg"), load_sample_image("flower.jpg"), skimage.data.astronaut()]
    photographs += [
        skimage.data.coffee(),
        skimage.data.chelsea(),
        skimage.data.rocket(),
        skimage.data.retina(),
    ]
    photographs += [*skimage.data.stereo_motorcycle()[:2], skimage.data.hubble_deep_field()]
    rng = np.random.default_rng(0)
    sizes = [size for size, weight in PHOTOGRAPH_SIZES.items() for _ in range(weight)]
    for n in range(count):
        image = Image.fromarray(photographs[n % len(photographs)])
        width, height = sizes[rng.integers(len(sizes))]
        part = min(image.width / width, image.height / height) * rng.uniform(0.7, 1)
        left, top = rng.uniform(0, image.width - part * width), rng.uniform(0, image.height - part * height)
        box = (left, top, left + part * width, top + part * height)
        pixels = np.asarray(
            image.resize((width, height), Image.Resampling.BICUBIC, box=box), dtype=np.float32
        )
        pixels = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255)[:, :: rng.choice([-1, 1])]
        place = folder / f"class_{n % 10}" / f"{n}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place, quality=95)
        for link in range(1, links):
            os.link(place, place.with_name(f"{n}_{link}.jpg"))


class Pipelines:
    """Our pipeline and timm's on the same files, each as functions of the indices of a batch."""

    def __init__(self, folder: Path, options: DataOptions):
        files = {"train": FileList(folder), "val": FileList(folder)}
        transform = EvalTransform(size=options.size)
        self.files = files["train"]
        self.dataset = FolderDataset(files, transform, Augmentation(repeats=1))
        self.plain = FolderDataset(files, transform, Augmentation(layers=0))
        self.options = options
        self.timm = {}
        with contextlib.suppress(ModuleNotFoundError):
            from timm.data import create_dataset, create_transform

            shape = {"input_size": (3, options.size, options.size), "use_prefetcher": True}
            recipe = {"auto_augment": "rand-m7-mstd0.5-inc1", "interpolation": "random"}
            made = {"training": create_transform(**shape, is_training=True, **recipe)}
            made["evaluation"] = create_transform(**shape, interpolation="bicubic", crop_pct=0.95)
            for use, images in made.items():
                self.timm[use] = create_dataset("", root=str(folder), transform=images)

    def decode(self, indices: np.ndarray) -> None:
        for index in indices:
            pipeline.decode(self.dataset.read(self.files.path(index)))

    def ours(self, use: str, indices: np.ndarray, turn: int, dataset: FolderDataset | None = None) -> None:
        job = Job("train", indices, (0, 0, 0, turn)) if use == "training" else Job("val", indices, None)
        _, _, bad = (dataset or self.dataset)[job]
        if bad:
            raise RunError(f"{bad[0][0]} cannot be read ({bad[0][1]}): time it on whole files")

    def theirs(self, use: str, indices: np.ndarray) -> None:
        from timm.data.loader import fast_collate

        fast_collate([self.timm[use][index] for index in indices])


def time_core(pipelines: Pipelines, options: DataOptions) -> dict[str, list[float]]:
    """Images a CPU second of one process with one thread; all take turns on the same images.

    CPU seconds, because what other processes of the machine take meanwhile should not count.
    """
    rng, rates = np.random.default_rng(0), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for turn in range(-1, options.repetitions):  # the first turn warms up
        indices = rng.permutation(len(pipelines.files))[: options.batch]
        runs = {"decoding alone": lambda i=indices: pipelines.decode(i)}
        for use in ("training", "evaluation"):
            runs[use] = lambda i=indices, u=use, t=turn: pipelines.ours(u, i, t + 1)
            if use in pipelines.timm:
                runs[f"timm {use}"] = lambda i=indices, u=use: pipelines.theirs(u, i)
        runs["without RandAugment"] = lambda i=indices, t=turn: pipelines.ours(
            "training", i, t + 1, pipelines.plain
        )
        for name, run in runs.items():
            begun = time.process_time()
            run()
            if turn >= 0:
                rates.setdefault(name, []).append(len(indices) / (time.process_time() - begun))
    torch.set_num_threads(threads)
    return rates


def time_stages(pipelines: Pipelines, options: DataOptions) -> dict[str, float]:
    """Share of each stage in the time of a training batch, in one process with one thread."""
    spent: dict[str, float] = {}

    def timed(stage: str, function: Callable) -> Callable:
        def run(*arguments):
            begun = time.process_time()
            try:
                return function(*arguments)
            finally:
                spent[stage] = spent.get(stage, 0) + time.process_time() - begun

        return run

    threads, rng = torch.get_num_threads(), np.random.default_rng(1)
    torch.set_num_threads(1)
    batches = [rng.permutation(len(pipelines.files))[: options.batch] for _ in range(options.repetitions)]
    pipelines.ours("training", batches[0], 0)
    stages = {"decode": "decoding", "resize": "crop and resize", "rand_augment": "RandAugment"}
    kept = {name: getattr(pipeline, name) for name in stages}
    read = pipelines.dataset.read
    try:
        pipelines.dataset.read = timed("reading", read)
        for name, stage in stages.items():
            setattr(pipeline, name, timed(stage, kept[name]))
        begun = time.process_time()
        for turn, indices in enumerate(batches):
            pipelines.ours("training", indices, turn)
        total = time.process_time() - begun
    finally:
        pipelines.dataset.read = read
        for name, function in kept.items():
            setattr(pipeline, name, function)
        torch.set_num_threads(threads)
    shares = {stage: seconds / total for stage, seconds in spent.items()}
    return shares | {"the rest": 1 - sum(shares.values())}


def time_workers(pipelines: Pipelines, workers: int, options: DataOptions) -> dict[str, list[float]]:
    """Training images/s through `workers` processes, ours and timm's by turns."""
    plan = Plan(options.batch, 1, options.batch, 0, 0, 1)
    source = FolderSource(pipelines.dataset, workers, torch.device("cpu"), max_bad_files=0)
    data = Data("photographs", source, pipelines.files.classes, pipelines.dataset.transform, plan)
    endless = {"ours": itertools.chain.from_iterable(map(data.train_batches, itertools.count()))}
    if pipelines.timm:
        from timm.data.loader import fast_collate

        loader = torch.utils.data.DataLoader(
            pipelines.timm["training"], batch_size=options.batch, shuffle=True, num_workers=workers,
            collate_fn=fast_collate, drop_last=True, persistent_workers=True,
        )  # fmt: skip
        endless["timm"] = itertools.chain.from_iterable(itertools.repeat(loader))
    rates: dict[str, list[float]] = {}
    for turn in range(6):
        for name, batches in endless.items():
            # What was prepared while the other one was being timed is not counted.
            for _ in range(3 * workers):
                next(batches)
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < (options.seconds if turn else 1):
                count += len(next(batches)[0])
            seconds = time.perf_counter() - begun
            if turn:
                rates.setdefault(name, []).append(count / seconds)
            # Until its workers have prepared what they may: that is not to disturb the other one's turn.
            time.sleep(3 * options.batch * workers * seconds / count)
    data.close()
    return rates


def time_small(options: DataOptions) -> dict[str, list[float]]:
    """Images/s of 32 x 32 training batches in one thread (CPU seconds), ours and timm's by turns."""
    from sklearn.datasets import load_sample_image

    keep_large_buffers()  # as training on a CPU does
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    images = photograph.unfold(1, 32, 8).unfold(2, 32, 8).flatten(1, 2).transpose(0, 1).contiguous()
    labels, pixels = torch.zeros(len(images), dtype=torch.int64), images.permute(0, 2, 3, 1).numpy()
    rng, rates = np.random.default_rng(0), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batch, recipes = 512, {"crop and flip": 0, "crop, flip and RandAugment": 2}
    sources, theirs = {}, {}
    for name, layers in recipes.items():
        augment = Augmentation(padding=4, layers=layers, repeats=1)
        sources[name] = TensorSource(
            {"train": (images, labels)}, torch.device("cpu"), augment, (0.5, 0.5, 0.5)
        )
        with contextlib.suppress(ModuleNotFoundError):
            from timm.data.auto_augment import rand_augment_transform
            from timm.data.transforms import ToNumpy

            steps = [
                torchvision.transforms.RandomCrop(32, padding=4),
                torchvision.transforms.RandomHorizontalFlip(),
            ]
            if layers:
                steps.append(rand_augment_transform("rand-m7-mstd0.5-inc1", {"img_mean": (128, 128, 128)}))
            theirs[name] = torchvision.transforms.Compose([*steps, ToNumpy()])
    for turn in range(-1, options.repetitions):
        for name, source in sources.items():
            jobs = [Job("train", rng.permutation(len(images))[:batch], (0, 0, 0, n)) for n in range(8)]
            begun = time.process_time()
            for _ in source.batches(iter(jobs)):
                pass
            if turn >= 0:
                rates.setdefault(name, []).append(8 * batch / (time.process_time() - begun))
            if name in theirs:
                from timm.data.loader import fast_collate

                begun = time.process_time()
                fast_collate([(theirs[name](Image.fromarray(pixels[n])), 0) for n in jobs[0].indices])
                if turn >= 0:
                    rates.setdefault(f"timm {name}", []).append(batch / (time.process_time() - begun))
    torch.set_num_threads(threads)
    return rates


def with_deviation(samples: list[float]) -> str:
    return "{:,.0f} ± {:,.0f}".format(*mean_and_deviation(samples))


def data_rows(rates: dict[str, list[float]], names: dict[str, str]) -> list[list[str]]:
    """Rows of what, our images/s, timm's, and the median ratio of a turn; names: our key -> timm's key."""
    rows = []
    for ours, theirs in names.items():
        row = [ours, with_deviation(rates[ours]), "", ""]
        if theirs in rates:
            ratios = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
            row[2:] = with_deviation(rates[theirs]), f"{statistics.median(ratios):.2f}"
        rows.append(row)
    return rows


def advice(by_workers: dict[int, dict[str, list[float]]], rate: float) -> str:
    """How many workers feed a GPU that trains at `rate` images/s, from the best rate per worker measured."""
    means = {workers: statistics.mean(rates["ours"]) for workers, rates in by_workers.items()}
    enough = [workers for workers, mean in sorted(means.items()) if mean >= rate]
    if enough:
        return f"A GPU that trains at {rate:,.0f} images/s is fed by --workers {enough[0]} here (measured)."
    workers, mean = max(means.items(), key=lambda entry: entry[1])
    needed, cores = math.ceil(rate * workers / mean), machine(torch.device("cpu"))["cores"]
    return (
        f"A GPU that trains at {rate:,.0f} images/s needs --workers {needed} on as many processor cores: one "
        f"gives {mean / workers:,.0f} images/s here, and this machine's {cores} give {mean:,.0f}."
    )


def data(options: DataOptions) -> None:
    """Time the input pipeline; print and write the table, the stages and the advice."""
    cores = machine(torch.device("cpu"))["cores"]
    if not all(number.isdigit() and int(number) for number in options.workers):
        raise UsageError(
            f"--workers {','.join(options.workers)}: numbers of workers, at least 1, as in 1,2,4"
        )
    counts = [int(n) for n in options.workers] or sorted({2**n for n in range(8) if 2**n < cores} | {cores})
    with tempfile.TemporaryDirectory() as made:
        folder = Path(options.path or made)
        if not options.path:
            print("making photographs ...", flush=True)
            make_photographs(folder)
        folder = folder / "train" if (folder / "train").is_dir() else folder
        pipelines = Pipelines(folder, options)
        sizes = [os.path.getsize(pipelines.files.path(n)) for n in range(min(2000, len(pipelines.files)))]
        by_workers = {
            n: time_workers(pipelines, n, options) for n in counts
        }  # forked before a thread is started
        pipelines.dataset.own_process()
        pipelines.plain.own_process()
        core, small = time_core(pipelines, options), time_small(options)
        shares = time_stages(pipelines, options)
    names = {
        name: f"timm {name}" for name in ("training", "evaluation", "without RandAugment", "decoding alone")
    }
    rows = data_rows(core, names)
    for n, rates in by_workers.items():
        rows += [
            [f"training, {n} worker{'s' * (n > 1)}", *row[1:]] for row in data_rows(rates, {"ours": "timm"})
        ]
    rows += [
        [f"32 x 32: {row[0]}", *row[1:]]
        for row in data_rows(small, {n: f"timm {n}" for n in list(small)[::2]})
    ]
    table = markdown_table(["images/s", "ours", "timm", "ratio"], rows)
    stages = ", ".join(f"{stage} {100 * share:.0f}%" for stage, share in shares.items())
    table += f"\nStages of a training batch: {stages}.\n\n{advice(by_workers, options.rate)}\n"
    print(table)
    record = {
        "options": asdict(options),
        "machine": machine(torch.device("cpu")),
        "mean_file_bytes": sum(sizes) / len(sizes),
    }
    record |= {"core": core, "workers": by_workers, "small": small, "stages": shares}
    record["load_average"] = os.getloadavg() if hasattr(os, "getloadavg") else None
    record["versions"] = {name: version(name) for name in ("torchvision", "pillow", "timm")}
    write_both(results_stem(options.out, "data-" + (options.name or machine_name()), options), record, table)


def version(package: str) -> str | None:
    """An installed package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_name() -> str:
    """A plain description such as `2-core-xeon`."""
    described = machine(torch.device("cpu"))
    families = ("xeon", "epyc", "ryzen", "core", "apple", "neoverse")
    family = next((f for f in families if f in described["processor"].lower()), platform.machine())
    return f"{described['cores']}-core-{family}"


# --------------------------------------------------------------------------------------------------
# lamb: the optimizer's step


@dataclass
class LambOptions:
    """Milliseconds of an optimizer step: ours beside timm's Lamb and PyTorch's fused AdamW."""

    model: str = option("nexception_t", f"whose parameters to step: {', '.join(MODELS)}, or a JSON config")
    repetitions: int = option(50, "timed steps of each; they take turns", least=1)
    device: str = option("", "cpu, cuda ... (default: a GPU where there is one)")
    threads: int = option(0, "CPU threads; 0: PyTorch's own choice", least=0, most=1024)
    out: str = option("results", "folder of the JSON and Markdown files")


def step_seconds(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Seconds of one step, from an idle device to an idle device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    begun = time.perf_counter()
    optimizer.step()
    synchronize()
    return time.perf_counter() - begun


def lamb(options: LambOptions) -> None:
    """Time steps of the optimizers in turn, each on a copy of the parameters; write and print a table."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    if device.type == "cpu":
        keep_large_buffers()
    torch.manual_seed(0)
    model = create_model(options.model).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) / parameter.numel() ** 0.5
    makers = {"Lamb, ours": Lamb, "AdamW, PyTorch, fused": functools.partial(torch.optim.AdamW, fused=True)}
    if importlib.util.find_spec("timm"):
        from timm.optim import Lamb as TimmLamb

        makers["Lamb, timm"] = TimmLamb
        makers["Lamb, timm, foreach"] = functools.partial(TimmLamb, foreach=True)
    optimizers = {name: make(_stepped_groups(model), lr=2e-3) for name, make in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for repetition in range(options.repetitions + 3):
        for name, optimizer in optimizers.items():
            taken = step_seconds(optimizer, device)
            if repetition >= 3:  # the first steps make the moments
                seconds[name].append(taken)
    ours = seconds["Lamb, ours"]
    rows = []
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, ours, strict=True))
        spread = f"{statistics.mean(times) * 1e3:.2f} ± {statistics.pstdev(times) * 1e3:.2f}"
        median = f"{statistics.median(times) * 1e3:.2f}"
        rows.append([name, spread, median, f"{statistics.median(ratios):.2f}"])
    table = markdown_table(["optimizer", "ms a step", "median", "times ours"], rows)
    print(f"{options.model}, {count_parameters(model):,} parameters, {options.repetitions} steps in turn\n")
    print(table)
    record = {"options": asdict(options), "machine": machine(device), "seconds": seconds}
    write_both(
        results_stem(options.out, f"lamb-{Path(options.model).stem}-{device.type}", options), record, table
    )


def _stepped_groups(model: nn.Module) -> list[dict]:
    """Parameter groups as in training, on copies of the parameters and gradients."""
    groups = parameter_groups(copy.deepcopy(model), 0.02)
    for group, original in zip(groups, parameter_groups(model, 0.02), strict=True):
        for mine, given in zip(group["params"], original["params"], strict=True):
            mine.grad = given.grad.clone()
    return groups


# --------------------------------------------------------------------------------------------------
# trial: one trial of the search


@dataclass
class TrialOptions:
    """Seconds of a trial of `search.py`, beside the same training by timm's loader and a plain loop."""

    data: str = option("digits", "digits, cifar10 or cifar100: 32 x 32 images")
    root: str = option("data", "folder of CIFAR's files")
    model: str = option(
        "nexception_reduced", "the trial's macro-architecture (the default is the paper's width)"
    )
    epochs: int = option(1, "epochs of a trial", least=1)
    batch: int = option(64, "images in a training batch", least=1)
    workers: int = option(2, "processes of timm's loader", least=0)
    repetitions: int = option(3, "trials of each kind; they take turns", least=1)
    device: str = option("auto", "where trials run", choices=("auto", "cpu", "cuda"))
    out: str = option("results", "folder of the JSON and Markdown files")


class SmallImages(torch.utils.data.Dataset):
    """A split of a small set as (PIL image, label), the form that loaders of image files work on."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Callable | None = None):
        self.images, self.labels = images.permute(0, 2, 3, 1).cpu().numpy(), labels.tolist()
        self.transform = transform  # timm's loader sets it

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def plain_trial(config: dict, seed: int, budget: float, settings: dict):
    """`search.train` as it is commonly written: timm's loader, mixup, loss and LAMB, a plain loop.

    Takes and returns what `search.train` does, so that the same trial process can run either.
    """
    import timm.data
    from timm.loss import BinaryCrossEntropy
    from timm.optim import Lamb as TimmLamb

    import search

    device = torch.device(settings["device"])
    torch.set_num_threads(settings["threads"] or torch.get_num_threads())
    recipe = search.trial_options(settings, round(budget), seed)
    data = search.opened(recipe, device)
    begun = time.perf_counter()
    torch.manual_seed(seed)
    network = search.model_config(config, settings["model"])
    network = create_model(network, num_classes=len(data.classes), input_size=data.size).to(device)
    shape = {"input_size": (3, data.size, data.size), "mean": data.mean, "std": data.std}
    shape |= {"batch_size": recipe.batch, "num_workers": settings["workers"], "device": device}
    loader = timm.data.create_loader(
        SmallImages(*data.tensors("train")), is_training=True, hflip=0.0, scale=(0.8, 1.0), **shape
    )
    scored = timm.data.create_loader(SmallImages(*data.tensors("val")), is_training=False, **shape)
    classes = len(data.classes)
    mixup = timm.data.Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)
    loss_of = BinaryCrossEntropy(target_threshold=recipe.loss_threshold, smoothing=0.0)
    optimizer = TimmLamb(parameter_groups(network, recipe.weight_decay), lr=recipe.lr)
    for _ in range(recipe.epochs):
        network.train()
        for images, labels in loader:
            images, targets = mixup(*on_device(images, labels, device))
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
                images, labels = on_device(images, labels, device)
                hits += (network(images).argmax(1) == labels).sum().item()
    top1 = 100 * hits / data.count("val")
    return 1 - top1 / 100, {"top1": top1, "seconds": time.perf_counter() - begun}


def on_device(images: torch.Tensor, labels: torch.Tensor, device: torch.device):
    return images.to(device), labels.to(device)


def trial(options: TrialOptions) -> None:
    """Run trials of both kinds by turns, each in a warm process of its own; write and print the seconds."""
    import search

    found = torch.device(search.trial_devices(search.Options(device=options.device))[0][0])
    settings = {
        "data": options.data, "root": options.root, "model": options.model, "batch": options.batch,
        "device": str(found), "threads": torch.get_num_threads(), "workers": options.workers,
        "compile": False, "objectives": ["accuracy"], "split": "val",
    }  # fmt: skip
    job = {"config": search.POINTS["NEXcepTion"], "seed": 1, "budget": options.epochs, "settings": settings}
    job |= {"time_limit": math.inf, "memory_limit": math.inf}
    targets = {"search.py": "search:train", "timm's loader, plain loop": "bench:plain_trial"}
    path = [str(Path(__file__).parent), *(entry for entry in sys.path if entry)]
    processes = {name: search.TrialProcess(path, settings["threads"]) for name in targets}
    runs: dict[str, list[dict]] = {name: [] for name in targets}
    try:
        for repetition in range(options.repetitions):
            for name, process in processes.items():
                outcome = process.run({**job, "target": targets[name]})
                if outcome["status"] != "success":
                    raise RunError(f"{name}: {outcome['info']['error']}")
                runs[name].append({key: outcome["info"][key] for key in ("seconds", "top1")})
                print(f"{repetition + 1}/{options.repetitions} {name}: {runs[name][-1]}", flush=True)
    finally:
        for process in processes.values():
            process.kill()
    times = {name: [run["seconds"] for run in results] for name, results in runs.items()}
    ours, plain = times.values()
    ratios = [b / a for a, b in zip(ours, plain, strict=True)]
    rows = [[n, f"{statistics.mean(t):.2f}", f"{statistics.pstdev(t):.2f}"] for n, t in times.items()]
    table = markdown_table(["a trial", "seconds", "±"], rows)
    table += f"\n{statistics.mean(ratios):.2f} ± {statistics.pstdev(ratios):.2f} times as fast\n"
    print(table)
    record = {"options": asdict(options), "machine": machine(found), "runs": runs, "times_as_fast": ratios}
    write_both(results_stem(options.out, f"search-trial-{found.type}", options), record, table)


# --------------------------------------------------------------------------------------------------

# name -> (function of its options, options dataclass)
COMMANDS: dict[str, tuple[Callable, type]] = {
    "speed": (speed, SpeedOptions),
    "accuracy": (accuracy, AccuracyOptions),
    "figures": (figures, FiguresOptions),
    "export": (export, ExportOptions),
    "data": (data, DataOptions),
    "lamb": (lamb, LambOptions),
    "trial": (trial, TrialOptions),
}


def main(argv: list[str]) -> int:
    """Run one subcommand; errors are one sentence on stderr, status 2 for a mistake of the user's, else 1."""
    if not argv or argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        if argv and argv[0] in ("-h", "--help"):
            print(f"{__doc__}\ncommands: {known}")
            return 0
        print(f"bench.py: give a command, one of {known}", file=sys.stderr)
        return 2

    def complain(error: object, status: int) -> int:
        print(f"bench.py {argv[0]}: {error}", file=sys.stderr)
        return status

    command, options_type = COMMANDS[argv[0]]
    try:
        options = parse(options_type, argv[1:], prog=f"bench.py {argv[0]}")
        if options.out:
            check_writable(options.out)
        command(options)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        return complain(error, 2)
    except (RunError, OSError) as error:
        return complain(error, 1)
    except KeyboardInterrupt:
        return complain("stopped", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
