"""Layers that a network reads and never calls, and adapters that would be dead there."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.errors import TrainingError
from mmpeft.injection.calls import uncalled, unwatch, watch

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

PARALLEL = dict(type='ParallelAdapter', rank=2)


class Reads(nn.Module):
    """Calls two layers, and reads the weight of one of them and of a third."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.both = (nn.Linear(4, 4) for _ in range(3))
        self.buffer = nn.Buffer(torch.zeros(()))

    def forward(self, x, scale=None):
        self.buffer.add_(1)
        x = self.called(x.to(self.both.weight.dtype)) + torch.rand(())
        if scale is not None:
            x = x * scale
        return self.both(nn.functional.linear(x, self.read.weight, self.read.bias))


def test_a_trace_tells_what_is_read_and_not_called():
    model = Reads()
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    assert uncalled({'a': model}) == {'a.read'}
    assert torch.rand(()) == expected and model.buffer == 0
    assert [row.name for row in mmpeft.inject(model, PARALLEL).rows] == ['called', 'both']
    model(torch.randn(2, 4)).sum().backward()


def test_an_adapted_weight_is_read_as_a_plain_one():
    model = Reads()
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    assert uncalled({'a': model}) == {'a.read'}


class Branches(Reads):
    """Cannot be traced."""

    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


def dead():
    """A network with a dead adapter that no trace finds."""
    model = nn.Sequential(Branches(), nn.Linear(4, 4))
    assert uncalled({'': model[0]}) == set()
    mmpeft.inject(model, PARALLEL)
    return model


@pytest.mark.parametrize('how', [lambda model: model, copy.deepcopy], ids=['itself', 'a copy'])
def test_a_dead_adapter_is_an_error_in_the_first_pass_with_gradients(how):
    model, x = how(dead()), torch.randn(2, 4)
    with torch.no_grad():
        model(x)
    with pytest.raises(TrainingError, match="ParallelAdapter at '0.read' .*exclude='0.read'"):
        model(x)
    model(x)  # once


def test_the_error_says_what_helps():
    model = nn.Sequential(Branches(), nn.Linear(4, 4))
    mmpeft.inject(model, PARALLEL, dict(exclude='0.read'))
    model(torch.randn(2, 4)).sum().backward()
    assert not model._forward_hooks and not model._forward_pre_hooks


class Wrong(nn.Module):
    """A module inside is used and not called."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x):
        for layer in self.mlp:
            x = layer(x)
        return x


def test_an_adapter_of_a_module_whose_parts_are_called_alone_is_dead():
    model = Wrong()
    mmpeft.inject(model, dict(type='PfeifferAdapter', rank=2))
    with pytest.raises(TrainingError, match="PfeifferAdapter at 'mlp'"):
        model(torch.randn(2, 4))


class Experts(nn.Module):
    """Uses one of its parts in a pass: experts, heads of tasks, layers that are dropped."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2)
        )
        self.heads = nn.ModuleDict(dict(a=nn.Linear(4, 3), b=nn.Linear(4, 2)))
        self.embedding, self.tied = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.tied.weight = self.embedding.weight

    def forward(self, index, head='a'):
        return self.heads[head](self.experts[0](self.embedding(index)))


@pytest.mark.parametrize('method', ['ParallelAdapter', 'PfeifferAdapter'])
def test_a_module_that_is_not_used_in_a_pass_is_left_alone(method):
    model = Experts()
    mmpeft.inject(model, dict(type=method, rank=2))
    model(torch.tensor([1, 2])).sum().backward()
    assert not model._forward_hooks


def test_an_error_in_a_pass_is_not_hidden_and_the_next_one_is_checked():
    model = dead()
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        model(torch.randn(2, 5))
    assert not torch.overrides._get_current_function_mode_stack()
    with pytest.raises(TrainingError):
        model(torch.randn(2, 4))


def test_recomputed_blocks_run():
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Wrong().mlp

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=True)

    model = Recomputed()
    for method in ('PfeifferAdapter', 'ParallelAdapter'):
        mmpeft.inject(model, dict(type=method, rank=2))
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert not model._forward_hooks


def test_methods_on_weights_and_removal_leave_no_hook():
    model = dead()
    mmpeft.remove(model)
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    assert not model._forward_hooks and not model._forward_pre_hooks
    watch(model)
    assert not model._forward_hooks
    mmpeft.inject(model, PARALLEL)
    unwatch(model)
    model(torch.randn(2, 4))


def test_compiled_passes_are_not_watched():
    model = dead()
    compiled = torch.compile(model, backend='eager', fullgraph=False)
    compiled(torch.randn(2, 4))
    with pytest.raises(TrainingError):
        model(torch.randn(2, 4))


def test_torchvision_swin_says_nothing():
    model = torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [2, 4], [4, 4], num_classes=5)
    mmpeft.inject(model, PARALLEL)
    model(torch.randn(1, 3, 32, 32)).sum().backward()
