"""Settings of transformers' text generation."""

from collections.abc import Mapping

from transformers import GenerationConfig

from mmpeft.errors import UsageError, suggest


def check_generation(given: Mapping) -> None:
    """Refuse settings that ``GenerationConfig`` does not have or accept.

    Raises:
        UsageError: Names the setting.
    """
    known = GenerationConfig().to_dict()
    for key in given:
        if key not in known:
            raise UsageError(f'generation: GenerationConfig has no {key!r}. {suggest(key, known)}')
    try:
        GenerationConfig(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f'generation: {" ".join(str(error).split())}') from error
