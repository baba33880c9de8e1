"""Train by projects/commonsense in accelerate's FSDP on CPUs, to the end and again from halfway.

accelerate shards on GPUs alone: here it takes the CPU for one. Arguments are those of train.py.
"""

import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda *_, **__: ('gloo', DistributedType.MULTI_GPU)
PartialState.set_device = lambda state: setattr(state, 'device', torch.device('cpu'))
sys.path.insert(0, str(Path(__file__).parents[2] / 'projects/commonsense'))


def main():
    from commonsense.training import main

    from mmpeft.training.monitor import Monitor

    sharded = []
    close = Monitor.close
    Monitor.close = lambda monitor: (sharded.append(monitor.sharded), close(monitor))[1]
    main(sys.argv[1:])
    work_dir = Path(sys.argv[sys.argv.index('--work-dir') + 1])
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.copy(work_dir / 'adapter.safetensors', work_dir / 'through.safetensors')
        shutil.rmtree(work_dir / 'checkpoint-4')
    torch.distributed.barrier()
    main([*sys.argv[1:], '--resume'])
    assert sharded == [True, True]


if __name__ == '__main__':
    main()
