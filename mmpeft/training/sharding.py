"""Sharding an adapted model by torch's ``fully_shard``: its base, or adapters by themselves."""

from collections import Counter

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from mmpeft.errors import UsageError
from mmpeft.injection.blocks import BLOCKS, target_blocks
from mmpeft.injection.site import named_adapters
from mmpeft.injection.weights import plain_key
from mmpeft.injection.wrappers import local_part, unwrapped
from mmpeft.methods import WeightAdapter
from mmpeft.quantization import Quantized


def sharded_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of an adapted model's targets, by path, which are gathered one after another.

    Raises:
        UsageError: There are none, or a method or a frozen weight cannot be sharded.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Quantized):
            raise UsageError(
                f'{plain_key(name)} is stored in few bits, which sharding would make '
                'whole. Leave out --shard (shard=True), which few bits can make unnecessary, or '
                'frozen_dtype.'
            )
    found = target_blocks(model)
    if not found:
        targets = ', '.join(sorted({repr(record.module) for record in model.peft}))
        raise UsageError(
            f'There are no blocks to shard in {targets} ({BLOCKS}). Leave out --shard (shard=True).'
        )
    return found


def shard_base(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Shard the frozen weights of an adapted model in place, block by block, and the rest at once.

    What trains stays whole on each rank, for DDP to average. If a method trains the base (full
    fine-tuning), everything is sharded, what trains and its gradients included.

    Args:
        model: On all ranks with the same values; may be on the CPU.
        mesh: The ranks.

    Returns:
        Names of the parameters that are sharded.

    Raises:
        UsageError: See :func:`sharded_blocks`; or full fine-tuning of blocks that share a weight.
    """
    from torch.distributed.fsdp import fully_shard

    parts = sharded_blocks(model)
    whole = _held_twice(model, parts)
    if not any(record.method.trains_base for record in model.peft):
        whole |= {p for p in model.parameters() if p.requires_grad}
    elif whole:
        raise UsageError(
            'Several blocks hold one weight, which trains, and which cannot be sharded with each '
            'of them. Leave out --shard (shard=True).'
        )
    for block in parts.values():
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return [name for name, p in model.named_parameters() if local_part(p) is not p]


def follow(optimizer: Optimizer, before: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Let an optimizer, and its state, go on with parameters that were sharded or moved.

    Args:
        optimizer: Of the parameters as they were.
        before: These by name.
        model: Holds the parameters as they are, of the same names.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    def part(value, parameter):
        if not isinstance(parameter, DTensor) or getattr(value, 'shape', ()) != parameter.shape:
            return value
        value = value.to(parameter.device)
        return distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )

    state, now = optimizer.state_dict(), dict(model.named_parameters())
    renamed = {id(p): now[name] for name, p in before.items()}
    for group in optimizer.param_groups:
        group['params'] = [renamed[id(p)] for p in group['params']]
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    state['state'] = {
        index: {name: part(value, parameters[index]) for name, value in values.items()}
        for index, values in state['state'].items()
    }
    optimizer.state.clear()
    optimizer.load_state_dict(state)


def shard_adapters(module: nn.Module, **arguments) -> None:
    """Shard a module's adapters as one group in their own dtype, before the module is sharded.

    ``fully_shard(block, mp_policy=...)`` casts everything in a block for its forward, so that
    factors would be computed in bfloat16. What was sharded before keeps its own policy.
    docs/api.md has an example.

    The factors are gathered whenever a weight is built, which fast kernels leave to torch.

    Args:
        module: After :func:`mmpeft.inject`, a block or the whole model.
        arguments: Of ``torch.distributed.fsdp.fully_shard``, such as ``mesh``.

    Raises:
        UsageError: An adapter acts on activations, where FSDP does not notice its use.
    """
    from torch.distributed.fsdp import fully_shard

    with unwrapped(module) as bare:
        adapters = named_adapters(bare)
    for path, adapter in adapters.items():
        if not isinstance(adapter, WeightAdapter):
            raise UsageError(
                f'{path!r} ({type(adapter.method).__name__}) acts on activations, and computes in '
                'the precision of the block that it is in. Shard it with its block, without a '
                'param_dtype in the policy.'
            )
    if adapters:
        fully_shard(list(adapters.values()), **arguments)


def _held_twice(model, parts):
    """Parameters that several blocks hold, or a block and the network around it."""
    inside = Counter(p for block in parts.values() for p in set(block.parameters()))
    own = {id(module) for block in parts.values() for module in block.modules()}
    around = [m for m in model.modules() if id(m) not in own]
    outside = {p for module in around for p in module.parameters(recurse=False)}
    return {p for p, count in inside.items() if count > 1 or p in outside}
