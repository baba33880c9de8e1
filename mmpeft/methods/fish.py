"""FISH mask: the entries of the largest Fisher information (arXiv:2111.09839).

    W' = W, with values added to k entries of it
    F = 1/N sum (dL/dw)^2          Eq. 3, the empirical Fisher information of an entry

The allocator sums F in the first ``samples`` optimizer steps, in which no
value is trained, and then chooses each weight's k entries of the largest F.
Until then, and without an allocator, they are those of the largest |W|.

Three differences from the paper. A sample is the batch of one step in each
process. ``density`` holds for each weight, where the paper takes the top of
the whole network, so that an adapter's shape does not depend on data. Biases
have no mask.
"""

from collections.abc import Mapping

import torch
from torch import distributed

from .adapter import Adapter
from .allocator import Allocator, common_method
from .arguments import require
from .base import Card, register
from .sparse import SparseMethod, largest


@register
class FISH(SparseMethod):
    """A few entries of each weight, trained themselves.

    Attributes:
        samples: Optimizer steps that the choice is made from, at most half of
            the run; 0 keeps the entries of the largest |W|.
    """

    card = Card(
        family='reconstruction',
        formula='W + v at k fixed entries',
        suits='Exact control of how many weights change; the first steps choose and train nothing.',
    )

    samples: int = 16

    def __post_init__(self):
        super().__post_init__()
        require(self, 'samples', self.samples >= 0, 'must be a number of steps, such as 16.')

    @property
    def allocates(self):
        return self.samples > 0

    def accepts(self, spec):
        return not spec.is_bias

    def scores(self, weight):
        return weight.abs()

    def allocator(self, adapters, steps):
        return FisherMask(adapters, steps)


class FisherMask(Allocator):
    """Collects squared gradients in the first steps, then chooses the entries.

    It sees the gradient of W' by hooks on the adapters, and sums it over all
    uses of a weight in a step before squaring. A step whose gradient is not
    finite is left out, and so is what no step of the optimizer follows. Gradient scaling multiplies
    all entries alike, as long as the scale does not change within the samples.

    Attributes:
        scores: Sums of squared gradients over steps and processes, by path;
            empty once the choice is made.
    """

    stored = ('scores',)

    def __init__(self, adapters: Mapping[str, Adapter], steps: int):
        super().__init__(adapters, steps)
        self.samples = min(common_method(adapters, 'samples').samples, steps // 2)
        self.scores = {}
        self._gradients = {}
        self._backward = {}  # which backward pass was the last to add to each
        self._handles = []
        trained = any(bool(adapter.values.any()) for adapter in adapters.values())
        if self.samples and not trained:
            for path, adapter in adapters.items():
                self.scores[path] = adapter.values.detach().new_zeros(adapter.spec.shape)
                self._handles.append(adapter.register_forward_hook(self._watch(path)))

    def _watch(self, path):
        def collect(gradient):
            # A gradient that no step followed, as one that a scaler has skipped, is gone from the
            # parameter when another backward begins.
            backward, held = torch._C._current_graph_task_id(), self.adapters[path].values.grad
            if backward != self._backward.get(path) and (held is None or not held.any()):
                self._gradients.pop(path, None)
            self._backward[path] = backward
            gradient = gradient.to(self.scores[path].dtype)
            self._gradients[path] = gradient + self._gradients.get(path, 0)

        def hook(adapter, args, adapted):
            if adapted.requires_grad:
                adapted.register_hook(collect)

        return hook

    @torch.no_grad()
    def before_step(self):
        for path, score in self.scores.items():
            square = torch.zeros_like(score)
            if path in self._gradients:
                square = self._gradients.pop(path).square()
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(square)
            if square.isfinite().all():
                score += square
            self.adapters[path].values.grad = None

    @torch.no_grad()
    def after_step(self):
        if not self.scores or self.step < self.samples:
            return
        for path, score in self.scores.items():
            if score.any():
                adapter = self.adapters[path]
                adapter.index.copy_(largest(score, len(adapter.index)))
        self.close()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if not self.scores:
            self.close()

    def close(self):
        while self._handles:
            self._handles.pop().remove()
        self.scores, self._gradients = {}, {}
