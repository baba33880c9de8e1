"""Several processes on a machine without an accelerator."""

import pytest
import torch
from mmengine.config import Config

from mmpeft.engine import processes
from mmpeft.errors import UsageError


def test_distribution_without_an_accelerator(monkeypatch):
    started = []
    monkeypatch.setattr(processes, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(torch.distributed, 'init_process_group', started.append)
    cfg = Config(
        dict(
            launcher='pytorch',
            model=dict(
                heads=[
                    dict(norm_cfg=dict(type='SyncBN', requires_grad=True)),
                    dict(norm_cfg=dict(type=torch.nn.SyncBatchNorm)),
                ]
            ),
            model_wrapper_cfg=dict(find_unused_parameters=True),
        )
    )
    processes.prepare_distribution(cfg)
    assert started == ['gloo']
    assert [head.norm_cfg.type for head in cfg.model.heads] == ['BN', 'BN']
    assert cfg.model_wrapper_cfg.to_dict() == dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=True,
        device_ids=None,
    )
    sharding = dict(type='MMFullyShardedDataParallel', cpu_offload=True)
    cfg = Config(dict(launcher='pytorch', model=dict(), model_wrapper_cfg=sharding))
    processes.prepare_distribution(cfg)
    assert cfg.model_wrapper_cfg.to_dict() == sharding
    with pytest.raises(UsageError, match='dist_train.sh'):
        processes.prepare_distribution(Config(dict(launcher='slurm', model=dict())))


def test_distribution_with_an_accelerator_is_left_alone(monkeypatch):
    monkeypatch.setattr(processes, 'get_device', lambda: 'cuda')
    cfg = Config(dict(launcher='pytorch', model=dict(norm_cfg=dict(type='SyncBN'))))
    processes.prepare_distribution(cfg)
    assert cfg.model.norm_cfg.type == 'SyncBN' and 'model_wrapper_cfg' not in cfg
