"""Images from prompts, and a sheet that shows them before and after training."""

from collections.abc import Iterator, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from .models import Pipeline


def generate(
    pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], side: int, **sampler
) -> Iterator[Image.Image]:
    """One image for each seed of each prompt, in turn, the same on every device.

    Args:
        pipeline: With adapters or without.
        prompts: Whole ones.
        seeds: Each starts the noise of one image a prompt.
        side: Of the images, pixels.
        sampler: Other arguments of the pipeline, such as ``num_inference_steps``.
    """
    for prompt in prompts:
        for seed in seeds:
            noise = torch.Generator().manual_seed(seed)
            yield pipeline(prompt, height=side, width=side, generator=noise, **sampler).images[0]


def sheet(
    prompts: Sequence[str],
    seeds: Sequence[int],
    rows: dict[str, list[Image.Image]],
    side: int = 256,
) -> Image.Image:
    """All images beside each other: a column a seed, and under each prompt a row a name.

    Args:
        prompts: Written above their images.
        seeds: Written above the columns.
        rows: By name, such as ``before``, the images that :func:`generate` gave.
        side: Of an image on the sheet, pixels.
    """
    line, margin = 24, 90
    font = ImageFont.load_default(size=16)
    height = line + len(prompts) * (line + len(rows) * side)
    width = margin + max(len(seeds) * side, *(int(font.getlength(text)) for text in prompts))
    page = Image.new('RGB', (width, height), 'white')
    draw = ImageDraw.Draw(page)
    for column, seed in enumerate(seeds):
        draw.text((margin + column * side, 2), f'seed {seed}', 'black', font)
    for number, prompt in enumerate(prompts):
        top = line + number * (line + len(rows) * side)
        draw.text((margin, top + 2), prompt, 'black', font)
        for row, (name, images) in enumerate(rows.items()):
            y = top + line + row * side
            draw.text((8, y + side // 2), name, 'black', font)
            for column, image in enumerate(images[number * len(seeds) :][: len(seeds)]):
                page.paste(image.resize((side, side)), (margin + column * side, y))
    return page
