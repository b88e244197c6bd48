"""The parts of Xception and NEXcepTion, by hand from `torch.nn` primitives, leaves first.

Every part takes and returns float maps `(B, C, H, W)` of any floating dtype and any memory format. `model.py`
puts the parts together: its `ModelConfig` is the `config` that the stems and blocks below read their choices
from. Nothing here knows of data, training or named models.

A block's three separable convolutions are numbered 1, 2, 3 (down-sampling blocks have two). An activation
stands *before* the convolutions in `config.activation_positions`, a norm *follows* those in
`config.norm_positions` (paper, section 3.2, "Fewer Activations and Normalizations").
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch brings it where there is CUDA
    triton = None

if TYPE_CHECKING:
    from model import ModelConfig

KERNELS = (3, 5, 7, 9)
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "elu": nn.ELU, "celu": nn.CELU}
POOLINGS = ("max", "conv", "blur")


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each position of a channels-first map, as ConvNeXt's.

    Agrees with `timm.layers.LayerNorm2d`; eps is 1e-6.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


NORMS = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}


def run_depthwise(convolve: Callable[[Tensor], Tensor], x: Tensor, training: bool) -> Tensor:
    """`convolve(x)`; in float32 when training in mixed precision on a CPU.

    There the gradient of a bfloat16 depthwise convolution takes three times as long as in float32.
    """
    if training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return convolve(x.float())
    return convolve(x)


if triton is not None:

    @triton.jit
    def _depthwise_kernel(
        x,  # (B, H, W, C), as `out`
        taps,  # (KERNEL, KERNEL, C) float32
        out,
        rows,  # B * H
        height,
        width,
        channels,
        KERNEL: tl.constexpr,
        TILE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """TILE × TILE positions of BLOCK channels of a depthwise convolution of stride 1."""
        channel_blocks = tl.cdiv(channels, BLOCK)
        tile, across = tl.program_id(0) // channel_blocks, tl.cdiv(width, TILE)
        position = tl.arange(0, TILE * TILE)
        row = tile // across * TILE + position // TILE
        column = tile % across * TILE + position % TILE
        channel = tl.program_id(0) % channel_blocks * BLOCK + tl.arange(0, BLOCK)
        inside, exists = (row < rows) & (column < width), channel < channels
        here = (row.to(tl.int64) * width + column)[:, None] * channels + channel[None, :]
        total = tl.zeros([TILE * TILE, BLOCK], tl.float32)
        for i in range(KERNEL):  # a true loop: unrolled as well, its loads would not fit the registers
            down = i - KERNEL // 2
            above = inside & (row % height + down >= 0) & (row % height + down < height)
            for j in tl.static_range(KERNEL):
                right = j - KERNEL // 2
                mask = above & (column + right >= 0) & (column + right < width)
                shifted = x + here + (down * width + right) * channels
                value = tl.load(shifted, mask[:, None] & exists[None, :], 0.0)
                tap = tl.load(taps + (i * KERNEL + j) * channels + channel, exists, 0.0)
                total += value.to(tl.float32) * tap[None, :]
        tl.store(out + here, total.to(out.dtype.element_ty), inside[:, None] & exists[None, :])

    @triton.jit
    def _depthwise_weight_kernel(
        x,  # (B, H, W, C), as `grad`
        grad,
        partial,  # (shares, KERNEL, KERNEL, C) float32
        rows,  # B * H
        height,
        width,
        channels,
        KERNEL: tl.constexpr,
        TAPS: tl.constexpr,  # the power of two that holds KERNEL
        SHARE: tl.constexpr,
        STEP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """What SHARE positions add to the gradient of one row of taps, for BLOCK channels."""
        channel_blocks = tl.cdiv(channels, BLOCK)
        share, i = tl.program_id(0) // (channel_blocks * KERNEL), tl.program_id(0) // channel_blocks % KERNEL
        channel = tl.program_id(0) % channel_blocks * BLOCK + tl.arange(0, BLOCK)
        j = tl.arange(0, TAPS)
        exists, is_tap = channel < channels, j < KERNEL
        down, right = i - KERNEL // 2, j - KERNEL // 2
        total = tl.zeros([TAPS, STEP, BLOCK], tl.float32)
        for offset in range(0, SHARE, STEP):
            position = share * SHARE + offset + tl.arange(0, STEP)
            row, column = position // width, position % width
            inside = (row < rows) & (row % height + down >= 0) & (row % height + down < height)
            beside = column[None, :] + right[:, None]
            mask = is_tap[:, None] & inside[None, :] & (beside >= 0) & (beside < width)
            here = position.to(tl.int64)[:, None] * channels + channel[None, :]
            shifted = x + here[None, :, :] + ((down * width + right) * channels)[:, None, None]
            slope = tl.load(grad + here, inside[:, None] & exists[None, :], 0.0)
            value = tl.load(shifted, mask[:, :, None] & exists[None, None, :], 0.0)
            total += value.to(tl.float32) * slope.to(tl.float32)[None, :, :]
        spot = ((share * KERNEL + i) * KERNEL + j)[:, None] * channels + channel[None, :]
        tl.store(partial + spot, tl.sum(total, 1), is_tap[:, None] & exists[None, :])

    @torch.library.custom_op("nexception::depthwise_conv", mutates_args=())
    def depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
        """`F.conv2d(x, weight, padding=K // 2, groups=C)` by a Triton kernel; sums in float32.

        x: (B, C, H, W), of any type up to float32; weight: (C, 1, K, K), K odd. The result is channels-last.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        taps = weight.flatten(1).t().float().contiguous()  # (C, 1, K, K) -> (K * K, C)
        (batch, channels, height, width), tile, block = x.shape, 8, 32
        programs = triton.cdiv(batch * height, tile) * triton.cdiv(width, tile) * triton.cdiv(channels, block)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        with torch.cuda.device_of(x):
            _depthwise_kernel[(programs,)](
                x, taps, out, batch * height, height, width, channels, weight.shape[-1], tile, block
            )
        return out

    @depthwise_conv.register_fake
    def _(x, weight):
        return torch.empty_like(x, memory_format=torch.channels_last)

    @torch.library.custom_op("nexception::depthwise_conv_weight_grad", mutates_args=())
    def depthwise_conv_weight_grad(x: Tensor, grad: Tensor, kernel: int) -> Tensor:
        """The gradient (C, 1, K, K), float32, of `depthwise_conv`'s weight, from that of its result."""
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        (batch, channels, height, width), step, block = x.shape, 16, 32
        positions, sizes = batch * height * width, (batch * height, height, width, channels)
        share = min(4096, max(step, triton.next_power_of_2(positions)))
        shares = triton.cdiv(positions, share)
        partial = x.new_empty(shares, kernel, kernel, channels, dtype=torch.float32)
        with torch.cuda.device_of(x):
            _depthwise_weight_kernel[(shares * kernel * triton.cdiv(channels, block),)](
                x, grad, partial, *sizes, kernel, triton.next_power_of_2(kernel), share, step, block
            )
        return partial.sum(0).permute(2, 0, 1)[:, None].contiguous()  # (K, K, C) -> (C, 1, K, K)

    @depthwise_conv_weight_grad.register_fake
    def _(x, grad, kernel):
        return x.new_empty(x.shape[1], 1, kernel, kernel, dtype=torch.float32)

    def _depthwise_backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:  # with stride 1, a convolution with the kernel turned around
            x_grad = depthwise_conv(grad, weight.flip(2, 3))
        if ctx.needs_input_grad[1]:
            weight_grad = depthwise_conv_weight_grad(x, grad, weight.shape[-1]).to(weight.dtype)
        return x_grad, weight_grad

    depthwise_conv.register_autograd(
        _depthwise_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution without bias, padded to keep the resolution: H becomes ceil(H / stride).

    `DepthwiseConv2d.use_triton = True` has `depthwise_conv` do those of stride 1 on a GPU, where there is
    Triton; maps that are not channels-last are copied. It is off: no GPU has shown yet that it is faster.
    """

    use_triton = False

    def __init__(self, channels: int, kernel: int, stride: int = 1):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.use_triton and triton is not None and x.is_cuda and self.stride == (1, 1):
            if torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
                x, weight = (t.to(torch.get_autocast_dtype("cuda")) for t in (x, weight))
            if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
                return depthwise_conv(x, weight)
        return super().forward(x)


class MixedDepthwise(nn.Module):
    """Depthwise convolution whose channel groups have kernels 3, 5, 7 and 9 (MixConv, Tan and Le 2019).

    The groups are equal but for the first, which takes the remainder, as in `timm.layers.MixedConv2d`.
    """

    def __init__(self, channels: int, stride: int = 1):
        super().__init__()
        share = channels // len(KERNELS)
        self.splits = [channels - share * (len(KERNELS) - 1)] + [share] * (len(KERNELS) - 1)
        self.convs = nn.ModuleList(
            DepthwiseConv2d(width, kernel, stride) for width, kernel in zip(self.splits, KERNELS, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        groups = x.split(self.splits, dim=1)
        return torch.cat([conv(group) for conv, group in zip(self.convs, groups, strict=True)], dim=1)


class SeparableConv(nn.Module):
    """Depthwise convolution, then a 1 × 1 (pointwise) one; no bias, nothing in between (paper, section 2.2).

    `kernel` is 3, 5, 7, 9 or "mixed". Padding keeps the resolution: H becomes ceil(H / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int | str, stride: int = 1):
        super().__init__()
        if kernel == "mixed":
            self.depthwise = MixedDepthwise(in_channels, stride)
        else:
            self.depthwise = DepthwiseConv2d(in_channels, kernel, stride)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = run_depthwise(self.depthwise, x, self.training)
        return self.pointwise(x)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from the map's global mean (Hu et al. 2018).

    Squeezes to 1/16 of the channels, rounded to a multiple of 8, at least 8. With batch norm, training needs
    a batch of two or more: the squeezed map is 1 × 1. Agrees with timm's `SEModule` of ratio 1/16.
    """

    def __init__(self, channels: int, norm: str, activation: str):
        super().__init__()
        squeezed = max(8, int(channels / 16 + 4) // 8 * 8)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.norm = NORMS[norm](squeezed)
        self.act = ACTIVATIONS[activation]()
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)  # (B, C, H, W) -> (B, C, 1, 1)
        gate = self.act(self.norm(self.reduce(gate)))
        return x * self.expand(gate).sigmoid()


class BlurPool(nn.Module):
    """Halve the resolution behind a fixed binomial 3 × 3 filter (Zhang 2019): H becomes ceil(H / 2).

    [1 2 1] ⊗ [1 2 1] / 16 on every channel, reflection padding. The filter is not learnt and not in the state
    dict. Agrees with `timm.layers.BlurPool2d`.
    """

    def __init__(self, channels: int):
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", torch.outer(row, row).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # A map one pixel high or wide has nothing to reflect.
        mode = "reflect" if min(x.shape[-2:]) > 1 else "replicate"
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not self.training:
            # The compiler fuses a sum of slices with the maxima and the padding before it, which a
            # convolution, a kernel of its own, would have to wait for in memory.
            x = self._sum_of_slices(F.pad(x, (1, 1, 1, 1), mode=mode))
            return x.contiguous(memory_format=torch.channels_last) if channels_last else x
        if x.is_cuda and channels_last and mode == "reflect":
            x = self._reflect(x)
        else:
            x = F.pad(x, (1, 1, 1, 1), mode=mode)
        blur = partial(F.conv2d, weight=self.filter, stride=2, groups=x.shape[1])
        return run_depthwise(blur, x, self.training)

    @staticmethod
    def _reflect(x: Tensor) -> Tensor:
        """Reflection padding by one pixel in the memory format of x: PyTorch's own, on a GPU, takes and gives
        contiguous maps, which channels-last ones would be copied to and from.
        """
        x = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], dim=2)
        return torch.cat([x[..., 1:2], x, x[..., -2:-1]], dim=3)

    @staticmethod
    def _sum_of_slices(x: Tensor) -> Tensor:
        height, width = (size - 2 for size in x.shape[-2:])
        x = (x[..., :width:2] + x[..., 2::2]) * 0.25 + x[..., 1 : width + 1 : 2] * 0.5
        return (x[..., :height:2, :] + x[..., 2::2, :]) * 0.25 + x[..., 1 : height + 1 : 2, :] * 0.5


class StochasticDepth(nn.Module):
    """In training, drop a residual branch for each sample with probability `rate`, scaling the kept ones by
    1 / (1 - rate) (Huang et al. 2016). Draws as `timm.layers.DropPath` does.
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
    """Non-overlapping patches of `config.stem_stride` pixels (paper, section 3.2, "Soft" Patchify Stem).

    Isotropic networks have convolution, activation, norm; pyramids, as ConvNeXt, convolution and norm alone.
    H becomes floor(H / stride).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        patch = config.stem_stride
        self.conv = nn.Conv2d(config.in_channels, config.stem_width, patch, patch)
        isotropic = config.layout == "isotropic"
        self.act = ACTIVATIONS[config.activation]() if isotropic else nn.Identity()
        self.norm = NORMS[config.norm](config.stem_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.act(x)
        return self.norm(x)


class ConvStem(nn.Module):
    """Xception's stem: two unpadded 3 × 3 convolutions, of half and of full width, each with norm and
    activation. The first has stride 2, the second `config.stem_stride / 2`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        half, width = config.stem_width // 2, config.stem_width
        self.conv1 = nn.Conv2d(config.in_channels, half, 3, 2, bias=False)
        self.norm1 = NORMS[config.norm](half)
        self.conv2 = nn.Conv2d(half, width, 3, config.stem_stride // 2, bias=False)
        self.norm2 = NORMS[config.norm](width)
        self.act = ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(x)))


def pool(pooling: str, channels: int) -> nn.Module:
    """A layer that halves the resolution, H to ceil(H / 2), and keeps the channels.

    "max" is Xception's 3 × 3 max pool of stride 2; "blur" a max pool of stride 1 and then `BlurPool`; "conv"
    a 3 × 3 separable convolution of stride 2 (separable, as every convolution inside Xception's blocks).
    """
    if pooling == "max":
        return nn.MaxPool2d(3, 2, 1)
    if pooling == "conv":
        return SeparableConv(channels, channels, 3, stride=2)
    return nn.Sequential(nn.MaxPool2d(3, 1, 1), BlurPool(channels))


class PyramidDownsample(nn.Module):
    """What stands between two stages of a pyramid: a norm, then half the resolution and another width.

    "conv" is ConvNeXt's and NEXcepTion-TP's 2 × 2 convolution of stride 2 (H to floor(H / 2)); the others
    pool (H to ceil(H / 2)) and change the width by a 1 × 1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, config: ModelConfig):
        super().__init__()
        self.norm = NORMS[config.norm](in_channels)
        if config.pooling == "conv":
            self.pool = nn.Identity()
            self.conv = nn.Conv2d(in_channels, out_channels, 2, 2)
        else:
            self.pool = pool(config.pooling, in_channels)
            self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.pool(x)
        return self.conv(x)


def _norm_after(position: int, channels: int, config: ModelConfig) -> nn.Module:
    return NORMS[config.norm](channels) if position in config.norm_positions else nn.Identity()


def _activation_before(position: int, config: ModelConfig) -> nn.Module:
    return ACTIVATIONS[config.activation]() if position in config.activation_positions else nn.Identity()


def _block_end(channels: int, config: ModelConfig) -> nn.Module:
    return SqueezeExcite(channels, config.norm, config.activation) if config.se else nn.Identity()


class DownsamplingBlock(nn.Module):
    """Entry or exit block: two separable convolutions, pooling, SE and stochastic depth, added to a 1 × 1
    convolution of stride 2 with a norm (appendix, tables 5 and 6). H becomes ceil(H / 2).

    `hidden` is the width after the first convolution: `out_channels` in the entry flow, `in_channels` in the
    exit block. `after_activation` leaves out the activation before convolution 1, as Xception does in the
    block behind its stem, which has just ended in one.
    """

    def __init__(
        self,
        widths: tuple[int, int, int],
        config: ModelConfig,
        drop_path: float,
        after_activation: bool = False,
    ):
        super().__init__()
        in_channels, hidden, out_channels = widths
        self.skip = nn.Conv2d(in_channels, out_channels, 1, 2, bias=False)
        self.skip_norm = NORMS[config.norm](out_channels)
        self.act1 = nn.Identity() if after_activation else _activation_before(1, config)
        self.conv1 = SeparableConv(in_channels, hidden, config.kernel)
        self.norm1 = _norm_after(1, hidden, config)
        self.act2 = _activation_before(2, config)
        self.conv2 = SeparableConv(hidden, out_channels, config.kernel)
        self.norm2 = _norm_after(2, out_channels, config)
        self.pool = pool(config.pooling, out_channels)
        self.se = _block_end(out_channels, config)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip_norm(self.skip(x))
        x = self.norm1(self.conv1(self.act1(x)))
        x = self.norm2(self.conv2(self.act2(x)))
        x = self.pool(x)
        x = self.se(x)
        return self.drop_path(x) + skip


class MiddleBlock(nn.Module):
    """Three separable convolutions with an identity around them; the resolution stays (paper, Figure 1).

    The bottleneck (NEXcepTion) block widens to `config.expansion` × `channels` after convolution 1 and
    returns in convolution 2; the Xception block keeps its width throughout.
    """

    def __init__(self, channels: int, config: ModelConfig, drop_path: float):
        super().__init__()
        hidden = channels * config.expansion if config.block == "bottleneck" else channels
        self.act1 = _activation_before(1, config)
        self.conv1 = SeparableConv(channels, hidden, config.kernel)
        self.norm1 = _norm_after(1, hidden, config)
        self.act2 = _activation_before(2, config)
        self.conv2 = SeparableConv(hidden, channels, config.kernel)
        self.norm2 = _norm_after(2, channels, config)
        self.act3 = _activation_before(3, config)
        self.conv3 = SeparableConv(channels, channels, config.kernel)
        self.norm3 = _norm_after(3, channels, config)
        self.se = _block_end(channels, config)
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

    def __init__(self, in_channels: int, out_channels: int, config: ModelConfig):
        super().__init__()
        self.conv = SeparableConv(in_channels, out_channels, 3)
        self.norm = NORMS[config.norm](out_channels)
        self.act = ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))
