"""How much generated images are like the subject and the prompt, as DreamBooth's Sec. 4.2 says.

CLIP-I, DINO   mean cosine of the features of generated and real images, over all pairs
CLIP-T         mean cosine of the features of an image and its prompt, without the identifier
"""

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

from mmpeft.errors import MissingFileError

from .models import unreadable


def read(kind: type, option: str, name: str):
    """A model or a processor of transformers.

    Raises:
        MissingFileError: It is in no folder and cannot be fetched.
    """
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise MissingFileError(unreadable(option, name, 'a model', error)) from error


class Clip:
    """Features of images (n, channels) and of prompts, of length 1, by CLIP."""

    def __init__(self, name: str = 'openai/clip-vit-base-patch32'):
        self.model = read(CLIPModel, '--clip', name).eval()
        self.processor = read(AutoImageProcessor, '--clip', name)
        self.tokenizer = read(CLIPTokenizer, '--clip', name)

    @torch.no_grad()
    def images(self, images: list[Image]) -> Tensor:
        pixels = self.processor(images, return_tensors='pt')
        return normalize(self.model.get_image_features(**pixels), dim=1)

    @torch.no_grad()
    def prompts(self, prompts: list[str]) -> Tensor:
        words = self.tokenizer(prompts, padding=True, truncation=True, return_tensors='pt')
        return normalize(self.model.get_text_features(**words), dim=1)


class Dino:
    """Features of images (n, channels), of length 1: DINO's class token."""

    def __init__(self, name: str = 'facebook/dino-vits16'):
        self.model = read(AutoModel, '--dino', name).eval()
        self.processor = read(AutoImageProcessor, '--dino', name)

    @torch.no_grad()
    def images(self, images: list[Image]) -> Tensor:
        pixels = self.processor(images, return_tensors='pt')
        return normalize(self.model(**pixels).last_hidden_state[:, 0], dim=1)


def likeness(generated: Tensor, real: Tensor) -> float:
    """Mean cosine over all pairs of features of length 1."""
    return (generated @ real.T).mean().item()


def likeness_among(real: Tensor) -> float:
    """The same over all pairs of two or more real images, which bounds what can be reached."""
    count = len(real)
    return ((real @ real.T).sum() - count).item() / (count * (count - 1))


def agreement(images: Tensor, prompts: Tensor) -> float:
    """Mean cosine of each image with its own prompt, features of length 1."""
    return (images * prompts).sum(1).mean().item()
