"""AdaLoRA: ranks that move between weights during training (arXiv:2303.10512).

    dW = reshape(P diag(lambda) Q)                               Eq. 3
    loss + orthogonality * (||P^T P - I||^2 + ||Q Q^T - I||^2)   Eq. 4, MPC_o of :mod:`.mpc`

A triplet is one lambda (``lora_E``, zero at the start) with its column of P (``lora_B``,
Gaussian) and its row of Q (``lora_A``, Gaussian). Each weight starts with those of ``init_rank``;
:mod:`.rank_allocator` zeroes the lambda of the least important ones until
those of ``rank`` are left on average. Their P and Q stay in the adapter.

Eq. 4 is taken as printed; the published code averages norms, not squares.
"""

from dataclasses import replace
from math import ceil

from .allocator import check_span
from .arguments import require
from .base import Card, Factors, gaussian, register
from .matrix import MatrixMethod, matrix_shape
from .mpc import mpc_o
from .rank_allocator import RankAllocator
from .spec import WeightSpec


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
        suits='Where it is not known which layers need rank; takes a schedule to be set.',
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
