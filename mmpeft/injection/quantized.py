"""Refuse quantized weights, recognized without importing the libraries that made them."""

from torch import nn

from mmpeft.errors import UsageError

from .weights import join, layers, lineage

LIBRARIES = 'bitsandbytes', 'torchao', 'torch.ao.nn.quantized', 'torch.ao.nn.intrinsic.quantized'


def refuse_quantized(model: nn.Module, path: str = '') -> None:
    """Refuse a target module with weights that are not the numbers that its layers compute with.

    These are layers and tensors of bitsandbytes and torchao, what transformers' quantizers made,
    and weights of integers or of one byte.

    Raises:
        UsageError: Names the first such layer.
    """
    for above in lineage(path)[:-1]:
        _check(above, model.get_submodule(above), tensors=False)
    for below, layer in layers(model.get_submodule(path)):
        _check(join(path, below), layer)


def _check(path, layer, tensors=True):
    reason = None
    if getattr(layer, 'hf_quantizer', None) is not None or getattr(layer, 'is_quantized', False):
        reason = 'was quantized by transformers (hf_quantizer, is_quantized)'
    if not tensors:
        values = {}
    else:
        values = dict(layer._parameters)
        values |= {n: b for n, b in layer._buffers.items() if n.endswith('weight')}
        if _is_quantized_class(layer):
            reason = f'is a {type(layer).__module__}.{type(layer).__qualname__}'
    for name, value in values.items():
        if value is None:
            continue
        if _is_quantized_class(value) or _is_quantized_class(value.data):
            kind = type(value) if _is_quantized_class(value) else type(value.data)
            reason = f'has a {name} of type {kind.__module__}.{kind.__qualname__}'
        elif value.ndim < 2:
            continue
        elif value.dtype.itemsize < 2 or not (value.is_floating_point() or value.is_complex()):
            reason = f'has a {name} of {value.dtype}'
    if reason:
        raise UsageError(
            f'{path or "The model"} {reason}: it is quantized, and a method is a function of the '
            'weight that a layer computes with. Load the model without quantization (bfloat16 '
            'halves its memory), or leave the layer out of the target (targets.module).'
        )


def _is_quantized_class(value):
    names = [f'{c.__module__}.{c.__qualname__}' for c in type(value).__mro__]
    return any(name.startswith(tuple(f'{each}.' for each in LIBRARIES)) for name in names)
