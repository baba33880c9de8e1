"""Files of JSON lines that killed writers leave behind."""

import numpy as np

from mmpeft.checkpoint.journal import append_record, read_journal


def test_a_line_that_was_cut_off_is_left_out_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / 'folder' / 'runs.jsonl'
    assert read_journal(path) == []
    append_record(path, dict(key='a', score=np.float32(0.5)))
    with path.open('a') as file:
        file.write('{"key": "b", "sco')
    assert read_journal(path) == [dict(key='a', score=0.5)]
    append_record(path, dict(key='c'))
    append_record(path, dict(key='d'))
    assert [record['key'] for record in read_journal(path)] == ['a', 'c', 'd']
    assert path.read_text().count('\n') == 4
