"""Parameter counts against Subspace tuning's tables 2 to 4 (arXiv:2407.05417).

Their percentages are per mille (full fine-tuning has 1000%) of the sizes that
the models go by: 125, 184 and 355 million.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn

import mmpeft


class Block(nn.Module):
    """A transformer layer of BERT's kind, its parameters alone."""

    def __init__(self, width, hidden):
        super().__init__()
        self.attention = nn.Module()
        for name in ('query', 'key', 'value', 'dense'):
            setattr(self.attention, name, nn.Linear(width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)


class Encoder(nn.Module):
    """Embeddings with one norm, and transformer layers."""

    def __init__(self, depth, width, entries):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, width) for n in entries)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Block(width, 4 * width) for _ in range(depth))


@dataclass(frozen=True)
class Model:
    """A language model and its published size.

    Attributes:
        depth: Layers.
        width: Channels.
        entries: Of its embeddings: words, positions and types.
        millions: The size that it goes by.
    """

    depth: int
    width: int
    entries: tuple[int, ...]
    millions: int

    def build(self, depth):
        """On the meta device, with the head of a sentence classifier."""
        with torch.device('meta'):
            head = nn.Sequential(nn.Linear(self.width, self.width), nn.Linear(self.width, 2))
            encoder = Encoder(depth, self.width, self.entries)
            return nn.ModuleDict(dict(encoder=encoder, head=head))


MODELS = dict(
    roberta_base=Model(12, 768, (50265, 514, 1), 125),
    deberta_v3_base=Model(12, 768, (128100, 512), 184),
    roberta_large=Model(24, 1024, (50265, 514, 1), 355),
)
SCALED = ('key', 'value', 'fc1')
RANKS = (2, 4, 8, 16)
# Each row's figures for the models above. None where a table is at odds with
# itself by more than the tolerance: on DeBERTaV3-base BitFit has fewer biases
# than the layers, and rank 2 of DoRA is counted on a larger model than rank
# 16; on RoBERTa-large FLoRA of rank 16 has fewer cores than layers.
FIXED = dict(
    SAMPARSER=(0.44, 0.30, 0.42),
    IA3=(0.44, 0.30, 0.42),
    SSL=(0.22, 0.15, 0.21),
    SSB=(0.66, 0.45, 0.62),
    BitFit=(0.82, None, 0.76),
)
LORA = ((2.65, 1.79, 2.49), (5.31, 3.61, 4.98), (10.62, 7.23, 9.97), (21.24, 14.43, 19.94))
RANKED = dict(
    LoRA=LORA,
    TriLoRA=LORA,
    AdaLoRA=LORA,
    FLoRA=((2.65, 1.79, 2.49), (5.31, 3.61, 4.99), (10.64, 7.24, 9.98), (21.38, 14.52, None)),
    DoRA=((3.32, None, 3.12), (5.97, 4.06, 5.61), (11.28, 7.66, 10.59), (21.90, 14.87, 20.56)),
)
# By rank: Houlsby's 8 to 64, Pfeiffer's 16 to 128. On DeBERTaV3-base two rows of each are off by
# more than the tolerance, and by less than one rank.
ADAPTERS = dict(
    HoulsbyAdapter=(
        (8, (2.50, None, 2.35)),
        (16, (4.87, 3.32, 4.57)),
        (32, (9.59, None, 9.00)),
        (64, (19.03, 12.93, 17.87)),
    ),
    PfeifferAdapter=(
        (16, (2.43, None, 2.29)),
        (32, (4.80, 3.26, 4.50)),
        (64, (9.52, None, 8.93)),
        (128, (18.96, 12.88, 17.80)),
    ),
    ParallelAdapter=tuple(zip(RANKS, LORA, strict=True)),
)
OPTIONS = dict(AdaLoRA=lambda rank: dict(init_rank=rank))  # its size at the end
ROWS = [(dict(type=name), figures) for name, figures in FIXED.items()] + [
    (dict(type=name, rank=rank) | OPTIONS.get(name, lambda _: {})(rank), figures)
    for name, rows in RANKED.items()
    for rank, figures in zip(RANKS, rows, strict=True)
]
ROWS += [
    (dict(type=name, rank=rank), figures)
    for name, rows in ADAPTERS.items()
    for rank, figures in rows
]


@cache
def built(name, depth):
    """A model without adapters; each test removes its own."""
    return MODELS[name].build(depth)


def at_full_depth(name, count):
    """A count that grows by the same with each layer, from models of one and of two layers."""
    one, two = (count(built(name, depth)) for depth in (1, 2))
    return one + (MODELS[name].depth - 1) * (two - one)


@pytest.mark.parametrize('name', MODELS)
def test_the_models_have_their_size(name):
    total = at_full_depth(name, lambda model: sum(p.numel() for p in model.parameters()))
    assert round(total / 1e6) == MODELS[name].millions


@pytest.mark.parametrize(
    'method, figures', ROWS, ids=['-'.join(map(str, m.values())) for m, _ in ROWS]
)
def test_parameters_are_the_tables(method, figures):
    include = SCALED if method['type'] in ('IA3', 'SSL', 'SSB') else ()

    def adapters(model):
        summary = mmpeft.inject(model, method, dict(module='encoder', include=include))
        mmpeft.remove(model)
        return summary.adapters

    for (name, model), figure in zip(MODELS.items(), figures, strict=True):
        if figure is not None:
            found = at_full_depth(name, adapters) / model.millions / 1e3
            assert found == pytest.approx(figure, abs=0.005 if figure < 1 else 0.02), name
