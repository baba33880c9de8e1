"""Let a tuned model answer questions on images, and count exact answers."""

import argparse
import hashlib
import json
from pathlib import Path

import torch
import transformers
from mmengine.config import Config

import mmpeft
from mmpeft.engine.answers import answered
from mmpeft.engine.recipe import adapt, read_recipe
from mmpeft.errors import MissingFileError

from .conversations import open_image, read_conversations, render
from .recipe import add_arguments, load_base


@torch.no_grad()
def answer(model, processor, item: dict, images: str | Path, **generation) -> str:
    """What a model answers to the first question of a conversation.

    Args:
        model: In evaluation mode.
        processor: Its own.
        item: See :func:`~.conversations.read_conversations`.
        images: The folder that paths begin in.
        generation: Arguments of transformers.GenerationConfig.
    """
    tokenizer = processor.tokenizer
    text, _ = render(item['conversations'][:1], tokenizer.eos_token)
    inputs = processor(images=open_image(item, images), text=text, return_tensors='pt')
    used = ('input_ids', 'attention_mask', 'pixel_values')
    inputs = {k: v.to(model.device) for k, v in inputs.items() if k in used}
    if 'pixel_values' in inputs:
        inputs['pixel_values'] = inputs['pixel_values'].to(model.dtype)
    config = transformers.GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **generation
    )
    ids = model.generate(**inputs, generation_config=config)
    return tokenizer.decode(ids[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)


def is_exact(text: str, expected: str) -> bool:
    """Whether an answer is the expected one, whatever its case and a last full stop."""
    text, expected = (t.strip().rstrip('.').lower() for t in (text, expected))
    return text == expected


def evaluate(cfg: Config, run: Path, merge: bool = True) -> float:
    """Answer the recipe's data with a run's adapter; what has a record is not asked again.

    The records are in a file of the run that is named by what makes the answers.

    Args:
        cfg: The run's ``recipe.py``, with questions for ``data``.
        run: The run's folder.
        merge: Fold the adapter into the weights first, which makes decoding faster.

    Returns:
        Percent of exact answers to the first questions.

    Raises:
        UsageError: A file does not exist or fit.
    """
    items, adapter = read_conversations(cfg.data, cfg.images), run / 'adapter.safetensors'
    processor, model = load_base(cfg)
    model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()
    adapt(model, cfg, empty=True)
    mmpeft.load_adapter(model, adapter)
    if merge:
        mmpeft.merge(model)
    model.model.multi_modal_projector.to(getattr(torch, cfg.dtype))
    settings = [cfg.model, cfg.dtype, cfg.frozen_dtype, cfg.generation.to_dict(), merge]
    made_by = hashlib.sha256(json.dumps(settings).encode())
    images = {item['image'] for item in items if item.get('image')}
    for path in adapter, Path(cfg.data), *(Path(cfg.images, name) for name in sorted(images)):
        made_by.update(path.read_bytes())
    path = run / f'{Path(cfg.data).stem}-{made_by.hexdigest()[:12]}.jsonl'

    def ask(items):
        for item in items:
            text = answer(model, processor, item, cfg.images, **cfg.generation)
            expected = item['conversations'][1]['value']
            yield dict(id=item.get('id'), text=text, answer=expected)

    records = answered(path, items, 100, ask)
    exact = sum(is_exact(record['text'], record['answer']) for record in records)
    print(f'{exact} of {len(records)} exact = {exact / len(records):.1%}; answers: {path}')
    return 100 * exact / len(records)


def main(arguments: list[str] | None = None) -> None:
    """The command line of evaluate.py; ``arguments`` in place of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=Path, help='the work directory of train.py')
    add_arguments(parser)
    parser.add_argument(
        '--no-merge', action='store_true', help='decode with the adapter beside the weights'
    )
    args = parser.parse_args(arguments)
    recipe = args.run / 'recipe.py'
    if not recipe.is_file():
        raise MissingFileError(
            f'{str(args.run)!r} is not a work directory of train.py: it has no recipe.py.'
        )
    paths = dict(model=args.model, data=args.data, images=args.images)
    cfg = read_recipe(recipe, options=args.cfg_options, **paths)
    evaluate(cfg, args.run, not args.no_merge)
