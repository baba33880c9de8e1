"""What options of the form key=value are, and what is refused."""

import argparse

import pytest

from mmpeft.engine.key_values import KeyValues, check_options
from mmpeft.errors import UsageError


def parsed(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument('--over', nargs='+', action=KeyValues)
    return parser.parse_args(['--over', *words]).over


def test_values_are_those_of_mmengine():
    words = 'rank=2,3', 'lr=1e-3', r'a.b=[(x\d{2},1)]', 'c=', 'd=x=y', r'e=(fc|norm)\.{3}'
    assert parsed(*words) == {
        'rank': [2, 3],
        'lr': 1e-3,
        'a.b': [(r'x\d{2}', 1)],
        'c': '',
        'd': 'x=y',
        'e': r'(fc|norm)\.{3}',
    }


def test_blanks_within_a_text_stay():
    words = 'prompt=a photo, with {} in it', 'rank=2, 3', 'pairs=[(a, b), (c, d)]', 'name= x '
    assert parsed(*words, 'quoted="a b"') == {
        'prompt': 'a photo, with {} in it',
        'quoted': 'a b',
        'rank': [2, 3],
        'pairs': [('a', 'b'), ('c', 'd')],
        'name': 'x',
    }


@pytest.mark.parametrize(
    'words, message',
    [
        (('rank',), r'^--over rank: write key=value'),
        (('=3',), r'^--over =3: write key=value'),
        (('rank=2', 'scale=1', 'rank=3'), r'^--over: rank comes 2 times.*rank=1,2'),
        (("method=dict(type='LoRA',rank=2)",), 'In place of a dict write dotted keys.*--method'),
        (('targets=dict(include=(1,))',), 'In place of a dict'),
        (("hooks=[{'type':'mmpeft.UpdateHook','interval':1}]",), 'In place of a dict'),
        (('hooks=[dict(a=1),dict(a=2)]',), 'In place of a dict'),
        (('a=f(x,y)',), 'balanced brackets'),
        (('a=[x y,z]',), 'balanced brackets'),
        (('a="[x y,z]"',), 'balanced brackets'),
        (('a=[x,(]',), 'balanced brackets'),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        parsed(*words)


CONFIG = dict(
    steps=3, ways=[dict(a=1)], sampler=dict(steps=2), tasks=dict(own=dict(rate=1)), free=dict(a=1)
)
NAMES = {
    '': ('rows', 'tuning'), 'tuning': ('rows',), r'tasks\.\w+': ('epochs',), 'tasks': ('rte',),
    'free': None, 'sampler': ('seed',),
}  # fmt: skip


@pytest.mark.parametrize(
    'key',
    'steps ways.0.a sampler.steps sampler.seed.high tasks.own.rate tasks.rte.epochs '
    'tasks.own.epochs free.b.c rows tuning.rows sampler._delete_'.split(),
)
def test_options_for_keys_of_a_config(key):
    check_options({key: 1}, CONFIG, NAMES)


@pytest.mark.parametrize(
    'key, nearest',
    [
        ('stepss', 'steps'),
        ('sampler.stps', 'steps'),
        ('tasks.owwn.rate', 'own'),
        ('tasks.own.rat', 'rate'),
        ('tasks.rte.epoch', 'epochs'),
        ('tuning.rws', 'rows'),
    ],
)
def test_options_for_keys_that_a_config_does_not_have(key, nearest):
    with pytest.raises(UsageError, match=f"there is no '{key}'. Did you mean '{nearest}'"):
        check_options({key: 1}, CONFIG, NAMES)
    with pytest.raises(UsageError, match="there is no 'steps.a'"):
        check_options({'steps.a': 1}, CONFIG, NAMES)
