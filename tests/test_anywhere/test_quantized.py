"""Quantized weights are refused by inject, with the name of the layer."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError

LORA = dict(type='LoRA', rank=1)


def named(module, name, base):
    """A class as a library that is not installed has it."""
    return type(name, (base,), dict(__module__=module, __qualname__=name))


def bitsandbytes(name):
    layer = nn.Linear(4, 4)
    layer.__class__ = named('bitsandbytes.nn.modules', name, nn.Linear)
    return layer


def bitsandbytes_tensor(name):
    layer = nn.Linear(4, 4)
    kind = named('bitsandbytes.nn.modules', name, nn.Parameter)
    layer.weight = torch.Tensor._make_subclass(kind, torch.ones(4, 4))
    return layer


def integers():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def packed():
    layer = nn.Module()
    layer.register_buffer('qweight', torch.ones(4, 4, dtype=torch.int32))
    return layer


def float8():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), False)
    return layer


def dynamic():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))[0]


CASES = dict(
    linear4bit=(lambda: bitsandbytes('Linear4bit'), 'is a bitsandbytes.nn.modules.Linear4bit'),
    linear8bit=(lambda: bitsandbytes('Linear8bitLt'), 'is a bitsandbytes.nn.modules.Linear8bitLt'),
    params4bit=(lambda: bitsandbytes_tensor('Params4bit'), 'has a weight of type .*Params4bit'),
    int8params=(lambda: bitsandbytes_tensor('Int8Params'), 'has a weight of type .*Int8Params'),
    integers=(integers, 'has a weight of torch.int8'),
    packed=(packed, 'has a qweight of torch.int32'),
    float8=(float8, 'has a weight of torch.float8_e4m3fn'),
    dynamic=(dynamic, 'is a torch.ao.nn.quantized.dynamic'),
)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('method', ['LoRA', 'HoulsbyAdapter', 'BitFit'])
def test_the_layer_is_named(case, method):
    build, message = CASES[case]
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(build()))
    with pytest.raises(UsageError, match=f'^1.0 {message}.*: it is quantized'):
        mmpeft.inject(model, dict(type=method))
    assert not hasattr(model, 'peft') and model[0].weight.requires_grad
    mmpeft.inject(model, LORA, dict(module='0'))


@pytest.mark.parametrize('mark', [dict(hf_quantizer=object()), dict(is_quantized=True)])
def test_a_model_that_transformers_quantized(mark):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    vars(model[0]).update(mark)
    for module in ('', '0', '0.0'):
        with pytest.raises(UsageError, match='^0 was quantized by transformers'):
            mmpeft.inject(model, LORA, dict(module=module))
    mmpeft.inject(model, LORA, dict(module='1'))


def test_tensors_of_torchao():
    from torchao import quantization

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config, lambda module, name: name == '1')
    with pytest.raises(UsageError, match='^1 has a weight of type torchao'):
        mmpeft.inject(model, LORA)
