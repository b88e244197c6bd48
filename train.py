"""Train a network. By default: a small NEXcepTion on handwritten digits, 99% in about a minute on a CPU.

    python train.py                                               # digits, nexception_nano, two CPU cores
    torchrun --nproc_per_node=4 train.py --data /path/imagenet --model nexception_t       # the paper's run
    python train.py --data /path/imagenet --model nexception_t    # the same run on one GPU
    python train.py --data /path/photos --init-weights nexception_t.pth                   # fine-tuning
    python train.py --data /path/imagenet --eval nexception_t.pth # top-1 and top-5

The run folder (`--out`) holds `config.json` (the resolved options), `metrics.jsonl` (one line per epoch),
`last.pt` and the checkpoint before it, `previous.pt`, `best.pt` (the weights with the best validation top-1),
and `curves.png`. Repeat the command to resume a run: at worst, the unfinished epoch starts again. Random
draws are keyed by seed, epoch, step and virtual rank, and on a CPU the result is bit-identical to that of an
uninterrupted run; the paths of data, config and initial weights may differ. SIGTERM, SIGUSR1 and Ctrl-C save
in mid-epoch and exit with status 143, 138 and 130. More epochs change the schedule: to train further after a
finished run, start another from its weights (`--init-weights runs/x/best.pt --epochs 20`).

Each optimizer step takes processes x accumulate micro-batches of `batch` images. Each micro-batch is a
virtual rank with its own stride of the epoch's images, its own mixup draw and its own batch statistics, so
4 x 64 images are equivalent on one, two and four GPUs. Gradients are averaged over all micro-batches once per
step. Batch norms are not synchronized: as in the paper's run, each step starts from the running statistics of
virtual rank 0, which are averaged over the virtual ranks after each epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

if __name__ == "__main__":  # end without a traceback on Ctrl-C, also during the imports below
    sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)

from data import (
    MIXING,
    POLICIES,
    SMALL_SETS,
    Augmentation,
    Data,
    Plan,
    RunError,
    UsageError,
    cpu_count,
    default_augmentation,
    find_images,
    lock_file,
    open_data,
    write_whole,
)
from model import (
    MODELS,
    ModelConfig,
    create_model,
    keep_large_buffers,
    load_checkpoint,
    load_weights,
    read_checkpoint,
)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LOG_EVERY = 50  # steps between checks of the loss, which synchronize with the GPU
WARMUP_LR = 1e-4  # learning rate of the first warm-up epoch, unless --lr is lower
MIN_LR = 1e-6  # learning rate at the end of the cosine and in the cool-down, unless --lr is lower
MAX_GRAD_NORM = 1.0  # gradients are clipped to this global norm
SMALL_FOLDER = 100_000  # image folders with fewer training images do not get ImageNet's recipe
MAX_SKIPPED = 20  # consecutive float16 steps whose forward pass may overflow

# --------------------------------------------------------------------------------------------------
# Command line: each dataclass field is an option


def option(default, help, least=-math.inf, most=math.inf, *, above=-math.inf, below=math.inf, **settings):
    """Declare a dataclass field that becomes `--name`, with its bounds (`least` and `most` inclusive).

    `positional=True` makes it a positional argument, required if `default` is MISSING. Other settings, such
    as choices, are passed to argparse.
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    return field(default=default, metadata={"help": help, "bounds": bounds, **settings})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists the options)")


def parse(options: type, argv: list[str], prog: str, epilog: str = ""):
    """Parse a command line into the dataclass `options`, whose fields declare the options (see `option`).

    bool becomes --name and --no-name, tuple[str, ...] is comma-separated. Raises UsageError for unknown
    arguments and invalid values.
    """
    parser = Parser(prog, description=options.__doc__, epilog=epilog, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.argument_default = argparse.SUPPRESS  # what is not given is left to the dataclass
    hints, known = typing.get_type_hints(options), {}
    for entry in fields(options):
        settings, required = dict(entry.metadata), entry.default is MISSING
        bounds, positional = settings.pop("bounds"), settings.pop("positional", False)
        many = typing.get_origin(hints[entry.name]) is tuple
        kind = (*typing.get_args(hints[entry.name]), hints[entry.name])[0]  # of `kind | None` too
        name = entry.name if positional else "--" + entry.name.replace("_", "-")
        known[entry.name] = name, kind, many, bounds
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif positional:
            settings["nargs"] = ("+" if required else "*") if many else (None if required else "?")
        elif "choices" not in settings:
            settings["metavar"] = f"{kind.__name__},..." if many else kind.__name__
        default = ",".join(map(str, entry.default)) if many and not required else entry.default
        if default not in (MISSING, None, False, ""):
            settings["help"] += f" (default: {default})"
        parser.add_argument(name, **settings)
    values = vars(parser.parse_args(argv))
    for field_name, given in values.items():
        name, kind, many, bounds = known[field_name]
        texts = given if isinstance(given, list) else [given]
        if many and isinstance(given, str):
            texts = [text.strip() for text in given.split(",") if text.strip()]
        try:
            found = tuple(kind(text) for text in texts)
        except ValueError:
            parser.error(f"{name}: {given!r} is not of type {kind.__name__}")
        # Infinities and NaN fail, too.
        least, above, most, below = bounds.values()
        if kind in (int, float) and not all(least <= n <= most and above < n < below for n in found):
            wanted = [f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound)]
            parser.error(f"{name} must be {' and '.join(wanted) or 'finite'}, not {given}")
        values[field_name] = found if many else found[0]
    return options(**values)


class Output(io.FileIO):
    """Standard output or error: what a closed terminal, a closed pipe or a full disk refuses is dropped."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def run_script(main: typing.Callable[[list[str]], int]) -> typing.NoReturn:
    """Run `main` on the command line and exit; unencodable file names are printed with escapes."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        settings = {"encoding": getattr(sys, name).encoding, "errors": "backslashreplace"}
        raw = io.BufferedWriter(Output(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, line_buffering=True, **settings))
    sys.exit(main(sys.argv[1:]))


# --------------------------------------------------------------------------------------------------
# Figures and the machine, for all scripts


def subplots(columns: int, width: float, height: float, rows: int = 1, **kwargs):
    """Return a figure of `width` x `height` inches and its axes, (rows * columns,), without upper spines."""
    from matplotlib.figure import Figure  # here, since it takes as long to import as a short command

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path: Path) -> None:
    """Write a figure atomically, as .png or reproducible .svg. Raises RunError."""
    import matplotlib

    picture, kind = io.BytesIO(), path.suffix[1:]
    metadata = {"png": {"Software": None}, "svg": {"Date": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "nexception"}):
        figure.savefig(picture, format=kind, dpi=figure.dpi, metadata=metadata)
    write_whole(path, picture.getbuffer())


def machine(device: torch.device) -> dict:
    """Return processor, accelerator, threads, versions and command: everything that a timing depends on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, KeyError):  # more detail on Linux
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        info = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", first, re.MULTILINE))
        flags, vector = info["flags"].split(), ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        processor = " ".join([info["model name"], *(flag for flag in vector if flag in flags)])
    record = {
        "device": str(device), "processor": processor, "cores": cpu_count(),
        "threads": torch.get_num_threads(), "load_average": os.getloadavg(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(), "torch": torch.__version__,
        "command": shlex.join(["python", *sys.orig_argv[1:]]), "commit": "",
    }  # fmt: skip
    for package in ("torchvision", "timm", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            record[package] = importlib.metadata.version(package)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        record["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    if device.type == "cuda":
        record |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        record["cudnn"] = torch.backends.cudnn.version()
    return record


# --------------------------------------------------------------------------------------------------
# Parts of a recipe: schedule, mixing, losses, optimizers


def lr_at(epoch: int, options: Options) -> float:
    """Return the learning rate of an epoch: linear warm-up, cosine from `lr` to MIN_LR, then MIN_LR.

    The cosine starts at epoch 0, underneath the warm-up, as in timm's CosineLRScheduler by default: `lr`
    itself is never reached (paper, section 3.1).
    """
    lowest = min(MIN_LR, options.lr)
    if epoch < options.warmup_epochs:
        start = min(WARMUP_LR, options.lr)
        return start + epoch * (options.lr - start) / options.warmup_epochs
    cosine = 1 + math.cos(math.pi * min(epoch, options.epochs) / options.epochs)
    return lowest + (options.lr - lowest) / 2 * cosine


def mix(
    images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mix float images (B, 3, H, W) in place; return them and targets (B, num_classes), float32.

    Mixup or cutmix is drawn once per batch, and image i is mixed with image B-1-i (timm's `Mixup`, batch
    mode). mixup, cutmix: alphas of their Beta distributions, 0: none; if both are positive, each batch uses
    either with equal probability. The weight of cutmix accounts for the part of its box outside the image.
    """
    targets = F.one_hot(labels, num_classes).float()
    if not (mixup or cutmix):
        return images, targets
    rng.random()  # timm's draw of whether to mix at all
    cut = rng.random() < 0.5 if mixup and cutmix else bool(cutmix)
    alpha = cutmix if cut else mixup
    share = float(rng.beta(alpha, alpha))  # of image i
    if cut:
        (height, width), side = images.shape[-2:], math.sqrt(1 - share)
        box_height, box_width = int(height * side), int(width * side)
        y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
        top, bottom = max(y - box_height // 2, 0), min(y + (box_height + 1) // 2, height)
        left, right = max(x - box_width // 2, 0), min(x + (box_width + 1) // 2, width)
        share = 1 - (bottom - top) * (right - left) / (height * width)
        images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    else:
        others = images.flip(0).mul_(1 - share)
        images.mul_(share).add_(others)
    return images, targets * share + targets.flip(0) * (1 - share)


def bce_loss(logits: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Binary cross-entropy of (B, classes) logits, mean over both; targets above `threshold` are 1, others 0.

    A mixed image may thus have two positive classes (timm's BinaryCrossEntropy).
    """
    return F.binary_cross_entropy_with_logits(logits.float(), (targets > threshold).float())


# A new loss is one line: a function of logits (B, classes), targets (B, classes) in [0, 1], the mixed and
# normalized images (B, 3, H, W), which a teacher needs, and options.
LOSSES = {
    "bce": lambda logits, targets, images, options: bce_loss(logits, targets, options.loss_threshold),
    "soft_ce": lambda logits, targets, images, options: F.cross_entropy(logits.float(), targets),
}


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2020), equivalent to apex's FusedLAMB and timm's `Lamb` with their defaults.

    Clips the gradients of all groups to the global norm `max_grad_norm`. In groups with weight decay, scales
    each tensor's update (Adam's plus decay times the tensor) to the norm of the tensor, unless either norm is
    zero; groups without decay take plain Adam steps. Tensors of half precision, or with gaps in memory, are
    updated as dense float32 copies; their moments keep the parameter's dtype, as in timm. Of parameters that
    FSDP2 (`fully_shard`) distributes, each process updates its shard; norms are those of the whole tensors.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, max_grad_norm=1.0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults | {"max_grad_norm": max_grad_norm})

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; `closure`, if given, recomputes the loss and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        gradients = [p.grad for params in present for p in params]
        if not gradients:
            return loss
        norm = norms([local(g) for g in gradients], gradients).norm()
        clip = (norm / self.defaults["max_grad_norm"]).clamp_(min=1.0)
        for group, params in zip(self.param_groups, present, strict=True):
            group["step"] += 1
            for p in params:
                if not self.state[p]:
                    self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            if params:
                self._update(group, params, clip)
        return loss

    def _update(self, group: dict, params: list[Tensor], clip: Tensor) -> None:
        # The kernel takes one dtype: dense tensors of dtype `wide` are updated in place, others as copies.
        wide = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        shards = [local(p) for p in params]
        states = [local(self.state[p][name]) for name in ("exp_avg", "exp_avg_sq") for p in params]
        moments = [state.to(wide) for state in states]
        first, second = moments[: len(params)], moments[len(params) :]
        values = [in_layout_of(m, p) for m, p in zip(first, shards, strict=True)]
        gradients = [in_layout_of(m, local(p.grad)) for m, p in zip(first, params, strict=True)]
        if clip.dtype == torch.float64:  # the kernel would read the clipping factor as float32
            gradients, clip = torch._foreach_div(gradients, clip), None
        decay = group["weight_decay"]
        # With decay, Adam at lr = -1 adds its update to decay x parameter; without, it updates the parameter.
        updates = torch._foreach_mul(values, decay) if decay else values
        steps = [torch.full((), float(group["step"]), device=values[0].device)] * len(params)
        torch._fused_adam_(
            updates, gradients, first, second, [], steps, lr=-1.0 if decay else group["lr"],
            beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=0.0, eps=group["eps"],
            amsgrad=False, maximize=False, grad_scale=clip,
        )  # fmt: skip
        if decay:
            before, after = norms(values, params), norms(updates, params)
            trust = torch.where((before > 0) & (after > 0), before / after, 1.0)
            torch._foreach_addcmul_(values, updates, list((trust * -group["lr"]).unbind()))
        for tensor, result in zip(shards + states, values + moments, strict=True):
            if result is not tensor:
                tensor.copy_(result)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, or the tensor itself if it is none."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def norms(tensors: list[Tensor], whole: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor, (N,), float32, or float64 if any tensor is.

    whole: tensors of which `tensors` are the `local` parts; their norms are returned.
    """
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    found = torch.stack(torch._foreach_norm(tensors, 2, wide))
    layouts = [(t.device_mesh, t.placements) if hasattr(t, "to_local") else None for t in whole]
    for mesh, placements in filter(None, dict.fromkeys(layouts)):
        members = [i for i, layout in enumerate(layouts) if layout == (mesh, placements)]
        for axis in (i for i, placement in enumerate(placements) if placement.is_shard()):
            squares = found[members].square()
            dist.all_reduce(squares, group=mesh.get_group(axis))
            found[members] = squares.sqrt()
    return found


def in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy if its dtype or the order of its values in memory differs from `like`."""
    strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if tensor.dtype == like.dtype and all(n == 1 or s == t for n, s, t in strides):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split trainable parameters: weight decay for two or more dimensions, none for biases and norms."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


# A new optimizer is one line: a function of the network and options that returns an optimizer, or a list.
# `fit` sets the rate of each group to the schedule's, times the group's "scale" if it has one, and clips all
# gradients unless an optimizer has a `max_grad_norm` of its own.
OPTIMIZERS = {
    "lamb": lambda model, o: Lamb(parameter_groups(model, o.weight_decay), max_grad_norm=MAX_GRAD_NORM),
    "adamw": lambda model, o: torch.optim.AdamW(parameter_groups(model, o.weight_decay)),
}


def log_to_wandb(folder: Folder) -> typing.Callable[[dict, list[float]], None]:
    """Log each line of `metrics.jsonl` to Weights & Biases. Raises UsageError."""
    import wandb

    settings = {"id": folder.record["id"], "name": folder.path.name, "dir": folder.path, "resume": "allow"}
    try:
        run = wandb.init(project="nexception", config=folder.record["options"], **settings)
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--tracker wandb: {reason} (`wandb login`, or WANDB_MODE=offline)") from None
    return lambda row, losses: run.log(row)


# A new tracker is one entry: a function of the run's folder that returns a function, which is called in the
# first process with each new line of `metrics.jsonl` and the losses of the epoch's steps. Anything that
# follows the file itself needs no entry.
TRACKERS = {"wandb": log_to_wandb}


# --------------------------------------------------------------------------------------------------
# Recipes and options


class Recipe(typing.NamedTuple):
    """Values of options, and what they are expected to reach."""

    expect: str
    values: dict


# Table 2 of the paper's appendix, as interpreted by the code of the published runs: LAMB with its own
# clipping, ten cool-down epochs, 4 x 64 images per step. Augmentation: `data.default_augmentation`.
PAPER = {
    "model": "nexception_t", "seed": 1, "epochs": 300, "batch": 64, "micro_batches": 4, "loss": "bce",
    "loss_threshold": 0.2, "optimizer": "lamb", "lr": 2e-3, "warmup_epochs": 5, "cooldown_epochs": 10,
    "weight_decay": 0.02, "mixup": 0.1, "cutmix": 1.0,
}  # fmt: skip
ONE = PAPER | {"micro_batches": 1, "cooldown_epochs": 0}
CIFAR = ONE | {"model": "nexception_reduced", "epochs": 100, "batch": 128, "lr": 5e-3}
RECIPES = {
    "paper": Recipe("published for ImageNet: nexception_t 81.5%, nexception_tp 81.8% (not rerun)", PAPER),
    "paper-s": Recipe("published for ImageNet: nexception_s 82.0% (not rerun)",
                      PAPER | {"seed": 2, "batch": 32, "lr": 1.4e-3}),
    "small-folder": Recipe(
        "epochs for a million images in total; 16 photographs, nexception_nano: 83.4% in 12 epochs",
        ONE | {"lr": 1e-2, "repeats": 1, "policy": "none", "min_scale": 0.35, "cutmix": 0.0},
    ),
    "fine-tune": Recipe(
        "digits from a 7-class network: 95.1% in 15 epochs (LAMB: 42.9%)",
        ONE | {"optimizer": "adamw", "lr": 2e-4, "epochs": 30, "warmup_epochs": 2, "repeats": 1,
               "policy": "none", "min_scale": 0.35, "mixup": 0.0, "cutmix": 0.0},
    ),
    "digits": Recipe(
        "on digits, nexception_nano reaches 99.2 to 100% (seeds 1 to 3) in a minute on two idle CPU cores",
        ONE | {"model": "nexception_nano", "epochs": 20, "lr": 1e-2, "warmup_epochs": 2, "cutmix": 0.0},
    ),
    "clutter": Recipe(
        "one digit among translucent ones, to tell networks apart within seconds (see search.py)",
        ONE | {"model": "nexception_nano", "epochs": 30, "batch": 32, "lr": 1e-2, "warmup_epochs": 2,
               "loss": "soft_ce", "mixup": 0.0, "cutmix": 0.0},
    ),
    "cifar10": Recipe("the paper's search network (not run in full here)", CIFAR),
    "cifar100": Recipe("the paper's search network (not run in full here)", CIFAR),
}  # fmt: skip


AMP = ("auto", "bf16", "fp16", "off")  # values of --amp


@dataclass
class Options:
    """Train or evaluate a network. Omitted options are taken from the recipe (see below)."""

    data: str = option("digits", f"{', '.join(SMALL_SETS)}, an image folder with train/ and val/, or "
                       "MODULE:FUNCTION (see `open_data`)")  # fmt: skip
    model: str | None = option(None, f"{', '.join(MODELS)}, or the path of a JSON config")
    out: str | None = option(None, "folder of the run (default: runs/DATA-MODEL)")
    recipe: str | None = option(None, "default: by data, model and initial weights", choices=tuple(RECIPES))
    init_weights: str | None = option(None, "checkpoint to start from: ours, the authors' or timm's Xception")
    freeze: bool = option(False, "train the classifier only; freeze other weights and all batch norms")
    eval: str | None = option(None, "evaluate this checkpoint on --data (top-1 and top-5) and exit")
    seed: int | None = option(None, "seed of initial weights, data order and augmentation", 0, 2**32 - 1)

    epochs: int | None = option(None, "epochs of the cosine schedule", 1)
    batch: int | None = option(None, "images per micro-batch", 1)
    accumulate: int | None = option(None, "micro-batches per process and optimizer step", 1)
    size: int | None = option(None, "input pixels per side", 8, 4096)
    drop_path: float | None = option(None, "stochastic depth rate (default: the model's)", 0, below=1)
    loss: str | None = option(None, "loss (bce: see --loss-threshold)", choices=tuple(LOSSES))
    loss_threshold: float | None = option(None, "mixed targets above it count as 1, others as 0", 0, below=1)

    optimizer: str | None = option(None, "optimizer", choices=tuple(OPTIMIZERS))
    lr: float | None = option(None, "learning rate after the warm-up", above=0)
    warmup_epochs: int | None = option(None, "epochs of linear warm-up, counted within --epochs", 0)
    cooldown_epochs: int | None = option(None, "epochs at the lowest learning rate after the cosine", 0)
    weight_decay: float | None = option(None, "weight decay of tensors with two or more dimensions", 0)
    ema: float = option(0.0, "decay of averaged weights, which are then evaluated; 0: none", 0, below=1)

    mixup: float | None = option(None, "mixup alpha; 0: none", 0)
    cutmix: float | None = option(None, "cutmix alpha; 0: none", 0)
    policy: str | None = option(None, "augmentation beside crops and flips", choices=tuple(POLICIES))
    magnitude: float | None = option(None, "mean magnitude of rand_augment", 0, 10)
    repeats: int | None = option(None, "repeated augmentation: copies of an image per epoch; 1: none", 1)
    flip: float | None = option(None, "probability of a horizontal flip", 0, 1)
    exif: bool | None = option(None, "rotate photographs by their EXIF orientation")
    min_scale: float | None = option(None, "smallest area fraction of a random crop", above=0, most=1)

    amp: str = option("auto", "mixed precision; auto: bf16 or fp16 on GPUs, off on CPUs", choices=AMP)
    compile: bool = option(False, "torch.compile the network")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    workers: int | None = option(None, "data-loading processes (default: one per core)", 0)
    root: str = option("data", "folder that CIFAR is read from or downloaded to")
    tracker: str | None = option(None, "also log to this tracker", choices=tuple(TRACKERS))


# Options that may differ when a run is resumed, because they do not change what is learned. `accumulate` may
# differ while processes x accumulate stays the same; data, models and recipes are compared by their content.
FREE = {"out", "data", "model", "recipe", "accumulate", "device", "workers", "root", "tracker"}


def recipes_help() -> str:
    """Describe the recipes and their values for --help."""
    lines = ["recipes (micro_batches: processes x accumulate; augmentation: by default the data's own):"]
    for name, recipe in RECIPES.items():
        values = ", ".join(f"{key} {value}" for key, value in recipe.values.items())
        lines += textwrap.wrap(f"  {name}: {recipe.expect}. {values}", 110, subsequent_indent="    ")
    return "\n".join(lines)


def choose_recipe(options: Options, images: int | None = None) -> tuple[str, str]:
    """Return the name of the recipe for the data and the initial weights, and what chose it."""
    if options.recipe is not None:
        return options.recipe, "--recipe"
    if options.init_weights:
        return "fine-tune", "--init-weights"
    if options.data in SMALL_SETS:  # those without a recipe use that of digits
        return options.data if options.data in RECIPES else "digits", "--data"
    if images is not None and images < SMALL_FOLDER:
        return "small-folder", f"the image count, {images:,} (--recipe paper for ImageNet's)"
    return "paper", "--data"


def default_model(options: Options) -> str | None:
    """Return --model or the recipe's model; None: the network of --init-weights."""
    if options.model or options.init_weights:
        return options.model
    return RECIPES[choose_recipe(options)[0]].values["model"]


def stem(path: str) -> str:
    """Return the name of a config or checkpoint; of those that each run has, the name of the run's folder."""
    common = ("best", "last", "previous", "incumbent")
    return Path(path).resolve().parent.name if Path(path).stem in common else Path(path).stem


def default_out(options: Options) -> str:
    """Return the folder of a run: --out, or one named after the data, the model and where it starts from."""
    names, model = [Path(options.data).resolve().name.replace(":", "-")], default_model(options)
    names += [stem(model)] if model else []
    names += ["from", stem(options.init_weights)] if options.init_weights else []
    return options.out or f"runs/{'-'.join(names + ['frozen'] * options.freeze)}"


def resolve(
    options: Options, world=1, images: int | None = None, say=lambda text: None, config=None
) -> Options:
    """Fill in omitted options from the recipe that fits the data, the model and the initial weights.

    world: number of processes. images: number of training images of a folder, for the choice of its recipe.
    say: called with each line to print. config: that of the network (default: `model_config(options)`).
    Raises UsageError for impossible or contradictory values.
    """
    name, why = choose_recipe(options, images)
    config = config or model_config(options)
    shape = ("layout", "stem_width", "widths", "depths", "exit_widths")  # a search changes the rest
    if name == "paper" and all(getattr(config, f) == getattr(MODELS["nexception_s"], f) for f in shape):
        name, why = "paper-s", f"{why} and the shape of nexception_s"
    augment, small = default_augmentation(options.data), SMALL_SETS.get(options.data)
    recipe = {
        "size": small.size if small else config.input_size, "drop_path": config.drop_path,
        "flip": augment.flip, "policy": augment.policy, "magnitude": augment.magnitude,
        "repeats": augment.repeats, "min_scale": augment.scale[0], "exif": False,
    } | RECIPES[name].values | {"recipe": name}  # fmt: skip
    if options.init_weights:
        del recipe["model"]  # taken from the checkpoint
    if name == "small-folder":
        recipe["epochs"] = min(300, max(60, 1_000_000 // images)) if images else 60
    micro_batches = recipe.pop("micro_batches")
    if options.accumulate is None and micro_batches > 1 and micro_batches % world:
        batch = options.batch or recipe["batch"]
        closest = max(2, round(micro_batches * batch / world))
        raise UsageError(
            f"the recipe's {micro_batches} micro-batches of {batch} cannot be split among {world} processes: "
            f"the closest is --accumulate 1 --batch {closest}, with batch norm over {closest} images"
        )
    recipe["accumulate"] = max(1, micro_batches // world)
    resolved = Options(**(recipe | {k: v for k, v in asdict(options).items() if v is not None}))
    device = pick_device(resolved.device)
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}
    resolved.device, resolved.amp = str(device), names[amp_dtype(resolved.amp, device)]
    resolved.out = default_out(options)
    say(f"recipe {name}, chosen by {why}; {RECIPES[name].expect}")
    if resolved.warmup_epochs >= resolved.epochs:
        say(f"warm-up shortened to {resolved.epochs // 4} of {resolved.epochs} epochs")
        resolved.warmup_epochs = resolved.epochs // 4
    if options.cooldown_epochs is None and resolved.epochs < recipe["epochs"]:
        resolved.cooldown_epochs = resolved.cooldown_epochs * resolved.epochs // recipe["epochs"]
    # What has no effect is refused if given, and not recorded, since a resumed run must match the record.
    for option_name, idle, why in (
        ("min_scale", small, options.data), ("exif", small, options.data),
        ("loss_threshold", resolved.loss == "soft_ce", "--loss soft_ce"),
        ("magnitude", resolved.policy in ("none", "trivial_augment"), f"--policy {resolved.policy}"),
    ):  # fmt: skip
        if idle and getattr(options, option_name) is not None:
            raise UsageError(f"--{option_name.replace('_', '-')} has no effect with {why}: leave it out")
        if idle:
            setattr(resolved, option_name, None)
    if resolved.batch == 1 and config.norm == "batch" and not resolved.freeze:
        raise UsageError("--batch 1: batch norm needs at least 2 images")
    if resolved.freeze and not resolved.init_weights:
        raise UsageError("--freeze needs a trained network: give --init-weights")
    if resolved.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UsageError("--tracker wandb needs a package: pip install wandb")
    if name == "small-folder":
        say("note: for so few images, ImageNet weights (--init-weights) usually help more than extra epochs")
    return resolved


def model_config(options: Options) -> ModelConfig:
    """Return the config of --model or the recipe's model, else of the run to resume or of --init-weights."""
    model = default_model(options)
    if model is not None:
        with torch.device("meta"):
            config = create_model(model).config
    else:
        try:  # a run is resumed without its initial weights
            found = json.loads(Path(default_out(options), "config.json").read_bytes())["config"]
            config = ModelConfig(**found)
        except (OSError, ValueError, KeyError, TypeError):  # no run yet, or a damaged file
            config = load_checkpoint(options.init_weights).config
    check_channels(config, model or options.init_weights)
    return config


def check_channels(config: ModelConfig, name: str) -> None:
    """Raise UsageError for a network that does not take RGB images."""
    if config.in_channels != 3:
        raise UsageError(f"{name} has in_channels={config.in_channels}, but images have 3 channels")


def augmentation(options: Options) -> Augmentation:
    """Return the augmentation that resolved `options` ask for."""
    asked = {name: getattr(options, name) for name in ("policy", "magnitude", "flip", "repeats")}
    asked["scale"] = options.min_scale and (options.min_scale, 1.0)
    return replace(default_augmentation(options.data), **{k: v for k, v in asked.items() if v is not None})


# --------------------------------------------------------------------------------------------------
# One process and its training


@dataclass(frozen=True)
class Process:
    """Rank of this process among `world` processes, and the device it trains on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def from_first(self, function: typing.Callable):
        """Call `function` in the first process; return its result (or raise its error) in all processes."""
        outcome = [None]
        if self.first:
            try:
                outcome = [function()]
            except (UsageError, RunError) as error:
                outcome = [error]
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def read(self, path: Path) -> dict:
        """Read a checkpoint in the first process, as the others may not see its folder, and share it."""
        content = self.from_first(path.read_bytes)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def plan(self, options: Options) -> Plan:
        """Return this process's part of the data."""
        return Plan(options.batch, options.accumulate, options.seed, self.rank, self.world)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raises UsageError for a device that does not exist or cannot compute.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # a tensor on the GPU would take hundreds of megabytes
            usable = (device.index or 0) < torch.cuda.device_count()
        else:
            usable = torch.ones(1, device=device).item() == 1
    except Exception:  # each backend raises its own errors
        usable = False
    if not usable:
        raise UsageError(f"--device {name}: no such device here (usable GPUs: {torch.cuda.device_count()})")
    return device


def start_process(device: str) -> Process:
    """Join the processes that torchrun started, if any. Raises UsageError like `pick_device`."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    chosen = pick_device(device)
    on_gpu = chosen.type == "cuda"
    if on_gpu:
        chosen = pick_device(f"cuda:{local if chosen.index is None else chosen.index}")
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
    if world > 1:
        store, rank, world = next(dist.rendezvous("env://", rank, world))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # torchrun's store survives a restart, with the addresses of dead processes (PyTorch issue
            # 135712). Only on a single machine do all processes count the same number of restarts.
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            # NCCL's ten minutes may be too short for the first process to list a million files over NFS.
            "nccl" if on_gpu else "gloo", store=store, timeout=datetime.timedelta(hours=1), rank=rank,
            world_size=world, device_id=chosen if on_gpu else None,
        )  # fmt: skip
    return Process(rank, max(world, 1), chosen)


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of mixed precision, or None if it is off."""
    if amp == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


class RunningStatistics:
    """The running means and variances of all batch norms of a network, as one vector."""

    def __init__(self, model: nn.Module):
        names = ("running_mean", "running_var")
        self.buffers = [buffer for name, buffer in model.named_buffers() if name.endswith(names)]
        self.buffers = self.buffers or [next(model.parameters()).new_zeros(1)]  # without batch norms

    def read(self) -> Tensor:
        return torch.cat(self.buffers)

    def write(self, values: Tensor) -> None:
        torch._foreach_copy_(self.buffers, list(values.split([len(buffer) for buffer in self.buffers])))


class Training:
    """A network in training: everything that a checkpoint holds.

    `options` are resolved. `model` is the network, `forward` the network as training calls it (compiled,
    wrapped in DDP), `ema` its averaged copy or None. `epoch` epochs are finished; `losses` are those of the
    steps taken in the next one, float32 (steps,), which took `seconds`, of which `waited` for data; `metrics`
    has one dictionary per epoch, `best` is the best validation top-1. `scored` is the network to evaluate.
    """

    COUNTERS = ("epoch", "losses", "seconds", "waited", "metrics", "best")

    def __init__(self, model: nn.Module, options: Options, process: Process | None = None):
        if options.optimizer is None:
            raise UsageError("these options are not resolved: call resolve(options)")
        self.options, self.process = options, process or Process()
        device = self.process.device
        self.model = model.to(device, memory_format=torch.channels_last)
        if options.freeze:
            self.model.requires_grad_(False)
            self.model.head.requires_grad_(True)
        self.amp = amp_dtype(options.amp, device)
        optimizers = OPTIMIZERS[options.optimizer](self.model, options)
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if options.ema else None
        self.scored = self.model if self.ema is None else self.ema
        self.forward = torch.compile(self.model) if options.compile else self.model
        if self.process.world > 1:
            # `fit` broadcasts the running statistics.
            wrap = nn.parallel.DistributedDataParallel
            self.forward = wrap(self.forward, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.epoch, self.losses, self.seconds, self.waited = 0, torch.zeros(0), 0.0, 0.0
        self.metrics, self.best = [], -1.0

    def state(self) -> dict:
        """Return the content of a checkpoint; ema is None and scaler empty when unused."""
        parts = {name: getattr(self, name) for name in ("model", "ema", "scaler")}
        state = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        return state | {name: getattr(self, name) for name in self.COUNTERS}

    def load_state(self, state: dict) -> None:
        for name in ("model", "ema", "scaler"):
            if state[name]:
                getattr(self, name).load_state_dict(state[name])
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        for name in self.COUNTERS:
            setattr(self, name, state[name])


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float, update: int) -> None:
    """Move every floating-point tensor of `average` by 1 - decay towards `model`'s; copy the counters.

    In update 1, 2, ..., the decay is at most 1 - update^(-2/3), so that initial weights do not dominate short
    runs (timm's `ModelEmaV3(use_warmup=True)`).
    """
    decay = min(decay, 1 - update ** (-2 / 3))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)


# --------------------------------------------------------------------------------------------------
# Stopping and the run folder


class Stopped(Exception):
    """A signal asked the run to stop; `Training` holds everything up to the last step."""


class StopSignal:
    """SIGTERM, SIGUSR1 (from SLURM) or Ctrl-C as a request to stop; all processes agree on it at one step.

    `signal` is the number that this process received, or 0. A second Ctrl-C ends a single process at once.
    """

    def __init__(self, process: Process):
        self.signal, self.asked = 0, None
        self.group = dist.new_group(backend="gloo") if process.world > 1 else None
        in_main = threading.current_thread() is threading.main_thread()  # others cannot handle signals
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if in_main else ()
        self.handlers = {number: signal.signal(number, self.receive) for number in numbers}

    def receive(self, number, _frame) -> None:
        if self.signal and self.group is None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Return whether any process had the request one step ago; call once per step in every process."""
        if self.group is None:
            return bool(self.signal)
        before, flag = self.asked, torch.tensor(self.signal)
        # The reduction is read one step later, so that no process waits and all stop after the same step.
        self.asked = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())


def save_checkpoint(path: Path, content: dict, previous: Path | None = None) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer(), previous)


class Folder:
    """The folder of a run. Only the first process reads and writes there; `record` identifies the run."""

    def __init__(self, path: str, record: dict, process: Process | None = None):
        self.path, self.record, self.process = Path(path), record, process or Process()
        self.last, self.previous, self.best = (self.path / f"{n}.pt" for n in ("last", "previous", "best"))
        self.lock, self.drawn = None, time.monotonic()  # drawn: when `curves.png` was last written

    def open(self) -> Path | None:
        """Create and lock the folder; return the checkpoint to resume from, if any.

        Raises UsageError if the folder is in use, cannot be created, or holds a run with another record.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")  # noqa: SIM115, held until `close`
        except OSError as error:
            raise UsageError(f"--out {self.path}: {error.strerror}") from None
        if not lock_file(self.lock):
            raise UsageError(f"{self.path} is in use by another run: give another --out")
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        found = [path for path in (self.last, self.previous) if path.exists()]
        for path in found:
            if content := self.read(path):
                self.compare(content)
                self.record["id"] = content["id"]
                return path
        if found:
            raise UsageError(f"no checkpoint in {self.path} can be read: move it away or give another --out")
        return None

    def read(self, path: Path) -> dict | None:
        """Return the content of a checkpoint; None, and a printed warning, if it cannot be read."""
        try:
            return read_checkpoint(path)
        except UsageError as error:
            print(f"warning: {error}", file=sys.stderr)

    def compare(self, content: dict) -> None:
        """Raise UsageError with each difference between the run of a checkpoint and this one."""
        if not {*self.record, "optimizers", "losses"} <= content.keys():
            raise UsageError(f"{self.path} holds no checkpoint of this train.py: give another --out")
        theirs, ours = (
            {**run["options"], **run["config"], "images": run["images"]}
            | {"micro-batches a step": run["micro-batches a step"]}
            | {"init_weights": run["options"]["init_weights"] and stem(run["options"]["init_weights"])}
            | {f"class {number}": name for number, name in enumerate(run["classes"], 1)}
            for run in (content, self.record)
        )
        names = [k for k in theirs | ours if k not in FREE and theirs.get(k) != ours.get(k)]
        if names:
            differ = [f"{k} was {theirs.get(k)}, now {ours.get(k)}" for k in names]
            differ[9:] = ["..."] * (len(names) > 9)
            reason = f"{self.path} holds a run with other options or data ({'; '.join(differ)})"
            further = f"with --init-weights {self.best} to train further"
            raise UsageError(f"{reason}: restore them to resume it, or give another --out ({further})")

    def save(self, training: Training, best: dict | None = None) -> None:
        """Write `last.pt` (plain types and tensors), `metrics.jsonl` and, once a minute, `curves.png`.

        best: evaluation result of the weights, if they are the best so far. They go to `best.pt` first: a run
        killed in between repeats the epoch.
        """
        if not self.process.first:
            return
        if best is not None:
            content = {"model": training.scored.state_dict(), "ema": None, "epoch": training.epoch}
            save_checkpoint(self.best, self.record | content | {"val": best})
        save_checkpoint(self.last, self.record | training.state(), self.previous)
        write_whole(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in training.metrics))
        if time.monotonic() - self.drawn > 60:
            self.draw(training)

    def draw(self, training: Training) -> None:
        """Plot training loss, validation top-1 and top-5 by epoch to `curves.png`."""
        lines = [line for line in training.metrics if "epoch" in line]
        if not (self.process.first and lines):
            return
        options = training.options
        column = {name: [line[name] for line in lines] for name in lines[0]}
        figure, (left, right) = subplots(2, 9, 3.4)
        figure.suptitle(f"{stem(options.model or options.init_weights)} on {Path(options.data).name}")
        left.plot(column["epoch"], column["train_loss"])
        left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
        for name, label in (("val_top1", "top-1"), ("val_top5", "top-5")):
            right.plot(column["epoch"], column[name], label=f"{label}, best {max(column[name]):.2f}%")
        right.set(xlabel="epoch", ylabel="validation accuracy, %")
        right.legend(frameon=False, loc="lower right")
        save_figure(figure, self.path / "curves.png")
        self.drawn = time.monotonic()

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()


# --------------------------------------------------------------------------------------------------
# Evaluation and the loop


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: Data, split="val", amp: torch.dtype | None = None, *, columns=None, stop=None
) -> dict:
    """Return top1 and top5 in percent, mean cross-entropy (loss), count and unreadable of a split.

    Each image counts once over all processes; unreadable files are left out. columns: int64 indices of the
    outputs for the data's classes (default: all). Raises Stopped if `stop.signal` is set in any process, and
    RunError if an output is not finite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    totals = torch.zeros(6, dtype=exact, device=device)
    for images, labels in data.eval_batches(split):
        if stop is not None and stop.signal:
            totals[4] += 1
            break
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(data.transform.normalize(images)).float()
        totals[5] += (~logits.isfinite()).any(1).sum()
        if columns is not None:
            logits = logits[:, columns]
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals[:3] += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
        totals[3] += len(labels)
    if dist.is_initialized():
        dist.all_reduce(totals)
    model.train(was_training)
    top1, top5, loss, count, stops, bad = totals.tolist()
    if stops:
        raise Stopped
    if bad:
        raise RunError(f"the outputs for {bad:.0f} of {count:.0f} images of {split} are not finite")
    if not count:
        raise RunError(f"none of the {data.count(split)} images of {split} can be read")
    result = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
    return result | {"count": int(count), "unreadable": data.count(split) - int(count)}


def check_finite(values: list[float], name: str, epoch: int, first: int, tolerated: int = 0) -> None:
    """Raise RunError if more than `tolerated` consecutive values, of steps after `first`, are not finite."""
    bad = 0
    for step, value in enumerate(values, first + 1):
        bad = 0 if math.isfinite(value) else bad + 1
        if bad > tolerated:
            where = f"{name} is {value} at epoch {epoch + 1}, step {step}"
            raise RunError(f"{where}: try a lower --lr, or --amp off")


def fit(
    training: Training, data: Data, folder: Folder | None = None, stop: StopSignal | None = None,
    say=lambda text: None, log=None, score_after=None,
) -> list[dict]:  # fmt: skip
    """Train up to the last epoch; return the metrics of `training`, one dictionary per epoch.

    Nothing is saved without `folder`. say: called with each line to print. log: a tracker (see TRACKERS).
    score_after: the epochs, counted from 1, that are followed by an evaluation (default: all). The loop
    synchronizes with the GPU only to check the loss, every LOG_EVERY steps and after each epoch (with
    float16, loss scaling also checks the gradients in each step). Raises Stopped after a signal, and RunError
    when the loss, the weights or the outputs in an evaluation are no longer finite.
    """
    options, process, model, ema = training.options, training.process, training.model, training.ema
    optimizers, scaler, forward = training.optimizers, training.scaler, training.forward
    loss_function = LOSSES[options.loss]
    statistics, ema_statistics = RunningStatistics(model), RunningStatistics(training.scored)
    epochs, classes = options.epochs + options.cooldown_epochs, len(data.classes)
    step_images = process.world * options.accumulate * options.batch
    if data.plan != process.plan(options):
        raise UsageError(f"the data have {data.plan}, but the options ask for {process.plan(options)}")
    tolerated = MAX_SKIPPED if scaler.is_enabled() else 0

    for epoch in range(training.epoch, epochs):
        said = time.monotonic()  # when progress was last printed
        begun, waited = said - training.seconds, data.wait_seconds - training.waited
        lr = lr_at(epoch, options)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * group.get("scale", 1)
        losses = torch.zeros(data.steps, device=process.device)  # mean over this process's micro-batches
        first = done = len(training.losses)  # above 0 if resumed in mid-epoch
        losses[:first] = training.losses
        model.train(not options.freeze)  # --freeze keeps batch norms in evaluation mode
        batches = data.train_batches(epoch, first)
        for step in range(first, data.steps):
            # Every micro-batch starts from the statistics of virtual rank 0 after the previous step.
            start, after = statistics.read(), []
            if process.world > 1:
                dist.broadcast(start, 0)
            for micro in range(options.accumulate):
                images, labels = next(batches)
                virtual_rank = process.rank + process.world * micro
                rng = np.random.default_rng((options.seed, epoch, step, virtual_rank, MIXING))
                torch.manual_seed(int(rng.integers(2**63)))  # for stochastic depth
                images = data.transform.normalize(images)
                images, targets = mix(images, labels, classes, options.mixup, options.cutmix, rng)
                # DDP exchanges gradients after the last micro-batch only, as with its `no_sync`.
                forward.require_backward_grad_sync = micro == options.accumulate - 1
                statistics.write(start)
                with torch.autocast(images.device.type, training.amp, enabled=training.amp is not None):
                    logits = forward(images)
                loss = loss_function(logits, targets, images, options) / options.accumulate
                scaler.scale(loss).backward()
                found = statistics.read()
                # Infinities and NaN from a float16 overflow would never leave the running statistics.
                after.append(found.where(found.isfinite(), start) if scaler.is_enabled() else found)
                losses[step] += loss.detach()
            if not any("max_grad_norm" in optimizer.defaults for optimizer in optimizers):
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
            mean = sum(after) / options.accumulate
            if ema is not None:
                statistics.write(mean)
                update_ema(ema, model, options.ema, epoch * data.steps + step + 1)
            done = step + 1
            # After the last step of an epoch, the mean over all virtual ranks.
            statistics.write(process.mean(mean) if done == data.steps else after[0])

            if stop is not None and stop.agreed():
                break
            if done % LOG_EVERY == 0:
                values = process.mean(losses[:done].clone()).tolist()
                check_finite(values, "the loss", epoch, 0, tolerated)
                if (now := time.monotonic()) > said + 10:
                    said, rate = now, done * step_images / (now - begun)
                    recent = sum(values[-LOG_EVERY:]) / LOG_EVERY
                    where = f"epoch {epoch + 1}/{epochs}  step {done}/{data.steps}"
                    say(f"{where}  loss {recent:.4f}  {rate:.0f} images/s")

        if ema is not None:
            ema_statistics.write(process.mean(ema_statistics.read()))
        training.losses = process.mean(losses[:done].clone())
        values = training.losses.tolist()  # synchronizes, so before the clock is read
        check_finite(values, "the loss", epoch, 0, tolerated)
        weights = torch.stack(torch._foreach_norm(list(model.parameters()))).norm().item()
        check_finite([weights], "the weights' norm", epoch, done - 1)
        training.seconds, training.waited = time.monotonic() - begun, data.wait_seconds - waited
        if done < data.steps:
            raise Stopped
        result = {}
        if score_after is None or epoch + 1 in score_after:
            result = evaluate(training.scored, data, "val", training.amp, stop=stop)

        finite = [value for value in values if math.isfinite(value)]
        row = {"epoch": epoch + 1, "lr": lr, "train_loss": sum(finite) / max(len(finite), 1)}
        row |= {f"val_{name}": result[name] for name in ("loss", "top1", "top5") if result}
        row["images_per_second"] = round(done * step_images / training.seconds, 1)
        row["data_wait"] = round(training.waited / training.seconds, 4)  # share of the time
        row["seconds"] = round(time.monotonic() - begun, 2)
        better = bool(result) and result["top1"] > training.best
        training.best = result["top1"] if better else training.best
        training.metrics.append(row)
        training.epoch, training.losses = epoch + 1, torch.zeros(0)
        training.seconds = training.waited = 0.0
        if folder is not None:
            folder.save(training, best=result if better else None)
        if log is not None:
            log(row, values)
        line = f"epoch {epoch + 1}/{epochs}  loss {row['train_loss']:.4f}  lr {lr:.2e}  "
        if result:
            line += f"val top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  "
            line += f"best {training.best:.2f}%  "
        line += f"{row['images_per_second']:.0f} images/s  data wait {row['data_wait']:.0%}  "
        say(f"{line}{datetime.timedelta(seconds=int(row['seconds'] * (epochs - epoch - 1)))} left")
    return training.metrics


def finish(training: Training, data: Data, folder: Folder, stop: StopSignal, say, log) -> None:
    """Evaluate the best weights on the test split, once per run, and plot the curves."""
    untested = "test" in data.splits and "epoch" in training.metrics[-1]
    if untested and training.process.from_first(lambda: bool(folder.read(folder.best))):
        model = copy.deepcopy(training.model)
        model.load_state_dict(training.process.read(folder.best)["model"])
        result = evaluate(model, data, "test", training.amp, stop=stop)
        training.metrics.append({f"test_{name}": result[name] for name in ("top1", "top5", "loss", "count")})
        folder.save(training)
        if log is not None:
            log(training.metrics[-1], [])
    folder.draw(training)
    say(f"best validation top-1 {training.best:.2f}%, weights in {folder.best}")
    final = training.metrics[-1]
    if "test_top1" in final:
        scores = f"test top-1 {final['test_top1']:.2f}%, top-5 {final['test_top5']:.2f}%"
        say(f"{scores} on {final['test_count']} images used neither for training nor for selection")


# --------------------------------------------------------------------------------------------------
# Main


def evaluate_checkpoint(options: Options, process: Process) -> int:
    """Print top-1 and top-5 of a checkpoint (`--eval`) on the test split, if there is one, else on val."""
    used = ("data", "eval", "exif", "batch", "workers", "device", "amp", "root")
    for entry in fields(options):
        if entry.name not in used and getattr(options, entry.name) != entry.default:
            raise UsageError(f"--{entry.name.replace('_', '-')} has no effect with --eval: leave it out")
    model = load_checkpoint(options.eval).to(process.device, memory_format=torch.channels_last)
    check_channels(model.config, options.eval)
    source = options.data
    if source not in SMALL_SETS:
        source = find_images(source, train=False, share=process.from_first)
    exif = model.transform.exif if options.exif is None else options.exif
    data = open_data(
        source, Plan(options.batch or 64, rank=process.rank, world=process.world), train=False,
        transform=replace(model.transform, exif=exif), device=process.device, workers=options.workers,
        root=options.root,
    )  # fmt: skip
    split = "test" if "test" in data.splits else "val"
    if len(data.classes) != model.config.num_classes or tuple(model.classes or data.classes) != data.classes:
        raise UsageError(
            f"{options.eval} was not trained for the {len(data.classes)} classes of {options.data}: "
            "`python bench.py accuracy` evaluates it on folders with some of its classes"
        )
    try:
        result = evaluate(model, data, split, amp_dtype(options.amp, process.device))
    except RunError as error:
        raise RunError(f"{options.eval}: {error}") from None
    data.close()
    if process.first:
        left_out = f", {result['unreadable']} unreadable left out" if result["unreadable"] else ""
        print(f"{options.eval} on {result['count']} images of {options.data} ({split}{left_out})")
        print(f"top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  loss {result['loss']:.4f}")
    return 0


def run(options: Options, process: Process) -> int:
    """Open data, model and folder, train, and return the exit status."""

    def say(text: str) -> None:
        if process.first:
            print(text, flush=True)

    source, images = options.data, None
    if options.data not in SMALL_SETS:
        source = find_images(options.data, share=process.from_first)
        images = len(source["train"])
    config = process.from_first(lambda: model_config(options))
    options = resolve(options, process.world, images, say, config)
    data = open_data(
        source, process.plan(options), size=options.size, augment=augmentation(options),
        exif=bool(options.exif), device=process.device, workers=options.workers, root=options.root,
    )  # fmt: skip
    torch.manual_seed(options.seed)
    overrides = {"drop_path": options.drop_path, "input_size": options.size}
    model = create_model(config, num_classes=len(data.classes), **overrides)
    record = {
        "id": os.urandom(8).hex(),  # of the run, for trackers
        "options": asdict(options), "micro-batches a step": process.world * options.accumulate,
        "classes": list(data.classes), "images": {split: data.count(split) for split in data.splits},
        "config": asdict(model.config), "transform": asdict(data.transform),
    }  # fmt: skip
    folder = Folder(options.out, record, process)
    resumed = process.from_first(lambda: folder.last.exists() or folder.previous.exists())
    if options.init_weights and not resumed:
        with contextlib.redirect_stdout(sys.stdout if process.first else io.StringIO()):
            load_weights(model, options.init_weights)
    training = Training(model, options, process)
    # Nothing is written before this line, so that a refused command leaves no folder behind.
    checkpoint = process.from_first(folder.open)
    if process.first:
        content = record | {"processes": process.world, "machine": machine(process.device)}
        write_whole(folder.path / "config.json", json.dumps(content, indent=1) + "\n")
    shown = "  ".join(f"{name}={value}" for name, value in asdict(options).items() if value is not None)
    say(textwrap.fill(shown, 110, break_on_hyphens=False))
    epochs = options.epochs + options.cooldown_epochs
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = f"{process.world} x {options.accumulate} x {options.batch} images"
    say(f"{trained:,} parameters to train in {epochs} epochs of {data.steps} steps of {step}")
    if checkpoint is not None:
        training.load_state(process.read(checkpoint))
        unfinished = training.best >= 0 and training.epoch < epochs
        if unfinished and not process.from_first(lambda: bool(folder.read(folder.best))):
            training.best = -1.0  # the best of the epochs to come takes its place
        where = f"continuing at epoch {training.epoch + 1}/{epochs}, step {len(training.losses) + 1}"
        say(f"{folder.path}: {'finished' if training.epoch == epochs else where}")
    log = None if options.tracker is None or not process.first else TRACKERS[options.tracker](folder)
    stop = StopSignal(process)
    try:
        fit(training, data, folder, stop, say, log)
        finish(training, data, folder, stop, say, log)
        return 0
    except Stopped:
        where = f"at the end of epoch {training.epoch}"
        if len(training.losses):
            folder.save(training)
            where = f"in epoch {training.epoch + 1} after step {len(training.losses)}"
        number = stop.signal or signal.SIGTERM
        say(f"{signal.Signals(number).name}: saved {where}; repeat the command to resume")
        return 128 + number
    except (UsageError, RunError) as error:
        kept = f"; last checkpoint: {folder.last}" if folder.last.exists() else ""
        raise RunError(f"{error}{kept}") from None
    finally:
        stop.close()
        data.close()
        folder.close()


def main(argv: list[str]) -> int:
    """Train or evaluate as the command line says; print errors for users in one sentence, once."""
    rank = os.environ.get("RANK", "0")
    try:
        options = parse(Options, argv, "train.py", recipes_help())
        process = start_process(options.device)
        if process.device.type == "cpu":
            keep_large_buffers()
        status = evaluate_checkpoint(options, process) if options.eval else run(options, process)
    except (UsageError, RunError) as error:
        status = 2 if isinstance(error, UsageError) else 1
        if rank == "0" or status == 1:  # errors of a run may occur in one process only
            print(f"train.py{'' if rank == '0' else f', process {rank}'}: {error}", file=sys.stderr)
        return status
    if process.world > 1:
        # Free DDP before the process group. Otherwise its destructor ends the group, holding the GIL while it
        # waits for gloo's thread, which may wait for the GIL: with PyTorch 2.11, one run in three hung.
        gc.collect()  # --compile puts DDP into a reference cycle
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run_script(main)
