"""Weights that another library quantized: those of torchao are adapted, others refused by name.

``test_bitsandbytes.py`` has its 4-bit layers, which are adapted too.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.checkpoint.fingerprint import fingerprint
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


CONFIGS = dict(
    int8=lambda torchao: torchao.Int8WeightOnlyConfig(),
    fp8=lambda torchao: torchao.Float8WeightOnlyConfig(),
    nf4=lambda torchao: None,
)


def of_torchao(kind):
    from torchao import quantization

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    if kind == 'nf4':
        stored = quantization.to_nf4(model[2].weight.detach(), 64, 64)
        model[2].weight = nn.Parameter(stored, False)
    else:
        config = CONFIGS[kind](quantization)
        quantization.quantize_(model, config, lambda module, name: name == '2')
    return model


@pytest.mark.parametrize('kind', CONFIGS)
def test_weights_of_torchao_are_adapted(kind, tmp_path):
    """The same values before and after, to rounding, and the same file for each such model."""
    x = torch.randn(3, 64)
    expected = of_torchao(kind)(x)
    for method in (LORA, dict(type='DoRA', rank=1), dict(type='LieRA', rank=1)):
        model = of_torchao(kind)
        mmpeft.inject(model, method)
        torch.testing.assert_close(model(x), expected)
        model(x).square().sum().backward()
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    loaded = mmpeft.load_adapter(of_torchao(kind), path)
    assert torch.equal(loaded(x), model(x))
    assert fingerprint(loaded).startswith(f'{kind}-')
    mmpeft.merge(loaded)
    torch.testing.assert_close(loaded(x), expected)


def test_torchao_may_quantize_inputs_too():
    from torchao import quantization

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    config = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model, config, lambda module, name: name == '1')
    with pytest.raises(UsageError, match='^1 has a weight of type torchao.*give frozen_dtype'):
        mmpeft.inject(model, LORA)


def test_a_transformer_that_torchao_quantized():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import BertConfig, BertModel, TorchAoConfig

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = BertModel(BertConfig(vocab_size=50, **sizes)).eval()
    quantize_(model, Int8WeightOnlyConfig())
    # What from_pretrained(..., quantization_config=TorchAoConfig(...)) leaves on a model.
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model.hf_quantizer, model.is_quantized = SimpleNamespace(quantization_config=config), True
    words = torch.arange(10)[None]
    expected = model(words).last_hidden_state
    assert mmpeft.inject(model, LORA, dict(module='encoder')).stored['int8'] > 0
    torch.testing.assert_close(model(words).last_hidden_state, expected)
