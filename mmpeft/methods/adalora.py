"""AdaLoRA: ranks that move between weights during training (arXiv:2303.10512).

    dW = reshape(P diag(lambda) Q)                          Eq. 3
    loss + orthogonality * (||P^T P - I||^2 + ||Q Q^T - I||^2)   Eq. 4, MPC_o of :mod:`.mpc`

with the matrices of LoRA's ``layout``. lambda starts at zero, P (``lora_B``)
and Q (``lora_A``) Gaussian of standard deviation 0.02. A triplet is one
lambda (``lora_E``) with its column of P and its row of Q. Each weight starts
with the triplets of ``init_rank``, and the allocator takes them away until
those of ``rank`` are left on average: ``rank`` for each matrix, rank * k for
a kernel in ``loralib``'s layout. Their number follows

    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3     Eq. 12

between the warmup of t_i steps and the last t_f steps, rounded down. The
triplets of the highest importance over all weights keep their lambda,

    S = s(lambda) + mean s(P column) + mean s(Q row)        Eq. 7
    s(w) = I~ U~,  I = |w dL/dw|                            Eq. 8 and 11
    I~ <- beta1 I~ + (1 - beta1) I                          Eq. 9
    U~ <- beta2 U~ + (1 - beta2) |I - I~|                   Eq. 10

and the others' lambda is set to zero (Eq. 6) in every ``every``-th step. In
between all are trained, so that a triplet may come back. From step T - t_f on
the choice stands. P and Q of what was taken away stay in the adapter, and
count in its size: parameters are those of the start.

Two differences. Eq. 12 prints t - t_i - t_f, which would start above b_0;
here b starts at b_0 and ends at b_T, as in the published code. Eq. 4 is taken
as printed, where that code averages norms, not their squares, over the
matrices. Without an allocator all triplets stay.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.errors import UsageError
from mmpeft.registry import METHODS

from .allocator import Allocator, best_of_all, check_span, common_method, span
from .base import Card, Factors, check_choice, gaussian
from .lora import matrix_shape
from .mpc import mpc_o
from .ranked import RankMethod
from .spec import WeightSpec


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """I = |w dL/dw| of each entry (AdaLoRA, Eq. 8)."""
    return (weight * gradient).abs()


def smoothed(
    mean: Tensor, uncertainty: Tensor, value: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """The moving averages of a sensitivity and of its distance from its average.

    Args:
        mean: I~ so far.
        uncertainty: U~ so far.
        value: I of this step.
        beta1: Weight of the former I~.
        beta2: Weight of the former U~.

    Returns:
        I~ and U~ (AdaLoRA, Eq. 9 and 10).
    """
    mean = beta1 * mean + (1 - beta1) * value
    return mean, beta2 * uncertainty + (1 - beta2) * (value - mean).abs()


def importance(columns: Tensor, diagonal: Tensor, rows: Tensor) -> Tensor:
    """S of each triplet from the scores of its entries (AdaLoRA, Eq. 7).

    Args:
        columns: s of P (n, r).
        diagonal: s of lambda (r,).
        rows: s of Q (r, m).

    Returns:
        (r,)
    """
    return diagonal + columns.mean(0) + rows.mean(1)


def triplets_at(step: int, initial: int, target: int, begin: int, end: int) -> int:
    """b(t), the triplets that are kept (AdaLoRA, Eq. 12).

    Args:
        step: t, the steps made.
        initial: b_0.
        target: b_T.
        begin: t_i, until which b is b_0.
        end: T - t_f, from which on b is b_T.
    """
    if step >= end:
        return target
    if step <= begin:
        return initial
    left = 1 - (step - begin) / (end - begin)
    return target + int((initial - target) * left**3)


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(RankMethod):
    """Low-rank update in the form of an SVD whose ranks are allocated in training.

    A ``budget`` and ``targets.max_share`` count what is there at the start,
    the parameters of ``init_rank``; rank times the number of weights is the
    number of triplets that are left at the end (times k for kernels in
    ``loralib``'s layout).

    Attributes:
        rank: The average rank at the end.
        init_rank: Of each weight at the start; one and a half times ``rank``,
            rounded up, if None. Scaled along where a budget gives the rank.
        layout: How kernels become matrices, ``'loralib'`` or ``'channel'``;
            see :mod:`.lora`.
        scale: dW is multiplied by it.
        init_std: Standard deviation of P and Q.
        orthogonality: Weight of Eq. 4, summed over all weights; 0 for none.
        warmup: t_i, steps before anything is taken away (int), or their share
            of the run (float below 1).
        settle: t_f, steps at the end in which the choice stands; likewise.
        every: Steps from one choice to the next.
        beta1: Of the moving average of sensitivities.
        beta2: Of that of their uncertainty.
    """

    card: ClassVar = Card(
        family='extension',
        formula='W + s · reshape(P diag(λ) Q), the least important λ zeroed',
        trains='P, Q (Gaussian), λ (zero)',
        paper='AdaLoRA, Eq. 3-12 (arXiv:2303.10512); Subspace tuning, Eq. 20',
        cost=(
            'One product to build the update; two moving averages for each trained value until '
            'the ranks stand. A file holds what was taken away, too.'
        ),
        suits='Where it is not known which layers need rank; takes a schedule to be set.',
    )

    rank: int = 8
    init_rank: int | None = None
    layout: str = 'loralib'
    scale: float = 1.0
    init_std: float = 0.02
    orthogonality: float = 0.1
    warmup: int | float = 0.1
    settle: int | float = 0.5
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, 'layout', ('loralib', 'channel'))
        check_span(self, 'warmup')
        check_span(self, 'settle')
        if not isinstance(self.rank, int):
            raise UsageError(f'AdaLoRA: rank={self.rank!r} must be one integer.')
        if self.init_rank is not None and self.init_rank < self.rank:
            raise UsageError(
                f'AdaLoRA: init_rank={self.init_rank} is below rank={self.rank}, to which the '
                'ranks are to fall. Raise it, or leave it out.'
            )
        if self.every < 1 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UsageError(
                f'AdaLoRA: every={self.every}, beta1={self.beta1} and beta2={self.beta2} must be '
                'a positive integer and two numbers from 0 to below 1.'
            )

    @property
    def scaling(self):
        return self.scale

    @property
    def first_rank(self) -> int:
        """The rank of each weight at the start."""
        return self.init_rank or ceil(1.5 * self.rank)

    def with_rank(self, rank):
        first = self.init_rank and ceil(rank * self.init_rank / self.rank)
        return replace(self, rank=rank, init_rank=first, budget=None)

    def triplets(self, spec: WeightSpec) -> int:
        """The share of a weight in the triplets that are left at the end."""
        return matrix_shape(spec, self.rank, self.layout)[1]

    def init(self, weight, spec) -> Factors:
        rows, inner, columns = matrix_shape(spec, self.first_rank, self.layout)
        return {
            'lora_A': gaussian(weight, inner, columns, std=self.init_std),
            'lora_B': gaussian(weight, rows, inner, std=self.init_std),
            'lora_E': weight.new_zeros(inner),
        }

    def penalty(self, factors, spec):
        if not self.orthogonality:
            return None
        return self.orthogonality * mpc_o(factors['lora_B'], factors['lora_A'])

    def delta(self, factors, spec) -> Tensor:
        product = torch.mm(factors['lora_B'] * factors['lora_E'], factors['lora_A'])
        return product.view(spec.shape)

    def low_rank(self, factors, spec):
        if not spec.is_matrix:
            return None
        return factors['lora_B'] * factors['lora_E'], None, factors['lora_A']

    def allocator(self, adapters, steps):
        return RankAllocator(adapters, steps)


class RankAllocator(Allocator):
    """Takes AdaLoRA's triplets away, the least important of all weights first.

    The same on all ranks of a distributed run, since gradients are.

    Attributes:
        begin: t_i.
        end: T - t_f.
        initial: b_0, over all weights.
        target: b_T, over all weights.
        averages: I~ and U~ of each entry as one tensor (2, ...), by path and
            name; empty once the choice stands.
        kept: The triplets that stay, by path, once the choice stands.

    Raises:
        UsageError: ``warmup`` and ``settle`` exceed the run.
    """

    def __init__(self, adapters, steps):
        super().__init__(adapters, steps)
        self.method = common_method(adapters, 'warmup', 'settle', 'every', 'beta1', 'beta2')
        self.begin = span(self.method.warmup, steps)
        self.end = steps - span(self.method.settle, steps)
        if self.begin > self.end:
            raise UsageError(
                f'AdaLoRA: warmup={self.method.warmup} and settle={self.method.settle} exceed the '
                f'{steps} steps of the run. Lower them, or give them as shares of the run.'
            )
        self.initial = sum(len(a.lora_E) for a in adapters.values())
        self.target = sum(a.method.triplets(a.spec) for a in adapters.values())
        self.averages = {
            path: {name: p.detach().new_zeros(2, *p.shape) for name, p in _parameters(a)}
            for path, a in adapters.items()
        }
        self.kept = {}

    @torch.no_grad()
    def before_step(self):
        for path, averages in self.averages.items():
            for name, parameter in _parameters(self.adapters[path]):
                if parameter.grad is not None:
                    value = sensitivity(parameter, parameter.grad)
                    betas = self.method.beta1, self.method.beta2
                    averages[name] = torch.stack(smoothed(*averages[name], value, *betas))

    @torch.no_grad()
    def after_step(self):
        settled = self.step >= self.end
        if not settled and (self.step <= self.begin or self.step % self.method.every):
            return
        kept = self.kept or self._choice()
        if settled and not self.kept:
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

    def state_dict(self):
        return super().state_dict() | deepcopy(dict(averages=self.averages, kept=self.kept))

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.averages = {
            path: {n: v.to(getattr(self.adapters[path], n), copy=True) for n, v in values.items()}
            for path, values in state['averages'].items()
        }
        self.kept = {
            path: mask.to(self.adapters[path].lora_E.device, copy=True)
            for path, mask in state['kept'].items()
        }


def _parameters(adapter):
    return adapter.named_parameters(recurse=False)
