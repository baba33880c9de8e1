"""Blocks of adapted networks, compiled one by one."""

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from tests.cases import METHODS, randomize


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)

    def forward(self, x):
        return x + self.second(self.act(self.first(x)))


class Network(nn.Module):
    """Pairs of equal blocks, each pair of another width."""

    def __init__(self, widths):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for width in widths for _ in range(2)))
        self.widths = widths

    def forward(self, x):
        rows = []
        for number, width in enumerate(self.widths):
            pair = self.blocks[2 * number : 2 * number + 2]
            rows.append(pair(x[:, :width].contiguous()).sum(1))
        return torch.stack(rows)


@pytest.fixture(autouse=True)
def limit():
    """torch's own, whatever other tests have set."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield 8


@pytest.fixture
def backend():
    """One that counts the graphs."""

    def count(graph, inputs):
        count.graphs += 1
        return graph.forward

    count.graphs = 0
    return count


def adapted(method, widths=(6,), **how):
    model = Network(widths).double()
    mmpeft.inject(model, METHODS[method], **how)
    randomize(model)
    return model


def results(model, x):
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), trained)]


@pytest.mark.parametrize('execution', ['auto', 'plain'])
@pytest.mark.parametrize('name', ['flora', 'lora', 'liera', 'dora', 'ia3', 'houlsby'])
def test_outputs_and_gradients_are_the_same(name, execution, backend):
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    model = adapted(name, execution=execution)
    expected, names = results(model, x), list(model.state_dict())
    assert mmpeft.compile_blocks(model, backend=backend) == ['blocks.0', 'blocks.1']
    for found, value in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    if name == 'houlsby':  # its first pass is watched, and not compiled
        results(model, x)
    assert backend.graphs == (2 if name == 'houlsby' else 1)  # an adapter after the block is one
    assert list(model.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected[0], rtol=1e-12, atol=1e-12)
    mmpeft.remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in Network((6,)).modules()]


def test_more_widths_than_torch_compiles_by_itself(limit, backend):
    widths = range(2, limit + 5)
    model = adapted('lora', widths)
    x = torch.randn(3, limit + 5, dtype=torch.float64, requires_grad=True)
    expected = model(x)
    mmpeft.compile_blocks(model, backend=backend, dynamic=False)
    torch.testing.assert_close(model(x), expected)
    assert backend.graphs == len(widths)


def test_a_limit_of_the_user_that_is_higher_stays():
    torch._dynamo.config.recompile_limit = 1000
    mmpeft.compile_blocks(adapted('lora'), backend='eager')
    assert torch._dynamo.config.recompile_limit == 1000


@pytest.mark.parametrize(
    'model, expected',
    [
        (lambda: Network((6,)), 'has no adapters'),
        (lambda: adapted('lora', memory='small'), "memory='small'.* Leave one of the two out"),
        (lambda: adapted('lora', targets=dict(module='blocks.0')), "no blocks in 'blocks.0'"),
    ],
)
def test_what_cannot_be_compiled(model, expected):
    with pytest.raises(UsageError, match=expected):
        mmpeft.compile_blocks(model())
