"""Sharding in a Runner: after everything is loaded into the whole model, before the first step.

So loading, resuming and refusing are those of one process, on any number of ranks. To save, all
ranks gather, and rank 0 writes what one process would.
"""

from functools import partial, wraps

from mmengine.device import get_device
from mmengine.dist import all_gather_object, get_world_size, is_distributed
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mmpeft.checkpoint.fingerprint import digest
from mmpeft.checkpoint.keys import excluded_keys
from mmpeft.checkpoint.manifest import describe
from mmpeft.checkpoint.sharding import whole
from mmpeft.errors import TrainingError, UsageError
from mmpeft.injection.wrappers import is_sharded
from mmpeft.training.sharding import follow, shard_base, sharded_blocks

from .checkpoints import AdapterCheckpointHook
from .unwrap import unwrap


class ShardHook(Hook):
    """Shards an adapted model in ``before_train``, and gathers it for checkpoints.

    Until then the whole model and its optimizer are in main memory.

    Args:
        runner: After its model was adapted, not wrapped, and its optimizer built.
        checkpoints: Writes the checkpoints.
    """

    priority = 'HIGHEST'  # so that other hooks see a model that is sharded, and whole checkpoints

    def __init__(self, runner: Runner, checkpoints: AdapterCheckpointHook):
        self.checkpoints = checkpoints
        self._whole = None
        sharded_blocks(runner.model)
        runner.resume = partial(runner.resume, map_location='cpu')
        runner.save_checkpoint = self._gathering(runner, runner.save_checkpoint)

    def before_train(self, runner):
        """Shard the model, wrap it by DDP if something whole trains, and tell the optimizer."""
        model = runner.model
        if is_sharded(model):
            return
        if len(set(all_gather_object(digest(model.state_dict())))) > 1:
            raise TrainingError(
                'The ranks hold different weights before training, and sharding would mix them. '
                'Give all of them the same files and the same seed.'
            )
        self.checkpoints.manifest = describe(model)
        before = dict(model.named_parameters())
        names = shard_base(model, init_device_mesh(get_device(), (get_world_size(),)))
        model.to(get_device())
        parts = sum(model.get_parameter(name).numel() for name in names)
        total = sum(parameter.numel() for parameter in model.parameters())
        runner.logger.info(
            f'{parts:,} of {total:,} parameters are spread over {get_world_size()} processes.'
        )
        follow(runner.optim_wrapper.optimizer, before, model)
        if any(p.requires_grad and not hasattr(p, 'to_local') for p in model.parameters()):
            ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(model, names)
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)

    def _gathering(self, runner, save):
        """A Runner's ``save_checkpoint``, which only rank 0 runs, behind what all ranks do."""

        @wraps(save)
        def call(*args, **kwargs):
            model = unwrap(runner.model)
            left_out = () if self.checkpoints.save_frozen else excluded_keys(model)
            state = {k: v for k, v in model.state_dict().items() if k not in left_out}
            self._whole = whole(state), whole(runner.optim_wrapper.state_dict())
            save(*args, **kwargs)

        return call

    def before_save_checkpoint(self, runner, checkpoint):
        """Put what was gathered in the place of rank 0's parts."""
        state, optimizer = self._whole
        self._whole = None
        checkpoint['state_dict'].update(state)
        if 'optimizer' in checkpoint:
            checkpoint['optimizer'] = optimizer


def check_shardable(runner: Runner) -> None:
    """Refuse a Runner that cannot train a sharded model.

    Raises:
        UsageError: It runs in one process alone, averages or compiles the model.
    """
    if not is_distributed():
        raise UsageError(
            '--shard (shard=True) spreads a model over processes, and this is a single one. '
            'Write: tools/dist_train.sh CONFIG GPUS --shard'
        )
    if any(isinstance(hook, EMAHook) for hook in runner.hooks):
        raise UsageError(
            'EMAHook averages a copy of the whole model, which --shard (shard=True) is to avoid. '
            'Leave out one of them.'
        )
    if runner.cfg.get('compile'):
        raise UsageError(
            'A sharded model is not compiled. Leave out compile, or --shard (shard=True).'
        )
