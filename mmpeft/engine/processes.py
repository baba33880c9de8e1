"""Several processes on a machine without an accelerator, which mmengine does not start."""

import atexit
import time

import torch.distributed
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed

from mmpeft.errors import UsageError

from .config import class_name, dicts_in


def prepare_distribution(cfg: Config) -> None:
    """Let ``--launcher pytorch`` work on a machine without an accelerator.

    mmengine's own start selects a CUDA device whatever the backend. Without
    one, the process group starts here, with gloo, DDP gets no device, and
    SyncBN, which has no CPU form, becomes BN.

    Raises:
        UsageError: Another launcher is used on such a machine.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or get_device() != 'cpu':
        return
    if launcher != 'pytorch':
        raise UsageError(
            f'--launcher {launcher} needs an accelerator, and torch sees none here. '
            'On CPUs write: tools/dist_train.sh CONFIG PROCESSES'
        )
    if not is_distributed():
        torch.distributed.init_process_group('gloo')
        atexit.register(_leave_group)
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    own = cfg.get('model_wrapper_cfg') or {}
    if own.get('type', wrapper['type']) == wrapper['type']:
        cfg.model_wrapper_cfg = wrapper | own | dict(device_ids=None)
    for node in dicts_in(cfg.model):
        if class_name(node) in ('SyncBN', 'SyncBatchNorm'):
            node['type'] = 'BN'


def _leave_group():
    # A gloo thread releases its tensors a moment after the other ranks have the result. If the
    # interpreter has ended by then, the process aborts.
    time.sleep(0.3)
    if is_distributed():
        torch.distributed.destroy_process_group()
