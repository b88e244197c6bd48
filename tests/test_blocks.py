"""Tests of blocks.py: each part against timm's equivalent or a formula worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import blocks
from blocks import (
    MIXED_KERNELS,
    POOLINGS,
    SPACE,
    BlurPool,
    Design,
    LayerNorm2d,
    MixedDepthwise,
    SeparableConv,
    SqueezeExcite,
    StochasticDepth,
)

timm_layers = pytest.importorskip("timm.layers")


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copy all entries of the state dict by their order: the same parts under other names."""
    values = source.state_dict().values()
    target.load_state_dict(dict(zip(target.state_dict(), values, strict=True)))


@pytest.mark.parametrize("size", [(2, 2), (7, 7), (8, 5), (1, 4)])
def test_blur_pool_agrees_with_timm_and_its_compiled_form(size):
    x, ours = double(2, 6, *size), BlurPool().eval()
    theirs = timm_layers.BlurPool2d(6, filt_size=3, stride=2).double()
    if min(size) > 1:  # PyTorch cannot reflect a single row
        torch.testing.assert_close(ours(x), theirs(x))
    compiled = torch.compile(ours, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), ours(x))
    assert not list(ours.buffers())  # nothing that `to_empty` could leave uninitialized


def test_blur_pool_of_a_constant_is_that_constant():
    for size in ((1, 1), (9, 6)):
        pooled = BlurPool()(torch.full((1, 3, *size), 0.3))
        torch.testing.assert_close(pooled, torch.full((1, 3, (size[0] + 1) // 2, (size[1] + 1) // 2), 0.3))


def test_blur_pool_does_not_copy_channels_last_maps_on_a_gpu(monkeypatch):
    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(str(operator))
            return operator(*args, **(kwargs or {}))

    names: list[str] = []
    with FakeTensorMode(), torch.device("cuda"):  # shapes and strides alone: no GPU is needed
        x = torch.empty(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        assert F.pad(x, (1, 1, 1, 1), mode="reflect").is_contiguous()  # why BlurPool does not pad so
        convolved = []
        monkeypatch.setattr(blocks, "depthwise_conv2d", lambda x, *rest: convolved.append(x) or x)
        with Operators():
            BlurPool()(x)
    assert convolved[0].is_contiguous(memory_format=torch.channels_last)
    assert convolved[0].shape[2:] == (8, 8) and not any("reflection_pad" in name for name in names)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(2, 2), (7, 8)])
def test_blur_pool_on_a_gpu_agrees_with_the_cpu(size):
    x = double(2, 6, *size).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(BlurPool()(x.cuda()).cpu(), BlurPool()(x))


@pytest.mark.parametrize("channels", [8, 96, 376, 752])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_squeeze_excite_agrees_with_timm(channels, norm):
    torch.manual_seed(channels)
    norm_layer = {"batch": nn.BatchNorm2d, "layer": timm_layers.LayerNorm2d}[norm]
    theirs = timm_layers.SEModule(channels, norm_layer=norm_layer, act_layer=nn.GELU).double()
    ours = SqueezeExcite(channels, Design(norm=norm)).double()
    copy_in_order(theirs, ours)
    x = double(3, channels, 4, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("channels", [4, 30, 48])
@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_kernels_agree_with_timm(channels, stride):
    theirs = timm_layers.MixedConv2d(
        channels, channels, list(MIXED_KERNELS), stride=stride, padding="", depthwise=True
    ).double()
    ours = MixedDepthwise(channels, stride).double()
    copy_in_order(theirs, ours)
    x = double(2, channels, 11, 9)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kernel", SPACE["kernel"])
def test_separable_conv_is_one_convolution_of_the_product_kernel(kernel):
    """Depthwise then pointwise is a dense convolution with weights pointwise[o, i] × depthwise[i]."""
    conv = SeparableConv(8, 5, kernel).double()
    x = double(2, 8, 10, 12)
    depthwise = conv.depthwise.convs if kernel == "mixed" else [conv.depthwise]
    filters = torch.cat([F.pad(c.weight, [(9 - c.kernel_size[0]) // 2] * 4) for c in depthwise])
    dense = conv.pointwise.weight * filters.transpose(0, 1)  # (5, 8, 9, 9)
    torch.testing.assert_close(conv(x), F.conv2d(x, dense, padding=4))
    assert all(parameter.dim() > 1 for parameter in conv.parameters())


def test_layer_norm_agrees_with_timm():
    x = double(2, 6, 3, 4)
    ours, theirs = LayerNorm2d(6).double(), timm_layers.LayerNorm2d(6).double()
    nn.init.normal_(ours.weight)
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


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 8)])
def test_pools_halve_and_keep_the_channels(pooling, size):
    y = POOLINGS[pooling](4)(torch.randn(2, 4, *size))
    assert y.shape == (2, 4, (size[0] + 1) // 2, (size[1] + 1) // 2)


def test_max_blur_pool_agrees_with_its_definition():
    """The dense (stride 1) maximum, then the binomial filter at every second pixel."""
    x = double(1, 3, 6, 6)
    padded = F.pad(F.max_pool2d(x, 3, 1, 1), (1, 1, 1, 1), mode="reflect")
    row = (1.0, 2.0, 1.0)
    expected = sum(
        row[i] * row[j] / 16 * padded[:, :, i : i + 6, j : j + 6] for i in range(3) for j in range(3)
    )
    torch.testing.assert_close(POOLINGS["blur"](3)(x), expected[:, :, ::2, ::2])


@pytest.mark.parametrize("kernel", [3, "mixed"])
def test_depthwise_gradients_on_a_cpu_are_computed_in_float32_under_autocast(kernel):
    layer, seen = SeparableConv(8, 4, kernel), []
    x = torch.randn(2, 8, 9, 9).bfloat16()
    layer.depthwise.register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        layer.eval()(x)
    assert [result.dtype for result in seen] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(seen[0], layer.depthwise(x.float()))
    if kernel == 3:
        seen[0].sum().backward()
        expected = F.conv2d(x.float().sum(0).unsqueeze(1), torch.ones(1, 1, 9, 9), padding=1)
        torch.testing.assert_close(layer.depthwise.weight.grad, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert POOLINGS["blur"](4).train()(torch.randn(1, 4, 8, 8).bfloat16()).dtype == torch.float32
