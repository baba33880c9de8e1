"""Several adapters on one base, one of which is in use."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from mmpeft.checkpoint.adapter_file import read_fitting, save_adapter
from mmpeft.checkpoint.keys import adapter_keys, fill_frozen
from mmpeft.checkpoint.manifest import attach_adapters
from mmpeft.errors import UsageError, suggest
from mmpeft.injection.attach import attach, detach_all
from mmpeft.injection.freeze import freeze_again, release
from mmpeft.injection.inject import inject
from mmpeft.injection.merge import MERGED
from mmpeft.injection.site import attached
from mmpeft.injection.summary import Summary
from mmpeft.injection.wrappers import inner, refuse_offloaded, refuse_sharded

from .adapter_state import AdapterState, clone_state, swap_tensors
from .combination import check_weights, combine


class AdapterLibrary:
    """Adapters under names on one model, switched without building it anew.

    The model always is what it would be with the one adapter alone, heads and
    buffers included, to the last bit, so that ``merge``, ``save_adapter`` and
    ``summary`` work on it. Frozen weights are held once; a further adapter
    costs what its file holds. Files whose heads have other shapes than the
    model's do not fit it: see ``tools/serve.py``.

    ::

        adapters = mmpeft.AdapterLibrary(model)
        adapters.load('coco', 'coco.safetensors')
        adapters.load('dota', 'dota.safetensors')
        adapters.use('coco')  # model(x) is the model that was saved as coco
        adapters.use(None)  # the base with its own heads

    Attributes:
        model: The plain base, with its pretrained weights in it, without wrappers.
        current: Name of the adapter in use; None for the base.

    Raises:
        UsageError: The model has adapters, was merged reversibly, is sharded or has wrappers.
    """

    def __init__(self, model: nn.Module):
        refuse_sharded(model, 'AdapterLibrary')
        if any(inner(module) is not module for module in model.modules()):
            raise UsageError(
                'A library of adapters needs the model itself, and this one, or a module in it, is '
                'in a wrapper (DDP, torch.compile, checkpoint_wrapper). Give the model inside.'
            )
        records = (vars(m).get('peft') or MERGED in vars(m) for m in model.modules())
        if any(records) or attached(model):
            raise UsageError(
                'A library of adapters needs a plain base, and this model is adapted: the heads '
                'of its base are no longer known. Build the base anew, and give the library what '
                'mmpeft.save_adapter wrote.'
            )
        self.model = model
        self.current = None
        self._states: dict[str, AdapterState] = {}

    @property
    def names(self) -> list[str]:
        """Names of all adapters, in the order in which they were added."""
        return list(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name) -> bool:
        return name in self._states

    def load(self, name: str, path: str | Path, check_base: bool = True) -> None:
        """Read an adapter file; see :func:`mmpeft.load_adapter`.

        Raises:
            UsageError: The name is taken, or the file does not fit this base.
                Model and library are unchanged.
            MissingFileError: There is no such file.
        """
        with self._adding(name) as tensors:
            manifest, state = read_fitting(self.model, path, check_base)
            attach_adapters(self.model, manifest)
            state = fill_frozen(self.model, state)
            own = {key: state[key] for key in adapter_keys(self.model)}
            self.model.load_state_dict(own, strict=False)
            tensors |= clone_state(self.model, state)

    def inject(self, name: str, method, targets=None, unfreeze=()) -> Summary:
        """Start a new adapter on the base, to be trained in use; see :func:`mmpeft.inject`.

        Its heads start as copies of the base's.

        Raises:
            UsageError: As :func:`mmpeft.inject`, or the name is taken.
        """
        with self._adding(name) as tensors:
            summary = inject(self.model, method, targets, unfreeze)
            tensors |= clone_state(self.model, self.model.state_dict())
        return summary

    def use(self, name: str | None) -> nn.Module:
        """Switch to an adapter, or to the base if ``name`` is None.

        Raises:
            UsageError: There is no such adapter, or the model was adapted,
                merged or restored by other means meanwhile.
        """
        self._check_unchanged()
        state = None if name is None else self._state(name)
        if name == self.current:
            return self.model
        if self.current is not None:
            detach_all(self.model)
            release(self.model)
            swap_tensors(self.model, self._state(self.current).tensors)
        if state is not None:
            swap_tensors(self.model, state.tensors)
            freeze_again(self.model, state.records)
            attach(self.model, state.sites)
        self.current = name
        return self.model

    def combine(self, name: str, weights: Mapping[str, float], heads: str | None = None) -> None:
        """Add several adapters to one, with weights.

        phi(W) = W + sum_i w_i (phi_i(W) - W), and the same formula for
        parameters and buffers of the target module that were trained beside
        the adapters. What is outside the target (neck, heads) comes from one
        adapter, or is mixed by the formula too, which is the weighted mean
        where the weights sum to 1. Counters are those of the adapter of the
        largest weight. The adapters are those of the parts, not copies.

        Args:
            name: Of the new adapter.
            weights: By the names of the parts.
            heads: The adapter whose heads are taken; None to mix them.

        Raises:
            UsageError: A name is unknown or taken, a weight is not a
                finite number, or adapters that act on activations are not alone
                among the parts with the weight 1.
        """
        self._check_new(name)
        weights = check_weights(weights)
        parts = {part: self._state(part) for part in weights}
        if heads is not None and heads not in parts:
            known = suggest(str(heads), parts)
            raise UsageError(f'heads={heads!r} is not one of the combined adapters. {known}')
        with self._using(None):
            base = self.model.state_dict(keep_vars=True)
            self._states[name] = combine(parts, weights, base, heads)

    def save(self, name: str, path: str | Path) -> Path:
        """Write an adapter to a file, as :func:`mmpeft.save_adapter` does."""
        with self._using(name):
            return save_adapter(self.model, path)

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is in use, the base is used from then on."""
        self._state(name)
        if name == self.current:
            self.use(None)
        del self._states[name]

    def _state(self, name):
        if name not in self._states:
            raise UsageError(f'There is no adapter {name!r}. {suggest(str(name), self._states)}')
        return self._states[name]

    def _check_new(self, name):
        if not isinstance(name, str) or not name:
            raise UsageError(f'The name of an adapter must be a non-empty string, not {name!r}.')
        if name in self:
            raise UsageError(f'There is an adapter {name!r} already. Take another name.')

    def _check_unchanged(self):
        refuse_offloaded(self.model, 'AdapterLibrary')
        if MERGED in self.model.__dict__:
            raise UsageError(
                f'The model was merged with {self.current!r}. Write mmpeft.unmerge(model) before '
                'the library goes on.'
            )
        records = getattr(self.model, 'peft', None)
        own = None if self.current is None else self._states[self.current].records
        if records is not own:
            raise UsageError(
                f'The model is no longer as the library left it ({self.current!r} in use): '
                'adapters were attached, removed or merged for good by other means. Build the '
                'base and the library anew; merge(model, reversible=True) and unmerge are allowed.'
            )

    @contextmanager
    def _using(self, name):
        current = self.current
        self.use(name)
        try:
            yield
        finally:
            self.use(current)

    @contextmanager
    def _adding(self, name):
        """Make an adapter of what is attached to the base inside, and of the tensors put in."""
        self._check_new(name)
        with self._using(None):
            tensors = {}
            try:
                yield tensors
                state = AdapterState(attached(self.model), self.model.peft, tensors)
            finally:
                detach_all(self.model)
                release(self.model)
            self._states[name] = state
