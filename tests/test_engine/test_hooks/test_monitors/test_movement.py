"""Adapters that do not move."""

import pytest

from mmpeft.errors import TrainingError
from tests.toy_runs import Do, run

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def still(name='backbone.fc'):
    mult = dict(custom_keys={name: dict(lr_mult=0.0)})
    return {'optim_wrapper.paramwise_cfg': mult}


def test_an_adapter_whose_rate_is_zero_is_named(tmp_path):
    expected = r"^1 of 4 adapters never move, such as 'backbone\.fc\.\S*0': .*targets\.exclude"
    with pytest.raises(TrainingError, match=expected):
        run(tmp_path, **still())


def test_an_adapter_that_the_optimizer_lost_is_named(tmp_path):
    def lose(now):
        lost = {id(p) for p in now.model.backbone.stem.parameters()}
        for group in now.runner.optim_wrapper.param_groups:
            group['params'] = [p for p in group['params'] if id(p) not in lost]

    with pytest.raises(TrainingError, match=r"1 of 4 adapters never move, .*'backbone\.stem"):
        run(tmp_path, Do('before_train_iter', lose, [1]))


def test_an_adapter_that_is_put_back_is_named(tmp_path, warned):
    start = {}

    def put_back(now):
        values = now.model.state_dict()
        for key in values:
            if key.startswith('backbone.fc'):
                values[key].copy_(start.setdefault(key, values[key].clone()))

    run(tmp_path, Do('before_train', put_back), Do('after_train_iter', put_back))
    (text,) = warned
    assert "1 of 4 adapters are where they started after 10 steps, such as 'backbone.fc" in text
    assert 'at learning rates up to 0.008' in text


def test_a_run_at_rate_zero_has_a_warning(tmp_path, warned):
    run(tmp_path, **{'optim_wrapper.optimizer.lr': 0.0})
    (text,) = warned
    assert text.startswith('4 of 4 adapters are where they started, ')


def test_a_finished_run_that_is_resumed_has_no_warning(tmp_path, warned):
    run(tmp_path, stop=2, interval=2)
    warned.clear()
    assert run(tmp_path, stop=2, interval=2, resume=True).iter == 2
    assert not [text for text in warned if 'where they started' in text]


def test_a_warmup_is_waited_for(tmp_path, warned):
    """IA3's ones do not move in float32 as long as the rate is below their precision."""
    warmup = [dict(type='LinearLR', start_factor=1e-9, end=400, by_epoch=False)]
    slow = dict(type='IA3')
    runner = run(
        tmp_path,
        method=slow,
        stop=16,
        param_scheduler=warmup,
        **{'optim_wrapper.optimizer.lr': 1e-5},
    )
    assert runner.iter == 16 and not [t for t in warned if 'after 10 steps' in t]
