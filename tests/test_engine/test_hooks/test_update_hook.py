"""Figures of updates in a run: what is logged equals what the checkpoint says."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import VISBACKENDS
from mmengine.visualization.vis_backend import BaseVisBackend

import mmpeft
from mmpeft.analysis.updates import FIGURES, figures, means, updates
from mmpeft.engine.hooks import UpdateHook
from mmpeft.errors import UsageError
from tests.toy import by_iterations, toy_runner

FLORA = dict(type='FLoRA', rank=2)
pytestmark = pytest.mark.usefixtures('scope')


def test_what_is_logged_is_what_the_checkpoint_says(tmp_path, pretrained):
    changes = by_iterations(5, 2) | {'model.backbone.checkpoint': pretrained}
    changes['custom_hooks'] = [
        dict(type='mmpeft.UpdateHook', interval=2, weights='fc', kernels=r'stage\.0', count=3)
    ]
    changes['default_hooks.logger'] = dict(type='LoggerHook', interval=1)
    # A visualizer of another test of the same second would have the same name.
    runner = toy_runner(tmp_path, FLORA, **changes, experiment_name=str(tmp_path))
    runner.train()
    (file,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    logged = {line['step']: line for line in lines if 'update/norm' in line}
    assert list(logged) == [2, 4, 5]
    for step in (2, 4):
        model = mmpeft.init_model(runner.cfg, tmp_path / f'iter_{step}.pth')
        rows = figures(updates(model))
        expected = {f'update/{name}': value for name, value in means(rows).items()}
        (fc,) = (row for row in rows if row.name == 'backbone.fc.weight')
        expected |= {f'update_{name}/{fc.name}': getattr(fc, name) for name in FIGURES}
        assert expected['update/norm'] > 0
        assert logged[step] == pytest.approx(expected | dict(step=step), rel=1e-9)
    pictures = sorted(file.parent.glob('vis_image/kernels_backbone.stage.0.weight_*.png'))
    assert [int(path.stem.rpartition('_')[2]) for path in pictures] == [2, 4, 5]
    assert cv2.imread(str(pictures[0])).std() > 0


@VISBACKENDS.register_module()
class Recorder(BaseVisBackend):
    """A backend as TensorBoard's and W&B's, which takes the step apart from the scalars."""

    seen = []
    experiment = _init_env = None

    def add_scalars(self, scalar_dict, step=0, file_path=None, **kwargs):
        assert 'step' not in scalar_dict
        self.seen += [(name, step, value) for name, value in scalar_dict.items()]

    def add_image(self, name, image, step=0, **kwargs):
        self.seen.append((name, step, image))


def test_every_backend_gets_scalars_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(Recorder, 'seen', [])
    changes = by_iterations(2, 100) | dict(experiment_name=str(tmp_path))
    changes['visualizer'] = dict(type='Visualizer', vis_backends=[dict(type='Recorder')])
    runner = toy_runner(tmp_path, FLORA, **changes)
    runner.register_hook(UpdateHook(interval=1, kernels='stem'))
    runner.train()
    for name in ('update/norm', 'kernels_backbone.stem.weight'):
        assert [step for each, step, _ in Recorder.seen if each == name] == [1, 2]
    *_, (_, _, image) = (each for each in Recorder.seen if each[0].startswith('kernels'))
    assert image.dtype == np.uint8 and image.ndim == image.shape[2] == 3


def test_what_is_not_defined_is_not_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(Recorder, 'seen', [])
    changes = by_iterations(1, 100) | dict(experiment_name=str(tmp_path))
    changes['visualizer'] = dict(type='Visualizer', vis_backends=[dict(type='Recorder')])
    runner = toy_runner(tmp_path, dict(type='BitFit'), **changes)
    torch.nn.init.zeros_(runner.model.backbone.stem.bias)
    runner.register_hook(UpdateHook(interval=1, weights=r'stem\.bias'))
    runner.train()
    logged = {name: value for name, _, value in Recorder.seen if 'update' in name}
    assert np.isfinite([*logged.values()]).all()
    assert {'update/relative', 'update_norm/backbone.stem.bias'} <= logged.keys()
    assert 'update_relative/backbone.stem.bias' not in logged


def test_what_it_refuses_before_the_first_step(tmp_path, warned):
    def stepped(now, *args, **kwargs):
        pytest.fail('a step was taken')

    first = Hook()
    first.before_train_iter = stepped
    for method, hook, message in (
        (FLORA, dict(weights='fd'), "'fd' matches no adapted weight"),
        (FLORA, dict(kernels='fc'), r'backbone\.fc\.weight has the shape \(16, 12\)'),
        (dict(type='ParallelAdapter', rank=1), {}, 'ParallelAdapter changes activations'),
        (dict(type='Full'), {}, 'weights train themselves'),
    ):
        runner = toy_runner(tmp_path, method, **by_iterations(1, 100))
        runner.register_hook(UpdateHook(**hook))
        runner.register_hook(first)
        with pytest.raises(UsageError, match=message):
            runner.train()


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(interval='x'), "interval='x' must be one integer"),
        (dict(interval=None), 'interval=None must be one integer'),
        (dict(interval=0), 'interval=0 must be positive'),
        (dict(count=0), 'count=0 must be positive'),
        (dict(weights=3), 'weights=3 must be'),
        (dict(kernels='['), 'kernels: .* is not a valid regular expression'),
    ],
)
def test_arguments_are_checked_before_a_run(arguments, message):
    with pytest.raises(UsageError, match=f'UpdateHook: {message}'):
        UpdateHook(**arguments)
    assert UpdateHook(weights=None).count == 8


def test_methods_on_activations_are_left_out_with_a_word(tmp_path, warned):
    parallel = dict(method=dict(type='ParallelAdapter', rank=1), targets=dict(include=('fc',)))
    runner = toy_runner(tmp_path, [FLORA, parallel], **by_iterations(1, 100))
    runner.register_hook(UpdateHook())
    runner.train()
    assert any('leaves out 1 adapters of ParallelAdapter' in text for text in warned)
