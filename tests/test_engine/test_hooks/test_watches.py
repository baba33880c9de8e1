"""What goes wrong in training, each really happening in a Runner, and that nothing else is told."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nan, nn

from mmpeft.engine.hooks.monitors import frozen as frozen_watch
from mmpeft.engine.hooks.monitors.origin import Origin
from mmpeft.errors import UsageError
from mmpeft.injection.freeze import release_statistics
from mmpeft.injection.site import named_adapters
from tests.cases import METHODS
from tests.toy import LOW_PRECISION, by_iterations, toy_runner

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


class Do(Hook):
    """A user's own hook: does something at a stage, at some iterations, counted from 1."""

    def __init__(self, stage, action, at=None):
        def act(runner, batch_idx=None, data_batch=None, outputs=None):
            if at is None or runner.iter + 1 in at:
                action(SimpleNamespace(runner=runner, model=runner.model, batch=data_batch))

        setattr(self, stage, act)


def run(folder, *hooks, method=None, stop=12, interval=100, **changes):
    """Train a toy by iterations with a user's own hooks; they come before the watches."""
    named = dict(experiment_name=str(folder)) | by_iterations(stop, interval)
    runner = toy_runner(folder, method, **named | changes)
    for hook in hooks:
        runner.register_hook(hook)
    runner.train()
    return runner


def spoil_batch(at):
    return Do('before_train_iter', lambda now: now.batch['inputs'][0].fill_(nan), at)


def on_outputs(name, function, at=range(1000)):
    """Changes what a layer returns, in some iterations."""

    def hook(now):
        def change(module, args, output):
            return function(output) if now.runner.iter + 1 in at else None

        now.model.get_submodule(name).register_forward_hook(change)

    return Do('before_train', hook)


def spoiled(output):
    return output * nan


def rough(output):
    """Finite, with gradients that are not: the root of zero."""
    return output + (output * 0).sqrt()


def all_values(runner):
    return {key: value.clone() for key, value in runner.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('cause', [spoil_batch, partial(on_outputs, 'backbone.stage.0', rough)])
def test_a_step_that_is_not_finite_is_left_out(cause, tmp_path, told):
    values = []

    def note(now):
        values.append(all_values(now.runner))

    cause = cause([5, 6]) if cause is spoil_batch else cause(at=[5, 6])
    runner = run(tmp_path, cause, Do('after_train_iter', note))
    assert same(values[3], values[4]) and same(values[4], values[5])
    assert not same(values[5], values[6])
    assert all(v.isfinite().all() for v in runner.model.state_dict().values())
    assert len(told) == 2 and told[0].startswith('Iteration 5: ') and 'was left out' in told[0]


def test_allocators_see_nothing_of_a_step_that_is_left_out(tmp_path):
    method = dict(type='AdaLoRA', rank=2, warmup=2, settle=2, every=2)
    runner = run(tmp_path, spoil_batch([4]), method=method)
    kept = [adapter.lora_E for adapter in named_adapters(runner.model).values()]
    assert all(v.isfinite().all() for v in kept) and any(v.any() for v in kept)
    (allocator,) = next(h for h in runner.hooks if hasattr(h, 'allocation')).allocation.allocators
    assert allocator.step == 12 and 0 < sum(m.sum() for m in allocator.kept.values())


BACKWARD = (
    r'layers are finite\. .*the first gradient that is not finite is that of '
    r'the output of backbone\.stage\.0\.\S+; that of the output of backbone\.stage\.0 is finite'
)


@pytest.mark.parametrize(
    'cause, expected',
    [
        (
            spoil_batch(range(4, 99)),
            "Forward: NaN is first given to 'data_preprocessor'",
        ),
        (
            on_outputs('backbone.stage.1', spoiled, range(4, 99)),
            "loss is nan.*NaN appears first in 'backbone.stage.1', whose inputs have none",
        ),
        (
            on_outputs('head', lambda y: y + 1e38 * 10, range(4, 99)),
            "NaN appears first in 'the model',.* infinity appears first in 'head'",
        ),
        (on_outputs('backbone.stage.0', rough, range(4, 99)), 'the loss is finite.*' + BACKWARD),
    ],
    ids=['batch', 'layer', 'infinite', 'gradient'],
)
def test_what_is_not_finite_stops_the_run_with_its_layer(cause, expected, tmp_path):
    with pytest.raises(UsageError, match=re.compile(expected, re.DOTALL)) as error:
        run(tmp_path, cause, interval=3)
    assert 'up to iteration 6' in str(error.value)
    assert f'The last checkpoint is {tmp_path}/iter_3.pth' in str(error.value)


def test_an_infinite_loss_with_finite_gradients_is_one_too(tmp_path):
    def infinite(losses):
        return dict(losses, loss_far=losses['loss'].detach() + torch.inf)

    with pytest.raises(UsageError, match='loss_far is inf, the gradients are finite'):
        run(tmp_path, on_outputs('', infinite))


def test_how_many_in_a_row_can_be_chosen(tmp_path):
    for many in (1, 5):
        with pytest.raises(UsageError, match=f"up to iteration {many + 2}: .*first in 'head'"):
            run(
                tmp_path / str(many),
                on_outputs('head', spoiled, range(3, 99)),
                **{'default_hooks.peft.nonfinite_iters': many},
            )
    with pytest.raises(UsageError, match='nonfinite_iters=0'):
        run(tmp_path, **{'default_hooks.peft.nonfinite_iters': 0})


def test_layers_are_watched_only_when_the_run_is_about_to_stop(tmp_path, monkeypatch):
    watched = []
    monkeypatch.setattr(Origin, '__init__', lambda self, model: watched.append(self))
    monkeypatch.setattr(Origin, 'close', lambda self: watched.remove(self))
    counts = []
    note = Do('before_train_iter', lambda now: counts.append(len(watched)))
    run(tmp_path, spoil_batch([4, 5]), note, stop=7)
    assert counts == [0, 0, 0, 0, 0, 1, 0]


def test_accumulated_gradients_count_by_the_step(tmp_path):
    changes = {'optim_wrapper.accumulative_counts': 3}
    run(tmp_path / 'some', spoil_batch([1, 2, 3, 4, 5]), stop=9, **changes)
    with pytest.raises(UsageError, match='up to iteration 9: '):
        run(tmp_path / 'many', spoil_batch([1, 6, 7]), stop=9, **changes)


def test_clipping_does_not_hide_where_it_begins(tmp_path):
    clip = {'optim_wrapper.clip_grad': dict(max_norm=1.0)}
    with pytest.raises(UsageError, match=re.compile(BACKWARD, re.DOTALL)):
        run(tmp_path, on_outputs('backbone.stage.0', rough), **clip)


def test_a_compiled_step_is_watched(tmp_path):
    changes = {'compile': dict(backend='eager'), 'model.backbone.dropout': 0.0}
    run(tmp_path / 'once', spoil_batch([3]), stop=5, **changes)
    with pytest.raises(UsageError, match='up to iteration 5: loss is nan.* NaN is first given to'):
        run(tmp_path / 'on', spoil_batch([3, 4, 5]), stop=6, **changes)


def louder(losses):
    return {k: v * 2.0**20 for k, v in losses.items()} if isinstance(losses, dict) else losses


def test_a_scaler_that_finds_its_scale_stops_nothing(tmp_path, amp_on_cpu, told):
    scaled = LOW_PRECISION | {'optim_wrapper.loss_scale': dict(init_scale=2.0**120)}
    runner = run(tmp_path, on_outputs('', louder), stop=24, **scaled)
    assert 2.0**100 < runner.optim_wrapper.loss_scaler.get_scale() < 2.0**112
    steps = [state['step'].item() for state in runner.optim_wrapper.optimizer.state.values()]
    assert 24 - 20 <= min(steps) <= max(steps) <= 24 - 8
    assert not told


def test_a_scaler_cannot_hide_what_goes_on(tmp_path, amp_on_cpu):
    with pytest.raises(UsageError, match=r'up to iteration 32: .*' + BACKWARD) as error:
        run(
            tmp_path / 'a',
            on_outputs('backbone.stage.0', rough, range(3, 99)),
            stop=40,
            **LOW_PRECISION,
        )
    assert '(nonfinite_iters=3)' in str(error.value)
    with pytest.raises(UsageError, match=r"up to iteration 5: loss is nan.*in 'head'"):
        run(tmp_path / 'b', on_outputs('head', spoiled, range(3, 99)), stop=40, **LOW_PRECISION)


def poison(now):
    named_adapters(now.model)['backbone.fc.parametrizations.weight.0'].core.data[0, 0] = nan


@pytest.mark.parametrize('by_epoch', [False, True])
def test_weights_that_are_not_finite_take_no_checkpoints_place(by_epoch, tmp_path):
    hook = Do('after_train_iter', poison, [8])
    with pytest.raises(UsageError, match=r'fc\.parametrizations\.weight\.0\.core.*not saved'):
        if by_epoch:  # of 4 iterations
            runner = toy_runner(tmp_path, **{'default_hooks.checkpoint.max_keep_ckpts': 1})
            runner.register_hook(hook)
            runner.train()
        else:
            run(
                tmp_path,
                hook,
                **by_iterations(12, 4),
                **{'default_hooks.checkpoint.max_keep_ckpts': 1},
            )
    good = 'epoch_1.pth' if by_epoch else 'iter_4.pth'
    assert [p.name for p in tmp_path.glob('*.pth')] == [good]
    assert (tmp_path / 'last_checkpoint').read_text().endswith(good)
    toy_runner(tmp_path / 'test', load_from=str(tmp_path / good)).test()


def test_averages_that_are_not_finite_are_not_saved(tmp_path):
    def poison_average(now):
        ema = next(h for h in now.runner.hooks if hasattr(h, 'ema_model')).ema_model
        ema.module.head.bias.data[1] = nan

    ema = dict(custom_hooks=[dict(type='EMAHook')])
    with pytest.raises(UsageError, match=r"'head\.bias'.*not saved"):
        run(tmp_path, Do('before_train_iter', poison_average, [6]), interval=4, **ema)
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_4.pth')


def test_a_mask_may_be_infinite(tmp_path):
    runner = toy_runner(tmp_path, **by_iterations(4, 2))
    runner.model.head.mask = nn.Buffer(torch.tensor([0.0, -float('inf')]))
    runner.train()
    assert (tmp_path / 'iter_4.pth').is_file()


def thaw_statistics(now):
    release_statistics(now.model)


def test_statistics_that_move_are_named(tmp_path):
    with pytest.raises(UsageError) as error:
        run(tmp_path, Do('before_train', thaw_statistics))
    message = str(error.value)
    assert re.search(r'^[23] of \d+ frozen tensors changed between iterations 0 and 10\.', message)
    assert re.search(r"'backbone\.norm\.running_mean': element \[0\] went from 0 to \S+\.", message)


def test_a_frozen_weight_that_changed_is_named(tmp_path):
    def write(now):
        now.model.backbone.stem.parametrizations.weight.original.data[3, 1, 2, 0] += 0.25

    with pytest.raises(UsageError, match=r'^1 of \d+ .* between iterations 4 and 8') as error:
        run(tmp_path, Do('after_train_iter', write, [7]), interval=4)
    told = re.search(
        r"'backbone\.stem\.parametrizations\.weight\.original': "
        r'element \[3, 1, 2, 0\] went from (\S+) to (\S+)\. ',
        str(error.value),
    )
    before, after = map(float, told.groups())
    assert after - before == pytest.approx(0.25, abs=1e-5)
    assert [p.name for p in tmp_path.glob('*.pth')] == ['iter_4.pth']


def test_a_change_past_what_is_kept_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_watch, 'KEPT', 4)

    def write(now):
        now.model.backbone.stage[2].bias.data[7] += 1e-6

    with pytest.raises(UsageError, match=r"'backbone\.stage\.2\.bias': past its first 4 elements"):
        run(tmp_path, Do('after_train_iter', write, [1]))


def test_a_base_that_may_move_is_left_alone(tmp_path):
    hook = Do('before_train', thaw_statistics)
    run(tmp_path, hook, **{'default_hooks.peft.check_frozen': False})


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


def test_frozen_parameters_in_the_optimizer_are_harmless(tmp_path, told):
    changes = {'optim_wrapper.constructor': 'WholeModel', 'optim_wrapper.optimizer.weight_decay': 1}
    runner = run(tmp_path, **changes)
    groups = runner.optim_wrapper.param_groups
    assert any(not p.requires_grad for group in groups for p in group['params'])
    assert not told


def test_an_optimizer_without_adapters_is_refused(tmp_path):
    expected = r'4 adapter parameters are not in the optimizer.*optim_wrapper\.constructor'
    with pytest.raises(UsageError, match=expected):
        run(tmp_path, method=dict(type='IA3'), **{'optim_wrapper.constructor': 'HeadAlone'})


def still(name='backbone.fc'):
    mult = dict(custom_keys={name: dict(lr_mult=0.0)})
    return {'optim_wrapper.paramwise_cfg': mult}


def test_an_adapter_whose_rate_is_zero_is_named(tmp_path):
    expected = r"^1 of 4 adapters never move, such as 'backbone\.fc\.\S*0': .*targets\.exclude"
    with pytest.raises(UsageError, match=expected):
        run(tmp_path, **still())


def test_an_adapter_that_the_optimizer_lost_is_named(tmp_path):
    def lose(now):
        lost = {id(p) for p in now.model.backbone.stem.parameters()}
        for group in now.runner.optim_wrapper.param_groups:
            group['params'] = [p for p in group['params'] if id(p) not in lost]

    with pytest.raises(UsageError, match=r"1 of 4 adapters never move, .*'backbone\.stem"):
        run(tmp_path, Do('before_train', lose))


def test_an_adapter_that_is_put_back_is_named(tmp_path, told):
    start = {}

    def put_back(now):
        values = now.model.state_dict()
        for key in values:
            if key.startswith('backbone.fc'):
                values[key].copy_(start.setdefault(key, values[key].clone()))

    run(tmp_path, Do('before_train', put_back), Do('after_train_iter', put_back))
    (text,) = told
    assert "1 of 4 adapters are where they started after 10 steps, such as 'backbone.fc" in text
    assert 'at learning rates up to 0.008' in text


def test_a_run_at_rate_zero_is_told(tmp_path, told):
    run(tmp_path, **{'optim_wrapper.optimizer.lr': 0.0})
    (text,) = told
    assert text.startswith('4 of 4 adapters are where they started, ')


def test_a_warmup_is_waited_for(tmp_path, told):
    """IA3's ones do not move in float32 as long as the rate is below their precision."""
    warmup = [dict(type='LinearLR', start_factor=1e-9, end=400, by_epoch=False)]
    slow = dict(type='IA3')
    runner = run(
        tmp_path,
        method=slow,
        stop=16,
        param_scheduler=warmup,
        **{'optim_wrapper.optimizer.lr': 1e-5},
    )
    assert runner.iter == 16 and not [t for t in told if 'after 10 steps' in t]


@pytest.mark.parametrize('name', METHODS)
def test_nothing_is_told_of_a_run_that_is_well(name, tmp_path, told):
    changes = {
        'model.backbone.block': True,
        'optim_wrapper.clip_grad': dict(max_norm=5.0),
        'custom_hooks': [dict(type='EMAHook', momentum=0.1)],
    }
    runner = run(tmp_path, method=METHODS[name], stop=16, interval=8, **changes)
    assert runner.iter == 16
    assert not [text for text in told if 'adapters' in text or 'Iteration' in text]
