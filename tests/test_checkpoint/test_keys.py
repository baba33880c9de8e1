"""Adapter files and the fingerprint of their base."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mmpeft
from mmpeft.checkpoint.atomic import replacing
from mmpeft.checkpoint.fingerprint import fingerprint
from mmpeft.checkpoint.keys import frozen_keys
from mmpeft.errors import UsageError
from mmpeft.injection.weights import plain_key
from tests.cases import randomize
from tests.networks import Net, Tied

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

LORA = dict(type='LoRA', rank=2)
BACKBONE = dict(module='backbone')


@pytest.fixture
def base():
    return Net().double().eval()


@pytest.fixture
def model(base):
    model = copy.deepcopy(base)
    mmpeft.inject(model, LORA, BACKBONE)
    randomize(model)
    with torch.no_grad():
        model.head.bias.add_(1)
    return model


def test_a_file_holds_adapters_and_heads_alone(model, tmp_path):
    state = load_file(mmpeft.save_adapter(model, tmp_path / 'a.safetensors'))
    assert {k.split('.')[0] for k in state} == {'backbone', 'head'}
    assert all('lora' in k for k in state if k.startswith('backbone'))
    assert state.keys() | set(frozen_keys(model)) == model.state_dict().keys()


def test_loading_into_a_plain_base_adapts_it(base, model, tmp_path):
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    loaded = mmpeft.load_adapter(base, path)
    assert loaded is base
    assert torch.equal(loaded(x), model(x))
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if n.endswith('original'))


class Emptying(nn.Linear):
    """As mmcv's ``ConvAWS2d``, which computes its buffer anew unless the state dict has it."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer('gamma', torch.ones(4))

    def _load_from_state_dict(self, *args):
        self.gamma.fill_(-1)
        super()._load_from_state_dict(*args)


def test_buffers_that_loading_overwrites_first(tmp_path):
    model = nn.ModuleDict(dict(backbone=nn.Sequential(Emptying())))
    mmpeft.inject(model, LORA, BACKBONE)
    mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    mmpeft.load_adapter(model, tmp_path / 'a.safetensors')
    assert torch.equal(model['backbone'][0].gamma, torch.ones(4))


def test_what_was_unfrozen_is_stored_without_a_gradient_too(base, tmp_path):
    model = copy.deepcopy(base)
    mmpeft.inject(model, LORA, unfreeze=('head',))
    randomize(model)
    with torch.no_grad():
        model.head.weight.normal_()
    model.requires_grad_(False)  # as in use, and in the copies that average weights
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    loaded = mmpeft.load_adapter(base, path)
    assert all(
        torch.equal(value, loaded.state_dict()[k]) for k, value in model.state_dict().items()
    )
    mmpeft.load_adapter(model, path)


def test_tied_adapters_are_stored(tmp_path):
    model = Tied()
    plain = copy.deepcopy(model)
    mmpeft.inject(model, LORA, dict(kinds=('linear', 'embedding')))
    randomize(model)
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    index = torch.arange(9)
    assert torch.equal(mmpeft.load_adapter(plain, path)(index), model(index))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(method=dict(type='FLoRA', rank=2)), 'LoRA at .*, and the model FLoRA'),
        (dict(method=dict(type='LoRA', rank=3)), 'rank=2.*rank=3'),
        (
            dict(targets=dict(module='backbone', exclude=['0.pw'])),
            r'LoRA at .*0\.pw\.weight, and the model no adapter',
        ),
    ],
)
def test_what_does_not_fit_is_refused(base, model, change, message, tmp_path):
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    mmpeft.inject(base, **dict(method=LORA, targets=BACKBONE) | change)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(UsageError, match=message):
        mmpeft.load_adapter(base, path)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_another_base_is_refused_unless_asked_for(base, model, tmp_path):
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    with torch.no_grad():
        base.backbone[1].out.weight[0, 0, 0, 0] += 1e-12
    with pytest.raises(UsageError, match='another frozen base'):
        mmpeft.load_adapter(copy.deepcopy(base), path)
    mmpeft.load_adapter(base, path, check_base=False)


def test_the_fingerprint_is_of_the_base_alone(base, model):
    mmpeft.inject(base, dict(type='FLoRA', rank=2), BACKBONE)
    assert fingerprint(base) == fingerprint(model)
    randomize(base)
    assert fingerprint(base) == fingerprint(model)
    base.backbone[0].norm.running_var[0] += 1
    assert fingerprint(base) != fingerprint(model)


def test_files_that_are_none(base, tmp_path):
    with pytest.raises(FileNotFoundError, match='no adapter file'):
        mmpeft.load_adapter(base, tmp_path / 'none.safetensors')
    (tmp_path / 'broken.safetensors').write_bytes(b'\x08\0\0\0\0\0\0\0{"a": 1}')
    with pytest.raises(UsageError, match='damaged, or not a safetensors file'):
        mmpeft.load_adapter(base, tmp_path / 'broken.safetensors')
    save_file(dict(a=torch.zeros(1)), tmp_path / 'other.safetensors')
    with pytest.raises(UsageError, match='without a manifest'):
        mmpeft.load_adapter(base, tmp_path / 'other.safetensors')
    assert not hasattr(base, 'peft')


def test_nothing_to_save(base, tmp_path):
    with pytest.raises(UsageError, match='no adapters'):
        mmpeft.save_adapter(base, tmp_path / 'a.safetensors')
    assert not list(tmp_path.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'file'
    path.write_text('before')
    with pytest.raises(OSError, match='full'), replacing(path) as temporary:
        temporary.write_text('half')
        raise OSError('full')
    assert path.read_text() == 'before' and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text('after')
    assert path.read_text() == 'after' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    'key, plain',
    [
        ('a.fc.parametrizations.weight.original', 'a.fc.weight'),
        ('parametrizations.weight.original', 'weight'),
        ('a.fc.parametrizations.weight.0.lora_A', 'a.fc.parametrizations.weight.0.lora_A'),
        ('a.fc.bias', 'a.fc.bias'),
    ],
)
def test_plain_keys(key, plain):
    assert plain_key(key) == plain


def test_full_fine_tuning_stores_everything(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    mmpeft.inject(model, dict(type='Full'))
    assert mmpeft.adapter_state_dict(model).keys() == model.state_dict().keys()
    assert fingerprint(model) == ''
