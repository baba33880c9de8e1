"""How phi(W) is computed fast. Nothing here changes what is computed."""

from .layers import disable, enable, enable_frozen, execution_of, is_enabled
from .memory import BALANCED, MEMORY, SMALL, SPEED, keep_less
from .select import AUTO, BRANCH, CHOICES, COMPOSED, MERGED, PLAIN
