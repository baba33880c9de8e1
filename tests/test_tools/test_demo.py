"""The demo's parts: composed configs, jobs, the report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image

import mmpeft
from mmpeft.engine.config import read_config
from mmpeft.errors import UsageError


@pytest.fixture(scope='module')
def experiment(script):
    return script('projects/demo', 'experiment')


@pytest.fixture(scope='module')
def jobs(script):
    return script('projects/demo', 'jobs')


@pytest.fixture(scope='module')
def pictures(script):
    return script('projects/demo', 'demo_pictures')


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with the name of data and bases."""
    monkeypatch.chdir(tmp_path)
    for name in ('data/digits/made_with.json', 'work_dirs/demo/base.pth'):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('one')
    return tmp_path


@pytest.mark.parametrize('method', ['flora', 'frozen', 'vpt_deep', "dict(type='LoRA', rank=4)"])
def test_a_method_can_be_run(method, experiment, place):
    run = experiment.Experiment(method, 'coco', seed=0)
    assert method in experiment.methods() or 'LoRA' in method
    assert mmpeft.METHODS.build(run.cfg.default_hooks.peft.method)
    assert run.cfg.model.backbone.checkpoint == 'work_dirs/demo/base.pth'
    assert run.cfg.default_hooks.checkpoint.interval == 100
    assert not set('\'"(), =') & set(run.folder.name)


@pytest.mark.parametrize(
    'data, task, scope',
    [
        ('digits', 'coco', 'mmdet'),
        ('digits', 'ade20k', 'mmseg'),
        ('digits', 'classification', 'mmpretrain'),
        ('digits', 'dota', 'mmrotate'),
        ('digits', 'internvit', 'mmseg'),
        ('photos', 'coco', 'mmdet'),
        ('photos', 'ade20k', 'mmseg'),
        ('photos', 'dota', 'mmrotate'),
    ],
)
def test_every_task_can_be_run(data, task, scope, experiment):
    run = experiment.Experiment('lora', task, 0, data)
    cfg = run.cfg
    assert cfg.test_dataloader.dataset.data_root.startswith(f'{run.data}/')
    assert cfg.default_scope == scope
    assert cfg.default_hooks.peft.method.type == run.title == 'LoRA'
    assert cfg.train_cfg.max_iters == (400 if task == 'internvit' else 600)
    base = experiment.BASES[experiment.TASKS[data][task]]
    assert cfg.model.backbone.checkpoint == str(base)


@pytest.mark.parametrize('words, scale', [([], 4.0), (['--data', 'photos'], 1.0)])
def test_the_default_is_flora_at_a_scale_for_the_data(
    words, scale, experiment, script, monkeypatch
):
    run = script('projects/demo', 'run')
    monkeypatch.setattr('sys.argv', ['run.py', *words])
    args = run.parse_args()
    cfg = experiment.Experiment(args.method, args.task, args.seed, args.data).cfg
    method = cfg.default_hooks.peft.method
    assert (method.type, method.scale) == ('FLoRA', scale)


@pytest.mark.parametrize(
    'method, task, expected',
    [
        ('adalor', 'coco', "no method 'adalor'. Did you mean 'adalora'"),
        ('LoRA', 'coco', "Did you mean 'lora'"),
        (
            'lora',
            'voc',
            "no task of digits 'voc'. Valid names are 'ade20k', 'classification', 'coco', 'dota'",
        ),
    ],
)
def test_unknown_names_are_refused(method, task, expected, experiment):
    with pytest.raises(UsageError) as error:
        experiment.Experiment(method, task, seed=0)
    assert expected in str(error.value)


def test_tools_are_called_with_the_composed_config(experiment, place):
    run = experiment.Experiment('flora', 'coco', seed=3)
    words = ' '.join(map(str, run.training().command))
    assert 'train.py mmpeft::demo/_base_/coco.py --method flora --work-dir work_dirs/demo' in words
    assert '--resume' not in words and words.endswith('randomness.seed=3')
    run.prepare()
    (run.folder / 'last_checkpoint').write_text('iter_100.pth')
    assert '--resume' in run.training().command
    assert run.config == run.folder / 'coco.py'  # as the Runner names what it writes
    assert run.merging().command[1:3] == [run.config, run.checkpoint]
    assert run.testing().command[1:3] == [run.config, run.checkpoint]
    assert run.testing(merged=True).command[1:3] == [run.folder / 'merged.py', run.merged]


def test_runs_start_anew_when_what_they_depend_on_changes(experiment, place):
    run = experiment.Experiment('houlsby', 'coco', seed=3)
    assert not run.merges
    run.prepare()
    (run.folder / 'last_checkpoint').write_text(str(run.checkpoint))
    run.prepare()
    assert run.is_trained()
    (place / 'work_dirs/demo/base.pth').write_text('another')
    run.prepare()
    assert not run.is_trained()


def test_steps_that_a_run_has_reached(experiment, tmp_path):
    assert experiment.reached(tmp_path) == (0, '')
    log = tmp_path / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    lines = [dict(step=10, loss=2.0), dict(step=20, loss=1.5), dict(step=0, mIoU=3.0)]
    log.write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3')
    assert experiment.reached(tmp_path) == (20, 'loss 1.50')


def write_job(jobs, folder, name, code):
    path = folder / f'{name}.py'
    path.write_text(code)
    return jobs.Job(name, [path], folder / f'{name}.log')


def test_jobs_run_side_by_side(jobs, tmp_path):
    """Each waits for the mark of the other."""
    code = (
        'import pathlib, sys, time\n'
        f'folder = pathlib.Path({str(tmp_path)!r})\n'
        '(folder / (pathlib.Path(__file__).stem + ".mark")).touch()\n'
        'while len(list(folder.glob("*.mark"))) < 2:\n'
        '    time.sleep(0.05)\n'
        'print("both")\n'
    )
    todo = [write_job(jobs, tmp_path, name, code) for name in ('one', 'other')]
    jobs.run_jobs(todo)
    assert [job.log.read_text() for job in todo] == ['both\n'] * 2
    jobs.run_jobs([])


def test_a_second_demo_waits(jobs, tmp_path):
    """It starts while the first one holds the lock, and gets it afterwards."""
    code = 'import sys, pathlib, jobs\nwith jobs.alone(pathlib.Path(sys.argv[1])):\n    print("in")'
    command = [sys.executable, '-c', code, tmp_path / 'demo/lock']
    env = os.environ | dict(PYTHONPATH=str(Path(jobs.__file__).parent))
    with jobs.alone(tmp_path / 'demo/lock'):
        other = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        said = other.stdout.readline()
        assert said == f'Another demo works in {tmp_path}/demo. This one waits for its end.\n'
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == 'in\n'


def test_a_long_name_leaves_room_for_the_bar(jobs, tmp_path, capsys):
    job = write_job(jobs, tmp_path, 'train', 'pass')
    job.name = 'train ' + 'x' * 90
    jobs.run_jobs([job])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('train')][
        -1:
    ]
    assert '…' in line and '━' * 10 in line and '1/1' in line


@pytest.mark.parametrize(
    'words, message',
    [
        (['--seed', '-1'], "'-1' is not an integer from 0 to 4294967295"),
        (
            ['--method', "[dict(method=dict(type='LoRA'), target=1)]"],
            'An entry of a list of methods',
        ),
        (['--method', "dict(type='LoRA', rank=100000)"], 'rank=100000 is larger than any'),
    ],
)
def test_wrong_arguments_are_found_before_anything_is_made(
    words, message, script, tmp_path, monkeypatch, capsys
):
    run = script('projects/demo', 'run')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['run.py', *words])
    monkeypatch.setattr(run, 'make_data_and_base', lambda *_: pytest.fail('made'))
    with pytest.raises((UsageError, SystemExit)) as error:
        run.main()
    assert message in f'{error.value}{capsys.readouterr().err}'


def test_run_jobs_stops_at_a_failure(jobs, tmp_path):
    mark = tmp_path / 'ended'
    code = f'import pathlib, time\ntime.sleep(600)\npathlib.Path({str(mark)!r}).touch()'
    slow = write_job(jobs, tmp_path, 'slow', code)
    fails = write_job(jobs, tmp_path, 'fails', 'raise SystemExit("no such thing")')
    with pytest.raises(
        SystemExit, match='no such thing(.|\n)*fails ended with status 1.*fails.log'
    ):
        jobs.run_jobs([slow, fails])
    assert not mark.exists()


@pytest.mark.parametrize('merges', [True, False])
def test_a_method_that_cannot_be_merged_has_no_merged_row(merges, script):
    def made(method, box):
        def scores(merged=False):
            return {'coco/bbox_mAP': 0.3 if merged else box, 'coco/segm_mAP': 0.5}

        return SimpleNamespace(method=method, merges=merges, scores=scores)

    table = script('projects/demo', 'demo_report').score_table(
        [made('frozen', 0.1), made('houlsby', 0.2)]
    )
    names = list(table.columns[0].cells)
    assert names == ['frozen', 'houlsby', 'houlsby, merged'][: 2 + merges]
    assert list(table.columns[1].cells) == ['0.100', '0.200', '0.300'][: 2 + merges]


def test_the_whole_model_is_counted(script, compose, tmp_path):
    """Full fine-tuning has no `unfreeze`, and is counted nevertheless."""
    cfg = read_config(compose('full', 'coco', tmp_path))
    counted = script('projects/demo', 'demo_report').summary_of(cfg)
    assert counted.unfrozen == counted.base > 2_000_000


def test_oriented_boxes_have_the_corners_of_mmrotate(pictures):
    from mmrotate.structures.bbox import RotatedBoxes

    boxes = torch.tensor([[40.0, 30.0, 20.0, 8.0, 0.4], [60.0, 70.0, 5.0, 30.0, -1.1]])
    for box, corners in zip(boxes, RotatedBoxes.rbox2corner(boxes).numpy(), strict=True):
        found = pictures.corners_of(box.tolist())
        assert abs(found[np.lexsort(found.T)] - corners[np.lexsort(corners.T)]).max() < 1e-4
    assert pictures.corners_of([1, 2, 5, 9]).tolist() == [[1, 2], [5, 2], [5, 9], [1, 9]]
    assert pictures.corners_of([*range(8)]).shape == (4, 2)


def test_what_predictions_are_drawn(pictures, tmp_path):
    """Sure ones alone, with their masks; the class of a picture; the classes of its pixels."""
    (tmp_path / 'preds').mkdir()
    mask = np.zeros((16, 16), np.uint8, order='F')
    mask[2:6, 3:9] = 1
    encoded = pycocotools.mask.encode(mask)
    encoded['counts'] = encoded['counts'].decode()
    found = dict(labels=[1, 0], scores=[0.9, 0.1], bboxes=[[3, 2, 9, 6]] * 2, masks=[encoded] * 2)
    (tmp_path / 'preds/a.json').write_text(json.dumps(found))
    (tmp_path / 'preds/b.json').write_text(json.dumps(dict(pred_label=3, pred_score=0.4)))
    detected = pictures.found_in(tmp_path, Path('a.jpg'))
    assert detected.labels == [1] and (detected.masks[0] == mask).all()
    assert detected.outlines[0].tolist() == pictures.corners_of([3, 2, 9, 6]).tolist()
    assert pictures.found_in(tmp_path, Path('b.jpg')).labels == [3]
    (tmp_path / 'pred').mkdir()
    Image.fromarray(mask).save(tmp_path / 'pred/c_pred.png')
    assert (pictures.found_in(tmp_path, Path('c.jpg')).classes == mask).all()


@pytest.mark.parametrize('kind', ['masks', 'boxes', 'classes', 'label'])
def test_a_picture_shows_what_was_seen(kind, pictures):
    """Drawn over a grey picture, the colour of class 1 is where it should be."""
    from matplotlib import pyplot

    mask = np.zeros((64, 64), bool)
    mask[20:44, 12:52] = True
    box = pictures.corners_of([12, 20, 52, 44])
    seen = dict(
        masks=pictures.Seen([1], [box], [mask]),
        boxes=pictures.Seen([1], [box], []),
        classes=pictures.Seen([], [], [], mask.astype(int)),
        label=pictures.Seen([1], [None], []),
    )[kind]
    meta = dict(classes=('a', 'b'), palette=[(0, 0, 255), (255, 0, 0)])
    figure = pyplot.figure(figsize=(2, 2), dpi=128)
    axis = figure.add_axes([0, 0, 1, 1])
    pictures.draw(axis, np.full((64, 64, 3), 128, np.uint8), seen, meta)
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba()).astype(int)
    red = drawn[..., 0] - drawn[..., 2] > 60
    inside = np.kron(mask, np.ones((4, 4), bool))
    if kind == 'label':
        assert axis.get_title() == 'b' and not red.any()
    elif kind == 'classes':
        assert (red == inside).mean() > 0.98
    else:
        rows, columns = np.nonzero(red[:178])  # below it stands the name
        assert abs(rows.min() - 80) <= 3 and abs(columns.min() - 48) <= 3
        assert abs(columns.max() - 208) <= 3 and not red[90:160, 60:190].any()
    pyplot.close(figure)


@pytest.mark.parametrize('box', [[4, 6, 30, 40], [44, 30, 64, 64], [0, 30, 20, 64]])
def test_names_stay_within_the_picture(box, pictures):
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(1.6, 1.6), dpi=200)
    axis = figure.add_axes([0, 0, 1, 1])
    seen = pictures.Seen([0], [pictures.corners_of(box)], [])
    pictures.draw(axis, np.zeros((64, 64, 3), np.uint8), seen, dict(classes=['instrument']))
    (name,) = axis.texts
    drawn, box = name.get_window_extent(), axis.transData.transform(np.reshape(box, (2, 2)) - 0.5)
    assert -1 <= drawn.x0 < drawn.x1 <= 321 and -1 <= drawn.y0 < drawn.y1 <= 321
    assert drawn.y1 <= box[1, 1] + 1 or drawn.y0 >= box[0, 1] - 1, 'beside the object, not on it'
    pyplot.close(figure)
