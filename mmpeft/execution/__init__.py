"""How phi(W) is computed fast. Nothing here changes what is computed."""

from .layers import disable, enable, enable_frozen, execution_of, is_enabled
from .select import AUTO, BRANCH, MERGED, PLAIN

CHOICES = (AUTO, PLAIN, MERGED, BRANCH)

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
