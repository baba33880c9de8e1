"""How many parameters each row of the papers' tables trains, from the architectures alone."""

import copy
import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    PretrainedConfig,
    RobertaConfig,
)

import mmpeft
from mmpeft.errors import UsageError, suggest

from .models import adapt, hook_of
from .report import NAMES

PAPERS = Path(__file__).parents[1] / 'papers'
BASE = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
LARGE = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24)
ROBERTA = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
DEBERTA = dict(
    vocab_size=128100,
    max_position_embeddings=512,
    type_vocab_size=0,
    relative_attention=True,
    position_biased_input=False,
    pos_att_type='p2c|c2p',
    position_buckets=256,
    norm_rel_ebd='layer_norm',
    share_att_key=True,
)
ARCHITECTURES: dict[str, PretrainedConfig] = {
    'FacebookAI/roberta-base': RobertaConfig(**ROBERTA, **BASE),
    'FacebookAI/roberta-large': RobertaConfig(**ROBERTA, **LARGE),
    'microsoft/deberta-v3-base': DebertaV2Config(**DEBERTA, **BASE),
    'microsoft/deberta-v3-large': DebertaV2Config(**DEBERTA, **LARGE),
}


def read_paper(config: Mapping) -> dict[str, dict[str, float]]:
    """The rows of a config's table as the paper prints them, by the config's methods.

    Raises:
        UsageError: The config is of no paper's table.
    """
    if 'paper' not in config:
        raise UsageError("The config has no 'paper': it is of no table that was published.")
    with (PAPERS / f'{config["paper"]["table"]}.csv').open() as file:
        rows = {row.pop('method'): row for row in csv.DictReader(file)}
    return {name: {k: float(v) for k, v in row.items()} for name, row in rows.items()}


def count(config: Mapping) -> dict[str, int]:
    """The parameters that each method of a config trains in the encoder, without a head.

    They are counted on the meta device on one layer, times the number of layers. Of AdaLoRA they
    are those of the ranks that are left at the end.

    Raises:
        UsageError: The architecture is not one of ``ARCHITECTURES``.
    """
    name = config['model']
    if name not in ARCHITECTURES:
        raise UsageError(f'The sizes of {name!r} are not known. {suggest(name, ARCHITECTURES)}')
    architecture = copy.deepcopy(ARCHITECTURES[name])
    layers, architecture.num_hidden_layers = architecture.num_hidden_layers, 1
    with torch.device('meta'):
        model = AutoModelForSequenceClassification.from_config(architecture)
    found = {}
    for method in config['methods']:
        hook = hook_of(config['methods'], method)
        if hook['method']['type'] == 'AdaLoRA':
            hook['method'] = hook['method'] | dict(init_rank=hook['method']['rank'])
        adapt(model, hook)
        found[method] = sum(
            parameter.numel() * (layers if 'encoder.layer.' in path else 1)
            for path, parameter in model.base_model.named_parameters()
            if parameter.requires_grad
        )
        mmpeft.remove(model)
    return found


def shares(config: Mapping) -> str:
    """A paper's table in Markdown, with the parameters that each method trains and their share.

    Raises:
        UsageError: As :func:`count` and :func:`read_paper` do.
    """
    paper, counts = read_paper(config), count(config)
    lines = [
        f'| Method | Parameters | Share | Paper: share | {" | ".join(NAMES.values())} | Avg. |',
        f'| --- |{" ---: |" * (len(NAMES) + 4)}',
    ]
    for method, number in counts.items():
        values = [number / config['paper']['unit'], *paper[method].values()]
        cells = ' | '.join(f'{value:.2f}' for value in values)
        lines.append(f'| {method} | {number:,} | {cells} |')
    return '\n'.join(lines)
