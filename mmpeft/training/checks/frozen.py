"""Whether the frozen base is unchanged."""

import torch

from mmpeft.checkpoint.fingerprint import digests
from mmpeft.checkpoint.keys import frozen_keys
from mmpeft.injection.wrappers import local_part

from .check import Check

KEPT = 4096
"""Elements of each frozen tensor that are kept, to say what changed."""


class Frozen(Check):
    """Finds frozen weights and statistics that change during training.

    A checkpoint does not hold the frozen base, so such a change would be lost.
    A digest of each tensor finds any change. Version counters would not:
    BatchNorm's statistics, and writes through ``.data``, do not increase them.
    The first elements of each tensor are kept to say by how much it changed.
    """

    def __init__(self, monitor):
        super().__init__(monitor)
        base = self._base(frozen_keys(monitor.model))
        self._digests = digests(base)
        self._beginnings = {key: _beginning(value).clone() for key, value in base.items()}
        self._checked = monitor.iteration

    def problem(self):
        """Tensors that changed since the last check."""
        base = self._base(self._beginnings)
        now = digests(base)
        changed = [key for key in self._beginnings if now.get(key) != self._digests[key]]
        since, self._checked = self._checked, self.monitor.iteration
        if not changed:
            return None
        first = changed[0]
        return (
            f'{len(changed)} of {len(self._digests)} frozen tensors changed between iterations '
            f'{since} and {self._checked}. The first is {first!r}: {self._change(first, base)}. '
            'Checkpoints do not hold the frozen base, so the change would be lost. Something '
            'other than the adapters writes to it: a hook, a second optimizer, or a normalisation '
            'in training mode. Remove that, let it train with unfreeze, or set '
            'check_frozen=False if it may move.'
        )

    def _base(self, keys):
        state = self.monitor.model.state_dict()
        return {key: local_part(state[key]) for key in keys if key in state}

    def _change(self, key, base):
        before, after = self._beginnings[key], _beginning(base.get(key, torch.empty(0)))
        if before.shape != after.shape:
            return 'it is gone or has another shape'
        (places,) = torch.where(before != after)
        if not len(places):
            return f'past its first {KEPT} elements'
        place = int(places[0])
        index = [int(i) for i in torch.unravel_index(places[0], base[key].shape)]
        was, now = before[place].item(), after[place].item()
        return f'element {index} went from {was:.6g} to {now:.6g}'


def _beginning(value):
    return value.detach().flatten()[:KEPT].cpu()
