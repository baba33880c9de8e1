"""Whether all ranks of a distributed run train the same model."""

from mmengine.dist import all_gather_object

from mmpeft.checkpoint.fingerprint import digests
from mmpeft.checkpoint.keys import adapter_keys, frozen_keys

from .check import Check


class Ranks(Check):
    """Compares the ranks' models: before training with the base, later what trains.

    DDP makes the models equal when it wraps them, and then averages
    gradients. It does not see what a rank loads or decides by itself.
    Compared are parameters and everything that adapters hold; the running
    statistics of a BatchNorm that trains differ by rank.
    """

    def __init__(self, monitor):
        super().__init__(monitor)
        self._frozen = set(frozen_keys(monitor.model))
        monitor.stop_if(self.problem())
        self._frozen = set()

    def problem(self):
        """The first tensor that differs, and between which ranks."""
        model = self.monitor.model
        held = self._frozen | adapter_keys(model).keys()
        state = model.state_dict(keep_vars=True)
        tensors = {key: v for key, v in state.items() if v.requires_grad or key in held}
        all_ranks = all_gather_object(digests(tensors))
        names = dict.fromkeys([*tensors, *(name for each in all_ranks for name in each)])
        wrong = [name for name in names if len({each.get(name) for each in all_ranks}) > 1]
        if not wrong:
            return None
        parties = {}
        for rank, each in enumerate(all_ranks):
            parties.setdefault(each.get(wrong[0]), []).append(rank)
        against = ' against '.join(
            f'rank{"s" * (len(ranks) > 1)} {", ".join(map(str, ranks))}'
            for ranks in parties.values()
        )
        now = self.monitor
        when = f'after iteration {now.iteration}' if now.iterations else 'before training'
        return (
            f'The ranks disagree {when}. {len(wrong)} of {len(names)} tensors differ, the first '
            f'is {wrong[0]!r}: {against}. A rank has loaded another file, or a hook has changed '
            'or decided something on one rank alone. Give all ranks the same files, and make '
            'random draws and decisions from what all of them have.'
        )
