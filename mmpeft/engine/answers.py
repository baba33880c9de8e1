"""Answers to questions, stored as they come."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mmpeft.checkpoint.journal import append_record, read_journal
from mmpeft.errors import UsageError


def answered(
    path: Path, items: Sequence, batch: int, ask: Callable[[Sequence], Iterable[Mapping]]
) -> list[dict]:
    """Answer the questions that have no record yet; several processes may do so at once.

    Args:
        path: A file of JSON lines, one for each answer, with the question's ``number`` from 0.
        items: The questions.
        batch: How many are asked at once.
        ask: Returns the answers to some of them.

    Returns:
        The records of all, in the questions' order.

    Raises:
        UsageError: The file has answers to other questions.
    """
    found = {record.get('number', n): record for n, record in enumerate(read_journal(path))}
    left = [number for number in range(len(items)) if number not in found]
    if len(found) + len(left) > len(items):
        raise UsageError(
            f'{str(path)!r} has {len(found)} answers, and there are {len(items)} questions. Delete '
            'it, and they are asked again.'
        )
    for start in range(0, len(left), batch):
        numbers = left[start : start + batch]
        answers = ask([items[number] for number in numbers])
        for number, answer in zip(numbers, answers, strict=True):
            found[number] = dict(answer, number=number)
            append_record(path, found[number])
        print(f'{path.stem}: {len(found)} of {len(items)}', flush=True)
    return [found[number] for number in range(len(items))]
