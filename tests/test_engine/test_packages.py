"""Packages that configs need."""

import sys

import pytest
from mmengine.config import Config

from mmpeft.engine import packages
from mmpeft.engine.config import read_config
from mmpeft.errors import UsageError


def test_package_that_is_not_installed(tmp_path, monkeypatch):
    config = tmp_path / 'c.py'
    config.write_text("_base_ = 'mmrotate::_base_/datasets/dota.py'\n")
    monkeypatch.setattr('mmengine.config.config.is_installed', lambda package: False)
    with pytest.raises(UsageError, match=r"needs mmrotate.*pip install 'mmpeft\[rotate\]'"):
        read_config(config)


def test_task_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmseg.utils', None)
    cfg = Config(dict(default_scope='mmseg'))
    with pytest.raises(UsageError, match='mmseg, which is installed but does not import: '):
        packages.import_task(cfg)
    monkeypatch.setattr(packages, 'find_spec', lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mmpeft\[seg\]'"):
        packages.import_task(cfg)
