"""Arguments that methods refuse, each in one paragraph that says what to write instead."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.methods import Method
from mmpeft.methods.arguments import has_type, types_of
from mmpeft.methods.lora import LoRA

mmpeft.METHODS.import_from_location()
REFUSED = [
    (dict(type='LoRA', rank=8.0), 'LoRA: rank=8.0 must be one integer.'),
    (dict(type='LoRA', rank='8'), "LoRA: rank='8' must be one integer."),
    (dict(type='LoRA', rank=True), 'LoRA: rank=True must be one integer.'),
    (dict(type='LoRA', rank=0), 'LoRA: rank=0 must be a positive integer.'),
    (dict(type='LoRA', rank=[2, 3]), 'LoRA: rank=(2, 3) must be one integer.'),
    (dict(type='LoRA', rank=None), 'LoRA: rank=None must be one integer.'),
    (dict(type='LoRA', budget=[3]), 'LoRA: budget=(3,) must be one integer or a finite number or'),
    (dict(type='LoRA', alpha='16'), "LoRA: alpha='16' must be a finite number or None."),
    (
        dict(type='LoRA', scale=float('nan')),
        "LoRA: scale=nan must be a finite number or 'auto' or None.",
    ),
    (dict(type='LoRA', scale='Auto'), "scale='Auto' must be a finite number or 'auto' or None."),
    (dict(type='VeRA', scale='auto'), "VeRA: scale='auto' is derived for LoRA, LieRA and FLoRA"),
    (dict(type='PiSSA', scale='auto'), "PiSSA: scale='auto' is derived for LoRA, LieRA and"),
    (dict(type='DoRA', scale='auto'), "DoRA: scale='auto' is derived for LoRA, LieRA and"),
    (dict(type='LoRA', scale='auto', alpha=2), 'alpha=2 and scale=auto say the same thing'),
    (dict(type='LoRA', dropout=1.0), 'LoRA: dropout=1.0 must be at least 0 and below 1.'),
    (dict(type='LoRA', alpha=4, scale=2), 'LoRA: alpha=4 and scale=2 say the same thing'),
    (
        dict(type='LoRA', layout='rows'),
        "LoRA: layout='rows' is unknown. Write one of 'channel', 'loralib'.",
    ),
    (dict(type='LoRA', mpc='O'), "LoRA: mpc='O' is unknown. Write one of 'o', 'd', None."),
    (dict(type='LoRA', mpc=True), 'LoRA: mpc=True is unknown.'),
    (dict(type='LoRA', update='add'), "LoRA: update='add' is unknown. Write one of 'additive', "),
    (dict(type='MoSLoRA', mpc='n'), "MoSLoRA: mpc='n' is unknown. Write one of 'o', 'd', None."),
    (dict(type='MoSLoRA', mixer_init='identity'), "Write one of 'kaiming', 'orthogonal'."),
    (dict(type='TriLoRA', mpc='n'), "TriLoRA: mpc='n' is unknown."),
    (dict(type='TriLoRA', mpc='d'), "that diagonal. Write mpc='o' (Eq. 20), or leave mpc out."),
    (dict(type='FLoRA', rank=8.0), 'FLoRA: rank=8.0 must be one integer or a tuple of integers.'),
    (dict(type='FLoRA', rank=[2, 2.0]), 'FLoRA: rank=(2, 2.0) must be one integer or a tuple of'),
    (dict(type='FLoRA', rank=[2, 0]), 'FLoRA: rank=(2, 0) must be a positive integer'),
    (dict(type='FLoRA', rank=()), 'FLoRA: rank=() must be a positive integer'),
    (dict(type='FLoRA', kernel_rank=0), 'FLoRA: kernel_rank=0 must be a positive integer.'),
    (dict(type='FLoRA', zero='factor1'), "FLoRA: zero='factor1' is unknown. Write one of 'core', "),
    (dict(type='FLoRA', kernel_rank=1.5), 'FLoRA: kernel_rank=1.5 must be one integer.'),
    (dict(type='VeRA', seed=-1), 'VeRA: seed=-1 must be an integer from 0 to 2^32 - 1.'),
    (dict(type='VeRA', seed=2**32), 'VeRA: seed=4294967296 must be'),
    (dict(type='VeRA', seed=0.5), 'VeRA: seed=0.5 must be one integer.'),
    (
        dict(type='VeRA', d_initial=0.0),
        'VeRA: d_initial=0.0 would leave b and d without',
    ),
    (dict(type='LoHa', layout='loralib'), "Write one of 'channel', 'tucker'."),
    (dict(type='LoHa', alpha=4, scale=2), 'LoHa: alpha=4 and scale=2 say the same thing'),
    (
        dict(type='LoKr', factor=0),
        'LoKr: factor=0 must be a positive integer, the size of C',
    ),
    (dict(type='LoKr', factor=-2), 'LoKr: factor=-2 must be a positive integer'),
    (dict(type='LoKr', factor=2.5), 'LoKr: factor=2.5 must be one integer.'),
    (dict(type='SAMPARSER', rank=0), 'must be the number of leading singular values that train'),
    (dict(type='SVDiff', rank=-1), 'SVDiff: rank=-1 must be the number of leading singular values'),
    (dict(type='SVDiff', rank=1.5), 'SVDiff: rank=1.5 must be one integer or None.'),
    (dict(type='SVDiff', scale=-1), 'SVDiff: scale=-1 must be positive'),
    (dict(type='LoRA', scale=0), 'LoRA: scale=0 would leave the weights as they are'),
    (dict(type='LoRA', mpc='o', mpc_weight=-1), 'LoRA: mpc_weight=-1 must not be below 0'),
    (dict(type='AdaLoRA', init_std=0), 'AdaLoRA: init_std=0 must be above 0'),
    (dict(type='PiSSA', scale=-1.0), 'PiSSA: scale=-1.0 must be positive, because singular values'),
    (dict(type='PiSSA', scale=-1), 'PiSSA: scale=-1 must be positive'),
    (dict(type='MiLoRA', alpha=0), 'MiLoRA: alpha=0 must be positive, because singular values'),
    (dict(type='PiSSA', niter=-1), 'PiSSA: niter=-1 must be a number of power iterations'),
    (dict(type='PiSSA', niter='four'), "PiSSA: niter='four' must be one integer or None."),
    (dict(type='SpectralAdapter', rank=(2, 3)), 'SpectralAdapter: rank=(2, 3) must be one integer'),
    (dict(type='LoTR', rank=(2, 3)), 'LoTR: rank=(2, 3) must be one integer.'),
    (dict(type='AdaLoRA', rank=8, init_rank=6), 'AdaLoRA: init_rank=6 is below rank=8, to which'),
    (dict(type='AdaLoRA', warmup=1.5), 'AdaLoRA: warmup=1.5 is neither a number of steps'),
    (dict(type='AdaLoRA', settle=-3), 'AdaLoRA: settle=-3 is neither a number of steps'),
    (dict(type='AdaLoRA', every=0), 'AdaLoRA: every=0 must be a positive integer.'),
    (dict(type='AdaLoRA', beta1=1.0), 'AdaLoRA: beta1=1.0 must be at least 0 and below 1.'),
    (dict(type='AdaLoRA', layout='rows'), "AdaLoRA: layout='rows' is unknown."),
    (dict(type='AdaLoRA', rank=(2, 2)), 'AdaLoRA: rank=(2, 2) must be one integer.'),
    (dict(type='DiffPruning', density=0), 'DiffPruning: density=0 must be above 0 and at most 1'),
    (dict(type='DiffPruning', density=1.2), 'DiffPruning: density=1.2 must be above 0 and at most'),
    (dict(type='DiffPruning', project_at=1.0), 'DiffPruning: project_at=1.0 is neither a number'),
    (dict(type='DiffPruning', gate_speed=0), 'DiffPruning: gate_speed=0 must be positive.'),
    (dict(type='DiffPruning', structured=1), 'DiffPruning: structured=1 must be True or False.'),
    (dict(type='FISH', density=0), 'FISH: density=0 must be above 0 and at most 1, such as 0.005.'),
    (dict(type='FISH', samples=-1), 'FISH: samples=-1 must be a number of steps, such as 16.'),
    (dict(type='FISH', samples=0.1), 'FISH: samples=0.1 must be one integer.'),
    (dict(type='PaFi', density=2), 'PaFi: density=2 must be above 0 and at most 1'),
]


@pytest.mark.parametrize('config, message', REFUSED, ids=lambda value: str(value)[:60])
def test_wrong_arguments_are_refused_in_one_paragraph(config, message):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        mmpeft.METHODS.build(config)
    assert str(error.value).startswith(f'{config["type"]}: ') and '\n' not in str(error.value)


@pytest.mark.parametrize('method', mmpeft.METHODS.module_dict.values())
def test_no_argument_of_any_method_is_a_set(method):
    for name in types_of(method):
        with pytest.raises(UsageError, match=f'^{method.__name__}: {name}=set'):
            method(**{name: set()})


def test_overrides_and_direct_calls_are_checked_alike():
    with pytest.raises(UsageError, match='LoRA: rank=2.0 must be one integer'):
        LoRA(rank=2.0)
    with pytest.raises(UsageError, match='LoRA: rank=2.0 must be one integer'):
        layer = nn.Linear(3, 3)
        mmpeft.inject(layer, dict(type='LoRA', rank=1), dict(overrides={'weight': dict(rank=2.0)}))


def test_lists_become_tuples_and_integers_pass_as_numbers():
    assert mmpeft.METHODS.build(dict(type='FLoRA', rank=[2, 3])).rank == (2, 3)
    assert mmpeft.METHODS.build(dict(type='LoRA', scale=2)).scaling == 2


@pytest.mark.parametrize(
    'value, hint, expected',
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (False, float, False),
        (float('inf'), float, False),
        (10**400, int, True),
        ('a', Literal['a', 'b'], True),
        (['a'], Literal['a', 'b'], False),
        (None, int | None, True),
        ((1, 2), tuple[int, ...], True),
        ((1, '2'), tuple[int, ...], False),
        ({}, Any, True),
    ],
)
def test_types(value, hint, expected):
    assert has_type(value, hint) is expected


def test_a_type_of_ones_own():
    @dataclass(frozen=True, kw_only=True)
    class Own(Method):
        path: dict | None = None

    assert Own(path={'a': 1}).path == {'a': 1}
    with pytest.raises(UsageError, match="Own: path='a' must be dict or None"):
        Own(path='a')
