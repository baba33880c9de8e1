"""PEFTHook in real Runners."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters
from mmpeft.injection.weights import plain_key
from mmpeft.methods import ActivationMethod, Adapter
from mmpeft.quantization import quantize
from tests.cases import FAMILIES, METHODS
from tests.toy import (
    ToyClassifier,
    by_iterations,
    same,
    save_weights,
    scores,
    state_of,
    toy_config,
    toy_runner,
    weights,
)

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('name', FAMILIES)
def test_training_moves_what_should_move(name, tmp_path):
    config = METHODS[name]
    on_activations = isinstance(mmpeft.METHODS.build(config), ActivationMethod)
    pretrained = save_weights(tmp_path / 'pretrained.pth', block=on_activations)
    backbone = {'model.backbone.checkpoint': pretrained, 'model.backbone.block': on_activations}
    runner = toy_runner(tmp_path, config, **backbone)
    runner.train()
    base = torch.load(pretrained)
    plain = {plain_key(k): v for k, v in weights(runner).items()}
    unmoved = [k for k, v in base.items() if torch.equal(plain[f'backbone.{k}'], v)]
    if config['type'] == 'Full':
        assert not unmoved
    else:
        assert set(unmoved) == set(base)
    stored = state_of(tmp_path / 'epoch_3.pth')
    assert ('backbone.stem.weight' in stored) is (config['type'] == 'Full')
    assert not any(key.endswith('original') for key in stored)
    assert {'head.weight', 'head.bias'} <= stored.keys()


def test_the_head_trains_beside_the_adapters(tmp_path):
    runner = toy_runner(tmp_path)
    before = runner.model.head.weight.detach().clone()
    runner.train()
    assert not torch.equal(runner.model.head.weight, before)


def test_adapters_start_from_the_pretrained_weights(pretrained, tmp_path):
    """DoRA's magnitude must be that of the weights that are loaded, not of the initialisation."""
    runner = toy_runner(
        tmp_path,
        dict(type='DoRA', rank=2),
        **{'model.backbone.checkpoint': pretrained, 'optim_wrapper.optimizer.lr': 0.0},
    )
    runner.train()
    expected = torch.load(pretrained)['stem.weight'].flatten(1).norm(dim=1)
    adapter = runner.model.backbone.stem.parametrizations.weight[0]
    torch.testing.assert_close(adapter.magnitude.detach(), expected)


def test_optimizer_and_schedulers_are_those_of_the_adapted_model(tmp_path):
    runner = toy_runner(tmp_path)
    rates = []

    class Note(Hook):
        def before_train_epoch(self, runner):
            rates.append(runner.optim_wrapper.get_lr()['lr'][0])

    runner.register_hook(Note())
    runner.train()
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-3])
    optimized = {id(p) for g in runner.optim_wrapper.param_groups for p in g['params']}
    assert {id(p) for p in adapter_parameters(runner.model)} <= optimized


def test_learning_rate_scales_with_the_batch_size_once(tmp_path):
    changes = {'auto_scale_lr': dict(enable=True, base_batch_size=2), 'param_scheduler': None}
    runner = toy_runner(tmp_path, **changes)
    runner.train()
    assert runner.optim_wrapper.get_lr()['lr'][0] == pytest.approx(2e-2)


def test_layerwise_rates_by_name_reach_the_adapters(tmp_path):
    """Names keep their prefix, on which layer-wise decay and custom keys rely."""
    changes = {'optim_wrapper.paramwise_cfg': dict(custom_keys={'backbone.fc': dict(lr_mult=0.1)})}
    runner = toy_runner(tmp_path, **changes)
    runner.train()
    core = runner.model.backbone.fc.parametrizations.weight[0].core
    group = next(
        g for g in runner.optim_wrapper.param_groups if any(p is core for p in g['params'])
    )
    assert group['lr'] == pytest.approx(1e-4)


def test_statistics_of_a_frozen_batchnorm_stay(tmp_path):
    runner = toy_runner(tmp_path)
    before = runner.model.backbone.norm.running_mean.clone()
    runner.train()
    assert torch.equal(runner.model.backbone.norm.running_mean, before)
    full = toy_runner(tmp_path / 'full', dict(type='Full'))
    full.train()
    assert not torch.equal(full.model.backbone.norm.running_mean, before)


@pytest.mark.parametrize('steps', ['epochs', 'iterations'])
@pytest.mark.parametrize('ema', [False, True])
def test_a_resumed_run_equals_one_that_ran_through(steps, ema, tmp_path):
    changes = by_iterations(9, 3) if steps == 'iterations' else {}
    if ema:
        changes['custom_hooks'] = [dict(type='EMAHook', momentum=0.1)]
    last, middle = ('iter_9', 'iter_3') if steps == 'iterations' else ('epoch_3', 'epoch_1')
    through = toy_runner(tmp_path / 'through', **copy.deepcopy(changes))
    through.train()
    resumed = toy_runner(
        tmp_path / 'resumed',
        **copy.deepcopy(changes),
        load_from=str(tmp_path / f'through/{middle}.pth'),
        resume=True,
    )
    resumed.train()
    assert same(weights(through), weights(resumed))
    a, b = (
        torch.load(tmp_path / f'{run}/{last}.pth', weights_only=False)
        for run in ('through', 'resumed')
    )
    assert same(a['state_dict'], b['state_dict'])
    assert str(a['optimizer']) == str(b['optimizer'])
    if ema:
        assert same(a['ema_state_dict'], b['ema_state_dict'])
        assert not same(
            a['state_dict'], {k.removeprefix('module.'): v for k, v in a['ema_state_dict'].items()}
        )


def test_resume_without_a_name_takes_the_latest(tmp_path):
    constant = dict(param_scheduler=None)
    toy_runner(tmp_path, **constant, **{'train_cfg.max_epochs': 2}).train()
    runner = toy_runner(tmp_path, **constant, resume=True)
    runner.train()
    through = toy_runner(tmp_path / 'through', **constant)
    through.train()
    assert same(weights(runner), weights(through))


def test_evaluation_needs_nothing_but_base_and_adapters(pretrained, tmp_path):
    backbone = {'model.backbone.checkpoint': pretrained}
    runner = toy_runner(tmp_path, **backbone)
    runner.train()
    expected = scores(runner.val())
    checkpoint = str(tmp_path / 'epoch_3.pth')
    for loop in ('test', 'val'):
        fresh = toy_runner(tmp_path / loop, **backbone, load_from=checkpoint)
        np.testing.assert_array_equal(scores(getattr(fresh, loop)()), expected)
    frozen = toy_runner(tmp_path / 'frozen', dict(type='Frozen'), **backbone)
    assert np.abs(scores(frozen.test()) - expected).max() > 1e-3


def test_training_evaluation_and_testing_on_one_runner(tmp_path):
    runner = toy_runner(tmp_path)
    runner.train()
    adapted = len([m for m in runner.model.modules() if isinstance(m, Adapter)])
    np.testing.assert_array_equal(scores(runner.val()), scores(runner.test()))
    assert len([m for m in runner.model.modules() if isinstance(m, Adapter)]) == adapted == 4


def test_a_checkpoint_with_everything_brings_its_base(pretrained, tmp_path):
    runner = toy_runner(
        tmp_path,
        **{'model.backbone.checkpoint': pretrained, 'default_hooks.peft.save_frozen': True},
    )
    runner.train()
    assert any(key.endswith('original') for key in state_of(tmp_path / 'epoch_3.pth'))
    elsewhere = toy_runner(tmp_path / 'test', load_from=str(tmp_path / 'epoch_3.pth'))
    np.testing.assert_array_equal(scores(elsewhere.test()), scores(runner.val()))


def test_a_frozen_base_in_few_bits(pretrained, tmp_path):
    """Trained with EMA, resumed to the last bit, tested, and stored with its base."""
    changes = {
        'model.backbone.checkpoint': pretrained,
        'default_hooks.peft.frozen_dtype': 'int8',
        'custom_hooks': [dict(type='EMAHook', momentum=0.1)],
    }
    through = toy_runner(tmp_path / 'through', **copy.deepcopy(changes))
    through.train()
    stored = through.model.backbone.fc.parametrizations.weight.original
    assert torch.equal(stored, quantize(torch.load(pretrained)['fc.weight'], 'int8'))
    middle, last = (str(tmp_path / f'through/epoch_{n}.pth') for n in (1, 3))
    assert not any(key.endswith('original') for key in state_of(last))
    resumed = toy_runner(tmp_path / 'a', **copy.deepcopy(changes), load_from=middle, resume=True)
    resumed.train()
    assert same(weights(through), weights(resumed))
    del changes['custom_hooks']
    tested = scores(toy_runner(tmp_path / 'b', **copy.deepcopy(changes), load_from=last).test())
    assert np.isfinite(tested).all()
    exact = copy.deepcopy(changes) | {'default_hooks.peft.frozen_dtype': None}
    with pytest.raises(UsageError, match="frozen weights in int8.*Set frozen_dtype='int8'"):
        toy_runner(tmp_path / 'c', **exact, load_from=last).test()
    whole = changes | {'default_hooks.peft.save_frozen': True}
    toy_runner(tmp_path / 'd', **copy.deepcopy(whole), load_from=last).train()
    elsewhere = changes | {'load_from': str(tmp_path / 'd/epoch_3.pth')}
    del elsewhere['model.backbone.checkpoint']
    assert np.isfinite(scores(toy_runner(tmp_path / 'e', **elsewhere).test())).all()


@pytest.fixture
def plain_checkpoint(tmp_path):
    """A model that was trained without mmpeft."""
    config = toy_config(tmp_path / 'plain')
    config.default_hooks.pop('peft')
    Runner.from_cfg(config).train()
    return str(tmp_path / 'plain/epoch_3.pth')


def test_a_plain_checkpoint_is_the_base(plain_checkpoint, tmp_path):
    runner = toy_runner(tmp_path, dict(type='DoRA', rank=2), load_from=plain_checkpoint)
    runner.train()
    plain = state_of(plain_checkpoint)
    layer = runner.model.backbone.fc.parametrizations.weight
    assert torch.equal(layer.original, plain['backbone.fc.weight'])
    assert 'backbone.fc.weight' not in state_of(tmp_path / 'epoch_3.pth')
    fresh = toy_runner(
        tmp_path / 'test', dict(type='DoRA', rank=2), load_from=str(tmp_path / 'epoch_3.pth')
    )
    np.testing.assert_array_equal(scores(fresh.test()), scores(runner.val()))


def test_nothing_is_drawn_over_a_base_checkpoint(plain_checkpoint, tmp_path, monkeypatch):
    """A DETR's ``init_weights`` draws its encoder and decoder at every call."""
    monkeypatch.setattr(ToyClassifier, 'init_weights', lambda m: m.head.reset_parameters())
    options = {'default_hooks.peft.base_checkpoint': plain_checkpoint}
    runner = toy_runner(tmp_path, **options, **{'optim_wrapper.optimizer.lr': 0.0})
    runner.train()
    assert torch.equal(runner.model.head.weight, state_of(plain_checkpoint)['head.weight'])


def test_a_plain_checkpoint_evaluates_as_itself(plain_checkpoint, tmp_path):
    config = toy_config(tmp_path / 'a', load_from=plain_checkpoint)
    config.default_hooks.pop('peft')
    expected = scores(Runner.from_cfg(config).test())
    for name in ('flora', 'dora'):
        runner = toy_runner(tmp_path / name, METHODS[name], load_from=plain_checkpoint)
        np.testing.assert_array_equal(scores(runner.test()), expected)


def test_ema_evaluates_and_stores_its_own_adapters(tmp_path):
    runner = toy_runner(tmp_path, custom_hooks=[dict(type='EMAHook', momentum=0.05)])
    evaluated = []

    class Note(Hook):
        def after_val_epoch(self, runner, metrics=None):
            evaluated.append(metrics)

    runner.register_hook(Note())
    runner.train()
    ema = scores(evaluated[-1])
    fresh = toy_runner(tmp_path / 'test', load_from=str(tmp_path / 'epoch_3.pth'))
    np.testing.assert_array_equal(scores(fresh.test()), ema)
    plain = toy_runner(tmp_path / 'plain')
    plain.train()
    assert np.abs(scores(plain.val()) - ema).max() > 1e-4


def test_gradient_accumulation(tmp_path):
    """Two halves of a batch, accumulated, are the batch."""
    changes = {'model.backbone.dropout': 0.0, 'train_dataloader.dataset.noise': 0.0}
    whole = toy_runner(tmp_path / 'whole', **changes, **{'train_dataloader.batch_size': 8})
    whole.train()
    halves = toy_runner(tmp_path / 'halves', **changes, **{'optim_wrapper.accumulative_counts': 2})
    halves.train()
    a, b = weights(whole), weights(halves)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_behind_a_frozen_stem(tmp_path):
    """Reentrant recomputation cuts gradients off unless an input requires one."""
    changes = {
        'default_hooks.peft.targets': dict(include=['stage']),
        'model.backbone.dropout': 0.0,
    }
    plain = toy_runner(tmp_path / 'plain', **changes)
    plain.train()
    recomputed = toy_runner(
        tmp_path / 'recomputed', **changes, activation_checkpointing=['backbone.stage']
    )
    recomputed.train()
    a, b = weights(plain), weights(recomputed)
    for key in a:
        torch.testing.assert_close(a[key], b[key])


def test_compile(tmp_path):
    changes = {'model.backbone.dropout': 0.0, 'train_cfg.max_epochs': 1}
    plain = toy_runner(tmp_path / 'plain', **changes)
    plain.train()
    compiled = toy_runner(tmp_path / 'compiled', **changes, compile=dict(backend='aot_eager'))
    compiled.train()
    a, b = weights(plain), weights(compiled)
    for key in a:
        torch.testing.assert_close(a[key], b[key])


def test_mixed_precision_on_the_cpu(tmp_path):
    """Autocast around an adapted model, as AmpOptimWrapper does it: factors stay float32."""
    runner = toy_runner(tmp_path)
    runner.train()
    model = runner.model
    x = torch.randn(4, 3, 8, 8)
    expected = model(x, [0, 1, 2, 0], 'loss')['loss']
    with torch.autocast('cpu', torch.bfloat16):
        core = model.backbone.stage[0].parametrizations.weight[0].core
        assert model.backbone.stage[0].weight.dtype == torch.float32
        loss = model(x, [0, 1, 2, 0], 'loss')['loss']
    loss.backward()
    assert core.grad.dtype == torch.float32 and core.grad.any()
    assert loss.item() == pytest.approx(expected.item(), abs=0.1)


def trained(tmp_path, pretrained=None, method=None):
    toy_runner(tmp_path / 'run', method, **{'model.backbone.checkpoint': pretrained}).train()
    return str(tmp_path / 'run/epoch_3.pth')


@pytest.mark.parametrize(
    'other, expected',
    [
        (dict(type='LoRA', rank=2), r'FLoRA at .*, and the model LoRA .*default_hooks.peft'),
        (dict(type='FLoRA', rank=3, scale=1.0), r'rank=2 at .*, and the model rank=3'),
        (dict(type='FLoRA', rank=2, scale=4.0), 'scale=1.0 at .*, and the model scale=4.0'),
    ],
)
def test_adapters_of_another_method_are_refused(other, expected, tmp_path):
    checkpoint = trained(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob('*.pth')}
    with pytest.raises(UsageError, match=re.compile(expected, re.DOTALL)):
        toy_runner(tmp_path / 'test', other, load_from=checkpoint).test()
    assert {p: p.read_bytes() for p in tmp_path.rglob('*.pth')} == before


def test_adapters_of_other_targets_are_refused(tmp_path):
    checkpoint = trained(tmp_path)
    changes = {'default_hooks.peft.targets': dict(exclude=['fc'])}
    expected = r'FLoRA at backbone\.fc\.weight, and the model no adapter'
    with pytest.raises(UsageError, match=expected):
        toy_runner(tmp_path / 'test', **changes, load_from=checkpoint).test()


def test_adapters_of_another_base_are_refused(pretrained, tmp_path):
    checkpoint = trained(tmp_path, pretrained)
    with pytest.raises(UsageError, match='another frozen base: fingerprint [0-9a-f]{16} in'):
        toy_runner(tmp_path / 'test', load_from=checkpoint).test()
    changes = {'default_hooks.peft.check_base': False}
    toy_runner(tmp_path / 'test', **changes, load_from=checkpoint).test()


def test_one_changed_element_is_another_base(pretrained, tmp_path):
    checkpoint = trained(tmp_path, pretrained)
    state = torch.load(pretrained)
    state['norm.running_var'][3] += 1e-6
    torch.save(state, pretrained)
    changes = {'model.backbone.checkpoint': pretrained}
    with pytest.raises(UsageError, match='another frozen base'):
        toy_runner(tmp_path / 'test', **changes, load_from=checkpoint).test()


def test_a_missing_base_is_named(plain_checkpoint, tmp_path):
    toy_runner(tmp_path / 'run', load_from=plain_checkpoint).train()
    changes = dict(load_from=str(tmp_path / 'run/epoch_3.pth'))
    torch_file = tmp_path / 'plain/epoch_3.pth'
    torch_file.rename(tmp_path / 'moved.pth')
    with pytest.raises(FileNotFoundError, match=r'plain/epoch_3\.pth.*base_checkpoint'):
        toy_runner(tmp_path / 'test', **changes).test()
    changes['default_hooks.peft.base_checkpoint'] = str(tmp_path / 'moved.pth')
    toy_runner(tmp_path / 'test', **changes).test()


def test_the_base_is_found_from_another_folder(plain_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_runner(tmp_path / 'run', load_from='plain/epoch_3.pth').train()
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    toy_runner(tmp_path / 'test', load_from=str(tmp_path / 'run/epoch_3.pth')).test()


def test_a_mean_teacher_is_refused(tmp_path, scope):
    from mmdet.engine.hooks import MeanTeacherHook

    runner = toy_runner(tmp_path, **{'default_hooks.peft.targets.module': 'student.backbone'})
    model = runner.model
    model.student, model.teacher = (ToyClassifier(dict(type='ToyBackbone')) for _ in range(2))
    model.teacher.requires_grad_(False)
    runner.register_hook(MeanTeacherHook())
    with pytest.raises(UsageError, match='MeanTeacherHook .* adapters make them different'):
        runner.train()


@pytest.mark.parametrize('method', ['LoRA', 'Full'])
def test_a_model_that_averages_its_own_encoder(method, tmp_path):
    """As MoCo and BYOL do."""
    runner = toy_runner(tmp_path, METHODS[method.lower()])
    runner.model.momentum = ExponentialMovingAverage(runner.model.backbone)
    if method == 'Full':
        runner.train()
        return
    with pytest.raises(UsageError, match="ToyClassifier keeps an average .* in 'momentum'"):
        runner.train()


def test_a_model_that_has_adapters_is_refused(tmp_path):
    """Those of another hook, whose method would train in place of the config's."""
    first, second = (toy_runner(tmp_path, dict(type=kind)) for kind in ('BitFit', 'IA3'))
    first.train()
    second.model = first.model
    with pytest.raises(UsageError, match=r'has adapters already \(BitFit.*mmpeft.remove'):
        second.train()
    mmpeft.remove(second.model)
    second.train()
    assert {row.method for row in mmpeft.summary(second.model).rows} == {'IA3()'}


def test_a_plain_run_cannot_be_resumed_with_adapters(plain_checkpoint, tmp_path):
    with pytest.raises(UsageError, match='holds no adapters.*omit --resume'):
        toy_runner(tmp_path / 'run', load_from=plain_checkpoint, resume=True).train()


@pytest.mark.parametrize(
    'changes, expected',
    [
        ({'default_hooks.peft.method.kernal_rank': 1}, "'kernel_rank'"),
        ({'default_hooks.peft.method.type': 'Flora'}, "Did you mean 'FLoRA'"),
        ({'default_hooks.peft.targets': dict(modul='neck')}, "Did you mean 'module'"),
        ({'default_hooks.peft.targets': dict(module='bakbone')}, "Did you mean 'backbone'"),
        ({'default_hooks.peft.targets': dict(include=['fcc'])}, "'fcc' matches no weight.*fc"),
        ({'default_hooks.peft.method.rank': 400}, 'largest possible is 16'),
        ({'default_hooks.peft.unfreeze': ['nrm']}, "'nrm' matches no parameter"),
        ({'default_hooks.peft.save_forzen': True}, "no argument 'save_forzen'.*'save_frozen'"),
        ({'default_hooks.peft.method': None}, "A method is a dict such as dict.type='FLoRA'"),
        ({'default_hooks.peft.method.rank': 8.0}, 'rank=8.0 must be one integer or a tuple'),
        ({'default_hooks.peft.execution': 'fast'}, "'fast' is not one of 'auto'"),
        ({'default_hooks.peft.memory': 'tiny'}, "memory='tiny' is not one of 'speed'"),
        ({'default_hooks.peft.compile_blocks': True}, "finds no blocks in 'backbone'"),
        (
            {'default_hooks.second': dict(type='mmpeft.PEFTHook', method=dict(type='LoRA'))},
            '2 hooks of type PEFTHook',
        ),
    ],
)
def test_mistakes_in_a_config_stop_before_training(changes, expected, tmp_path):
    with pytest.raises(UsageError, match=expected):
        toy_runner(tmp_path, **changes).train()
    assert not list(tmp_path.glob('*.pth'))


def test_budget_in_a_config_survives_a_resume(tmp_path):
    method = dict(type='LoRA', budget=700, layout='channel')
    toy_runner(tmp_path, method, **{'train_cfg.max_epochs': 2}).train()
    stored = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)['meta']['mmpeft']
    assert stored['injections'][0]['method']['rank'] > 1
    json.dumps(stored)
    toy_runner(tmp_path, method, resume=True).train()


def test_unfrozen_parameters_train_and_are_stored(tmp_path):
    runner = toy_runner(tmp_path, **{'default_hooks.peft.unfreeze': [r'^norm\.']})
    before = runner.model.backbone.norm.weight.detach().clone()
    runner.train()
    assert not torch.equal(runner.model.backbone.norm.weight, before)
    assert 'backbone.norm.weight' in state_of(tmp_path / 'epoch_3.pth')


def test_compiled_blocks_train_and_evaluate_the_same(tmp_path):
    def run(name, **changes):
        pretrained = save_weights(tmp_path / 'pretrained.pth', blocks=2)
        backbone = {'model.backbone.checkpoint': pretrained, 'model.backbone.blocks': 2}
        runner = toy_runner(tmp_path / name, dict(type='FLoRA', rank=2), **backbone, **changes)
        runner.train()
        return runner, torch.tensor(scores(runner.val()))

    plain, expected = run('plain')
    options = dict(backend='aot_eager')
    compiled, found = run('compiled', **{'default_hooks.peft.compile_blocks': options})
    assert all(block._compiled_call_impl for block in compiled.model.backbone.blocks)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert weights(compiled).keys() == weights(plain).keys()


def test_compiled_blocks_are_not_sharded():
    with pytest.raises(UsageError, match='shard=True and compile_blocks do not work together'):
        mmpeft.engine.hooks.PEFTHook(dict(type='LoRA'), shard=True, compile_blocks=True)


def test_a_frozen_backbone_needs_no_gradient(tmp_path):
    runner = toy_runner(tmp_path, dict(type='Frozen'))
    runner.train()
    assert not any(p.requires_grad for p in runner.model.backbone.parameters())
    assert isinstance(runner.model.head, nn.Linear)


def test_evaluation_keeps_no_weights(tmp_path):
    runner = toy_runner(tmp_path)
    runner.train()
    first = scores(runner.val())
    np.testing.assert_array_equal(scores(runner.test()), first)
    for parameter in adapter_parameters(runner.model):
        parameter.data.add_(0.1)  # which counts no version
    assert np.abs(scores(runner.val()) - first).min() > 0


def test_a_single_process_is_not_sharded(tmp_path):
    runner = toy_runner(tmp_path, **{'default_hooks.peft.shard': True})
    with pytest.raises(UsageError, match=r'a single one\. Write: tools/dist_train\.sh .* --shard'):
        runner.train()


def test_a_flexible_runner_is_refused_at_the_start(tmp_path):
    config = toy_config(tmp_path, env_cfg=dict(), log_processor=dict(), experiment_name='flexible')
    with pytest.raises(UsageError, match=r'mmengine\.runner\.Runner, not in FlexibleRunner'):
        FlexibleRunner.from_cfg(config).train()


def test_norms_are_converted_once_before_they_are_frozen(tmp_path, monkeypatch):
    seen, wrap = [], Runner.wrap_model

    def wrap_model(self, *args):
        seen.append(self.cfg.get('sync_bn'))
        return wrap(self, *args)

    monkeypatch.setattr(Runner, 'wrap_model', wrap_model)
    runner = toy_runner(tmp_path, dict(type='LoRA', rank=2), sync_bn='torch')
    runner.train()
    assert seen == ['torch', None] and runner.cfg.sync_bn == 'torch'


@pytest.mark.parametrize(
    'name, value',
    [
        ('unfreeze', 3),
        ('unfreeze', (3,)),
        ('targets', 'fc'),
        ('check_iters', 'x'),
        ('check_iters', -1),
        ('check_base', 'no'),
        ('compile_blocks', 'x'),
        ('save_frozen', 1),
        ('execution', None),
        ('base_checkpoint', 3),
    ],
)
def test_arguments_of_another_type_are_refused(name, value):
    with pytest.raises(UsageError, match=re.escape(f'{name}={value!r} must')):
        mmpeft.engine.hooks.PEFTHook(dict(type='LoRA'), **{name: value})
    assert mmpeft.engine.hooks.PEFTHook(dict(type='LoRA'), unfreeze=None)
