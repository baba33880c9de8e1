"""What is in an adapter file, the JSON beside it, and those beside a run's checkpoints."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mmpeft
from mmpeft.checkpoint import adapter_file
from mmpeft.checkpoint.adapter_file import read_adapter
from mmpeft.checkpoint.fingerprint import fingerprint
from mmpeft.checkpoint.keys import adapter_keys
from mmpeft.errors import UsageError
from mmpeft.injection.weights import plain_key
from tests.cases import randomize
from tests.networks import TwinNet as Net
from tests.toy import ToyClassifier, ToyScores, state_of, toy_runner

METHOD = dict(type='FLoRA', rank=2, kernel_rank=1)
TARGETS = dict(module='backbone', exclude=['1'])


@pytest.fixture
def model():
    model = Net()
    mmpeft.inject(model, METHOD, TARGETS, unfreeze=['2'])
    randomize(model)
    return model


def test_a_file_says_what_it_is(model, tmp_path):
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    with safe_open(path, framework='pt') as file:
        metadata = file.metadata()
    description = json.loads(metadata['mmpeft'])
    assert metadata.keys() == {'mmpeft', 'sha256'}
    (injection,), (method,) = description['injections'], description['methods']
    assert injection['method'] | METHOD == injection['method'] == method
    assert injection['module'] == 'backbone'
    assert injection['trained'] == ['2.weight', '2.bias']
    place = dict(tensor='weight', method=0, injection=0)
    assert description['adapters'] == [dict(path='backbone.0', **place)]
    assert description['fingerprint'] == fingerprint(model)
    assert description['version'] == mmpeft.__version__
    assert description['torch'] == torch.__version__
    assert description['parameters'] == mmpeft.summary(model).adapters > 0


def test_files_of_one_state_are_equal_byte_for_byte(tmp_path):
    """Whatever is in names and in the manifest, and in what order adapters were made."""
    model = nn.ModuleDict({'größe "\\\x7f\n': nn.Linear(3, 3), '\U0001f600': nn.Linear(3, 3)})
    mmpeft.inject(model, METHOD)
    paths = [mmpeft.save_adapter(model, tmp_path / f'{i}' / 'a.safetensors') for i in range(8)]
    assert len({path.read_bytes() for path in paths}) == 1
    assert len({adapter_file.json_beside(path).read_bytes() for path in paths}) == 1
    state = mmpeft.adapter_state_dict(model)
    _, read = read_adapter(paths[0])
    assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)


def test_the_json_beside_it_says_the_same_and_more(model, tmp_path):
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    assert {p.name for p in tmp_path.iterdir()} == {'a.safetensors', 'a.safetensors.json'}
    readable = json.loads((tmp_path / 'a.safetensors.json').read_text())
    description, state = read_adapter(path)
    assert readable | description == readable
    assert readable['file'] == 'a.safetensors'
    assert readable['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert readable['tensors'].keys() == state.keys()
    assert readable['tensors']['head.weight'] == 'float32 [3, 4]'


def test_a_model_that_cannot_be_adapted_as_the_file_says_is_as_it_was(model, tmp_path, monkeypatch):
    """Even where memory ends in the middle of it."""
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    base = Net()
    base.backbone.load_state_dict(mmpeft.remove(copy.deepcopy(model)).backbone.state_dict())
    before = copy.deepcopy(base.state_dict())

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(adapter_file, 'fill_frozen', fail)
    with pytest.raises(MemoryError):
        mmpeft.load_adapter(base, path, check_base=False)
    assert base.state_dict().keys() == before.keys() and not hasattr(base, 'peft')
    assert all(p.requires_grad for p in base.parameters())


def test_a_tied_head_and_a_channels_last_one_are_stored(tmp_path):
    model = Net().to(memory_format=torch.channels_last)
    model.head = nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)
    model.again = nn.Conv2d(4, 3, 2)
    model.again.weight = model.head.weight
    plain = copy.deepcopy(model)
    mmpeft.inject(model, METHOD, dict(module='backbone'))
    with torch.no_grad():
        model.head.weight.add_(1)
    loaded = mmpeft.load_adapter(plain, mmpeft.save_adapter(model, tmp_path / 'a.safetensors'))
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert loaded.again.weight is loaded.head.weight


def test_another_head_is_refused_before_anything_is_loaded(model, tmp_path):
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    other = mmpeft.remove(model)
    other.head = nn.Linear(4, 5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UsageError, match=r"'head.bias': \(3,\).*file, \(5,\).*in the model"):
        mmpeft.load_adapter(other, path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        if not hasattr(self, 'bases'):
            self.register_buffer('bases', torch.rand(3))
        return self.head(self.body(x) * self.bases)


def test_a_buffer_that_is_made_in_the_first_forward_pass_is_stored_and_loaded(tmp_path):
    """Into an adapted model and a plain one; a library, whose base has none, refuses it."""
    base, x = Late(), torch.randn(2, 3)
    model, adapted = copy.deepcopy(base), copy.deepcopy(base)
    mmpeft.inject(model, METHOD, dict(module='body'))
    mmpeft.inject(adapted, METHOD, dict(module='body'))
    randomize(model)
    expected = model(x)
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    with pytest.raises(UsageError, match="'bases': .* none in the model"):
        mmpeft.AdapterLibrary(base).load('a', path)
    for other in (adapted, base):
        mmpeft.load_adapter(other, path)
        assert torch.equal(other(x), expected)
    mmpeft.merge(base)
    assert torch.equal(base.state_dict()['bases'], model.bases)


def test_other_dtypes_are_let_in_with_another_base_alone(model, tmp_path):
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    double = mmpeft.remove(model).double()
    with pytest.raises(UsageError, match='float32.*float64'):
        mmpeft.load_adapter(copy.deepcopy(double), path)
    loaded = mmpeft.load_adapter(double, path, check_base=False)
    assert loaded.head.weight.dtype == torch.float64


def changed_in_one_element(base):
    base.backbone[0].weight.data[0, 0, 0, 0] += 1e-6


def changed_in_sign_of_zero(base):
    base.backbone[2].running_mean.neg_()


def changed_in_a_counter(base):
    base.backbone[2].num_batches_tracked += 1


def in_another_precision(base):
    base.backbone[1].half()


@pytest.mark.parametrize(
    'change',
    [changed_in_one_element, changed_in_sign_of_zero, changed_in_a_counter, in_another_precision],
)
def test_a_base_that_was_changed_is_refused(change, tmp_path):
    base = Net()
    model = copy.deepcopy(base)
    mmpeft.inject(model, METHOD, dict(module='backbone', include=['0']))
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    mmpeft.load_adapter(copy.deepcopy(base), path)
    change(base)
    prints = fingerprint(model)[:16], fingerprint(base, model)[:16]
    assert prints[0] != prints[1]
    with pytest.raises(UsageError, match='{}.*{}.*check_base=False'.format(*prints)):
        mmpeft.load_adapter(base, path)
    assert not hasattr(base, 'peft')


CHECKPOINTS = 'default_hooks.checkpoint'


@pytest.fixture
def first_score(monkeypatch):
    """A number to choose the best checkpoint by, which grows."""
    scores = iter(range(100))
    monkeypatch.setattr(ToyScores, 'compute_metrics', lambda *_: dict(first=next(scores)))
    return {f'{CHECKPOINTS}.save_best': 'toy/first', f'{CHECKPOINTS}.rule': 'greater'}


def adapters_in(folder):
    return {path.name for path in folder.glob('*.safetensors*')}


def beside(*names):
    return {f'{name}.safetensors{more}' for name in names for more in ('', '.json')}


def test_each_kept_checkpoint_has_its_adapter_beside_it(first_score, tmp_path):
    changes = {f'{CHECKPOINTS}.max_keep_ckpts': 2} | first_score
    toy_runner(tmp_path, **changes).train()
    kept = {'epoch_2', 'epoch_3', 'best_toy_first_epoch_3'}
    assert {path.stem for path in tmp_path.glob('*.pth')} == kept
    assert adapters_in(tmp_path) == beside(*kept)
    for name in kept:
        description, state = read_adapter(tmp_path / f'{name}.safetensors')
        stored = state_of(tmp_path / f'{name}.pth')
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[key], stored[key]) for key in stored)
        meta = torch.load(tmp_path / f'{name}.pth', weights_only=False)['meta']['mmpeft']
        assert meta | description == meta


def test_the_adapter_of_a_run_loads_into_a_plain_model(tmp_path):
    """With EMA it holds the averaged weights, as the checkpoint's state dict does."""
    ema = dict(custom_hooks=[dict(type='EMAHook', momentum=0.1)])
    changes = {'default_hooks.peft.save_frozen': True} | ema
    runner = toy_runner(tmp_path, **changes)
    plain = copy.deepcopy(runner.model)
    plain.init_weights()
    runner.train()
    assert isinstance(plain, ToyClassifier)
    frozen = state_of(tmp_path / 'epoch_3.pth')
    plain.load_state_dict({plain_key(k): v for k, v in frozen.items()}, strict=False)
    loaded = mmpeft.load_adapter(plain, tmp_path / 'epoch_3.safetensors')
    assert all(torch.equal(value, frozen[key]) for key, value in loaded.state_dict().items())
    key = next(iter(adapter_keys(loaded)))
    assert not torch.equal(loaded.state_dict()[key], runner.model.state_dict()[key])


def test_adapter_files_can_be_left_out(tmp_path):
    toy_runner(tmp_path, **{'default_hooks.peft.save_adapters': False}).train()
    assert not adapters_in(tmp_path) and len(list(tmp_path.glob('*.pth'))) == 3


def test_a_backend_of_the_config_keeps_its_way(tmp_path):
    runner = toy_runner(tmp_path, **{f'{CHECKPOINTS}.backend_args': dict(backend='local')})
    said = []
    runner.logger.warning = said.append
    runner.train()
    assert not adapters_in(tmp_path) and len(list(tmp_path.glob('*.pth'))) == 3
    assert any('own file backend' in text for text in said)


@pytest.mark.parametrize('template', ['model.{}', 'v1.{}.pth', 'a[b]_{}.pth'])
def test_whatever_a_checkpoint_is_called_and_where_it_goes(template, tmp_path):
    changes = {
        f'{CHECKPOINTS}.filename_tmpl': template,
        f'{CHECKPOINTS}.out_dir': str(tmp_path / 'out'),
        'param_scheduler': None,
    }
    toy_runner(tmp_path / 'work', **changes, **{'train_cfg.max_epochs': 2}).train()
    (tmp_path / 'work/last_checkpoint').unlink()
    toy_runner(tmp_path / 'work', **changes, resume=True).train()
    names = [template.format(epoch).removesuffix('.pth') for epoch in (1, 2, 3)]
    assert adapters_in(tmp_path / 'out/work') == beside(*names)


def test_an_older_checkpoint_goes_when_the_next_one_is_whole(tmp_path):
    """mmengine takes it away before it writes the next."""
    runner = toy_runner(tmp_path, **{f'{CHECKPOINTS}.max_keep_ckpts': 1})
    save, seen = runner.save_checkpoint, []

    def saving(*args, **kwargs):
        seen.append({path.name for path in tmp_path.glob('*.pth')})
        save(*args, **kwargs)

    runner.save_checkpoint = saving
    runner.train()
    assert seen == [set(), {'epoch_1.pth'}, {'epoch_2.pth'}]
    assert {path.name for path in tmp_path.glob('*.pth')} == {'epoch_3.pth'}
    assert adapters_in(tmp_path) == beside('epoch_3')


def test_other_programs_may_add_metadata(model, tmp_path):
    path = mmpeft.save_adapter(model, tmp_path / 'a.safetensors')
    with safe_open(path, framework='pt') as file:
        metadata = file.metadata() | dict(format='pt')
    save_file(load_file(path), path, metadata)
    assert read_adapter(path)[0] == json.loads(metadata['mmpeft'])
