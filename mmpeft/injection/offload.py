"""Parameters outside of their device's memory, for a while."""

from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor, nn


def offloaded(parameter: nn.Parameter, where: str | Path) -> nn.Parameter:
    """A frozen parameter of the same values, shape and strides elsewhere.

    Args:
        parameter: Plain and dense.
        where: ``'cpu'`` for host memory, or a folder for a file there. The file has no name any
            more when this returns, and ends with the parameter.

    Raises:
        OSError: There is no such folder, or it cannot be written, or is full.
    """
    if where == 'cpu':
        return nn.Parameter(parameter.detach().to('cpu', copy=True), False)
    with NamedTemporaryFile(dir=where, prefix='offloaded-') as file:
        # A full disk raises an error here; in a mapped file it would kill the process.
        file.write(memoryview(_bytes(parameter)))
        file.flush()
        flat = torch.from_file(
            file.name, shared=True, size=parameter.numel(), dtype=parameter.dtype
        )
    return nn.Parameter(flat.as_strided(parameter.shape, parameter.stride()), False)


def onloaded(parameter: nn.Parameter, like: Tensor) -> nn.Parameter:
    """The same object, after its values are copied to the device and dtype of another tensor."""
    parameter.data = parameter.data.to(like.device, like.dtype, copy=True)
    return parameter


def _bytes(parameter):
    """The elements in the order of memory, as bytes."""
    flat = torch.as_strided(parameter.detach(), (parameter.numel(),), (1,))
    return flat.cpu().view(torch.uint8).numpy()
