"""How AdaLoRA takes ranks away during training (arXiv:2303.10512).

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
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmpeft.errors import UsageError

from .adapter import Adapter
from .allocator import Allocator, best_of_all, common_method, span


def smoothed(
    mean: Tensor, uncertainty: Tensor, value: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """The moving averages of a sensitivity and of its distance from its average.

    Args:
        mean: I~ so far.
        uncertainty: U~ so far, of the same shape.
        value: I of this step, of the same shape.
        beta1: Weight of the former I~.
        beta2: Weight of the former U~.

    Returns:
        I~ and U~ (Eq. 9 and 10).
    """
    mean = beta1 * mean + (1 - beta1) * value
    return mean, beta2 * uncertainty + (1 - beta2) * (value - mean).abs()


def importance(columns: Tensor, diagonal: Tensor, rows: Tensor) -> Tensor:
    """S of each triplet from the scores of its entries (Eq. 7).

    Args:
        columns: s of P (n, r).
        diagonal: s of lambda (r,).
        rows: s of Q (r, m).

    Returns:
        (r,)
    """
    return diagonal + columns.mean(0) + rows.mean(1)


def triplets_at(step: int, initial: int, target: int, begin: int, end: int) -> int:
    """b(t), the triplets that are kept (Eq. 12).

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


class RankAllocator(Allocator):
    """Takes AdaLoRA's triplets away, the least important of all weights first.

    The same on all ranks of a distributed run, since gradients are.

    Attributes:
        begin: t_i.
        end: T - t_f.
        initial: b_0, over all weights.
        target: b_T, over all weights.
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
        self.begin = span(self.method.warmup, steps)
        self.end = steps - span(self.method.settle, steps)
        if self.begin > self.end:
            raise UsageError(
                f'AdaLoRA: warmup={self.method.warmup} and settle={self.method.settle} exceed the '
                f'{steps} steps of the run. Lower them, or give them as fractions of the run.'
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
