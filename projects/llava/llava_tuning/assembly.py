"""Put LLaVA together from a language model, a vision tower and a projector, before it is tuned."""

import argparse
from pathlib import Path

import torch
import transformers

from mmpeft.errors import MissingFileError, UsageError

from .conversations import IMAGE

# LLaVA's names of the projector's weights, and those of transformers.
PROJECTOR = {
    f'model.mm_projector.{index}.{tensor}': f'{layer}.{tensor}'
    for index, layer in ((0, 'linear_1'), (2, 'linear_2'))
    for tensor in ('weight', 'bias')
}


def assemble(
    language: str, vision: str, projector: str | Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[transformers.LlavaForConditionalGeneration, transformers.LlavaProcessor]:
    """A LLaVA-1.5 whose projector alone is pretrained for it.

    Args:
        language: Folder or hub's name of a model of causal language.
        vision: Of a CLIP.
        projector: LLaVA's ``mm_projector.bin``.
        dtype: Of all weights.

    Returns:
        The model, and its processor, which pads images to squares in CLIP's mean colour.

    Raises:
        UsageError: A part is missing or does not fit.
    """
    weights = read_projector(projector)
    tokenizer = transformers.AutoTokenizer.from_pretrained(language)
    text = transformers.AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    tower = transformers.CLIPVisionModel.from_pretrained(vision, dtype=dtype)
    tokenizer.add_special_tokens(dict(additional_special_tokens=[IMAGE]))
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens(dict(pad_token='<pad>'))
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    config = transformers.LlavaConfig(tower.config, text.config, image_token_index=image_id)
    config.dtype = dtype
    with torch.device('meta'):
        model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = tower, text.model
    model.lm_head, model.generation_config = text.lm_head, text.generation_config
    own = model.model.multi_modal_projector
    shapes = {name: tuple(own.get_parameter(name).shape) for name in weights}
    if shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise UsageError(
            f'{str(projector)!r} does not fit {vision!r} and {language!r}, whose projector has '
            f'{shapes}.'
        )
    own.load_state_dict({k: w.to(dtype) for k, w in weights.items()}, assign=True)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    side = tower.config.image_size
    square = dict(height=side, width=side)
    images = transformers.LlavaImageProcessor(
        do_pad=True, size=dict(shortest_edge=side), crop_size=square
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy='default',
        num_additional_image_tokens=1,
    )
    return model, processor


def read_projector(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a ``mm_projector.bin`` under transformers' names.

    Raises:
        MissingFileError: There is no such file.
        UsageError: It holds other weights.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f'There is no projector {str(path)!r}. mm_projector.bin is at https://huggingface.co/'
            'liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5.'
        )
    weights = torch.load(path, map_location='cpu', weights_only=True)
    if set(weights) != set(PROJECTOR):
        raise UsageError(
            f'{str(path)!r} holds {sorted(weights)[:6]} in place of {sorted(PROJECTOR)}: give the '
            'mm_projector.bin of a projector of two layers (mlp2x_gelu).'
        )
    return {PROJECTOR[name]: weight for name, weight in weights.items()}


def main(arguments: list[str] | None = None) -> None:
    """The command line of assemble.py; ``arguments`` in place of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('projector', help='mm_projector.bin')
    parser.add_argument('--language', default='lmsys/vicuna-7b-v1.5')
    parser.add_argument('--vision', default='openai/clip-vit-large-patch14-336')
    parser.add_argument('--out', default='data/llava/vicuna-7b-clip336', help='a folder')
    args = parser.parse_args(arguments)
    try:
        parts = assemble(args.language, args.vision, args.projector)
    except OSError as error:
        if isinstance(error, UsageError):
            raise
        raise MissingFileError(
            f'{args.language!r} or {args.vision!r} is not here, nor could it be downloaded '
            f'({str(error).splitlines()[0]}). --language and --vision name folders.'
        ) from error
    for part in parts:
        part.save_pretrained(args.out)
    print(f'Written to {args.out}')
