"""Layers of bitsandbytes: those of 4 bits are adapted as they are, those of 8 bits are refused."""

import copy

import accelerate.hooks
import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import BertConfig, BertModel, BitsAndBytesConfig

import mmpeft
from mmpeft.checkpoint.fingerprint import fingerprint
from mmpeft.errors import UsageError
from mmpeft.quantization import Quantized, adopted
from tests.cases import randomize

LORA = dict(type='LoRA', rank=1)


def weight(kind, nested, dtype=torch.float32, shape=(80, 256)):
    torch.manual_seed(0)
    settings = dict(requires_grad=False, quant_type=kind, compress_statistics=nested)
    return bitsandbytes.nn.Params4bit(torch.randn(shape, dtype=dtype) / 16, **settings).to('cpu')


def network(kind='nf4', nested=True):
    """A network with one layer of bitsandbytes, and the same with its values in a plain layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 80)).eval()
    plain = copy.deepcopy(model)
    layer = bitsandbytes.nn.Linear4bit(256, 80, quant_type=kind)
    layer.weight, layer.bias = weight(kind, nested), model[2].bias
    model[2] = layer
    stored = layer.weight
    plain[2].weight = nn.Parameter(dequantize_4bit(stored.data, stored.quant_state))
    return model, plain


@pytest.mark.parametrize('kind', ['nf4', 'fp4'])
@pytest.mark.parametrize('nested', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_bitsandbytes_to_the_last_bit(kind, nested, dtype):
    stored = weight(kind, nested, dtype)
    own, expected = adopted(stored), dequantize_4bit(stored.data, stored.quant_state)
    assert isinstance(own, Quantized) and own.dtype == dtype
    assert torch.equal(own.values(), expected)
    assert own.quantized_data.data_ptr() == stored.data_ptr()  # and no copy


@pytest.mark.parametrize('kind, nested', [('nf4', True), ('fp4', False)])
@pytest.mark.parametrize('method', [LORA, dict(type='DoRA', rank=1), dict(type='SSF')])
def test_equals_the_network_of_the_values(kind, nested, method, tmp_path):
    """Outputs, gradients, files, merged and removed."""
    model, plain = network(kind, nested)
    x = torch.randn(3, 64)
    expected = model(x)
    torch.testing.assert_close(plain(x), expected)
    for each in (model, plain):
        torch.manual_seed(0)
        mmpeft.inject(each, method)
        torch.testing.assert_close(each(x), expected)
        randomize(each)
        each(x).square().sum().backward()
    assert isinstance(model[2].parametrizations.weight.original, Quantized)
    torch.testing.assert_close(model(x), plain(x))
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    grads = [(a.grad, b.grad) for a, b in pairs if a.grad is not None]
    assert len(grads) >= 4
    for one, other in grads:
        torch.testing.assert_close(one, other)
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    loaded = mmpeft.load_adapter(network(kind, nested)[0], path)
    assert torch.equal(loaded(x), model(x))
    assert fingerprint(loaded).startswith('bitsandbytes-')
    with pytest.raises(UsageError, match='base'):
        mmpeft.load_adapter(network('fp4' if kind == 'nf4' else 'nf4', nested)[0], path)
    mmpeft.merge(loaded)
    assert type(loaded[2]) is nn.Linear and type(loaded[2].weight) is nn.Parameter
    torch.testing.assert_close(loaded(x), plain(x))
    mmpeft.remove(model)
    torch.testing.assert_close(model(x), expected)


def test_a_transformer_that_from_pretrained_quantized(tmp_path):
    """It has hooks of accelerate, which call the forward that a layer had before."""
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')
    model = BertModel.from_pretrained(tmp_path, quantization_config=config, device_map='cpu').eval()
    hook = accelerate.hooks.AlignDevicesHook('cpu')
    for module in list(model.modules()):
        if not hasattr(module, '_hf_hook') and len(module.state_dict()):
            accelerate.hooks.add_hook_to_module(module, hook)
    words = torch.arange(10)[None]
    expected = model(words).last_hidden_state
    found = mmpeft.inject(model, LORA, dict(module='encoder'))
    assert 0 < found.stored['bitsandbytes'] < 6 * 64 * 64 * 0.6
    close = dict(rtol=1e-2, atol=5e-3)  # float16, and bitsandbytes computes in float32
    torch.testing.assert_close(model(words).last_hidden_state, expected, **close)
    randomize(model)
    changed = model(words).last_hidden_state
    assert not torch.allclose(changed, expected, **close)
    mmpeft.merge(model)
    torch.testing.assert_close(model(words).last_hidden_state, changed, **close)


def test_other_values_are_not_rounded_to_it():
    model, plain = network()
    mmpeft.inject(model, LORA)
    with pytest.raises(RuntimeError, match='in the format of bitsandbytes keep their values'):
        mmpeft.load_base(model, {k: v + 1 for k, v in plain.state_dict().items()})
    with pytest.raises(UsageError, match='keep their values'):
        mmpeft.inject(network()[1], LORA, frozen_dtype='bitsandbytes')
    with pytest.raises(UsageError, match="2.weight is stored in 'bitsandbytes' already"):
        mmpeft.inject(network()[0], LORA, frozen_dtype='nf4')


def test_what_is_not_of_4_bits_or_not_quantized_yet_is_refused():
    eight = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to('cpu')
    for layer, kind in ((eight, 'Int8Params'), (bitsandbytes.nn.Linear4bit(64, 64), 'Params4bit')):
        with pytest.raises(UsageError, match=f'^0 has a weight of type bitsandbytes.*{kind}'):
            mmpeft.inject(nn.Sequential(layer), LORA)


def test_save_pretrained_writes_plain_weights_that_load(tmp_path):
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / 'plain')
    config = BitsAndBytesConfig(load_in_4bit=True)
    models = [
        BertModel.from_pretrained(
            tmp_path / 'plain', quantization_config=config, device_map='cpu', dtype=torch.float32
        ).eval()
        for _ in range(2)
    ]
    model, part = models
    mmpeft.inject(model, LORA)
    randomize(model)
    words = torch.arange(10)[None]
    expected = model(words).last_hidden_state
    mmpeft.save_pretrained(model, tmp_path / 'merged')
    assert model.is_quantized and model.config.quantization_config.load_in_4bit
    loaded = BertModel.from_pretrained(tmp_path / 'merged').eval()
    assert type(loaded.encoder.layer[0].output.dense) is nn.Linear
    torch.testing.assert_close(loaded(words).last_hidden_state, expected)
    mmpeft.inject(part, LORA, dict(module='encoder.layer.0.attention'))
    with pytest.raises(UsageError, match=r'intermediate.dense.weight is quantized still'):
        mmpeft.save_pretrained(part, tmp_path / 'part')
