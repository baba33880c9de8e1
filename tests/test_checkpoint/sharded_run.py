"""One rank of the tests of sharded models, under torchrun: ``sharded_run.py FOLDER``.

Each rank writes what it found to ``FOLDER/rank<n>.pth``.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import mmpeft
from mmpeft.checkpoint.fingerprint import fingerprint
from mmpeft.errors import TrainingError, UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.injection.wrappers import inner
from mmpeft.training.sharding import shard_adapters

METHODS = {
    'LoRA': dict(type='LoRA', rank=2),
    'FLoRA': dict(type='FLoRA', rank=2, scale=1.0),
    'DoRA': dict(type='DoRA', rank=2),
    'LieRA': dict(type='LieRA', rank=2),
    'PiSSA': dict(type='PiSSA', rank=2),
}
TARGETS = dict(module='blocks')
RANK, RANKS = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


class TransformerBlock(nn.Module):
    """Its last operation is a norm, whose output the next block's first layer reads."""

    def __init__(self, width=12):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm1(x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v)))
        return self.norm2(x + self.mlp(x))


class ConvBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, 2 * width, 1)
        self.narrow = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x):
        return x + self.narrow(self.wide(self.norm(self.depthwise(x))).relu())


class Network(nn.Module):
    """Blocks, whose weights are adapted, and a head, which trains itself."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        width = 12 if kind == 'transformer' else 8
        block = TransformerBlock if kind == 'transformer' else ConvBlock
        self.blocks = nn.Sequential(block(), block())
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.blocks(x)
        return self.head(x.mean(1) if self.kind == 'transformer' else x.mean((2, 3)))


def network(kind, method=None):
    torch.manual_seed(0)
    model = Network(kind).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if method is not None:
        mmpeft.inject(model, METHODS[method], TARGETS)
        with torch.no_grad():
            for parameter in model.blocks.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sharded(way, model, blocks=(TransformerBlock, ConvBlock)):
    """A model wrapped in one of the ways, with its blocks as units of FSDP."""
    if way == 'fsdp2':
        for block in model.blocks if blocks else ():
            fully_shard(block)
        return fully_shard(model)
    if way.startswith('fsdp1'):
        arguments = dict(use_orig_params=way == 'fsdp1', device_id=torch.device('cpu'))
        arguments['auto_wrap_policy'] = ModuleWrapPolicy(set(blocks)) if blocks else None
        with warnings.catch_warnings(action='ignore'):  # of frozen beside trained parameters
            return FullyShardedDataParallel(model, **arguments)
    return DistributedDataParallel(model)


def batch(kind):
    """This rank's part of four samples."""
    torch.manual_seed(1)
    shape = (4, 5, 12) if kind == 'transformer' else (4, 8, 6, 6)
    x, y = torch.randn(shape, dtype=torch.float64), torch.arange(4) % 3
    return x.chunk(RANKS)[RANK], y.chunk(RANKS)[RANK]


def train(model, kind, dtype=torch.float64):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    x, y = batch(kind)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()


def error_of(function, *args, **kwargs):
    """What a function refuses by; None if it does not."""
    try:
        function(*args, **kwargs)
    except UsageError as error:
        return str(error)
    return None


def train_all(folder, way):
    """Train each network with each method; save it before and after."""
    found = {}
    for kind in ('transformer', 'conv'):
        for method in METHODS:
            model = sharded(way, network(kind, method))
            mmpeft.save_adapter(model, folder / f'{way}_{kind}_{method}.safetensors')
            train(model, kind)
            found[kind, method] = mmpeft.adapter_state_dict(model)
            found[kind, method, 'fingerprint'] = fingerprint(model)
    return found


def train_behind_norm(way):
    """An adapted layer reads the output of a norm that is sharded apart from it."""
    model = network('transformer')
    mmpeft.inject(model, METHODS['LoRA'])
    if way == 'fsdp2':
        for block in model.blocks:
            fully_shard(block.norm1)
    model = sharded(way, model)
    train(model, 'transformer')
    return mmpeft.adapter_state_dict(model)


def load(folder, way):
    """Load a file of other values, and one of another base."""
    model = sharded(way, network('transformer', 'LoRA'))
    mmpeft.load_adapter(model, folder / 'other.safetensors')
    wrong = error_of(mmpeft.load_adapter, model, folder / 'wrong.safetensors')
    with torch.no_grad():
        output = model(batch('transformer')[0])
    return mmpeft.adapter_state_dict(model), output, wrong


def other_wrappers(folder, way):
    """What is saved of a model with recomputed blocks, of a compiled one, and of a tied one."""
    recomputed = network('transformer', 'LoRA')
    for number, block in enumerate(list(recomputed.blocks)):
        recomputed.blocks[number] = checkpoint_wrapper(block)
    compiled = torch.compile(sharded(way, network('transformer', 'LoRA')), backend='eager')
    tied = network('transformer')
    tied.blocks[1].qkv.weight = tied.blocks[0].qkv.weight
    mmpeft.inject(tied, METHODS['LoRA'], TARGETS)
    models = dict(recomputed=sharded(way, recomputed), compiled=compiled)
    models['tied'] = sharded(way, tied, blocks=())
    for name, model in models.items():
        path = mmpeft.save_adapter(model, folder / f'{way}_{name}.safetensors')
        distributed.barrier()  # of DDP rank 0 writes, and the others do not wait
        mmpeft.load_adapter(model, path)
    return {name: mmpeft.adapter_state_dict(model) for name, model in models.items()}


def refusals(folder, way):
    """What is refused, by name; and whether the models are as they were afterwards."""
    plain = sharded(way, network('transformer'))
    model = sharded(way, network('transformer', 'LoRA'))
    before = mmpeft.adapter_state_dict(model)
    inside = inner(model)
    lora = METHODS['LoRA']
    ranked = network('transformer')
    mmpeft.inject(ranked, dict(type='AdaLoRA', rank=1), TARGETS)
    ranked = sharded(way, ranked)
    optimizer = torch.optim.SGD([p for p in ranked.parameters() if p.requires_grad], 0.1)
    found = dict(
        inject=error_of(mmpeft.inject, plain, lora),
        load_adapter=error_of(mmpeft.load_adapter, plain, folder / 'other.safetensors'),
        library=error_of(mmpeft.AdapterLibrary, plain),
        merge=error_of(mmpeft.merge, model),
        remove=error_of(mmpeft.remove, model),
        unmerge=error_of(mmpeft.unmerge, model),
        summary=error_of(mmpeft.summary, model),
        monitor=error_of(mmpeft.monitor, model, optimizer) if way == 'fsdp1' else None,
        allocate=error_of(mmpeft.allocate, ranked, optimizer, 10),
        penalty=error_of(mmpeft.penalty, ranked),
        save=error_of(mmpeft.save_adapter, plain, folder / 'none.safetensors'),
        inside=error_of(mmpeft.save_adapter, inside, folder / 'inside.safetensors'),
        inside_fingerprint=error_of(fingerprint, inside),
        inside_summary=error_of(mmpeft.summary, inside),
    )
    after = mmpeft.adapter_state_dict(model)
    same = all(torch.equal(after[key], value) for key, value in before.items())
    return found | dict(same=same and before.keys() == after.keys())


def without_original_parameters(folder):
    """FullyShardedDataParallel with use_orig_params=False takes no model with frozen weights."""
    model = network('transformer')
    mmpeft.inject(model, METHODS['LoRA'], TARGETS, unfreeze='.')
    model = sharded('fsdp1_flat', model)
    path = folder / 'flat.safetensors'
    return dict(save=error_of(mmpeft.save_adapter, model, path), print=error_of(fingerprint, model))


def inside_ddp(folder):
    """What works on a model in DDP, and what is refused."""
    plain = sharded('ddp', network('transformer'))
    model = sharded('ddp', network('transformer', 'LoRA'))
    found = dict(
        inject=error_of(mmpeft.inject, plain, METHODS['LoRA']),
        load_adapter=error_of(mmpeft.load_adapter, plain, folder / 'other.safetensors'),
        library=error_of(mmpeft.AdapterLibrary, plain),
        summary=str(mmpeft.summary(model)),
        saved=mmpeft.save_adapter(model, folder / f'ddp_by_rank{RANK}.safetensors').exists(),
        empty=error_of(mmpeft.save_adapter, plain, folder / 'none.safetensors'),
    )
    with torch.no_grad():
        x = batch('transformer')[0]
        outputs = [model(x)]
        assert mmpeft.merge(model, reversible=True) is model
        outputs.append(model(x))
        found['merged'] = list(inner(model).state_dict())
        mmpeft.unmerge(model)
        outputs.append(model(x))
    train(model, 'transformer')
    mmpeft.remove(model)
    found['removed'] = inner(model).state_dict()
    return found | dict(outputs=outputs)


def low_precision(way):
    """Dtypes in which factors are computed and stored, whether that is warned of, and gradients."""
    model, seen, low = network('transformer', 'LoRA').float(), set(), torch.bfloat16
    if way == 'fsdp1':
        policy = MixedPrecision(param_dtype=low)
        with warnings.catch_warnings(action='ignore'):
            model = FullyShardedDataParallel(
                model, use_orig_params=True, device_id=torch.device('cpu'), mixed_precision=policy
            )
    else:
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        for block in model.blocks:
            if way == 'own':
                shard_adapters(block)
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    for adapter in named_adapters(model).values():
        adapter.register_forward_pre_hook(lambda adapter, _: seen.add(adapter.dtype))
    with warnings.catch_warnings(record=True) as caught:
        train(model, 'transformer', torch.float32)
    warned = [str(w.message) for w in caught if 'factors of adapters' in str(w.message)]
    return seen, warned, mmpeft.adapter_state_dict(model)


def watched(way, case):
    """A loop with a monitor: the error that ends it, warnings, and what it leaves.

    In ``dead`` two adapters have no gradient; in ``nan`` one rank's samples are NaN from step 2.
    """
    method = dict(type='AdaLoRA', rank=1, init_rank=3) if case == 'adalora' else METHODS['LoRA']
    model = network('transformer')
    mmpeft.inject(model, method, TARGETS)
    if case == 'dead':
        model.blocks[0].mlp.register_forward_hook(lambda module, args, output: output.detach())
    if way == 'ddp' and case == 'dead':
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif way is not None:
        model = sharded(way, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    (x, y), error, state = batch('transformer'), None, {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            with mmpeft.monitor(model, optimizer, 12, check_iters=3) as monitor:
                for step in range(12):
                    spoilt = case == 'nan' and RANK == 0 and step >= 2
                    loss = nn.functional.cross_entropy(model(x * (torch.nan if spoilt else 1)), y)
                    loss = loss + (mmpeft.penalty(model) or 0)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                state = monitor.state_dict()
        except TrainingError as raised:
            error = f'{monitor.iteration}: {raised}'
    said = [str(w.message) for w in caught if 'Iteration' in str(w.message)]
    return error, said, state, mmpeft.adapter_state_dict(model)


def main(folder):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo')
    folder, found = Path(folder), {}
    for way in ('ddp', 'fsdp1', 'fsdp2'):
        found[way] = train_all(folder, way)
        found[way, 'norm'] = train_behind_norm(way)
        found[way, 'load'] = load(folder, way)
        found[way, 'wrappers'] = other_wrappers(folder, way)
        for case in ('plain', 'dead', 'nan') if way != 'fsdp1' else ():
            found[way, case] = watched(way, case)
        found[way, 'calls'] = inside_ddp(folder) if way == 'ddp' else refusals(folder, way)
    found |= {('low', way): low_precision(way) for way in ('fsdp1', 'block', 'own')}
    found['ddp', 'adalora'] = watched('ddp', 'adalora')
    found['flat'] = without_original_parameters(folder)
    torch.save(found, folder / f'rank{RANK}.pth')
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1])
