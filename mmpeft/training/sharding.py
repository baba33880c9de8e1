"""Adapters in full precision inside a model that fully_shard casts to a lower one."""

from torch import nn

from mmpeft.errors import UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.injection.wrappers import unwrapped
from mmpeft.methods import WeightAdapter


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
