"""Recipes: what is read, what replaces it, and what is adapted."""

import pytest
from torch import nn

from mmpeft.engine.recipe import adapt, check_run, read_recipe
from mmpeft.errors import UsageError

TEXT = """
_base_ = 'mmpeft::_base_/methods/lora.py'
peft = dict(method=dict(rank=3))
targets = dict(include=('0',))
unfreeze = ('2.bias',)
frozen_dtype = None
model = 'small'
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'recipe.py'
    path.write_text(TEXT)
    return path


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def test_a_recipe_adapts_where_it_says(file):
    model = network()
    summary = adapt(model, read_recipe(file))
    assert [row.name for row in summary.rows] == ['0.weight'] and summary.adapters == 3 * 11
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {'2.bias'} == {name for name in trained if 'parametrizations' not in name}


def test_what_replaces_a_recipe(file):
    cfg = read_recipe(file, 'bitfit', model='large', data=None)
    assert cfg.peft.method.type == 'BitFit' and cfg.model == 'large' and 'data' not in cfg
    assert [row.name for row in adapt(network(), cfg).rows] == ['0.bias']
    bias = "dict(method=dict(type='BitFit'), targets=dict(include='2'))"
    rows = adapt(network(), read_recipe(file, f"[dict(type='LoRA', rank=1), {bias}]")).rows
    assert [row.name for row in rows] == ['0.weight', '2.bias']
    cfg = read_recipe(file, options={'peft.method.rank': 2, 'model': 'other'}, model='large')
    assert cfg.peft.method.rank == 2 and cfg.model == 'other'


def test_a_key_that_no_recipe_has(file):
    with pytest.raises(UsageError, match="there is no 'modle.x'.*Did you mean 'model'"):
        read_recipe(file, options={'modle.x': 1})


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('max_new_tokns', 3, "no 'max_new_tokns'. Did you mean 'max_new_tokens'"),
        ('max_new_tokens', 0, 'generation: .max_new_tokens. must be greater than 0'),
    ],
)
def test_generation_is_that_of_transformers(file, key, value, message):
    file.write_text(f'{TEXT}generation = dict(num_beams=4)')
    assert read_recipe(file, options={'generation.top_k': 3}).generation.top_k == 3
    with pytest.raises(UsageError, match=message):
        read_recipe(file, options={f'generation.{key}': value})


def test_a_run_that_is_there_is_not_overwritten(file, tmp_path):
    cfg, path = read_recipe(file), tmp_path / 'run' / 'recipe.py'
    check_run(cfg, path, resume=False)
    path.parent.mkdir()
    cfg.dump(path)
    check_run(cfg, path, resume=True)
    with pytest.raises(UsageError, match='has a run already. Add --resume'):
        check_run(cfg, path, resume=False)
    with pytest.raises(UsageError, match='was started with another model'):
        check_run(read_recipe(file, model='large'), path, resume=True)
