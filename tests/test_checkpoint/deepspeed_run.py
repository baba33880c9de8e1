"""One rank of the tests of DeepSpeed, under torchrun: ``deepspeed_run.py FOLDER``.

Each rank writes what it found to ``FOLDER/rank<n>.pth``.
"""

import sys
from pathlib import Path

import deepspeed
import torch
from torch import nn

import mmpeft
from mmpeft.checkpoint.fingerprint import fingerprint
from mmpeft.injection.wrappers import writes
from mmpeft.interop.transformers import check_unwatched
from tests.test_checkpoint.sharded_run import METHODS, RANK, TARGETS, batch, error_of, network

STAGES = 1, 2, 3


def engine_of(stage, model, **config):
    """A model in DeepSpeed, which really shards it at stage 3."""
    trained = [p for p in model.parameters() if p.requires_grad]
    config |= dict(
        train_micro_batch_size_per_gpu=2,
        zero_optimization=dict(stage=stage, stage3_param_persistence_threshold=0),
        gradient_clipping=0.0,  # of 1 where it is left out
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def train(engine, kind, dtype):
    x, y = batch(kind)
    for _ in range(3):
        engine.backward(nn.functional.cross_entropy(engine(x.to(dtype)), y))
        engine.step()


def train_all(folder, stage):
    """Train each network with each method; save it before and after."""
    found = {}
    for kind in ('transformer', 'conv'):
        for method in METHODS:
            engine, _ = engine_of(stage, network(kind, method).float())
            mmpeft.save_adapter(engine, folder / f'{stage}_{kind}_{method}.safetensors')
            train(engine, kind, torch.float32)
            found[kind, method] = mmpeft.adapter_state_dict(engine)
            found[kind, method, 'fingerprint'] = fingerprint(engine)
            found[kind, method, 'sizes'] = [p.numel() for p in engine.module.parameters()]
            engine.destroy()
    return found


def calls(folder, stage):
    """What is refused, by name, and whether this rank takes part in writing."""
    adapted, _ = engine_of(stage, network('transformer', 'LoRA').float())
    model = adapted.module
    allocating, pruning = network('transformer').float(), network('transformer').float()
    mmpeft.inject(allocating, dict(type='AdaLoRA', rank=1), TARGETS)
    mmpeft.inject(pruning, dict(type='LoRA', rank=1, mpc='o'), TARGETS)
    ranked, optimizer = engine_of(stage, allocating)
    pruned, _ = engine_of(stage, pruning)
    found = dict(
        inject=error_of(mmpeft.inject, adapted, METHODS['LoRA']),
        load_adapter=error_of(mmpeft.load_adapter, model, folder / 'other.safetensors'),
        monitor=error_of(mmpeft.monitor, model, optimizer),
        allocate=error_of(mmpeft.allocate, allocating, optimizer, 10),
        callback=error_of(check_unwatched, allocating, optimizer),
        penalty=error_of(check_unwatched, pruning, pruned.optimizer),
        merge=error_of(mmpeft.merge, model),
        remove=error_of(mmpeft.remove, model),
        summary=error_of(mmpeft.summary, model),
        library=error_of(mmpeft.AdapterLibrary, model),
    )
    return found | dict(writes=[writes(adapted), writes(ranked)])


def low_precision(folder, stage):
    """What a file holds where the engine computes in bfloat16."""
    engine, _ = engine_of(stage, network('transformer', 'LoRA').float(), bf16=dict(enabled=True))
    train(engine, 'transformer', torch.bfloat16)
    return mmpeft.adapter_state_dict(engine)


def main(folder):
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend='gloo')
    folder, found = Path(folder), {}
    for stage in STAGES:
        found[stage] = train_all(folder, stage)
        found[stage, 'low'] = low_precision(folder, stage)
        found[stage, 'calls'] = calls(folder, stage)
    torch.save(found, folder / f'rank{RANK}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
