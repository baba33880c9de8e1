"""How phi(W) is computed fast. Nothing here changes what is computed."""

from .kernels import AUTO, BRANCH, CHOICES, MERGED, PLAIN
from .layers import disable, enable, enable_frozen, execution_of, is_enabled

__all__ = [
    'AUTO',
    'BRANCH',
    'CHOICES',
    'MERGED',
    'PLAIN',
    'disable',
    'enable',
    'enable_frozen',
    'execution_of',
    'is_enabled',
]
