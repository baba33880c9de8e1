"""Checkpoints that are complete or absent, without the frozen base, each with its adapter file.

mmengine writes a checkpoint under its final name, and removes an older one
before that. Here it is written under a temporary name and renamed, and older
ones are removed afterwards: by a file backend, through which a
:class:`CheckpointHook` stores.
"""

from pathlib import Path
from uuid import uuid4
from weakref import WeakValueDictionary

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

from mmpeft.checkpoint.adapter_file import json_beside, write_adapter
from mmpeft.checkpoint.atomic import replacing
from mmpeft.checkpoint.keys import excluded_keys
from mmpeft.checkpoint.manifest import describe

from .unwrap import unwrap

BACKEND = 'mmpeft.checkpoints'
RUNS = WeakValueDictionary()
"""The hook of each run by a name, because a backend's arguments are plain data."""


class AdapterCheckpointHook(Hook):
    """Takes the frozen base out of checkpoints and writes them whole, adapter files beside them.

    ``iter_40.pth`` has ``iter_40.safetensors`` and ``iter_40.safetensors.json``
    beside it. The adapter is written before the checkpoint and removed after
    it, so that no checkpoint is without.

    Args:
        runner: Whose checkpoint hooks store this way from their
            ``before_train``, but for those with a file backend of their own.
        base_checkpoint: That the base is from; None for the model's own weights.
        save_frozen: Keep the base in checkpoints.
        save_adapters: Write adapter files.
    """

    priority = 'LOWEST'  # after all other hooks have changed a checkpoint

    def __init__(
        self, runner: Runner, base_checkpoint: str | None, save_frozen: bool, save_adapters: bool
    ):
        if base_checkpoint and '://' not in base_checkpoint:
            base_checkpoint = str(Path(base_checkpoint).absolute())
        self.base_checkpoint = base_checkpoint
        self.save_frozen = save_frozen
        self.save_adapters = save_adapters
        self.manifest = self._adapter = None
        self._outdated = []
        name = uuid4().hex
        RUNS[name] = self
        for hook in runner.hooks:
            if not isinstance(hook, CheckpointHook):
                continue
            if hook.backend_args or hook.file_client_args or '://' in str(hook.out_dir):
                runner.logger.warning(
                    "Checkpoints are written by the config's own file backend: without adapter "
                    'files beside them, and a crash during a write can leave a truncated file.'
                )
            else:
                hook.backend_args = dict(backend=BACKEND, run=name)

    def before_save_checkpoint(self, runner, checkpoint):
        """Add the manifest, keep the adapter for :meth:`write`, remove the base."""
        model = unwrap(runner.model)
        if self.manifest is None:
            self.manifest = describe(model)
        base = dict(holds_base=self.save_frozen, base_checkpoint=self.base_checkpoint)
        checkpoint['meta']['mmpeft'] = self.manifest | base
        excluded, state = excluded_keys(model), checkpoint['state_dict']
        if self.save_adapters:
            self._adapter = {k: v for k, v in state.items() if k not in excluded}
        if not self.save_frozen:
            for key in excluded:
                state.pop(key, None)
                checkpoint.get('ema_state_dict', {}).pop(f'module.{key}', None)

    def write(self, content: bytes, path: Path) -> None:
        """Store a checkpoint with its adapter, then remove what is outdated.

        Raises:
            UnwrittenFileError: The disk is full or cannot be written to. The
                checkpoints before still exist.
        """
        if self._adapter is not None:
            write_adapter(_adapter_beside(path), self._adapter, self.manifest)
            self._adapter = None
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        outdated, self._outdated = self._outdated, []
        for old in outdated:
            if old != path:
                adapter = _adapter_beside(old)
                for file in (old, json_beside(adapter), adapter):
                    file.unlink(missing_ok=True)

    def outdate(self, path: Path) -> None:
        """Mark a checkpoint and its adapter to be removed when the next one is written."""
        self._outdated.append(path)


@register_backend(BACKEND, force=True)
class CheckpointBackend(LocalBackend):
    """The :class:`AdapterCheckpointHook` of a run as a backend of mmengine."""

    def __init__(self, run: str):
        self.run = run

    def put(self, obj: bytes, filepath) -> None:
        """See :meth:`AdapterCheckpointHook.write`."""
        RUNS[self.run].write(obj, Path(filepath))

    def remove(self, filepath) -> None:
        """See :meth:`AdapterCheckpointHook.outdate`."""
        RUNS[self.run].outdate(Path(filepath))


def _adapter_beside(checkpoint):
    return checkpoint.with_name(checkpoint.name.removesuffix('.pth') + '.safetensors')
