"""Plain checkpoints into adapted models, and adapted models into plain files."""

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from tests.cases import randomize
from tests.hf_zoo import HF
from tests.networks import Net, Tied, assert_same, snapshot

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
LORA, IDS = dict(type='LoRA', rank=2), torch.arange(6)[None]
PLAIN = 'Write mmpeft.load_base'
SAVES = 'Write mmpeft.save_pretrained'


def changed(state):
    """Other values; what is tied stays so."""
    memo = {}
    return {
        k: memo.setdefault(v.data_ptr(), v + 1 if v.is_floating_point() else v)
        for k, v in state.items()
    }


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return call(*args, **kwargs)


@pytest.fixture
def model():
    model = Net().eval()
    mmpeft.inject(model, LORA, dict(module='backbone'))
    mmpeft.inject(model, dict(type='BitFit'), dict(module='head'))
    randomize(model, 0.1)
    return model


def test_a_base_is_loaded_below_the_adapters(model):
    plain = Net().eval()
    adapters, state = mmpeft.adapter_state_dict(model), changed(plain.state_dict())
    adapters = {k: v.clone() for k, v in adapters.items() if 'parametrizations' in k}
    assert quiet(mmpeft.load_base, model, state) is model
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in adapters.items())
    mmpeft.remove(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    quiet(mmpeft.load_base, model, plain.state_dict())
    assert torch.equal(model.head.weight, plain.head.weight)


def test_one_name_of_a_tied_weight_is_enough():
    model = Tied()
    mmpeft.inject(model, LORA, dict(kinds=('linear', 'embedding')))
    weight = torch.ones(9, 6)
    mmpeft.load_base(model, {'embed.weight': weight})
    assert torch.equal(model.out.parametrizations.weight.original, weight)
    before = snapshot(model)
    with pytest.raises(UsageError, match='one tied weight in the model, and differ'):
        mmpeft.load_base(model, {'embed.weight': weight, 'out.weight': 2 * weight})
    assert_same(model, before)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(new=torch.ones(1)), r'1 unexpected \(new\)'),
        ({'head.weight': None}, r'1 missing \(head.weight\)'),
        ({'head.bias': torch.ones(4)}, r'another shape \(head.bias \(\(4,\), in the model \(3,\)'),
        ({'backbone.0.pw.weight': None, 'x': torch.ones(1)}, r'1 unexpected \(x\) and 1 missing'),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(model, change, message):
    state = {k: v for k, v in (changed(Net().state_dict()) | change).items() if v is not None}
    before = snapshot(model)
    with pytest.raises(UsageError, match=message):
        mmpeft.load_base(model, state)
    assert_same(model, before)
    mmpeft.merge(model, reversible=True)
    with pytest.raises(UsageError, match='mmpeft.unmerge'):
        mmpeft.load_base(model, Net().state_dict())


@pytest.mark.parametrize('through', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_plain_state_dict_warns(model, through, tmp_path):
    state, own = Net().state_dict(), model.state_dict()
    path = mmpeft.save_adapter(model, tmp_path / 'adapter.safetensors')
    for each in (model, through(model)):
        with pytest.warns(UserWarning, match=f'backbone.0.dw.weight, .*{PLAIN}') as caught:
            each.load_state_dict(state, strict=False)
        assert len(caught) == 1 and caught[0].filename == __file__
        backbone = {k.removeprefix('backbone.'): v for k, v in state.items() if 'backbone' in k}
        with pytest.warns(UserWarning, match=f'such as 0.dw.weight, .*{PLAIN}') as caught:
            each.backbone.load_state_dict(backbone, strict=False)
        assert len(caught) == 1
        wrapped = nn.DataParallel(each)
        with pytest.warns(UserWarning, match=f'module.backbone.0.dw.weight, .*{PLAIN}') as caught:
            wrapped.load_state_dict({f'module.{k}': v for k, v in state.items()}, strict=False)
        assert len(caught) == 1
        quiet(each.load_state_dict, own)
        quiet(each.load_state_dict, mmpeft.adapter_state_dict(each), strict=False)
        quiet(mmpeft.load_adapter, each, path, check_base=False)
        mmpeft.merge(each, reversible=True)
        quiet(each.load_state_dict, each.state_dict())
        mmpeft.unmerge(each)
        with pytest.warns(UserWarning, match=PLAIN):
            each.load_state_dict(OrderedDict(state), strict=False)
        mmpeft.remove(each)
        quiet(each.load_state_dict, state)
        assert not any(m._load_state_dict_pre_hooks for m in each.modules())


@pytest.mark.parametrize('method', ['LoRA', 'HoulsbyAdapter'])
def test_save_pretrained_of_an_adapted_model_warns(method, tmp_path):
    model = HF['gpt2'].build()
    mmpeft.inject(model, dict(type=method), dict(module='transformer'))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for part in (each, each.transformer):
            with pytest.warns(UserWarning, match=f'{SAVES}.*or mmpeft.save_adapter'):
                part.save_pretrained(tmp_path / 'adapted')
        mmpeft.remove(each)
        quiet(each.save_pretrained, tmp_path / 'plain')


@pytest.mark.filterwarnings('ignore:The file that GPT2LMHeadModel.save_pretrained writes')
@pytest.mark.parametrize('method, kinds', [('FacT', None), ('LoRA', ('linear', 'embedding'))])
def test_what_adapters_share_is_written_once(method, kinds, tmp_path):
    """transformers refuses a file with a tensor under two names; its Trainer resumes from one."""

    def adapted():
        model = HF['gpt2'].build().double().eval()
        mmpeft.inject(model, dict(type=method, rank=2), dict(kinds=kinds))
        return model

    model = adapted()
    randomize(model)
    for state in ({}, dict(state_dict=model.state_dict())):
        model.save_pretrained(tmp_path, **state)
        other = adapted()
        written = load_file(tmp_path / 'model.safetensors')
        assert not other.load_state_dict(written, strict=False).unexpected_keys
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_layers_that_were_replaced_after_injection_are_named(tmp_path):
    """Their adapters are gone, and what takes their place may train as a whole."""
    model = HF['llama'].build()
    mmpeft.inject(model, LORA)
    optimizer = torch.optim.SGD(model.parameters())
    quiet(mmpeft.monitor, model, optimizer)
    quiet(mmpeft.save_adapter, model, tmp_path / 'before.safetensors')
    model.resize_token_embeddings(60, mean_resizing=False)
    with pytest.warns(UserWarning, match=r'1 of 15 adapters.*the layer of lm_head\.weight was'):
        mmpeft.monitor(model, optimizer)
    with pytest.warns(UserWarning, match='Call what replaces layers'):
        mmpeft.save_adapter(model, tmp_path / 'after.safetensors')


def test_an_adapted_model_is_saved_as_a_plain_one(tmp_path):
    model = HF['gpt2'].build().double().eval()
    mmpeft.inject(model, LORA, dict(include=('attn', 'lm_head')))
    randomize(model)
    expected, before = model(IDS).logits, snapshot(model)
    quiet(mmpeft.save_pretrained, model, tmp_path, max_shard_size='1GB')
    assert_same(model, before)
    loaded, info = hf.GPT2LMHeadModel.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not info['missing_keys'] and not info['unexpected_keys']
    torch.testing.assert_close(loaded.eval()(IDS).logits, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(UsageError, match='Net has no save_pretrained'):
        mmpeft.save_pretrained(Net(), tmp_path)


def test_a_base_is_loaded_through_wrappers(model):
    state = changed(Net().state_dict())
    wrapped = torch.compile(model)
    assert mmpeft.load_base(wrapped, state) is wrapped
    mmpeft.remove(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('above', [False, True], ids=['model', 'above'])
@pytest.mark.parametrize('method', ['FacT', 'LoTR'])
def test_assign_keeps_shared_factors_shared(method, above):
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    mmpeft.inject(model, dict(type=method, rank=2))
    randomize(model)
    whole = nn.Sequential(model) if above else model
    before = list(whole.parameters())
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    whole.load_state_dict(state, assign=True)
    after = list(whole.parameters())
    assert len(after) == len(before) and not any(a is b for a, b in zip(after, before, strict=True))
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    assert set(state) == set(whole.state_dict())
