"""Fixtures of the tests with a toy Runner."""

from functools import partial

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim.optimizer import amp_optimizer_wrapper

from tests.toy import save_weights


@pytest.fixture
def pretrained(tmp_path):
    """Weights of a backbone that are not those of its initialisation."""
    return save_weights(tmp_path / 'pretrained.pth')


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """AmpOptimWrapper asks for an accelerator, though autocast and the scaler need none."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    scaler = partial(torch.amp.GradScaler, device='cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)


@pytest.fixture
def warned(monkeypatch):
    """The warnings in the log."""
    texts = []
    monkeypatch.setattr(MMLogger, 'warning', lambda self, text, *_: texts.append(text))
    return texts
