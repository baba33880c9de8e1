"""No monitor warns about a run that is well."""

import pytest

from tests.cases import FAMILIES, METHODS
from tests.toy_runs import run

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.mark.parametrize('name', FAMILIES)
def test_a_run_that_is_well_has_no_warnings(name, tmp_path, warned):
    changes = {
        'model.backbone.block': True,
        'optim_wrapper.clip_grad': dict(max_norm=5.0),
        'custom_hooks': [dict(type='EMAHook', momentum=0.1)],
    }
    runner = run(tmp_path, method=METHODS[name], stop=16, interval=8, **changes)
    assert runner.iter == 16
    assert not [text for text in warned if 'adapters' in text or 'Iteration' in text]
