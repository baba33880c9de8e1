"""What training a network takes in memory, predicted from tensors without data."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mmpeft.execution import MEMORY, SMALL, SPEED
from mmpeft.execution.memory import RecomputedBlock
from mmpeft.injection.weights import layers
from mmpeft.quantization import stored_parts

from .images import refusing


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step with AdamW.

    Attributes:
        weights: Of the whole model.
        gradients: Of what trains.
        optimizer: AdamW's two moments.
        saved: What the backbone's forward pass keeps for backward, by the ``memory`` of
            :func:`mmpeft.inject`.
        block: What the largest block keeps while it runs again under ``'small'``; 0 where the
            backbone has none.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: dict[str, int]
    block: int

    @property
    def totals(self) -> dict[str, int]:
        """The sum by ``memory``; that of ``'small'`` includes a block."""
        fixed = self.weights + self.gradients + self.optimizer
        return {m: fixed + kept + self.block * (m == SMALL) for m, kept in self.saved.items()}


def predict(build: Callable[[str], nn.Module], images: tuple[int, int, int, int]) -> Memory:
    """Predict the memory of one step; parameters and images have no data.

    Args:
        build: Makes the adapted model, which has a ``backbone``, by ``memory``.
        images: Shape of a batch, (N, 3, H, W).

    Raises:
        UsageError: The backbone does not take images of this size.
    """
    saved, kept = {}, {}
    for memory in MEMORY:
        model, mode = built_without_data(partial(build, memory))
        with mode, refusing(images[2:]):
            saved[memory], kept[memory] = saved_bytes(model.backbone, torch.randn(images))
    modules = model.backbone.named_modules()
    paths = [path for path, module in modules if isinstance(module, RecomputedBlock)]
    block = max((kept[SPEED].get(path, 0) - kept[SMALL].get(path, 0) for path in paths), default=0)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in model.parameters())
    return Memory(weights, trained, 2 * trained, saved, block)


def built_without_data(build: Callable[[], nn.Module]) -> tuple[nn.Module, FakeTensorMode]:
    """A model whose tensors have shapes and no data, and the mode in which it runs.

    Models whose construction reads numbers off tensors (timm's transformers) are
    built on the meta device; those that read them off parameters or on the CPU
    alone (mmdet's Swin, for its drop-path rates) take memory while they are built.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            return build(), mode
    except (RuntimeError, DataDependentOutputException):
        try:
            with torch.device('meta'):
                model = build()
        except RuntimeError:
            model = build()
    on_cpu = {}
    for module in model.modules() if model is not None else ():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    held[key] = on_cpu.setdefault(id(tensor), (_fake(tensor, mode), tensor))[0]
    return model, mode


def _fake(tensor, mode):
    if not tensor.is_meta:
        return mode.from_tensor(tensor)
    with mode:
        fake = torch.empty_like(tensor, device='cpu')
    trained = tensor.requires_grad
    return nn.Parameter(fake, trained) if isinstance(tensor, nn.Parameter) else fake


def saved_bytes(model: nn.Module, images: Tensor) -> tuple[int, dict[str, int]]:
    """Bytes that a forward pass keeps for backward, parameters and buffers not counted.

    Of the whole pass, and by the path of each module that runs in it.
    """
    held = [
        part for t in (*model.parameters(), *model.buffers()) for part in stored_parts(t).values()
    ]
    own = {part.untyped_storage()._cdata for part in held}
    seen, running, by_module = {}, [], defaultdict(int)

    def pack(tensor):
        for part in stored_parts(tensor).values():
            storage = part.untyped_storage()
            if storage._cdata not in own and storage._cdata not in seen:
                seen[storage._cdata] = storage  # held, so that its address stays its own
                for path in running:
                    by_module[path] += storage.nbytes()
        return tensor

    def enter(path):
        return lambda module, args: running.append(path)

    def leave(*_):
        running.pop()

    with ExitStack() as stack:
        for path, module in layers(model):  # hooks on adapters would turn kernels off
            stack.callback(module.register_forward_pre_hook(enter(path)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        model(images)
    return sum(storage.nbytes() for storage in seen.values()), dict(by_module)
