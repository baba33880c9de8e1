"""What the command line changes of a recipe, and the model that it names."""

import argparse

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from mmengine.config import Config

from mmpeft.engine.key_values import KeyValues
from mmpeft.errors import MissingFileError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What changes a recipe in training and in evaluation."""
    parser.add_argument('--model', help='folder, or name at the Hugging Face Hub')
    parser.add_argument(
        '--cfg-options', nargs='+', action=KeyValues, help='key=value, as training.seed=1'
    )


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
