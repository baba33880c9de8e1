"""A run that was interrupted at any of its checkpoints ends as if it had not been, bit by bit."""

import pytest
import torch

from tests.toy import LOW_PRECISION, by_iterations, toy_runner

STOP = 9
EMA = {'custom_hooks': [dict(type='EMAHook', momentum=0.1)]}
SCALED = LOW_PRECISION | {'optim_wrapper.loss_scale': dict(init_scale=2.0**120, growth_interval=2)}
ADALORA = dict(type='AdaLoRA', rank=2, init_rank=4, warmup=2, settle=2, every=2)
SETTINGS = dict(
    plain=(None, {}),
    ema=(None, EMA),
    amp=(None, SCALED),
    adalora=(ADALORA, {}),
    all=(ADALORA, EMA | SCALED),
)


def run(folder, method, changes, **resumed):
    changes = by_iterations(STOP, 1) | {'experiment_name': str(folder)} | changes | resumed
    runner = toy_runner(folder, method, **changes)
    runner.train()
    whole = torch.load(folder / f'iter_{STOP}.pth', weights_only=False)
    for about_the_run in ('meta', 'message_hub'):
        del whole[about_the_run]
    return runner, whole


def differences(a, b, place=''):
    """Where two nested structures are not bit-equal."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [place]
    if isinstance(a, dict):
        missing = [f'{place}.{key}' for key in a.keys() ^ b.keys()]
        return missing + [
            d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f'{place}.{k}')
        ]
    if isinstance(a, (list, tuple)):
        longer = [f'{place}: {len(a)} and {len(b)}'] if len(a) != len(b) else []
        pairs = enumerate(zip(a, b, strict=False))
        return longer + [d for i, (x, y) in pairs for d in differences(x, y, f'{place}.{i}')]
    return [] if a == b else [place]


@pytest.mark.parametrize('setting', SETTINGS)
def test_interrupted_at_every_checkpoint(setting, tmp_path, amp_on_cpu):  # noqa: F811
    method, changes = SETTINGS[setting]
    through, expected = run(tmp_path / 'through', method, changes)
    assert {'state_dict', 'optimizer', 'param_schedulers', 'mmpeft_allocation'} <= expected.keys()
    assert ('ema_state_dict' in expected) is ('custom_hooks' in changes)
    if 'optim_wrapper.type' in changes:
        assert expected['optimizer']['loss_scaler']['scale'] != 2.0**120
    for stop in range(1, STOP):
        start = tmp_path / f'through/iter_{stop}.pth'
        resumed, given = run(
            tmp_path / f'from_{stop}', method, changes, load_from=str(start), resume=True
        )
        assert resumed.iter == STOP
        assert not differences(expected, given), stop
        for name in ('train/lr', 'train/loss'):
            logs = [r.message_hub.get_scalar(name).data for r in (through, resumed)]
            assert [len(values) for values in logs[0]] == [STOP, STOP]
            assert (logs[0][0] == logs[1][0]).all() and (logs[0][1] == logs[1][1]).all()
