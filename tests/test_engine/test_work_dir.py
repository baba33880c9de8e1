"""The folder of a run."""

import pytest
from mmengine.config import Config

from mmpeft.engine.launch import build_runner
from mmpeft.engine.work_dir import check_work_dir
from mmpeft.errors import UsageError
from tests.toy import toy_config


def test_work_directories_that_cannot_be_written_to(tmp_path):
    file = tmp_path / 'file'
    file.touch()
    for folder in (file, file / 'inner'):
        with pytest.raises(UsageError, match='is a file, or below one.*--work-dir'):
            build_runner(toy_config(folder))
    with pytest.raises(UsageError, match=r"'/sys/mmpeft' cannot be written to: \w+"):
        build_runner(toy_config('/sys/mmpeft'))


def test_checkpoints_of_another_method_are_not_overwritten(tmp_path):
    def config(rank):
        toy_config(tmp_path, dict(type='LoRA', rank=rank)).dump(tmp_path / f'{rank}' / 'config.py')
        return Config.fromfile(tmp_path / f'{rank}' / 'config.py')

    for rank in (2, 4):
        (tmp_path / f'{rank}').mkdir()
    cfg, other = config(2), config(4)
    check_work_dir(cfg)
    cfg.dump(tmp_path / 'config.py')
    (tmp_path / 'last_checkpoint').write_text('epoch_1.pth')
    check_work_dir(cfg)
    with pytest.raises(UsageError, match='another method or other targets .*--work-dir'):
        check_work_dir(other)
    (tmp_path / '4' / 'config.py').rename(tmp_path / '4' / 'renamed.py')
    with pytest.raises(UsageError, match="another method or other targets .'config.py'"):
        check_work_dir(Config.fromfile(tmp_path / '4' / 'renamed.py'))
    for text in (b'raise SystemExit', b'print "of Python 2"', b'a = "\xff"', b'\0'):
        (tmp_path / 'plot.py').write_bytes(text)  # is no config, and is not run
        check_work_dir(cfg)
    other.resume = True  # which the hook checks
    check_work_dir(other)
