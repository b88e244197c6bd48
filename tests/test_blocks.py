"""Tests of blocks.py: each part against timm's of the same meaning or a formula worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import blocks
from blocks import (
    KERNELS,
    BlurPool,
    DepthwiseConv2d,
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


class Operators(TorchDispatchMode):
    """Context whose `names` are those of the operators called in it."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


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


@pytest.mark.parametrize("size", [(2, 2), (7, 8)])
def test_blur_pool_s_own_padding_is_pytorch_s(size):
    x = double(2, 6, *size).contiguous(memory_format=torch.channels_last)
    padded = BlurPool._reflect(x)
    assert padded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(padded, F.pad(x, (1, 1, 1, 1), mode="reflect"))


def test_blur_pool_does_not_copy_channels_last_maps_on_a_gpu():
    with FakeTensorMode(), torch.device("cuda"):  # shapes and strides alone: no GPU is needed
        x = torch.empty(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        assert F.pad(x, (1, 1, 1, 1), mode="reflect").is_contiguous()  # why BlurPool does not pad so
        assert BlurPool._reflect(x).is_contiguous(memory_format=torch.channels_last)
        with Operators() as operators:
            BlurPool(8)(x)
    assert not any("reflection_pad" in name for name in operators.names)


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


needs_triton = pytest.mark.skipif(blocks.triton is None, reason="no Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, the kernels run in Triton's interpreter


def depthwise_case(shape: tuple[int, ...], kernel: int, dtype: torch.dtype):
    """An input, a weight and a gradient of the result, channels-last, of small integers: sums are exact."""
    generator = torch.Generator().manual_seed(sum(shape) + kernel)

    def integers(*shape):
        values = torch.randint(-3, 4, shape, generator=generator).to(DEVICE, dtype)
        return values.contiguous(memory_format=torch.channels_last)

    return integers(*shape), integers(shape[1], 1, kernel, kernel), integers(*shape)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 40, 7, 9), 5),  # more channels than a block has, and not whole blocks of them
        ((1, 32, 8, 8), 3),  # whole tiles
        ((3, 5, 17, 3), 7),  # tiles across images; a kernel wider than the map
        ((2, 8, 1, 12), 9),
        ((5, 4, 1, 1), 3),
    ],
)
def test_triton_depthwise_convolution_is_pytorch_s(shape, kernel, dtype):
    x, weight, grad = depthwise_case(shape, kernel, dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    ours = blocks.depthwise_conv(*leaves)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    ours.backward(grad)
    exact = [t.cpu().double().requires_grad_() for t in (x, weight)]
    theirs = F.conv2d(*exact, padding=kernel // 2, groups=shape[1])
    theirs.backward(grad.cpu().double())
    for left, right in [(ours, theirs), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]:
        torch.testing.assert_close(
            left.cpu(), right.to(dtype), rtol=0, atol=0
        )  # once rounded, from exact sums


@needs_triton
def test_triton_depthwise_convolution_takes_contiguous_maps_and_many_positions():
    x, weight, grad = (t.contiguous() for t in depthwise_case((1, 2, 64, 65), 3, torch.float32))
    theirs = F.conv2d(x, weight, padding=1, groups=2)
    torch.testing.assert_close(blocks.depthwise_conv(x, weight), theirs, rtol=0, atol=0)
    want = torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=1, groups=2)  # two programs add to it
    torch.testing.assert_close(blocks.depthwise_conv_weight_grad(x, grad, 3), want, rtol=0, atol=0)


@needs_triton
def test_triton_depthwise_convolution_is_an_operator_that_compiles():
    x, weight, grad = depthwise_case((2, 8, 6, 5), 3, torch.float32)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(blocks.depthwise_conv, leaves)
    torch.library.opcheck(blocks.depthwise_conv_weight_grad, (x.detach(), grad, 3))

    def slopes(f):
        return torch.autograd.grad(f(*leaves), leaves, grad)

    compiled = torch.compile(blocks.depthwise_conv, backend="aot_eager", fullgraph=True)
    for left, right in zip(slopes(compiled), slopes(blocks.depthwise_conv), strict=True):
        torch.testing.assert_close(left, right)


@needs_triton
@pytest.mark.parametrize(
    ("changes", "by_triton"),
    [
        ({}, True),
        ({"use_triton": False}, False),
        ({"stride": 2}, False),
        ({"dtype": torch.float64, "autocast": False}, False),
        ({"autocast": False}, True),
        ({"format": torch.contiguous_format}, True),
        ({"device": "cpu"}, False),
    ],
)
def test_triton_takes_maps_of_a_gpu_where_it_is_asked_to(monkeypatch, changes, by_triton):
    case = {"use_triton": True, "stride": 1, "dtype": torch.float32, "autocast": True, "device": "cuda"}
    case |= {"format": torch.channels_last} | changes
    monkeypatch.setattr(DepthwiseConv2d, "use_triton", case["use_triton"])
    with FakeTensorMode(), Operators() as operators, torch.device(case["device"]):  # needs no GPU
        torch.set_default_dtype(case["dtype"])
        torch.set_autocast_enabled("cuda", case["autocast"])
        try:
            x = torch.empty(2, 8, 6, 6).contiguous(memory_format=case["format"])
            out = DepthwiseConv2d(8, 3, case["stride"])(x)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_autocast_enabled("cuda", False)
    assert any("nexception.depthwise_conv" in operator for operator in operators.names) == by_triton
    in_half = case["autocast"] and case["device"] == "cuda"
    assert out.dtype == (torch.get_autocast_dtype("cuda") if in_half else case["dtype"])


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_trains_alike_with_triton_on_a_gpu(monkeypatch, dtype, compiled):
    torch.manual_seed(0)
    block = SeparableConv(96, 64, 5).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 96, 20, 28, device="cuda").to(memory_format=torch.channels_last)

    def step(use_triton):
        monkeypatch.setattr(DepthwiseConv2d, "use_triton", use_triton)
        torch.compiler.reset()
        block.zero_grad()
        run = torch.compile(block, fullgraph=True) if use_triton and compiled else block
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = run(x)
        out.float().square().mean().backward()
        return [out.float(), *(p.grad.clone() for p in block.parameters())]

    near = 2e-2 if dtype == torch.bfloat16 else 2e-3  # float32: the 1 x 1 convolution is in TF32
    for left, right in zip(step(True), step(False), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=near * right.abs().max().item())


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
