"""Adapters in the Trainer of transformers, and in its checkpoints."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmpeft.checkpoint.adapter_file import load_adapter, save_adapter
from mmpeft.errors import MissingFileError, UsageError, suggest
from mmpeft.injection.site import adapter_parameters, named_adapters
from mmpeft.injection.wrappers import is_in_deepspeed, is_sharded, refuse_deepspeed
from mmpeft.training.allocation import allocate
from mmpeft.training.monitor import Monitor, adapted_model
from mmpeft.training.penalty import has_term

ADAPTER, STATE = 'adapter.safetensors', 'mmpeft.pt'


class PEFTCallback(TrainerCallback):
    """``Trainer(..., callbacks=[PEFTCallback()])`` trains a model after :func:`mmpeft.inject`.

    It is :func:`mmpeft.monitor` at the moments of a Trainer, with the steps of the run and with
    ``add_penalty=True``, since the Trainer computes the loss. Each checkpoint folder has an
    adapter file beside what the Trainer writes, and the state that a resumed run needs. Under
    DeepSpeed, which keeps gradients to itself, it writes adapter files alone, and says so.

    Args:
        save_adapters: Write ``adapter.safetensors`` (:func:`mmpeft.load_adapter`).
        resume_from: The folder that the Trainer resumes from, where it is not in ``output_dir``.
        options: Other arguments of :func:`mmpeft.monitor`.

    Attributes:
        monitor: From the start of training; None under DeepSpeed.

    Raises:
        UsageError: A method decides during training what it keeps, or has a term in the loss, and
            DeepSpeed trains the model.
    """

    def __init__(self, save_adapters: bool = True, resume_from: str | None = None, **options):
        self.save_adapters, self.resume_from = save_adapters, resume_from
        self.options = dict(add_penalty=True) | options
        self.monitor = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        if self.monitor is not None:
            self.monitor.detach()  # of a run that an exception ended
            self.monitor = None
        if is_in_deepspeed(model):
            check_unwatched(adapted_model(model), optimizer)
            return
        self.monitor = Monitor(model, optimizer, state.max_steps, **self.options)
        if state.global_step:
            path = Path(self.resume_from or _folder(args, state)) / STATE
            if not path.is_file():
                raise MissingFileError(
                    f'The Trainer resumes at step {state.global_step}, and there is no {path} with '
                    "the state of the adapters' training. Name the folder that it resumes from: "
                    'PEFTCallback(resume_from=...).'
                )
            stored = torch.load(path, map_location='cpu', weights_only=True)
            if stored.pop('adapters', None) not in (None, _digest(adapted_model(model))):
                raise UsageError(
                    f'{path} is of another run: its adapters were others than those that the '
                    'Trainer has loaded. Name the folder that it resumes from: '
                    'PEFTCallback(resume_from=...).'
                )
            self.monitor.load_state_dict(stored)

    def on_step_end(self, args, state, control, **_):
        if control.should_save and self.monitor:
            self.monitor.check()

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, model=None, **_):
        folder, writes = _folder(args, state), args.should_save  # which one process does
        if self.save_adapters and (writes or is_sharded(model)):  # all gather a sharded model
            save_adapter(adapted_model(model), folder / ADAPTER)
        if writes and self.monitor:
            own = dict(adapters=_digest(adapted_model(model)))
            torch.save(self.monitor.state_dict(look=False) | own, folder / STATE)

    def on_train_end(self, args, state, control, **_):
        if self.monitor:
            self.monitor.close()


class PEFTTrainer(Trainer):
    """A Trainer with a :class:`PEFTCallback`, whose checkpoints hold the adapter and no model.

    They resume a run, and ``load_best_model_at_end`` takes the adapter of the best one. The base
    may be in few bits (``frozen_dtype``), which the Trainer's own checkpoints cannot hold.
    DeepSpeed writes checkpoints of its own, which hold the base too.

    Args:
        model: After :func:`mmpeft.inject`.
        callback: None stands for ``PEFTCallback()``.
        arguments: Of ``transformers.Trainer``.
    """

    def __init__(self, model, *arguments, callback: PEFTCallback | None = None, **named):
        super().__init__(model, *arguments, **named)
        callback = callback or PEFTCallback()
        callback.save_adapters = False  # save_model does
        self.add_callback(callback)

    def create_optimizer(self):
        """The Trainer's; for DeepSpeed, which drops empty groups, without those."""
        optimizer = super().create_optimizer()
        if self.is_deepspeed_enabled:
            optimizer.param_groups = [g for g in optimizer.param_groups if g['params']]
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Write ``adapter.safetensors`` into a folder, ``output_dir`` of the arguments if None."""
        save_adapter(self.model_wrapped, Path(output_dir or self.args.output_dir) / ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_adapter(model or self.model, Path(resume_from_checkpoint) / ADAPTER)

    def _load_best_model(self):
        if self.is_deepspeed_enabled:  # from its own checkpoint
            return super()._load_best_model()
        return load_adapter(self.model, Path(self.state.best_model_checkpoint) / ADAPTER)


def training_arguments(folder: str | Path, given: Mapping, batch_size: int) -> TrainingArguments:
    """The Trainer's arguments for batches of one size, however many processes share them.

    The gradients of as many passes are summed as make up a batch.

    Args:
        folder: Where checkpoints go.
        given: Arguments of ``transformers.TrainingArguments``.
        batch_size: Examples of an optimizer step in all processes together.

    Raises:
        UsageError: An argument is unknown, or the processes do not divide the batch.
    """
    known = [field.name for field in fields(TrainingArguments)]
    for key in given:
        if key not in known:
            raise UsageError(f'training: TrainingArguments has no {key!r}. {suggest(key, known)}')
    arguments = TrainingArguments(str(folder), **given)
    at_once = arguments.train_batch_size * arguments.world_size
    if batch_size % at_once:
        raise UsageError(
            f'batch_size={batch_size} is not a multiple of the {at_once} examples that '
            f'{arguments.world_size} processes take at once. Set training.'
            'per_device_train_batch_size to another divisor.'
        )
    arguments.gradient_accumulation_steps = batch_size // at_once
    return arguments


def check_unwatched(model: nn.Module, optimizer: Optimizer) -> None:
    """Warn that DeepSpeed lets nobody watch a step.

    Raises:
        UsageError: A method has an allocator or a term in the loss, which need each step.
    """
    allocate(model, optimizer, 0)
    if any(map(has_term, named_adapters(model).values())):
        refuse_deepspeed(model, 'penalty')
    warnings.warn(
        'DeepSpeed keeps gradients to itself: PEFTCallback writes adapter files, and does not '
        'watch for adapters without a gradient, for NaN, or for changes of the frozen base.',
        stacklevel=2,
    )


def _digest(model):
    """A checksum of the adapters' parameters; None of those that are sharded."""
    if is_sharded(model):
        return None
    found = hashlib.sha256()
    for parameter in adapter_parameters(model):
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def _folder(args, state):
    return Path(args.output_dir) / f'checkpoint-{state.global_step}'
