"""Mixed precision, with and without an accelerator."""

import pytest
import torch
from mmcv import ops
from mmengine.config import Config

from mmpeft.engine import amp, launch
from mmpeft.errors import UsageError
from tests.toy import toy_config


def test_amp():
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    amp.enable_amp(cfg)
    assert cfg.optim_wrapper.to_dict() == dict(type='AmpOptimWrapper', loss_scale='dynamic')
    with pytest.raises(UsageError, match='no mixed-precision form'):
        amp.enable_amp(Config(dict(optim_wrapper=dict(type='ApexOptimWrapper'))))


@pytest.mark.filterwarnings('ignore')
def test_amp_on_a_cpu(tmp_path, scope, capsys):
    seen = []

    def train(folder, **changes):
        cfg = toy_config(folder, dict(type='LoRA', rank=2), **{'train_cfg.max_epochs': 1})
        cfg.merge_from_dict(changes)
        amp.enable_amp(cfg)
        runner = launch.build_runner(cfg)
        layer = runner.model.head
        layer.register_forward_hook(lambda *call: seen.append((layer.training, call[-1].dtype)))
        runner.train()

    train(tmp_path / 'a')
    train(tmp_path / 'b', **{'optim_wrapper.dtype': 'bfloat16', 'load_from': None})
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
    assert 'Mixed precision is in bfloat16' in capsys.readouterr().out
    with pytest.raises(UsageError, match="in float16 needs an accel.*optim_wrapper.dtype='bfloat"):
        train(tmp_path / 'c', **{'optim_wrapper.dtype': 'float16'})


def test_amp_on_an_accelerator_is_mmengines(monkeypatch):
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', dtype='float16')))
    monkeypatch.setattr(amp, 'get_device', lambda: 'cuda')
    amp.prepare_precision(cfg)
    assert cfg.optim_wrapper.to_dict() == dict(type='AmpOptimWrapper', dtype='float16')


def test_operators_of_mmcv_take_bfloat16_on_a_cpu():
    amp.widen_operators()
    boxes = torch.tensor([[0.0, 0, 8, 8], [1, 0, 8, 8], [20, 20, 24, 24]])
    scores, rois = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([[0, 0.0, 0, 4, 4]])
    found, kept = ops.nms(boxes.bfloat16(), scores, 0.5)
    assert kept.tolist() == [0, 2] and torch.equal(found[:, :4], boxes[[0, 2]])
    x = torch.randn(1, 2, 8, 8).bfloat16().requires_grad_(True)
    wide = x.detach().float().requires_grad_(True)
    pooled = [ops.RoIAlign(2)(each, rois.to(each)) for each in (x, wide)]
    torch.testing.assert_close(pooled[0].float(), pooled[1], rtol=0.01, atol=0.01)
    for each in pooled:
        each.sum().backward()
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=0.01, atol=0.01)
    amp.widen_operators()  # once is enough
    assert torch.equal(ops.nms(boxes, scores, 0.5)[1], kept)
