"""Train by projects/commonsense in accelerate's FSDP or DeepSpeed on CPUs, and again from halfway.

accelerate shards on GPUs alone: here it takes the CPU for one. Arguments are those of train.py.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda *_, **__: ('gloo', DistributedType.MULTI_GPU)
PartialState.set_device = lambda state: setattr(state, 'device', torch.device('cpu'))
sys.path.insert(0, str(Path(__file__).parents[2] / 'projects/commonsense'))


def main():
    from commonsense.training import main

    from mmpeft.injection.wrappers import is_sharded
    from mmpeft.interop.transformers import PEFTTrainer

    if os.environ.get('ACCELERATE_USE_DEEPSPEED') == 'true':
        import deepspeed

        deepspeed.init_distributed(dist_backend='gloo')
    sharded = []
    save = PEFTTrainer.save_model
    PEFTTrainer.save_model = lambda trainer, *args, **named: (
        sharded.append(is_sharded(trainer.model_wrapped)),
        save(trainer, *args, **named),
    )
    main(sys.argv[1:])
    work_dir = Path(sys.argv[sys.argv.index('--work-dir') + 1])
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.copy(work_dir / 'adapter.safetensors', work_dir / 'through.safetensors')
        shutil.rmtree(work_dir / 'checkpoint-4')
    torch.distributed.barrier()
    main([*sys.argv[1:], '--resume'])
    assert len(sharded) == 5 and all(sharded), sharded
    # Threads of gloo that outlive Python abort; they end a moment after the last call.
    time.sleep(0.5)
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
