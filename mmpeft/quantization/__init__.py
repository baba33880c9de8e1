"""Frozen weights in few bits."""

from .formats import FORMATS
from .layers import multiplies
from .tensor import (
    Quantized,
    adopted,
    can_quantize,
    check_format,
    dequantized,
    quantize,
    stored_in,
    stored_parts,
)

__all__ = [
    'FORMATS',
    'Quantized',
    'adopted',
    'can_quantize',
    'check_format',
    'dequantized',
    'multiplies',
    'quantize',
    'stored_in',
    'stored_parts',
]
