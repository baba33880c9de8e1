"""A recipe: a config, what the command line changes of it, and the model that it names."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from mmengine.config import Config, ConfigDict, DictAction

import mmpeft
from mmpeft.engine.config import read_config
from mmpeft.engine.method_argument import read_method
from mmpeft.errors import MissingFileError, UsageError, near


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What changes a recipe in training and in evaluation."""
    parser.add_argument('--model', help='folder, or name at the Hugging Face Hub')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='key=value, as training.seed=1'
    )


def read_recipe(
    config: str | Path, method: str | None = None, options: Mapping | None = None, **given
) -> Config:
    """Read a config of the project.

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
    for key in options:
        if key.split('.')[0] not in cfg:
            raise UsageError(f'--cfg-options: there is no {key!r}. {near(key, cfg)}')
    if method is not None:
        cfg.peft = ConfigDict(read_method(method))
    cfg.merge_from_dict(options)
    return cfg


def load_base(
    cfg: Config,
) -> tuple[transformers.PreTrainedTokenizerBase, transformers.PreTrainedModel]:
    """The tokenizer, which pads on the left, and the pretrained model of a recipe.

    Raises:
        MissingFileError: There is no such model, or it cannot be downloaded.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model, padding_side='left')
        model = transformers.AutoModelForCausalLM.from_pretrained(
            cfg.model, dtype=getattr(torch, cfg.dtype)
        )
    except (OSError, HFValidationError) as error:
        raise MissingFileError(
            f'There is no model {cfg.model!r} here, nor could it be downloaded '
            f'({str(error).splitlines()[0]}). Where there is a network, '
            f'`hf download {cfg.model} --local-dir FOLDER` gets it (for some models after '
            '`hf auth login`); then write --model FOLDER.'
        ) from error
    if tokenizer.pad_token is None:  # its value is masked everywhere
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer, model


def adapt(model: torch.nn.Module, cfg: Config, **arguments) -> mmpeft.injection.summary.Summary:
    """Inject the recipe's method where the recipe says; ``arguments`` are further ones."""
    peft = cfg.peft
    return mmpeft.inject(
        model,
        peft.method.to_dict(),
        cfg.targets.to_dict() | dict(peft.get('targets') or {}),
        unfreeze=peft.get('unfreeze') or (),
        frozen_dtype=cfg.frozen_dtype,
        **arguments,
    )
