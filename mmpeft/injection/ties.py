"""Weights that several layers hold, and what ties them."""

import inspect
from collections import defaultdict
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from .weights import PARAMETRIZATIONS, layers, original_of

TIE = 'tie_word_embeddings'


def holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Path, layer and name of all that hold a parameter, by the parameter's identity."""
    found = defaultdict(list)
    for path, layer in layers(model):
        for name in dict.fromkeys((*layer._parameters, *getattr(layer, PARAMETRIZATIONS, ()))):
            found[id(original_of(layer, name))].append((path, layer, name))
    return found


def tying_configs(model: nn.Module, weight: Tensor) -> list[Any]:
    """Configs whose ``tie_word_embeddings`` alone ties a weight, as in Hugging Face's models.

    None where the flag does more: T5 also scales its outputs by it.
    """
    for module in model.modules():
        tied = []
        with suppress(AttributeError, NotImplementedError):
            ends = module.get_input_embeddings(), module.get_output_embeddings()
            tied = [original_of(end, 'weight') is weight for end in ends]
        if not tied or not all(tied):
            continue
        if TIE in inspect.unwrap(type(module).forward).__code__.co_names:
            continue
        config = getattr(module, 'config', None)
        found = [config]
        if hasattr(config, 'get_text_config'):
            found.append(config.get_text_config(decoder=True))
        return [each for each in found if getattr(each, TIE, False)]
    return []
