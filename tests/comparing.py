"""Outputs and gradients of an adapted model, and the same computed by torch's parametrize alone."""

import copy
from contextlib import contextmanager

import torch

from mmpeft import execution


def plain_of(model):
    """A copy that computes as torch's parametrize does."""
    model = copy.deepcopy(model)
    for module in model.modules():
        execution.disable(module)
    return model


@contextmanager
def plain(model):
    """Let a model compute as torch's parametrize does while the context lasts."""
    classes = [(module, type(module)) for module in model.modules()]
    for module, _ in classes:
        execution.disable(module)
    try:
        yield model
    finally:
        for module, kind in classes:
            module.__class__ = kind


def results(model, x, network=None):
    """Output, and gradients of the input and of all that trains.

    Args:
        model: Whose parameters' gradients are wanted.
        x: Input, or an index into an embedding.
        network: What runs ``model``; itself if None.
    """
    if x.is_floating_point():
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    torch.default_generator.manual_seed(1)
    y = (network or model)(x)
    y.backward(noise_like(y))
    return dict(y=y, x=x.grad) | {n: p.grad for n, p in trained(model)}


def second_derivatives(model, x):
    """Gradients of the input and of all that trains, of a scalar made of their gradients."""
    x = x.clone().requires_grad_()
    leaves = dict(x=x) | dict(trained(model))
    y = model(x)
    first = torch.autograd.grad(y, leaves.values(), noise_like(y), create_graph=True)
    total = sum((g * noise_like(g)).sum() for g in first)
    second = torch.autograd.grad(total, leaves.values(), allow_unused=True)
    return dict(zip(leaves, second, strict=True))


def trained(model):
    """Names and tensors of the parameters that require a gradient."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def noise_like(y):
    """The same random numbers each time."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def assert_equal(found, expected, tolerance):
    """Compare tensors by name, relative to the largest entry of each and to 1."""
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        scale = max(value.abs().max().item(), 1.0)
        assert (found[name] - value).abs().max().item() <= tolerance * scale, name


def assert_as_plain(model, x, tolerance=1e-10):
    """Compare a model with itself as torch's parametrize computes it."""
    found = results(model, x)
    with plain(model):
        assert_equal(found, results(model, x), tolerance)
