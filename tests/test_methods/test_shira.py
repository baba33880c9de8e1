"""SHiRA: values at random or large entries."""

import numpy as np
import peft
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
from tests.adapting import adapted, close, init


def test_values_are_added_at_random_entries(layer):
    frozen, new, f = adapted(layer, dict(type='SHiRA', density=0.25))
    changed = np.flatnonzero(new - frozen)
    assert len(f['values']) == max(1, round(frozen.size / 4))
    close(changed, f['index'])
    close((new - frozen).ravel()[f['index']], f['values'])


def test_masks():
    layer = nn.Linear(10, 10)
    layer.weight.data = torch.arange(100.0).view(10, 10) * (-1) ** torch.arange(10)
    method = mmpeft.METHODS.build(dict(type='SHiRA', density=0.1, mask='magnitude'))
    assert init(layer, method)['index'].tolist() == [*range(90, 100)]
    method = mmpeft.METHODS.build(dict(type='SHiRA', density=0.1))
    one, two = (init(layer, method)['index'] for _ in range(2))
    assert len(one) == len(one.unique()) == 10 and not torch.equal(one, two)


@pytest.mark.filterwarnings('ignore:Sparse invariant')
def test_shira_equals_pefts():
    layer, x = nn.Linear(12, 10).double(), torch.randn(3, 12, dtype=torch.float64)
    config = peft.ShiraConfig(r=2, target_modules=['0'])
    theirs = peft.get_peft_model(nn.Sequential(layer), config).base_model.model.double()
    ours = nn.Sequential(nn.Linear(12, 10).double())
    ours[0].load_state_dict(theirs[0].base_layer.state_dict())
    mmpeft.inject(ours, dict(type='SHiRA', density=44 / 120))
    adapter = adapters_of(ours[0], 'weight')[0]
    rows, columns = theirs[0].shira_indices['default']
    values = torch.randn(44, dtype=torch.float64)
    with torch.no_grad():
        adapter.index.copy_(rows * 12 + columns)
        adapter.values.copy_(values)
        theirs[0].shira_weight['default'].copy_(values)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
