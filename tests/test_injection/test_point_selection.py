"""Insertion points that targets name, and warnings where some seem to be missing."""

import pytest
import timm
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from tests.cases import BLOCKS, Attention, mlp
from tests.zoo import NETWORKS


class Block(nn.Module):
    """A residual branch of two ways, whose end no structure tells."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)])

    def forward(self, x):
        return x + sum(way(x).relu() for way in self.ways)


def test_modules_that_targets_name_are_taken_with_their_kind():
    model = nn.Sequential(Block(), Block())
    method = dict(type='HoulsbyAdapter', rank=2)
    with pytest.raises(UsageError, match=r"kinds='attention', include='their.whole.path'"):
        mmpeft.inject(nn.Sequential(nn.ReLU()), method)
    targets = dict(kinds='branch', include=(r'0', r'\d\.ways\.1'))
    rows = mmpeft.inject(model, method, targets).rows
    assert [row.name for row in rows] == ['0', '0.ways.1', '1.ways.1']
    model(torch.randn(1, 4, 5, 5)).sum().backward()


def test_a_pattern_that_matches_what_structure_found_selects_from_it():
    model = timm.create_model('vit_tiny_patch16_224', depth=2, embed_dim=24)
    for include, expected in (
        (r'blocks\.0', ['blocks.0.mlp']),
        (r'^blocks\.0$', ['blocks.0']),
        (r'blocks\.\d\.attn\.proj', ['blocks.0.attn.proj', 'blocks.1.attn.proj']),
        ((r'blocks\.0', r'head'), ['blocks.0.mlp']),
    ):
        if 'head' in include:  # d -> classes
            with pytest.raises(UsageError, match='24 channels and its last one returns 1000'):
                mmpeft.inject(
                    model, dict(type='PfeifferAdapter', rank=2), dict(kinds='mlp', include=include)
                )
            continue
        targets = dict(kinds='mlp', include=include)
        rows = mmpeft.inject(model, dict(type='PfeifferAdapter', rank=2), targets).rows
        assert [row.name for row in rows] == expected
        mmpeft.remove(model)


def test_a_pattern_that_names_nothing_is_refused():
    model = BLOCKS['vit'].build()
    for targets in (dict(kinds='mlp', include='nowhere'), dict(include=r'0\.1')):
        with pytest.raises(UsageError, match='matches no weight or insertion point'):
            mmpeft.inject(
                model, dict(type='PfeifferAdapter', rank=2), dict(targets, include='nowhere')
            )
    with pytest.raises(UsageError, match='matches no weight or insertion point'):
        mmpeft.inject(
            model,
            dict(type='PfeifferAdapter', rank=2),
            dict(kinds='attention', include=r'0\.1\.attn'),
        )


@pytest.mark.parametrize('deep', [False, True])
def test_named_blocks_take_prompts(deep):
    network = NETWORKS['timm_eva02']  # rotary positions: refused when found, not when named
    model = network.build()
    with pytest.raises(UsageError, match='VPT acts at'):
        mmpeft.inject(model, dict(type='VPT'))
    targets = dict(kinds='tokens', include=r'blocks\.\d')
    rows = mmpeft.inject(model, dict(type='VPT', deep=deep), targets).rows
    assert [row.name for row in rows] == ['blocks.0', 'blocks.1']


# Attention without an MLP, and the reverse


def attention_only(depth):
    return nn.Sequential(*(nn.Sequential(Attention(8)) for _ in range(depth)))


def test_attention_without_an_mlp_is_a_warning():
    model = attention_only(3)
    with pytest.warns(
        UserWarning, match=r"attention, such as '0\.0', where no mlp .* Houlsby"
    ) as told:
        mmpeft.inject(model, dict(type='HoulsbyAdapter', rank=2))
    assert len(told) == 1 and told[0].filename == __file__


def test_a_part_of_a_network_without_mlps_is_a_warning():
    tower = nn.Sequential(*(nn.Sequential(Attention(8), mlp(8)) for _ in range(5)))
    model = nn.ModuleDict(dict(one=tower, other=attention_only(5)))
    with pytest.warns(UserWarning, match=r"such as 'other\.0\.0', where no mlp"):
        mmpeft.inject(model, dict(type='PfeifferAdapter', rank=2))


def test_mlps_without_attention_are_a_warning():
    model = nn.Sequential(mlp(8), mlp(8))
    with pytest.warns(UserWarning, match="mlp, such as '0', where no attention"):
        mmpeft.inject(model, dict(type='HoulsbyAdapter', rank=2))


@pytest.mark.parametrize(
    'model, method, kinds',
    [
        (lambda: nn.Sequential(mlp(8), mlp(8)), 'PfeifferAdapter', None),
        (lambda: nn.Sequential(mlp(8), mlp(8)), 'HoulsbyAdapter', 'mlp'),
        (lambda: attention_only(3), 'HoulsbyAdapter', 'attention'),
        (lambda: attention_only(3), 'ParallelAdapter', None),
        (lambda: NETWORKS['hf_t5'].build(), 'HoulsbyAdapter', None),
        (lambda: NETWORKS['timm_maxvit'].build(), 'HoulsbyAdapter', None),
    ],
)
@pytest.mark.filterwarnings('error')
@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_no_warning_where_nothing_is_missing(model, method, kinds):
    mmpeft.inject(model(), dict(type=method, rank=2), dict(kinds=kinds))
