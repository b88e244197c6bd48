"""Tests of blocks.py against timm and formulas worked out by hand."""

from __future__ import annotations

import itertools
from unittest.mock import Mock

import blocks

import pytest
import torch
import torch.nn.functional as F
from torch import nn

timm_layers = pytest.importorskip("timm.layers")
TIMM_NORMS = {"batch": nn.BatchNorm2d, "layer": timm_layers.LayerNorm2d}


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def small_integers(*shape: int) -> torch.Tensor:
    """Float32 values whose products are summed without rounding."""
    return torch.randint(-4, 5, shape).float()


def pairs():
    """Yield blocks, their counterparts in timm and the number of channels."""
    yield blocks.LayerNorm2d(6), timm_layers.LayerNorm2d(6), 6
    for c, (name, norm) in itertools.product((8, 96, 376, 752), TIMM_NORMS.items()):
        theirs = timm_layers.SEModule(c, norm_layer=norm, act_layer=nn.GELU)
        yield blocks.SqueezeExcite(c, blocks.Design(norm=name)), theirs, c
    kernels = list(blocks.MIXED_KERNELS)
    for c, stride in itertools.product((4, 30, 48), (1, 2)):
        theirs = timm_layers.MixedConv2d(c, c, kernels, stride=stride, padding="", depthwise=True)
        yield blocks.MixedDepthwise(c, stride), theirs, c


@pytest.mark.parametrize("ours, theirs, channels", list(pairs()))
def test_blocks_equal_timm(ours, theirs, channels):
    ours, theirs, x = ours.double(), theirs.double(), double(3, channels, 11, 9)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    values = ours.state_dict().values()  # same order, other names
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(2, 2), (7, 7), (8, 5), (1, 4), (1, 1)])
def test_blur_pool_equals_timm_and_its_compiled_form(size):
    x, ours = double(2, 6, *size), blocks.BlurPool().eval()
    if min(size) > 1:  # PyTorch cannot reflect a single row
        torch.testing.assert_close(ours(x), timm_layers.BlurPool2d(6, filt_size=3, stride=2).double()(x))
    compiled = torch.compile(ours, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), ours(x))
    constant = ours(torch.full((1, 3, *size), 0.3))
    torch.testing.assert_close(constant, torch.full((1, 3, (size[0] + 1) // 2, (size[1] + 1) // 2), 0.3))


@pytest.mark.parametrize("kernel", blocks.SPACE["kernel"])
def test_separable_conv_equals_a_dense_convolution(kernel):
    """The weights of the dense convolution are pointwise[o, i] × depthwise[i]."""
    conv = blocks.SeparableConv(8, 5, kernel).double()
    x = double(2, 8, 10, 12)
    depthwise = conv.depthwise.convs if kernel == "mixed" else [conv.depthwise]
    widest = max(c.kernel_size[0] for c in depthwise)
    filters = torch.cat([F.pad(c.weight, [(widest - c.kernel_size[0]) // 2] * 4) for c in depthwise])
    dense = conv.pointwise.weight * filters.transpose(0, 1)  # (5, 8, widest, widest)
    torch.testing.assert_close(conv(x), F.conv2d(x, dense, padding=widest // 2))
    assert all(parameter.dim() > 1 for parameter in conv.parameters())


def test_stochastic_depth_equals_timm_and_keeps_the_mean():
    x = double(5000, 2, 1, 1).abs()
    ours, theirs = blocks.StochasticDepth(0.3), timm_layers.DropPath(0.3)
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, theirs(x))
    dropped = (y == 0).all(dim=1).flatten()
    assert abs(dropped.double().mean() - 0.3) < 4 * (0.3 * 0.7 / 5000) ** 0.5
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.7)
    assert torch.equal(ours.eval()(x), x)


@pytest.mark.parametrize("pooling", blocks.POOLINGS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 8)])
def test_poolings_halve_the_resolution_and_keep_the_channels(pooling, size):
    y = blocks.POOLINGS[pooling](4)(torch.randn(2, 4, *size))
    assert y.shape == (2, 4, (size[0] + 1) // 2, (size[1] + 1) // 2)


@pytest.mark.parametrize("kernel", [3, "mixed"])
def test_depthwise_convolutions_train_in_float32_under_cpu_autocast(kernel):
    layer, seen = blocks.SeparableConv(8, 4, kernel), []
    x = torch.randn(2, 8, 9, 9).bfloat16()
    layer.depthwise.register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        layer.eval()(x)
    assert [result.dtype for result in seen] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(seen[0], layer.depthwise(x.float()))


@pytest.fixture
def fast_gradients(monkeypatch):
    """Count the calls of `depthwise_weight_gradient`, as on an x86 CPU."""
    compute = Mock(wraps=blocks.depthwise_weight_gradient)
    monkeypatch.setattr(blocks, "depthwise_weight_gradient", compute)
    monkeypatch.setattr(blocks.platform, "machine", lambda: "x86_64")
    return compute


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "dtype"),
    [(k, 1, torch.float32) for k in (3, 5, 7, 9, 11)] + [(5, 2, torch.float32), (5, 1, torch.float64)],
)
def test_depthwise_gradients_equal_pytorch(kernel, stride, dtype, memory_format, fast_gradients):
    for batch, channels, height, width in ((8, 24, 17, 6), (5, 19, 4, 44), (1, 1, 128, 128)):
        layer = blocks.DepthwiseConv2d(channels, kernel, stride).to(dtype)
        layer.weight.data = small_integers(*layer.weight.shape).to(dtype)
        x = small_integers(batch, channels, height, width).to(dtype, memory_format=memory_format)
        y = layer(x.requires_grad_())
        slope = small_integers(*y.shape).to(dtype)
        y.backward(slope)
        other, weight = (t.detach().double().requires_grad_() for t in (x, layer.weight))
        expected = F.conv2d(other, weight, None, stride, kernel // 2, groups=channels)
        expected.backward(slope.double())
        for ours, theirs in ((y, expected), (x.grad, other.grad), (layer.weight.grad, weight.grad)):
            assert torch.equal(ours.double(), theirs)
    fast = kernel > 3 and stride == 1 and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    assert fast_gradients.call_count == 3 * fast


def test_fast_gradients_are_limited_to_plain_training(fast_gradients):
    """Function transforms, tracing, export and frozen weights use PyTorch's own derivatives."""
    layer, x = blocks.DepthwiseConv2d(16, 5), torch.randn(4, 16, 16, 16)

    def plain(x, weight=layer.weight):
        return F.conv2d(x, weight, padding=2, groups=16)

    def sharpness(run):
        (grad,) = torch.autograd.grad(run(x).pow(3).sum(), layer.weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), layer.weight)[0]

    def with_weight(weight, x):
        return torch.func.functional_call(layer, {"weight": weight}, x).square().sum()

    expected = sharpness(plain)
    assert (sharpness(layer) - expected).norm() < 1e-5 * expected.norm()
    fast_gradients.assert_called_once()  # by the outer derivative, which builds no graph
    y = layer(x)
    slopes = torch.randn(2, *y.shape)
    batched = torch.autograd.grad(y, layer.weight, slopes, retain_graph=True, is_grads_batched=True)[0]
    torch.testing.assert_close(batched[1], torch.autograd.grad(plain(x), layer.weight, slopes[1])[0])
    weight = layer.weight.detach()
    expected = torch.func.grad(lambda weight: plain(x, weight).square().sum())(weight)
    torch.testing.assert_close(torch.func.grad(with_weight)(weight, x), expected)
    each = torch.vmap(torch.func.grad(with_weight), (None, 0))(weight, x[:, None])
    torch.testing.assert_close(each.sum(0), expected)
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        tangent = forward.unpack_dual(layer(forward.make_dual(x, slopes[0]))).tangent
        torch.testing.assert_close(tangent, plain(slopes[0]))
    for traced in (
        torch.compile(layer, backend="aot_eager", fullgraph=True),
        torch.export.export(layer, (x,)).module(),
        torch.jit.trace(layer, x),
        layer.requires_grad_(False),
    ):
        traced(x.requires_grad_()).sum().backward()
        torch.testing.assert_close(traced(x), plain(x))
    assert layer.to("meta")(x.to("meta")).shape == x.shape
    fast_gradients.assert_called_once()
