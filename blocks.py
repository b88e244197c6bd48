"""The parts of Xception and NEXcepTion, written by hand from `torch.nn` primitives, and their design space.

Every part takes and returns float maps (B, C, H, W) of any floating dtype and any memory format. `SPACE`
holds the nine design choices of the paper, `Design` one value of each; `model.py` puts the parts together.
A new activation, norm or pooling is a new entry of `ACTIVATIONS`, `NORMS` or `POOLINGS`, a new kernel size a
new value of `KERNELS`: models, training, search and benchmarks read these.

The three separable convolutions of a block are numbered 1, 2, 3 (down-sampling blocks have two). An
activation precedes the convolutions in `activation_positions`, a norm follows those in `norm_positions`
(paper, section 3.2, "Fewer Activations and Normalizations").
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNELS = (3, 5, 7, 9)  # odd
MIXED_KERNELS = (3, 5, 7, 9)  # of the channel groups of a "mixed" convolution
POSITIONS = ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "celu": nn.CELU,
}


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each position of a channels-first map, as in ConvNeXt; eps is 1e-6."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


# Functions of the number of channels; each also has to take the 1 × 1 maps of squeeze-and-excitation.
NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}


def depthwise_weight_gradient(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """Gradient (C, 1, K, K) of the weight of a depthwise convolution of stride 1, K odd, padding K // 2.

    x and grad: (B, C, H, W). oneDNN's depthwise kernel for this gradient takes filters of at most 3 columns;
    for wider ones it takes one for dense convolutions, which lasts 4 to 20 times as long as the forward pass.
    Here every 3 columns of the filter are a K × 3 filter on a shifted map. Shifting copies nothing: in a
    channels-last buffer whose rows are K // 2 zeros apart, a view that starts a pixel later is the map
    shifted by a pixel, borders included.
    """
    (batch, channels, height, width), padding = x.shape, kernel // 2
    rows, columns = max(height, kernel), width + padding  # the kernel also wants maps as high as the filter
    shape = (batch, channels, rows, columns)
    strides = (rows * columns * channels, 1, columns * channels, channels)
    buffer = x.new_zeros(batch * rows * columns + 2 * padding, channels)
    buffer.as_strided(shape, strides, padding * channels)[:, :, :height, :width] = x
    if rows > height or padding > 2:  # the views are wider than the filter needs
        grad = F.pad(grad, (0, padding - 2, 0, rows - height))
    grad = grad.contiguous(memory_format=torch.channels_last)
    weight, strips = x.new_empty(channels, 1, kernel, 3), []
    for column in range(0, kernel, 3):
        start = min(column, kernel - 3)  # the last filter overlaps the one before
        strip = torch.ops.aten.convolution_backward(
            grad, buffer.as_strided(shape, strides, start * channels), weight, None,
            [1, 1], [padding, 0], [1, 1], False, [0, 0], channels, [False, True, False],
        )[1]  # fmt: skip
        strips.append(strip[..., column - start :])
    return torch.cat(strips, dim=3)


class FastDepthwise(torch.autograd.Function):
    """`F.conv2d(x, weight, padding=K // 2, groups=C)`, K odd, with gradients that are fast on x86 CPUs.

    They equal PyTorch's within rounding. With `create_graph=True` PyTorch computes them itself, so that they
    can be differentiated in turn, and for a batch of gradients.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        kernel, channels, (need_x, need_weight) = weight.shape[-1], x.shape[1], ctx.needs_input_grad
        padding = kernel // 2
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None,
                [1, 1], [padding, padding], [1, 1], False, [0, 0], channels, [need_x, need_weight, False],
            )[:2]  # fmt: skip
        # The gradient of x is a convolution with the flipped filter, which is faster than oneDNN's gradient.
        with torch.autocast("cpu", enabled=False):
            x_grad = F.conv2d(grad, weight.flip(2, 3), None, 1, padding, groups=channels) if need_x else None
        return x_grad, depthwise_weight_gradient(x, grad, kernel) if need_weight else None


def _takes_fast_gradients(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether `FastDepthwise` is to replace `F.conv2d`: in plain eager training on an x86 CPU, in float32."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0  # outside of `dual_level`
        and (type(x) is Tensor and type(weight) in (Tensor, nn.Parameter))  # no fake tensors
        and (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32)
        and (weight.requires_grad and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"))
        and (weight.shape[-1] > 3 and stride == 1 and padding == (weight.shape[-1] - 1) / 2)
        and x.numel() >= 2**14  # in smaller maps its calls cost more than they save
        and (platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available())
    )


@torch.fx.wrap  # branches on the device of its input: one node of a symbolic trace
def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, training: bool) -> Tensor:
    """Depthwise convolution of x (B, C, H, W) with weight (C, 1, K, K), without bias.

    Computed in float32 when training in mixed precision on a CPU, where the gradient of a bfloat16 depthwise
    convolution takes three times as long.
    """
    if training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return depthwise_conv2d(x.float(), weight.float(), stride, padding, training)
    if _takes_fast_gradients(x, weight, stride, padding):
        return FastDepthwise.apply(x, weight)
    return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution without bias, padded to keep the resolution: H becomes ceil(H / stride)."""

    def __init__(self, channels: int, kernel: int, stride: int = 1):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.stride[0], self.padding[0], self.training)


class MixedDepthwise(nn.Module):
    """Depthwise convolution whose channel groups have the `MIXED_KERNELS` (MixConv, Tan and Le 2019).

    The groups are equal except for the first, which takes the remainder, as in `timm.layers.MixedConv2d`.
    """

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        share = channels // len(MIXED_KERNELS)
        self.splits = [channels - share * (len(MIXED_KERNELS) - 1)] + [share] * (len(MIXED_KERNELS) - 1)
        self.convs = nn.ModuleList(
            DepthwiseConv2d(width, kernel, stride)
            for width, kernel in zip(self.splits, MIXED_KERNELS, strict=True)
        )

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
        x = self.depthwise(x)
        return self.pointwise(x)


@torch.fx.wrap  # branches on the shape and memory format of its input: one node of a symbolic trace
def blur_pool(x: Tensor, training: bool) -> Tensor:
    """Blur x (B, C, H, W) with a fixed 3 × 3 filter, then subsample by 2. See `BlurPool`."""
    # A map one pixel high or wide has nothing to reflect.
    mode = "reflect" if min(x.shape[-2:]) > 1 else "replicate"
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not training:
        # The compiler fuses a sum of slices with the max pool and the padding before it. A convolution is a
        # kernel of its own, for which they would first be written to memory.
        height, width = x.shape[-2:]
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        x = F.pad(x, (1, 1, 1, 1), mode=mode)
        x = (x[..., :width:2] + x[..., 2::2]) * 0.25 + x[..., 1 : width + 1 : 2] * 0.5
        x = (x[..., :height:2, :] + x[..., 2::2, :]) * 0.25 + x[..., 1 : height + 1 : 2, :] * 0.5
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x
    if x.is_cuda and mode == "reflect" and x.is_contiguous(memory_format=torch.channels_last):
        # PyTorch's reflection padding on a GPU would copy a channels-last map to contiguous memory and back.
        x = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], dim=2)
        x = torch.cat([x[..., 1:2], x, x[..., -2:-1]], dim=3)
    else:
        x = F.pad(x, (1, 1, 1, 1), mode=mode)
    # Computed where it is needed: a buffer outside the state dict keeps garbage after `to_empty`.
    row = 0.5 - 0.25 * torch.arange(-1, 2, device=x.device, dtype=x.dtype).abs()  # [0.25, 0.5, 0.25]
    weight = torch.outer(row, row).expand(x.shape[1], 1, 3, 3)
    return depthwise_conv2d(x, weight, 2, 0, training)


class BlurPool(nn.Module):
    """Blur with a fixed binomial 3 × 3 filter, then subsample by 2 (Zhang 2019): H becomes ceil(H / 2).

    The filter is [1 2 1] ⊗ [1 2 1] / 16 for every channel; the padding reflects. Agrees with
    `timm.layers.BlurPool2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return blur_pool(x, self.training)


# Functions of the number of channels: layers that halve the resolution, H to ceil(H / 2). "conv" is
# separable, as every convolution inside Xception's blocks.
POOLINGS: dict[str, Callable[[int], nn.Module]] = {
    "max": lambda channels: nn.MaxPool2d(3, 2, 1),
    "conv": lambda channels: SeparableConv(channels, channels, 3, stride=2),
    "blur": lambda channels: nn.Sequential(nn.MaxPool2d(3, 1, 1), BlurPool()),
}

# The paper's search space: nine choices and the values of each.
SPACE: dict[str, Collection] = {
    "stem": ("conv", "patchify"),
    "kernel": (*KERNELS, "mixed"),
    "pooling": POOLINGS,
    "block": ("xception", "bottleneck"),
    "se": (False, True),
    "activation": ACTIVATIONS,
    "activation_positions": POSITIONS,
    "norm": NORMS,
    "norm_positions": POSITIONS,
}


@dataclass(frozen=True)
class Design:
    """One value for each choice in `SPACE`. The defaults are NEXcepTion's (appendix, tables 5 and 6)."""

    stem: str = "patchify"  # "conv" (Xception's two convolutions) or "patchify"
    kernel: int | str = 5  # of the separable convolutions in the blocks: 3, 5, 7, 9 or "mixed"
    pooling: str = "blur"  # of the down-sampling blocks: "max", "conv" or "blur"
    block: str = "bottleneck"  # of the middle flow: "xception" or "bottleneck"
    se: bool = True  # squeeze-and-excitation at the end of each block
    activation: str = "gelu"  # "relu", "gelu", "elu" or "celu"
    activation_positions: tuple[int, ...] = (2,)  # convolutions (of 1, 2, 3) preceded by an activation
    norm: str = "batch"  # "batch" or "layer"
    norm_positions: tuple[int, ...] = (1, 2)  # convolutions (of 1, 2, 3) followed by a norm

    def activation_before(self, position: int) -> nn.Module:
        return ACTIVATIONS[self.activation]() if position in self.activation_positions else nn.Identity()

    def norm_after(self, position: int, channels: int) -> nn.Module:
        return NORMS[self.norm](channels) if position in self.norm_positions else nn.Identity()


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from the global mean of the map (Hu et al. 2018).

    Squeezes to 1/16 of the channels, rounded to a multiple of 8, at least 8. With batch norm, training needs
    a batch of two or more, since the squeezed map is 1 × 1. Agrees with timm's `SEModule` of ratio 1/16.
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


class StochasticDepth(nn.Module):
    """In training, drop a residual branch for each sample with probability `rate` and scale the kept ones by
    1 / (1 - rate) (Huang et al. 2016). Draws the same random numbers as `timm.layers.DropPath`.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)  # (B, 1, 1, 1)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}"


class PatchifyStem(nn.Module):
    """Convolution over non-overlapping patches of `stride` pixels (paper, section 3.2, "Soft" Patchify Stem).

    Followed by a norm, with an activation in between if `activated`, as in the isotropic networks; the
    pyramids have none, as ConvNeXt. H becomes floor(H / stride).
    """

    def __init__(self, in_channels: int, width: int, stride: int, design: Design, activated: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, stride, stride)
        self.act = ACTIVATIONS[design.activation]() if activated else nn.Identity()
        self.norm = NORMS[design.norm](width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.act(x)
        return self.norm(x)


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
    """Transition between two stages of a pyramid: a norm, then half the resolution and another width.

    With pooling "conv", a 2 × 2 convolution of stride 2 as in ConvNeXt and NEXcepTion-TP (H becomes
    floor(H / 2)); otherwise the pooling (H becomes ceil(H / 2)) followed by a 1 × 1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, design: Design):
        super().__init__()
        self.norm = NORMS[design.norm](in_channels)
        if design.pooling == "conv":
            self.pool = nn.Identity()
            self.conv = nn.Conv2d(in_channels, out_channels, 2, 2)
        else:
            self.pool = POOLINGS[design.pooling](in_channels)
            self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.pool(x)
        return self.conv(x)


class DownsamplingBlock(nn.Module):
    """Entry or exit block: two separable convolutions, pooling, SE and stochastic depth, added to a 1 × 1
    convolution of stride 2 followed by a norm (appendix, tables 5 and 6). H becomes ceil(H / 2).

    `widths` are those of the input, after convolution 1 and of the output. `after_activation` leaves out the
    activation before convolution 1, as Xception does in its first block, since the stem ends in one.
    """

    def __init__(
        self, widths: tuple[int, int, int], design: Design, drop_path: float, after_activation: bool = False
    ):
        super().__init__()
        in_channels, hidden, out_channels = widths
        self.skip = nn.Conv2d(in_channels, out_channels, 1, 2, bias=False)
        self.skip_norm = NORMS[design.norm](out_channels)
        self.act1 = nn.Identity() if after_activation else design.activation_before(1)
        self.conv1 = SeparableConv(in_channels, hidden, design.kernel)
        self.norm1 = design.norm_after(1, hidden)
        self.act2 = design.activation_before(2)
        self.conv2 = SeparableConv(hidden, out_channels, design.kernel)
        self.norm2 = design.norm_after(2, out_channels)
        self.pool = POOLINGS[design.pooling](out_channels)
        self.se = SqueezeExcite(out_channels, design) if design.se else nn.Identity()
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip_norm(self.skip(x))
        x = self.norm1(self.conv1(self.act1(x)))
        x = self.norm2(self.conv2(self.act2(x)))
        x = self.pool(x)
        x = self.se(x)
        return self.drop_path(x) + skip


class MiddleBlock(nn.Module):
    """Three separable convolutions, SE and stochastic depth, added to the input (paper, Figure 1).

    The bottleneck (NEXcepTion) block widens to `expansion` × `channels` after convolution 1 and returns to
    `channels` in convolution 2; the Xception block keeps its width. The resolution stays.
    """

    def __init__(self, channels: int, expansion: int, design: Design, drop_path: float):
        super().__init__()
        hidden = channels * expansion if design.block == "bottleneck" else channels
        self.act1 = design.activation_before(1)
        self.conv1 = SeparableConv(channels, hidden, design.kernel)
        self.norm1 = design.norm_after(1, hidden)
        self.act2 = design.activation_before(2)
        self.conv2 = SeparableConv(hidden, channels, design.kernel)
        self.norm2 = design.norm_after(2, channels)
        self.act3 = design.activation_before(3)
        self.conv3 = SeparableConv(channels, channels, design.kernel)
        self.norm3 = design.norm_after(3, channels)
        self.se = SqueezeExcite(channels, design) if design.se else nn.Identity()
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm1(self.conv1(self.act1(x)))
        x = self.norm2(self.conv2(self.act2(x)))
        x = self.norm3(self.conv3(self.act3(x)))
        x = self.se(x)
        return self.drop_path(x) + shortcut


class ExitConv(nn.Module):
    """One of the two 3 × 3 separable convolutions that end an isotropic network, with norm and activation."""

    def __init__(self, in_channels: int, out_channels: int, design: Design):
        super().__init__()
        self.conv = SeparableConv(in_channels, out_channels, 3)
        self.norm = NORMS[design.norm](out_channels)
        self.act = ACTIVATIONS[design.activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))
