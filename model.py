"""Xception, NEXcepTion-T, -S, -TP and every network of the paper's search space, described by one dataclass.

    python model.py                                   # list the named models: parameters, MACs, input size
    python model.py best.pt photo.jpg ...             # print the five most likely classes of each photograph

In Python:

    model = create_model("nexception_t", num_classes=10, drop_path=0.0)
    load_weights(model, "nexception_t.pth")           # ours, the authors' or timm's legacy_xception
    model = load_checkpoint("runs/digits-nexception_nano/best.pt")  # evaluation mode, .classes, .transform

Logits and gradients agree with the authors' models and with timm's `legacy_xception` in float64.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from blocks import (
    BLOCKS,
    MIXED_KERNELS,
    NORMS,
    SPACE,
    ConvStem,
    Design,
    ExitConv,
    PatchifyStem,
    PyramidDownsample,
    ResidualBlock,
    RunError,
    SqueezeExcite,
    UsageError,
    write_whole,
)

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ModelConfig(Design):
    """Configuration of a network. The defaults are NEXcepTion-T's (appendix, tables 5 and 6).

    The fields inherited from `Design` span the paper's search space; those below set the macro-architecture.
    Values outside `SPACE` and inconsistent layouts raise a UsageError that starts with the field's name.
    """

    layout: str = "isotropic"  # "isotropic" (Xception's three flows) or "pyramid" (ConvNeXt's stages)
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
    input_size: int = 224  # default input size, pixels per side; other sizes work too

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, list):  # JSON has lists
                object.__setattr__(self, name, tuple(value))
        choices = {"layout": ("isotropic", "pyramid"), "stem_stride": (2, 4)}
        choices |= {"drop_path_spread": ("constant", "linear")}
        for name, values in (SPACE | choices).items():
            value = getattr(self, name)
            if not any(value == choice and isinstance(value, type(choice)) for choice in values):
                raise UsageError(f"{name}: {value!r} is not one of {', '.join(map(repr, values))}")
        # A mixed convolution needs a channel for each kernel; Xception's stem halves its width.
        width = len(MIXED_KERNELS) if self.kernel == "mixed" else 2
        least = {"stem_width": width, "widths": width, "depths": 0, "exit_widths": 1, "expansion": 1}
        least |= {"in_channels": 1, "num_classes": 0, "input_size": 1}
        for name, low in least.items():
            value, kind = getattr(self, name), type(getattr(ModelConfig, name))
            numbers = value if kind is tuple else (value,)
            if type(value) is not kind or any(type(n) is not int or n < low for n in numbers):
                needed = "a tuple of whole numbers" if kind is tuple else "a whole number"
                raise UsageError(f"{name}: {value!r} is not {needed} of at least {low}")
        isotropic, stages = self.layout == "isotropic", max(1, len(self.widths))
        counts = (stages, 1, 3) if isotropic else (stages, stages, 0)
        for name, count in zip(("widths", "depths", "exit_widths"), counts, strict=True):
            if (found := len(getattr(self, name))) != count:
                raise UsageError(f"{name}: {found} values, but the {self.layout} layout takes {count}")
        if not isotropic and self.widths[0] != self.stem_width:
            raise UsageError(f"widths: the first of a pyramid must equal stem_width, {self.stem_width}")
        if not isinstance(self.drop_path, (int, float)) or not 0 <= self.drop_path < 1:
            raise UsageError(f"drop_path: {self.drop_path!r} is not a number in [0, 1)")
        if self.input_size < self.least_size:
            least = f"this network needs at least {self.least_size} pixels per side (--size)"
            raise UsageError(f"input_size: {self.input_size}, but {least}")

    @property
    def least_size(self) -> int:
        """The least pixels per side of an image: those of a last feature map of 1 × 1."""
        halved = self.layout == "pyramid" and self.pooling == "conv"  # all other layers round sizes up
        rows = 2 ** (len(self.widths) - 1) if halved else 1  # of the stem's map
        return (rows - 1) * self.stem_stride + (7 if self.stem == "conv" else self.stem_stride)

    def to_json(self, path: str | os.PathLike) -> None:
        write_whole(Path(path), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> ModelConfig:
        """Read a file written by `to_json`. Raises UsageError with the file's name if it holds no config."""
        try:
            return cls(**json.loads(Path(path).expanduser().read_bytes()))
        except (OSError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is not a model config: {error}") from None


NEXCEPTION_T = ModelConfig()
REDUCED = replace(NEXCEPTION_T, widths=(512,), depths=(4,), input_size=32)

MODELS: dict[str, ModelConfig] = {  # one entry per network
    "nexception_t": NEXCEPTION_T,
    "nexception_s": replace(NEXCEPTION_T, widths=(128, 256, 752)),
    "nexception_tp": replace(
        NEXCEPTION_T, pooling="conv", layout="pyramid", stem_stride=4, widths=(96, 192, 384, 768),
        depths=(3, 4, 9, 3), exit_widths=(), drop_path_spread="linear",
    ),
    "xception": ModelConfig(
        stem="conv", kernel=3, pooling="max", block="xception", se=False, activation="relu",
        activation_positions=(1, 2, 3), norm_positions=(1, 2, 3), stem_width=64, widths=(128, 256, 728),
        drop_path=0.0, input_size=299,
    ),
    # The paper's search network (section 3): one entry block, four middle blocks.
    "nexception_reduced": REDUCED,
    # The same, narrow enough for a laptop's CPU.
    "nexception_nano": replace(REDUCED, stem_width=24, widths=(48,), exit_widths=(96, 128, 192)),
    # Narrower and shallower still, for a search within minutes.
    "nexception_pico": replace(REDUCED, stem_width=16, widths=(32,), depths=(2,), exit_widths=(64, 96, 128)),
}  # fmt: skip
# The points of the search space that the paper compares.
POINTS = {"NEXcepTion": MODELS["nexception_t"], "Xception": MODELS["xception"]}


class Head(nn.Module):
    """Global average pooling, a norm (pyramids only) and the linear classifier, if any."""

    def __init__(self, channels: int, config: ModelConfig):
        super().__init__()
        self.norm = NORMS[config.norm](channels) if config.layout == "pyramid" else nn.Identity()
        self.fc = nn.Linear(channels, config.num_classes) if config.num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3), keepdim=True)  # (B, C, H, W) -> (B, C, 1, 1)
        x = self.norm(x).flatten(1)  # (B, C, 1, 1) -> (B, C)
        return x if pre_logits else self.fc(x)


class NEXcepTion(nn.Module):
    """The network described by `config` (or its dictionary): a stem, stages and a head.

    Isotropic (Xception, NEXcepTion-T and -S): one stage per block of the entry flow, the last followed by the
    middle flow, and one stage for the exit flow. Pyramid (NEXcepTion-TP): every stage but the first starts
    with a `PyramidDownsample`.

    Maps normalized float images (B, in_channels, H, W), at least `config.least_size` pixels per side, to
    logits (B, num_classes), or to features (B, num_features) if num_classes is 0. `feature_info` describes
    the `feature_maps` as in timm. `classes` (the names of the outputs) and `transform` (an `EvalTransform` or
    its dictionary) are kept for the user.
    """

    def __init__(self, config: ModelConfig | dict, classes: list[str] | None = None, transform=None):
        super().__init__()
        if isinstance(transform, dict):
            from data import EvalTransform  # needs NumPy and Pillow, so it is imported where it is used

            transform = EvalTransform(**transform)
        self.config = config = ModelConfig(**config) if isinstance(config, dict) else config
        self.classes, self.transform = classes, transform
        isotropic, width = config.layout == "isotropic", config.stem_width
        residuals = sum(config.depths) + (len(config.widths) + 1 if isotropic else 0)  # residual blocks
        rates = [config.drop_path] * residuals  # of stochastic depth
        if config.drop_path_spread == "linear":
            rates = [config.drop_path * i / max(1, residuals - 1) for i in range(residuals)]
        rates = iter(rates)

        # Modules are built in data-flow order, which fixes the random numbers that each one draws.
        stem = (config.in_channels, width, config.stem_stride, config)
        self.stem = PatchifyStem(*stem, activated=isotropic) if config.stem == "patchify" else ConvStem(*stem)
        stages: list[list[nn.Module]] = []
        for i, out in enumerate(config.widths):
            if isotropic:
                widths, activated = (width, out, out), i == 0 and config.stem == "conv"
                stage = [ResidualBlock(widths, config, next(rates), down=True, after_activation=activated)]
                depth = config.depths[0] if i == len(config.widths) - 1 else 0
            else:
                stage = [PyramidDownsample(width, out, config)] if i > 0 else []
                depth = config.depths[i]
            middle = BLOCKS[config.block]
            stage += [middle(out, config.expansion, config, next(rates)) for _ in range(depth)]
            stages.append(stage)
            width = out
        if isotropic:
            first, second, third = config.exit_widths
            stage = [ResidualBlock((width, width, first), config, next(rates), down=True)]
            stages.append([*stage, ExitConv(first, second, config), ExitConv(second, third, config)])
            width = third
        self.stages = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        self.num_features = width
        self.head = Head(width, config)

        maps = [("stem", config.stem_width)] if isotropic else []
        maps += [(f"stages.{i}", width) for i, width in enumerate((*config.widths, *config.exit_widths[2:]))]
        self.feature_info = [
            {"num_chs": channels, "reduction": config.stem_stride * 2**i, "module": module}
            for i, (module, channels) in enumerate(maps)
        ]

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The maps (B, C, H, W) after the stem (isotropic only) and each stage, finest first."""
        x = self.stem(x)
        maps = [x] if self.config.layout == "isotropic" else []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits for the last feature map, or with `pre_logits` its pooled features (B, num_features)."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the classifier with an untrained one, or remove it if `num_classes` is 0."""
        if global_pool not in (None, "avg"):
            raise UsageError(f"global_pool: {global_pool!r}, but these networks have average pooling only")
        self.config, self.classes = replace(self.config, num_classes=num_classes), None
        weight = next(self.parameters())
        self.head.fc = Head(self.num_features, self.config).fc.to(weight.device, weight.dtype)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's patterns for layer-wise learning rates: one group per block, or per stage if `coarse`."""
        return {"stem": "^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def save_pretrained(self, folder: str | os.PathLike, **kwargs):
        """Save as Hugging Face's `PyTorchModelHubMixin` does, for a subclass of this class and the mixin."""
        transform = None if self.transform is None else asdict(self.transform)
        arguments = {"config": asdict(self.config), "classes": self.classes, "transform": transform}
        return super().save_pretrained(folder, **(kwargs | {"config": arguments}))


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, trainable or frozen, without buffers."""
    return sum(p.numel() for p in model.parameters())


def create_model(name_or_config: str | os.PathLike | ModelConfig, **overrides) -> NEXcepTion:
    """Build an untrained network with PyTorch's default initialization, like the authors.

    `name_or_config` is a name in `MODELS`, the path of a JSON file or a `ModelConfig`; `overrides` are fields
    of the config, also by timm's names. Raises UsageError for an unknown name.
    """
    config = name_or_config
    if not isinstance(config, ModelConfig):
        name = os.fspath(config)
        if name not in MODELS and not name.endswith(".json"):
            raise UsageError(f"model: {name!r} is not one of {', '.join(MODELS)}, nor a path ending in .json")
        config = MODELS[name] if name in MODELS else ModelConfig.from_json(name)
    timm_names = {"in_chans": "in_channels", "drop_path_rate": "drop_path", "img_size": "input_size"}
    return NEXcepTion(replace(config, **{timm_names.get(k, k): value for k, value in overrides.items()}))


def count_macs(model: nn.Module, input_size: int | None = None, attention: bool = False) -> int:
    """Count the multiply-accumulates (the "FLOPs" of papers) for one image.

    Counts convolutions (blur pools included) and linear layers or, with `attention`, only the two matrix
    products inside attention. Takes any image model; one without a `config` needs `input_size`. PyTorch's
    flop counter runs a copy of the model on the meta device.
    """
    config = getattr(model, "config", None)
    size = input_size or config.input_size
    channels = config.in_channels if isinstance(config, ModelConfig) else 3
    copied = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter:  # with gradients: attention's fast path is not counted
        copied(torch.empty(1, channels, size, size, device="meta"))
    macs = {str(op): flops // 2 for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    return sum(n for op, n in macs.items() if ("bmm" in op or "attention" in op) == attention)


def key_schemes(model: NEXcepTion) -> dict[str, dict[str, str]]:
    """Map our state dict keys, always with a classifier's, to "our" own, to "the authors'" and to "timm's".

    The authors' are valid for networks structured like -T, -S or -TP, timm's for networks structured like its
    `legacy_xception`.
    """
    config, last = model.config, len(model.config.widths)
    # Paths of modules, ours to theirs; `places` has the authors' of the residual blocks, in order.
    timm = {"stem.conv1": "conv1", "stem.norm1": "bn1", "stem.conv2": "conv2", "stem.norm2": "bn2"}
    timm |= {"head.fc": "fc"}
    if config.layout == "isotropic":
        authors = {"stem.conv": "stem.0", "stem.norm": "stem.2", "head.fc": "fc"}
        places = {f"stages.{i}.0": f"downsampling_block{i + 1}" for i in range(last)}
        places |= {f"stages.{last - 1}.{j + 1}": f"middle_flow.{j}" for j in range(config.depths[0])}
        places |= {f"stages.{last}.0": "exit_flow.0"}
        for j in (1, 2):
            conv, norm = f"stages.{last}.{j}.conv", f"stages.{last}.{j}.norm"
            authors |= {conv: f"exit_flow.{3 * j - 2}", norm: f"exit_flow.{3 * j - 1}"}
            timm |= {conv: f"conv{j + 2}", norm: f"bn{j + 2}"}
    else:
        authors, places = {"stem.conv": "stem.0", "stem.norm": "stem.1"}, {}
        for i, depth in enumerate(config.depths):
            start = f"stages.{i}"
            if i > 0:
                authors |= {
                    f"{start}.0.norm": f"{start}.downsample.0",
                    f"{start}.0.conv": f"{start}.downsample.1",
                }
            places |= {f"{start}.{j + (i > 0)}": f"{start}.blocks.{j}" for j in range(depth)}

    skip = {"skip": "skip", "skip_norm": "skipbn"}
    se = {"se.reduce": "block_end.fc1", "se.norm": "block_end.bn", "se.expand": "block_end.fc2"}
    middle = {f"conv{n}": f"sepconv{n}" for n in (1, 2, 3)} | {f"norm{n}": f"norm{n}" for n in (1, 2, 3)} | se
    downsampling = skip | {"conv1": "rep.0", "norm1": "rep.1", "conv2": "rep.3", "norm2": "rep.4"} | se
    for i, (path, place) in enumerate(places.items()):
        parts = middle if "middle" in place or "blocks" in place else downsampling
        authors |= {f"{path}.{ours}": f"{place}.{theirs}" for ours, theirs in parts.items()}
        # timm's rep is a Sequential in which an activation precedes each convolution, except in block 1.
        first, parts = min(i, 1), skip
        for n in range(3):
            parts = parts | {
                f"conv{n + 1}": f"rep.{first + 3 * n}",
                f"norm{n + 1}": f"rep.{first + 3 * n + 1}",
            }
        timm |= {f"{path}.{ours}": f"block{i + 1}.{theirs}" for ours, theirs in parts.items()}

    def renamed(key: str, paths: dict[str, str], convs: dict[str, str]) -> str:
        ours = next((path for path in paths if key.startswith(path + ".")), "")
        key = paths.get(ours, "") + key.removeprefix(ours)
        return ".".join(convs.get(part, part) for part in key.split("."))

    keys = [*model.state_dict(), *([] if config.num_classes else ["head.fc.weight", "head.fc.bias"])]
    convs = {"depthwise": "conv_dw", "pointwise": "conv_pw"}
    return {
        "our": {key: key for key in keys},
        "the authors'": {key: renamed(key, authors, convs) for key in keys},
        "timm's": {key: renamed(key, timm, {"depthwise": "conv1"}) for key in keys},
    }


def export_official(model: NEXcepTion) -> dict[str, Tensor]:
    """The state dict with the authors' keys, in their order: the inverse of `load_weights`."""
    keys = key_schemes(model)["the authors'"]
    return {keys[key]: value for key, value in model.state_dict().items()}


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint file, tensors on the CPU. Raises UsageError if it is not a readable one.

    Loads tensors and plain values only: unpickling anything else could run any code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"{path}: {'a folder, not a checkpoint' if path.is_dir() else 'no such file'}")
    try:
        # timm's training script, which the authors used, stores its parsed arguments in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and foreign files raise many kinds of error
        reason = "damaged, or not written by torch.save"
        if pickled := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it pickles {pickled[1]}, but only tensors and plain values are loaded"
        raise UsageError(f"{path} is not a readable checkpoint: {reason}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a checkpoint: it holds no dictionary but a {type(content).__name__}")
    return content


def weights_of(content: dict) -> dict[str, Tensor]:
    """The state dict in a checkpoint's content, preferably of averaged weights (EMA), without prefixes."""
    for key in ("ema", "state_dict_ema", "model_ema", "model", "state_dict"):  # ours, timm's, DeiT's
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    while True:  # prefixes of DistributedDataParallel and SWA, torch.compile and Lightning, in any order
        weights.pop("n_averaged", None)
        prefixes = [p for p in ("module.", "_orig_mod.", "model.") if all(k.startswith(p) for k in weights)]
        if not weights or not prefixes:
            return weights
        weights = {k.removeprefix(prefixes[0]): v for k, v in weights.items()}


def load_weights(model: NEXcepTion, path_or_state_dict: str | os.PathLike | dict) -> None:
    """Copy weights into `model`: ours, the authors' or, for `xception`, those of timm's `legacy_xception`.

    Takes a checkpoint or a bare state dict, as a file or a dictionary. A classifier for another number of
    classes is skipped, and RGB filters are adapted to another number of input channels as in timm; either is
    reported in a printed line. Any other missing, unexpected or misshapen tensor raises UsageError and leaves
    the model unchanged.
    """
    source, content = "state dict", path_or_state_dict
    if not isinstance(content, dict):
        source, content = os.fspath(content), read_checkpoint(content)
    weights, own, classifier = weights_of(content), model.state_dict(), ("head.fc.weight", "head.fc.bias")
    schemes = key_schemes(model)
    scheme = max(schemes, key=lambda name: len(weights.keys() & set(schemes[name].values())))
    theirs = schemes[scheme]
    found = {key: weights.pop(theirs[key]) for key in theirs if theirs[key] in weights}
    notes = []  # printed if all tensors fit

    classes = len(found[classifier[0]]) if classifier[0] in found else model.num_classes
    if classes != model.num_classes:
        found |= {key: own.get(key) for key in classifier}
        if model.num_classes:
            notes = [f"{classes} classes; the classifier starts untrained for {model.num_classes} classes"]
    found = {key: value for key, value in found.items() if key in own}  # without a classifier if it has none
    stem = "stem.conv.weight" if model.config.stem == "patchify" else "stem.conv1.weight"
    channels = model.config.in_channels
    if stem in found and found[stem].shape[1] == 3 != channels:
        rgb = found[stem].double()
        # Several channels repeat the RGB filters and keep the scale of their sum.
        repeated = rgb.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
        found[stem] = (rgb.sum(1, keepdim=True) if channels == 1 else repeated).to(found[stem].dtype)
        notes.append(f"the stem's RGB filters are adapted to in_channels {channels}")

    problems = [f"{theirs[key]} is missing" for key in own if key not in found]
    problems += [f"{key} is unexpected" for key in weights]
    problems += [
        f"{theirs[key]} has shape {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in found.items()
        if value.shape != own[key].shape
    ]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UsageError(f"{source} does not fit this model ({scheme} names): {listed}")
    model.load_state_dict(found)
    for note in notes:
        print(f"{source}: {note}")


def published_transform(config: ModelConfig):
    """The `EvalTransform` of the published weights for networks like `config`."""
    from data import EvalTransform

    if config.stem == "conv":  # timm's legacy_xception: 299 of 333 pixels, range [-1, 1]
        return EvalTransform(config.input_size, 0.8975, "bicubic", (0.5,) * 3, (0.5,) * 3)
    return EvalTransform(config.input_size)


def load_checkpoint(path: str | os.PathLike, fuse: bool = False) -> NEXcepTion:
    """Build the network of a checkpoint file, in evaluation mode, with its `classes` and `transform`.

    Without a config in the file (the authors', timm's), the named model is recognized by the weights' shapes;
    `classes` is then None and `transform` that of the published weights. `fuse=True` folds the batch norms
    (see `fuse`). Raises UsageError if the file fits no model.
    """
    from data import EvalTransform

    content = read_checkpoint(path)
    weights = weights_of(content)
    try:
        config = ModelConfig(**content["config"]) if "config" in content else _recognize(path, weights)
        transform = EvalTransform(**content["transform"]) if "transform" in content else None
    except TypeError as error:  # unknown fields, or no dictionary
        raise UsageError(f"{path} holds no config or transform of a network: {error}") from None
    model = NEXcepTion(config, content.get("classes"), transform or published_transform(config))
    load_weights(model, weights)
    return _fold_norms(model.eval()) if fuse else model.eval()


def _recognize(path: str | os.PathLike, weights: dict[str, Tensor]) -> ModelConfig:
    """The config of the named model that `weights` fit under our keys, the authors' or timm's."""
    shapes = {key: value.shape for key, value in weights.items()}
    for config in MODELS.values():
        with torch.device("meta"):
            model = NEXcepTion(config)
        own = model.state_dict()
        for keys in key_schemes(model).values():
            head = keys["head.fc.weight"]
            body = {keys[k]: v.shape for k, v in own.items() if not k.startswith("head.fc.")}
            if head in shapes and body.items() <= shapes.items():
                return replace(config, num_classes=shapes[head][0])
    raise UsageError(f"{path} has no config inside and fits none of {', '.join(MODELS)}")


def fuse(model: NEXcepTion) -> NEXcepTion:
    """An evaluation-only copy with batch norms folded into adjacent convolutions.

    Equal to `model.eval()` to 1e-5 in float32. A norm is folded if it directly follows a convolution, or
    directly precedes an unpadded one or the classifier; layer norms and the norm after the activation of an
    isotropic patchify stem remain. Gradients flow through the copy (Grad-CAM); `load_weights` cannot load its
    state dict.
    """
    return _fold_norms(copy.deepcopy(model).eval())


# Pairs of a convolution and a norm in each block, in data-flow order; not folded if a module between them is
# anything but an identity. A residual block that down-samples has no third convolution.
_FOLDABLE: dict[type, tuple[tuple[str, ...], ...]] = {
    PatchifyStem: (("conv", "act", "norm"),),
    ConvStem: (("conv1", "norm1"), ("conv2", "norm2")),
    SqueezeExcite: (("reduce", "norm"),),
    PyramidDownsample: (("norm", "pool", "conv"),),
    ResidualBlock: (("skip", "skip_norm"), *((f"conv{i}.pointwise", f"norm{i}") for i in (1, 2, 3))),
    ExitConv: (("conv.pointwise", "norm"),),
    Head: (("norm", "fc"),),
}


@torch.no_grad()
def _fold_norms(model: NEXcepTion) -> NEXcepTion:
    """Fold the batch norms of `model` in place, computing in float64."""
    for module in list(model.modules()):
        parts = dict(module.named_modules())
        for first, *between, last in _FOLDABLE.get(type(module), ()):
            norm_first = first == "norm"
            norm_path, layer_path = (first, last) if norm_first else (last, first)
            norm, layer = parts.get(norm_path), parts.get(layer_path)
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
    return model


def compile_frozen(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile `model`, in evaluation mode, with inductor and its weights as constants.

    Returns a function from images (B, C, H, W) to logits: the fastest way to run a network on a CPU,
    especially after `fuse`. It computes no gradients, ignores later changes of the weights and compiles
    separately for each input shape.
    """
    import torch._dynamo.config as dynamo_config  # these take as long to import as PyTorch
    import torch._inductor.config as inductor_config

    compiled = torch.compile(model.eval(), dynamic=False)

    def frozen(x: Tensor) -> Tensor:
        # torch.compile(options={"freezing": True}) is too late: the tracer has already made the weights
        # inputs. Calling the kernels from C++ saves 5 to 8% for a single image, 1% for a batch of 16.
        switches = {"freezing": True, "cpp_wrapper": x.device.type == "cpu"}
        # All models of a class share one count of shapes, beyond whose limit PyTorch would run them eagerly.
        limits = {"recompile_limit": 2**16, "fail_on_recompile_limit_hit": True}
        with torch.no_grad(), inductor_config.patch(switches), dynamo_config.patch(limits):
            return compiled(x)

    return frozen


def keep_large_buffers() -> None:
    """Make glibc reuse large buffers instead of returning them to the system, and request huge pages.

    For computing on a CPU, where page faults can cost more than the arithmetic; call it before creating the
    first tensor. `THP_MEM_ALLOC_ENABLE=0` in the environment disables huge pages. No effect without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own switch, read at its first allocation
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def register_with_timm() -> None:
    """Register the named models with timm's factory, except "xception", of which timm has its own.

    `timm.create_model("nexception_t", in_chans=1, drop_path=0.1)` then takes any field of `ModelConfig`, and
    sets `pretrained_cfg`; `features_only=True` gives the `feature_maps`. Raises UsageError if timm is not
    installed.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise UsageError("register_with_timm needs a package: pip install timm") from None

    def build(
        name: str, pretrained=False, features_only=False, out_indices=None, drop_rate=0.0, global_pool="avg",
        pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **fields,
    ) -> nn.Module:  # fmt: skip
        # timm gives every model the last three, which say nothing about these.
        if pretrained:
            raise UsageError(f"{name}: pretrained=True is not supported; load a checkpoint with load_weights")
        if drop_rate:
            raise UsageError("drop_rate: there is no dropout before the classifier, only drop_path_rate")
        if global_pool != "avg":
            raise UsageError(f"global_pool: {global_pool!r}, but these networks have average pooling only")
        model = create_model(name, **fields)
        size, channels = model.config.input_size, model.config.in_channels
        config = {"architecture": name, "input_size": (channels, size, size), "classifier": "head.fc"}
        config |= asdict(published_transform(model.config))  # crop_pct, interpolation, mean, std
        if features_only:
            out_indices = out_indices or tuple(range(len(model.feature_info)))
            model = timm.models.FeatureListNet(model, out_indices, flatten_sequential=True)
        model.pretrained_cfg = config
        return model

    for name in MODELS.keys() - {"xception"}:
        entry = functools.partial(build, name)
        entry.__name__, entry.__module__ = name, __name__
        timm.models.register_model(entry)
    globals().pop("__all__", None)  # set by timm, to names that `from model import *` would not find


def classify(checkpoint: str, photos: list[str], classes: str | None = None) -> None:
    """Print the five most likely classes of each photograph, by the checkpoint's names or by `classes`."""
    from data import read_classes

    from PIL import Image

    keep_large_buffers()
    model = load_checkpoint(checkpoint, fuse=True)
    if model.config.in_channels != 3 or model.num_classes == 0:
        raise UsageError("classifying photographs needs a model with a classifier and in_channels 3")
    names = model.classes or [f"class {i}" for i in range(model.num_classes)]
    if classes is not None:
        names = read_classes(classes)
        if len(names) != model.num_classes or names != list(model.classes or names):
            raise UsageError(f"--classes {classes}: not the {model.num_classes} classes of {checkpoint}")
    for photo in photos:
        try:
            with Image.open(Path(photo).expanduser()) as image:
                x = model.transform(image)[None]  # (C, H, W) -> (1, C, H, W)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"{photo} is not a readable image: {error}") from None
        with torch.inference_mode():
            probabilities, order = model(x).softmax(1)[0].sort(descending=True)
        if not probabilities.isfinite().all():
            raise RunError(f"{checkpoint} gives logits that are not finite for {photo}")
        print(photo)
        for probability, i in zip(probabilities[:5].tolist(), order[:5].tolist(), strict=True):
            print(f"  {probability:6.1%}  {names[i]}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="train.py's, the authors' or timm's xception")
    parser.add_argument("photos", nargs="*", help="images to classify")
    parser.add_argument("--classes", help="class names in output order: a folder of class folders or a file")
    args = parser.parse_args(argv)
    try:
        if args.checkpoint is None:
            print(f"{'model':20} {'parameters':>12} {'MACs':>9} {'input':>6}")
            for name, config in MODELS.items():
                with torch.device("meta"):
                    model = NEXcepTion(config)
                macs = f"{count_macs(model) / 1e9:.3f} G"
                print(f"{name:20} {count_parameters(model):12,} {macs:>9} {config.input_size:6}")
        elif not args.photos:
            raise UsageError(f"name the photographs to classify after {args.checkpoint}")
        else:
            classify(args.checkpoint, args.photos, args.classes)
    except (UsageError, RunError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # end quietly when the reader of a pipe has closed it, as `head` does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
