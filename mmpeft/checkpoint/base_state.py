"""A checkpoint of the plain model, into an adapted model's base and out of it."""

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.injection.merge import MERGED, merge, unmerge
from mmpeft.injection.weights import plain_key
from mmpeft.injection.wrappers import on_inner
from mmpeft.quantization import Quantized, adopted

from .keys import adapter_keys

# What transformers' quantizers leave on a model and its config.
QUANTIZER = (
    'hf_quantizer',
    'is_quantized',
    'quantization_method',
    'quantization_config',
    '_pre_quantization_dtype',
)


@on_inner
def load_base(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a state dict of the plain model into the base of an adapted one, in place.

    Everything that is not an adapter is loaded, heads included. Adapters stay as they are, also in
    what a method took from the weights that it started from (DoRA's norms, singular vectors): load
    a base before :func:`mmpeft.inject` where you can.

    Args:
        model: After :func:`mmpeft.inject`, or plain.
        state: With the keys of the model without adapters. Of a tied weight one name is enough.

    Raises:
        UsageError: Keys are unexpected or missing, a shape is another, tied weights
            have several values, or the model is merged. The model is unchanged.
    """
    if MERGED in model.__dict__:
        raise UsageError(
            'The model is merged reversibly, and its base is put aside. Write '
            'mmpeft.unmerge(model) before mmpeft.load_base(model, state).'
        )
    own, adapters = model.state_dict(keep_vars=True), adapter_keys(model)
    keys = {plain_key(key): key for key in own if key not in adapters}
    given: dict[int, str] = {}
    for name in state.keys() & keys.keys():
        first = given.setdefault(id(own[keys[name]]), name)
        if first != name and not torch.equal(state[first], state[name]):
            raise UsageError(
                f'{first} and {name} are one tied weight in the model, and differ in the state '
                'dict. Untie them in the model before mmpeft.inject (tie_word_embeddings=False in '
                "a Hugging Face model's config), or remove one of them from the state dict."
            )
    faults = dict(
        unexpected=sorted(state.keys() - keys.keys()),
        missing=[name for name, key in keys.items() if id(own[key]) not in given],
    )
    found = {name: given.get(id(own[key])) for name, key in keys.items()}
    faults['of another shape'] = [
        f'{name} ({_shape(state[source])}, in the model {_shape(own[keys[name]])})'
        for name, source in found.items()
        if source is not None and _shape(state[source]) != _shape(own[keys[name]])
    ]
    listed = [f'{len(v)} {k} ({", ".join(v[:3])})' for k, v in faults.items() if v]
    if listed:
        raise UsageError(
            f'The state dict does not fit the base of this model: keys are {" and ".join(listed)}. '
            'Give the state dict of the same model without adapters, such as '
            'torch.load(path)["state_dict"]; adapter files are for mmpeft.load_adapter.'
        )
    translated = {key: state[found[name]] for name, key in keys.items()}
    model.load_state_dict({key: translated.get(key, value) for key, value in own.items()})
    return model


def save_pretrained(model: nn.Module, folder: str | Path, **kwargs) -> Any:
    """Write an adapted model of transformers or diffusers as a plain one, its adapters merged.

    The model is merged for the time of writing and is then what it was.

    Args:
        model: With a ``save_pretrained`` of its own.
        folder: To write to.
        kwargs: Of the model's own ``save_pretrained``, whose result is returned.

    Raises:
        UsageError: The model has no ``save_pretrained``, cannot be merged, or another library
            quantized weights outside the target.
    """
    if not callable(getattr(model, 'save_pretrained', None)):
        raise UsageError(
            f'{type(model).__name__} has no save_pretrained. Write mmpeft.save_adapter(model, '
            'path), or mmpeft.merge(model) and torch.save(model.state_dict(), path).'
        )
    was_merged = MERGED in model.__dict__
    merge(model, reversible=True)
    try:
        with _without_quantizer(model):
            return model.save_pretrained(folder, **kwargs)
    finally:
        if MERGED in model.__dict__ and not was_merged:
            unmerge(model)


@contextmanager
def _without_quantizer(model):
    """Let a model that transformers quantized, and whose weights are plain now, be written so."""
    config = getattr(getattr(model, 'config', None), '__dict__', {})
    if 'quantization_config' not in config:
        yield
        return
    for name, weight in model.named_parameters():
        is_plain = weight.is_floating_point() and adopted(weight) is weight
        if not is_plain or isinstance(weight, Quantized):
            raise UsageError(
                f'{name} is quantized still, and plain weights beside such cannot be loaded by '
                'from_pretrained. Adapt the whole model (targets.module), or write '
                'mmpeft.save_adapter(model, path) for the adapters alone.'
            )
    held = [(place, dict(place)) for place in (vars(model), config)]
    for key in QUANTIZER:
        for place, _ in held:
            place.pop(key, None)
    try:
        yield
    finally:
        for place, values in held:
            place |= {key: values[key] for key in QUANTIZER if key in values}


def _shape(value):
    return tuple(getattr(value, 'shape', ()))
