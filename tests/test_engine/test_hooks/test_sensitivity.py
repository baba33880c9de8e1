"""A budget distributed by sensitivity in real Runners, and what loads it."""

import copy
import random

import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.engine import sensitivity
from mmpeft.engine.building import adapt, build_model
from mmpeft.engine.hooks import peft_hook
from mmpeft.engine.sensitivity import first_batches
from mmpeft.errors import UsageError
from mmpeft.injection.site import attached
from tests.toy import by_iterations, same, save_weights, scores, toy_config, toy_runner, weights

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

LORA = dict(type='LoRA', budget=700)
MEASURED = {'default_hooks.peft.sensitivity': 2}


def ranks(model):
    return {site.name: site.method.rank for site in attached(model)}


@pytest.fixture
def count(monkeypatch):
    """How often was measured: a list that grows."""
    calls = []

    def measure(runner, injection):
        calls.append(injection)
        return sensitivity.measure(runner, injection)

    monkeypatch.setattr(peft_hook, 'measure', measure)
    return calls


def test_a_run_measures_once_and_what_follows_takes_its_ranks(tmp_path, count):
    pretrained = save_weights(tmp_path / 'pretrained.pth')
    changes = MEASURED | {'model.backbone.checkpoint': pretrained}
    runner = toy_runner(tmp_path, LORA, **changes, **{'train_cfg.max_epochs': 2})
    before = copy.deepcopy(runner.model)
    runner.train()
    found = ranks(runner.model)
    assert len(set(found.values())) > 1 and len(count) == 1
    assert mmpeft.summary(runner.model).adapters <= 700

    # The same by hand, on the batches that the hook took.
    before.backbone.init_weights()

    def loss(model, batch):
        return model(**batch, mode='loss')['loss']

    plain, targets = toy_runner(tmp_path / 'plain', LORA), dict(module='backbone')
    batches = list(first_batches(plain, 2))
    measured = mmpeft.sensitivity(before, LORA, batches, loss, targets)
    mmpeft.inject(before, LORA, targets, sensitivity=measured)
    assert ranks(before) == found

    resumed = toy_runner(tmp_path, LORA, **changes, resume=True)
    resumed.train()
    assert ranks(resumed.model) == found
    stored = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)['meta']['mmpeft']
    assert stored['injections'][0]['method'] == runner.model.peft[0].method.config()
    tested = toy_runner(tmp_path, LORA, **changes, load_from=str(tmp_path / 'epoch_3.pth'))
    assert scores(tested.test()).tolist() == scores(resumed.val()).tolist()
    assert same(weights(tested), weights(resumed))
    tools = build_model(toy_config(tmp_path, LORA, **changes))
    adapt(tools, toy_config(tmp_path, LORA, **changes), manifest=stored)
    assert ranks(tools) == found and len(count) == 1
    adapter = build_model(toy_config(tmp_path, **changes))
    adapter.init_weights()
    mmpeft.load_adapter(adapter, tmp_path / 'epoch_3.safetensors')
    assert ranks(adapter) == found


def test_measuring_takes_no_batch_away_from_training(tmp_path):
    """An infinite sampler gives what it would have given; each of the methods has a budget."""
    methods = [
        dict(method=LORA, targets=dict(include=['fc', r'stage\.2'])),
        dict(method=dict(type='FLoRA', budget=300), targets=dict(include=['stem'])),
        dict(type='BitFit'),
    ]
    seen = []
    for name, changes in (('plain', {}), ('measured', MEASURED)):
        runner = toy_runner(
            tmp_path / name,
            methods,
            **by_iterations(3, 3),
            **changes,
            **{'train_dataloader.dataset.noise': 0.0},
        )
        batches = []

        def note(model, args, kwargs, batches=batches):
            if kwargs['mode'] == 'loss':
                batches.append(kwargs['labels'])

        runner.model.register_forward_pre_hook(note, with_kwargs=True)
        runner.train()
        seen.append(batches)
    plain, measured = seen
    assert len(plain) == 3 and len(measured) == 2 * 2 + 3 and measured[4:] == plain


@pytest.mark.parametrize(
    'method, value, expected',
    [
        (dict(type='LoRA', rank=2), 2, 'no method has one'),
        (LORA, -1, 'is not a number of batches'),
        (LORA, 'all', "sensitivity='all' must be one integer"),
        (dict(type='VeRA', budget='5k'), 2, 'not of VeRA'),
    ],
)
def test_mistakes_stop_before_training(method, value, expected, tmp_path):
    with pytest.raises(UsageError, match=expected):
        toy_runner(tmp_path, method, **{'default_hooks.peft.sensitivity': value}).train()


def test_measuring_leaves_the_random_numbers_of_augmentations(tmp_path, monkeypatch):
    def batches(runner, count):
        for batch in first_batches(runner, count):
            random.random(), np.random.rand()
            yield batch

    monkeypatch.setattr(sensitivity, 'first_batches', batches)
    runner = toy_runner(tmp_path, LORA)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    states = random.getstate(), np.random.get_state()
    injection = dict(method=LORA, targets=dict(module='backbone'), sensitivity=2)
    sensitivity.measure(runner, injection)
    assert random.getstate() == states[0]
    assert all(np.array_equal(*pair) for pair in zip(np.random.get_state(), states[1], strict=True))
