"""Weights that several layers hold, and what ties them."""

import inspect
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from mmpeft.errors import UsageError

from .site import Site
from .weights import PARAMETRIZATIONS, join, layers, original_of

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


def configs_to_untie(model: nn.Module, weights: Iterable[list[list[Site]]]) -> list[Any]:
    """The configs that tie what a merge gives different values.

    Args:
        model: Adapted.
        weights: As :func:`~mmpeft.injection.site.chains_by_weight` lists its sites.

    Raises:
        UsageError: No config ties such a weight, so that a merged file would lose one value.
    """
    held, found = holders(model), []
    for chains in weights:
        first, readers = chains[0][0], held[chains[0][0].tie_key]
        if len(chains) == len(readers):
            continue
        configs = tying_configs(model, first.original)
        if not configs:
            names = ' and '.join(join(path, name) for path, _, name in readers)
            raise UsageError(
                f'{names} are one tied weight, and {first.name} has an adapter that the others '
                'do not have. The merged file of a model that ties them would lose one of them. '
                'Adapt all of them alike (one mmpeft.inject whose targets select them all), leave '
                f'it out (targets.exclude={first.name!r}), or keep the adapter in a file of its '
                'own (mmpeft.save_adapter).'
            )
        found += configs
    return list({id(config): config for config in found}.values())
