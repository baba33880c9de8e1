"""What the optimizer holds."""

import pytest
from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import Runner

from mmpeft.errors import UsageError
from tests.toy import toy_config
from tests.toy_runs import run

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class WholeModel(DefaultOptimWrapperConstructor):
    """Takes frozen parameters, too."""

    def __call__(self, model):
        frozen = [p for p in model.parameters() if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        optim_wrapper = super().__call__(model)
        for parameter in frozen:
            parameter.requires_grad_(False)
        return optim_wrapper


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class HeadAlone(DefaultOptimWrapperConstructor):
    """Written for another way of fine-tuning."""

    def __call__(self, model):
        return super().__call__(model.head)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TwoOptimizers(DefaultOptimWrapperConstructor):
    """One for the head."""

    def __call__(self, model):
        return OptimWrapperDict(head=super().__call__(model.head), rest=super().__call__(model))


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ByModule(DefaultOptimWrapperConstructor):
    """Lists the parameters of each module, as mmpretrain's constructor for layer-wise rates."""

    def add_params(self, params, module, prefix='', **kwargs):
        params += [dict(params=[p]) for p in module.parameters(recurse=False) if p.requires_grad]
        for name, child in module.named_children():
            self.add_params(params, child, prefix=f'{prefix}{name}.')


@pytest.mark.parametrize('constructor', ['ByModule', ByModule, 'DefaultOptimWrapperConstructor'])
def test_what_adapters_share_is_listed_once(constructor, tmp_path):
    changes = {'optim_wrapper.constructor': constructor, 'optim_wrapper.paramwise_cfg': dict(a=1)}
    runner = run(tmp_path, method=dict(type='SSF'), **changes)
    listed = [p for group in runner.optim_wrapper.param_groups for p in group['params']]
    trained = {p for p in runner.model.parameters() if p.requires_grad}
    assert len(listed) == len(set(listed)) and trained <= set(listed)


def test_several_optimizers_are_refused(tmp_path):
    with pytest.raises(UsageError, match='watches one optimizer.*paramwise_cfg'):
        run(tmp_path, **{'optim_wrapper.constructor': 'TwoOptimizers', 'param_scheduler': None})


@pytest.mark.parametrize(
    'described, expected',
    [
        ({}, 'does not describe them'),
        (dict(param_scheduler=[]), 'does not describe them'),
        (dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1))), 'does not describe them'),
        (
            dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)), param_scheduler=[]),
            "given the optimizer .'AdamW'.*describes .'SGD'",
        ),
    ],
)
def test_a_config_that_does_not_describe_the_optimizer(described, expected, tmp_path):
    """It would be built again from the config."""
    cfg = toy_config(tmp_path)
    given = ('model', 'work_dir', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    parts = {key: cfg[key] for key in (*given, 'param_scheduler', 'default_hooks', 'log_level')}
    cfg = Config(dict(described, experiment_name=tmp_path.name), format_python_code=False)
    runner = Runner(**parts, cfg=cfg, default_scope='mmengine')
    with pytest.raises(UsageError, match=expected):
        runner.train()


def test_frozen_parameters_in_the_optimizer_are_harmless(tmp_path, warned):
    changes = {'optim_wrapper.constructor': 'WholeModel', 'optim_wrapper.optimizer.weight_decay': 1}
    runner = run(tmp_path, **changes)
    groups = runner.optim_wrapper.param_groups
    assert any(not p.requires_grad for group in groups for p in group['params'])
    assert not warned


def test_an_optimizer_without_adapters_is_refused(tmp_path):
    expected = r'4 adapter parameters are not in the optimizer.*optim_wrapper\.constructor'
    with pytest.raises(UsageError, match=expected):
        run(tmp_path, method=dict(type='IA3'), **{'optim_wrapper.constructor': 'HeadAlone'})


@pytest.mark.parametrize('end, begin, warns', [(12, 0, False), (13, 0, True), (30, 12, False)])
def test_a_warm_up_that_is_longer_than_the_training(tmp_path, warned, end, begin, warns):
    warm_up = dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=begin, end=end)
    run(tmp_path, stop=12, param_scheduler=[warm_up])
    found = [text for text in warned if 'Set param_scheduler.0.end' in text]
    assert bool(found) is warns and all('13 iterations' in text for text in found)
