"""A weight in few bits computes as its values, and stays what it is when it is copied."""

import copy
import io
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmpeft.analysis.memory import saved_bytes
from mmpeft.errors import UsageError
from mmpeft.quantization import FORMATS, Quantized, dequantized, quantize
from mmpeft.quantization.tensor import linear


def layer(kind, dtype=torch.float32):
    torch.manual_seed(0)
    found = nn.Linear(64, 32).to(dtype).requires_grad_(False)
    found.weight = nn.Parameter(quantize(found.weight, kind), False)
    return found


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = dict(
    deepcopy=lambda fc: copy.deepcopy(fc).weight,
    pickle=lambda fc: pickle.loads(pickle.dumps(fc)).weight,
    saved=lambda fc: saved(fc.state_dict())['weight'],
    clone=lambda fc: fc.weight.detach().clone(),
    there_and_back=lambda fc: copy.deepcopy(fc).double().float().weight,
)


@pytest.mark.parametrize('kind', FORMATS)
def test_copies_keep_what_is_stored(kind):
    fc = layer(kind)
    for name, make in COPIES.items():
        other = make(fc)
        assert other.format == kind and torch.equal(other, fc.weight), name
        pairs = zip(other.parts.values(), fc.weight.parts.values(), strict=True)
        assert all(a.data_ptr() != b.data_ptr() and torch.equal(a, b) for a, b in pairs), name
    assert isinstance(copy.deepcopy(fc).weight, nn.Parameter) and fc.weight.nbytes < 32 * 64 * 2
    assert copy.deepcopy(fc).to('meta').weight.values().is_meta
    other = layer(kind)
    other.weight.data.copy_(torch.ones(32, 64))
    other.load_state_dict(fc.state_dict())
    assert torch.equal(other.weight, fc.weight)


def test_a_plain_state_dict_is_rounded():
    fc, plain = layer('nf4'), nn.Linear(64, 32)
    fc.load_state_dict(plain.state_dict())
    assert torch.equal(fc.weight, quantize(plain.weight, 'nf4'))


def test_changes_in_place():
    """Rounded again; a mean with itself, as EMA takes of frozen weights, changes nothing."""
    fc = layer('int8')
    before = copy.deepcopy(fc.weight)
    fc.weight.lerp_(before, 0.3)
    fc.weight.copy_(before.values())
    assert torch.equal(fc.weight, before)
    fc.weight.mul_(-2)
    assert torch.equal(fc.weight, quantize(before.values() * -2, 'int8'))
    with pytest.raises(NotImplementedError, match='cannot write into'):
        torch.add(before, 1, out=fc.weight)


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('compute', [F.linear, linear])
def test_a_linear_layer(kind, compute):
    fc = layer(kind, torch.float64)
    x = torch.randn(2, 5, 64, dtype=torch.float64, requires_grad=True)
    bias = fc.bias.clone().requires_grad_()
    results = []
    for weight in (fc.weight, dequantized(fc.weight)):
        y = compute(x, weight, bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, bias))))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


CONVOLUTIONS = dict(
    conv1d=lambda: nn.Conv1d(16, 32, 3, stride=2, padding='valid'),
    grouped=lambda: nn.Conv2d(64, 32, 3, groups=4, padding='same', bias=False),
    dilated=lambda: nn.Conv2d(8, 16, (3, 2), dilation=2, padding=2, padding_mode='circular'),
    depthwise=lambda: nn.Conv2d(64, 64, 7, padding=3, groups=64),
    conv3d=lambda: nn.Conv3d(8, 16, 2, stride=(1, 2, 1), padding=1),
    transposed=lambda: nn.ConvTranspose2d(
        32, 16, 3, stride=2, padding=1, output_padding=1, groups=2
    ),
)


@pytest.mark.parametrize('case', CONVOLUTIONS)
def test_a_convolution(case):
    """Equal to that by the values, two derivatives too; the values are not kept for backward."""
    torch.manual_seed(0)
    plain = CONVOLUTIONS[case]()
    conv = copy.deepcopy(plain).requires_grad_(False)
    conv.weight = nn.Parameter(quantize(plain.weight, list(FORMATS)[len(case) % 3]), False)
    plain.weight = nn.Parameter(conv.weight.values(), False)
    x = torch.randn(2, conv.in_channels, *(9,) * (plain.weight.ndim - 2))
    assert saved_bytes(conv, x.requires_grad_()) == saved_bytes(plain, x)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(conv(x), plain(x))
    if x.ndim == 4:
        last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(conv.to(memory_format=torch.channels_last)(last), plain(x))
    low = copy.deepcopy(conv).bfloat16(), copy.deepcopy(plain).bfloat16()
    assert torch.equal(*(layer(x.bfloat16()) for layer in low))
    results = []
    for layer in (conv.double(), plain.double()):
        exact = x.detach().double().requires_grad_()
        y = layer(exact)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), exact, create_graph=True)
        results.append((y, dx, *torch.autograd.grad(dx.square().sum(), exact)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_neither_values_nor_input_are_kept():
    fc = layer('nf4')
    assert saved_bytes(fc, torch.randn(5, 64, requires_grad=True))[0] == 0
    with torch.autocast('cpu', torch.bfloat16):
        x = torch.randn(5, 64, requires_grad=True)
        y = fc(x)
        expected = F.linear(x, dequantized(fc.weight), fc.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


def test_transforms():
    fc, x = layer('nf4'), torch.randn(5, 64)
    expected = F.linear(x, dequantized(fc.weight), fc.bias)
    torch.testing.assert_close(torch.func.vmap(fc)(x), expected)
    torch.testing.assert_close(torch.compile(fc, backend='aot_eager')(x), expected)
    assert torch.equal(fc.weight.mT, dequantized(fc.weight).mT)


def test_what_this_machine_lacks(monkeypatch):
    with pytest.raises(UsageError, match="frozen_dtype='nf5' is unknown. Did you mean 'nf4'"):
        quantize(torch.randn(8, 8), 'nf5')

    def pack(weight):
        raise NotImplementedError('no kernel for float8 here')

    monkeypatch.setattr(FORMATS['fp8'], 'pack', pack, raising=False)
    with pytest.raises(UsageError, match="^frozen_dtype='fp8': .* device cpu here .*no kernel for"):
        quantize(torch.randn(8, 8), 'fp8')
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    with pytest.raises(UsageError, match=r"needs torchao .*pip install 'mmpeft\[quantized\]'"):
        quantize(torch.randn(8, 8), 'int8')
    assert not issubclass(Quantized, nn.Module)
