"""What is a pattern, and what is refused."""

import pytest
from torch import nn

import mmpeft
from mmpeft.engine.injections import injections
from mmpeft.errors import UsageError
from mmpeft.injection.patterns import matching, patterns_of
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
        (lambda given: matching(['fc.weight'], given, '--kernels', 'weight'), '--kernels'),
    ],
    ids=['inject', 'injections', 'include', 'exclude', 'matching'],
)
def test_what_is_refused(use, where, given, message):
    with pytest.raises(UsageError, match=f'^{where}.*{message}'):
        use(given)


def test_a_pattern_has_to_match():
    names = ['stage.0.weight', 'stage.1.weight', 'fc.weight']
    assert matching(names, r'stage', 'weights', 'weight') == names[:2]
    assert matching(names, ('fc', '0'), 'weights', 'weight') == [names[0], names[2]]
    assert matching(names, (), 'weights', 'weight') == []
    with pytest.raises(UsageError, match=r"weights: 'fx\.weight' matches no weight.*'fc\.weight'"):
        matching(names, ('fc', 'fx.weight'), 'weights', 'weight')
