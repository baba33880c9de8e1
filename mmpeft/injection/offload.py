"""Parameters outside of their device's memory, for a while."""

from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor, nn


def offloaded(parameter: nn.Parameter, where: str | Path) -> nn.Parameter:
    """A frozen parameter of the same values and shape elsewhere, and of the same strides if dense.

    Args:
        parameter: Not in few bits.
        where: ``'cpu'`` for host memory, or a folder for a file there. The file has no name any
            more when this returns, and ends with the parameter.

    Raises:
        OSError: There is no such folder, or it cannot be written, or is full.
    """
    values = parameter.detach().to('cpu', copy=True)  # dense, whatever the parameter is
    if where == 'cpu':
        return nn.Parameter(values, False)
    elements = values.as_strided((values.numel(),), (1,))
    with NamedTemporaryFile(dir=where, prefix='offloaded-') as file:
        # A full disk raises an error here; in a mapped file it would kill the process.
        file.write(memoryview(elements.view(torch.uint8).numpy()))
        file.flush()
        mapped = torch.from_file(file.name, True, len(elements), dtype=values.dtype)
    return nn.Parameter(mapped.as_strided(values.shape, values.stride()), False)


def onloaded(parameter: nn.Parameter, like: Tensor) -> nn.Parameter:
    """The same object, after its values are copied to the device and dtype of another tensor."""
    parameter.data = parameter.data.to(like.device, like.dtype, copy=True)
    return parameter
