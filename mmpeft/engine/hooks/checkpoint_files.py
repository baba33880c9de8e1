"""Checkpoints that are complete or absent, each with its adapter file beside it.

mmengine writes a checkpoint under its final name, and removes an older one
before that. Here it is written under a temporary name and renamed, and older
ones are removed afterwards. This is a file backend, by which a
:class:`CheckpointHook` stores.
"""

from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4
from weakref import WeakValueDictionary

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from torch import Tensor

from mmpeft.checkpoint.adapter_file import json_beside, write_adapter
from mmpeft.checkpoint.atomic import replacing

NAME = 'mmpeft.checkpoints'
RUNS = WeakValueDictionary()
"""The files of each run by a name, because a backend's arguments are plain data."""


class CheckpointFiles:
    """A run's checkpoints on the disk.

    ``iter_40.pth`` has ``iter_40.safetensors`` and ``iter_40.safetensors.json``
    beside it. The adapter is written before the checkpoint and removed after
    it, so that no checkpoint is without.
    """

    def __init__(self):
        self.name = uuid4().hex
        RUNS[self.name] = self
        self._adapter = None
        self._outdated = []

    def announce(self, state: Mapping[str, Tensor], manifest: Mapping) -> None:
        """Set the adapter of the next checkpoint; see :func:`write_adapter`."""
        self._adapter = state, manifest

    def write(self, content: bytes, path: Path) -> None:
        """Store a checkpoint with its adapter, then remove what is outdated.

        Raises:
            UnwrittenFileError: The disk is full or cannot be written to. The
                checkpoints before still exist.
        """
        if self._adapter is not None:
            write_adapter(adapter_beside(path), *self._adapter)
            self._adapter = None
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        outdated, self._outdated = self._outdated, []
        for old in outdated:
            if old != path:
                adapter = adapter_beside(old)
                for file in (old, json_beside(adapter), adapter):
                    file.unlink(missing_ok=True)

    def outdate(self, path: Path) -> None:
        """Mark a checkpoint and its adapter to be removed when the next one is written."""
        self._outdated.append(path)


@register_backend(NAME, force=True)
class CheckpointBackend(LocalBackend):
    """The :class:`CheckpointFiles` of a run as a backend of mmengine."""

    def __init__(self, run: str):
        self.run = run

    def put(self, obj: bytes, filepath) -> None:
        """See :meth:`CheckpointFiles.write`."""
        RUNS[self.run].write(obj, Path(filepath))

    def remove(self, filepath) -> None:
        """See :meth:`CheckpointFiles.outdate`."""
        RUNS[self.run].outdate(Path(filepath))


def adapter_beside(checkpoint: Path) -> Path:
    """Where the adapter file of a checkpoint is."""
    return checkpoint.with_name(checkpoint.name.removesuffix('.pth') + '.safetensors')


def keep_whole(runner: Runner) -> CheckpointFiles:
    """Let a run's checkpoint hooks store through :class:`CheckpointFiles`.

    A hook with a backend of its own, or that does not store on a local disk,
    is not changed.

    Args:
        runner: Before its ``before_train``.
    """
    files = CheckpointFiles()
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            if hook.backend_args or hook.file_client_args or '://' in str(hook.out_dir):
                runner.logger.warning(
                    "Checkpoints are written by the config's own file backend: without adapter "
                    'files beside them, and a crash while one is written can leave half of it.'
                )
            else:
                hook.backend_args = dict(backend=NAME, run=files.name)
    return files
