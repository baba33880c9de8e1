"""What is said of a file that could not be written."""

import errno

import pytest

from mmpeft.checkpoint.atomic import replacing
from mmpeft.errors import UnwrittenFileError


def test_a_full_disk_is_told_from_other_faults(tmp_path):
    path = tmp_path / 'file'
    with pytest.raises(UnwrittenFileError, match='MiB are free there.$'), replacing(path):
        raise OSError(errno.ENOSPC, 'No space left on device')
    (tmp_path / 'inner').mkdir()
    with pytest.raises(UnwrittenFileError, match=r'directory.*\.$') as error:
        with replacing(tmp_path / 'inner') as temporary:
            temporary.write_text('new')
    assert 'free' not in str(error.value)


def test_only_a_file_that_was_there_is_unchanged(tmp_path):
    path = tmp_path / 'file'
    for expected in (False, True):
        with pytest.raises(UnwrittenFileError) as error, replacing(path):
            raise PermissionError(errno.EACCES, 'Permission denied')
        assert ('unchanged' in str(error.value)) is expected
        path.write_text('before')
