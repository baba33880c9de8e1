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
    parser.add_argument('--data', help='conversations in a JSON file')
    parser.add_argument('--images', help='the folder that their paths begin in')
    parser.add_argument(
        '--cfg-options', nargs='+', action=KeyValues, help='key=value, as training.seed=1'
    )


def load_base(
    cfg: Config,
) -> tuple[transformers.ProcessorMixin, transformers.LlavaForConditionalGeneration]:
    """The processor, which pads on the left, and the model, its projector in float32.

    Raises:
        MissingFileError: There is no such model, or it cannot be downloaded.
    """
    try:
        processor = transformers.AutoProcessor.from_pretrained(cfg.model, padding_side='left')
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            cfg.model, dtype=getattr(torch, cfg.dtype)
        )
    except (OSError, HFValidationError) as error:
        raise MissingFileError(
            f'There is no model {cfg.model!r} here, nor could it be downloaded '
            f'({str(error).splitlines()[0]}). projects/llava/assemble.py makes it of a language '
            'model, a vision tower and a projector; --model names another folder.'
        ) from error
    model.model.multi_modal_projector.float()
    return processor, model
