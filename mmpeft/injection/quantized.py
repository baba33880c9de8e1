"""Frozen weights in few bits: what a target stores so, and what is refused."""

from collections.abc import Iterable
from types import MethodType

from torch import nn

from mmpeft import execution
from mmpeft.errors import UsageError
from mmpeft.quantization import (
    Quantized,
    adopted,
    can_quantize,
    check_format,
    multiplies,
    quantize,
)

from .site import adapters_of
from .ties import holders
from .weights import PARAMETRIZATIONS, join, layers, lineage, original_of, weights_of

ADOPTED = 'torchao', 'bitsandbytes'
LIBRARIES = 'bitsandbytes', 'torchao', 'torch.ao.nn.quantized', 'torch.ao.nn.intrinsic.quantized'


def to_quantize(
    model: nn.Module, path: str, dtype: str, trained: Iterable[nn.Parameter]
) -> list[list[tuple[nn.Module, str]]]:
    """The frozen weights of linear layers and convolutions of a target that a format can store.

    Layers that compute something else from their weight are left out: :func:`~.multiplies` says
    which, and those that another library parametrizes.

    Args:
        model: With its weights.
        path: Of the target module.
        dtype: See :func:`~mmpeft.quantization.tensor.quantize`.
        trained: Parameters that stay as they are.

    Returns:
        For each weight the layers that hold it, and its name in them.

    Raises:
        UsageError: There is none, an earlier injection has adapted one of them, or the format is
            not available.
    """
    check_format(dtype)
    held, trained = holders(model), {id(p) for p in trained}
    inside, found, present = set(), {}, False
    for below, layer in layers(model.get_submodule(path)):
        for name, spec in weights_of(layer):
            weight = original_of(layer, name)
            if isinstance(weight, Quantized):
                if weight.format != dtype:
                    raise UsageError(
                        f'frozen_dtype={dtype!r}: {join(path, below, name)} is stored in '
                        f'{weight.format!r} already. Leave frozen_dtype out, or give what it is '
                        'stored in where that is a frozen_dtype.'
                    )
                present = True
            if name != 'weight' or id(weight) in trained or not _multiplies(layer, spec):
                continue
            if type(weight) is not nn.Parameter or not can_quantize(weight, dtype):
                continue
            if adapters_of(layer, name):
                raise UsageError(
                    f'{join(path, below, name)} has an adapter already, which was made for the '
                    f'weight as it is. Give frozen_dtype={dtype!r} to the first mmpeft.inject.'
                )
            if name in getattr(layer, PARAMETRIZATIONS, ()):
                continue
            inside.add((layer, name))
            found[id(weight)] = [(layer, name) for _, layer, name in held[id(weight)]]
    found = [places for places in found.values() if inside.issuperset(places)]
    if not found and not present:
        raise UsageError(
            f'frozen_dtype={dtype!r}: {path or "the model"!r} has no linear layer or '
            'convolution whose weight is frozen and can be stored so. Leave frozen_dtype out.'
        )
    return found


def _multiplies(layer, spec):
    return 'linear' in spec.kinds or execution.is_enabled(layer) or multiplies(layer)


def quantize_weights(weights: list[list[tuple[nn.Module, str]]], dtype: str) -> None:
    """Store the weights that :func:`to_quantize` found in few bits, one after another, in place."""
    for places in weights:
        layer, name = places[0]
        stored = nn.Parameter(quantize(layer._parameters[name], dtype), False)
        for layer, name in places:
            layer._parameters[name] = stored


def adopt_quantized(model: nn.Module, path: str = '') -> None:
    """Take over the linear weights below a module that another library quantized, in place.

    These are torchao's and the 4-bit ones of bitsandbytes, whose layers become ``nn.Linear``.
    Their values stay. Weights that methods cannot work on are refused: layers and tensors of
    torch's and of the libraries' other formats, such as those that quantize the layers' inputs
    too (``Linear8bitLt``), and weights of integers or of one byte.

    Raises:
        UsageError: Names the first layer that is refused; the model is unchanged.
    """
    for above in lineage(path)[:-1]:
        _check(above, model.get_submodule(above), tensors=False)
    found = {}
    for below, layer in layers(model.get_submodule(path)):
        own = layer._parameters.get('weight')
        new = adopted(own) if own is not None and isinstance(layer, nn.Linear) else own
        takes = new is not own or isinstance(own, Quantized)
        if takes:
            found.setdefault(id(own), (new, []))[1].append(layer)
        _check(join(path, below), layer, without=('weight',) if takes else ())
    for weight, holding in found.values():
        weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
        for layer in holding:
            layer._parameters['weight'] = weight
            if _is_of_bitsandbytes(layer):
                _make_linear(layer)


def _make_linear(layer):
    """Let a layer of bitsandbytes compute as ``nn.Linear``, also below a hook of accelerate."""
    layer.__class__ = nn.Linear
    layer.quant_state = None
    if layer.bias is not None:  # which its forward has moved to the dtype it computes in
        layer.bias.data = layer.bias.data.to(layer.weight.dtype)
    if '_old_forward' in vars(layer):
        layer._old_forward = MethodType(nn.Linear.forward, layer)


def _check(path, layer, tensors=True, without=()):
    reason = None
    if _is_marked(layer):
        reason = 'was quantized by transformers (hf_quantizer, is_quantized)'
    if not tensors:
        values = {}
    else:
        values = dict(layer._parameters)
        values |= {n: b for n, b in layer._buffers.items() if n.endswith('weight')}
        if _is_quantized_class(layer) and not (without and _is_of_bitsandbytes(layer)):
            reason = f'is a {type(layer).__module__}.{type(layer).__qualname__}'
    for name, value in values.items():
        if value is None or name in without:
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
            'weight that a layer computes with. Load the model without quantization and give '
            "frozen_dtype ('nf4', 'int8', 'fp8') to mmpeft.inject, or leave the layer out of the "
            'target (targets.module).'
        )


def _is_marked(layer):
    """Whether a quantizer of transformers has made a model whose layers are not looked at."""
    quantizer = getattr(layer, 'hf_quantizer', None)
    config = getattr(quantizer, 'quantization_config', None)
    is_marked = quantizer is not None or getattr(layer, 'is_quantized', False)
    return is_marked and getattr(config, 'quant_method', None) not in ADOPTED


def _is_of_bitsandbytes(layer):
    return type(layer).__module__ == 'bitsandbytes.nn.modules'


def _is_quantized_class(value):
    names = [f'{c.__module__}.{c.__qualname__}' for c in type(value).__mro__]
    return any(name.startswith(tuple(f'{each}.' for each in LIBRARIES)) for name in names)
