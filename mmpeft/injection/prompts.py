"""What does not go together: prompts among an image's tokens, and methods that convolve these."""

from collections.abc import Sequence

from torch import nn

from mmpeft.errors import UsageError

from .site import Site, attached
from .weights import is_below


def check_prompts(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse prompts in blocks where another method takes the tokens for the map of an image.

    Args:
        model: With the adapters of earlier injections.
        sites: Of a new one.

    Raises:
        UsageError: Names a block and both methods.
    """
    sites = [site for site in (*attached(model), *sites) if not site.tensor]
    blocks = {site.path: site for site in sites if 'tokens' in site.spec.kinds}
    for site in (site for site in sites if site.method.needs_grid):
        for path, block in blocks.items():
            if is_below(site.path, [path]):
                one, other = type(block.method).__name__, type(site.method).__name__
                raise UsageError(
                    f'{one} puts prompts among the tokens of {path!r}, and {other} treats them as '
                    f'image patches at {site.path!r}, so it would take prompts for class tokens. '
                    'Adapt other blocks with one of them (targets.include, '
                    'targets.exclude), or leave one out.'
                )
