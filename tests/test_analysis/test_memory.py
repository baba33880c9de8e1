"""Predicted memory equals what a real forward pass keeps."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.analysis.memory import built_without_data, predict, saved_bytes, table
from mmpeft.models import InternViT

ARCH = dict(depth=3, width=64, heads=2, hidden=128, image_size=56)


def vit(method, with_cp, dtype='bfloat16'):
    model = InternViT(ARCH, frozen_dtype=dtype, with_cp=with_cp)
    mmpeft.inject(model, dict(type=method))
    return model


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('method', ['FLoRA', 'LieRA', 'DoRA', 'BitFit', 'Full'])
def test_saved_bytes_are_predicted_without_data(method, with_cp):
    real, _ = saved_bytes(vit(method, with_cp), torch.randn(2, 3, 56, 56))
    model, mode = built_without_data(lambda: vit(method, with_cp))
    with mode:
        predicted, _ = saved_bytes(model, torch.randn(2, 3, 56, 56))
    assert predicted == real > 0


@pytest.mark.parametrize('method', ['FLoRA', 'DoRA', 'LoHa'])
def test_weights_in_few_bits(method):
    """They take what is stored of them, and forward keeps no values of theirs."""
    images = torch.randn(2, 3, 56, 56)
    real, half = vit(method, False, 'nf4'), vit(method, False)
    model, mode = built_without_data(lambda: vit(method, False, 'nf4'))
    with mode:
        predicted, _ = saved_bytes(model, torch.randn(2, 3, 56, 56))
    kept, _ = saved_bytes(real, images)
    assert predicted == kept <= saved_bytes(half, images)[0]
    sizes = [sum(p.nbytes for p in m.parameters()) for m in (model, real, half)]
    linear = 3 * (4 * 64 * 64 + 2 * 64 * 128)  # of 2 bytes in bfloat16
    assert sizes[0] == sizes[1] < sizes[2] - linear


def test_saved_bytes_of_a_layer():
    layer = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(16, 8, requires_grad=True)
    assert saved_bytes(layer, x) == (16 * 8 * 4, {'': 16 * 8 * 4, '0': 16 * 8 * 4})
    assert saved_bytes(layer.requires_grad_(False), x) == (0, {})
    assert not layer[0]._forward_hooks and not layer[0]._forward_pre_hooks


def whole(with_cp, method='LoRA'):
    model = nn.Module()
    model.backbone = InternViT(ARCH, frozen_dtype='float32', with_cp=with_cp)
    model.head = nn.Linear(10, 10)
    mmpeft.inject(model, dict(type=method), dict(module='backbone'))
    return model


def test_a_step_of_a_model():
    """Recomputing keeps less, and of a block as much as one block more keeps."""
    shape = (1, 3, 56, 56)
    memory = predict(whole, shape)
    model = whole(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert memory.gradients == sum(4 * p.numel() for p in trained)
    assert memory.optimizer == 2 * memory.gradients
    assert memory.weights == sum(4 * p.numel() for p in model.parameters())
    assert memory.saved == saved_bytes(model.backbone, torch.randn(shape))[0]
    inputs = saved_bytes(whole(True).backbone, torch.randn(shape))[0]
    assert inputs < memory.recomputed < memory.saved
    deeper = InternViT(ARCH | dict(depth=4), frozen_dtype='float32')
    mmpeft.inject(deeper, dict(type='LoRA'))
    block = saved_bytes(deeper, torch.randn(shape))[0] - memory.saved
    assert memory.recomputed == inputs + block


def test_a_backbone_that_cannot_recompute():
    memory = predict(lambda again: None if again else whole(False), (1, 3, 56, 56))
    assert memory.recomputed is None and memory.saved > 0
    assert table([('it', memory)]).row_count == 1


class ReadsNumbers(nn.Module):
    """As mmdet's Swin reads its drop-path rates."""

    def __init__(self):
        super().__init__()
        self.rate = torch.linspace(0, 1, 3)[1].item()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * self.rate


def test_a_model_that_reads_numbers_has_no_data_either():
    model, mode = built_without_data(ReadsNumbers)
    assert model.rate == 0.5
    assert type(model.layer.weight.data).__name__ == 'FakeTensor'
    with mode:
        assert saved_bytes(model, torch.randn(2, 4))[0] == 2 * 4 * 4
