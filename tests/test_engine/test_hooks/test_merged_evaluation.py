"""Evaluation in merged weights: the same scores, and training that goes on as if nothing were."""

import numpy as np
import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.nn.utils.parametrize import is_parametrized

from mmpeft.errors import UsageError
from tests.cases import METHODS
from tests.toy import same, scores, toy_runner, weights

MERGED = {'default_hooks.peft.evaluate_merged': True}
EMA = [dict(type='EMAHook', momentum=0.1)]


@HOOKS.register_module()
class Looks(Hook):
    """Notes in every evaluation which weights have adapters, and the scores."""

    def before_run(self, runner):
        self.adapted, self.saved, self.scores = [], [], []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.adapted.append(is_parametrized(runner.model.backbone.fc, 'weight'))

    def after_val_epoch(self, runner, metrics=None):
        self.scores.append(scores(metrics))
        self.saved.append(is_parametrized(runner.model.backbone.fc, 'weight'))

    after_test_iter, after_test_epoch = after_val_iter, after_val_epoch


def looking(folder, method='lora', test=False, **changes):
    """A Runner after training or a test, and what ``Looks`` saw."""
    hooks = [*changes.pop('custom_hooks', []), dict(type='Looks')]
    runner = toy_runner(folder, METHODS[method], custom_hooks=hooks, **changes)
    runner.test() if test else runner.train()
    return runner, next(hook for hook in runner.hooks if isinstance(hook, Looks))


@pytest.mark.parametrize('method', ['lora', 'liera', 'flora', 'dora', 'bitfit'])
@pytest.mark.parametrize('averages', [[], EMA], ids=['plain', 'ema'])
def test_scores_and_training_are_the_same(method, averages, tmp_path):
    (one, attached), (two, merged) = (
        looking(tmp_path / str(len(changes)), method, custom_hooks=averages, **changes)
        for changes in ({}, MERGED)
    )
    assert same(weights(one), weights(two))
    weight_adapted = method != 'bitfit'
    assert attached.adapted == [weight_adapted] * 12 and merged.adapted == [False] * 12
    assert merged.saved == attached.saved == [weight_adapted] * 3
    np.testing.assert_allclose(merged.scores, attached.scores, rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.rglob('offloaded-*'))


def test_testing(tmp_path):
    looking(tmp_path)
    changes = dict(load_from=str(tmp_path / 'epoch_3.pth'))
    _, attached = looking(tmp_path, test=True, **changes)
    runner, merged = looking(tmp_path, test=True, **changes, **MERGED)
    assert attached.adapted == [True] * 4 and merged.adapted == [False] * 4
    np.testing.assert_allclose(merged.scores, attached.scores, rtol=1e-5, atol=1e-5)
    runner.test()
    assert len([hook for hook in runner.hooks if type(hook).__name__ == 'MergedEvaluation']) == 1


def test_an_interrupted_evaluation_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    runner = toy_runner(tmp_path, METHODS['lora'], **MERGED)
    step, calls = runner.model.test_step, []

    def interrupted(data):
        calls.append(data)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(data)

    monkeypatch.setattr(runner.model, 'test_step', interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.test()
    assert not is_parametrized(runner.model.backbone.fc)
    runner.test()
    assert is_parametrized(runner.model.backbone.fc) and len(runner.model.peft) == 1
    assert len(runner.model.backbone.fc.parametrizations.weight) == 1


@pytest.mark.parametrize(
    'method, changes, message',
    [
        ('houlsby', {'model.backbone.block': True}, 'acts on activations'),
        ('lora', {'default_hooks.peft.frozen_dtype': 'int8'}, 'would make plain weights'),
        ('lora', {'default_hooks.peft.compile_blocks': True}, 'sharded or compiled'),
        ('lora', {'default_hooks.peft.shard': True}, 'sharded or compiled'),
    ],
)
def test_what_is_refused_before_training(method, changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        looking(tmp_path, method, **changes, **MERGED)
