"""tools/test.py: where drawn predictions go."""

from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.visualization import Visualizer

from mmpeft.errors import UsageError


def test_pictures_go_where_the_help_says(script, tmp_path):
    """Of a visualizer that has written its config elsewhere already."""
    backends = [dict(type='LocalVisBackend')]
    visualizer = Visualizer(vis_backends=backends, save_dir=str(tmp_path / 'log'))
    visualizer.add_config(Config(dict(a=1)))
    runner = SimpleNamespace(visualizer=visualizer, log_dir=str(tmp_path / 'log'))
    script('tools', 'test').draw_into(runner, 'drawn')
    visualizer.add_image('one', np.zeros((4, 4, 3), np.uint8))
    assert [path.name for path in (tmp_path / 'log/drawn').iterdir()] == ['one_0.png']


def test_what_each_package_calls_drawing(script):
    tool, args = script('tools', 'test'), SimpleNamespace(show=False, show_dir='drawn')
    for package, expected in (
        ('mmdet', dict(draw=True, interval=1, test_out_dir='drawn')),
        ('mmseg', dict(draw=True, interval=1)),
        ('mmpretrain', dict(enable=True, interval=1)),
    ):
        cfg = Config(dict(default_scope=package, default_hooks=dict(visualization={})))
        tool.show_predictions(cfg, args)
        assert cfg.default_hooks.visualization.to_dict() == expected


def test_views_of_a_classifier_are_not_drawn(script, tmp_path, monkeypatch, scope):
    tool = script('tools', 'test')
    cfg = Config(dict(default_scope='mmpretrain', work_dir=str(tmp_path)))
    monkeypatch.setattr(tool, 'load_config', lambda *_: cfg)
    monkeypatch.setattr(tool, 'check_checkpoint', lambda *_: None)
    monkeypatch.setattr('sys.argv', ['test.py', 'a.py', 'a.pth', '--tta', '--show-dir', 'b'])
    with pytest.raises(UsageError, match='draws one view'):
        tool.main()
