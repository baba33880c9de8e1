"""Formats of few bits: what is stored of a matrix W (O, I), and its values again.

A kernel (O, I, *kernel) is stored as its matrix, of a row for each element of its first axis.
torchao quantizes, and what bitsandbytes has quantized is read. The values are computed here: in one
pass, also in compiled code and on tensors without data, and equal to the libraries' own to the last
bit.
"""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

Parts = dict[str, Tensor]


class Rows:
    """Whole numbers or float8, and one scale for each row: W = scale * data.

    ``qdata`` (O, I) has a byte for each number, ``scale`` (O, 1) is float32.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def accepts(self, weight: Tensor) -> bool:
        """Whether a weight can be stored so."""
        return weight.ndim > 1

    def pack(self, weight: Tensor) -> Parts:
        """What is stored of a weight."""
        from torchao import quantization

        whole = self.dtype == torch.int8
        kind = quantization.Int8Tensor if whole else quantization.Float8Tensor
        packed = kind.from_hp(weight.flatten(1), granularity=quantization.PerRow())
        # torchao divides rows of zeros by their largest element.
        data = packed.qdata.view(torch.uint8).masked_fill(packed.scale == 0, 0)
        return dict(qdata=data, scale=packed.scale)

    def unpack(self, parts: Parts, shape: torch.Size) -> Tensor:
        """The weight, not yet rounded to its dtype."""
        scale = parts['scale']
        return (parts['qdata'].view(self.dtype).to(scale.dtype) * scale).view(shape)


class NF4:
    """4-bit NormalFloat with double quantization (QLoRA, arXiv:2305.14314).

    Blocks of 64 elements in the order of memory have a scale each, stored as int8. Two codes of
    the table ``nf4`` (16,) share a byte of ``quantized_data``.
    """

    def accepts(self, weight: Tensor) -> bool:
        """Whether a weight can be stored so."""
        return weight.ndim > 1 and weight.numel() % 64 == 0

    def pack(self, weight: Tensor) -> Parts:
        """What is stored of a weight."""
        from torchao.quantization import to_nf4

        weight = weight.flatten(1).contiguous()
        packed = to_nf4(weight, 64, gcd(weight.numel() // 64, 256))
        parts = {name: getattr(packed, name) for name in packed.__tensor_flatten__()[0]}
        # torchao divides blocks of zeros by their largest element; code 7 stands for zero.
        zeros = (weight.view(-1, 64) == 0).all(1, keepdim=True)
        data = parts['quantized_data'].view(-1, 32).masked_fill(zeros, 0x77)
        return parts | dict(quantized_data=data.flatten())

    def unpack(self, parts: Parts, shape: torch.Size) -> Tensor:
        """The weight, not yet rounded to its dtype."""
        factor, mean, table = parts['quantization_factor'], parts['scaler_mean'], parts['nf4']
        scales = parts['quantized_scalers'].view(len(factor), -1) / factor[:, None]
        scales = scales.flatten().to(table.dtype) + mean
        pairs = torch.cartesian_prod(table, table)
        values = F.embedding(parts['quantized_data'].int(), pairs)
        return (values.view(len(scales), -1) * scales[:, None]).view(shape)


class BitsAndBytes:
    """The 4-bit types of bitsandbytes (QLoRA), which are read and not written.

    Blocks in the order of memory have a scale each. Two codes of the table ``code`` (16,) share a
    byte of ``quantized_data``. ``absmax`` holds the scales or, with double quantization, codes of
    the table ``nested_code`` (256,), which stand for scale / ``nested_absmax`` in blocks of 256,
    less the mean ``offset``.
    """

    def unpack(self, parts: Parts, shape: torch.Size) -> Tensor:
        """The weight, not yet rounded to its dtype."""
        scales, table = parts['absmax'], parts['code']
        if 'nested_code' in parts:
            outer = parts['nested_absmax'].repeat_interleave(NESTED_BLOCK)[: len(scales)]
            scales = parts['nested_code'][scales.int()] * outer + parts['offset']
        values = F.embedding(parts['quantized_data'].int(), torch.cartesian_prod(table, table))
        return (values.view(len(scales), -1) * scales[:, None]).view(shape)


NESTED_BLOCK = 256
FORMATS = dict(int8=Rows(torch.int8), nf4=NF4(), fp8=Rows(torch.float8_e4m3fn))
READABLE = FORMATS | dict(bitsandbytes=BitsAndBytes())

# The name of a format, its parts, and the shape and dtype of the values.
Stored = tuple[str, Parts, torch.Size, torch.dtype]


def parts_of(tensor: Tensor) -> Stored | None:
    """What a weight is that torchao or bitsandbytes quantized, in the same memory.

    None for what has no format here: other tensors, and those that quantize their input too.
    """
    kind = f'{type(tensor).__module__}.{type(tensor).__qualname__}'
    if kind == 'bitsandbytes.nn.modules.Params4bit':
        return _of_bitsandbytes(tensor)
    found = _of_torchao(tensor, kind)
    return found and (*found, tensor.shape, tensor.dtype)


def _of_bitsandbytes(tensor):
    state = getattr(tensor, 'quant_state', None)
    if state is None or getattr(state, 'packing_format_for_cpu', False):
        return None
    if len(state.shape) != 2 or state.shape.numel() != len(state.absmax) * state.blocksize:
        return None
    parts = dict(quantized_data=tensor.data.flatten().view(torch.uint8))
    parts |= dict(absmax=state.absmax, code=state.code)
    if state.nested:
        inner = state.state2
        if inner.blocksize != NESTED_BLOCK:
            return None
        parts |= dict(nested_absmax=inner.absmax, nested_code=inner.code, offset=state.offset)
    return 'bitsandbytes', parts, state.shape, state.dtype


def _of_torchao(tensor, kind):
    if not kind.startswith('torchao.') or getattr(tensor, 'act_quant_kwargs', None) is not None:
        return None
    if kind.endswith('.NF4Tensor'):
        return 'nf4', {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    name = {'Int8Tensor': 'int8', 'Float8Tensor': 'fp8'}.get(type(tensor).__name__)
    if name is None or tensor.ndim != 2 or getattr(tensor, 'act_pre_scale', None) is not None:
        return None
    data, scale, zero = tensor.qdata, tensor.scale, getattr(tensor, 'zero_point', None)
    is_centred = zero is None or not zero.any()
    if data.dtype != FORMATS[name].dtype or tuple(scale.shape) != (len(data), 1) or not is_centred:
        return None
    return name, dict(qdata=data.view(torch.uint8), scale=scale)
