"""Parameters outside of their device's memory."""

import pytest
import torch
from torch import nn

from mmpeft.injection.offload import offloaded, onloaded

TENSORS = dict(
    contiguous=torch.randn(3, 4),
    channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    transposed=torch.randn(3, 5).bfloat16().t(),
    sliced=torch.randn(4, 8, dtype=torch.float64)[1:, :4],
    expanded=torch.randn(1, 4).expand(3, 4),
    complex=torch.randn(3, 5, dtype=torch.complex64),
)


@pytest.mark.parametrize('name', TENSORS)
@pytest.mark.parametrize('where', ['cpu', 'folder'])
def test_values_and_layout_are_those_of_the_parameter(name, where, tmp_path):
    parameter = nn.Parameter(TENSORS[name])
    held = offloaded(parameter, tmp_path if where == 'folder' else where)
    assert held.dtype == parameter.dtype and torch.equal(held, parameter)
    assert held.data_ptr() != parameter.data_ptr() and not held.requires_grad
    if name not in ('sliced', 'expanded'):
        assert held.stride() == parameter.stride()
    assert not list(tmp_path.iterdir())
    there = held.data_ptr()
    assert onloaded(held, parameter) is held and held.data_ptr() != there
    assert torch.equal(held, parameter)
