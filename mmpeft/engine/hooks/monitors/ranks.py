"""Whether all ranks of a distributed run train the same model."""

from mmengine.dist import all_gather_object

from mmpeft.checkpoint.fingerprint import digests
from mmpeft.checkpoint.keys import adapter_keys, frozen_keys

from .monitor import Watch, bare


class RankAgreement(Watch):
    """Compares the ranks' models: before training with the base, later what trains.

    DDP makes the models equal when it wraps them, and averages gradients
    after. It sees nothing of what a rank loads or decides by itself. Compared
    are parameters and all that adapters hold; a trained BatchNorm's running
    statistics are each rank's own.
    """

    def before_train(self, runner):
        """Compare all, the frozen base included."""
        self.frozen = frozen_keys(bare(runner.model))
        self.stop_if_wrong(runner)
        self.frozen = []

    def look(self, runner):
        """The first tensor that differs, and between which ranks."""
        tensors = self._tensors(bare(runner.model))
        told = all_gather_object(digests(tensors))
        names = dict.fromkeys([*tensors, *(name for own in told for name in own)])
        wrong = [name for name in names if len({own.get(name) for own in told}) > 1]
        if not wrong:
            return None
        parties = {}
        for rank, own in enumerate(told):
            parties.setdefault(own.get(wrong[0]), []).append(rank)
        against = ' against '.join(
            f'rank{"s" * (len(ranks) > 1)} {", ".join(map(str, ranks))}'
            for ranks in parties.values()
        )
        when = f'after iteration {runner.iter + 1}' if self._iterations else 'before training'
        return (
            f'The ranks disagree {when}. {len(wrong)} of {len(names)} tensors differ, the first '
            f'is {wrong[0]!r}: {against}. A rank has loaded another file, or a hook has changed '
            'or decided something on one rank alone. Give all ranks the same files, and draw and '
            'decide from what all of them have.'
        )

    def _tensors(self, model):
        frozen = set(self.frozen)
        held = adapter_keys(model)
        return {
            key: value
            for key, value in model.state_dict(keep_vars=True).items()
            if value.requires_grad or key in held or key in frozen
        }
