"""DDP with two gloo processes against one process with their batches together."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.processes import launch
from tests.test_engine.test_hooks import distributed_run

SCRIPT = Path(distributed_run.__file__)
DETECTOR = Path(__file__).parents[2] / 'detector_run.py'
DISAGREEMENTS = Path(__file__).with_name('distributed_disagreements.py')
ROOT = SCRIPT.parents[3]


METHODS = [
    dict(type='FLoRA', rank=2, scale=1.0),
    dict(type='DoRA', rank=2),
    dict(type='LoTR', rank=2),
    dict(type='AdaLoRA', rank=1, warmup=1, settle=1, every=1),
    dict(type='PiSSA', rank=2),
    dict(type='LoRA', budget=700),
]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Folders of all methods' runs, in one process and in two."""
    folder = tmp_path_factory.mktemp('runs')
    distributed_run.main(folder / 'one', 4, json.dumps(METHODS))
    done = launch(2, SCRIPT, folder / 'two', 2, json.dumps(METHODS))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize('number', range(len(METHODS)), ids=[m['type'] for m in METHODS])
def test_two_processes_train_what_one_would(number, runs):
    folders = [runs / name / str(number) for name in ('one', 'two')]
    one = torch.load(folders[0] / 'rank0.pth')
    first, second = (torch.load(folders[1] / f'rank{rank}.pth') for rank in (0, 1))
    assert one.keys() == first.keys()
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)
    moved = [k for k in one if k.endswith(('core', 'lora_B', 'lora_E'))]
    assert moved and any(one[k].any() for k in moved)
    if 'budget' in METHODS[number]:
        assert len({len(one[key]) for key in one if key.endswith('lora_A')}) > 1
    metrics = [torch.load(folder / 'metrics0.pth') for folder in folders]
    torch.testing.assert_close(
        torch.tensor(metrics[0]['toy/scores']),
        torch.tensor(metrics[1]['toy/scores']),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_vit_detector_in_bfloat16_with_averaged_weights(tmp_path):
    """Two processes end with the same adapters; the averages are saved, and the base is not."""
    done = launch(2, DETECTOR, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f'rank{rank}.pth') for rank in (0, 1))
    trained = [key for key in first if '.lora_B' in key]
    assert trained and all(first[key].any() for key in trained)
    assert {first[key].dtype for key in trained} == {torch.float32}
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    saved = torch.load(tmp_path / 'iter_3.pth', weights_only=False)['state_dict']
    assert set(trained) <= set(saved) and not any('original' in key for key in saved)
    assert any(not torch.equal(saved[key], first[key]) for key in trained)


@pytest.fixture(scope='module')
def errors(tmp_path_factory):
    """Each rank's error in each run that has to stop, all in one pair of processes."""
    folder = tmp_path_factory.mktemp('disagreements')
    done = launch(2, DISAGREEMENTS, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f'rank{rank}.json').read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    'case, expected',
    [
        (
            'another_file',
            r'^The ranks disagree before training\. 20 of 33 tensors differ, the first is '
            r"'backbone\.stem\.parametrizations\.weight\.0\.core': rank 0 against rank 1\.",
        ),
        (
            'another_base',
            r"before training\. 1 of \d+ tensors differ, the first is 'backbone\.norm\.bias'",
        ),
        (
            'another_decision',
            r"after iteration 4\. 1 of \d+ tensors differ, the first is 'backbone\.fc\.\S+lora_E'",
        ),
        (
            'one_rank_alone',
            r'^On rank 1: 1 of \d+ frozen tensors changed between iterations 0 and 4\. The first '
            r"is 'backbone\.norm\.bias'",
        ),
        ('another_seed', '^$'),
    ],
)
def test_ranks_that_disagree_stop_on_all_of_them(case, expected, errors):
    first, second = (own[case] for own in errors)
    assert first == second
    assert re.search(expected, first), first


def test_gradients_that_are_not_finite_on_one_rank(errors):
    first, second = (own['not_finite'] for own in errors)
    assert 'loss is finite, gradients are NaN' in first and 'all layers are finite' in first
    assert 'loss is nan' in second and "NaN appears first in 'backbone.stage.1'" in second


def test_an_unused_adapter_is_named_before_ddp_gives_up(errors):
    for own in errors:
        assert 'No gradient reached 1 of 5 adapters' in own['unused']
        assert 'backbone.unused' in own['unused']


def test_a_model_that_the_runner_has_sharded_is_refused_at_the_start(errors):
    for own in errors:
        assert 'model_wrapper_cfg has sharded the model' in own['sharded']


ALONE = """
import torch
from mmengine.dist import get_rank

from mmpeft.engine.launch import build_runner
from tests.toy import toy_config

runner = build_runner(
    toy_config({folder!r}, **{{'launcher': 'pytorch', 'experiment_name': 'alone'}})
)
if get_rank() == 1:
    parse = runner.model.module.parse_losses

    def infinite(losses):
        return parse(dict(losses, loss_far=losses['loss'].detach() + torch.inf))

    runner.model.module.parse_losses = infinite
runner.train()
"""


def test_an_error_on_one_rank_ends_the_others(tmp_path):
    """An infinite loss with finite gradients is known to one rank alone."""
    script = tmp_path / 'alone.py'
    script.write_text(ALONE.format(folder=str(tmp_path)))
    done = launch(2, script)
    assert done.returncode != 0
    assert 'loss_far is inf, the gradients are finite' in done.stderr
