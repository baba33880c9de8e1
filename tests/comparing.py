"""Outputs and gradients of an adapted model, compared with the plain parametrized form."""

import copy

import torch

from mmpeft import execution


def plain_of(model):
    """A copy that computes as torch's parametrize does."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        execution.disable(module)
    return plain


def results(model, x, seed=1):
    """Output, and gradients of the input and of all that trains."""
    return results_of(model, model, x, seed)


def results_of(network, model, x, seed=1):
    """The same of a model inside another."""
    if x.is_floating_point():
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    y = network(x)
    torch.manual_seed(2)
    (y * torch.randn_like(y)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return dict(y=y, x=x.grad) | gradients


def assert_equal(one, two, tolerance):
    for name, expected in two.items():
        if expected is None:
            assert one[name] is None, name
            continue
        scale = max(expected.abs().max().item(), 1.0)
        assert (one[name] - expected).abs().max().item() <= tolerance * scale, name
