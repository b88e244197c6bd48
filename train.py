"""Train a network: by itself, a small NEXcepTion on handwritten digits, to 98% in about a minute on a CPU.

    python train.py                                               # digits, nexception_nano, two CPU cores
    torchrun --nproc_per_node=4 train.py --data /path/imagenet --model nexception_t       # the paper's run
    python train.py --data /path/imagenet --model nexception_t    # the same statistics on one GPU
    python train.py --data /path/photos --init-weights nexception_t.pth --epochs 30       # fine-tuning
    python train.py --data /path/imagenet --eval nexception_t.pth # top-1 and top-5

A run lives in its folder (`--out`): `config.json` (the resolved options), `metrics.jsonl` (a line an epoch),
`last.pt` with `previous.pt` behind it, `best.pt` (the weights of the best validation top-1), `curves.png`.
The same command goes on where a run stopped, however it stopped: at worst the unfinished epoch is repeated,
and on a CPU the result is bit for bit that of an uninterrupted run. Every random draw is keyed by (seed,
epoch, step, virtual rank), so there is no random state to lose. More epochs are another schedule, and so
another `--out`. SIGTERM saves in mid-epoch and ends with status 143, Ctrl-C likewise with 130.

One optimizer step takes processes x accumulate micro-batches of `batch` images. Each micro-batch is a
virtual rank, with its own stride of the epoch's images, its own mixup draw and its own batch-norm pass:
4 x 64 means the same on one, two or four GPUs. Gradients are averaged over all of them, once a step. Batch
norms are not synchronised: as in the paper's run, rank 0's running statistics go to all processes at a step's
first forward pass and are averaged over the processes after each epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import gc
import io
import json
import math
import os
import signal
import sys
import textwrap
import time
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    SMALL_SETS,
    Augmentation,
    Data,
    DataError,
    EvalFolder,
    EvalTransform,
    default_augmentation,
    eval_folder,
    normalize,
    open_data,
)
from model import MODELS, ModelConfig, create_model, keep_large_buffers, load_checkpoint, load_weights

# --------------------------------------------------------------------------------------------------
# Options and recipes
# --------------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """Something that the user asked for and can mend: shown as one sentence, exit status 2."""


class RunError(Exception):
    """What ends a run that was well begun, such as a full disk: shown as one sentence, exit status 1."""


def option(default, help: str, **argparse_arguments):
    """A dataclass field that becomes `--name`; its help line, choices, metavar ... go to argparse."""
    return field(default=default, metadata={"help": help, **argparse_arguments})


@dataclass
class Options:
    """Options of train.py. What is left out comes from the recipe of the data and the model."""

    data: str = option("digits", "digits, cifar10, cifar100, or an image folder with train/ and val/")
    model: str | None = option(None, f"{', '.join(MODELS)}, or the path of a JSON config")
    out: str | None = option(None, "the run's folder (default: runs/DATA-MODEL)")
    init_weights: str | None = option(None, "checkpoint to start from: ours, the authors' or timm's xception")
    eval: str | None = option(None, "only evaluate this checkpoint on --data: top-1 and top-5")
    seed: int | None = option(None, "of initial weights, order and augmentation")

    epochs: int | None = option(None, "epochs of the cosine schedule")
    batch: int | None = option(None, "images in a micro-batch")
    accumulate: int | None = option(None, "micro-batches of each process in an optimizer step")
    size: int | None = option(None, "pixels a side of the network's input")
    drop_path: float | None = option(None, "rate of stochastic depth (default: the model's)")
    loss_threshold: float | None = option(None, "mixed targets above it count as 1, others as 0")

    lr: float | None = option(None, "LAMB's learning rate, reached after the warm-up")
    min_lr: float | None = option(None, "learning rate at the end of the cosine and in the cool-down")
    warmup_epochs: int | None = option(None, "epochs of linear warm-up, counted within --epochs")
    warmup_lr: float | None = option(None, "learning rate of the first epoch of the warm-up")
    cooldown_epochs: int | None = option(None, "epochs at --min-lr after the cosine")
    weight_decay: float | None = option(None, "on tensors of two dimensions and more")
    max_grad_norm: float | None = option(None, "the gradients' global norm is clipped to it")
    ema: float = option(0.0, "decay per step of averaged weights, which are then evaluated; 0: none")

    mixup: float | None = option(None, "alpha of mixup; 0: none")
    cutmix: float | None = option(None, "alpha of cutmix; 0: none")
    rand_augment: float | None = option(None, "RandAugment's magnitude, 0..10; 0: none")
    repeats: int | None = option(None, "repeated augmentation: copies of an image in an epoch; 1: none")
    flip: float | None = option(None, "probability of a horizontal flip")
    padding: int | None = option(None, "small sets: black pixels around an image before its random crop")
    min_scale: float | None = option(None, "folders: least share of an image that a random crop takes")

    amp: str = option(
        "auto", "mixed precision; auto: bf16 on GPUs that have it, else fp16; off on CPUs",
        choices=("auto", "bf16", "fp16", "off"),
    )  # fmt: skip
    channels_last: bool = option(True, "keep maps in memory as (B, H, W, C): faster on GPUs and CPUs")
    compile: bool = option(False, "torch.compile the training step")
    grad_checkpointing: bool = option(False, "recompute blocks in the backward pass: less memory, slower")
    device: str = option("auto", "auto, cpu, cuda ...")

    workers: int | None = option(None, "processes that read an image folder (default: one a core)")
    eval_batch: int | None = option(None, "images in a batch of evaluation (default: --batch)")
    max_bad_files: int = option(50, "stop when more image files than this cannot be read")
    root: str = option("data", "folder that CIFAR is read from or downloaded to")
    log_every: int = option(50, "steps between looks at the loss")
    tensorboard: bool = option(False, "log to OUT/tensorboard too")
    wandb: bool = option(False, "log to Weights & Biases too")


# What may differ when a run goes on, for it does not change what is learnt. `accumulate` may as long as
# processes x accumulate stays the same.
FREE = ("out", "eval", "device", "workers", "eval_batch", "max_bad_files", "root", "log_every", "tensorboard")
FREE += ("wandb", "accumulate")

# Table 2 of the paper's appendix, with the meaning that the code of the published runs gave it: LAMB with its
# own clipping, ten epochs of cool-down, 4 x 64 images a step. Augmentation: `data.default_augmentation`.
PAPER = {
    "model": "nexception_t", "seed": 1, "epochs": 300, "batch": 64, "micro_batches": 4, "loss_threshold": 0.2,
    "lr": 2e-3, "min_lr": 1e-6, "warmup_epochs": 5, "warmup_lr": 1e-4, "cooldown_epochs": 10,
    "weight_decay": 0.02, "max_grad_norm": 1.0, "mixup": 0.1, "cutmix": 1.0,
}  # fmt: skip
SMALL = PAPER | {"size": 32, "micro_batches": 1, "cooldown_epochs": 0}
DIGITS = SMALL | {"model": "nexception_nano", "epochs": 20, "lr": 1e-2, "warmup_epochs": 2, "cutmix": 0.0}
CIFAR = SMALL | {"model": "nexception_reduced", "epochs": 100, "batch": 128, "lr": 5e-3}
RECIPES = {
    "folder": PAPER,
    "folder nexception_s": PAPER | {"seed": 2, "batch": 32, "lr": 1.4e-3},
    "digits": DIGITS,
    "cifar10": CIFAR,
    "cifar100": CIFAR,
}

# (options, condition, the condition in words)
RANGES = (
    ("epochs batch accumulate size repeats log_every eval_batch", lambda v: v >= 1, "at least 1"),
    ("lr max_grad_norm", lambda v: v > 0, "above 0"),
    ("seed min_lr warmup_epochs warmup_lr cooldown_epochs", lambda v: v >= 0, "at least 0"),
    ("weight_decay mixup cutmix padding workers max_bad_files", lambda v: v >= 0, "at least 0"),
    ("ema drop_path loss_threshold", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("flip", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("min_scale", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("rand_augment", lambda v: 0 <= v <= 10, "between 0 and 10"),
)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists the options)")


def parse(options: type, argv: list[str], prog: str):
    """The dataclass `options`, filled from a command line; its fields declare every option (see `option`)."""
    parser = Parser(prog=prog, description=options.__doc__, allow_abbrev=False)
    types = typing.get_type_hints(options)
    for entry in fields(options):
        settings = dict(entry.metadata)
        kind = (typing.get_args(types[entry.name]) or (types[entry.name],))[0]  # of `kind | None` too
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = kind
            settings.setdefault("metavar", kind.__name__ if "choices" not in settings else None)
        if entry.default not in (None, False):
            settings["help"] += f" (default: {entry.default})"
        parser.add_argument("--" + entry.name.replace("_", "-"), default=entry.default, **settings)
    return options(**vars(parser.parse_args(argv)))


def resolve(options: Options, world: int = 1) -> Options:
    """Fill what was left out from the recipe; UsageError for impossible or contradictory values."""
    kind = options.data if options.data in RECIPES else "folder"
    recipe = dict(RECIPES.get(f"{kind} {options.model}", RECIPES[kind]))
    micro_batches = recipe.pop("micro_batches")
    given = {k: v for k, v in asdict(options).items() if v is not None}
    config = create_model_config(given.get("model", recipe["model"]))
    recipe |= {"size": recipe.get("size", config.input_size), "drop_path": config.drop_path}
    if options.accumulate is None and micro_batches > 1 and micro_batches % world:
        raise UsageError(
            f"{world} processes cannot share the recipe's {micro_batches} micro-batches: "
            "give --accumulate, and --batch and --lr to suit"
        )
    recipe["accumulate"] = max(1, micro_batches // world)
    recipe |= augmentation_options(default_augmentation(options.data))
    resolved = Options(**(recipe | given))
    if resolved.out is None:
        resolved.out = f"runs/{Path(resolved.data).resolve().name}-{Path(resolved.model).stem}"
    for names, holds, wanted in RANGES:
        for name in names.split():
            value = getattr(resolved, name)
            if value is not None and not holds(value):
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be {wanted}")
    if resolved.compile and resolved.grad_checkpointing:
        raise UsageError("--grad-checkpointing does not work beneath --compile: leave out one of them")
    if resolved.min_lr > resolved.lr:
        raise UsageError(f"--min-lr {resolved.min_lr} is above --lr {resolved.lr}")
    return resolved


def create_model_config(model: str) -> ModelConfig:
    with torch.device("meta"):
        return create_model(model).config


def augmentation_options(augment: Augmentation) -> dict:
    """The options that say what `augment` says."""
    return {
        "rand_augment": augment.magnitude if augment.layers else 0.0, "repeats": augment.repeats,
        "flip": augment.flip, "padding": augment.padding, "min_scale": augment.scale[0],
    }  # fmt: skip


def augmentation(options: Options) -> Augmentation:
    """The augmentation that resolved `options` ask for."""
    return replace(
        default_augmentation(options.data),
        magnitude=options.rand_augment,
        layers=2 if options.rand_augment else 0,
        repeats=options.repeats,
        flip=options.flip,
        padding=options.padding,
        scale=(options.min_scale, 1.0),
    )


# --------------------------------------------------------------------------------------------------
# The recipe's parts: schedule, mixing, loss, optimizer
# --------------------------------------------------------------------------------------------------


def lr_at(epoch: int, options: Options) -> float:
    """Learning rate of an epoch: linear warm-up, cosine from `lr` to `min_lr`, cool-down at `min_lr`.

    The cosine counts from epoch 0, beneath the warm-up, as timm's CosineLRScheduler does by default: `lr`
    itself is never reached (paper, section 3.1).
    """
    if epoch < options.warmup_epochs:
        return options.warmup_lr + epoch * (options.lr - options.warmup_lr) / options.warmup_epochs
    if epoch >= options.epochs:
        return options.min_lr
    return options.min_lr + (options.lr - options.min_lr) / 2 * (
        1 + math.cos(math.pi * epoch / options.epochs)
    )


@dataclass(frozen=True)
class Mixup:
    """Mixup or cutmix, one draw a batch: image i is mixed with image B-1-i (timm's `Mixup` in batch mode).

    With both alphas above 0, each batch takes either with equal chance; cutmix's share is corrected for what
    the border cuts off its box.
    """

    mixup: float  # alpha of the Beta distribution; 0: none
    cutmix: float  # alpha of the Beta distribution; 0: none
    probability: float = 1.0  # that a batch is mixed at all

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, tuple[int, ...] | None]:
        """The first image's share, and cutmix's box (top, bottom, left, right) or None for mixup."""
        if not (self.mixup or self.cutmix) or rng.random() >= self.probability:
            return 1.0, None
        cut = rng.random() < 0.5 if self.mixup and self.cutmix else bool(self.cutmix)
        alpha = self.cutmix if cut else self.mixup
        share = float(rng.beta(alpha, alpha))
        if not cut:
            return share, None
        side = math.sqrt(1 - share)
        box_height, box_width = int(height * side), int(width * side)
        y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
        top, bottom = max(y - box_height // 2, 0), min(y + (box_height + 1) // 2, height)
        left, right = max(x - box_width // 2, 0), min(x + (box_width + 1) // 2, width)
        return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)

    def __call__(self, images: Tensor, labels: Tensor, num_classes: int, rng) -> tuple[Tensor, Tensor]:
        """Mixed images (B, 3, H, W) float, in place, and their targets (B, num_classes) float32."""
        targets = torch.zeros(len(labels), num_classes, device=labels.device).scatter_(
            1, labels[:, None], 1.0
        )
        share, box = self.draw(*images.shape[-2:], rng)
        if share == 1.0:
            return images, targets
        if box is None:
            others = images.flip(0).mul_(1 - share)
            images.mul_(share).add_(others)
        else:
            top, bottom, left, right = box
            images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
        return images, targets * share + targets.flip(0) * (1 - share)


def bce_loss(logits: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Binary cross-entropy of (B, classes) logits, mean over both; targets above `threshold` are 1, others 0.

    With mixing, up to two classes of an image count as present (timm's BinaryCrossEntropy).
    """
    return F.binary_cross_entropy_with_logits(logits.float(), (targets > threshold).float())


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2020) as apex's FusedLAMB and timm's `Lamb` compute it by default.

    Gradients are clipped to `max_grad_norm`, over all groups together and in place. In groups with weight
    decay, each tensor's update (Adam's, plus decay times the tensor) is scaled to the tensor's own norm,
    unless either norm is zero; groups without take plain Adam steps. All tensors of a group go through each
    operation at once, and Adam's part is PyTorch's fused kernel, which reads and writes each value once.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, max_grad_norm=1.0):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        )
        self.max_grad_norm = max_grad_norm

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, value in state.items():  # the fused kernel needs the parameter's own memory layout
                state[name] = torch.empty_like(parameter).copy_(value)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; `closure`, if any, computes the loss anew and gives it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        gradients = [p.grad for params in present for p in params]
        if not gradients:
            return loss
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        clip = (norm / self.max_grad_norm).clamp_(min=1.0)
        for group, params in zip(self.param_groups, present, strict=True):
            group["step"] += 1
            if params:
                self._update(group, params, clip)
        return loss

    def _update(self, group: dict, params: list[Tensor], clip: Tensor) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        decay = group["weight_decay"]
        # With decay, Adam at a learning rate of -1 adds its update to decay x parameter; without, it steps.
        updates = torch._foreach_mul(params, decay) if decay else params
        torch._fused_adam_(
            updates,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.full((), float(group["step"]), device=clip.device)] * len(params),
            lr=-1.0 if decay else group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=clip,
        )
        if decay:
            norms = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(updates))
            trust = torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0)
            torch._foreach_addcmul_(params, updates, list((trust * -group["lr"]).unbind()))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for tensors of two dimensions and more, none for biases and norms."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, options: Options) -> Lamb:
    groups = parameter_groups(model, options.weight_decay)
    return Lamb(groups, lr=options.lr, max_grad_norm=options.max_grad_norm)


# --------------------------------------------------------------------------------------------------
# One process and its training


@dataclass(frozen=True)
class Process:
    """Where this process stands: its rank of `world` processes, and the device it trains on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def from_first(self, function: typing.Callable):
        """What `function()` gives in the first process, for all; a UsageError there is raised in all."""
        if self.world == 1:
            return function()
        outcome = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except UsageError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UsageError(outcome[1])
        return outcome[0]


def start_process(device: str) -> Process:
    """Join the processes that torchrun started, if it did; UsageError for a device that is not there."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device}: no such device; auto, cpu and cuda are some that are") from None
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
        there = torch.cuda.device_count()
        if chosen.index >= there:
            raise UsageError(f"--device {device}: process {local} needs GPU {chosen.index} of {there}")
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
    if world > 1:
        on_gpu = chosen.type == "cuda"
        store, rank, world = next(dist.rendezvous("env://", rank, world))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # torchrun's store outlives a restart, with the addresses of processes that are no more (PyTorch
            # issue 135712). Only on one machine do all processes know the same number of restarts.
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        settings = {"store": store, "rank": rank, "world_size": world}
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", device_id=chosen if on_gpu else None, **settings
        )
    return Process(rank, max(world, 1), chosen)


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, None for none."""
    if amp == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


class Training:
    """A network in training: what a checkpoint must hold, and what turns micro-batches into optimizer steps.

    `options` are resolved ones. `model` is the network itself, `forward` the same as training calls it
    (compiled, wrapped for several processes), `ema` its averaged copy or None.
    """

    def __init__(self, model: nn.Module, options: Options, process: Process | None = None):
        self.options, self.process = options, process or Process()
        device = self.process.device
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout)
        self.model.set_grad_checkpointing(options.grad_checkpointing)
        self.amp = amp_dtype(options.amp, device)
        self.optimizer = make_optimizer(self.model, options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if options.ema else None
        self.mixup = Mixup(options.mixup, options.cutmix)
        self.forward = torch.compile(self.model) if options.compile else self.model
        if self.process.world > 1:
            devices = [device] if device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(
                self.forward, device_ids=devices, gradient_as_bucket_view=True
            )

    @property
    def scored(self) -> nn.Module:
        """The network that evaluation scores: the averaged one, if there is one."""
        return self.model if self.ema is None else self.ema

    def micro_step(self, images: Tensor, labels: Tensor, classes: int, rng: np.random.Generator) -> Tensor:
        """Add one micro-batch's share to the gradients; images (B, 3, H, W), normalised. Gives its loss."""
        torch.manual_seed(int(rng.integers(2**63)))  # of stochastic depth
        images, targets = self.mixup(images, labels, classes, rng)
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            logits = self.forward(images)
        loss = bce_loss(logits, targets, self.options.loss_threshold) / self.options.accumulate
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self) -> None:
        """The optimizer step that follows the last micro-batch."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            update_average(self.ema, self.model, self.options.ema)

    def state(self) -> dict:
        """The state dicts of a checkpoint: model, ema (or None), optimizer, scaler (empty when unused)."""
        parts = {name: getattr(self, name) for name in ("model", "ema", "optimizer", "scaler")}
        return {name: None if part is None else part.state_dict() for name, part in parts.items()}

    def load_state(self, state: dict) -> None:
        for name in ("model", "ema", "optimizer", "scaler"):
            if state[name]:
                getattr(self, name).load_state_dict(state[name])


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move every floating-point tensor of `average` by 1 - decay towards `model`'s; copy the counters."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)


def train_one_epoch(
    training: Training, data: Data, epoch: int, losses: Tensor | None = None, after_step=None
):
    """Train an epoch, or the rest of one whose first steps gave `losses`. Nothing in it waits for the device.

    `after_step(step, losses)`, if given, is called after each optimizer step and may end the epoch early by
    giving True. Returns the loss of each step done, float32 (steps,) on the device: the mean over this
    process's micro-batches. (float16's loss scaling alone does look at the gradients in each step.)
    """
    options, process = training.options, training.process
    first = 0 if losses is None else len(losses)
    every = torch.zeros(data.steps, device=process.device)
    if losses is not None:
        every[:first] = losses
    for group in training.optimizer.param_groups:
        group["lr"] = lr_at(epoch, options)
    training.model.train()
    batches = data.train_batches(epoch, first)
    for step in range(first, data.steps):
        for micro in range(options.accumulate):
            images, labels = next(batches)
            images = normalize(images, data.mean, data.std)
            # The last number keeps these draws apart from those of `data`'s augmentation.
            rng = np.random.default_rng((options.seed, epoch, step, process.rank + process.world * micro, 1))
            # Gradients are exchanged with the last micro-batch alone; `no_sync` without its context.
            training.forward.require_backward_grad_sync = micro == options.accumulate - 1
            every[step] += training.micro_step(images, labels, len(data.classes), rng)
        training.step()
        if after_step is not None and after_step(step, every):
            return every[: step + 1]
    for buffer in training.model.buffers():
        if buffer.is_floating_point():
            process.mean(buffer)
    if training.ema is not None and process.world > 1:
        for buffer in training.ema.buffers():
            dist.broadcast(buffer, 0)
    return every


class Stopped(Exception):
    """A signal asked the run to stop."""


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, split="val", amp: torch.dtype | None = None, stop=None) -> dict:
    """Top-1 and top-5 in percent, mean cross-entropy and count over a split: each image once, in any process.

    Files that cannot be read are left out and counted as "unreadable". Raises RunError when an image is
    missing for any other reason, and Stopped when `stop.signal` was set in any process meanwhile.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(6, dtype=torch.float64, device=device)
    for images, labels in data.eval_batches(split):
        if stop is not None and stop.signal:
            totals[4] += 1
            break
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(normalize(images, data.mean, data.std)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals[:3] += torch.stack([hits[:, 0].sum(), hits.sum(), loss])
        totals[3] += len(labels)
    totals[5] += len(data.bad_files)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    model.train(was_training)
    top1, top5, loss, count, stops, bad = totals.tolist()
    if stops:
        raise Stopped
    missing = data.count(split) - int(count)
    if not 0 <= missing <= bad or not count:
        raise RunError(f"evaluation counted {count:.0f} of the {data.count(split)} images of {split}")
    result = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
    return result | {"count": int(count), "unreadable": missing}


# --------------------------------------------------------------------------------------------------
# The run folder: checkpoints, metrics, curves


def write_whole(path: Path, content: bytes | memoryview | str, previous: Path | None = None) -> None:
    """Write a file whole or not at all; what `path` held before becomes `previous`, if that is given.

    Raises RunError, in one sentence, when there is no space or no permission; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror}; what was saved before is whole"
        raise RunError(f"{reason}: make room and start the same command again") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict, previous: Path | None = None) -> None:
    """`torch.save`, whole or not at all (see `write_whole`)."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer(), previous)


def read_checkpoint(path: Path) -> dict | None:
    """A checkpoint, tensors on the CPU, or None with a warning where the file is broken."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated file raises errors of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        print(f"warning: {path} is broken ({reason})", file=sys.stderr)
        return None


class Folder:
    """A run's folder, of which only the first process makes use."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.last, self.previous, self.best = (self.path / f"{n}.pt" for n in ("last", "previous", "best"))

    def open(self, record: dict) -> dict | None:
        """Lock it and give the checkpoint to go on from, if any.

        UsageError when it is in use, cannot be made, or holds a run with another `record` (`Run.record`).
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")  # noqa: SIM115, held until the process ends
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.path} is in use by another run: give another --out") from None
        except OSError as error:
            raise UsageError(f"--out {self.path}: {error.strerror}") from None
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        there = [path for path in (self.last, self.previous) if path.exists()]
        found = next((content for content in map(read_checkpoint, there) if content is not None), None)
        if found is None and there:
            raise UsageError(f"no checkpoint in {self.path} can be read: move it away or give another --out")
        if found is not None:
            self.compare(comparable(found), comparable(record))
        return found

    def compare(self, theirs: dict, ours: dict) -> None:
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        differ = "; ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} now" for name in names)
        if differ:
            reason = f"{self.path} holds a run with other options ({differ})"
            raise UsageError(f"{reason}: give the same to go on, or another --out")

    def draw_curves(self, metrics: list[dict], title: str) -> None:
        """`curves.png`: training loss and learning rate, validation top-1 and top-5, by epoch."""
        from matplotlib.figure import Figure

        lines = [line for line in metrics if "epoch" in line]
        column = {name: [line[name] for line in lines] for name in lines[0]}
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        figure.suptitle(title, fontsize=10)
        left, right = figure.subplots(1, 2)
        rates = left.twinx()
        curves = left.plot(column["epoch"], column["train_loss"], label="training loss")
        curves += rates.plot(column["epoch"], column["lr"], color="0.6", label="learning rate")
        left.legend(handles=curves, frameon=False)
        left.set(xlabel="epoch", ylabel="training loss")
        left.set_ylim(bottom=0)
        rates.set(ylabel="learning rate")
        rates.ticklabel_format(style="sci", axis="y", scilimits=(0, 0))
        for name, label in (("val_top1", "top-1"), ("val_top5", "top-5")):
            right.plot(column["epoch"], column[name], label=f"{label}, best {max(column[name]):.2f}%")
        right.set(xlabel="epoch", ylabel="validation accuracy, %")
        right.legend(frameon=False, loc="lower right")
        for axis in (left, right):
            axis.grid(alpha=0.3)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        write_whole(self.path / "curves.png", picture.getbuffer())


def comparable(record: dict) -> dict:
    """What must be the same for a run to go on, out of a checkpoint or `Run.record`."""
    options = {name: value for name, value in record["options"].items() if name not in FREE}
    return options | {name: record[name] for name in ("micro-batches a step", "config")}


def open_loggers(options: Options) -> list[typing.Callable[[dict, int], None]]:
    """Functions of (values, epoch) for the packages asked for; UsageError where one is not installed."""
    loggers = []
    if options.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("--tensorboard needs a package: pip install tensorboard") from None
        writer = SummaryWriter(Path(options.out) / "tensorboard")

        def to_tensorboard(values, epoch):
            for name, value in values.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

        loggers.append(to_tensorboard)
    if options.wandb:
        try:
            import wandb
        except ImportError:
            raise UsageError("--wandb needs a package: pip install wandb") from None
        name = "-".join(Path(options.out).parts[-2:])
        wandb.init(project="nexception", id=name, resume="allow", dir=options.out, config=asdict(options))
        loggers.append(lambda values, epoch: wandb.log(values, step=epoch))
    return loggers


# --------------------------------------------------------------------------------------------------
# A run from start to end


class StopSignal:
    """SIGTERM and Ctrl-C as a wish that all processes come to know at the same step.

    `signal` is the number that this process received, or 0. A second Ctrl-C ends a single process at once.
    """

    def __init__(self, process: Process):
        self.signal = 0
        self.group = dist.new_group(backend="gloo") if process.world > 1 else None
        self.asked = None
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.handlers = {number: signal.signal(number, self.receive) for number in numbers}

    def receive(self, number, _frame) -> None:
        if self.signal and self.group is None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Called once a step by every process: whether any of them had the wish a step ago."""
        if self.group is None:
            return bool(self.signal)
        before, flag = self.asked, torch.tensor(self.signal)
        # Asked now and answered at the next step: nobody waits, and all processes stop after the same one.
        self.asked = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())


class Progress:
    """Time, images and waiting of an epoch: a bar on a terminal, a line now and then elsewhere."""

    SECONDS_BETWEEN_LINES = 30

    def __init__(self, process: Process, data: Data, epochs: int, images_a_step: int):
        self.process, self.data, self.epochs, self.images_a_step = process, data, epochs, images_a_step
        self.bar = tqdm(disable=True)
        self.terminal = process.first and sys.stderr.isatty()
        self.started, self.steps_done, self.warned = time.monotonic(), 0, False

    def say(self, text: str) -> None:
        if self.process.first:
            tqdm.write(text) if self.terminal else print(text, flush=True)

    def begin(self, epoch: int, step: int) -> None:
        self.epoch, self.first, self.step = epoch, step, step
        self.begun = self.said = time.monotonic()
        self.waited = self.data.wait_seconds
        name = f"epoch {epoch + 1}/{self.epochs}"
        self.bar = tqdm(
            total=self.data.steps, initial=step, desc=name, leave=False, disable=not self.terminal
        )

    def advance(self) -> None:
        self.step += 1
        self.steps_done += 1
        self.bar.update()

    def speed(self) -> tuple[float, float]:
        """Images a second in this epoch, over all processes, and the share of its time spent on waiting."""
        seconds = max(time.monotonic() - self.begun, 1e-9)
        images = (self.step - self.first) * self.images_a_step
        return images / seconds, (self.data.wait_seconds - self.waited) / seconds

    def time_left(self) -> str:
        """What the rest of the run will take at this process's pace so far, evaluation included."""
        steps = (self.epochs - self.epoch) * self.data.steps - self.step
        seconds = int((time.monotonic() - self.started) / max(self.steps_done, 1) * steps)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def show(self, loss: float, lr: float) -> None:
        images, wait = self.speed()
        text = (
            f"loss {loss:.4f}  lr {lr:.2e}  {images:.0f} images/s  data wait {wait:.0%}  {self.time_left()}"
        )
        self.bar.set_postfix_str(text)
        if not self.terminal and time.monotonic() - self.said > self.SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            self.say(f"epoch {self.epoch + 1}/{self.epochs}  step {self.step}/{self.data.steps}  {text}")

    def end(self) -> tuple[float, float]:
        """End an epoch's training part, giving `speed`; say once what to do when data held it back."""
        self.bar.close()
        images, wait = self.speed()
        if wait > 0.1 and not self.warned and self.data.name not in SMALL_SETS:
            self.warned = True
            self.say(
                f"note: {wait:.0%} of this epoch went into waiting for data: raise --workers, free CPU cores "
                "or store smaller images (`python bench.py data` measures what this machine's loader gives)"
            )
        return images, wait


class Run:
    """One run: trains from where its folder stands to the end, and writes there (the first process alone)."""

    SECONDS_BETWEEN_DRAWINGS = 60

    def __init__(self, options: Options, process: Process, data: Data):
        self.options, self.process, self.data = options, process, data
        self.epoch, self.losses, self.metrics, self.best = 0, None, [], -1.0
        self.epochs = options.epochs + options.cooldown_epochs
        self.checked = 0  # steps of this epoch whose losses are known to be finite
        self.drawn = time.monotonic()
        micro_batches = process.world * options.accumulate
        self.progress = Progress(process, data, self.epochs, micro_batches * options.batch)
        torch.manual_seed(options.seed)
        overrides = {"drop_path": options.drop_path, "input_size": options.size}
        model = create_model(options.model, num_classes=len(data.classes), **overrides)
        self.record = {
            "options": asdict(options), "micro-batches a step": micro_batches, "classes": list(data.classes),
            "config": model.config.to_dict(), "transform": data.transform.to_dict(),
        }  # fmt: skip
        self.folder = Folder(options.out)
        checkpoint = process.from_first(lambda: self.folder.open(self.record))
        if checkpoint is None and options.init_weights:
            with contextlib.redirect_stdout(sys.stdout if process.first else io.StringIO()):
                load_weights(model, options.init_weights)
        self.training = Training(model, options, process)
        self.loggers = open_loggers(options) if process.first else []
        self.introduce()
        if checkpoint is not None:
            self.resume(checkpoint)
        self.stop = StopSignal(process)

    def introduce(self) -> None:
        """Say what is about to run, and write it to `config.json`."""
        options, groups = self.options, self.training.optimizer.param_groups
        shown = "  ".join(f"{name}={value}" for name, value in asdict(options).items() if value is not None)
        self.progress.say(textwrap.fill(shown, 110, break_on_hyphens=False))
        decayed, rest = (sum(p.numel() for p in group["params"]) for group in groups)
        self.progress.say(
            f"{decayed:,} parameters with weight decay, {rest:,} without; {self.data.steps} steps an epoch, "
            f"each of {self.process.world} x {options.accumulate} x {options.batch} images"
        )
        if self.process.first:
            record = self.record | {"torch": torch.__version__, "processes": self.process.world}
            write_whole(self.folder.path / "config.json", json.dumps(record, indent=1) + "\n")

    def resume(self, checkpoint: dict) -> None:
        self.training.load_state(checkpoint)
        self.epoch, self.losses, self.best = (checkpoint[name] for name in ("epoch", "losses", "best"))
        self.metrics = checkpoint["metrics"]
        self.checked = 0 if self.losses is None else len(self.losses)
        where = f"going on at epoch {self.epoch + 1}/{self.epochs}, step {self.checked + 1}"
        self.progress.say(f"{self.folder.path}: {'finished' if self.epoch == self.epochs else where}")

    def save(self) -> None:
        """Write `last.pt` (plain types and tensors) and `metrics.jsonl`."""
        if self.process.first:
            content = self.record | self.training.state()
            content |= {name: getattr(self, name) for name in ("epoch", "losses", "best", "metrics")}
            save_checkpoint(self.folder.last, content, self.folder.previous)
            lines = "".join(json.dumps(line) + "\n" for line in self.metrics)
            write_whole(self.folder.path / "metrics.jsonl", lines)

    def check(self, finite: list[float], what: str, first: int) -> None:
        """RunError that names the step when a value is not finite: nothing is saved over what was good."""
        for step, value in enumerate(finite, first + 1):
            if not math.isfinite(value):
                where = f"{what} is {value} at epoch {self.epoch + 1}, step {step}"
                kept = f"the last good checkpoint stays in {self.folder.path}"
                raise RunError(f"{where}: the run stops, and {kept}; try a lower --lr, or --amp off")

    def check_weights(self) -> None:
        norms = torch._foreach_norm(list(self.training.model.parameters()))
        self.check([torch.stack(norms).norm().item()], "the weights' norm", len(self.losses) - 1)

    def after_step(self, step: int, losses: Tensor) -> bool:
        """Show, check and listen; True when the run is to stop here."""
        self.progress.advance()
        stop = self.stop.agreed()
        if stop or (step + 1) % self.options.log_every == 0:
            window = self.process.mean(losses[self.checked : step + 1].clone()).tolist()
            self.check(window, "the loss", self.checked)
            self.checked = step + 1
            self.progress.show(sum(window) / max(len(window), 1), lr_at(self.epoch, self.options))
        return stop

    def train(self) -> int:
        """Train to the end and score the best weights on the test split; the exit status."""
        try:
            while self.epoch < self.epochs:
                self.train_epoch()
            self.finish()
        except Stopped:
            number = self.stop.signal or signal.SIGTERM
            where = f"at the end of epoch {self.epoch}"
            if self.losses is not None:
                self.save()
                where = f"in epoch {self.epoch + 1} after step {len(self.losses)}"
            name = signal.Signals(number).name
            self.progress.say(f"{name}: saved {where}; the same command goes on from there")
            return 128 + number
        return 0

    def train_epoch(self) -> None:
        self.progress.begin(self.epoch, self.checked)
        losses = train_one_epoch(self.training, self.data, self.epoch, self.losses, self.after_step)
        self.losses = self.process.mean(losses.clone())
        self.check(self.losses.tolist(), "the loss", 0)  # waits for the device, so before the clock is read
        self.check_weights()
        speed = self.progress.end()
        if len(self.losses) < self.data.steps:
            raise Stopped
        result = evaluate(self.training.scored, self.data, "val", self.training.amp, self.stop)
        self.end_epoch(result, speed)

    def end_epoch(self, result: dict, speed: tuple[float, float]) -> None:
        """Save a finished epoch and say how it went."""
        values = {"lr": lr_at(self.epoch, self.options), "train_loss": float(self.losses.mean())}
        values |= {f"val_{name}": result[name] for name in ("loss", "top1", "top5")}
        values |= {"images_per_second": round(speed[0], 1), "data_wait": round(speed[1], 4)}
        values["seconds"] = round(time.monotonic() - self.progress.begun, 2)
        if result["top1"] > self.best and self.process.first:
            # Before last.pt: a run killed between the two repeats the epoch and writes the same again.
            weights = {"model": self.training.scored.state_dict(), "ema": None}
            save_checkpoint(
                self.folder.best, self.record | weights | {"epoch": self.epoch + 1, "val": result}
            )
        self.metrics.append({"epoch": self.epoch + 1} | values)
        self.best = max(self.best, result["top1"])
        self.epoch, self.losses, self.checked = self.epoch + 1, None, 0
        self.save()
        for log in self.loggers:
            log(values, self.epoch)
        if time.monotonic() - self.drawn > self.SECONDS_BETWEEN_DRAWINGS:
            self.draw()
        self.progress.say(
            f"epoch {self.epoch}/{self.epochs}  loss {values['train_loss']:.4f}  lr {values['lr']:.2e}  "
            f"val top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  best {self.best:.2f}%  "
            f"{speed[0]:.0f} images/s  data wait {speed[1]:.0%}  {self.progress.time_left()}"
        )

    def close(self) -> None:
        """End the data's workers, unlock the folder, give signals their former meaning."""
        self.stop.close()
        self.data.close()
        if self.process.first:
            self.folder.lock.close()

    def draw(self) -> None:
        self.drawn = time.monotonic()
        if self.process.first:
            title = f"{Path(self.options.model).stem} on {Path(self.options.data).name}"
            self.folder.draw_curves(self.metrics, title)

    def finish(self) -> None:
        """Score the best weights on the test split, once in a run's life."""
        if "epoch" in self.metrics[-1] and "test" in self.data.splits:
            best = copy.deepcopy(self.training.model)
            best.load_state_dict(self.process.from_first(lambda: read_checkpoint(self.folder.best)["model"]))
            result = evaluate(best, self.data, "test", self.training.amp, self.stop)
            self.metrics.append({f"test_{name}": result[name] for name in ("top1", "top5", "loss", "count")})
            self.save()
        self.draw()
        self.progress.say(f"best validation top-1 {self.best:.2f}%, weights in {self.folder.best}")
        final = self.metrics[-1]
        if "test_top1" in final:
            self.progress.say(
                f"test top-1 {final['test_top1']:.2f}%, top-5 {final['test_top5']:.2f}% on "
                f"{final['test_count']} images that neither training nor selection has seen"
            )


# --------------------------------------------------------------------------------------------------
# Command line


class FolderSplit:
    """An `EvalFolder` behind the part of `Data`'s interface that `evaluate` uses."""

    def __init__(self, folder: EvalFolder, transform: EvalTransform):
        self.folder, self.close = folder, folder.close
        self.mean, self.std = transform.mean, transform.std
        self.eval_batches = lambda _split: iter(folder)
        self.count = lambda _split: folder.count

    @property
    def bad_files(self) -> list[tuple[str, str]]:
        return self.folder.bad_files


def evaluation_data(options: Options, model: nn.Module, process: Process):
    """What a checkpoint is scored on, its name and classes: small sets' test part, a folder's val/."""
    shared = {"batch": options.eval_batch or options.batch or 64, "workers": options.workers}
    shared |= {"rank": process.rank, "world": process.world, "device": process.device}
    shared["max_bad_files"] = options.max_bad_files
    if options.data in SMALL_SETS:
        data = open_data(options.data, size=model.transform.size, root=options.root, **shared)
        return data, "test", data.classes
    places = [Path(options.data, name) for name in ("val", "validation", "test")]
    place = str(next((path for path in places if path.is_dir()), options.data))
    folder = eval_folder(place, model.transform, **shared)
    return FolderSplit(folder, model.transform), place, folder.classes


def evaluate_checkpoint(options: Options, process: Process) -> None:
    """`--eval`: print a checkpoint's top-1 and top-5."""
    used = ("data", "eval", "batch", "eval_batch", "workers", "device", "amp", "root", "max_bad_files")
    for entry in fields(options):
        if entry.name not in used and getattr(options, entry.name) != entry.default:
            raise UsageError(f"--{entry.name.replace('_', '-')} has no effect beside --eval: leave it out")
    model = load_checkpoint(options.eval).to(process.device, memory_format=torch.channels_last)
    data, split, classes = evaluation_data(options, model, process)
    if len(classes) != model.config.num_classes or tuple(model.classes or classes) != tuple(classes):
        raise UsageError(
            f"{options.eval} was not trained for the {len(classes)} classes of {options.data}: "
            "`python bench.py accuracy` scores a checkpoint on folders of some of its classes"
        )
    result = evaluate(model, data, split, amp_dtype(options.amp, process.device))
    data.close()
    if process.first:
        left_out = f", {result['unreadable']} unreadable left out" if result["unreadable"] else ""
        print(f"{options.eval} on {result['count']} images of {options.data} ({split}{left_out})")
        print(f"top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  loss {result['loss']:.4f}")


def start_run(options: Options, process: Process) -> Run:
    """The run that resolved `options` describe, data and folder opened."""
    names = ("size", "batch", "accumulate", "eval_batch", "seed", "workers", "root", "max_bad_files")
    shared = {name: getattr(options, name) for name in names}
    shared |= {"rank": process.rank, "world": process.world, "device": process.device}
    return Run(options, process, open_data(options.data, augment=augmentation(options), **shared))


def main(argv: list[str]) -> int:
    """Train or evaluate as the command line says; user errors are one sentence, from the first process."""

    def complain(error: object, status: int) -> int:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        return status

    run, status = None, 0
    try:
        options = parse(Options, argv, "train.py")
        process = start_process(options.device)
        if process.device.type == "cpu":
            keep_large_buffers()
        if options.eval:
            evaluate_checkpoint(options, process)
        else:
            run = start_run(resolve(options, process.world), process)
    except ValueError as error:
        return complain(error, 2)
    except RunError as error:
        return complain(error, 1)
    if run is not None:
        try:
            status = run.train()
        except (RunError, DataError) as error:
            return complain(error, 1)
        except RuntimeError as error:
            if process.world == 1 or "by peer" not in str(error):
                raise
            return complain("another process is gone; the same command goes on from the last checkpoint", 1)
        except KeyboardInterrupt:
            return complain("stopped at once; the same command goes on from the last checkpoint", 130)
        finally:
            run.close()
    if process.world > 1:
        # DDP goes first: as the last to hold the process group it would, keeping the interpreter's lock, wait
        # for gloo's thread, which may itself wait for that lock. With PyTorch 2.11 one run in three hung so.
        run = None
        gc.collect()  # with --compile it stands in a cycle of references
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
