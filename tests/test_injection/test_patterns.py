"""What is a pattern, and what is refused."""

import pytest
from torch import nn

import mmpeft
from mmpeft.analysis.updates import select
from mmpeft.engine.injections import injections
from mmpeft.errors import UsageError
from mmpeft.injection.patterns import patterns_of
from mmpeft.injection.targets import Targets

LORA = dict(type='LoRA', rank=1)


def test_one_and_several():
    assert patterns_of('a', '') == ('a',)
    assert patterns_of(['a', 'b.'], '') == ('a', 'b.')
    assert patterns_of(None, '') == patterns_of([], '') == ()


@pytest.mark.parametrize(
    'given, message',
    [
        ('', 'an empty pattern matches everything'),
        (['a', ''], 'an empty pattern matches everything'),
        ('(', r"'\(' is not a valid regular expression"),
        (3, 'must be a pattern, or a list'),
        ((3,), 'must be a pattern, or a list'),
    ],
)
@pytest.mark.parametrize(
    'use, where',
    [
        (lambda given: mmpeft.inject(nn.Linear(3, 3), LORA, unfreeze=given), 'unfreeze'),
        (lambda given: injections(LORA, unfreeze=given), 'unfreeze'),
        (lambda given: Targets(include=given), 'targets.include'),
        (lambda given: Targets(exclude=given), 'targets.exclude'),
        (lambda given: select(['fc.weight'], given, '--kernels'), '--kernels'),
    ],
    ids=['inject', 'injections', 'include', 'exclude', 'select'],
)
def test_what_is_refused(use, where, given, message):
    with pytest.raises(UsageError, match=f'^{where}.*{message}'):
        use(given)
