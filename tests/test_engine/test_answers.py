"""Answers are stored as they come, and asked for once."""

import pytest

from mmpeft.checkpoint.journal import append_record, read_journal
from mmpeft.engine.answers import answered
from mmpeft.errors import UsageError


def test_each_question_is_asked_once_and_counts_once(tmp_path):
    path, asked = tmp_path / 'answers.jsonl', []

    def ask(items):
        asked.append(items)
        return [dict(text=item.upper()) for item in items]

    records = answered(path, 'abcde', 2, ask)
    assert [*map(''.join, asked)] == ['ab', 'cd', 'e']
    assert [record['text'] for record in records] == [*'ABCDE'] and read_journal(path) == records
    path.write_text(path.read_text() * 2)  # as two processes write it
    assert answered(path, 'abcde', 2, ask) == records
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[3] + lines[0] + lines[1][:-5])
    del asked[:]
    assert answered(path, 'abcde', 2, ask) == records and [*map(''.join, asked)] == ['bc', 'e']
    for _ in range(2):
        append_record(path.with_name('old.jsonl'), dict(text='A'))
    assert len(answered(path.with_name('old.jsonl'), 'abc', 2, ask)) == 3
    append_record(path, dict(text='F', number=5))
    with pytest.raises(UsageError, match='has 6 answers, and there are 5 questions. Delete it'):
        answered(path, 'abcde', 2, ask)
