"""A sweep from its command to its table and picture, on the toy."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from mmpeft.analysis.curves import Point, draw_curves, points, score_name
from mmpeft.engine.config import compose
from mmpeft.engine.runs import with_values
from mmpeft.errors import UsageError
from tests.toy import by_iterations, toy_config

pytestmark = [
    pytest.mark.usefixtures('scope'),
    pytest.mark.filterwarnings('ignore:.*adapters have more parameters'),
]


@METRICS.register_module()
class ToyMean(BaseMetric):
    """The mean of all scores, and their number, which is no score of the task."""

    def process(self, data_batch, data_samples):
        self.results += [sample['scores'].mean().item() for sample in data_samples]

    def compute_metrics(self, results):
        return {'images': len(results), 'accuracy/top1': float(np.mean(results))}


def config(folder):
    changes = by_iterations(2, 100) | dict(test_evaluator=dict(type='ToyMean', _delete_=True))
    cfg = toy_config(folder, dict(type='FLoRA', rank=2), **changes)
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=1)
    backends = [dict(type='LocalVisBackend')]
    cfg.visualizer = dict(type='Visualizer', name='visualizer', vis_backends=backends)
    return cfg


@pytest.fixture
def tool(script, monkeypatch, tmp_path, capsys):
    config(tmp_path).dump(tmp_path / 'config.py')

    def call(*words):
        words = ['sweep.py', tmp_path / 'config.py', '--work-dir', tmp_path / 'work', *words]
        monkeypatch.setattr(sys, 'argv', [str(word) for word in words])
        script('tools', 'sweep').main()
        lines = (tmp_path / 'work/runs.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines], capsys.readouterr().out

    return call


def test_ranks_and_scales_with_seeds(tool, tmp_path):
    words = '--over', 'rank=1,3', 'scale=0.5', '--seeds', 0, 1
    records, printed = tool(*words)
    assert [(r['values'], r['seed']) for r in records] == [
        (dict(rank=rank, scale=0.5), seed) for rank in (1, 3) for seed in (0, 1)
    ]
    assert len({r['scores']['accuracy/top1'] for r in records}) == 4
    assert records[0]['backbone_parameters'] < records[2]['backbone_parameters']
    for record in records:  # its own log, not that of the run before it in this process
        (scalars,) = Path(record['work_dir']).glob('*/vis_data/scalars.json')
        assert sum('"loss"' in line for line in scalars.read_text().splitlines()) == 2
    (file,) = (tmp_path / 'work').glob('rank3_scale0.5_seed1_*/config.py')
    assert compose(file).default_hooks.peft.method == dict(type='FLoRA', rank=3, scale=0.5)
    mean = np.mean([r['scores']['accuracy/top1'] for r in records[2:]])
    assert f'{mean:.4f}' in printed and f'{records[2]["backbone_parameters"]:,}' in printed
    assert (tmp_path / 'work/rank_scale.png').stat().st_size > 10_000
    again, printed = tool('--over', 'rank=1,3,4', 'scale=0.5', '--seeds', 0, '--score', 'images')
    assert again[:4] == records and len(again) == 5  # only what is new is run
    assert '16.0000' in printed


def test_what_it_refuses_before_a_run(tool, tmp_path):
    for words, message in (
        (['rnk=1,2'], "no argument 'rnk'. Did you mean 'rank'"),
        (['optim_wrapper.optimiser.lr=1,2'], "has no 'optimiser' there"),
        (['rank=1,0'], 'rank=0 must be a positive integer'),
        (['rank=2', 'rank=3'], '--over: rank comes 2 times'),
        (['rank=1', '--seeds', 0, -1], '--seeds: -1 is not a seed'),
    ):
        with pytest.raises(UsageError, match=message):
            tool('--over', *words)
    assert not (tmp_path / 'work').exists()


def test_values_of_a_method():
    cfg = config('none')
    changed = with_values(cfg, {'rank': 5, 'optim_wrapper.optimizer.lr': 0.5})
    assert changed.default_hooks.peft.method.rank == 5
    assert changed.optim_wrapper.optimizer.lr == 0.5 and cfg.default_hooks.peft.method.rank == 2
    cfg.default_hooks.peft.method.budget = '1k'
    assert with_values(cfg, dict(rank=5)).default_hooks.peft.method.budget is None
    cfg.default_hooks.peft.method = [dict(type='LoRA'), dict(type='BitFit')]
    with pytest.raises(UsageError, match='has several'):
        with_values(cfg, dict(rank=5))
    cfg.default_hooks.pop('peft')
    with pytest.raises(UsageError, match='has no method'):
        with_values(cfg, dict(rank=5))


def record(scale, rank, score, seed=0):
    scores = None if score is None else {'mIoU': score, 'aAcc': 1.0}
    return dict(
        values=dict(scale=scale, rank=rank), seed=seed, scores=scores, backbone_parameters=rank
    )


def test_curves_over_the_first_key():
    """A line a rank, the mean over seeds; a run that failed does not count."""
    scores = {(4.0, 8): (0.3, 0.5), (0.4, 8): (0.2, 0.4), (0.4, 16): (0.6, None)}
    records = [record(*key, s, seed) for key, pair in scores.items() for seed, s in enumerate(pair)]
    assert score_name(records) == 'mIoU' and score_name(records, 'aAcc') == 'aAcc'
    found = points(records, 'mIoU')
    assert found[2] == Point(dict(scale=0.4, rank=16), 16, (0.6,), failed=1)
    assert found[0].deviation == pytest.approx(np.std([0.3, 0.5], ddof=1))
    (ax,) = draw_curves(found, 'mIoU').axes
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_allclose(lines['rank=8'], [(0.4, 0.3), (4, 0.4)])
    np.testing.assert_allclose(lines['rank=16'], [(0.4, 0.6)])
    assert ax.get_xscale() == 'log' and ax.get_xlabel() == 'scale'
    dots = np.concatenate([scatter.get_offsets() for scatter in ax.collections[1:]])
    assert {tuple(dot) for dot in dots} >= {(4, 0.3), (4, 0.5), (0.4, 0.2), (0.4, 0.4), (0.4, 0.6)}


def test_scores_that_do_not_exist():
    with pytest.raises(UsageError, match='No run of the sweep'):
        score_name([record(1, 1, None)])
    with pytest.raises(UsageError, match="no score 'mIou'. Did you mean 'mIoU'"):
        score_name([record(1, 1, 0.5)], 'mIou')


@pytest.mark.parametrize('values', [('auto', 4.0), ([8, 4], [16, 4])])
def test_curves_over_what_are_no_numbers(values):
    found = points([record(value, 1, 0.5) for value in values], 'mIoU')
    (ax,) = draw_curves(found, 'mIoU').axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [str(value) for value in values]
    assert [point.values['scale'] for point in found] == list(values)


@pytest.mark.parametrize('words', [('rank=2,2',), ('rank=1,2', '--seeds', 0, 0)])
def test_a_value_is_not_counted_twice(words, tool):
    with pytest.raises(UsageError, match='a value is given twice'):
        tool('--over', *words)
