"""Terms that methods add to the loss."""

import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import named_adapters
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
