"""Building methods by name, former names of arguments, and arguments from earlier files."""

import warnings

import pytest
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.methods.fish import FISH
from mmpeft.methods.lora import LoRA
from mmpeft.registry import modern_arguments


@pytest.mark.parametrize(
    'config, message',
    [
        (dict(type='LoRa2', rank=2), "There is no method 'LoRa2'. Did you mean 'LoRA'"),
        (dict(type='LoRA', rnk=2), "LoRA has no argument 'rnk'. Did you mean 'rank'"),
        (dict(type='LoRA', share=0.1), "LoRA has no argument 'share'"),
        (dict(rank=2), "A method is a dict such as dict.type='FLoRA', rank=32., not {'rank': 2}"),
        (dict(type=None), "A method is a dict such as .*, not {'type': None}"),
        ('LoRA', "A method is a dict such as .*, not 'LoRA'"),
        (dict(type='FISH', share=0.1, density=0.1), "'share' is the former name of 'density', and"),
    ],
)
def test_what_is_no_method_is_refused(config, message):
    with pytest.raises(UsageError, match=message):
        mmpeft.METHODS.build(config)


def test_a_method_is_returned_as_it_is():
    method = LoRA(rank=3)
    assert mmpeft.METHODS.build(method) is method
    assert mmpeft.METHODS.build(dict(type=LoRA, rank=3)) == method


@pytest.mark.parametrize('name', ['FISH', 'PaFi', 'DiffPruning'])
def test_a_former_name_is_taken_with_a_warning(name):
    with pytest.warns(UserWarning) as caught:
        method = mmpeft.METHODS.build(dict(type=name, share=0.25))
    message = f"{name}: the argument 'share' is now called 'density'. Write density=0.25."
    assert method.density == 0.25 and [str(w.message) for w in caught] == [message]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert mmpeft.METHODS.build(dict(type=name, density=0.25)) == method


def test_former_names_in_overrides():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with pytest.warns(UserWarning, match=r"targets.overrides\['1'\]: FISH: the argument 'share'"):
        mmpeft.inject(model, dict(type='FISH'), dict(overrides={'1': dict(share=0.5)}))
    assert model[1].parametrizations.weight[0].method == FISH(density=0.5)
    with pytest.raises(UsageError, match="FISH has no argument 'dens'. Did you mean 'density'"):
        mmpeft.inject(model, dict(type='FISH'), dict(overrides={'1': dict(dens=0.5)}))


LIE = dict(type='LoRA', rank=2, alpha=None, scale=None, update='lie')


@pytest.mark.parametrize(
    'stored, changed',
    [
        (dict(type='FISH', share=0.1, samples=3), dict(density=0.1)),
        (dict(type='DiffPruning', share=0.1), dict(density=0.1)),
        (LIE, dict(scale=1.0)),
        (dict(type='LieRA', rank=2), dict(scale=1.0)),
        (dict(type='VeRA', update='lie_exact'), dict(scale=1.0)),
        (LIE | dict(scale=2.0), {}),
        (LIE | dict(alpha=4), {}),
        (LIE | dict(update='additive'), {}),
        (dict(type='FLoRA', scale=0.4, update='lie'), {}),
        (dict(type='LoRA', unknown=1), {}),
        (dict(type='os.system', share=1), {}),
    ],
    ids=str,
)
def test_arguments_of_0_3_mean_what_they_meant(stored, changed):
    expected = {k: v for k, v in stored.items() if k != 'share' or 'density' not in changed}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for version in ('0.2.1', '0.3', '0.3.0'):
            assert modern_arguments(stored, version) == expected | changed


def test_an_open_scale_of_a_present_file_stays_open():
    assert modern_arguments(LIE) == modern_arguments(LIE, '0.4.0') == LIE
    assert modern_arguments(LIE, '1.0') == LIE


def test_definitions_are_equal_where_phi_is():
    def definition(**config):
        return mmpeft.METHODS.build(config).definition()

    assert definition(type='LoRA', rank=8, alpha=16) == definition(type='LoRA', rank=8, scale=2)
    assert definition(type='FLoRA', scale=4.0) == definition(type='FLoRA')
    assert definition(type='LoRA', dropout=0.1, budget=9) == definition(type='LoRA')
    assert definition(type='LoRA', rank=8) != definition(type='LoRA', rank=4)
    assert definition(type='LoRA', update='lie') != definition(type='LoRA')
