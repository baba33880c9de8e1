"""Predicted memory equals what a real forward pass keeps."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import mmpeft
from mmpeft.analysis.memory import built_without_data, predict, saved_bytes
from mmpeft.errors import UsageError
from mmpeft.execution import MEMORY
from mmpeft.models import InternViT, TimmBackbone
from tests.backbones import SMALL

ARCH = dict(depth=3, width=64, heads=2, hidden=128, image_size=56)


def vit(method, memory='speed', dtype='bfloat16'):
    model = InternViT(ARCH, frozen_dtype=dtype)
    mmpeft.inject(model, dict(type=method), memory=memory)
    return model


def counted(model, images):
    """What torch saves for backward, each storage once, without parameters and buffers."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for pointer, storage in held.items() if pointer not in own)


@pytest.mark.parametrize('memory', MEMORY)
@pytest.mark.parametrize('method', ['FLoRA', 'LieRA', 'DoRA', 'BitFit', 'Full'])
def test_saved_bytes_are_predicted_without_data(method, memory):
    real = counted(vit(method, memory), torch.randn(2, 3, 56, 56))
    model, mode = built_without_data(lambda: vit(method, memory))
    with mode:
        predicted, _ = saved_bytes(model, torch.randn(2, 3, 56, 56))
    assert predicted == real > 0


def test_a_transformer_that_reads_numbers_while_it_is_built():
    """timm's; on the meta device, and then on the CPU without data."""
    name = 'vit_small_patch16_dinov3.lvd1689m'

    def build():
        model = TimmBackbone(name, **SMALL[name])
        mmpeft.inject(model, dict(type='LoRA', rank=2))
        return model

    real, images = build(), torch.randn(1, 3, 64, 96)
    model, mode = built_without_data(build)
    assert all(isinstance(p, FakeTensor) and p.is_cpu for p in model.parameters())
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (real, model)]
    assert trained[0] == trained[1] != []
    kept, _ = saved_bytes(real, images)
    with mode:
        assert saved_bytes(model, torch.randn(1, 3, 64, 96))[0] == kept > 0


@pytest.mark.parametrize('name', ['convnextv2_atto', 'resnet18'])
@pytest.mark.parametrize('memory', MEMORY)
def test_saved_bytes_of_convolutions_are_predicted(name, memory):
    def build():
        model = timm.create_model(name, features_only=True, out_indices=(0, 1))
        mmpeft.inject(model, dict(type='FLoRA', rank=2), memory=memory)
        return model

    real = counted(build(), torch.randn(1, 3, 64, 64))
    model, mode = built_without_data(build)
    with mode:
        assert saved_bytes(model, torch.randn(1, 3, 64, 64))[0] == real > 0


@pytest.mark.parametrize('method', ['FLoRA', 'DoRA', 'LoHa'])
def test_weights_in_few_bits(method):
    """They take what is stored of them, and forward keeps no values of theirs."""
    images = torch.randn(2, 3, 56, 56)
    real, half = vit(method, dtype='nf4'), vit(method)
    model, mode = built_without_data(lambda: vit(method, dtype='nf4'))
    with mode:
        predicted, _ = saved_bytes(model, torch.randn(2, 3, 56, 56))
    kept, _ = saved_bytes(real, images)
    assert predicted == kept <= saved_bytes(half, images)[0]
    sizes = [sum(p.nbytes for p in m.parameters()) for m in (model, real, half)]
    linear = 3 * (4 * 64 * 64 + 2 * 64 * 128)  # of 2 bytes in bfloat16
    assert sizes[0] == sizes[1] < sizes[2] - linear


def test_convolutions_in_few_bits_take_what_is_stored():
    """Of each weight a byte for each element, and a scale for each row."""

    def build(dtype='int8'):
        return TimmBackbone('test_resnet', frozen_dtype=dtype)

    whole, sizes = build(None), []
    for model in (build(), built_without_data(build)[0]):
        sizes.append(sum(p.nbytes for p in model.parameters()))
    convolutions = [m.weight for m in whole.modules() if isinstance(m, nn.Conv2d)]
    saved = sum(3 * w.numel() - 4 * len(w) for w in convolutions)
    assert sizes == [sum(p.nbytes for p in whole.parameters()) - saved] * 2 and saved > 0


def test_saved_bytes_of_a_layer():
    layer = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(16, 8, requires_grad=True)
    assert saved_bytes(layer, x) == (16 * 8 * 4, {'': 16 * 8 * 4, '0': 16 * 8 * 4})
    assert saved_bytes(layer.requires_grad_(False), x) == (0, {})
    assert not layer[0]._forward_hooks and not layer[0]._forward_pre_hooks


def whole(memory, depth=3):
    model = nn.Module()
    model.backbone = InternViT(ARCH | dict(depth=depth), frozen_dtype='float32')
    model.head = nn.Linear(10, 10)
    mmpeft.inject(model, dict(type='LoRA'), dict(module='backbone'), memory=memory)
    return model


def test_a_step_of_a_model():
    """Of a block that runs again it keeps what one block more would keep, less its input."""
    shape = (1, 3, 56, 56)
    memory = predict(whole, shape)
    model = whole('speed')
    trained = [p for p in model.parameters() if p.requires_grad]
    assert memory.gradients == sum(4 * p.numel() for p in trained)
    assert memory.optimizer == 2 * memory.gradients
    assert memory.weights == sum(4 * p.numel() for p in model.parameters())
    for name, saved in memory.saved.items():
        assert saved == counted(whole(name).backbone, torch.randn(shape))
    assert memory.saved['small'] < memory.saved['balanced'] < memory.saved['speed']
    blocks = [counted(whole('speed', depth).backbone, torch.randn(shape)) for depth in (3, 4)]
    assert memory.block == blocks[1] - blocks[0] - 17 * 64 * 4


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


class Windows(nn.Module):
    """As mmpretrain's Swin refuses small maps."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if min(x.shape[2:]) < 7:
            raise AssertionError('smaller than the\n window (7).')
        return self.layer(x)


def test_a_size_that_a_backbone_refuses():
    def build(memory):
        model = nn.Sequential(OrderedDict(backbone=Windows()))
        mmpeft.inject(model, dict(type='LoRA', rank=1), memory=memory)
        return model

    assert predict(build, (1, 3, 7, 9)).weights > 0
    with pytest.raises(UsageError, match=r'images of 6 x 9: smaller than the window \(7\)\. Give'):
        predict(build, (1, 3, 6, 9))
