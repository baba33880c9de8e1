"""The summary of an adapted model."""

import pytest

import mmpeft
from mmpeft.methods import Adapter
from tests.networks import Net

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def adapted(model):
    return [
        name.split('.parametrizations')[0]
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    ]


def test_the_summary_names_what_was_adapted_and_counts_what_was_skipped():
    model = Net()
    summary = mmpeft.inject(
        model, dict(type='LoRA', rank=2), dict(module='backbone', exclude_kinds=['depthwise'])
    )
    assert adapted(model) == ['backbone.0.pw', 'backbone.0.out', 'backbone.1.pw', 'backbone.1.out']
    assert [row.name for row in summary.rows] == [f'{name}.weight' for name in adapted(model)]
    assert summary.skipped == {'depthwise': 2, 'norm': 2}
    assert summary.outside == 27
    own = sum(p.numel() for p in Net().backbone.parameters())
    assert summary.base == own
    assert summary.share == summary.adapters / own
    assert str(summary.adapters) in str(summary).replace(',', '')
    assert summary.to_dict() == mmpeft.summary(model).to_dict()
