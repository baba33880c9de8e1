"""The study's detection and segmentation, on tiny scenes of cut-outs made here."""

import json
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
import timm
import torch


@pytest.fixture(scope='module', autouse=True)
def study(script):
    return script('projects/transfer_study', 'study')


@pytest.fixture
def dense(study, tmp_path, monkeypatch, scope):
    """Scenes of four cut-outs a class, and a network with random weights."""
    import photo_scenes
    from transfer_study import dense as module
    from transfer_study.backbones import Backbone

    rng = np.random.default_rng(0)

    def cutout():
        alpha = cv2.ellipse(np.zeros((40, 60), np.float32), (30, 20), (26, 16), 0, 0, 360, 1, -1)
        return np.dstack([rng.random((40, 60, 3), np.float32) * alpha[..., None], alpha])

    cutouts = [[cutout() for _ in range(4)] for _ in photo_scenes.CLASSES]
    photographs = [rng.integers(0, 256, (90, 90, 3), dtype=np.uint8) for _ in range(4)]
    photos = photo_scenes.Photos(cutouts, photographs).split()
    monkeypatch.setattr(photo_scenes, 'load_photos', lambda: photos)

    def network():
        torch.manual_seed(3)
        return timm.create_model('tf_efficientnet_lite0', num_classes=0)

    monkeypatch.setitem(module.BACKBONES, 'efficientnet_lite0', Backbone(network, 127.0, 128.0))
    for name, value in dict(TRAIN=4, BATCH=2, HELD=dict(tune=2, final=3), HEADS_EPOCHS=1).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.parametrize('task', ['photos_coco', 'photos_ade20k', 'photos_dota'])
def test_methods_start_from_the_same_heads_and_train_on(task, study, dense):
    from transfer_study.tasks import TASKS

    base = replace(study.parse(['run', '--task', task, '--size', '64']).base, head_rate=1e-3)
    trials = dict(
        frozen=replace(base, epochs=1),
        lora=replace(base, method='lora', budget=40_000, rate=1e-2, scale=2.0, epochs=1),
    )
    records = {method: study.run_trial(trial) for method, trial in trials.items()}
    for record in records.values():
        assert record['failed'] is None and np.isfinite(record['loss'])
        assert 0 <= record[TASKS[task].metric] <= 1
        assert len(record['history']) == 1 and json.dumps(record)
    assert records['frozen']['parameters'] == 0
    assert 20_000 < records['lora']['parameters'] <= 40_000
    (heads,) = (dense.FOLDER / 'heads').glob('*.pth')
    start = torch.load(heads, weights_only=True)['state_dict']
    pretrained = dense.BACKBONES['efficientnet_lite0'].make().state_dict()
    own = {k.removeprefix('backbone.model.'): v for k, v in start.items() if '.model.' in k}
    assert own and all(torch.equal(value, pretrained[name]) for name, value in own.items())
