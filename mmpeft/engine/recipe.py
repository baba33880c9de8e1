"""Recipes of runs without a Runner: configs with ``peft`` of a method file, and ``targets``."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict
from torch import nn

from mmpeft.checkpoint.journal import append_record, read_journal
from mmpeft.errors import UsageError, suggest
from mmpeft.injection.inject import inject
from mmpeft.injection.summary import Summary

from .config import read_config
from .injections import injections
from .method_argument import read_method

# What :func:`check_options` leaves to inject and transformers, which check it themselves.
NAMES = {
    'peft': ('method', 'targets', 'unfreeze'),
    r'(peft\.)?targets|peft\.method|training|generation': None,
}


def read_recipe(
    config: str | Path, method: str | None = None, options: Mapping | None = None, **given
) -> Config:
    """Read a recipe.

    Args:
        config: The file.
        method: In place of the config's, as ``--method`` of the tools takes it.
        options: By dotted keys.
        given: Further keys; None leaves the config's.

    Raises:
        UsageError: A file, method or key does not exist.
    """
    cfg = read_config(config)
    options = {k: v for k, v in given.items() if v is not None} | dict(options or {})
    check_options(options, cfg.to_dict(), NAMES)
    if method is not None:
        cfg.peft = ConfigDict(read_method(method))
    cfg.merge_from_dict(options)
    if 'generation' in cfg:
        _check_generation(cfg.generation)
    return cfg


def check_options(
    options: Mapping, cfg: Mapping, names: Mapping[str, Iterable[str] | None]
) -> None:
    """Refuse options for keys that a config does not have, at any depth.

    Args:
        options: By dotted keys.
        cfg: The config without them.
        names: What dicts may have beside the config's keys, by patterns of their dotted keys ('' is
            the config itself); None stands for anything.

    Raises:
        UsageError: Names the key and similar ones.
    """
    for key in options:
        node, path = cfg, ''
        for name in key.split('.'):
            more = [found for pattern, found in names.items() if re.fullmatch(pattern, path)]
            is_new = node is ...  # a dict that the config does not have
            if None in more or isinstance(node, (list, tuple)) or (is_new and not more):
                break
            own = node if isinstance(node, Mapping) else {}
            known = dict.fromkeys([*own, *(each for found in more for each in found)])
            if name not in known and name != '_delete_':
                raise UsageError(f'--cfg-options: there is no {key!r}. {suggest(name, known)}')
            node, path = own.get(name, ...), f'{path}.{name}'.lstrip('.')


def _check_generation(given):
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    for key in given:
        if key not in known:
            raise UsageError(f'generation: GenerationConfig has no {key!r}. {suggest(key, known)}')
    try:
        GenerationConfig(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f'generation: {" ".join(str(error).split())}') from error


def check_run(cfg: Config, path: Path, resume: bool) -> None:
    """Refuse a run that is there and not resumed, or was started with other settings.

    Args:
        cfg: Of the run.
        path: Of the file that the run's recipe is written to.
        resume: Whether to go on with it.

    Raises:
        UsageError: Names the settings.
    """
    if not path.is_file():
        return
    if not resume:
        raise UsageError(f'{path.parent} has a run already. Add --resume, or another --work-dir.')
    there = Config.fromfile(path).to_dict()
    changed = sorted(k for k in there.keys() | cfg.keys() if there.get(k) != cfg.get(k))
    if changed:
        raise UsageError(
            f'The run in {path.parent} was started with another {" and ".join(changed)}. Resume it '
            f'with the settings in its {path.name}, or start anew in another --work-dir.'
        )


def adapt(model: nn.Module, cfg: Config, **arguments) -> Summary:
    """Inject a recipe's method, or several in a list, where the recipe says.

    Args:
        model: With its pretrained weights.
        cfg: With ``peft``, ``targets`` and ``frozen_dtype``; ``unfreeze`` if it has it.
        arguments: Further ones of :func:`mmpeft.inject`.
    """
    peft = cfg.peft.to_dict()
    targets = dict(module='') | cfg.targets.to_dict() | (peft.get('targets') or {})
    unfreeze = (*cfg.get('unfreeze', ()), *(peft.get('unfreeze') or ()))
    for each in injections(peft['method'], targets, unfreeze):
        summary = inject(model, **each, frozen_dtype=cfg.frozen_dtype, **arguments)
    return summary


def answered(
    path: Path, items: Sequence, batch: int, ask: Callable[[Sequence], Iterable[Mapping]]
) -> list[dict]:
    """Answer the questions that have no record yet; several processes may do so at once.

    Args:
        path: A file of JSON lines, one for each answer, with the question's ``number`` from 0.
        items: The questions.
        batch: How many are asked at once.
        ask: Returns the answers to some of them.

    Returns:
        The records of all, in the questions' order.

    Raises:
        UsageError: The file has answers to other questions.
    """
    found = {record.get('number', n): record for n, record in enumerate(read_journal(path))}
    left = [number for number in range(len(items)) if number not in found]
    if len(found) + len(left) > len(items):
        raise UsageError(
            f'{str(path)!r} has {len(found)} answers, and there are {len(items)} questions. Delete '
            'it, and they are asked again.'
        )
    for start in range(0, len(left), batch):
        numbers = left[start : start + batch]
        answers = ask([items[number] for number in numbers])
        for number, answer in zip(numbers, answers, strict=True):
            found[number] = dict(answer, number=number)
            append_record(path, found[number])
        print(f'{path.stem}: {len(found)} of {len(items)}', flush=True)
    return [found[number] for number in range(len(items))]
