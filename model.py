"""Xception, NEXcepTion-T, -S, -TP and every network of the paper's search space, as values of one dataclass.

    python model.py                             # table of the named models: parameters, MACs, input size
    python model.py best.pt photo.jpg ...       # the five most likely classes of each photograph

In Python:

    model = create_model("nexception_t", num_classes=10, drop_path=0.0)
    load_weights(model, "nexception_t.pth")     # ours, the authors' or, for xception, timm's legacy_xception
    model = load_checkpoint("runs/digits/best.pt")    # in evaluation mode, with .classes and .transform

`create_model` gives exactly 24,544,976 (T), 43,386,944 (S), 26,559,112 (TP) and 22,855,952 (Xception)
parameters; logits and gradients agree with the authors' models and with timm's `legacy_xception` in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from data import EvalTransform, UsageError, write_whole
from blocks import (
    MIXED_KERNELS,
    NORMS,
    SPACE,
    ConvStem,
    Design,
    DownsamplingBlock,
    ExitConv,
    MiddleBlock,
    PatchifyStem,
    PyramidDownsample,
    SqueezeExcite,
)

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

LARGEST, DEEPEST = 2**20, 1000  # width or number of classes, depth of a stage: beyond these, surely a mistake


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class ModelConfig(Design):
    """A network, described by plain values. The defaults are NEXcepTion-T (appendix, tables 5 and 6).

    The nine fields of `Design` are the paper's search space; those below are the macro-architecture around
    it. Raises UsageError that begins with the name of the field when a value is impossible.
    """

    layout: str = "isotropic"  # "isotropic" (Xception's flows) or "pyramid" (ConvNeXt's stages)
    stem_width: int = 96
    stem_stride: int = 2  # 2 or 4
    widths: tuple[int, ...] = (128, 256, 512)  # isotropic: one per entry block; pyramid: one per stage
    depths: tuple[int, ...] = (8,)  # isotropic: (middle blocks,); pyramid: one per stage
    exit_widths: tuple[int, ...] = (1024, 1536, 2048)  # isotropic: exit block, two convolutions; pyramid: ()
    expansion: int = 3  # of the bottleneck block
    drop_path: float = 0.05  # rate of stochastic depth, in [0, 1)
    drop_path_spread: str = "constant"  # over the blocks: "constant", or "linear" from 0 to the rate
    in_channels: int = 3
    num_classes: int = 1000  # 0: no classifier, the model returns the pooled features
    input_size: int = 224  # side of the images in pixels that the network is meant for; it takes others

    def __post_init__(self):
        for name in ("activation_positions", "norm_positions", "widths", "depths", "exit_widths"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(map(_is_whole, value)):
                raise UsageError(f"{name}: {value!r} is not a list of whole numbers")
            object.__setattr__(self, name, tuple(value))
        macro = {"layout": ("isotropic", "pyramid"), "stem_stride": (2, 4)}
        macro["drop_path_spread"] = ("constant", "linear")
        for name, choices in (SPACE | macro).items():
            value, choices = getattr(self, name), tuple(choices)
            if value not in choices or type(value) is not type(choices[choices.index(value)]):
                raise UsageError(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}")
        for name in ("stem_width", "expansion", "in_channels", "num_classes", "input_size"):
            value, least = getattr(self, name), 0 if name == "num_classes" else 1
            if not _is_whole(value) or not least <= value <= LARGEST:
                raise UsageError(f"{name}: {value!r} is not a whole number from {least} to {LARGEST:,}")
        if not isinstance(self.drop_path, (int, float)) or not 0 <= self.drop_path < 1:
            raise UsageError(f"drop_path: {self.drop_path!r} is not in [0, 1)")

        isotropic = self.layout == "isotropic"
        for name, count in (
            ("widths", max(1, len(self.widths))),
            ("depths", 1 if isotropic else len(self.widths)),
            ("exit_widths", 3 if isotropic else 0),
        ):
            found = len(getattr(self, name))
            if found != count:
                raise UsageError(f"{name}: {found} values, but the {self.layout} layout takes {count}")
        least = len(MIXED_KERNELS) if self.kernel == "mixed" else 1
        bounds = {"widths": (least, LARGEST), "exit_widths": (1, LARGEST), "depths": (0, DEEPEST)}
        for name, (low, high) in bounds.items():
            for value in getattr(self, name):
                if not low <= value <= high:
                    raise UsageError(f"{name}: {value} is not from {low} to {high:,}")
        least = max(least, 2) if self.stem == "conv" else least
        if self.stem_width < least:
            raise UsageError(f"stem_width: {self.stem_width} is below {least}")
        if not isotropic and self.widths[0] != self.stem_width:
            raise UsageError(
                f"widths: the first of a pyramid, {self.widths[0]}, must equal stem_width {self.stem_width}"
            )
        if self.strides[-1] > self.input_size:
            raise UsageError(
                f"widths: the network has stride {self.strides[-1]}, above its input_size {self.input_size}"
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of `NEXcepTion.feature_maps`, finest first: (2, 4, 8, 16, 32) for -T, without 2 for -TP."""
        count = len(self.widths) + (2 if self.layout == "isotropic" else 0)
        return tuple(self.stem_stride * 2**i for i in range(count))

    def resolutions(self, size: int) -> tuple[int, ...]:
        """Heights of `NEXcepTion.feature_maps` for an input `size` pixels high; widths likewise."""
        if self.stem == "patchify":
            size = size // self.stem_stride
        else:
            size = (size - 3) // 2 + 1
            size = (size - 3) // (self.stem_stride // 2) + 1
        sizes = [size]
        for _ in self.strides[1:]:
            floor = self.layout == "pyramid" and self.pooling == "conv"
            size = size // 2 if floor else (size + 1) // 2
            sizes.append(size)
        return tuple(sizes)

    def drop_path_rates(self, blocks: int) -> list[float]:
        """Rates of stochastic depth of `blocks` residual blocks, in order."""
        if self.drop_path_spread == "constant" or blocks == 1:
            return [self.drop_path] * blocks
        return [self.drop_path * i / (blocks - 1) for i in range(blocks)]

    def replace(self, **changes) -> ModelConfig:
        """A copy with other values. Raises UsageError for a name that is not a field."""
        names = [f.name for f in dataclasses.fields(self)]
        timm = {"in_chans": "in_channels", "drop_path_rate": "drop_path", "img_size": "input_size"}
        for name in changes:
            if name in timm:
                raise UsageError(f"{name}: not a field of ModelConfig, which calls it {timm[name]}")
            if name not in names:
                raise UsageError(f"{name}: not a field of ModelConfig, which has {', '.join(names)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """Plain JSON values (tuples become lists); `from_dict` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """Absent fields take their defaults. Raises UsageError for a key that is not a field."""
        if not isinstance(values, dict):
            raise UsageError(f"config: {values!r} is not a dictionary of ModelConfig's fields")
        return cls().replace(**values)

    def to_json(self, path: str | os.PathLike) -> None:
        """Write the config to `path`, whole or not at all."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> ModelConfig:
        """Raises UsageError that names the file when it does not hold a config."""
        try:
            return cls.from_dict(json.loads(Path(path).expanduser().read_text()))
        except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deep
            raise UsageError(f"{path} holds no model config: {error}") from None


NEXCEPTION_T = ModelConfig()
REDUCED = NEXCEPTION_T.replace(widths=(512,), depths=(4,), input_size=32)

MODELS: dict[str, ModelConfig] = {
    "nexception_t": NEXCEPTION_T,
    "nexception_s": NEXCEPTION_T.replace(widths=(128, 256, 752)),
    "nexception_tp": NEXCEPTION_T.replace(
        pooling="conv",
        layout="pyramid",
        stem_stride=4,
        widths=(96, 192, 384, 768),
        depths=(3, 4, 9, 3),
        exit_widths=(),
        drop_path_spread="linear",
    ),
    "xception": ModelConfig(
        stem="conv",
        kernel=3,
        pooling="max",
        block="xception",
        se=False,
        activation="relu",
        activation_positions=(1, 2, 3),
        norm_positions=(1, 2, 3),
        stem_width=64,
        widths=(128, 256, 728),
        drop_path=0.0,
        input_size=299,
    ),
    # The paper's search network (section 3): one entry block, four middle blocks.
    "nexception_reduced": REDUCED,
    # The same, narrow enough for the CPU of a laptop.
    "nexception_nano": REDUCED.replace(stem_width=24, widths=(48,), exit_widths=(96, 128, 192)),
}
# The two points of the search space that the paper compares.
POINTS = {"NEXcepTion": MODELS["nexception_t"], "Xception": MODELS["xception"]}


class Head(nn.Module):
    """Global average pooling, for pyramids a norm over the features, and the linear classifier, if any."""

    def __init__(self, channels: int, config: ModelConfig):
        super().__init__()
        self.norm = NORMS[config.norm](channels) if config.layout == "pyramid" else nn.Identity()
        self.fc = nn.Linear(channels, config.num_classes) if config.num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3), keepdim=True)  # (B, C, H, W) -> (B, C, 1, 1)
        x = self.norm(x).flatten(1)  # (B, C, 1, 1) -> (B, C)
        return x if pre_logits else self.fc(x)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the forward pass of a checkpointed block and of its recomputation, which must not update
    the running statistics of batch norms a second time."""

    @contextlib.contextmanager
    def recomputation():
        norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, (momentum, batches) in zip(norms, before, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(batches)

    return contextlib.nullcontext(), recomputation()


class NEXcepTion(nn.Module):
    """The network described by `config` (or its dictionary): a stem, stages whose strides double, a head.

    Isotropic (Xception, NEXcepTion-T and -S): each entry block opens a stage, the last of these continues
    with the middle flow, and the exit flow is a stage of its own. Pyramid (NEXcepTion-TP): every stage but
    the first opens with `PyramidDownsample`.

    Maps normalized float images (B, in_channels, H, W), 32 pixels or more on a side (larger networks: their
    stride), to logits (B, num_classes), or with num_classes 0 to features (B, num_features). `feature_info`
    lists, as in timm, channels, stride and module of each of `feature_maps`. `classes` (names) and
    `transform` (an `EvalTransform`) are None until `load_checkpoint` sets them.
    """

    def __init__(self, config: ModelConfig | dict):
        super().__init__()
        self.config = config = ModelConfig.from_dict(config) if isinstance(config, dict) else config
        self.classes: list[str] | None = None
        self.transform: EvalTransform | None = None
        self.grad_checkpointing = False
        isotropic, width = config.layout == "isotropic", config.stem_width
        stem = (config.in_channels, width, config.stem_stride, config)
        self.stem = PatchifyStem(*stem, activated=isotropic) if config.stem == "patchify" else ConvStem(*stem)

        # PyTorch's initialization draws in this order: construct the blocks from the first to the last.
        stages: list[list[nn.Module]] = []
        residuals = sum(config.depths) + (len(config.widths) + 1 if isotropic else 0)
        rates = iter(config.drop_path_rates(residuals))
        for i, out in enumerate(config.widths):
            if isotropic:
                after_activation = i == 0 and config.stem == "conv"
                stage = [DownsamplingBlock((width, out, out), config, next(rates), after_activation)]
                depth = config.depths[0] if i == len(config.widths) - 1 else 0
            else:
                stage = [PyramidDownsample(width, out, config)] if i > 0 else []
                depth = config.depths[i]
            stage += [MiddleBlock(out, config.expansion, config, next(rates)) for _ in range(depth)]
            stages.append(stage)
            width = out
        if isotropic:
            first, second, third = config.exit_widths
            stage = [DownsamplingBlock((width, width, first), config, next(rates))]
            stages.append([*stage, ExitConv(first, second, config), ExitConv(second, third, config)])
            width = third
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.num_features = width
        self.head = Head(width, config)

        maps = [(width, f"stages.{i}") for i, width in enumerate((*config.widths, *config.exit_widths[2:]))]
        maps = [(config.stem_width, "stem"), *maps] if isotropic else maps
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": module}
            for (channels, module), stride in zip(maps, config.strides, strict=True)
        ]

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Maps (B, C, H, W), one per stride of `config.strides`: the output of the stem (in pyramids part of
        the first stage) and of each stage. `config.resolutions(H)` gives their heights.
        """
        x = self.stem(x)
        maps = [x] if self.config.layout == "isotropic" else []
        for stage in self.stages:
            x = self._run(stage, x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (B, num_features, H / stride, W / stride)."""
        x = self.stem(x)
        for stage in self.stages:
            x = self._run(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of the map that `forward_features` returns; with `pre_logits` the pooled
        features (B, num_features).
        """
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and self.training):
            return stage(x)
        for block in stage:
            contexts = functools.partial(_contexts, block)
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations inside each block in the backward pass: less memory, about a third more
        time. Not for use with `torch.compile`, which decides on recomputation itself.
        """
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by an untrained one, or with 0 by none, and forget the class names."""
        self.config = self.config.replace(num_classes=num_classes)
        self.classes = None
        weight = next(self.parameters())
        self.head.fc = Head(self.num_features, self.config).fc.to(weight.device, weight.dtype)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @property
    def num_classes(self) -> int:
        return self.config.num_classes


def count_parameters(model: nn.Module) -> int:
    """The number of trainable and frozen parameters; buffers do not count."""
    return sum(p.numel() for p in model.parameters())


def create_model(
    name_or_config: str | os.PathLike | dict | ModelConfig, num_classes: int | None = None, **overrides
) -> NEXcepTion:
    """Build an untrained network (PyTorch's default initialization, as the authors').

    `name_or_config` is a name in `MODELS`, a `ModelConfig`, its dictionary, or the path of its JSON file;
    `overrides` are fields of the config. Raises UsageError that names the unknown model or the field, or if
    the weights do not fit into this machine's memory.
    """
    config = name_or_config
    if isinstance(config, dict):
        config = ModelConfig.from_dict(config)
    elif not isinstance(config, ModelConfig):
        name = os.fspath(config)
        if name not in MODELS and not name.endswith(".json"):
            raise UsageError(
                f"model: {name!r} is not one of {', '.join(MODELS)}, nor a path that ends in .json"
            )
        config = MODELS[name] if name in MODELS else ModelConfig.from_json(name)
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    config = config.replace(**overrides)
    with torch.device("meta"):
        needed = 4 * count_parameters(NEXcepTion(config))
    memory = math.inf  # unknown on Windows
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UsageError(
            f"widths: the weights take {needed / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f} GiB"
        )
    return NEXcepTion(config)


def count_macs(model: nn.Module, input_size: int | None = None, attention: bool = False) -> int:
    """Multiply-accumulates for one image, the "FLOPs" of papers: of convolutions (blur pools included) and
    linear layers, or with `attention` those of attention's own products alone (queries with keys, weights
    with values).

    Works on any module that takes (B, C, H, W); `input_size` is needed where it has no `config.input_size`.
    PyTorch's flop counter counts a forward pass of a copy on the meta device: nothing is computed.
    """
    config = getattr(model, "config", None)
    size = input_size or config.input_size
    channels = config.in_channels if isinstance(config, ModelConfig) else 3
    copied = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter:  # with gradients: attention's fast path has no counts
        copied(torch.empty(1, channels, size, size, device="meta"))
    macs = {str(op): flops // 2 for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    return sum(n for op, n in macs.items() if ("bmm" in op or "attention" in op) == attention)


def entry_names(model: NEXcepTion) -> dict[str, dict[str, str]]:
    """The names of the state dict's entries (and of a classifier's) in each known layout, by its owner.

    "our" maps names to themselves; "the authors'" hold for networks shaped like -T, -S or -TP, "timm's" for
    those shaped like its `legacy_xception`. Elsewhere some names are ours or mean nothing.
    """
    isotropic = model.config.layout == "isotropic"
    official = {"stem.conv": "stem.0", "stem.norm": "stem.2" if isotropic else "stem.1"}
    official |= {"head.fc": "fc" if isotropic else "head.fc"}
    timm = {"stem.conv1": "conv1", "stem.norm1": "bn1", "stem.conv2": "conv2", "stem.norm2": "bn2"}
    timm |= {"head.fc": "fc"}
    skip = {"skip": "skip", "skip_norm": "skipbn"}
    se = {"se.reduce": "block_end.fc1", "se.norm": "block_end.bn", "se.expand": "block_end.fc2"}
    middle = {f"conv{n}": f"sepconv{n}" for n in (1, 2, 3)} | {f"norm{n}": f"norm{n}" for n in (1, 2, 3)} | se
    downsampling = skip | {"conv1": "rep.0", "norm1": "rep.1", "conv2": "rep.3", "norm2": "rep.4"} | se
    middles = residuals = 0  # blocks so far
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage):
            path = f"stages.{i}.{j}"
            if isinstance(block, PyramidDownsample):
                place = f"stages.{i}.downsample"
                official |= {f"{path}.norm": f"{place}.0", f"{path}.conv": f"{place}.1"}
                continue
            if isinstance(block, ExitConv):  # j is 1 or 2
                conv, norm = f"exit_flow.{3 * j - 2}", f"exit_flow.{3 * j - 1}"
                official |= {f"{path}.conv": conv, f"{path}.norm": norm}
                timm |= {f"{path}.conv": f"conv{j + 2}", f"{path}.norm": f"bn{j + 2}"}
                continue
            if isinstance(block, MiddleBlock):
                place = f"middle_flow.{middles}" if isotropic else f"stages.{i}.blocks.{j - (i > 0)}"
                parts = middle
                middles += 1
            else:
                place = "exit_flow.0" if i == len(model.stages) - 1 else f"downsampling_block{i + 1}"
                parts = downsampling
            official |= {f"{path}.{ours}": f"{place}.{theirs}" for ours, theirs in parts.items()}
            residuals += 1
            # timm's rep is a Sequential in which an activation precedes each convolution, except in block 1.
            first = 0 if residuals == 1 else 1
            parts = skip | {f"conv{n + 1}": f"rep.{first + 3 * n}" for n in range(3)}
            parts |= {f"norm{n + 1}": f"rep.{first + 3 * n + 1}" for n in range(3)}
            timm |= {f"{path}.{ours}": f"block{residuals}.{theirs}" for ours, theirs in parts.items()}

    def renamed(name: str, paths: dict[str, str], convs: dict[str, str]) -> str:
        path, rest = name, []
        while path and path not in paths:
            path, _, last = path.rpartition(".")
            rest.insert(0, convs.get(last, last))
        return ".".join([paths[path], *rest] if path else rest)

    names = dict.fromkeys([*model.state_dict(), "head.fc.weight", "head.fc.bias"])
    convs = {"depthwise": "conv_dw", "pointwise": "conv_pw"}
    return {
        "our": {name: name for name in names},
        "the authors'": {name: renamed(name, official, convs) for name in names},
        "timm's": {name: renamed(name, timm, {"depthwise": "conv1"}) for name in names},
    }


def export_official(model: NEXcepTion) -> dict[str, Tensor]:
    """The state dict under the authors' names, in their order: the inverse of `load_weights`."""
    names = entry_names(model)["the authors'"]
    return {names[name]: value for name, value in model.state_dict().items()}


def _read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint file, tensors on the CPU. Raises UsageError if it cannot be read safely."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        # timm's training script, which the authors used, stores its parsed arguments in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated or foreign file raises errors of many kinds
        reason = str(error) if isinstance(error, PermissionError) else "damaged, or not written by torch.save"
        if pickled := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it pickles {pickled[1]}, but only tensors and plain values are loaded"
        raise UsageError(f"{path} is not a readable checkpoint: {reason}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a state dict or checkpoint")
    return content


def _weights_of(content: dict) -> dict[str, Tensor]:
    """The state dict inside the content of a checkpoint: averaged weights (EMA) first, without prefixes."""
    for key in ("ema", "state_dict_ema", "model_ema", "model", "state_dict"):  # ours, timm's, DeiT's
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    while True:  # prefixes of DistributedDataParallel and averaging, torch.compile, Lightning, in any order
        weights.pop("n_averaged", None)
        prefixes = [p for p in ("module.", "_orig_mod.", "model.") if all(k.startswith(p) for k in weights)]
        if not weights or not prefixes:
            return weights
        weights = {k.removeprefix(prefixes[0]): v for k, v in weights.items()}


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a checkpoint file of any model, on the CPU. Raises UsageError if there is none."""
    weights = _weights_of(_read_checkpoint(path))
    if not weights:
        raise UsageError(f"{path}: no weights inside")
    return weights


def load_weights(model: NEXcepTion, path_or_state_dict: str | os.PathLike | dict) -> None:
    """Copy weights into `model`: ours, the authors' or (for `xception`) those of timm's `legacy_xception`.

    Takes a file or a dictionary, a bare state dict or a checkpoint around one. If the number of classes
    differs, everything but the classifier is loaded; RGB weights for another number of input channels are
    adapted as in timm; a line says so. Raises UsageError that names what is missing, unexpected or of another
    shape; the model is then untouched.
    """
    given = path_or_state_dict
    source = "state dict" if isinstance(given, dict) else os.fspath(given)
    weights = _weights_of(given) if isinstance(given, dict) else read_weights(given)
    if not weights:
        raise UsageError(f"{source}: no weights inside")
    layouts = entry_names(model)
    owner = max(layouts, key=lambda key: len(weights.keys() & set(layouts[key].values())))
    own, theirs = model.state_dict(), layouts[owner]
    found = {name: weights.pop(entry) for name, entry in theirs.items() if entry in weights}
    notes = []  # printed once everything fits

    fc = ("head.fc.weight", "head.fc.bias")
    if model.num_classes == 0:
        found = {name: value for name, value in found.items() if name not in fc}
    elif all(name in found for name in fc):
        classes, *features = found[fc[0]].shape
        if classes != model.num_classes and features == [model.num_features]:
            found |= {name: own[name] for name in fc}
            notes.append(
                f"{source}: {classes} classes; everything but the classifier is loaded, "
                f"which starts untrained for {model.num_classes} classes"
            )

    stem = "stem.conv.weight" if model.config.stem == "patchify" else "stem.conv1.weight"
    channels, shape = model.config.in_channels, tuple(own[stem].shape)
    if channels != 3 and stem in found and found[stem].shape == (shape[0], 3, *shape[2:]):
        filters, how = found[stem].double(), "summed" if channels == 1 else "repeated and scaled"
        repeated = filters.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
        filters = filters.sum(1, keepdim=True) if channels == 1 else repeated
        found[stem] = filters.to(found[stem].dtype)
        notes.append(f"{source}: the stem's RGB filters are {how} for in_channels {channels}")

    problems = {
        "missing": [theirs[name] for name in own if name not in found],
        "unexpected": list(weights),
        "of another shape": [
            f"{theirs[name]} {tuple(value.shape)} for {tuple(own[name].shape)}"
            for name, value in found.items()
            if value.shape != own[name].shape
        ],
    }
    problems = {kind: names for kind, names in problems.items() if names}
    if problems:
        listed = "; ".join(
            f"{kind} {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            for kind, names in problems.items()
        )
        raise UsageError(f"{source} does not fit this model ({owner} names): {listed}")
    model.load_state_dict(found)
    for note in notes:
        print(note)


def published_transform(config: ModelConfig) -> EvalTransform:
    """The evaluation transform of the published weights for networks like `config`."""
    if config.stem == "conv":  # timm's legacy_xception: 299 of 333 pixels, range [-1, 1]
        return EvalTransform(config.input_size, 0.8975, "bicubic", (0.5,) * 3, (0.5,) * 3)
    return EvalTransform(config.input_size)


def load_checkpoint(path: str | os.PathLike, fuse: bool = False) -> NEXcepTion:
    """Build the network of a checkpoint file, in evaluation mode, with its `classes` and `transform`.

    A checkpoint of `train.py` contains all of it. For weights without a config (the authors', timm's) the
    named model is recognized by the shapes; `classes` is then None and `transform` that of the published
    recipe. `fuse=True` folds the batch norms (see `fuse`). Raises UsageError if the file does not fit.
    """
    content = _read_checkpoint(path)
    weights = _weights_of(content)
    if isinstance(content.get("config"), dict):
        model = create_model(content["config"])
    else:
        model = _recognize(path, weights)
    load_weights(model, weights)
    model.classes = content.get("classes")
    model.transform = published_transform(model.config)
    if isinstance(content.get("transform"), dict):
        try:
            model.transform = EvalTransform.from_dict(content["transform"])
        except TypeError as error:
            raise UsageError(f"{path}: its transform is not an EvalTransform: {error}") from None
    model.eval()
    if fuse:
        _fold_norms(model)
    return model


def _recognize(path: str | os.PathLike, weights: dict[str, Tensor]) -> NEXcepTion:
    """The named model, untrained, that has the shapes of `weights` under the names of some known layout."""
    shapes = {name: value.shape for name, value in weights.items()}
    for config in MODELS.values():
        with torch.device("meta"):
            model = NEXcepTion(config)
        for names in entry_names(model).values():
            head, own = names["head.fc.weight"], model.state_dict()
            body = {names[k]: v.shape for k, v in own.items() if not k.startswith("head.fc.")}
            if head in shapes and all(shapes.get(name) == shape for name, shape in body.items()):
                return create_model(config, num_classes=shapes[head][0])
    raise UsageError(f"{path} has no config inside and fits none of {', '.join(MODELS)}")


def fuse(model: NEXcepTion) -> NEXcepTion:
    """An evaluation-only copy with every foldable batch norm folded into the convolution next to it.

    Equal to `model.eval()` to 1e-5 in float32. Folded are norms that directly follow a convolution, and those
    that directly precede an unpadded one or the classifier; layer norms stay, and so does the norm after the
    activation of an isotropic patchify stem. Gradients flow through the copy (Grad-CAM). `load_weights` does
    not take its state dict.
    """
    fused = copy.deepcopy(model).eval()
    _fold_norms(fused)
    return fused


# Pairs of a convolution and a norm inside each block, in the order of the data flow. A module between the two
# has to be an identity.
_FOLDABLE: dict[type, tuple[tuple[str, ...], ...]] = {
    PatchifyStem: (("conv", "act", "norm"),),
    ConvStem: (("conv1", "norm1"), ("conv2", "norm2")),
    SqueezeExcite: (("reduce", "norm"),),
    PyramidDownsample: (("norm", "pool", "conv"),),
    DownsamplingBlock: (("skip", "skip_norm"), ("conv1.pointwise", "norm1"), ("conv2.pointwise", "norm2")),
    MiddleBlock: tuple((f"conv{i}.pointwise", f"norm{i}") for i in (1, 2, 3)),
    ExitConv: (("conv.pointwise", "norm"),),
    Head: (("norm", "fc"),),
}


@torch.no_grad()
def _fold_norms(model: NEXcepTion) -> None:
    """Fold the batch norms of `model` in place, computing in float64."""
    for module in list(model.modules()):
        for first, *between, last in _FOLDABLE.get(type(module), ()):
            norm_first = first == "norm"
            norm_path, layer_path = (first, last) if norm_first else (last, first)
            norm, layer = module.get_submodule(norm_path), module.get_submodule(layer_path)
            apart = any(not isinstance(getattr(module, name), nn.Identity) for name in between)
            if apart or not isinstance(norm, nn.BatchNorm2d) or not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            shift = norm.bias.double() - norm.running_mean.double() * scale
            weight = layer.weight.double()  # (O, I, K, K) or (O, I)
            bias = 0.0 if layer.bias is None else layer.bias.double()
            ones = (1,) * (weight.dim() - 2)
            if norm_first:  # W (scale x + shift) + b
                bias = bias + (weight * shift.view(1, -1, *ones)).flatten(1).sum(1)
                weight = weight * scale.view(1, -1, *ones)
            else:  # scale (W x + b) + shift
                bias = bias * scale + shift
                weight = weight * scale.view(-1, 1, *ones)
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
            setattr(module, norm_path, nn.Identity())


def compile_frozen(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile `model`, in evaluation mode, with inductor and its weights as constants.

    The returned function maps (B, C, H, W) to logits: the fastest way to run a network on a CPU, best after
    `fuse`. Without gradients; the weights must stay as they are at the first call. Every new shape is
    compiled separately.
    """
    import torch._dynamo.config as dynamo_config  # these take as long to import as PyTorch itself
    import torch._inductor.config as inductor_config

    compiled = torch.compile(model.eval(), dynamic=False)

    def frozen(x: Tensor) -> Tensor:
        # torch.compile's own options={"freezing": True} comes too late: the tracer has by then turned the
        # weights into inputs, unless this switch tells it not to. Calling the kernels from C++ takes 5 to 8%
        # off the time of a single image, 1% off that of a batch of 16.
        switches = {"freezing": True, "cpp_wrapper": x.device.type == "cpu"}
        # All models of a class share one count of shapes, beyond whose limit PyTorch would run them eagerly.
        limits = {"recompile_limit": 2**16, "fail_on_recompile_limit_hit": True}
        with torch.no_grad(), inductor_config.patch(switches), dynamo_config.patch(limits):
            return compiled(x)

    return frozen


def keep_large_buffers() -> None:
    """On Linux, have glibc keep large buffers instead of returning them to the system at every free, and ask
    for huge pages for them. Elsewhere, do nothing.

    To be called at the start of every script that computes on a CPU, before the first tensor: page faults can
    cost more than the arithmetic. `THP_MEM_ALLOC_ENABLE=0` in the environment keeps PyTorch from huge pages.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own switch, read at its first allocation
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def table() -> str:
    """The named models, one line each."""
    lines = [f"{'model':20} {'parameters':>12} {'MACs':>9} {'input':>6}"]
    for name, config in MODELS.items():
        with torch.device("meta"):
            model = NEXcepTion(config)
        macs = f"{count_macs(model) / 1e9:.3f} G"
        lines.append(f"{name:20} {count_parameters(model):12,} {macs:>9} {config.input_size:6}")
    return "\n".join(lines)


def classify(model: NEXcepTion, photos: list[str]) -> None:
    """Print the five most likely classes of each photograph with their probabilities.

    Photographs taken sideways are turned as their EXIF entry says. Transparency is ignored, as by Pillow's
    `convert("RGB")` and the loaders of timm and torchvision: hidden colours count.
    """
    from PIL import Image, ImageOps

    if model.config.in_channels != 3 or model.num_classes == 0:
        raise UsageError("photographs take a model with a classifier and in_channels 3")
    for photo in photos:
        try:
            with Image.open(Path(photo).expanduser()) as image:
                ImageOps.exif_transpose(image, in_place=True)  # a copy would lose the range of deep pixels
                image.load()
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise UsageError(f"{photo} is not a readable image: {error}") from None
        try:
            x = model.transform(image)[None]  # (C, H, W) -> (1, C, H, W)
        except UsageError as error:
            raise UsageError(f"{photo}: {error}") from None
        with torch.inference_mode():
            probabilities, order = model(x).softmax(1)[0].sort(descending=True)
        lines = [
            f"  {probability:6.1%}  {model.classes[i] if model.classes else f'class {i}'}"
            for probability, i in zip(probabilities[:5].tolist(), order[:5].tolist(), strict=True)
        ]
        print(photo, *lines, sep="\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", nargs="?", help="file of train.py, of the authors, or of timm's Xception"
    )
    parser.add_argument("photos", nargs="*", help="images to classify")
    args = parser.parse_args(argv)
    try:
        if args.checkpoint is None:
            print(table(), flush=True)
        elif not args.photos:
            raise UsageError(f"name the photographs to classify after {args.checkpoint}")
        else:
            keep_large_buffers()
            classify(load_checkpoint(args.checkpoint, fuse=True), args.photos)
    except UsageError as error:
        print(f"model.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more at exit
    return 0


if __name__ == "__main__":
    sys.exit(main())
