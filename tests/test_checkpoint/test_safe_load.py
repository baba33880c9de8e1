"""Checkpoints in the parts of several processes."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from mmpeft.checkpoint.safe_load import read_checkpoint
from mmpeft.errors import UsageError


@pytest.fixture
def mesh():
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh('cpu', (1,))
    distributed.destroy_process_group()


def test_what_one_process_had_of_a_sharded_model_is_refused(mesh, tmp_path):
    state, path = dict(weight=torch.ones(2)), tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict=state), path)
    assert torch.equal(read_checkpoint(path)['state_dict']['weight'], state['weight'])
    torch.save(dict(state_dict=dict(weight=distribute_tensor(state['weight'], mesh))), path)
    with pytest.raises(UsageError, match=r'holds the parts that one process had .* \(DTensor\)'):
        read_checkpoint(path)


def test_a_folder_of_parts_is_refused_with_what_makes_a_file_of_it(tmp_path):
    with pytest.raises(UsageError, match='is a folder, .* dcp_to_torch FOLDER FILE'):
        read_checkpoint(tmp_path)
