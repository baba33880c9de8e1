"""How sensitive the loss is to weights, measured on a few batches before training."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import all_reduce, broadcast
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmpeft.errors import TrainingError, UsageError
from mmpeft.injection.ranks import budgeted
from mmpeft.injection.reentrant import reach_into_checkpoints
from mmpeft.injection.statistics import norms_to_freeze
from mmpeft.injection.targets import Targets, select, target_module
from mmpeft.injection.wrappers import on_inner
from mmpeft.methods import Method, Ranked
from mmpeft.methods.adapter import maybe_transposed
from mmpeft.quantization import Quantized
from mmpeft.registry import METHODS


@on_inner
def sensitivity(
    model: nn.Module,
    method: Method | Mapping,
    batches: Iterable,
    loss: Callable[[nn.Module, Any], Tensor],
    targets: Targets | Mapping | None = None,
) -> dict[str, Tensor]:
    """By how much each rank of each weight can lower the loss, to first order.

    ``mmpeft.inject(model, method, targets, sensitivity=...)`` distributes a budget by it. The
    model is left as it was: its gradients, its buffers, and what requires a gradient; and so are
    torch's random numbers.

    The gradients of the weights that ``method`` adapts are averaged over batches and processes, so
    that they take as much memory as these weights; then they are decomposed one after another in
    float64. Several processes give the same result, and each has its own batches.

    Args:
        model: In the mode in which it trains, without adapters on these weights, and before they
            are stored in few bits. Norms below the target use their running statistics, as they
            will when it is frozen.
        method: With a budget.
        batches: What ``loss`` takes, one after another; a few are enough.
        loss: Of the model and a batch, a scalar.
        targets: As in :func:`mmpeft.inject`.

    Returns:
        By name of the weight, (ranks,) in float64 on the CPU, what each further rank adds to the
        squared norm that an update shares with dL/dW: for LoRA and its kin the squared singular
        values (LoRA-GA, arXiv:2407.05000, starts from the vectors), for FLoRA the sums over the
        core of an HOSVD. A Lie update multiplies W, so that W * dL/dW takes the place of dL/dW.

    Raises:
        UsageError: The method has no budget or does not say what a rank gains, there is no batch,
            or a weight is parametrized or in few bits already.
        TrainingError: The gradients are zero everywhere, or not finite.
    """
    method, targets = METHODS.build(method), Targets.of(targets)
    sites = budgeted(select(model, method, targets))
    _check(method, sites)
    by_weight = {site.tie_key: site for site in sites}
    weights = [site.original for site in by_weight.values()]
    device = weights[0].device
    with (
        torch.random.fork_rng([] if device.type == 'cpu' else [device], device_type=device.type),
        _gradients_of(model, weights, target_module(model, targets.module)),
    ):
        count = torch.zeros((), device=device)
        for batch in batches:
            with torch.enable_grad():
                value = loss(model, batch)
            if value.requires_grad:
                value.backward()
            count += 1
        all_reduce(count)
        if not count:
            raise UsageError('sensitivity: there is no batch to measure on. Give at least one.')
        measured = {key: _gains(site, count.item()) for key, site in by_weight.items()}
    total = torch.cat(list(measured.values())).sum()
    if not (total.isfinite() and total):
        raise TrainingError(
            f'sensitivity: the gradients of the weights that {type(method).__name__} adapts are '
            f'{"all zero" if total == 0 else "not finite"}, which says nothing about ranks. Load '
            'the pretrained weights first, let the loss depend on these weights (a '
            'head of zeros passes no gradient on), and measure in float32 or bfloat16.'
        )
    return {site.name: measured[site.tie_key] for site in sites}


def _check(method, sites):
    if not sites:
        raise UsageError(
            f'sensitivity serves to distribute a budget, and {method} leaves no rank open. Write a '
            "budget in place of the rank, such as budget='300k'."
        )
    for site in sites:
        if type(site.method).gains is Ranked.gains:
            raise UsageError(
                f'sensitivity: what a rank gains is known of LoRA, its kin that start at zero, and '
                f'FLoRA, and not of {type(method).__name__}, whose budget gives one rank for all.'
            )
        if parametrize.is_parametrized(site.layer, site.tensor):
            raise UsageError(
                f'sensitivity: {site.name} is parametrized already. Measure before mmpeft.inject, '
                'for all methods that are to follow, or call mmpeft.remove first.'
            )
        if isinstance(site.original, Quantized):
            raise UsageError(
                f'sensitivity: {site.name} is stored in few bits, and gets no gradient. Measure on '
                'the whole weights, and let inject round them (frozen_dtype).'
            )


@contextmanager
def _gradients_of(model, weights, root) -> Iterator[None]:
    """Gradients for these weights alone, of the target with frozen statistics; then as before."""
    reach_into_checkpoints()
    wanted = {id(weight) for weight in weights}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    norms = [norm for norm in norms_to_freeze(root) if norm.training]
    try:
        for parameter, trains, _ in parameters:
            parameter.grad = None
            if trains != (id(parameter) in wanted):
                parameter.requires_grad_(not trains)
        for norm in norms:
            norm.training = False
        yield
    finally:
        for parameter, trains, gradient in parameters:
            parameter.grad = gradient
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
        for buffer, value in buffers:
            buffer.copy_(value)
        for norm in norms:
            norm.training = True


@torch.no_grad()
def _gains(site, count):
    weight, spec = site.original, site.spec
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    weight.grad = None
    gradient = gradient.double().contiguous()
    all_reduce(gradient)
    gradient = gradient / count
    if not gradient.isfinite().all():
        return torch.full((1,), torch.nan)
    gains = site.method.gains(
        maybe_transposed(weight.double(), spec), maybe_transposed(gradient, spec), spec
    )
    broadcast(gains)
    return gains.cpu()
