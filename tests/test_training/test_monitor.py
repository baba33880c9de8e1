"""Loops of one's own in which something goes wrong, with one line that watches them."""

import copy
import re
import warnings

import pytest
import torch
from torch import nan, nn

import mmpeft
from mmpeft.errors import TrainingError, UsageError
from mmpeft.injection.freeze import release_statistics
from mmpeft.injection.site import named_adapters
from tests.allocating import adapted_network, loss_of, through_a_file, trainable
from tests.cases import METHODS

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
ADALORA = dict(type='AdaLoRA', rank=2, warmup=2, settle=5, every=2, orthogonality=0.0)
LORA = dict(type='LoRA', rank=2)


def started(method=LORA, lr=0.02, steps=20, **options):
    model, _ = adapted_network(method)
    optimizer = torch.optim.AdamW(trainable(model), lr)
    return model, optimizer, mmpeft.monitor(model, optimizer, steps, **options)


def train(model, optimizer, steps, change=lambda step: None):
    for step in steps:
        change(step)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def fits(config):
    """Whether a method has something to train in this network, and a place there."""
    kind = mmpeft.METHODS.get(config['type'])
    return config['type'] != 'Frozen' and {'conv', 'layer'} & {*(kind.kinds or ('conv',))}


@pytest.mark.parametrize('name', [name for name in METHODS if fits(METHODS[name])])
def test_a_loop_that_is_well_has_no_warnings(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', '.*adapters have more parameters')
        model, optimizer, monitor = started(METHODS[name])
        with monitor:
            train(model, optimizer, range(20))
    assert monitor.iteration == 20
    assert not optimizer._optimizer_step_pre_hooks and not model._forward_hooks


def test_an_adapter_without_gradient_stops_the_loop_with_its_name():
    model, optimizer, _ = started()
    model.out.forward = lambda x: x[:, :4]
    with pytest.raises(TrainingError, match=r'No gradient reached 1 of 3 .* in 10 iter.*out\.'):
        train(model, optimizer, range(20))
    model, optimizer, monitor = started()
    model.out.forward = lambda x: x[:, :4]
    train(model, optimizer, range(3))
    with pytest.raises(TrainingError, match='No gradient reached 1 of 3'):
        monitor.close()


def test_an_adapter_that_does_not_move_is_named():
    model, optimizer, monitor = started(lr=0.0)
    train(model, optimizer, range(12))
    with pytest.warns(UserWarning, match='3 of 3 adapters are where they started'):
        monitor.close()
    model, optimizer, _ = started()
    optimizer.param_groups[0]['params'] = optimizer.param_groups[0]['params'][1:]
    with pytest.raises(TrainingError, match=r'adapters never move|No gradient') as error:
        for p in named_adapters(model)['conv.parametrizations.weight.0'].parameters():
            optimizer.param_groups[0]['params'] = [
                q for q in optimizer.param_groups[0]['params'] if q is not p
            ]
        train(model, optimizer, range(20))
    assert "1 of 3 adapters never move, such as 'conv." in str(error.value)


def test_an_optimizer_from_before_the_adapters_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UsageError, match=r'has no adapters\. Call mmpeft\.inject'):
        mmpeft.monitor(model, optimizer)
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    with pytest.raises(UsageError, match='4 adapter parameters are not in the optimizer.*Build it'):
        mmpeft.monitor(model, optimizer)


def test_a_frozen_base_that_changes_stops_the_loop():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    release_statistics(model)
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    with pytest.raises(TrainingError, match=r"between iterations 0 and 3.*'1\.running_mean'"):
        with mmpeft.monitor(model, optimizer):
            for _ in range(3):
                model(torch.randn(2, 3, 4, 4)).square().mean().backward()
                optimizer.step()


def values(model):
    return copy.deepcopy(dict(model.named_parameters()))


def test_a_step_that_is_not_finite_is_skipped_and_many_stop_the_loop():
    model, optimizer, _ = started(ADALORA)

    def spoil(at):
        def hook(module, args, output):
            return output * nan if now[0] in at else None

        now = [0]
        handle = model.hidden.register_forward_hook(hook)
        return lambda step: now.__setitem__(0, step), handle

    change, handle = spoil([2])
    before = []
    with pytest.warns(UserWarning, match='Iteration 3: .*step was skipped'):
        train(model, optimizer, range(5), lambda s: (change(s), before.append(values(model))))
    assert all(torch.equal(before[2][k], before[3][k]) for k in before[2])
    assert not all(torch.equal(before[3][k], before[4][k]) for k in before[2])
    handle.remove()
    change, _ = spoil(range(5, 99))
    expected = r"up to iteration 8: .*NaN appears first in 'hidden"
    with pytest.warns(UserWarning), pytest.raises(TrainingError, match=expected):
        train(model, optimizer, range(5, 20), change)


class WithLoss(nn.Module):
    def __init__(self, far=0.0):
        super().__init__()
        self.fc, self.far = nn.Linear(4, 2), far

    def forward(self, x):
        y = self.fc(x)
        return dict(logits=y, loss=y.square().mean() + self.far)


def test_an_infinite_loss_with_finite_gradients_is_one_too():
    model = WithLoss(torch.inf)
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    mmpeft.monitor(model, optimizer, nonfinite_iters=2)
    with pytest.warns(UserWarning), pytest.raises(TrainingError, match='loss is inf, the grad'):
        for _ in range(2):
            model(torch.randn(2, 4))['loss'].backward()
            optimizer.step()


def test_weights_that_are_not_finite_are_not_saved():
    model, optimizer, monitor = started()
    train(model, optimizer, range(2))
    monitor.state_dict()
    next(named_adapters(model)['hidden.parametrizations.weight.0'].parameters()).data[0] = nan
    with pytest.raises(TrainingError, match=r'1 tensors of the model are NaN.*hidden.*not saved'):
        monitor.state_dict()


@pytest.mark.parametrize('method', [ADALORA, dict(type='FISH', samples=4)])
def test_a_resumed_loop_equals_one_that_ran_through(method):
    model, optimizer, monitor = started(method)
    train(model, optimizer, range(9))
    states = through_a_file([part.state_dict() for part in (model, optimizer, monitor)])
    train(model, optimizer, range(9, 20))
    parts = started(method)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    train(*parts[:2], range(9, 20))
    assert parts[2].iteration == 20
    resumed = parts[0].state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in model.state_dict().items())
    (allocator,) = parts[2].allocation.allocators
    assert allocator.step == 20


def test_a_resumed_loop_that_forgets_the_monitors_state_is_told():
    model, optimizer, monitor = started(ADALORA)
    train(model, optimizer, range(2))
    parts = started(ADALORA)
    for part, state in zip(parts[:2], (model.state_dict(), optimizer.state_dict()), strict=True):
        part.load_state_dict(state)
    with pytest.warns(UserWarning, match='allocator is at step 0. To resume'):
        train(*parts[:2], range(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        train(*parts[:2], range(3, 5))


def test_allocators_need_the_number_of_steps():
    with pytest.raises(UsageError, match=r'AdaLoRA decides.*monitor\(model, optimizer, steps=1000'):
        started(ADALORA, steps=None)
    with pytest.raises(UsageError, match='needs the number of optimizer steps'):
        started(ADALORA, steps='100')
    started(steps=None)


@pytest.mark.parametrize(
    'arguments, rule',
    [
        (dict(check_iters='10'), "check_iters='10' must be a number of steps >= 0."),
        (dict(check_iters=-1), 'check_iters=-1 must be a number of steps >= 0.'),
        (dict(nonfinite_iters=0), 'nonfinite_iters=0 must be a number of steps >= 1.'),
        (dict(nonfinite_iters=None), 'nonfinite_iters=None must be a number of steps >= 1.'),
    ],
)
def test_what_is_no_number_of_steps_is_refused(arguments, rule):
    with pytest.raises(UsageError, match=rule):
        started(**arguments)


@pytest.mark.parametrize('copied', [False, True])
def test_a_loop_that_forgets_the_allocator_is_told_once(copied):
    model, _ = adapted_network(ADALORA, include='out')
    model = copy.deepcopy(model) if copied else model
    optimizer = torch.optim.AdamW(trainable(model), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        train(model, optimizer, range(99))
    with pytest.warns(UserWarning, match=r'AdaLoRA decides.*mmpeft\.monitor') as told:
        train(model, optimizer, range(150))
    assert len(told) == 1
    model, optimizer, monitor = started(ADALORA, steps=150)
    with warnings.catch_warnings(), monitor:
        warnings.simplefilter('error')
        train(model, optimizer, range(150))


def bare(model):
    x = torch.ones(2, 3, 6, 6, dtype=torch.float64)
    return model(x).square().mean()


def test_a_penalty_that_was_never_added_is_said():
    method = dict(type='LoRA', rank=2, mpc='o', mpc_weight=0.3)
    model, optimizer, _ = started(method)
    with pytest.warns(UserWarning, match=r'LoRA has a term of the loss, and none of 10'):
        for _ in range(10):
            mmpeft.penalty(model)  # computed, and forgotten
            bare(model).backward()
            optimizer.step()


@pytest.mark.parametrize('accumulate', [1, 2])
def test_the_monitor_adds_the_penalty_where_the_loss_lacks_it(accumulate):
    method = dict(type='LoRA', rank=2, mpc='o', mpc_weight=0.3)
    after = []
    for adds, in_loss in ((False, True), (True, False), (True, True)):
        model, _ = adapted_network(method)
        optimizer = torch.optim.SGD(trainable(model), 0.05)
        with mmpeft.monitor(model, optimizer, add_penalty=adds), warnings.catch_warnings():
            warnings.simplefilter('error')
            for _ in range(12):
                optimizer.zero_grad()
                for micro in range(accumulate):
                    loss = bare(model) / accumulate
                    (loss + mmpeft.penalty(model) if in_loss and not micro else loss).backward()
                optimizer.step()
        after.append(values(model))
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=1e-12, atol=1e-12)


def test_a_step_with_a_closure_is_the_same():
    """Lightning computes the gradients inside the optimizer's step."""
    after = []
    for closed in (False, True):
        model, optimizer, monitor = started(dict(type='FISH', samples=4))

        def gradients(step, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        with monitor:
            for step in range(12):
                if closed:
                    optimizer.step(lambda step=step: gradients(step))
                else:
                    gradients(step)
                    optimizer.step()
        after.append(values(model))
    assert all(torch.equal(after[0][key], after[1][key]) for key in after[0])


def test_wrappers_of_model_and_optimizer_are_seen_through():
    model, _ = adapted_network(LORA)
    wrapped = nn.ModuleDict(dict(module=torch.compile(model, backend='eager')))

    class Wrapper:
        optimizer = torch.optim.SGD(trainable(model), 0.1)

    monitor = mmpeft.monitor(wrapped, Wrapper())
    assert monitor.model is model and monitor.optimizer is Wrapper.optimizer
    monitor.close()
    two = nn.ModuleDict(dict(unet=model, text=adapted_network(LORA)[0]))
    with pytest.raises(UsageError, match="several adapted modules, 'unet', 'text'. Give each"):
        mmpeft.monitor(two, Wrapper())


def test_an_exception_in_the_loop_is_not_hidden():
    model, optimizer, monitor = started()
    with pytest.raises(KeyError), monitor:
        raise KeyError('mine')
    assert not optimizer._optimizer_step_pre_hooks
    assert re.match('Go back', monitor.last_checkpoint())


def test_sparse_gradients_are_looked_at():
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 4))
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='1'))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mmpeft.monitor(model, optimizer, nonfinite_iters=2)
    for scale in (1.0, nan, 1.0):
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        (scale * model(torch.tensor([1, 1, 2])).sum()).backward()
        optimizer.step()
        assert torch.equal(before, model[0].weight) is (scale != 1.0)


def test_a_run_that_ends_before_its_allocator_warns():
    model, optimizer, monitor = started(ADALORA, steps=60)
    train(model, optimizer, range(10))
    with pytest.warns(UserWarning, match='within 60 steps, and the run ended after 10'):
        monitor.close()


def test_an_optimizer_that_never_steps_warns():
    model, optimizer, monitor = started()
    loss_of(model, 0).backward()
    with pytest.warns(UserWarning, match='was never called: nothing was watched'):
        monitor.close()


def test_a_loss_that_the_model_does_not_return_is_not_called_finite():
    network = nn.Sequential(nn.Linear(4, 4))
    mmpeft.inject(network, LORA)
    optimizer = torch.optim.SGD(trainable(network), 0.1)
    with mmpeft.monitor(network, optimizer), pytest.warns(UserWarning, match='loss was not seen'):
        (network(torch.randn(2, 4)).sum() * nan).backward()
        optimizer.step()
