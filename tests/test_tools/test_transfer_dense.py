"""The study's detection and segmentation, on tiny scenes of pictures made here."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from mmdet.visualization import DetLocalVisualizer

from mmpeft.methods.ends import Frozen, Full


@pytest.fixture(scope='module', autouse=True)
def study(script):
    return script('projects/transfer_study', 'study')


@pytest.fixture(autouse=True)
def _scope(scope):
    """A Runner sets the default scope."""


@pytest.fixture(scope='module')
def dense(study, tmp_path_factory):
    """Scenes of four cut-outs a class, photographs of trees, a network with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('dense'))
        yield made_small(patch)


def made_small(monkeypatch):
    import base
    import photo_scenes
    from transfer_study import aerial
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

    trees = np.array([[5.0, 8, 30, 40], [60, 50, 80, 75]])
    monkeypatch.setattr(aerial, 'tree_crowns', lambda name: (photographs[len(name) % 4], trees))

    def network(task):
        torch.manual_seed(3)
        return timm.create_model('tf_efficientnet_lite0', num_classes=0)

    monkeypatch.setitem(module.BACKBONES, 'efficientnet_lite0', Backbone(network, 127.0, 128.0))
    with pytest.raises(SystemExit, match=r'base\.pth is missing.*\n  python projects/demo/digits'):
        module.BACKBONES['convnextv2_digits'].make('digits_coco')
    torch.manual_seed(4)
    Path('work_dirs/demo').mkdir(parents=True)
    state = timm.create_model(**base.MODEL, num_classes=10).state_dict()
    torch.save(dict(state_dict=state), 'work_dirs/demo/base.pth')
    for name, value in dict(TRAIN=4, BATCH=2, HELD=dict(tune=2, final=3), HEADS_EPOCHS=1).items():
        monkeypatch.setattr(module, name, value)
    return module


def base_of(study, task):
    return replace(study.parse(['run', '--task', task, '--size', '64']).base, head_rate=1e-3)


TASKS = 'digits_coco', 'photos_coco', 'photos_ade20k', 'photos_dota', 'aerial'


@pytest.mark.parametrize('task', TASKS)
def test_a_trial_trains_and_is_scored(task, study, dense):
    from transfer_study.tasks import TASKS

    setting = dict(method='lora', budget=40_000, rate=1e-2, scale=2.0, epochs=1)
    record = study.run_trial(replace(base_of(study, task), **setting))
    assert record['failed'] is None and np.isfinite(record['loss'])
    assert 0 <= record[TASKS[task].metric] <= 1
    assert len(record['history']) == 1 and json.dumps(record)
    assert 20_000 < record['parameters'] <= 40_000 and 'scale=None' not in record['method']


def test_methods_start_from_the_same_heads_and_keep_the_statistics(study, dense, monkeypatch):
    models = {}

    def results(runner):
        models[type(runner.model.peft[0].method)] = runner.model
        return {}

    monkeypatch.setattr(dense, 'results', results)
    base = base_of(study, 'photos_coco')
    dense.converged(base)
    DetLocalVisualizer._instance_dict.clear()  # as in a process that finds the heads made
    dense.run_dense(replace(base, epochs=1))
    (heads,) = (dense.FOLDER / 'heads').glob('photos_coco*.pth')
    written = heads.stat().st_mtime_ns
    dense.run_dense(replace(base, method='full', rate=1e-3, epochs=1))
    assert heads.stat().st_mtime_ns == written, 'a draw has one detector'
    start = torch.load(heads, weights_only=True)['state_dict']
    pretrained = dense.BACKBONES['efficientnet_lite0'].make('photos_coco').state_dict()
    frozen, full = (models[name].state_dict() for name in (Frozen, Full))
    for name, value in start.items():
        if name.startswith('backbone.model.'):
            assert torch.equal(value, pretrained[name.removeprefix('backbone.model.')])
            assert torch.equal(value, frozen[name])
            kept = name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))
            assert torch.equal(value, full[name]) == kept
    trial = replace(base, method='lora_sensitivity', rate=1e-3, budget=67_000, epochs=1)
    assert dense.adapted(trial, dense.FOLDER / 'run').default_hooks.peft.sensitivity == 8


def test_heads_whose_training_was_interrupted_go_on(study, dense, monkeypatch):
    trial = replace(base_of(study, 'photos_ade20k'), seed=1)

    def interrupt(model):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dense.mmpeft, 'merge', interrupt)
        with pytest.raises(KeyboardInterrupt):
            dense.converged(trial)
    (last,) = (dense.FOLDER / 'heads').rglob('iter_2.pth')
    trained = torch.load(last, weights_only=False)['state_dict']
    monkeypatch.setattr(dense, 'HEADS_RATE', 1.0)  # with which another training would differ
    state = torch.load(dense.converged(trial), weights_only=True)['state_dict']
    assert all(torch.equal(state[name], value) for name, value in trained.items())
    assert 'decode_head.conv_seg.weight' in trained and not last.exists()


def test_a_training_that_fails_is_a_record(study, dense):
    trial = replace(base_of(study, 'photos_coco'), method='full', rate=1e20, epochs=2)
    record = dense.run_dense(trial)
    assert record['failed'] and 'segm_mAP' not in record


def test_scenes_to_tune_and_to_test_share_no_picture(dense):
    import photo_scenes

    def pictures(photos):
        cutouts = {picture.tobytes() for group in photos.cutouts for picture in group}
        return cutouts | {photograph.tobytes() for photograph in photos.photographs}

    parts = photo_scenes.load_photos()
    tuned = parts['train'].split()
    sets = [pictures(p) for p in (tuned['train'], tuned['val'], parts['val'])]
    assert all(sets) and len(set.union(*sets)) == sum(map(len, sets))
    assert sets[0] | sets[1] == pictures(parts['train'])


def test_tiles_show_what_is_in_them(study):
    """Against areas counted in pixels; tiles side by side share none."""
    from transfer_study.aerial import PARTS, cut, grid

    rng, size = np.random.default_rng(0), 16
    corners = rng.integers(0, 40, (12, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 20, (12, 2))], 1).astype(float)
    tiles = list(grid((50, 36), size))
    assert len(tiles) == 3 * 2 and len({*tiles}) == 6
    for y, x in tiles:
        inside, seen = cut(boxes, y, x, size)
        counted = []
        for x1, y1, x2, y2 in boxes.astype(int):
            whole = np.zeros((60, 60))
            whole[y1:y2, x1:x2] = 1
            tile = whole[y : y + size, x : x + size]
            if tile.any():
                rows, columns = np.nonzero(tile)
                ends = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                counted.append((*ends, tile.sum() / whole.sum()))
        np.testing.assert_allclose(np.column_stack([inside, seen]), np.reshape(counted, (-1, 5)))
    for part in PARTS.values():
        assert not {*part['train']} & {*part['val']}
    assert not {*PARTS['final']['val']} & {*PARTS['tune']['train'], *PARTS['tune']['val']}


def test_missing_photographs_name_the_command(script, monkeypatch):
    crowns = script('projects/demo', 'tree_crowns')
    monkeypatch.setattr(crowns, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='pip install --no-deps deepforest'):
        crowns.tree_crowns(crowns.TEST)


def test_a_task_names_its_backbone(study, monkeypatch, capsys):
    from transfer_study.backbones import BACKBONES

    monkeypatch.setitem(BACKBONES, 'other', None)
    study.parse(['run', '--task', 'aerial'])
    with pytest.raises(SystemExit):
        study.parse(['run', '--task', 'aerial', '--backbone', 'other'])
    assert '--backbone efficientnet_lite0, not other' in capsys.readouterr().err


def test_the_heads_are_tuned_with_the_frozen_backbone_and_taken_over(study):
    """By records whose score has its peak at one rate of the heads."""
    from transfer_study.plan import pending
    from transfer_study.report import tables
    from transfer_study.tasks import TASKS

    base, records, rounds = study.parse(['run', '--task', 'photos_coco']).base, {}, []
    task = TASKS['photos_coco']
    while waiting := list(pending(base, ['frozen', 'lora'], 2, records)):
        rounds.append(waiting)
        for trial in waiting:
            score = 0.3 - 0.01 * abs(np.log10(trial.head_rate / 1e-3))
            if trial.method == 'lora':
                score -= 0.01 * abs(np.log10(trial.rate / 1e-3)) + 0.01 * abs(np.log10(trial.scale))
            result = dict(segm_mAP=score, loss=1.0, parameters=9, seconds=1, failed=None)
            if trial.rate == 3e-3:  # nothing is scored where a training fails
                result = dict(loss=float('nan'), parameters=9, seconds=1, failed='NaN')
            records[trial.id] = dict(id=trial.id, trial=asdict(trial)) | result
    lora = [[t for t in waiting if t.method == 'lora'] for waiting in rounds]
    lengths = [{t.epochs for t in trials} for trials in lora if trials]
    assert lengths == [{task.short}, {task.long}, {task.final}]
    assert len({t.head_rate for t in rounds[0]}) == 12
    (best,) = {t.head_rate for trials in lora for t in trials}
    assert abs(np.log10(best / 1e-3)) < 0.15
    assert {t.rate for t in lora[-1]} <= {3e-4, 1e-3}
    text = tables(base, ['frozen', 'lora'], 2, records)
    assert 'test segm_mAP' in text and '4 failed' in text
