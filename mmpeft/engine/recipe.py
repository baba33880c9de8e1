"""Recipes of runs without a Runner: configs with ``peft`` of a method file, and ``targets``."""

from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config, ConfigDict
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.injection.inject import inject
from mmpeft.injection.summary import Summary

from .config import read_config
from .injections import injections
from .key_values import check_options
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
        from mmpeft.interop.generation import check_generation

        check_generation(cfg.generation)
    return cfg


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
