"""Terms that methods add to the loss."""

import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import adapter_parameters, named_adapters
from mmpeft.training.penalty import add_gradients
from tests.allocating import adapted_network, loss_of, trainable
from tests.cases import randomize


def test_the_sum_over_all_adapters_and_none_without_terms():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert mmpeft.penalty(model) is None
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    assert mmpeft.penalty(model) is None
    mmpeft.inject(model, dict(type='AdaLoRA', rank=2, init_rank=3))
    randomize(model)
    adapters = list(named_adapters(model).values())
    terms = [t for a in adapters if (t := a.method.penalty(a.factors, a.spec)) is not None]
    assert len(terms) == 2
    torch.testing.assert_close(mmpeft.penalty(model), sum(terms))
    mmpeft.penalty(model).backward()
    assert any(p.grad is not None for p in model.parameters())


def test_a_term_in_a_step_without_gradients():
    model, _ = adapted_network(dict(type='LoRA', rank=2, mpc='o'))
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    with mmpeft.monitor(model, optimizer, add_penalty=True):
        loss_of(model, 0).backward()
        with torch.no_grad():
            optimizer.step()


def test_gradients_reach_what_trains():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    mmpeft.inject(model, dict(type='LoRA', rank=2, mpc='o'))
    randomize(model)
    frozen, *others = adapter_parameters(model)
    frozen.requires_grad_(False)
    mmpeft.penalty(model).backward()
    expected = [p.grad.clone() for p in others]
    model.zero_grad()
    add_gradients(model)
    assert frozen.grad is None
    torch.testing.assert_close([p.grad for p in others], expected, rtol=0, atol=0)
    for parameter in others:
        parameter.requires_grad_(False)
    model.zero_grad()
    add_gradients(model)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_factors_that_adapters_share(monkeypatch):
    kind = mmpeft.METHODS.get('LoTR')
    squares = lambda method, factors, spec: factors[kind.tied[0]].square().sum()  # noqa: E731
    monkeypatch.setattr(kind, 'penalty', squares)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    mmpeft.inject(model, dict(type='LoTR', rank=2))
    randomize(model)
    mmpeft.penalty(model).backward()
    expected = [p.grad for p in adapter_parameters(model)]
    model.zero_grad()
    add_gradients(model)
    torch.testing.assert_close([p.grad for p in adapter_parameters(model)], expected)
