"""One process of a run: ``distributed_run.py WORK_DIR BATCH METHOD``, under torchrun or not."""

import json
import os
import sys

import torch

from mmpeft.engine.launch import build_runner
from tests.toy import toy_config


def main(work_dir, batch, method):
    torch.set_num_threads(1)
    distributed = 'WORLD_SIZE' in os.environ
    config = toy_config(
        work_dir,
        json.loads(method),
        **{
            'experiment_name': 'distributed',
            'launcher': 'pytorch' if distributed else 'none',
            'model.backbone.dropout': 0.0,
            'train_dataloader.batch_size': int(batch),
            'train_dataloader.dataset.noise': 0.0,
            'optim_wrapper.optimizer': dict(type='SGD', lr=0.1, _delete_=True),
        },
    )
    runner = build_runner(config)
    runner.train()
    model = runner.model.module if distributed else runner.model
    rank = os.environ.get('RANK', 0)
    torch.save(model.state_dict(), f'{work_dir}/rank{rank}.pth')
    torch.save(runner.val(), f'{work_dir}/metrics{rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
