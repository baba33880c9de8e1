"""Let an adapted model answer the test sets, and print its row of the table."""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from mmengine.config import Config

import mmpeft
from mmpeft.engine.answers import answered
from mmpeft.engine.recipe import adapt, read_recipe
from mmpeft.errors import MissingFileError, UsageError, suggest

from .protocol import SETS, extract_answer, prompt, read_set
from .recipe import add_arguments, load_base


@torch.no_grad()
def generate(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: list[str],
    **generation,
) -> list[str]:
    """What a model writes behind each prompt; ``generation`` are GenerationConfig's arguments."""
    inputs = tokenizer(prompts, return_tensors='pt', padding=True, return_token_type_ids=False).to(
        model.device
    )
    config = transformers.GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **generation
    )
    ids = model.generate(**inputs, generation_config=config)
    new = ids[:, inputs['input_ids'].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def accuracy(records: list[dict]) -> float:
    """Percent of the records whose found answer is the right one."""
    return 100 * sum(r['found'] == r['answer'] for r in records) / len(records)


def table(label: str, share: float, scores: dict[str, float]) -> Iterator[str]:
    """The lines of a table as LieRA's Table 3: a head, and a row.

    Args:
        label: Of the row.
        share: Parameters of the adapters over those of the base.
        scores: Percent by set; the average is there if all are.
    """
    yield f'| Method | Params | {" | ".join(title for title, _ in SETS.values())} | Avg. |'
    yield f'|---|---|{"---|" * (len(SETS) + 1)}'
    cells = [f'{scores[name]:.1f}' if name in scores else '' for name in SETS]
    whole = scores.keys() == SETS.keys()
    average = f'{sum(scores.values()) / len(SETS):.1f}' if whole else ''
    yield f'| {label} | {share:.2%} | {" | ".join(cells)} | {average} |'


def evaluate(
    cfg: Config, run: Path, names: list[str], batch: int, merge: bool = True
) -> dict[str, float]:
    """Answer sets with a run's adapter and print the row; what has a record is not asked again.

    The records are in a folder of the run that is named by what makes the answers.

    Args:
        cfg: The run's ``recipe.py``, with the folders of this machine.
        run: The run's folder.
        names: Of the sets.
        batch: Questions at once.
        merge: Fold the adapter into the weights first, which makes decoding faster.

    Returns:
        Percent of right answers by set.

    Raises:
        UsageError: A file does not exist or fit.
    """
    questions = {name: read_set(cfg.sets, name) for name in names}
    adapter = run / 'adapter.safetensors'
    tokenizer, model = load_base(cfg)
    model.to('cuda' if torch.cuda.is_available() else 'cpu').eval()
    summary = adapt(model, cfg, empty=True)
    mmpeft.load_adapter(model, adapter)
    if merge:
        mmpeft.merge(model)
    settings = [cfg.model, cfg.dtype, cfg.frozen_dtype, cfg.generation.to_dict(), merge]
    digest = hashlib.sha256(json.dumps(settings).encode() + adapter.read_bytes()).hexdigest()
    scores = {}
    for name, items in questions.items():
        asked = hashlib.sha256(json.dumps(items).encode()).hexdigest()
        path = run / f'answers-{digest[:12]}' / f'{name}-{asked[:8]}.jsonl'

        def ask(items, possible=SETS[name][1]):
            prompts = [prompt(item['instruction'], item['input']) for item in items]
            texts = generate(model, tokenizer, prompts, **cfg.generation)
            for item, text in zip(items, texts, strict=True):
                found = extract_answer(text, possible)
                yield dict(text=text, found=found, answer=item['answer'])

        scores[name] = accuracy(answered(path, items, batch, ask))
    for line in table(summary.rows[0].method, summary.share, scores):
        print(line)
    return scores


def main(arguments: list[str] | None = None) -> None:
    """The command line of evaluate.py; ``arguments`` in place of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=Path, help='the work directory of train.py')
    add_arguments(parser)
    parser.add_argument('--sets', help='the folder with a folder for each test set')
    parser.add_argument('--only', nargs='+', default=list(SETS), help='names of sets')
    parser.add_argument('--batch', type=int, default=8, help='questions at once')
    parser.add_argument(
        '--no-merge', action='store_true', help='decode with the adapter beside the weights'
    )
    args = parser.parse_args(arguments)
    for name in args.only:
        if name not in SETS:
            raise UsageError(f'--only: there is no set {name!r}. {suggest(name, SETS)}')
    recipe = args.run / 'recipe.py'
    if not recipe.is_file():
        raise MissingFileError(
            f'{str(args.run)!r} is not a work directory of train.py: it has no recipe.py.'
        )
    cfg = read_recipe(recipe, options=args.cfg_options, model=args.model, sets=args.sets)
    evaluate(cfg, args.run, args.only, args.batch, not args.no_merge)
