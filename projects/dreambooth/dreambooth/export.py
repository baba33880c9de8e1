"""Trained adapters for users of diffusers: as a plain model, or as a LoRA file."""

from pathlib import Path

from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.interop.peft_export import to_peft
from mmpeft.interop.peft_names import PREFIX

from .models import Pipeline


def save_merged(parts: dict[str, nn.Module], folder: str | Path) -> None:
    """Write ``FOLDER/unet`` and the like, which their class's ``from_pretrained`` reads.

    Raises:
        UsageError: The method acts on activations and cannot be merged.
    """
    for name, part in parts.items():
        mmpeft.save_pretrained(part, Path(folder) / name)


def save_lora(pipeline: Pipeline, parts: dict[str, nn.Module], folder: str | Path) -> None:
    """Write ``pytorch_lora_weights.safetensors``, which ``pipeline.load_lora_weights`` reads.

    Raises:
        UsageError: An adapter is neither LoRA nor DoRA, nor a sum that a LoRA equals.
    """
    layers = {}
    for name, part in parts.items():
        try:
            config, state = to_peft(part, inference=True, as_lora=True)
        except UsageError as error:
            raise UsageError(
                f'There is no LoRA file of this {name}: {error} --merged FOLDER writes the merged '
                'model, which diffusers reads by UNet2DConditionModel.from_pretrained.'
            ) from error
        layers[f'{name}_lora_layers'] = {k.removeprefix(PREFIX): v for k, v in state.items()}
        layers[f'{name}_lora_adapter_metadata'] = config
    pipeline.save_lora_weights(folder, **layers)
