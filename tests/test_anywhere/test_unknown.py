"""Parameters that no method is defined on are named."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import spectral_norm

import mmpeft
from tests.hf_zoo import HF, WORDS

LORA = dict(type='LoRA', rank=1)


def test_experts_in_one_tensor():
    sizes = WORDS | dict(num_hidden_layers=1, head_dim=8, num_key_value_heads=2)
    config = hf.GptOssConfig(**sizes, num_local_experts=4, layer_types=['full_attention'])
    model = hf.GptOssForCausalLM(config)
    with pytest.warns(
        UserWarning, match=r'of the parameters in .*experts.gate_up_proj, .*unfreeze'
    ):
        summary = mmpeft.inject(model, LORA)
    experts = 'model.layers.0.mlp.experts'
    assert summary.unknown[f'{experts}.gate_up_proj'] == 4 * 16 * 64
    assert summary.unknown[f'{experts}.down_proj'] == 4 * 32 * 16
    assert 0.5 < summary.unknown_share < 1
    assert f'{experts}.down_proj, 2,048 = ' in str(summary)
    mmpeft.remove(model)
    assert not mmpeft.inject(model, LORA, unfreeze=('experts', 'router')).unknown


def test_tables_of_windows():
    summary = mmpeft.inject(HF['swin'].build(), LORA)
    tables = [name for name in summary.unknown if 'relative_position_bias_table' in name]
    assert len(tables) == 3 and summary.unknown_share < 0.5


class R2Conv(nn.Module):
    """As e2cnn's: the kernel is expanded from coefficients of a basis."""

    def __init__(self):
        super().__init__()
        self.kernel_size, self.groups, self.stride = 3, 1, 1
        self.basis = nn.ParameterList([torch.ones(400)])
        self.bias = nn.Parameter(torch.zeros(2))


def test_convolutions_that_compute_their_kernel():
    class Attributes(R2Conv):
        in_channels = out_channels = 2

    norm = spectral_norm(nn.Conv2d(2, 2, 3))
    model = nn.Sequential(R2Conv(), Attributes(), nn.Linear(2, 2), norm)
    with pytest.warns(UserWarning, match='belong to unsupported layers'):
        summary = mmpeft.inject(model, LORA)
    assert summary.unknown == {'0': 402, '1': 402, '3': 38}
    assert [row.name for row in summary.rows] == ['2.weight']
