"""Sentence classifiers of transformers, adapted."""

import hashlib
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import transformers
from torch import nn
from transformers.utils import cached_file

import mmpeft
from mmpeft.engine.injections import injections
from mmpeft.engine.method_argument import is_name, method_files, read_method
from mmpeft.errors import UsageError, suggest


@contextmanager
def _found(name):
    try:
        yield
    except Exception as error:  # its type depends on the network, and on the folder
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UsageError(
            f'The model {name!r} cannot be read: {reason.rstrip(".")}. Where there is a network, '
            f'"hf download {name} --local-dir models/{name.rsplit("/")[-1]}" downloads one; then '
            'name the folder with --model, or any with a config, weights and a tokenizer of '
            'transformers.'
        ) from error


def read_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model on the Hugging Face hub, or in a folder.

    Raises:
        UsageError: There is none.
    """
    with _found(name):
        return transformers.AutoTokenizer.from_pretrained(name)


def read_model(name: str, outputs: int) -> transformers.PreTrainedModel:
    """A pretrained encoder with a new head.

    Args:
        name: On the Hugging Face hub, or a folder.
        outputs: Classes, or 1 for a regression.

    Raises:
        UsageError: There is no such model, or transformers has no classifier of its kind.
    """
    with _found(name):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=outputs
        )
    return mark_pooler(model)


@cache
def weights_sha256(name: str) -> str | None:
    """The digest of the file that holds a pretrained model's weights; None if several do.

    Raises:
        UsageError: There is no such model.
    """
    with _found(name):
        for file in 'model.safetensors', 'pytorch_model.bin':
            path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def mark_pooler(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Take the pooler that some encoders hold, BERT's for one, for a part of the new head."""
    encoder = model.base_model
    if getattr(encoder, 'pooler', None) is not None:
        encoder.newly_initialized = ('pooler',)
    return model


def hook_of(methods: Mapping, name: str) -> dict:
    """``method``, ``targets`` and ``unfreeze`` of a config's method, or of ``--method``.

    Args:
        methods: Of a config: ``lora_r2=dict(method='lora', arguments=dict(rank=2))``, with
            ``targets`` beside them if need be.
        name: One of them, or what ``--method`` takes everywhere.

    Raises:
        UsageError: It is neither.
    """
    files = method_files()
    if name not in (*methods, *files) and is_name(name):
        raise UsageError(f'There is no method {name!r}. {suggest(name, [*methods, *files])}')
    entry = methods.get(name, dict(method=name))
    hook = dict(read_method(entry['method']))
    if entry.get('arguments'):
        hook['method'] = hook['method'] | dict(entry['arguments'])
    return hook | dict(targets=entry['targets']) if 'targets' in entry else hook


def adapt(model: transformers.PreTrainedModel, hook: Mapping) -> int:
    """Put a method, or several in a list, into a classifier's encoder; its head trains.

    Returns:
        The parameters that train in the encoder, without a pooler's.
    """
    encoder = model.base_model_prefix
    targets = dict(hook.get('targets') or {}, module=encoder)
    for each in injections(hook['method'], targets, hook.get('unfreeze', ())):
        mmpeft.inject(model, **each)
    return trained(model.base_model)


def trained(encoder: nn.Module) -> int:
    """The parameters that train in an encoder, without those that are newly initialized."""
    new = {
        id(p)
        for name in getattr(encoder, 'newly_initialized', ())
        for p in getattr(encoder, name).parameters()
    }
    return sum(p.numel() for p in encoder.parameters() if p.requires_grad and id(p) not in new)
