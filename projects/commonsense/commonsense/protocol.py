"""The protocol of LLM-Adapters (arXiv:2304.01933): test sets, prompt, and answers in texts."""

import json
import re
from pathlib import Path

from mmpeft.errors import MissingFileError, UsageError

_CHOICES = tuple(f'answer{n}' for n in range(1, 6))
# Folder of each set, its name in the tables, and its possible answers.
SETS = {
    'boolq': ('BoolQ', ('true', 'false')),
    'piqa': ('PIQA', ('solution1', 'solution2')),
    'social_i_qa': ('SIQA', _CHOICES),
    'hellaswag': ('HellaS.', tuple(f'ending{n}' for n in range(1, 5))),
    'winogrande': ('WinoG.', ('option1', 'option2')),
    'ARC-Easy': ('ARC-e', _CHOICES),
    'ARC-Challenge': ('ARC-c', _CHOICES),
    'openbookqa': ('OBQA', _CHOICES),
}
RESPONSE = '### Response:'
WHERE = 'https://github.com/AGI-Edgerunners/LLM-Adapters'


def prompt(instruction: str, context: str = '') -> str:
    """Alpaca's prompt, up to where the answer begins; ``context`` is an item's ``input``."""
    beside = ', paired with an input that provides further context' if context else ''
    parts = [
        f'Below is an instruction that describes a task{beside}. '
        'Write a response that appropriately completes the request.',
        f'### Instruction:\n{instruction}',
        *([f'### Input:\n{context}'] if context else []),
        f'{RESPONSE}\n',
    ]
    return '\n\n'.join(parts)


def extract_answer(text: str, answers: tuple[str, ...]) -> str:
    """The first of a set's possible answers that a text names behind its last response mark.

    Returns:
        It, as it is written in ``answers``; '' if the text names none.
    """
    found = re.search('|'.join(answers), text.rpartition(RESPONSE)[2])
    return found.group() if found else ''


def read_items(path: str | Path, get_it: str) -> list[dict[str, str]]:
    """Questions with ``instruction``, ``input``, ``output`` and ``answer`` in a JSON file's list.

    Args:
        path: Of the file.
        get_it: The end of the sentence on a missing file: where it is, and how to name another.

    Raises:
        MissingFileError: There is no such file.
        UsageError: It is not such a list.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f'There is no file {str(path)!r}. {get_it}')
    fields = ('instruction', 'input', 'output', 'answer')
    try:
        items = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UsageError(f'{str(path)!r} is not JSON: {error}.') from error
    if not isinstance(items, list) or not items:
        raise UsageError(f'{str(path)!r} has to hold a list of questions, with one or more.')
    for number, item in enumerate(items):
        texts = item if isinstance(item, dict) else {}
        lacks = [field for field in fields if not isinstance(texts.get(field), str)]
        if lacks:
            raise UsageError(
                f'Item {number} (from 0) of {str(path)!r} has no text at {", ".join(lacks)}. Each '
                f'item is a dict with the texts {", ".join(fields)}; input may be empty.'
            )
    return items


def read_set(folder: str | Path, name: str) -> list[dict[str, str]]:
    """The questions of a test set, ``<folder>/<name>/test.json``.

    Raises:
        UsageError: See :func:`read_items`; or an answer is not among the set's.
    """
    path, answers = Path(folder, name, 'test.json'), SETS[name][1]
    items = read_items(
        path, f'The folder `dataset` of {WHERE} has the sets; --sets names its copy.'
    )
    for number, item in enumerate(items):
        if item['answer'] not in answers:
            raise UsageError(
                f'Item {number} (from 0) of {str(path)!r} has the answer {item["answer"]!r}, and '
                f'{name} knows {", ".join(answers)}.'
            )
    return items
