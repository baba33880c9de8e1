"""Adapters that no gradient reaches."""

import pytest

from mmpeft.errors import TrainingError
from tests.toy import toy_runner

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('check', [1, 10])
def test_an_adapter_without_gradient_stops_the_run_with_its_name(check, tmp_path):
    changes = {'model.backbone.unused': True, 'default_hooks.peft.check_iters': check}
    with pytest.raises(TrainingError, match=r'No gradient reached 1 of 5.*backbone\.unused'):
        toy_runner(tmp_path, **changes).train()


def test_short_runs_are_checked_at_their_end(tmp_path):
    changes = {'model.backbone.unused': True, 'default_hooks.peft.check_iters': 10**6}
    with pytest.raises(TrainingError, match='No gradient reached'):
        toy_runner(tmp_path, **changes).train()
