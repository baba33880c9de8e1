"""Tune LLaVA on conversations on images, with adapters in its language model."""

import argparse
from pathlib import Path

import torch
import transformers
from mmengine.config import Config
from transformers.trainer_utils import get_last_checkpoint

from mmpeft.engine.config import run_name
from mmpeft.engine.recipe import adapt, check_run, read_recipe
from mmpeft.interop.transformers import PEFTTrainer, training_arguments

from .conversations import Collator, Conversations, read_conversations
from .recipe import add_arguments, load_base


def build_optimizer(model: torch.nn.Module, cfg: Config) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for the projector."""
    groups = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups['multi_modal_projector' in name].append(parameter)
    rates = cfg.training.learning_rate, cfg.projector_rate
    return torch.optim.AdamW(
        [dict(params=group, lr=rate) for group, rate in zip(groups, rates, strict=True)],
        weight_decay=cfg.training.weight_decay,
    )


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
    items = read_conversations(cfg.data, cfg.images)
    # The Trainer would take the pixels for an argument that a text has no use for.
    given = cfg.training.to_dict() | dict(remove_unused_columns=False)
    arguments = training_arguments(work_dir, given, cfg.batch_size)
    if arguments.process_index == 0:
        check_run(cfg, work_dir / 'recipe.py', resume)
    processor, model = load_base(cfg)
    transformers.set_seed(arguments.seed)  # of the adapters
    summary = adapt(model.to(arguments.device), cfg)
    if arguments.process_index == 0:
        print(summary)
        work_dir.mkdir(parents=True, exist_ok=True)
        cfg.dump(work_dir / 'recipe.py')
    trainer = PEFTTrainer(
        model,
        arguments,
        train_dataset=Conversations(items, cfg.images, processor, cfg.cutoff),
        data_collator=Collator(processor.tokenizer),
        optimizers=(build_optimizer(model, cfg), None),
    )
    checkpoint = get_last_checkpoint(work_dir) if resume and work_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return trainer


def main(arguments: list[str] | None = None) -> None:
    """The command line of train.py; ``arguments`` in place of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a file of projects/llava/configs')
    parser.add_argument('--method', help='a file of configs/_base_/methods, or a dict')
    add_arguments(parser)
    parser.add_argument('--work-dir', type=Path, help='in work_dirs/llava by default')
    parser.add_argument('--resume', action='store_true', help='go on from the last checkpoint')
    args = parser.parse_args(arguments)
    paths = dict(model=args.model, data=args.data, images=args.images)
    cfg = read_recipe(args.config, args.method, args.cfg_options, **paths)
    folder = Path('work_dirs/llava', run_name(args.config, args.method))
    train(cfg, args.work_dir or folder, args.resume)
