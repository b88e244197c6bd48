"""Tests of blocks.py: each part against timm's of the same meaning or a formula worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blocks import (
    KERNELS,
    BlurPool,
    LayerNorm2d,
    MixedDepthwise,
    SeparableConv,
    SqueezeExcite,
    StochasticDepth,
    pool,
)

timm_layers = pytest.importorskip("timm.layers")


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copy all entries of the state dict by their order: the same parts under other names."""
    values = source.state_dict().values()
    target.load_state_dict(dict(zip(target.state_dict(), values, strict=True)))


@pytest.mark.parametrize("size", [(2, 2), (7, 7), (8, 5)])
def test_blur_pool_agrees_with_timm(size):
    x = double(2, 6, *size)
    theirs = timm_layers.BlurPool2d(6, filt_size=3, stride=2).double()
    torch.testing.assert_close(BlurPool(6).double()(x), theirs(x))


@pytest.mark.parametrize("size", [(1, 4), (7, 7), (8, 5)])
def test_compiled_blur_pool_is_the_plain_one(size):
    x, blur = double(2, 6, *size), BlurPool(6).double().eval()
    compiled = torch.compile(blur, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), blur(x))


def test_blur_pool_of_a_single_pixel_and_of_a_constant():
    assert torch.equal(BlurPool(3)(torch.full((1, 3, 1, 1), 2.0)), torch.full((1, 3, 1, 1), 2.0))
    torch.testing.assert_close(BlurPool(3)(torch.full((1, 3, 9, 6), 0.3)), torch.full((1, 3, 5, 3), 0.3))
    assert not BlurPool(3).state_dict()


@pytest.mark.parametrize("channels", [8, 96, 376, 752])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_squeeze_excite_agrees_with_timm(channels, norm):
    torch.manual_seed(channels)
    norm_layer = {"batch": nn.BatchNorm2d, "layer": timm_layers.LayerNorm2d}[norm]
    theirs = timm_layers.SEModule(channels, norm_layer=norm_layer, act_layer=nn.GELU).double()
    ours = SqueezeExcite(channels, norm, "gelu").double()
    copy_in_order(theirs, ours)
    x = double(3, channels, 4, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("channels", [4, 30, 48])
@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_kernels_agree_with_timm(channels, stride):
    theirs = timm_layers.MixedConv2d(
        channels, channels, list(KERNELS), stride=stride, padding="", depthwise=True
    ).double()
    ours = MixedDepthwise(channels, stride).double()
    copy_in_order(theirs, ours)
    x = double(2, channels, 11, 9)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kernel", [*KERNELS, "mixed"])
def test_separable_conv_is_one_convolution_of_the_product_kernel(kernel):
    """Depthwise then pointwise is a dense convolution with weights pointwise[o, i] × depthwise[i]."""
    conv = SeparableConv(8, 5, kernel).double()
    x = double(2, 8, 10, 12)
    depthwise = conv.depthwise.convs if kernel == "mixed" else [conv.depthwise]
    filters = torch.cat(
        [F.pad(c.weight, [(9 - c.kernel_size[0]) // 2] * 4) for c in depthwise]
    )  # (8, 1, 9, 9)
    dense = conv.pointwise.weight * filters.transpose(0, 1)  # (5, 8, 9, 9)
    torch.testing.assert_close(conv(x), F.conv2d(x, dense, padding=4))
    assert all(parameter.dim() > 1 for parameter in conv.parameters())


def test_layer_norm_agrees_with_timm_and_keeps_the_shape():
    x = double(2, 6, 3, 4)
    ours, theirs = LayerNorm2d(6).double(), timm_layers.LayerNorm2d(6).double()
    with torch.no_grad():
        ours.weight.copy_(double(6))
    copy_in_order(ours, theirs)
    torch.testing.assert_close(ours(x), theirs(x))


def test_stochastic_depth_draws_as_timm_and_keeps_the_mean():
    x = double(5000, 2, 1, 1).abs()
    ours, theirs = StochasticDepth(0.3), timm_layers.DropPath(0.3)
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, theirs(x))
    dropped = (y == 0).all(dim=1).flatten()
    assert abs(dropped.double().mean() - 0.3) < 4 * (0.3 * 0.7 / 5000) ** 0.5
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.7)
    assert ours.eval()(x) is x


@pytest.mark.parametrize("pooling", ["max", "conv", "blur"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 8)])
def test_pools_halve_and_keep_the_channels(pooling, size):
    y = pool(pooling, 4)(torch.randn(2, 4, *size))
    assert y.shape == (2, 4, (size[0] + 1) // 2, (size[1] + 1) // 2)


def test_max_blur_pool_agrees_with_its_definition():
    """The dense (stride 1) maximum, then the binomial filter of every second pixel."""
    x = double(1, 3, 6, 6)
    dense = F.max_pool2d(x, 3, 1, 1)
    padded = F.pad(dense, (1, 1, 1, 1), mode="reflect")
    row = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    expected = sum(
        row[i] * row[j] / 16 * padded[:, :, i : i + 6, j : j + 6] for i in range(3) for j in range(3)
    )
    torch.testing.assert_close(pool("blur", 3).double()(x), expected[:, :, ::2, ::2])


@pytest.mark.parametrize("make", [lambda: SeparableConv(6, 4, 3), lambda: SeparableConv(8, 4, "mixed")])
def test_depthwise_gradients_on_a_cpu_are_float32s_beneath_autocast(make):
    layer, seen = make(), []
    first = layer.depthwise.weight if isinstance(layer.depthwise, nn.Conv2d) else None
    x = torch.randn(2, layer.pointwise.in_channels, 9, 9)
    layer.depthwise.register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        layer.eval()(x)
    assert [result.dtype for result in seen] == [torch.float32, torch.bfloat16]
    with torch.no_grad():
        torch.testing.assert_close(seen[0], layer.depthwise(x.bfloat16().float()))
    if first is not None:
        seen[0].sum().backward()
        expected = F.conv2d(x.bfloat16().float().sum(0).unsqueeze(1), torch.ones(1, 1, 9, 9), padding=1)
        torch.testing.assert_close(first.grad, expected)
    blurred = pool("blur", 4).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert blurred(torch.randn(1, 4, 8, 8).bfloat16()).dtype == torch.float32
