"""Mathematics that runs in the dtypes it is given."""

from functools import wraps

import torch


def without_autocast(function):
    """Let a Function's forward or backward run outside autocast.

    Args:
        function: Takes the context, then a tensor, whose device counts.
    """

    @wraps(function)
    def inner(ctx, tensor, *args):
        device = tensor.device.type
        if device == 'meta' or not torch.is_autocast_enabled(device):
            return function(ctx, tensor, *args)
        with torch.autocast(device, enabled=False):
            return function(ctx, tensor, *args)

    return inner
