"""Pipelines of Stable Diffusion and SDXL, and adapters on their parts."""

import inspect
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from mmengine.config import Config
from torch import nn

import mmpeft
from mmpeft.engine.building import adapt
from mmpeft.engine.config import find_hook, print_on_master
from mmpeft.errors import MissingFileError, UsageError

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
# What a config's ``sampler`` may have.
SAMPLER = {
    name for kind in Pipeline.__args__ for name in inspect.signature(kind.__call__).parameters
}
PARTS = ('unet', 'text_encoder', 'text_encoder_2')


def load_pipeline(cfg: Config) -> Pipeline:
    """The frozen pipeline of a config: ``cfg.model``, in ``cfg.dtype``.

    Raises:
        MissingFileError: It is neither a folder of diffusers nor a name that can be read.
        UsageError: It is neither Stable Diffusion nor SDXL.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            cfg.model, torch_dtype=getattr(torch, cfg.dtype)
        )
    except (OSError, ValueError) as error:
        raise MissingFileError(unreadable('--model', cfg.model, 'a pipeline', error)) from error
    if not isinstance(pipeline, Pipeline):
        raise UsageError(
            f'{cfg.model!r} is a {type(pipeline).__name__}. Name a model of Stable Diffusion 1 or '
            '2, or of SDXL: --model stabilityai/stable-diffusion-xl-base-1.0.'
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unreadable(option: str, name: str, kind: str, error: Exception) -> str:
    """The paragraph on a model that is in no folder and cannot be fetched."""
    reason = str(error).strip().splitlines()[0].rstrip('.')
    return (
        f'{name!r} cannot be read as {kind} ({reason}). Where there is a network, write '
        f'"hf download {name} --local-dir FOLDER", and name the folder here: {option} FOLDER.'
    )


def adapted_parts(pipeline: Pipeline, cfg: Config) -> dict[str, nn.Module]:
    """What adapters change, by its name in the pipeline: the UNet, and ``cfg.text_encoders``."""
    names = PARTS if cfg.text_encoders else PARTS[:1]
    return {name: part for name in names if (part := getattr(pipeline, name, None)) is not None}


def inject(pipeline: Pipeline, cfg: Config) -> dict[str, nn.Module]:
    """Freeze a pipeline and adapt its parts as the config says.

    SDXL reads the last but one layer of its first text encoder, so that an adapter in the last
    one would get no gradient: it is left out.

    Raises:
        UsageError: See :func:`mmpeft.inject`.
    """
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False)
    parts = adapted_parts(pipeline, cfg)
    for name, part in parts.items():
        own = Config(cfg.to_dict())
        if name == 'text_encoder' and 'text_encoder_2' in parts:
            targets = find_hook(own).targets
            last = rf'layers\.{part.config.num_hidden_layers - 1}\.'
            targets.exclude = (*targets.get('exclude', ()), last)
        print_on_master(f'{name}: {adapt(part, own)}')
    return parts


def save_adapters(parts: dict[str, nn.Module], folder: Path) -> None:
    """One file a part, such as ``unet.safetensors``, which ``mmpeft.load_adapter`` reads."""
    for name, part in parts.items():
        mmpeft.save_adapter(part, folder / f'{name}.safetensors')


def load_adapters(parts: dict[str, nn.Module], folder: Path) -> None:
    """The reverse of :func:`save_adapters`, on parts with adapters or without."""
    for name, part in parts.items():
        mmpeft.load_adapter(part, folder / f'{name}.safetensors')
