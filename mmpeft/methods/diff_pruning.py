"""Diff pruning: a sparse difference of the weights (arXiv:2012.07463).

    W' = W + z * delta                                           elementwise
    z = min(1, max(0, (h - l) sigmoid(log_alpha + log u - log(1 - u)) + l))
    E ||z||_0 = sum sigmoid(log_alpha - log(-l / h))

The gate z is hard concrete (Louizos et al., arXiv:1712.01312), with l = -1.5,
h = 1.5 and u uniform in each training step; evaluation and merging take
u = 1/2. The expected number of open gates times ``l0_weight`` is a term of the
loss. With ``structured=True`` one gate more for each weight multiplies its
elements' (the paper's structured variant), and so do the probabilities. delta
starts at zero, log_alpha at ``start`` = 5, where 97% of the gates are 1.

Midway the allocator projects: of all entries of all weights, the fraction
``density`` with the largest |z delta| keep z delta as their delta and a gate of
1, the others' gates are 0, and delta trains alone from there on. Gates that
training had closed stay closed. The paper finetunes with the mask in a second
run, which is the second half here; it prunes biases, which stay here.

log_alpha is stored as its distance from ``start`` divided by ``gate_speed``.
The paper trains it with an optimizer of its own, at 10,000 times the learning
rate of delta; under Adam such a factor has the same effect. The default is a
tenth of that.

An adapter has two dense copies of a weight (delta and gates), while it trains
and in its file: it is sparse in what it changes, not in what it takes.
"""

from collections.abc import Mapping
from math import log

import torch
from torch import Tensor

from mmpeft.errors import UsageError

from .adapter import Adapter
from .allocator import Allocator, best_of_all, check_span, common_method, span
from .arguments import require
from .base import Card, Factors, Method, register
from .sparse import check_density

LOW, HIGH = -1.5, 1.5
# A log_alpha at which a gate is exactly 0 or 1, whatever the noise.
SHUT, OPEN = -100.0, 100.0


def hard_concrete(
    log_alpha: Tensor, noise: Tensor | None = None, low: float = LOW, high: float = HIGH
) -> Tensor:
    """Gates in [0, 1] (Louizos et al., Eq. 10 and 11, at temperature 1).

    The noise is uniform in (0, 1) and of the shape of log_alpha; None for 1/2.
    The sigmoid is stretched to [low, high], with low < 0 and high >= 1.
    """
    if noise is not None:
        log_alpha = log_alpha + noise.logit(1e-6)
    return (torch.sigmoid(log_alpha) * (high - low) + low).clamp(0, 1)


def open_probability(log_alpha: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Probability that a gate is not 0 (Louizos et al., Eq. 12)."""
    return torch.sigmoid(log_alpha - log(-low / high))


@register
class DiffPruning(Method):
    """A gated difference of each weight element, projected onto a fraction of them.

    Attributes:
        density: Fraction of the elements of all weights that change in the end, at most.
        project_at: The step after which the others are closed (int), or its
            fraction of the run (float below 1).
        l0_weight: Of the expected number of open gates in the loss; 0 for none.
        structured: One gate more for each weight.
        start: log_alpha at the start.
        gate_speed: Learning rate of log_alpha as a multiple of that of delta
            under Adam and its kin; under plain SGD the multiple is its square.
        sample: Draw the gates in training; if False they are as in evaluation.
    """

    card = Card(
        family='reconstruction',
        formula='W + z ⊙ Δ, hard-concrete gates z',
        suits='Sparse changes where memory is not a concern: it trains more than full fine-tuning.',
    )

    renamed = {'share': 'density'}

    density: float = 0.005
    project_at: int | float = 0.5
    l0_weight: float = 1.25e-7
    structured: bool = False
    start: float = 5.0
    gate_speed: float = 1000.0
    sample: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_density(self)
        check_span(self, 'project_at')
        require(self, 'gate_speed', self.gate_speed > 0, 'must be positive.')

    def accepts(self, spec):
        return not spec.is_bias

    @property
    def gate_names(self) -> tuple[str, ...]:
        """Names of the factors that hold log_alpha."""
        return ('gate', 'weight_gate') if self.structured else ('gate',)

    def init(self, weight, spec) -> Factors:
        factors = {'delta': weight.new_zeros(spec.shape), 'gate': weight.new_zeros(spec.shape)}
        return factors | ({'weight_gate': weight.new_zeros(1)} if self.structured else {})

    def log_alpha(self, stored: Tensor) -> Tensor:
        """log_alpha from what is stored of it."""
        return self.start + self.gate_speed * stored

    def gates(self, factors: Factors, sample: bool = False) -> Tensor:
        """z of a weight, of its shape; drawn or as in evaluation."""
        return self._by_gate(
            factors, lambda a: hard_concrete(a, torch.rand_like(a) if sample else None)
        )

    def _by_gate(self, factors, function):
        values = [function(self.log_alpha(factors[name])) for name in self.gate_names]
        return values[0] * values[1] if self.structured else values[0]

    def penalty(self, factors, spec):
        if not self.l0_weight:
            return None
        return self.l0_weight * self._by_gate(factors, open_probability).sum()

    def apply(self, weight, factors, spec, training=False):
        return weight + self.gates(factors, training and self.sample) * factors['delta']

    def allocator(self, adapters, steps):
        return Projection(adapters, steps)


class Projection(Allocator):
    """Closes all gates but those of the largest differences, after step :attr:`at`.

    Raises:
        UsageError: The run ends before.
    """

    def __init__(self, adapters: Mapping[str, Adapter], steps: int):
        super().__init__(adapters, steps)
        project_at = common_method(adapters, 'project_at').project_at
        self.at = max(1, span(project_at, steps))
        if self.at > steps:
            raise UsageError(
                f'DiffPruning: project_at={project_at} is after the {steps} steps of the run. '
                'Lower it, or give it as a fraction of the run.'
            )

    def before_step(self):
        if self.step >= self.at:
            for adapter in self.adapters.values():
                for name in adapter.method.gate_names:
                    getattr(adapter, name).grad = None

    @torch.no_grad()
    def after_step(self):
        if self.step != self.at:
            return
        values = {p: a.method.gates(a.factors) * a.delta for p, a in self.adapters.items()}
        count = round(sum(a.method.density * a.delta.numel() for a in self.adapters.values()))
        masks = best_of_all({path: value.abs() for path, value in values.items()}, max(1, count))
        for path, adapter in self.adapters.items():
            method = adapter.method
            shut, opened = ((x - method.start) / method.gate_speed for x in (SHUT, OPEN))
            adapter.delta.copy_(torch.where(masks[path], values[path], 0))
            adapter.gate.copy_(torch.where(adapter.delta != 0, opened, shut))
            if method.structured:
                adapter.weight_gate.fill_(opened)
