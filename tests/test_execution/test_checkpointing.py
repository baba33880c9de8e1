"""Blocks that run again in backward: what is repeated, what is kept, and the same gradients."""

import pytest
import timm
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import mmpeft
from mmpeft.analysis.memory import saved_bytes
from mmpeft.execution.cpu import onednn
from mmpeft.execution.memory import RecomputedBlock
from tests.cases import METHODS, randomize
from tests.comparing import assert_as_plain, assert_equal, plain_of, results

WIDTH, POSITIONS = 16, 64


class Block(nn.Module):
    """Two layers with a drop path behind them, and what ``end`` does last."""

    def __init__(self, end):
        super().__init__()
        self.end = end
        self.one, self.two = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        y = self.two(nn.functional.gelu(self.one(x)))
        mask = x.new_empty(len(x), 1, 1).bernoulli_(0.5)
        return self.end(x + y * mask)


class InCheckpoint(Block):
    """Whose second layer is in a checkpoint of the block's own."""

    def forward(self, x):
        hidden = nn.functional.gelu(self.one(x))
        return self.end(x + checkpoint(self.two, hidden, use_reentrant=False))


ENDS = dict(sum=nn.Identity(), relu=nn.ReLU(), in_place=nn.ReLU(inplace=True), gelu=nn.GELU())


def network(end, memory, method='flora', kind=Block, **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(kind(ENDS[end]), kind(ENDS[end]), kind(ENDS[end])).double()
    mmpeft.inject(model, METHODS[method], memory=memory, **arguments)
    randomize(model, 0.05)
    return model, torch.randn(4, POSITIONS, WIDTH, dtype=torch.float64)


def products_in_backward(model, x):
    """Multiply-adds of the forward and of the backward pass."""
    with FlopCounterMode(display=False) as forward:
        y = model(x.clone().requires_grad_())
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2


@pytest.mark.parametrize('kind', [Block, InCheckpoint])
@pytest.mark.parametrize('end', ENDS)
@pytest.mark.parametrize('method', ['flora', 'liera', 'dora', 'ia3'])
def test_the_gradients_are_those_of_all_maps_kept(method, end, kind):
    model, x = network(end, 'small', method, kind)
    assert_equal(results(model, x), results(plain_of(model), x), 1e-10)


@pytest.mark.parametrize('end', ['sum', 'relu', 'in_place'])
@pytest.mark.parametrize('method', ['lora', 'liera'])
def test_the_last_product_of_a_block_is_not_repeated(method, end):
    repeated = []
    for memory in ('speed', 'small'):
        model, x = network(end, memory, method)
        repeated.append(products_in_backward(model, x)[1])
    again = repeated[1] - repeated[0]
    positions, layer, thin = 4 * POSITIONS, 4 * WIDTH**2, 5 * WIDTH * METHODS[method]['rank']
    once = positions * (layer + thin) + 2 * WIDTH * thin
    assert 3 * positions * layer <= again <= 3 * once < 3 * 2 * positions * layer


@pytest.mark.parametrize(
    'name, arguments, share',
    [
        ('convnext_atto', dict(drop_path_rate=0.1), 0.62),  # with layer scale
        ('convnextv2_atto', dict(drop_path_rate=0.1), 0.62),
        ('vit_tiny_patch16_224', dict(drop_path_rate=0.1, img_size=128, init_values=0.1), 0.75),
        ('resnet50', {}, 0.8),
    ],
)
def test_networks_repeat_less_than_a_forward_pass(name, arguments, share):
    """With masks, scales, batch norms and ReLUs behind the last products."""
    counts = []
    for memory in ('speed', 'small'):
        model = timm.create_model(name, num_classes=0, **arguments).double()
        mmpeft.inject(model, dict(type='FLoRA', rank=4), memory=memory)
        forward, backward = products_in_backward(
            model.train(), torch.randn(1, 3, 128, 128, dtype=torch.float64)
        )
        counts.append(backward)
    assert 0 < counts[1] - counts[0] < share * forward


def test_a_frozen_layer_of_onednn_is_not_repeated(monkeypatch):
    monkeypatch.setattr(onednn, 'IS_FASTER', True)
    monkeypatch.setattr(onednn, 'SMALL_PRODUCT', 0)
    model, x = network('sum', 'small', targets=dict(include=[r'.*\.one']))
    model, calls, run = model.float(), [], onednn.linear
    y = model(x.float().requires_grad_())

    def counted(x, weight, *bias):
        calls.append((weight.data_ptr(), weight.is_contiguous()))
        return run(x, weight, *bias)

    monkeypatch.setattr(onednn, 'linear', counted)
    y.sum().backward()
    for block in model:
        frozen = block.two.weight.data_ptr()
        assert (frozen, False) in calls and (frozen, True) not in calls


@pytest.mark.parametrize('end, outputs', [('sum', 0), ('relu', 1), ('in_place', 1), ('gelu', 0)])
def test_what_is_kept(end, outputs):
    """Inputs, which are the outputs of the blocks before, and masks; not the input of a GELU."""
    model, x = network(end, 'small')
    masks = 0 if end == 'gelu' else 3 * 4 * 8
    assert saved_bytes(model, x.requires_grad_())[0] == (3 + outputs) * x.nbytes + masks


def test_a_second_backward():
    model, x = network('relu', 'small')
    y = model(x.requires_grad_())
    first = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(*first, *second)
    with pytest.raises(RuntimeError, match='a second time'):
        torch.autograd.grad(y.square().sum(), x)


def test_an_output_that_changes_in_place_is_noticed():
    model, x = network('relu', 'small')
    y = model[0](x.requires_grad_())
    total = y.sum()
    y.data.zero_()  # which autograd does not see
    total.backward()
    y = model[0](x)
    total = y.sum()
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        total.backward()


def test_where_recomputations_do_not_stop_early():
    model, x = network('relu', 'small')
    expected = results(model, x)
    with set_checkpoint_early_stop(False):
        assert_equal(results(model, x), expected, 1e-12)


def test_hooks_around_it_see_what_is_kept():
    model, x = network('relu', 'small')
    expected = results(model, x)

    def on_cpu(x):
        with save_on_cpu():
            return model(x)

    assert_equal(results(model, x, on_cpu), expected, 1e-12)


def test_what_is_not_dense_is_not_kept():
    class Sparse(Block):
        def forward(self, x):
            mixing = torch.eye(WIDTH, dtype=x.dtype).to_sparse()
            return torch.sparse.mm(mixing, super().forward(x).flatten(0, 1).T).T.view(x.shape)

    model, x = network('relu', 'small', kind=Sparse)
    assert_equal(results(model, x), results(plain_of(model), x), 1e-10)


def test_backward_inside_a_block():
    """As of a penalty that a block computes of its own gradients."""

    class Penalised(Block):
        def forward(self, x):
            with torch.enable_grad():
                own = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.two(self.one(own)).sum(), own)
            return super().forward(x) + slope

    model, x = network('sum', 'small', kind=Penalised)
    assert_equal(results(model, x), results(plain_of(model), x), 1e-10)


class Dense(nn.Module):
    """Layers that see the outputs of all before them, in a list that grows (DenseNet)."""

    class Layer(nn.Module):
        def __init__(self, before):
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH * before, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, found, notes=None):
            notes['calls'] += 1
            return self.two(self.one(torch.cat(found, -1)).relu())

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Dense.Layer(n) for n in (1, 2, 3))

    def forward(self, x):
        found, notes = [x], dict(calls=0)
        for layer in self.layers:
            found.append(layer(found, notes=notes))
        assert notes['calls'] == 3  # a block may change what it is given
        return torch.cat(found, -1)


def test_a_list_that_grows_after_a_block_saw_it():
    torch.manual_seed(0)
    model = Dense().double()
    mmpeft.inject(model, METHODS['flora'], memory='small')
    randomize(model)
    assert any(isinstance(m, RecomputedBlock) for m in model.modules())
    assert_as_plain(model, torch.randn(4, POSITIONS, WIDTH, dtype=torch.float64))
