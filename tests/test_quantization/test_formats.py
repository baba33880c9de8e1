"""What is stored in few bits, against torchao's own values and numpy."""

import numpy as np
import pytest
import torch

from mmpeft.quantization import FORMATS, Quantized, can_quantize, quantize

DTYPES = torch.float32, torch.bfloat16


def weight(dtype=torch.float32):
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)


def of_torchao(weight, kind):
    from torchao import quantization

    if kind == 'nf4':
        return quantization.to_nf4(weight, 64, 64).get_original_weight()
    tensor = dict(int8=quantization.Int8Tensor, fp8=quantization.Float8Tensor)[kind]
    return tensor.from_hp(weight, granularity=quantization.PerRow()).dequantize()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('kind', FORMATS)
def test_values_are_torchaos(kind, dtype):
    values = quantize(weight(dtype), kind).values()
    assert torch.equal(values, of_torchao(weight(dtype), kind)) and values.dtype == dtype


def test_nf4_in_numpy():
    """Two codes in a byte, the first in its upper half, times the scale of a block of 64."""
    parts = {k: v.numpy() for k, v in quantize(weight(), 'nf4').parts.items()}
    data = parts['quantized_data']
    codes = np.stack([data // 16, data % 16], 1).reshape(-1, 64)
    scales = parts['quantized_scalers'] / np.repeat(parts['quantization_factor'], 64)
    values = parts['nf4'][codes] * (scales + parts['scaler_mean'])[:, None]
    stored = quantize(weight(), 'nf4').values().numpy().reshape(-1, 64)
    np.testing.assert_allclose(stored, values, rtol=1e-6)
    error = np.abs(stored - weight().numpy().reshape(-1, 64)).max(1)
    widest = np.diff(parts['nf4']).max() / 2 + 1 / 100
    assert (error <= widest * np.abs(weight().numpy().reshape(-1, 64)).max(1)).all()


@pytest.mark.parametrize(('kind', 'step'), [('int8', 1 / 127), ('fp8', 1 / 8)])
def test_rows_are_rounded_to_nearest(kind, step):
    """Within half a step: of the row's largest element, or of the element itself."""
    values, exact = quantize(weight(), kind).values(), weight()
    scale = exact.abs().amax(1, keepdim=True) if kind == 'int8' else exact.abs().clamp_min(1e-2)
    assert ((values - exact).abs() <= 0.51 * step * scale).all()


@pytest.mark.parametrize('kind', FORMATS)
def test_zeros_stay_zeros(kind):
    pruned = weight()
    pruned[3], pruned[5, :64] = 0, 0
    values = quantize(pruned, kind).values()
    assert values.isfinite().all() and not values[3].any() and not values[5, :64].any()
    assert not quantize(torch.zeros(64, 64), kind).values().any()


def test_bytes_and_shapes():
    sizes = {kind: quantize(weight(torch.bfloat16), kind).nbytes for kind in FORMATS}
    elements, blocks = 96 * 128, 96 * 128 // 64
    assert sizes['int8'] == sizes['fp8'] == elements + 4 * 96
    assert sizes['nf4'] == elements // 2 + blocks + 2 * (blocks // 64 + 1 + 16)
    assert not can_quantize(torch.zeros(5, 5), 'nf4') and can_quantize(torch.zeros(5, 5), 'int8')
    assert all(can_quantize(torch.zeros(8, 1, 2, 4), kind) for kind in FORMATS)
    assert not any(can_quantize(torch.zeros(64), kind) for kind in FORMATS)


@pytest.mark.parametrize('kind', FORMATS)
def test_a_kernel_is_stored_as_its_matrix(kind):
    kernel = weight().view(96, 8, 4, 4)
    found = quantize(kernel.contiguous(memory_format=torch.channels_last), kind)
    matrix = quantize(weight(), kind)
    assert torch.equal(found.values(), matrix.values().view(96, 8, 4, 4))
    assert found.nbytes == matrix.nbytes and torch.equal(found.flatten(1), matrix)
    assert isinstance(found.flatten(1), Quantized) and not torch.equal(found, matrix)
    assert torch.equal(found.flatten(), matrix.values().flatten())
