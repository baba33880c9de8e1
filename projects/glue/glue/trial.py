"""One run: a method on a task, with a seed."""

import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import transformers

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.interop.transformers import PEFTCallback

from .data import Texts
from .models import adapt, hook_of, read_model, read_tokenizer, weights_sha256
from .tasks import score

# Of a config's ``training`` and its like.
ARGUMENTS = (*(field.name for field in fields(transformers.TrainingArguments)), 'max_length')
PACKAGES = ('mmpeft', 'torch', 'transformers', 'datasets')


@dataclass(frozen=True)
class Trial:
    """What is run.

    Attributes:
        task: Of GLUE, or the folder of a data set of one's own.
        method: Of the config, or what ``--method`` takes.
        seed: Of the head, the adapters, the order and, where a config limits them, the choice of
            the training rows.
        stage: ``'final'`` trains on the training rows and scores the task's splits; ``'tune'``
            trains on a part of the training rows and scores others of them.
        learning_rate: In place of the config's.
    """

    task: str
    method: str
    seed: int
    stage: str = 'final'
    learning_rate: float | None = None

    @property
    def id(self) -> str:
        return ' '.join(map(str, asdict(self).values()))


def settings(config: Mapping, trial: Trial) -> dict:
    """The arguments of transformers' Trainer, and ``max_length``, the tokens of a row.

    They are a config's ``training``, its ``tasks`` (``own`` for a data set of one's own), the
    method's ``training`` and, in tuning, ``tuning['training']``; the later ones win.
    """
    tasks = config['tasks']
    layers = [config['training'], tasks.get(trial.task) or tasks.get('own') or {}]
    layers.append(config['methods'].get(trial.method, {}).get('training', {}))
    if trial.stage == 'tune':
        layers.append(config['tuning'].get('training', {}))
    found = {key: value for layer in layers for key, value in layer.items()}
    if trial.learning_rate is not None:
        found['learning_rate'] = trial.learning_rate
    return found


def sizes(config: Mapping, trial: Trial, available: float) -> dict[str, float]:
    """How many of the ``available`` training rows train and, in tuning, are scored.

    A config's ``rows`` limits how many rows train. In tuning, ``tuning['rows']`` rows train and
    ``tuning['held_out']`` others are scored.
    """
    if trial.stage == 'tune':
        return dict(train=config['tuning']['rows'], held_out=config['tuning']['held_out'])
    return dict(train=min(config.get('rows') or available, available))


def choose_rows(config: Mapping, trial: Trial, texts: Texts) -> dict:
    """The splits of a trial: ``train``, and what it scores, drawn by the seed.

    Raises:
        UsageError: Tuning takes more rows than there are.
    """
    train = texts.splits['train']
    size, held_out = (sizes(config, trial, len(train)).get(k, 0) for k in ('train', 'held_out'))
    if trial.stage == 'tune':
        if size + held_out > len(train):
            raise UsageError(
                f'Tuning trains on {size} rows and scores {held_out}, and {trial.task!r} has '
                f'{len(train)} to train. Take fewer: --cfg-options tuning.rows=... '
                'tuning.held_out=...'
            )
        # seeds of final runs count from 0
        drawn = train.shuffle(1000 + trial.seed).select(range(size + held_out))
        return dict(train=drawn.select(range(size)), held_out=drawn.select(range(size, len(drawn))))
    if config.get('rows'):
        train = train.shuffle(trial.seed).select(range(size))
    return dict(texts.splits, train=train)


class Encoded:
    """Tokenizes rows as a classifier of sentences reads them.

    Args:
        tokenizer: Of the model.
        texts: Names the columns.
        max_length: Tokens at most.
    """

    def __init__(self, tokenizer, texts: Texts, max_length: int):
        self.tokenizer, self.task, self.max_length = tokenizer, texts.task, max_length

    def __call__(self, rows):
        """A split with ``input_ids`` and their like, and ``labels``."""

        def encode(batch):
            columns = [batch[name] for name in self.task.sentences]
            found = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
            return dict(found, labels=batch[self.task.label])

        return rows.map(encode, batched=True, remove_columns=rows.column_names)


def make_trainer(
    model, tokenizer, folder: Path, train=None, callbacks=(), **arguments
) -> transformers.Trainer:
    """transformers' Trainer, silent, without files of its own unless its arguments say so.

    Raises:
        UsageError: It has no such argument, or refuses a value.
    """
    ours = dict(
        save_strategy='no',
        report_to=[],
        disable_tqdm=True,
        logging_strategy='epoch',
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    try:
        arguments = transformers.TrainingArguments(str(folder), **ours | arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f'training: {error}. It takes the arguments of transformers.TrainingArguments, and '
            "'max_length'."
        ) from error
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=train,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=list(callbacks),
    )


def predict(trainer: transformers.Trainer, split) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (N, classes), or (N, 1), and labels (N,) of a tokenized split."""
    found = trainer.predict(split)
    return found.predictions.reshape(len(split), -1), found.label_ids


def run_trial(
    config: Mapping, trial: Trial, texts: Texts, model_name: str, folder: Path, save: bool = False
) -> dict:
    """Train a method and score it after the last epoch.

    Args:
        config: Of ``configs/``.
        trial: What is run.
        texts: Its data.
        model_name: On the Hugging Face hub, or a folder.
        folder: For ``adapter.safetensors``, if ``save``, and what the Trainer writes.
        save: Write the adapter.

    Returns:
        ``scores`` by split and metric, ``losses`` of the epochs, ``parameters`` that train in the
        encoder, ``seconds`` of the processor's time, and all that makes the run again.

    Raises:
        UsageError: The config, the method, the model or the data is not as it has to be.
        TrainingError: The run went wrong.
    """
    start = time.process_time()
    arguments = settings(config, trial)
    length = arguments.pop('max_length')
    hook = hook_of(config['methods'], trial.method)
    rows = choose_rows(config, trial, texts)
    tokenizer = read_tokenizer(model_name)
    transformers.set_seed(trial.seed)
    model = read_model(model_name, len(texts.classes) if texts.classes else 1)
    parameters = adapt(model, hook)
    encoded = Encoded(tokenizer, texts, length)
    trainer = make_trainer(
        model,
        tokenizer,
        folder,
        encoded(rows['train']),
        [PEFTCallback(save_adapters=False)],
        **arguments,
        seed=trial.seed,
    )
    trainer.train()
    scores = {
        name: score(texts.task, *predict(trainer, encoded(split)))
        for name, split in rows.items()
        if name != 'train'
    }
    if save:
        mmpeft.save_adapter(model, folder / 'adapter.safetensors')
    return dict(
        asdict(trial),
        scores=scores,
        losses=[round(log['loss'], 4) for log in trainer.state.log_history if 'loss' in log],
        parameters=parameters,
        seconds=round(time.process_time() - start, 1),
        model=model_name,
        hook=hook,
        training=dict(arguments, max_length=length),
        rows={name: len(split) for name, split in rows.items()},
        available=len(texts.splits['train']),
        sha256=dict(model=weights_sha256(model_name), data=texts.sha256),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        device=str(trainer.args.device),
        date=time.strftime('%Y-%m-%d'),
    )
