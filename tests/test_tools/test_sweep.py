"""The comparison of all methods: what runs, and how it is summed up."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from mmengine.registry import MODELS, init_default_scope

from mmpeft.engine.config import read_config
from mmpeft.engine.packages import import_task
from tests.tasks import adapt

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / 'tools/analysis_tools/sweep.py'


@pytest.fixture(scope='module')
def sweep(script):
    return script('analysis_tools', 'sweep')


@pytest.fixture
def setting(sweep, tmp_path, monkeypatch):
    """Of runs below a folder that holds data, base and detector by name."""
    monkeypatch.chdir(tmp_path)
    for name in ('data/digits/made_with.json', 'work_dirs/demo/base.pth', 'detector.pth'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return sweep.Setting('coco', 50, 4, 2e-3, '280k', 'detector.pth')


@pytest.fixture
def runs(sweep, setting, tmp_path):
    """Make runs of a method with given box APs, None for one that failed."""

    def make(method, *scores, lr=1e-3):
        made = []
        for seed, score in enumerate(scores):
            run = sweep.Run(method, seed, lr, setting, tmp_path / 'sweep')
            run.result = dict(key=run.key, method=method, seed=seed, lr=lr)
            if score is None:
                run.result['failure'] = 'status 1: out of luck'
            else:
                found = {'coco/bbox_mAP': score, 'coco/segm_mAP': score + 0.1}
                run.result |= dict(scores=found, seconds=60.0, seconds_per_step=0.5)
            made.append(run)
        return made

    return make


def test_a_run_differs_from_the_demo_in_what_the_setting_says(sweep, setting, tmp_path):
    run = sweep.Run('lotr', 7, 1e-3, setting, tmp_path / 'sweep')
    cfg = read_config(run.config)
    assert cfg.default_hooks.peft.method.budget == '280k'
    assert cfg.randomness.seed == 7 and cfg.load_from == 'detector.pth'
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 50
    assert cfg.optim_wrapper.optimizer.lr == 2e-3
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys['backbone'].lr_mult == 0.5
    other = sweep.Run('bitfit', 7, 1e-3, setting, tmp_path / 'sweep')
    assert 'budget' not in read_config(other.config).default_hooks.peft.method


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_learning_rates_of_backbone_and_heads(sweep, setting, tmp_path):
    """Adapters at theirs; neck, heads and the backbone's fresh norms at the heads'."""
    from mmengine.optim import build_optim_wrapper

    cfg = read_config(sweep.Run('lotr', 0, 1e-3, setting, tmp_path / 'sweep').config)
    import_task(cfg)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    adapt(model, cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rates = {id(p): group['lr'] for group in groups for p in group['params']}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            adapter = name.startswith('backbone.model.')
            assert rates[id(parameter)] == pytest.approx(1e-3 if adapter else 2e-3), name


def test_results_are_kept_until_the_config_changes(sweep, setting, runs, tmp_path):
    (run,) = runs('lora', 0.25)
    run.folder.mkdir()
    run.record.write_text(json.dumps(run.result))
    again = sweep.Run('lora', 0, 1e-3, setting, tmp_path / 'sweep')
    assert again.is_done and sweep.score(again) == 0.25
    Path('detector.pth').write_text('another')
    assert not sweep.Run('lora', 0, 1e-3, setting, tmp_path / 'sweep').is_done


def test_failures_are_tried_again(runs):
    done, failed = runs('lora', 0.25, None)
    assert done.is_done and not failed.is_done


def test_best_learning_rate(sweep, runs):
    tried = [
        *runs('lora', 0.2, lr=1e-3),
        *runs('lora', 0.3, lr=2e-3),
        *runs('lora', None, lr=4e-3),
        *runs('flora', None, lr=1e-3),
    ]
    assert sweep.best_rates(tried) == dict(lora=2e-3)


def test_summary_over_seeds(sweep, runs):
    row = sweep.summary_of(runs('lora', 0.2, 0.3, None))
    assert row['mean'] == pytest.approx(0.25) and row['std'] == pytest.approx(0.5**0.5 / 10)
    assert row['scores']['mask AP'][0] == pytest.approx(0.35)
    assert row['runs'] == 2 and row['failures'] == ['status 1: out of luck']
    assert row['arguments'] == 'LoRA(rank=4)' and 270_000 < row['parameters'] <= 280_000
    assert sweep.summary_of(runs('bitfit', 0.2))['std'] is None


def test_too_small_a_budget_is_told(sweep, setting, tmp_path):
    small = sweep.Setting('coco', 50, 4, 2e-3, '10', 'detector.pth')
    run = sweep.Run('lora', 0, 1e-3, small, tmp_path / 'sweep')
    run.result = dict(failure='status 1: whatever came last')
    (failure,) = sweep.summary_of([run])['failures']
    assert "budget='10' is too small" in failure


def test_files_hold_all_methods(sweep, runs, setting, tmp_path, capsys):
    made = [runs('frozen', 0.2, 0.2), runs('lora', 0.25, 0.27), runs('dora', None, None)]
    rows = [sweep.summary_of(each) for each in made]
    sweep.show(rows, setting)
    shown = capsys.readouterr().out
    assert '0.260 ± 0.014' in shown and 'dora failed: status 1: out of luck' in shown
    folder = tmp_path / 'sweep'
    sweep.write(rows, [run for each in made for run in each], folder)
    stored = json.loads((folder / 'results.json').read_text())
    assert stored['setting']['budget'] == '280k' and len(stored['runs']) == 6
    with (folder / 'results.csv').open() as file:
        table = {line['method']: line for line in csv.DictReader(file)}
    assert table['dora']['failures'] == 'status 1: out of luck' and table['dora']['mean'] == ''
    assert float(table['lora']['mean']) == pytest.approx(0.26)
    assert '| lora | extension |' in (folder / 'results.md').read_text()
    assert (folder / 'results.png').stat().st_size > 10_000


@pytest.mark.slow
def test_from_data_to_table(tmp_path, compose):
    """Two methods for two steps, and one whose budget is too small; then once more."""
    digits = [ROOT / 'tools/dataset_converters/digits.py', '--out', 'data/digits']
    call(tmp_path, *digits, '--train', '4', '--val', '4', '--source', '20')
    cfg = read_config(compose('frozen', 'coco', tmp_path))
    base = timm.create_model(cfg.model.backbone.name, depths=cfg.model.backbone.depths)
    (tmp_path / 'work_dirs/demo').mkdir(parents=True)
    torch.save(base.state_dict(), tmp_path / 'work_dirs/demo/base.pth')
    import_task(cfg)
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'detector.pth')

    words = [SWEEP, '--seeds', '0', '--steps', '2', '--budget', '10k', '--at-once', '2']
    words += ['--start', 'detector.pth', '--out', 'sweep', '--methods', 'frozen', 'houlsby']
    shown = call(tmp_path, *words, 'lora')
    assert 'seeds: 0 of 3 runs are there already' in shown
    assert "lora failed: budget='10k' is too small" in ' '.join(shown.split())
    content = json.loads((tmp_path / 'sweep/coco/results.json').read_text())
    rows = {row['method']: row for row in content['methods']}
    assert rows['frozen']['runs'] == rows['houlsby']['runs'] == 1 and rows['lora']['runs'] == 0
    assert rows['houlsby']['arguments'] == 'HoulsbyAdapter(rank=1)'
    assert rows['frozen']['scores'].keys() == {'box AP', 'mask AP'}
    record = tmp_path / 'sweep/coco/houlsby_lr0.001_seed0/result.json'
    before = record.stat().st_mtime_ns
    assert 'seeds: 2 of 2 runs are there already' in call(tmp_path, *words)
    assert record.stat().st_mtime_ns == before


def call(folder, *words):
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, words)],
        cwd=folder,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
