"""The demo's parts: configs that are composed, jobs, the report."""

import json
import time
from types import SimpleNamespace

import pytest

import mmpeft
from mmpeft.engine.config import read_config
from mmpeft.errors import UsageError


@pytest.fixture(scope='module')
def experiment(script):
    return script('demo', 'experiment')


@pytest.fixture(scope='module')
def jobs(script):
    return script('demo', 'jobs')


def test_every_method_can_be_run(experiment, compose, tmp_path):
    names = experiment.methods()
    assert {'flora', 'frozen', 'vpt_deep'} <= set(names)
    for name in names:
        cfg = read_config(compose(name, 'coco', tmp_path))
        assert mmpeft.METHODS.build(cfg.default_hooks.peft.method)
        assert cfg.model.backbone.checkpoint == 'work_dirs/demo/base.pth'
        assert cfg.default_hooks.checkpoint.interval == 100


@pytest.mark.parametrize(
    'task, scope',
    [('coco', 'mmdet'), ('ade20k', 'mmseg'), ('dota', 'mmrotate'), ('internvit', 'mmseg')],
)
def test_every_task_can_be_run(task, scope, experiment, compose, tmp_path):
    cfg = read_config(compose('lora', task, tmp_path))
    assert cfg.default_scope == scope and task in experiment.TASKS
    assert cfg.default_hooks.peft.method.type == 'LoRA'
    assert cfg.train_cfg.max_iters == (400 if task == 'internvit' else 600)
    base = experiment.BASES[experiment.TASKS[task]]
    assert cfg.model.backbone.checkpoint == str(base)


@pytest.mark.parametrize(
    'method, task, expected',
    [
        ('adalor', 'coco', "no method 'adalor'. Did you mean 'adalora'"),
        ('LoRA', 'coco', "Did you mean 'lora'"),
        ('lora', 'voc', "no task 'voc'. Valid names are 'ade20k', 'coco', 'dota', 'internvit'"),
    ],
)
def test_unknown_names_are_told(method, task, expected, compose, tmp_path):
    with pytest.raises(UsageError) as error:
        compose(method, task, tmp_path / 'configs')
    assert expected in str(error.value)
    assert not (tmp_path / 'configs').exists()


def test_runs_start_anew_when_what_they_stand_on_changes(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data/digits').mkdir(parents=True)
    (tmp_path / 'data/digits/made_with.json').write_text('{}')
    run = experiment.Experiment('houlsby', 'coco', seed=3)
    assert not run.merges and run.config.parent != run.folder
    base = tmp_path / 'work_dirs/demo/base.pth'
    base.write_bytes(b'one')
    run.prepare()
    (run.folder / 'last_checkpoint').write_text(str(run.checkpoint))
    run.prepare()
    assert run.is_trained()
    base.write_bytes(b'another')
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


def test_jobs_run_some_at_a_time_and_one_failure_stops_no_other(jobs, tmp_path):
    code = (
        'import pathlib, time\n'
        f'mark = pathlib.Path({str(tmp_path)!r}, "running-" + pathlib.Path(__file__).stem)\n'
        'mark.touch()\n'
        f'print(len(list(mark.parent.glob("running-*"))))\n'
        'time.sleep(0.3)\n'
        'mark.unlink()\n'
    )
    todo = [write_job(jobs, tmp_path, f'job{n}', code) for n in range(4)]
    todo.insert(1, write_job(jobs, tmp_path, 'fails', 'raise SystemExit("no such thing")'))
    ended = {job.name: code for job, code in jobs.results(todo, 2)}
    assert ended == dict(job0=0, job1=0, job2=0, job3=0, fails=1)
    for job in todo:
        assert job.seconds > 0
        assert job.output_end().strip() in ('1', '2', 'no such thing')


def test_run_jobs_stops_at_a_failure(jobs, tmp_path):
    slow = write_job(jobs, tmp_path, 'slow', 'import time\ntime.sleep(60)')
    fails = write_job(jobs, tmp_path, 'fails', 'raise SystemExit("no such thing")')
    start = time.monotonic()
    with pytest.raises(
        SystemExit, match='no such thing(.|\n)*fails ended with status 1.*fails.log'
    ):
        jobs.run_jobs([slow, fails])
    assert time.monotonic() - start < 30


@pytest.mark.parametrize('merges', [True, False])
def test_a_method_that_cannot_be_merged_has_no_merged_row(merges, script):
    def evaluated(box):
        return SimpleNamespace(scores=lambda: {'coco/bbox_mAP': box, 'coco/segm_mAP': 0.5})

    def made(method, box):
        return SimpleNamespace(
            method=method,
            merges=merges,
            evaluation=lambda: evaluated(box),
            evaluation_of_merged=lambda: evaluated(0.3),
        )

    table = script('demo', 'report').score_table([made('frozen', 0.1), made('houlsby', 0.2)])
    names = list(table.columns[0].cells)
    assert names == ['frozen', 'houlsby', 'houlsby, merged'][: 2 + merges]


def test_the_whole_model_is_counted(script, compose, tmp_path):
    """Full fine-tuning has no `unfreeze`, and is counted nevertheless."""
    counted = script('demo', 'report').summary_of(read_config(compose('full', 'coco', tmp_path)))
    assert counted.unfrozen == counted.base > 2_000_000
