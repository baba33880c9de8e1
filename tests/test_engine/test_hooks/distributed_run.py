"""One process of several runs: ``distributed_run.py FOLDER BATCH METHODS``, under torchrun or not.

METHODS is a JSON list; run N works in FOLDER/N. The ranks of a budget go by sensitivity.
"""

import json
import os
import sys
from pathlib import Path

import torch

from mmpeft.engine.launch import build_runner
from tests.toy import toy_config


def train(work_dir, batch, method):
    distributed = 'WORLD_SIZE' in os.environ
    torch.manual_seed(0)
    config = toy_config(
        work_dir,
        method,
        **{
            'experiment_name': f'distributed{work_dir.name}',
            'launcher': 'pytorch' if distributed else 'none',
            'model.backbone.dropout': 0.0,
            'train_dataloader.batch_size': int(batch),
            'train_dataloader.dataset.noise': 0.0,
            'default_hooks.peft.sensitivity': 2 * ('budget' in method),
            'optim_wrapper.optimizer': dict(type='SGD', lr=0.1, _delete_=True),
        },
    )
    runner = build_runner(config)
    runner.train()
    model = runner.model.module if distributed else runner.model
    rank = os.environ.get('RANK', 0)
    torch.save(model.state_dict(), f'{work_dir}/rank{rank}.pth')
    torch.save(runner.val(), f'{work_dir}/metrics{rank}.pth')


def main(folder, batch, methods):
    torch.set_num_threads(1)
    for number, method in enumerate(json.loads(methods)):
        train(Path(folder) / str(number), batch, method)


if __name__ == '__main__':
    main(*sys.argv[1:])
