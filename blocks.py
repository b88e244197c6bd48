"""Layers and blocks of Xception and NEXcepTion, and the design space that they span.

All modules take and return float maps (B, C, H, W) of any floating dtype and memory format. `SPACE` lists the
paper's nine design choices, a `Design` holds one value of each, and `model.py` assembles networks. To add an
activation, norm, pooling or residual block, add an entry to `ACTIVATIONS`, `NORMS`, `POOLINGS` or `BLOCKS`;
to add a kernel size, add it to `KERNELS`. Models, training, search and benchmarks pick it up.

The separable convolutions of a block are numbered 1, 2, 3 (down-sampling blocks have two). Those in
`activation_positions` are preceded by an activation, those in `norm_positions` followed by a norm (paper,
section 3.2, "Fewer Activations and Normalizations").

All scripts import this file, so it ends with what they share: `UsageError`, `RunError` and `write_whole`.
`blocks.py` and `model.py` need no package but PyTorch; `load_checkpoint` and photographs need `data.py`, too.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    # Read when PyTorch is loaded, so every script imports this file first. By default, OpenMP threads spin so
    # long between parallel regions that a training step takes ten times as long on a busy machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

KERNELS = (3, 5, 7, 9)  # odd
MIXED_KERNELS = (3, 5, 7, 9)  # one for each group of channels of a "mixed" convolution
POSITIONS = ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))  # subsets of a block's convolutions
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "elu": nn.ELU, "celu": nn.CELU}


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels at each position of a channels-first map, as in ConvNeXt (eps 1e-6)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # to (B, H, W, C) and back


# Functions of the number of channels; squeeze-and-excitation applies them to maps of 1 × 1. Group norm would
# be `lambda channels: nn.GroupNorm(4, channels)`: all widths of the named models are multiples of 4.
NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}


def depthwise_weight_gradient(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """Weight gradient (C, 1, K, K) of a depthwise convolution: stride 1, padding K // 2, odd K > 3.

    x and grad: (B, C, H, W). oneDNN's depthwise kernel for this gradient supports filters of up to 3 columns;
    wider ones fall back to a dense kernel that takes 4 to 20 times as long as the forward pass. Here, every
    3 columns are computed as the gradient of a K × 3 filter on a shifted map. Shifting copies nothing: in a
    channels-last buffer with K // 2 zeros between rows, a view that starts one pixel later is the map shifted
    by one pixel, borders included.
    """
    (batch, channels, height, width), padding = x.shape, kernel // 2
    rows, columns = max(height, kernel), width + padding  # oneDNN also needs maps as high as the filter
    shape = (batch, channels, rows, columns)
    strides = (rows * columns * channels, 1, columns * channels, channels)
    buffer = x.new_zeros(batch * rows * columns + 2 * padding, channels)
    buffer.as_strided(shape, strides, padding * channels)[:, :, :height, :width] = x
    if rows > height or padding > 2:  # the views are wider than the filter needs
        grad = F.pad(grad, (0, padding - 2, 0, rows - height))
    grad = grad.contiguous(memory_format=torch.channels_last)
    strips = []
    for column in range(0, kernel, 3):
        start = min(column, kernel - 3)  # the last filter overlaps the one before
        shifted = buffer.as_strided(shape, strides, start * channels)
        strip = conv2d_weight(shifted, (channels, 1, kernel, 3), grad, padding=(padding, 0), groups=channels)
        strips.append(strip[..., column - start :])
    return torch.cat(strips, dim=3)


class FastDepthwise(torch.autograd.Function):
    """`F.conv2d(x, weight, padding=K // 2, groups=C)`, odd K > 3, with gradients that are fast on x86 CPUs.

    The gradients equal PyTorch's up to rounding. Double backward (`create_graph=True`) and batched gradients
    (`is_grads_batched=True`) are left to PyTorch.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        kernel, channels, (need_x, need_weight) = weight.shape[-1], x.shape[1], ctx.needs_input_grad
        settings = {"padding": kernel // 2, "groups": channels}
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            x_grad = conv2d_input(x.shape, weight, grad, **settings)
            return x_grad, conv2d_weight(x, weight.shape, grad, **settings)
        # Convolving the gradient with the flipped filter is faster than oneDNN's input gradient.
        with torch.autocast("cpu", enabled=False):
            x_grad = F.conv2d(grad, weight.flip(2, 3), **settings) if need_x else None
        return x_grad, depthwise_weight_gradient(x, grad, kernel) if need_weight else None


def _takes_fast_gradients(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether to use `FastDepthwise`: only in plain eager float32 training on an x86 CPU."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0  # outside of `dual_level`
        and (type(x) is Tensor and type(weight) in (Tensor, nn.Parameter))  # no fake tensors
        and (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32)
        and (weight.requires_grad and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"))
        and (weight.shape[-1] > 3 and stride == 1 and padding == (weight.shape[-1] - 1) / 2)
        and x.numel() >= 2**14  # below this, the extra calls cost more than they save
        and (platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available())
    )


@torch.fx.wrap  # branches on its input, so it must be a leaf of symbolic traces
def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, training: bool) -> Tensor:
    """Depthwise convolution of x (B, C, H, W) with weight (C, 1, K, K), without bias.

    Mixed-precision training on a CPU uses float32: the gradient in bfloat16 takes three times as long.
    """
    if training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return depthwise_conv2d(x.float(), weight.float(), stride, padding, training)
    if _takes_fast_gradients(x, weight, stride, padding):
        return FastDepthwise.apply(x, weight)
    return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution without bias. Padding keeps the resolution: H becomes ceil(H / stride)."""

    def __init__(self, channels: int, kernel: int, stride: int = 1):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.stride[0], self.padding[0], self.training)


class MixedDepthwise(nn.Module):
    """Depthwise convolution with one of `MIXED_KERNELS` per group of channels (MixConv, Tan and Le 2019).

    The groups are equal, except that the first takes the remainder, as in `timm.layers.MixedConv2d`.
    """

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        share, remainder = divmod(channels, len(MIXED_KERNELS))
        self.splits = [share + remainder] + [share] * (len(MIXED_KERNELS) - 1)
        pairs = zip(self.splits, MIXED_KERNELS, strict=True)
        self.convs = nn.ModuleList(DepthwiseConv2d(width, kernel, stride) for width, kernel in pairs)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.split(self.splits, dim=1)
        return torch.cat([conv(groups[i]) for i, conv in enumerate(self.convs)], dim=1)


class SeparableConv(nn.Module):
    """Depthwise convolution followed by a 1 × 1 (pointwise) convolution, without biases (paper, section 2.2).

    `kernel` is odd or "mixed". Padding keeps the resolution: H becomes ceil(H / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int | str, stride: int = 1):
        super().__init__()
        if kernel == "mixed":
            self.depthwise = MixedDepthwise(in_channels, stride)
        else:
            self.depthwise = DepthwiseConv2d(in_channels, kernel, stride)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


@torch.fx.wrap  # branches on its input, so it must be a leaf of symbolic traces
def blur_pool(x: Tensor, training: bool) -> Tensor:
    """Blur x (B, C, H, W) with a fixed 3 × 3 filter, then subsample by 2. See `BlurPool`."""
    (height, width), given = x.shape[-2:], x
    # A single row cannot be reflected.
    x = F.pad(x, (1, 1, 1, 1), mode="reflect" if min(height, width) > 1 else "replicate")
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not training:
        # The compiler fuses a sum of slices with the preceding max pool and padding. A convolution would be a
        # separate kernel that reads its input from memory.
        x = (x[..., :width:2] + x[..., 2::2]) * 0.25 + x[..., 1 : width + 1 : 2] * 0.5
        x = (x[..., :height:2, :] + x[..., 2::2, :]) * 0.25 + x[..., 1 : height + 1 : 2, :] * 0.5
        channels_last = given.is_contiguous(memory_format=torch.channels_last)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x
    # Not a buffer: `to_empty` would leave a non-persistent buffer uninitialized.
    row = 0.5 - 0.25 * torch.arange(-1, 2, device=x.device, dtype=x.dtype).abs()  # [0.25, 0.5, 0.25]
    weight = torch.outer(row, row).expand(x.shape[1], 1, 3, 3)
    return depthwise_conv2d(x, weight, 2, 0, training)


class BlurPool(nn.Module):
    """Blur with a fixed 3 × 3 filter, then subsample by 2 (Zhang 2019): H becomes ceil(H / 2).

    The filter is [1 2 1] ⊗ [1 2 1] / 16, with reflection padding, as in `timm.layers.BlurPool2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return blur_pool(x, self.training)


# Functions of the number of channels that return a layer of stride 2: H becomes ceil(H / 2). "conv" is
# separable, like all convolutions inside Xception's blocks.
POOLINGS: dict[str, Callable[[int], nn.Module]] = {
    "max": lambda channels: nn.MaxPool2d(3, 2, 1),
    "conv": lambda channels: SeparableConv(channels, channels, 3, stride=2),
    "blur": lambda channels: nn.Sequential(nn.MaxPool2d(3, 1, 1), BlurPool()),
}


@dataclass(frozen=True)
class Design:
    """One value of each choice in `SPACE`. The defaults are NEXcepTion's (appendix, tables 5 and 6)."""

    stem: str = "patchify"  # "conv" (Xception's two convolutions) or "patchify"
    kernel: int | str = 5  # of the separable convolutions in the blocks: one of KERNELS or "mixed"
    pooling: str = "blur"  # of the down-sampling blocks
    block: str = "bottleneck"  # of the middle flow: one of BLOCKS
    se: bool = True  # squeeze-and-excitation at the end of each block
    activation: str = "gelu"
    activation_positions: tuple[int, ...] = (2,)  # convolutions (of 1, 2, 3) preceded by an activation
    norm: str = "batch"
    norm_positions: tuple[int, ...] = (1, 2)  # convolutions (of 1, 2, 3) followed by a norm

    def activation_before(self, position: int) -> nn.Module:
        return ACTIVATIONS[self.activation]() if position in self.activation_positions else nn.Identity()

    def norm_after(self, position: int, channels: int) -> nn.Module:
        return NORMS[self.norm](channels) if position in self.norm_positions else nn.Identity()


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018): scale each channel by a gate computed from its spatial mean.

    Squeezes to 1/16 of the channels, rounded to a multiple of 8, at least 8, like timm's `SEModule`. Training
    with batch norm needs at least two images, since the squeezed map is 1 × 1.
    """

    def __init__(self, channels: int, design: Design):
        super().__init__()
        squeezed = max(8, int(channels / 16 + 4) // 8 * 8)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.norm = NORMS[design.norm](squeezed)
        self.act = ACTIVATIONS[design.activation]()
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)  # (B, C, H, W) -> (B, C, 1, 1)
        gate = self.act(self.norm(self.reduce(gate)))
        return x * self.expand(gate).sigmoid()


# Stochastic depth (Huang et al. 2016): in training, drop a residual branch per image with probability `p` and
# scale the others by 1 / (1 - p). To Dropout3d, a batch (B, C, H, W) is one volume (C, D, H, W), of which it
# drops whole channels. It draws the same random numbers as timm's `DropPath`.
StochasticDepth = nn.Dropout3d


class PatchifyStem(nn.Module):
    """Convolution over non-overlapping patches of `stride` × `stride` pixels, followed by a norm (paper,
    section 3.2, "Soft" Patchify Stem). H becomes floor(H / stride).

    With `activated` (isotropic networks), an activation precedes the norm; pyramids have none, like ConvNeXt.
    """

    def __init__(self, in_channels: int, width: int, stride: int, design: Design, activated: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, stride, stride)
        self.act = ACTIVATIONS[design.activation]() if activated else nn.Identity()
        self.norm = NORMS[design.norm](width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.conv(x)))


class ConvStem(nn.Module):
    """Xception's stem: two unpadded 3 × 3 convolutions, of half and of full width, each followed by a norm
    and an activation. The first has stride 2, the second `stride` / 2.
    """

    def __init__(self, in_channels: int, width: int, stride: int, design: Design):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width // 2, 3, 2, bias=False)
        self.norm1 = NORMS[design.norm](width // 2)
        self.act1 = ACTIVATIONS[design.activation]()
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride // 2, bias=False)
        self.norm2 = NORMS[design.norm](width)
        self.act2 = ACTIVATIONS[design.activation]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(x)))


class PyramidDownsample(nn.Module):
    """Transition between two stages of a pyramid: a norm, then half the resolution and a new width.

    Pooling "conv" is a 2 × 2 convolution of stride 2, as in ConvNeXt and NEXcepTion-TP (H becomes
    floor(H / 2)); the others (H becomes ceil(H / 2)) are followed by a 1 × 1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, design: Design):
        super().__init__()
        stride = 2 if design.pooling == "conv" else 1
        self.norm = NORMS[design.norm](in_channels)
        self.pool = POOLINGS[design.pooling](in_channels) if stride == 1 else nn.Identity()
        self.conv = nn.Conv2d(in_channels, out_channels, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(self.norm(x)))


class ResidualBlock(nn.Module):
    """Block of the three flows: separable convolutions, SE and stochastic depth, added to the input (paper,
    Figure 1; appendix, tables 5 and 6).

    `widths`: channels of the input and after convolution 1, 2, ... A `down` block, of the entry or exit flow,
    pools after the convolutions, and its skip connection is a 1 × 1 convolution of stride 2 followed by a
    norm: H becomes ceil(H / 2). `after_activation` omits the activation before convolution 1, because
    Xception's stem ends in one.
    """

    def __init__(
        self, widths: tuple[int, ...], design: Design, drop_path: float, down=False, after_activation=False
    ):
        super().__init__()
        first, last = widths[0], widths[-1]
        self.skip = nn.Conv2d(first, last, 1, 2, bias=False) if down else nn.Identity()
        self.skip_norm = NORMS[design.norm](last) if down else nn.Identity()
        self.positions = range(1, len(widths))
        for i in self.positions:
            omitted = i == 1 and after_activation
            self.add_module(f"act{i}", nn.Identity() if omitted else design.activation_before(i))
            self.add_module(f"conv{i}", SeparableConv(widths[i - 1], widths[i], design.kernel))
            self.add_module(f"norm{i}", design.norm_after(i, widths[i]))
        self.pool = POOLINGS[design.pooling](last) if down else nn.Identity()
        self.se = SqueezeExcite(last, design) if design.se else nn.Identity()
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip_norm(self.skip(x))
        for i in self.positions:
            act, conv, norm = (getattr(self, f"{name}{i}") for name in ("act", "conv", "norm"))
            x = norm(conv(act(x)))
        return self.drop_path(self.se(self.pool(x))) + skip


# Residual blocks of the middle flow, which keep the shape (B, C, H, W): functions of the number of channels,
# the expansion (of the bottleneck's convolution 1), the design and the rate of stochastic depth.
BLOCKS: dict[str, Callable[[int, int, Design, float], nn.Module]] = {
    "xception": lambda channels, expansion, design, rate: ResidualBlock((channels,) * 4, design, rate),
    "bottleneck": lambda channels, expansion, design, rate: ResidualBlock(
        (channels, channels * expansion, channels, channels), design, rate
    ),
}


class ExitConv(nn.Module):
    """One of the two final 3 × 3 separable convolutions of an isotropic network, with norm and activation."""

    def __init__(self, in_channels: int, out_channels: int, design: Design):
        super().__init__()
        self.conv = SeparableConv(in_channels, out_channels, 3)
        self.norm = NORMS[design.norm](out_channels)
        self.act = ACTIVATIONS[design.activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


# The paper's search space: nine choices and the values of each.
SPACE: dict[str, Collection] = {
    "stem": ("conv", "patchify"),
    "kernel": (*KERNELS, "mixed"),
    "pooling": POOLINGS,
    "block": BLOCKS,
    "se": (False, True),
    "activation": ACTIVATIONS,
    "activation_positions": POSITIONS,
    "norm": NORMS,
    "norm_positions": POSITIONS,
}


# Shared by all scripts


class UsageError(ValueError):
    """A user error, described in one sentence. Scripts exit with status 2."""


class RunError(Exception):
    """A failure during a run, described in one sentence. Scripts exit with status 1."""


def write_whole(path: str | Path, content: bytes | memoryview | str, previous: Path | None = None) -> None:
    """Write a file atomically, keeping its former content as `previous` if given. Raises RunError."""
    path = Path(path)
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
        raise RunError(
            f"cannot write {path}: {error.strerror}; files saved before are intact: remove the cause and "
            "repeat the command"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
