"""Train a method on commonsense_170k, or on a file of its layout."""

import argparse
import math
import random
from pathlib import Path

import transformers
from mmengine.config import Config
from transformers.integrations import deepspeed
from transformers.trainer_utils import get_last_checkpoint

from mmpeft.engine.config import run_name
from mmpeft.engine.recipe import adapt, check_run, read_recipe
from mmpeft.errors import UsageError
from mmpeft.interop.transformers import PEFTTrainer, training_arguments

from .protocol import WHERE, prompt, read_items
from .recipe import add_arguments, load_base


def encode(
    item: dict[str, str],
    tokenizer: transformers.PreTrainedTokenizerBase,
    cutoff: int,
    train_on_prompt: bool,
) -> dict[str, list[int]]:
    """The tokens of a question and its output, with the end of the text if it fits.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, of ``cutoff`` tokens at most. Labels of
        the prompt are -100, which the loss leaves out, unless ``train_on_prompt``.
    """
    asked = prompt(item['instruction'], item['input'])
    encoded = tokenizer(
        asked + item['output'], truncation=True, max_length=cutoff, return_offsets_mapping=True
    )
    ids, ends = encoded['input_ids'], [end for _, end in encoded['offset_mapping']]
    if len(ids) < cutoff and ids[-1] != tokenizer.eos_token_id:
        ids, ends = [*ids, tokenizer.eos_token_id], [*ends, math.inf]
    labels = [
        token if train_on_prompt or end > len(asked) else -100
        for token, end in zip(ids, ends, strict=True)
    ]
    return dict(input_ids=ids, attention_mask=[1] * len(ids), labels=labels)


def train(cfg: Config, work_dir: Path, resume: bool = False) -> PEFTTrainer:
    """Train by a recipe; writes ``adapter.safetensors`` and ``recipe.py`` into ``work_dir``.

    Args:
        cfg: See :func:`~mmpeft.engine.recipe.read_recipe`.
        work_dir: For checkpoints too.
        resume: Go on from its last checkpoint, if there is one.

    Raises:
        UsageError: Model, data or an argument does not exist or fit.
        TrainingError: The run went wrong.
    """
    items = read_items(
        cfg.data,
        f'commonsense_170k.json is in the folder `ft-training_set` of {WHERE}; --data names '
        'where it is, or a file of your own of its layout.',
    )
    if not 0 <= cfg.held_out < len(items):
        raise UsageError(
            f'held_out={cfg.held_out} of the {len(items)} examples in {cfg.data!r} leave none to '
            'train on. Take fewer, or 0.'
        )
    given = cfg.training.to_dict()
    if not cfg.held_out:
        given |= dict(eval_strategy='no', load_best_model_at_end=False)
    arguments = training_arguments(work_dir, given, cfg.batch_size)
    deepspeed.unset_hf_deepspeed_config()  # whose stage 3 would shard what is not adapted yet
    if arguments.process_index == 0:
        check_run(cfg, work_dir / 'recipe.py', resume)
    tokenizer, model = load_base(cfg)
    encoded = [encode(item, tokenizer, cfg.cutoff, cfg.train_on_prompt) for item in items]
    cut = sum(len(example['input_ids']) == cfg.cutoff for example in encoded)
    labelled = [each for each in encoded if max(each['labels']) >= 0]
    if len(labelled) <= cfg.held_out:
        raise UsageError(
            f'cutoff={cfg.cutoff} leaves an answer to {len(labelled)} of the {len(encoded)} '
            f'examples, and held_out={cfg.held_out} of them do not train. Take a larger cutoff.'
        )
    if cut and arguments.process_index == 0:
        print(
            f'{cut} of {len(encoded)} examples reach the cutoff of {cfg.cutoff} tokens; '
            f'{len(encoded) - len(labelled)} without any of their answer are left out.'
        )
    encoded = labelled
    random.Random(arguments.seed).shuffle(encoded)
    transformers.set_seed(arguments.seed)  # of the adapters
    summary = adapt(model.to(arguments.device), cfg)
    if arguments.process_index == 0:
        print(summary)
        work_dir.mkdir(parents=True, exist_ok=True)
        cfg.dump(work_dir / 'recipe.py')
    if getattr(arguments, 'hf_deepspeed_config', None):
        deepspeed.set_hf_deepspeed_config(arguments.hf_deepspeed_config)
    trainer = PEFTTrainer(
        model,
        arguments,
        train_dataset=encoded[cfg.held_out :],
        eval_dataset=encoded[: cfg.held_out] or None,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
    )
    checkpoint = get_last_checkpoint(work_dir) if resume and work_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return trainer


def main(arguments: list[str] | None = None) -> None:
    """The command line of train.py; ``arguments`` in place of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a file of projects/commonsense/configs')
    parser.add_argument('--method', help='a file of configs/_base_/methods, or a dict')
    add_arguments(parser)
    parser.add_argument('--data', help='the training file')
    parser.add_argument('--work-dir', type=Path, help='in work_dirs/commonsense by default')
    parser.add_argument('--resume', action='store_true', help='go on from the last checkpoint')
    args = parser.parse_args(arguments)
    cfg = read_recipe(args.config, args.method, args.cfg_options, model=args.model, data=args.data)
    folder = Path('work_dirs/commonsense', run_name(args.config, args.method))
    train(cfg, args.work_dir or folder, args.resume)
