"""GLoRA is three methods at once."""

import copy

import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
from tests.cases import randomize


def test_glora_is_liera_and_lora_and_bitfit():
    plain = nn.Linear(6, 5).double()
    model = copy.deepcopy(plain)
    methods = dict(type='LieRA', rank=2, scale=1.0), dict(type='LoRA', rank=2), dict(type='BitFit')
    for method in methods:
        mmpeft.inject(model, method)
    randomize(model)
    lie, added = (a.lora_B @ a.lora_A for a in adapters_of(model, 'weight'))
    # Any C and D; E is what remains of the shift.
    c, d = torch.randn(6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    e = adapters_of(model, 'bias')[0].shift - plain.bias * d - plain.weight @ c
    x = torch.randn(3, 6, dtype=torch.float64)
    weight = plain.weight + plain.weight * lie + added
    bias = plain.bias + plain.bias * d + e + plain.weight @ c
    torch.testing.assert_close(model(x), x @ weight.T + bias, rtol=1e-12, atol=1e-12)
