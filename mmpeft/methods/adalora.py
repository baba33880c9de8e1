"""AdaLoRA: ranks that move between weights during training (arXiv:2303.10512).

    dW = reshape(P diag(lambda) Q)                               Eq. 3
    loss + orthogonality * (||P^T P - I||^2 + ||Q Q^T - I||^2)   Eq. 4, MPC_o of :mod:`.mpc`

A triplet is one lambda (``lora_E``, zero at the start) with its column of P
(``lora_B``) and its row of Q (``lora_A``), both Gaussian. Each weight starts with
those of ``init_rank``; the allocator zeroes the lambda of the least important
ones until those of ``rank`` are left on average. Their P and Q stay in the adapter.

The number of triplets, over all weights, follows

    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3     Eq. 12

between the warmup of t_i steps and the last t_f steps, rounded down. Every
``every`` steps, the triplets of the highest importance over all weights,

    S = s(lambda) + mean s(P column) + mean s(Q row)        Eq. 7
    s(w) = I~ U~,  I = |w dL/dw|                            Eq. 8 and 11
    I~ <- beta1 I~ + (1 - beta1) I                          Eq. 9
    U~ <- beta2 U~ + (1 - beta2) |I - I~|                   Eq. 10

keep their lambda, and the others' is set to zero (Eq. 6). In between all are
trained, so that a triplet may come back. From step T - t_f on the choice is
final. Eq. 12 prints t - t_i - t_f, which would start above b_0; here b starts
at b_0, as in the published code. Each trained value has two averages until the
choice is final.

Eq. 4 is taken as printed; the published code averages norms, not squares.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from mmpeft.errors import UsageError

from .adapter import Adapter
from .allocator import Allocator, best_of_all, check_span, common_method, span
from .arguments import require
from .base import Card, Factors, gaussian, register
from .matrix import MatrixMethod, matrix_shape
from .mpc import mpc_o
from .spec import WeightSpec


def smoothed(
    mean: Tensor, uncertainty: Tensor, value: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """I~ and U~ after a step (Eq. 9 and 10), from those before it and its I, all of one shape."""
    mean = beta1 * mean + (1 - beta1) * value
    return mean, beta2 * uncertainty + (1 - beta2) * (value - mean).abs()


def importance(columns: Tensor, diagonal: Tensor, rows: Tensor) -> Tensor:
    """S of each triplet (Eq. 7), (r,), from s of P (n, r), of lambda (r,) and of Q (r, m)."""
    return diagonal + columns.mean(0) + rows.mean(1)


def triplets_at(step: int, initial: int, target: int, begin: int, end: int) -> int:
    """b(t), the triplets that are kept (Eq. 12): b_0 until ``begin``, b_T from ``end`` on."""
    if step >= end:
        return target
    if step <= begin:
        return initial
    left = 1 - (step - begin) / (end - begin)
    return target + int((initial - target) * left**3)


@register
class AdaLoRA(MatrixMethod):
    """Low-rank update in the form of an SVD whose ranks are allocated in training.

    ``budget`` and ``targets.max_share`` count the parameters of ``init_rank``.
    At the end, weights have ``rank`` triplets on average (rank * k for kernels
    in the ``loralib`` layout).

    Attributes:
        rank: The average rank at the end.
        init_rank: Of each weight at the start; one and a half times ``rank``,
            rounded up, if None. Scaled along where a budget gives the rank.
        init_std: Standard deviation of P and Q.
        orthogonality: Weight of Eq. 4, summed over all weights; 0 for none.
        warmup: t_i, steps before anything is taken away (int), or a fraction of the run (float).
        settle: t_f, steps at the end in which the choice is final; likewise.
        every: Steps from one choice to the next.
        beta1: Of the moving average of sensitivities.
        beta2: Of that of their uncertainty.
    """

    card = Card(
        family='extension',
        formula='W + s · reshape(P diag(λ) Q), the least important λ zeroed',
        suits='When you do not know which layers need rank; needs a schedule.',
    )

    init_rank: int | None = None
    init_std: float = 0.02
    orthogonality: float = 0.1
    warmup: int | float = 0.1
    settle: int | float = 0.5
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self):
        super().__post_init__()
        check_span(self, 'warmup')
        check_span(self, 'settle')
        falls = self.init_rank is None or self.init_rank >= self.rank
        rule = f'is below rank={self.rank}, to which the ranks fall. Raise it, or leave it out.'
        require(self, 'init_rank', falls, rule)
        require(self, 'every', self.every > 0, 'must be a positive integer.')
        for name in ('beta1', 'beta2'):
            require(self, name, 0 <= getattr(self, name) < 1, 'must be at least 0 and below 1.')

    @property
    def first_rank(self) -> int:
        """The rank of each weight at the start."""
        return self.init_rank or ceil(1.5 * self.rank)

    def with_rank(self, rank):
        first = self.init_rank and ceil(rank * self.init_rank / self.rank)
        return replace(self, rank=rank, init_rank=first, budget=None)

    def triplets(self, spec: WeightSpec) -> int:
        """How many triplets a weight adds to the number that is left at the end."""
        return matrix_shape(spec, self.rank, self.layout)[1]

    def matrix_shape(self, spec):
        return matrix_shape(spec, self.first_rank, self.layout)

    def init(self, weight, spec) -> Factors:
        rows, inner, columns = self.matrix_shape(spec)
        return {
            'lora_A': gaussian(weight, inner, columns, std=self.init_std),
            'lora_B': gaussian(weight, rows, inner, std=self.init_std),
            'lora_E': weight.new_zeros(inner),
        }

    def matrices(self, factors):
        return factors['lora_B'] * factors['lora_E'], factors['lora_A']

    def penalty(self, factors, spec):
        if not self.orthogonality:
            return None
        return self.orthogonality * mpc_o(factors['lora_B'], factors['lora_A'])

    def allocator(self, adapters, steps):
        return RankAllocator(adapters, steps)


class RankAllocator(Allocator):
    """Takes triplets away, the least important of all weights first.

    The same on all ranks of a distributed run, since gradients are.

    Attributes:
        averages: I~ and U~ of each entry as one tensor (2, ...), by path and
            name; empty once the choice is final.
        kept: The triplets that stay, by path, once the choice is final.

    Raises:
        UsageError: ``warmup`` and ``settle`` exceed the run.
    """

    stored = ('averages', 'kept')

    def __init__(self, adapters: Mapping[str, Adapter], steps: int):
        super().__init__(adapters, steps)
        self.method = common_method(adapters, 'warmup', 'settle', 'every', 'beta1', 'beta2')
        self.begin = span(self.method.warmup, steps)  # t_i
        self.end = steps - span(self.method.settle, steps)  # T - t_f
        if self.begin > self.end:
            raise UsageError(
                f'AdaLoRA: warmup={self.method.warmup} and settle={self.method.settle} exceed the '
                f'{steps} steps of the run. Lower them, or give them as fractions of the run.'
            )
        self.initial = sum(len(a.lora_E) for a in adapters.values())  # b_0
        self.target = sum(a.method.triplets(a.spec) for a in adapters.values())  # b_T
        self.averages = {
            path: {name: p.detach().new_zeros(2, *p.shape) for name, p in _parameters(a)}
            for path, a in adapters.items()
        }
        self.kept = {}

    @torch.no_grad()
    def before_step(self):
        betas = self.method.beta1, self.method.beta2
        for path, averages in self.averages.items():
            for name, parameter in _parameters(self.adapters[path]):
                if parameter.grad is not None:
                    value = (parameter * parameter.grad).abs()  # Eq. 8
                    averages[name] = torch.stack(smoothed(*averages[name], value, *betas))

    @torch.no_grad()
    def after_step(self):
        final = self.step >= self.end
        if not final and (self.step <= self.begin or self.step % self.method.every):
            return
        kept = self.kept or self._choice()
        if final and not self.kept:
            self.kept, self.averages = kept, {}
        for path, mask in kept.items():
            self.adapters[path].lora_E.masked_fill_(~mask, 0)

    def _choice(self):
        count = triplets_at(self.step, self.initial, self.target, self.begin, self.end)
        scores = {}
        for path, averages in self.averages.items():
            s = {name: mean * uncertainty for name, (mean, uncertainty) in averages.items()}
            scores[path] = importance(s['lora_B'], s['lora_E'], s['lora_A'])
        return best_of_all(scores, count)


def _parameters(adapter):
    return adapter.named_parameters(recurse=False)
