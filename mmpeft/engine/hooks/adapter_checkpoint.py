"""Checkpoints without the frozen base, and adapter files beside them."""

from mmengine.hooks import Hook

from mmpeft.checkpoint.keys import excluded_keys
from mmpeft.checkpoint.manifest import describe
from mmpeft.engine.hooks.unwrap import unwrap

from .checkpoint_files import CheckpointFiles


class AdapterCheckpointHook(Hook):
    """Takes the frozen base out of checkpoints, after all other hooks have changed them.

    Args:
        files: Writes the checkpoints.
        base_checkpoint: That the base is from; None for the model's own weights.
        save_frozen: Keep the base in checkpoints.
        save_adapters: Write an adapter file beside each checkpoint.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        base_checkpoint: str | None,
        save_frozen: bool,
        save_adapters: bool,
    ):
        self.files = files
        self.base_checkpoint = base_checkpoint
        self.save_frozen = save_frozen
        self.save_adapters = save_adapters
        self.manifest = None

    def before_save_checkpoint(self, runner, checkpoint):
        """Add the manifest, announce the adapter file, remove the base."""
        model = unwrap(runner.model)
        if self.manifest is None:
            self.manifest = describe(model)
        base = dict(holds_base=self.save_frozen, base_checkpoint=self.base_checkpoint)
        checkpoint['meta']['mmpeft'] = self.manifest | base
        excluded = excluded_keys(model)
        if self.save_adapters:
            state = checkpoint['state_dict'].items()
            self.files.announce({k: v for k, v in state if k not in excluded}, self.manifest)
        if not self.save_frozen:
            for key in excluded:
                checkpoint['state_dict'].pop(key, None)
                checkpoint.get('ema_state_dict', {}).pop(f'module.{key}', None)
