"""Batches of images that a network is asked to take, some of which it refuses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mmpeft.errors import UsageError


def check_images(batches: Sequence[int], size: Sequence[int]) -> None:
    """Raise UsageError unless numbers of images, and height and width, are positive."""
    if min(*batches, *size) < 1:
        batch, size = (' '.join(map(str, numbers)) for numbers in (batches, size))
        raise UsageError(f'--batch {batch} --size {size}: give numbers above 0.')


@contextmanager
def refusing(size: Sequence[int]) -> Iterator[None]:
    """Run a network on images of a height and width.

    Raises:
        UsageError: The network does not take them; the message has its own.
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        message = ' '.join(str(error).split()) or type(error).__name__
        raise UsageError(
            f'the backbone does not take images of {" x ".join(map(str, size))}: '
            f'{message.removesuffix(".")}. Give another --size.'
        ) from error
