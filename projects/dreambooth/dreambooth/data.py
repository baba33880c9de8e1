"""Images of the subject and of its class, and the latents that a frozen VAE gives of them."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import load_image
from mmengine.config import Config
from PIL.Image import Image
from torch import Tensor

from mmpeft.errors import MissingFileError, UsageError

from .models import Pipeline

ENDINGS = ('.jpg', '.jpeg', '.png', '.webp')
LIVE = ('cat', 'dog')


@dataclass(frozen=True)
class Latents:
    """What a UNet is trained on, of n images.

    Attributes:
        moments: Mean and logarithm of the variance, (n, 2 channels, height, width).
        sizes: SDXL's conditions, (n, 6) pixels: height and width of the image, rows and columns
            that were cropped above and to the left, height and width of what is left.
    """

    moments: Tensor
    sizes: Tensor


def image_files(folder: str | Path) -> list[Path]:
    """The images of a folder, in the order of their names."""
    return sorted(p for p in Path(folder).glob('*') if p.suffix.lower() in ENDINGS)


def read_images(folder: str | Path) -> list[Image]:
    """All images of a folder in RGB, upright, in the order of their names.

    Raises:
        MissingFileError: There is none.
    """
    files = image_files(folder)
    if not files:
        raise MissingFileError(
            f'There are no images in {str(folder)!r}. Name a folder with a few images of your '
            'subject (--images FOLDER), or get the papers\' subjects: "git clone '
            'https://github.com/google/dreambooth data/dreambooth".'
        )
    return [load_image(str(path)) for path in files]


@torch.no_grad()
def encode_images(pipeline: Pipeline, images: list[Image], side: int) -> Latents:
    """Latents of images whose centre is cut to a square of ``side`` pixels."""
    vae, sizes, moments = pipeline.vae, [], []
    for image in images:
        scaled = side / min(image.size)
        left, top = (round((length * scaled - side) / 2) for length in image.size)
        sizes.append((image.height, image.width, top, left, side, side))
        pixels = pipeline.image_processor.preprocess(image, side, side, resize_mode='crop')
        moments.append(vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters)
    return Latents(torch.cat(moments), torch.tensor(sizes, dtype=torch.float, device=vae.device))


def prompts_of(cfg: Config, name: str) -> list[str]:
    """Prompts with ``{}`` in place of a name: ``'sks cat'``, or ``'cat'``.

    Raises:
        UsageError: A prompt lacks ``{}``, or has other braces.
    """
    for text in (cfg.prompt, *cfg.prompts):
        if text.count('{}') != 1 or re.search('[{}]', text.replace('{}', '')):
            raise UsageError(
                f"The prompt {text!r} needs {{}} once, where the subject's name stands, and no "
                "other braces. Write such as 'a {} in the jungle'."
            )
    return [text.format(name) for text in cfg.prompts]


def subject_name(cfg: Config) -> str:
    """Identifier and class, such as ``'sks cat'``."""
    return f'{cfg.subject.token} {cfg.subject.class_name}'


def read_prompts(file: str | Path, class_name: str) -> list[str]:
    """Prompts with ``{}`` from a file with one a line, or from the data set of DreamBooth's paper.

    ``prompts_and_classes.txt`` of the latter has 25 for cats and dogs, and 25 for objects.

    Raises:
        MissingFileError: There is no such file.
    """
    if not Path(file).is_file():
        raise MissingFileError(
            f'There is no file {str(file)!r} with prompts. Name one with a prompt a line, such as '
            "'a {} in the jungle'."
        )
    text = Path(file).read_text()
    objects, _, live = text.partition('Live Subject Prompts')
    if not live:
        return [line.strip() for line in text.splitlines() if line.strip()]
    found = re.findall(r"'(.+)'\.format", live if class_name in LIVE else objects)
    return [prompt.replace('{0} {1}', '{}') for prompt in found]
