"""Losses, gradients and weights that are not finite, each really happening in a Runner."""

import re
from functools import partial

import pytest
import torch
from torch import nan, nn

from mmpeft.errors import TrainingError, UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.training.checks.origin import Origin
from tests.toy import LOW_PRECISION, by_iterations, same, toy_runner
from tests.toy_runs import Do, all_values, on_outputs, rough, run, spoil_batch, spoiled

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('cause', [spoil_batch, partial(on_outputs, 'backbone.stage.0', rough)])
def test_a_step_that_is_not_finite_is_skipped(cause, tmp_path, warned):
    values = []

    def note(now):
        values.append(all_values(now.runner))

    cause = cause([5, 6]) if cause is spoil_batch else cause(at=[5, 6])
    runner = run(tmp_path, cause, Do('after_train_iter', note))
    assert same(values[3], values[4]) and same(values[4], values[5])
    assert not same(values[5], values[6])
    assert all(v.isfinite().all() for v in runner.model.state_dict().values())
    assert len(warned) == 2 and warned[0].startswith('Iteration 5: ') and 'was skipped' in warned[0]


def test_losses_are_read_without_a_warning(tmp_path, recwarn):
    run(tmp_path)
    assert not [str(w.message) for w in recwarn if 'to a scalar' in str(w.message)]


def test_allocators_see_nothing_of_a_step_that_is_skipped(tmp_path):
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
    with pytest.raises(TrainingError, match=re.compile(expected, re.DOTALL)) as error:
        run(tmp_path, cause, interval=3)
    assert 'up to iteration 6' in str(error.value)
    assert f'The last checkpoint is {tmp_path}/iter_3.pth' in str(error.value)


def test_an_infinite_loss_with_finite_gradients_is_one_too(tmp_path):
    def infinite(losses):
        return dict(losses, loss_far=losses['loss'].detach() + torch.inf)

    with pytest.raises(TrainingError, match='loss_far is inf, the gradients are finite'):
        run(tmp_path, on_outputs('', infinite))


def test_how_many_in_a_row_can_be_chosen(tmp_path):
    for many in (1, 5):
        with pytest.raises(TrainingError, match=f"up to iteration {many + 2}: .*first in 'head'"):
            run(
                tmp_path / str(many),
                on_outputs('head', spoiled, range(3, 99)),
                **{'default_hooks.peft.nonfinite_iters': many},
            )
    with pytest.raises(UsageError, match='nonfinite_iters=0'):
        run(tmp_path, **{'default_hooks.peft.nonfinite_iters': 0})


def test_layers_are_checked_only_when_the_run_is_about_to_stop(tmp_path, monkeypatch):
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
    with pytest.raises(TrainingError, match='up to iteration 9: '):
        run(tmp_path / 'many', spoil_batch([1, 6, 7]), stop=9, **changes)


def test_clipping_does_not_hide_where_it_begins(tmp_path):
    clip = {'optim_wrapper.clip_grad': dict(max_norm=1.0)}
    with pytest.raises(TrainingError, match=re.compile(BACKWARD, re.DOTALL)):
        run(tmp_path, on_outputs('backbone.stage.0', rough), **clip)


def test_a_compiled_step_is_guarded(tmp_path):
    changes = {'compile': dict(backend='eager'), 'model.backbone.dropout': 0.0}
    with pytest.raises(  # and not by the first bad batch, which is alone
        TrainingError, match='up to iteration 6: loss is nan.* NaN is first given to'
    ):
        run(tmp_path, spoil_batch([2, 4, 5, 6]), stop=7, **changes)


def louder(losses):
    return {k: v * 2.0**20 for k, v in losses.items()} if isinstance(losses, dict) else losses


def test_a_scaler_that_finds_its_scale_stops_nothing(tmp_path, amp_on_cpu, warned):
    scaled = LOW_PRECISION | {'optim_wrapper.loss_scale': dict(init_scale=2.0**120)}
    runner = run(tmp_path, on_outputs('', louder), stop=24, **scaled)
    assert 2.0**100 < runner.optim_wrapper.loss_scaler.get_scale() < 2.0**112
    steps = [state['step'].item() for state in runner.optim_wrapper.optimizer.state.values()]
    assert 24 - 20 <= min(steps) <= max(steps) <= 24 - 8
    assert not warned


def test_a_scaler_cannot_hide_what_goes_on(tmp_path, amp_on_cpu):
    with pytest.raises(TrainingError, match=r'up to iteration 32: .*' + BACKWARD) as error:
        run(
            tmp_path / 'a',
            on_outputs('backbone.stage.0', rough, range(3, 99)),
            stop=40,
            **LOW_PRECISION,
        )
    assert '(nonfinite_iters=3)' in str(error.value)
    with pytest.raises(TrainingError, match=r"up to iteration 5: loss is nan.*in 'head'"):
        run(tmp_path / 'b', on_outputs('head', spoiled, range(3, 99)), stop=40, **LOW_PRECISION)


def poison(now):
    named_adapters(now.model)['backbone.fc.parametrizations.weight.0'].core.data[0, 0] = nan


@pytest.mark.parametrize('by_epoch', [False, True])
def test_weights_that_are_not_finite_take_no_checkpoints_place(by_epoch, tmp_path):
    hook = Do('after_train_iter', poison, [8])
    with pytest.raises(TrainingError, match=r'fc\.parametrizations\.weight\.0\.core.*not saved'):
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
    with pytest.raises(TrainingError, match=r"'head\.bias'.*not saved"):
        run(tmp_path, Do('before_train_iter', poison_average, [6]), interval=4, **ema)
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_4.pth')


def test_a_mask_may_be_infinite(tmp_path):
    runner = toy_runner(tmp_path, **by_iterations(4, 2))
    runner.model.head.mask = nn.Buffer(torch.tensor([0.0, -float('inf')]))
    runner.train()
    assert (tmp_path / 'iter_4.pth').is_file()
