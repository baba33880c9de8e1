"""Frozen weights and statistics that change during training."""

import re

import pytest

from mmpeft.errors import TrainingError
from mmpeft.injection.freeze import release_statistics
from mmpeft.training.checks import frozen as frozen_monitor
from tests.toy_runs import Do, run

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def thaw_statistics(now):
    release_statistics(now.model)


def test_statistics_that_move_are_named(tmp_path):
    with pytest.raises(TrainingError) as error:
        run(tmp_path, Do('before_train', thaw_statistics))
    message = str(error.value)
    assert re.search(r'^[23] of \d+ frozen tensors changed between iterations 0 and 10\.', message)
    assert re.search(r"'backbone\.norm\.running_mean': element \[0\] went from 0 to \S+\.", message)


def test_a_frozen_weight_that_changed_is_named(tmp_path):
    def write(now):
        now.model.backbone.stem.parametrizations.weight.original.data[3, 1, 2, 0] += 0.25

    with pytest.raises(TrainingError, match=r'^1 of \d+ .* between iterations 4 and 8') as error:
        run(tmp_path, Do('after_train_iter', write, [7]), interval=4)
    warned = re.search(
        r"'backbone\.stem\.parametrizations\.weight\.original': "
        r'element \[3, 1, 2, 0\] went from (\S+) to (\S+)\. ',
        str(error.value),
    )
    before, after = map(float, warned.groups())
    assert after - before == pytest.approx(0.25, abs=1e-5)
    assert [p.name for p in tmp_path.glob('*.pth')] == ['iter_4.pth']


def test_a_change_past_what_is_kept_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_monitor, 'KEPT', 4)

    def write(now):
        now.model.backbone.stage[2].bias.data[7] += 1e-6

    with pytest.raises(
        TrainingError, match=r"'backbone\.stage\.2\.bias': past its first 4 elements"
    ):
        run(tmp_path, Do('after_train_iter', write, [1]))


def test_a_base_that_may_move_is_left_alone(tmp_path):
    hook = Do('before_train', thaw_statistics)
    run(tmp_path, hook, **{'default_hooks.peft.check_frozen': False})
