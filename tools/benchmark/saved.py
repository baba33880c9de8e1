"""What autograd keeps between forward and backward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Note what is saved for backward while the context lasts.

    A storage that several operations save counts once and whole. Parameters
    and buffers of the model are there anyway and do not count; nor does what
    a custom function keeps elsewhere than in ``save_for_backward``.

    Yields:
        Bytes of each storage by its address; filled as forward runs.
    """
    resting = {_address(tensor) for tensor in chain(model.parameters(), model.buffers())}
    held = {}

    def note(tensor):
        if _address(tensor) not in resting:
            held[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield held


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages, each once."""
    return sum({_address(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _address(tensor):
    return tensor.untyped_storage().data_ptr()
