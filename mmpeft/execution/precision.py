"""Functions of autograd that autocast leaves alone."""

from functools import wraps

from mmpeft.methods.precision import outside_autocast


def without_autocast(function):
    """Let a Function's forward or backward run outside autocast.

    Args:
        function: Takes the context, then a tensor, whose device counts.
    """

    @wraps(function)
    def inner(ctx, tensor, *args):
        with outside_autocast(tensor.device.type):
            return function(ctx, tensor, *args)

    return inner
