"""Recipes: what is read, what replaces it, and what is adapted."""

import pytest
from torch import nn

from mmpeft.checkpoint.journal import append_record, read_journal
from mmpeft.engine.recipe import adapt, answered, check_options, check_run, read_recipe
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


def test_each_question_is_asked_once_and_counts_once(tmp_path):
    path, asked = tmp_path / 'answers.jsonl', []

    def ask(items):
        asked.append(items)
        return [dict(text=item.upper()) for item in items]

    records = answered(path, 'abcde', 2, ask)
    assert [*map(''.join, asked)] == ['ab', 'cd', 'e']
    assert [record['text'] for record in records] == [*'ABCDE'] and read_journal(path) == records
    path.write_text(path.read_text() * 2)  # as two processes write it
    assert answered(path, 'abcde', 2, ask) == records
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[3] + lines[0] + lines[1][:-5])
    del asked[:]
    assert answered(path, 'abcde', 2, ask) == records and [*map(''.join, asked)] == ['bc', 'e']
    for _ in range(2):
        append_record(path.with_name('old.jsonl'), dict(text='A'))
    assert len(answered(path.with_name('old.jsonl'), 'abc', 2, ask)) == 3
    append_record(path, dict(text='F', number=5))
    with pytest.raises(UsageError, match='has 6 answers, and there are 5 questions. Delete it'):
        answered(path, 'abcde', 2, ask)
