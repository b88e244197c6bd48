"""Xception, NEXcepTion-T, -S, -TP and every network of the paper's search space, as values of one dataclass.

    python model.py                             # table of the named models: parameters, MACs, input size
    python model.py best.pt photo.jpg ...       # the five likeliest classes of each photograph

In Python:

    model = create_model("nexception_t", num_classes=10, drop_path=0.0)
    load_weights(model, "nexception_t.pth")     # ours, the authors' or, for xception, timm's legacy_xception
    model = load_checkpoint("runs/digits/best.pt")    # evaluation mode, with .classes and .transform

`create_model` gives exactly 24,544,976 (T), 43,386,944 (S), 26,559,112 (TP) and 22,855,952 (Xception)
parameters; logits and gradients agree with the authors' models and with timm's `legacy_xception` in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks import (
    ACTIVATIONS,
    KERNELS,
    NORMS,
    POOLINGS,
    BlurPool,
    ConvStem,
    DownsamplingBlock,
    ExitConv,
    MiddleBlock,
    PatchifyStem,
    PyramidDownsample,
    SqueezeExcite,
)
from data import EvalTransform

POSITIONS = ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
CHOICES = {
    "stem": ("conv", "patchify"),
    "kernel": (*KERNELS, "mixed"),
    "pooling": POOLINGS,
    "block": ("xception", "bottleneck"),
    "se": (False, True),
    "activation": tuple(ACTIVATIONS),
    "activation_positions": POSITIONS,
    "norm": tuple(NORMS),
    "norm_positions": POSITIONS,
    "layout": ("isotropic", "pyramid"),
    "stem_stride": (2, 4),
    "drop_path_spread": ("constant", "linear"),
}


@dataclass(frozen=True)
class ModelConfig:
    """A network, described by plain values. The defaults are NEXcepTion-T (appendix, tables 5 and 6).

    The first nine fields are the paper's search space; the others are the macro-architecture around it.
    Raises ValueError that begins with the field's name when a value is impossible.
    """

    stem: str = "patchify"  # "conv" (Xception's two convolutions) or "patchify"
    kernel: int | str = 5  # of the blocks' separable convolutions: 3, 5, 7, 9 or "mixed"
    pooling: str = "blur"  # of the down-sampling blocks: "max", "conv" or "blur"
    block: str = "bottleneck"  # of the middle flow: "xception" or "bottleneck"
    se: bool = True  # squeeze-and-excitation at the end of each block
    activation: str = "gelu"  # "relu", "gelu", "elu" or "celu"
    activation_positions: tuple[int, ...] = (2,)  # convolutions (of 1, 2, 3) that an activation stands before
    norm: str = "batch"  # "batch" or "layer"
    norm_positions: tuple[int, ...] = (1, 2)  # convolutions (of 1, 2, 3) that a norm follows
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
    num_classes: int = 1000
    input_size: int = 224  # pixels a side that the network is meant for; it takes others

    def __post_init__(self):
        for name in ("activation_positions", "norm_positions", "widths", "depths", "exit_widths"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(_is_whole(item) for item in value):
                raise ValueError(f"{name}: {value!r} is no list of whole numbers")
            object.__setattr__(self, name, tuple(value))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices or type(value) is not type(choices[choices.index(value)]):
                raise ValueError(f"{name}: {value!r} is none of {', '.join(map(repr, choices))}")
        for name in ("stem_width", "expansion", "in_channels", "num_classes", "input_size"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} is no whole number above 0")
        if not isinstance(self.drop_path, (int, float)) or not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: {self.drop_path!r} is not in [0, 1)")
        self._check_widths()

    def _check_widths(self):
        isotropic = self.layout == "isotropic"
        expected = {
            "widths": (len(self.widths), max(1, len(self.widths))),
            "depths": (len(self.depths), 1 if isotropic else len(self.widths)),
            "exit_widths": (len(self.exit_widths), 3 if isotropic else 0),
        }
        for name, (found, wanted) in expected.items():
            if found != wanted:
                raise ValueError(f"{name}: {found} values where the {self.layout} layout takes {wanted}")
        least = len(KERNELS) if self.kernel == "mixed" else 1
        for name, lowest in (("widths", least), ("exit_widths", 1), ("depths", 0)):
            if any(value < lowest for value in getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)} has a value below {lowest}")
        least = max(least, 2) if self.stem == "conv" else least
        if self.stem_width < least:
            raise ValueError(f"stem_width: {self.stem_width} is below {least}")
        if not isotropic and self.widths[0] != self.stem_width:
            raise ValueError(
                f"widths: a pyramid's first, {self.widths[0]}, must be stem_width {self.stem_width}"
            )
        if self.strides[-1] > self.input_size:
            raise ValueError(
                f"widths: the network's stride {self.strides[-1]} is above its input_size {self.input_size}"
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of each stage's map, finest first: (4, 8, 16, 32) for NEXcepTion-T and -TP."""
        stages = len(self.widths) + 1 if self.layout == "isotropic" else len(self.widths)
        first = self.stem_stride * 2 if self.layout == "isotropic" else self.stem_stride
        return tuple(first * 2**stage for stage in range(stages))

    def resolutions(self, size: int) -> tuple[int, ...]:
        """The height of each of `feature_maps`' maps for an input `size` pixels high; widths likewise."""
        if self.stem == "patchify":
            size = size // self.stem_stride
        else:
            size = (size - 3) // 2 + 1
            size = (size - 3) // (self.stem_stride // 2) + 1
        sizes = [size]
        for _ in range(len(self.strides) - (self.layout == "pyramid")):
            floor = self.layout == "pyramid" and self.pooling == "conv"
            size = size // 2 if floor else (size + 1) // 2
            sizes.append(size)
        return tuple(sizes)

    def to_dict(self) -> dict:
        """Plain JSON values (tuples become lists); `from_dict` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """Raises ValueError for a key that is no field; absent fields take their defaults."""
        if not isinstance(values, dict):
            raise ValueError(f"config: {values!r} is no dictionary of ModelConfig's fields")
        return cls(**_checked_fields(values))

    def to_json(self, path: str | os.PathLike) -> None:
        """Write the config to `path`, whole or not at all."""
        path = Path(path)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> ModelConfig:
        """Raises ValueError, naming the file, when it does not hold a config."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} holds no model config: {error}") from None


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_fields(values: dict) -> dict:
    names = [f.name for f in fields(ModelConfig)]
    for name in values:
        if name not in names:
            raise ValueError(f"{name}: no field of ModelConfig, which has {', '.join(names)}")
    return values


class Head(nn.Module):
    """Global average pooling, for pyramids a norm over the features, and the linear classifier."""

    def __init__(self, channels: int, config: ModelConfig):
        super().__init__()
        self.norm = NORMS[config.norm](channels) if config.layout == "pyramid" else nn.Identity()
        self.fc = nn.Linear(channels, config.num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3), keepdim=True)  # (B, C, H, W) -> (B, C, 1, 1)
        x = self.norm(x).flatten(1)  # (B, C, 1, 1) -> (B, C)
        return x if pre_logits else self.fc(x)


def _once_counted(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a checkpointed forward pass and of its recomputation, which must not count again in the
    running statistics of batch norms."""

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
    """A network of `config`: a stem, stages at strides that double, a head.

    Isotropic (Xception, NEXcepTion-T and -S): each entry block opens a stage, the last of these goes on with
    the middle flow, and the exit flow is a stage of its own. Pyramid (NEXcepTion-TP): every stage but the
    first opens with `PyramidDownsample`.

    Takes `(B, in_channels, H, W)` float maps, normalised, of any size from 32 pixels that the stride allows,
    and gives `(B, num_classes)` logits. `classes` (names) and `transform` (an `EvalTransform`) are None until
    `load_checkpoint` sets them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.classes: list[str] | None = None
        self.transform: EvalTransform | None = None
        self.grad_checkpointing = False
        self.stem = PatchifyStem(config) if config.stem == "patchify" else ConvStem(config)
        build = _isotropic_stages if config.layout == "isotropic" else _pyramid_stages
        self.stages = nn.ModuleList(build(config))
        self.num_features = (config.exit_widths or config.widths)[-1]
        self.head = Head(self.num_features, config)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """`(B, C, H, W)` maps, one a stride, finest first: the stem's (where its stride is not the first
        stage's) and each stage's last. `config.resolutions(H)` tells their heights.
        """
        x = self.stem(x)
        maps = [x] if self.config.layout == "isotropic" else []
        for stage in self.stages:
            x = self._run(stage, x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, `(B, num_features, H / stride, W / stride)`."""
        x = self.stem(x)
        for stage in self.stages:
            x = self._run(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, num_classes)` of `forward_features`' map, or with `pre_logits` `(B, num_features)`."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and self.training):
            return stage(x)
        for block in stage:
            contexts = functools.partial(_once_counted, block)
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's inside in the backward pass: less memory, about a third more time.

        Not beneath `torch.compile`, which has recomputation of its own.
        """
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """A new, untrained linear layer for `num_classes` classes; class names are forgotten."""
        self.config = replace(self.config, num_classes=num_classes)
        self.classes = None
        weight = self.head.fc.weight
        self.head.fc = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)


def drop_path_rates(config: ModelConfig, blocks: int) -> list[float]:
    """The rate of stochastic depth of each of `blocks` residual blocks, in order."""
    if config.drop_path_spread == "constant" or blocks == 1:
        return [config.drop_path] * blocks
    return [config.drop_path * i / (blocks - 1) for i in range(blocks)]


def _isotropic_stages(config: ModelConfig) -> list[nn.Sequential]:
    entries, middle = len(config.widths), config.depths[0]
    rates = iter(drop_path_rates(config, entries + middle + 1))
    stages, width = [], config.stem_width
    for i, out in enumerate(config.widths):
        after_activation = i == 0 and config.stem == "conv"
        stages.append([DownsamplingBlock((width, out, out), config, next(rates), after_activation)])
        width = out
    stages[-1] += [MiddleBlock(width, config, next(rates)) for _ in range(middle)]
    first, second, third = config.exit_widths
    exit_flow = [DownsamplingBlock((width, width, first), config, next(rates))]
    exit_flow += [ExitConv(first, second, config), ExitConv(second, third, config)]
    return [nn.Sequential(*blocks) for blocks in [*stages, exit_flow]]


def _pyramid_stages(config: ModelConfig) -> list[nn.Sequential]:
    rates = iter(drop_path_rates(config, sum(config.depths)))
    stages, width = [], config.stem_width
    for i, (out, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        blocks: list[nn.Module] = [] if i == 0 else [PyramidDownsample(width, out, config)]
        width = out
        blocks += [MiddleBlock(width, config, next(rates)) for _ in range(depth)]
        stages.append(nn.Sequential(*blocks))
    return stages


XCEPTION = ModelConfig(
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
)
NEXCEPTION_T = ModelConfig()
REDUCED = replace(NEXCEPTION_T, widths=(512,), depths=(4,), input_size=32)

MODELS: dict[str, ModelConfig] = {
    "nexception_t": NEXCEPTION_T,
    "nexception_s": replace(NEXCEPTION_T, widths=(128, 256, 752)),
    "nexception_tp": replace(
        NEXCEPTION_T,
        pooling="conv",
        layout="pyramid",
        stem_stride=4,
        widths=(96, 192, 384, 768),
        depths=(3, 4, 9, 3),
        exit_widths=(),
        drop_path_spread="linear",
    ),
    "xception": XCEPTION,
    # The paper's search network (section 3): one entry block, four middle blocks.
    "nexception_reduced": REDUCED,
    # The same, narrow enough for a laptop's CPU.
    "nexception_nano": replace(REDUCED, stem_width=24, widths=(48,), exit_widths=(96, 128, 192)),
}


def create_model(
    name_or_config: str | os.PathLike | dict | ModelConfig, num_classes: int | None = None, **overrides
) -> NEXcepTion:
    """A freshly initialised network (PyTorch's defaults, as the authors').

    `name_or_config` is a name of `MODELS`, a `ModelConfig`, its dictionary, or the path of its JSON file;
    `overrides` are fields of the config. Raises ValueError that names the unknown model or the field.
    """
    config = name_or_config
    if isinstance(config, dict):
        config = ModelConfig.from_dict(config)
    elif not isinstance(config, ModelConfig):
        name = os.fspath(config)
        if name not in MODELS and not name.endswith(".json"):
            raise ValueError(f"model: {name!r} is none of {', '.join(MODELS)} and no path of a .json config")
        config = MODELS[name] if name in MODELS else ModelConfig.from_json(name)
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    return NEXcepTion(replace(config, **_checked_fields(overrides)))


def count_parameters(model: nn.Module) -> int:
    """The number of trainable and frozen parameters; buffers do not count."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: int | None = None) -> int:
    """Multiply-accumulates of convolutions (blur pools too) and linear layers for one image: papers' "FLOPs".

    Works on any module that takes `(B, C, H, W)`; `input_size` is needed where it has no `config.input_size`.
    Nothing is computed: the forward pass runs on shapes alone, in a copy.
    """
    config = getattr(model, "config", None)
    size = input_size or config.input_size
    channels = config.in_channels if isinstance(config, ModelConfig) else 3
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        # Each output value of a convolution sums over its kernel in one group's inputs, of a linear layer
        # over its inputs: the size of one row of the weight.
        weight = module.filter if isinstance(module, BlurPool) else module.weight
        macs += output.numel() * weight[0].numel()

    shapes = copy.deepcopy(model).to("meta").eval()
    for module in shapes.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, BlurPool)):
            module.register_forward_hook(count)
    with torch.inference_mode():
        shapes(torch.zeros(1, channels, size, size, device="meta"))
    return macs


def _block_paths(config: ModelConfig) -> dict[str, list[str]]:
    """The module paths of the blocks in our networks, by kind, in order."""
    last = len(config.widths) - 1
    if config.layout == "pyramid":
        first = [0] + [1] * last
        middle = [f"stages.{i}.{first[i] + j}" for i, depth in enumerate(config.depths) for j in range(depth)]
        return {"middle": middle, "downsample": [f"stages.{i}.0" for i in range(1, last + 1)]}
    return {
        "entry": [f"stages.{i}.0" for i in range(last + 1)],
        "middle": [f"stages.{last}.{1 + j}" for j in range(config.depths[0])],
        "exit": [f"stages.{last + 1}.{j}" for j in range(3)],
    }


def official_paths(config: ModelConfig) -> dict[str, str]:
    """Our module paths and the authors' for the same modules, for networks shaped like -T, -S or -TP."""
    middle = {f"conv{i}": f"sepconv{i}" for i in (1, 2, 3)} | {f"norm{i}": f"norm{i}" for i in (1, 2, 3)}
    down = {"skip": "skip", "skip_norm": "skipbn"}
    down |= {"conv1": "rep.0", "norm1": "rep.1", "conv2": "rep.3", "norm2": "rep.4"}
    se = {"se.reduce": "block_end.fc1", "se.norm": "block_end.bn", "se.expand": "block_end.fc2"}
    blocks, paths = _block_paths(config), {"stem.conv": "stem.0", "stem.norm": "stem.2", "head.fc": "fc"}
    if config.layout == "pyramid":
        paths |= {"stem.norm": "stem.1", "head.norm": "head.norm", "head.fc": "head.fc"}
        theirs = [f"stages.{i}.blocks.{j}" for i, depth in enumerate(config.depths) for j in range(depth)]
        for i, path in enumerate(blocks["downsample"], 1):
            paths |= {f"{path}.norm": f"stages.{i}.downsample.0", f"{path}.conv": f"stages.{i}.downsample.1"}
    else:
        theirs = [f"middle_flow.{i}" for i in range(len(blocks["middle"]))]
        first, second, third = blocks["exit"]
        paths |= {f"{second}.conv": "exit_flow.1", f"{second}.norm": "exit_flow.2"}
        paths |= {f"{third}.conv": "exit_flow.4", f"{third}.norm": "exit_flow.5"}
        places = {path: f"downsampling_block{i}" for i, path in enumerate(blocks["entry"], 1)}
        for path, place in (places | {first: "exit_flow.0"}).items():
            paths |= {f"{path}.{ours}": f"{place}.{name}" for ours, name in (down | se).items()}
    for path, place in zip(blocks["middle"], theirs, strict=True):
        paths |= {f"{path}.{ours}": f"{place}.{name}" for ours, name in (middle | se).items()}
    return paths


def timm_paths(config: ModelConfig) -> dict[str, str]:
    """Our module paths and those of timm's `legacy_xception`, for isotropic networks without SE."""
    paths = {"stem.conv1": "conv1", "stem.norm1": "bn1", "stem.conv2": "conv2", "stem.norm2": "bn2"}
    paths["head.fc"] = "fc"
    if config.layout == "pyramid":
        return paths
    blocks = _block_paths(config)
    first, second, third = blocks["exit"]
    paths |= {f"{second}.conv": "conv3", f"{second}.norm": "bn3"}
    paths |= {f"{third}.conv": "conv4", f"{third}.norm": "bn4"}
    for number, path in enumerate([*blocks["entry"], *blocks["middle"], first], 1):
        # A block's convolutions lie three places apart, behind an activation that block 1 begins without.
        start = 0 if number == 1 else 1
        for i in range(3):
            paths[f"{path}.conv{i + 1}"] = f"block{number}.rep.{start + 3 * i}"
            paths[f"{path}.norm{i + 1}"] = f"block{number}.rep.{start + 3 * i + 1}"
        paths |= {f"{path}.skip": f"block{number}.skip", f"{path}.skip_norm": f"block{number}.skipbn"}
    return paths


def _renamed(names: list[str], paths: dict[str, str], separable: dict[str, str]) -> dict[str, str]:
    """Each of our entries' `names` and its name where modules lie at `paths`."""
    renamed = {}
    for name in names:
        parts = name.split(".")
        cut = next((i for i in range(len(parts), 0, -1) if ".".join(parts[:i]) in paths), 0)
        head = [paths[".".join(parts[:cut])]] if cut else []
        renamed[name] = ".".join(head + [separable.get(part, part) for part in parts[cut:]])
    return renamed


def _layouts(model: NEXcepTion) -> dict[str, dict[str, str]]:
    """Our names and each known layout's, by the layout's owner."""
    names = list(model.state_dict())
    return {
        "our": {name: name for name in names},
        "the authors'": _renamed(
            names, official_paths(model.config), {"depthwise": "conv_dw", "pointwise": "conv_pw"}
        ),
        "timm's": _renamed(names, timm_paths(model.config), {"depthwise": "conv1"}),
    }


def export_official(model: NEXcepTion) -> dict[str, Tensor]:
    """The state dict under the authors' names, in their order: the inverse of `load_weights`."""
    names = _layouts(model)["the authors'"]
    return {names[name]: value for name, value in model.state_dict().items()}


def _read_checkpoint(path: str | os.PathLike) -> dict:
    """What a checkpoint file holds, tensors on the CPU. Raises ValueError when it can't be read safely."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        # timm's training script, which the authors used, stores its parsed arguments in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated or foreign file raises errors of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no readable checkpoint: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict or checkpoint")
    return content


def _weights_of(content: dict) -> dict[str, Tensor]:
    """The state dict inside a checkpoint's content: averaged weights (EMA) before raw ones, no prefixes."""
    for key in ("ema", "model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in ("module.", "_orig_mod."):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a checkpoint file of any model, on the CPU; ValueError where there is none."""
    weights = _weights_of(_read_checkpoint(path))
    if not weights:
        raise ValueError(f"{path}: no weights inside")
    return weights


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def load_weights(model: NEXcepTion, path_or_state_dict: str | os.PathLike | dict) -> None:
    """Copy weights into `model`: ours, the authors' or (for `xception`) those of timm's `legacy_xception`.

    Takes a file or a dictionary, a bare state dict or a checkpoint around one. Where the number of classes
    differs, the body is loaded, the head stays as it was initialised, and a line says so. Raises ValueError
    that names what is missing, unexpected or of another shape; the model is then untouched.
    """
    given = path_or_state_dict
    source = "state dict" if isinstance(given, dict) else os.fspath(given)
    weights = _weights_of(given) if isinstance(given, dict) else read_weights(given)
    if not weights:
        raise ValueError(f"{source}: no weights inside")
    layouts = _layouts(model)
    owner = max(layouts, key=lambda key: len(weights.keys() & set(layouts[key].values())))
    names, own = layouts[owner], model.state_dict()
    theirs = {names[name]: value for name, value in own.items()}

    problems = {
        "missing": [name for name in theirs if name not in weights],
        "unexpected": [name for name in weights if name not in theirs],
    }
    fc = [names["head.fc.weight"], names["head.fc.bias"]]
    classes = len(weights.get(fc[0], ()))
    features = weights[fc[0]].shape[1:] if classes else None
    new_head = classes != model.config.num_classes and features == (model.num_features,)
    problems["of another shape"] = [
        f"{name} {tuple(weights[name].shape)} for {tuple(value.shape)}"
        for name, value in theirs.items()
        if name in weights and weights[name].shape != value.shape and not (new_head and name in fc)
    ]
    found = "; ".join(f"{kind} {_some(entries)}" for kind, entries in problems.items() if entries)
    if found:
        raise ValueError(f"{source} does not fit this model ({owner} names): {found}")
    if new_head:
        print(
            f"{source}: {classes} classes; the body is loaded, "
            f"the head for {model.config.num_classes} classes starts anew"
        )
    kept = {name: own[name] if new_head and names[name] in fc else weights[names[name]] for name in own}
    model.load_state_dict(kept)


def load_checkpoint(path: str | os.PathLike, fuse: bool = False) -> NEXcepTion:
    """The network of a checkpoint file, in evaluation mode, with its `classes` and `transform`.

    A checkpoint of `train.py` says all that itself. For weights without a config (the authors', timm's) the
    named model is found by the shapes; `classes` is then None and `transform` that of the published recipe.
    `fuse=True` folds the batch norms (see `fuse`). Raises ValueError when the file or its content is not fit.
    """
    content = _read_checkpoint(path)
    weights = _weights_of(content)
    if isinstance(content.get("config"), dict):
        model = create_model(content["config"])
    else:
        model = _recognise(path, weights)
    load_weights(model, weights)
    model.classes = content.get("classes")
    if isinstance(content.get("transform"), dict):
        model.transform = EvalTransform.from_dict(content["transform"])
    else:
        model.transform = _published_transform(model.config)
    model.eval()
    if fuse:
        _fold_norms(model)
    return model


def _published_transform(config: ModelConfig) -> EvalTransform:
    if config.stem == "conv":  # timm's legacy_xception: 299 of 333 pixels, range [-1, 1]
        return EvalTransform(config.input_size, 0.8975, "bicubic", (0.5,) * 3, (0.5,) * 3)
    return EvalTransform(config.input_size)


def _recognise(path: str | os.PathLike, weights: dict[str, Tensor]) -> NEXcepTion:
    """The named model, untrained, that has the shapes of `weights` under some known layout's names."""
    shapes = {name: value.shape for name, value in weights.items()}
    for config in MODELS.values():
        with torch.device("meta"):
            model = NEXcepTion(config)
        for names in _layouts(model).values():
            head, own = names["head.fc.weight"], model.state_dict()
            body = {names[k]: v.shape for k, v in own.items() if not k.startswith("head.fc.")}
            if head in shapes and all(shapes.get(name) == shape for name, shape in body.items()):
                return create_model(config, num_classes=shapes[head][0])
    raise ValueError(f"{path} has no config inside and fits none of {', '.join(MODELS)}")


def fuse(model: NEXcepTion) -> NEXcepTion:
    """An evaluation-only copy with every foldable batch norm folded into the convolution beside it.

    Equal to `model.eval()` to 1e-5 in float32. Folded are norms that directly follow a convolution, and those
    that directly precede an unpadded one or the classifier; layer norms and the norm behind the activation of
    an isotropic patchify stem stay. The copy can't be trained, nor its state dict loaded by `load_weights`.
    """
    fused = copy.deepcopy(model).eval()
    _fold_norms(fused)
    return fused


def _fold_norms(model: NEXcepTion) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        for conv_path, norm_name in _NORMS_BEHIND.get(type(module), {}).items():
            conv, norm = module.get_submodule(conv_path), getattr(module, norm_name)
            stem_act = isinstance(module, PatchifyStem) and not isinstance(module.act, nn.Identity)
            if isinstance(norm, nn.BatchNorm2d) and not stem_act:
                scale, shift = _scale_and_shift(norm)
                bias = 0.0 if conv.bias is None else conv.bias.double()
                _set_affine(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias * scale + shift)
                setattr(module, norm_name, nn.Identity())
        if isinstance(module, PyramidDownsample) and isinstance(module.pool, nn.Identity):
            _fold_norm_ahead(module, module.conv)
        if isinstance(module, Head):
            _fold_norm_ahead(module, module.fc)


_NORMS_BEHIND: dict[type, dict[str, str]] = {
    PatchifyStem: {"conv": "norm"},
    ConvStem: {"conv1": "norm1", "conv2": "norm2"},
    SqueezeExcite: {"reduce": "norm"},
    DownsamplingBlock: {"skip": "skip_norm", "conv1.pointwise": "norm1", "conv2.pointwise": "norm2"},
    MiddleBlock: {f"conv{i}.pointwise": f"norm{i}" for i in (1, 2, 3)},
    ExitConv: {"conv.pointwise": "norm"},
}


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The affine map per channel, float64, that `norm` is in evaluation mode."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _fold_norm_ahead(module: PyramidDownsample | Head, layer: nn.Conv2d | nn.Linear) -> None:
    """Fold `module.norm`, which `layer`'s input comes from directly, into `layer`, which pads nothing."""
    if not isinstance(module.norm, nn.BatchNorm2d):
        return
    scale, shift = _scale_and_shift(module.norm)
    shape = (1, -1) + (1,) * (layer.weight.dim() - 2)
    weight = layer.weight.double()
    _set_affine(
        layer,
        weight * scale.view(shape),
        layer.bias.double() + (weight * shift.view(shape)).flatten(1).sum(1),
    )
    module.norm = nn.Identity()


def _set_affine(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def compile_frozen(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function (B, C, H, W) -> logits that runs `model` in evaluation mode, compiled by inductor with the
    weights as constants: the fastest way to run a network on a CPU, best behind `fuse`.

    Without gradients; the weights must stay as they are at the first call. Every new shape compiles anew.
    """
    import torch._dynamo.config as dynamo_config  # take as long as PyTorch itself: only where needed
    import torch._inductor.config as inductor_config

    compiled = torch.compile(model.eval(), dynamic=False)

    def frozen(x: Tensor) -> Tensor:
        # torch.compile's own options={"freezing": True} comes too late: the tracer has by then made inputs
        # of the weights, unless this switch tells it not to. Calling the kernels from C++ takes 5 to 8% off
        # the time of a single image, 1% off a batch of 16's.
        switches = {"freezing": True, "cpp_wrapper": x.device.type == "cpu"}
        # All models of a class share one count of shapes, behind whose limit PyTorch would run them eagerly.
        limits = {"recompile_limit": 2**16, "fail_on_recompile_limit_hit": True}
        with torch.no_grad(), inductor_config.patch(switches), dynamo_config.patch(limits):
            return compiled(x)

    return frozen


def keep_large_buffers() -> None:
    """On Linux, have glibc keep large buffers instead of giving them back to the system at every free, and
    ask for huge pages for them.

    Called at the start of every script that computes on a CPU, before the first tensor: page faults can cost
    more than the arithmetic. Elsewhere it does nothing. `THP_MEM_ALLOC_ENABLE=0` in the environment keeps
    PyTorch from huge pages.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own switch, read at its first allocation
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def table() -> str:
    """The named models, a line each."""
    lines = [f"{'model':20} {'parameters':>12} {'MACs':>9} {'input':>6}"]
    for name, config in MODELS.items():
        with torch.device("meta"):
            model = NEXcepTion(config)
        macs = f"{count_macs(model) / 1e9:.3f} G"
        lines.append(f"{name:20} {count_parameters(model):12,} {macs:>9} {config.input_size:6}")
    return "\n".join(lines)


def classify(model: NEXcepTion, photos: list[str]) -> None:
    """Print the five likeliest classes of each photograph, with their probabilities."""
    from PIL import Image

    for photo in photos:
        try:
            with Image.open(photo) as image:
                x = model.transform(image)[None]  # (C, H, W) -> (1, C, H, W)
        except OSError as error:
            raise ValueError(f"{photo} is no readable image: {error}") from None
        with torch.inference_mode():
            chances, order = model(x).softmax(1)[0].sort(descending=True)
        print(photo)
        for chance, i in zip(chances[:5].tolist(), order[:5].tolist(), strict=True):
            print(f"  {chance:6.1%}  {model.classes[i] if model.classes else f'class {i}'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", nargs="?", help="file of train.py, of the authors, or of timm's Xception"
    )
    parser.add_argument("photos", nargs="*", help="images to classify")
    args = parser.parse_args()
    if args.checkpoint is None:
        print(table())
        return
    if not args.photos:
        parser.error(f"name a photograph to classify behind {args.checkpoint}")
    keep_large_buffers()
    try:
        classify(load_checkpoint(args.checkpoint, fuse=True), args.photos)
    except ValueError as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
