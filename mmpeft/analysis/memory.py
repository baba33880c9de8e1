"""What training a network takes in memory, predicted from tensors without data."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import astuple, dataclass, fields

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mmpeft.injection.weights import layers
from mmpeft.quantization import stored_parts


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step with AdamW.

    Attributes:
        weights: Of the whole model.
        gradients: Of what trains.
        optimizer: AdamW's two moments.
        saved: What the backbone's forward pass keeps for backward.
        recomputed: The same where blocks are recomputed: their inputs, and
            what the largest block keeps while it is recomputed. None where the
            backbone cannot.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int
    recomputed: int | None


def predict(build: Callable[[bool], nn.Module | None], images: tuple[int, int, int, int]) -> Memory:
    """Predict the memory of one step; parameters and images have no data.

    Args:
        build: Makes the adapted model, which has a ``backbone``. Its argument
            says whether blocks are recomputed; it returns None if they cannot.
        images: Shape of a batch, (N, 3, H, W).
    """
    model, mode = built_without_data(lambda: build(False))
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    with mode:
        saved, kept = saved_bytes(model.backbone, torch.randn(images))
    recomputed = None
    again, mode = built_without_data(lambda: build(True))
    if again is not None:
        with mode:
            recomputed, still_kept = saved_bytes(again.backbone, torch.randn(images))
        recomputed += _largest_block(again.backbone, kept, still_kept)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Memory(weights, trained, 2 * trained, saved, recomputed)


def built_without_data(build: Callable[[], nn.Module]) -> tuple[nn.Module, FakeTensorMode]:
    """A model whose tensors have shapes and no data, and the mode in which it runs.

    Models whose construction reads numbers off tensors (mmdet's Swin, for its
    drop-path rates) take memory while they are built.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            return build(), mode
    except (RuntimeError, DataDependentOutputException):
        model = build()
    for module in model.modules() if model is not None else ():
        for held in (module._parameters, module._buffers):
            held.update({k: mode.from_tensor(v) for k, v in held.items() if v is not None})
    return model, mode


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
        for path, module in layers(model):  # kernels pass adapters with hooks by
            stack.callback(module.register_forward_pre_hook(enter(path)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        model(images)
    return sum(storage.nbytes() for storage in seen.values()), dict(by_module)


def table(rows: Iterable[tuple[str, Memory]]) -> Table:
    """A line for each named prediction, in GiB."""
    columns = [field.name for field in fields(Memory)]
    result = Table('run', *columns, 'total', 'total, recomputing', title='GiB')
    for name, memory in rows:
        *fixed, saved, recomputed = astuple(memory)
        values = [*fixed, saved, recomputed, sum(fixed) + saved]
        values.append(None if recomputed is None else sum(fixed) + recomputed)
        result.add_row(name, *('-' if v is None else f'{v / 2**30:.2f}' for v in values))
    return result


def _largest_block(model, kept, still_kept):
    """What the largest recomputed block keeps: modules that keep less where blocks are recomputed.

    Where a backbone does not mark its blocks, they are the outermost modules
    that keep nothing.
    """
    marked = [m for m in model.modules() if getattr(m, 'with_cp', False) is True]
    marked = {id(m) for m in marked if not any(c in marked for c in m.modules() if c is not m)}
    spared = {path: value - still_kept.get(path, 0) for path, value in kept.items()}
    paths = [path for path, module in model.named_modules() if id(module) in marked]
    if not paths:
        empty = [path for path in spared if spared[path] and not still_kept.get(path, 0)]
        paths = [p for p in empty if not any(p.startswith(f'{e}.') for e in empty)]
    return max((spared.get(path, 0) for path in paths), default=0)
