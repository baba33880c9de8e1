"""Checkpoints of other heads: refused where they would be used, reported where training starts."""

import pytest
import torch
from mmengine.runner import Runner

import mmpeft
from mmpeft.engine.launch import build_runner, check_checkpoint
from mmpeft.errors import UsageError
from tests import toy

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
MISFIT = r'2 tensors are missing or of another shape \(head\.bias: \(3,\) in the file, \(7,\) in'


@pytest.fixture
def more_classes(monkeypatch):
    """Call it, and models have a head of seven classes instead of three."""
    original = toy.ToyClassifier.__init__

    def init(self, backbone):
        original(self, backbone)
        self.head = torch.nn.Linear(16, 7)

    return lambda: monkeypatch.setattr(toy.ToyClassifier, '__init__', init)


def plain(cfg):
    cfg.default_hooks.pop('peft')
    return cfg


@pytest.fixture(params=['adapters', 'plain'])
def checkpoint(request, tmp_path, more_classes):
    """Saved by a run with three classes; the models after it have seven."""
    cfg = toy.toy_config(tmp_path / 'run')
    Runner.from_cfg(cfg if request.param == 'adapters' else plain(cfg)).train()
    more_classes()
    return str(tmp_path / 'run/epoch_3.pth')


def test_other_heads_are_not_tested(checkpoint, tmp_path):
    cfg = toy.toy_config(tmp_path / 'test', load_from=checkpoint)
    with pytest.raises(UsageError, match=MISFIT):
        Runner.from_cfg(cfg).test()
    with pytest.raises(UsageError, match=MISFIT):
        Runner.from_cfg(cfg).val()


def test_unless_the_hook_says_so(checkpoint, tmp_path, warned):
    changes = {'default_hooks.peft.check_whole': False}
    toy.toy_runner(tmp_path / 'test', load_from=checkpoint, **changes).test()
    assert any('head.bias: (3,) in the file, (7,) in the model' in text for text in warned)


def test_training_starts_from_other_heads(checkpoint, tmp_path, warned):
    toy.toy_runner(tmp_path / 'next', load_from=checkpoint).train()
    (text,) = [text for text in warned if 'head.bias' in text]
    assert checkpoint in text and 'The model keeps its own values there.' in text
    state = toy.state_of(tmp_path / 'next/epoch_3.pth')
    assert state['head.bias'].shape == (7,)


def test_a_base_of_other_heads_is_reported(tmp_path, more_classes, monkeypatch):
    said = []
    monkeypatch.setattr('mmpeft.engine.loading.print_log', lambda text, *_: said.append(text))
    Runner.from_cfg(plain(toy.toy_config(tmp_path / 'run'))).train()
    more_classes()
    base = {'default_hooks.peft.base_checkpoint': str(tmp_path / 'run/epoch_3.pth')}
    toy.toy_runner(tmp_path / 'next', **base).train()
    assert any('head.bias: (3,) in the file' in text for text in said)


def test_other_heads_are_not_resumed(tmp_path, more_classes):
    toy.toy_runner(tmp_path, **{'train_cfg.max_epochs': 2}).train()
    more_classes()
    with pytest.raises(UsageError, match=MISFIT):
        toy.toy_runner(tmp_path, resume=True).train()


def test_configs_without_the_hook(tmp_path, more_classes, warned):
    """Runners of the tools refuse the same."""
    plain_run, adapted_run = tmp_path / 'plain', tmp_path / 'adapted'
    build_runner(plain(toy.toy_config(plain_run))).train()
    toy.toy_runner(adapted_run).train()
    checkpoint = str(plain_run / 'epoch_3.pth')
    build_runner(plain(toy.toy_config(tmp_path / 'a', load_from=checkpoint))).test()
    with pytest.raises(UsageError, match=r'holds adapters \(FLoRA\), and .* has no PEFTHook'):
        build_runner(plain(toy.toy_config(adapted_run, resume=True))).train()
    more_classes()
    other = plain(toy.toy_config(tmp_path / 'b', load_from=checkpoint))
    with pytest.raises(UsageError, match=MISFIT):
        build_runner(other).test()
    build_runner(other).train()
    assert any('head.bias' in text for text in warned)


def test_adapters_that_the_run_cannot_load(tmp_path):
    """A config without the hook, and an adapter file in place of the checkpoint beside it."""
    toy.toy_runner(tmp_path).train()
    with pytest.raises(UsageError, match=r'epoch_3\.pth holds adapters \(FLoRA\), and .* no PEFTH'):
        check_checkpoint(tmp_path / 'epoch_3.pth', plain(toy.toy_config(tmp_path)))
    adapter = str(tmp_path / 'epoch_3.safetensors')
    with pytest.raises(UsageError, match=r"safetensors file, .* beside it is '.*epoch_3\.pth'"):
        toy.toy_runner(tmp_path / 'test', load_from=adapter).test()


def test_names_of_earlier_versions_are_translated(tmp_path, monkeypatch):
    """By a module's own loading, as mmdet's and mmpretrain's do."""
    build_runner(plain(toy.toy_config(tmp_path / 'run'))).train()
    path = tmp_path / 'run/epoch_3.pth'
    whole = torch.load(path, weights_only=False)
    whole['state_dict']['former.bias'] = whole['state_dict'].pop('head.bias')
    torch.save(whole, path)

    def load(self, state, prefix, *others):
        if 'former.bias' in state:
            state['head.bias'] = state.pop('former.bias')
        torch.nn.Module._load_from_state_dict(self, state, prefix, *others)

    cfg = plain(toy.toy_config(tmp_path / 'test', load_from=str(path)))
    with pytest.raises(UsageError, match='1 tensors are missing'):
        build_runner(cfg).test()
    monkeypatch.setattr(toy.ToyClassifier, '_load_from_state_dict', load)
    build_runner(cfg).test()


def test_a_file_without_the_backbone_is_not_tested(tmp_path):
    """Merged weights under other names, or a state dict without its description."""
    toy.toy_runner(tmp_path / 'run').train()
    state = toy.state_of(tmp_path / 'run/epoch_3.pth')
    heads = {key: value for key, value in state.items() if key.startswith('head')}
    for content, message in ((heads, 'is not whole'), (state, 'without what describes them')):
        path = str(tmp_path / 'other.pth')
        torch.save(dict(state_dict=content), path)
        cfg = toy.toy_config(tmp_path / 'test', load_from=path)
        with pytest.raises(UsageError, match=message):
            Runner.from_cfg(cfg).test()
        with pytest.raises(UsageError, match=message):
            mmpeft.init_model(toy.toy_config(tmp_path / 'test'), path)


@pytest.mark.parametrize('more', [True, False])
def test_another_unfreeze_is_named(more, tmp_path):
    few, many = {}, {'default_hooks.peft.unfreeze': ['fc.bias']}
    trained, tested = (few, many) if more else (many, few)
    toy.toy_runner(tmp_path / 'run', **trained).train()
    cfg = toy.toy_config(tmp_path / 'test', load_from=str(tmp_path / 'run/epoch_3.pth'), **tested)
    side = 'model' if more else 'file'
    with pytest.raises(UsageError, match=rf'in the {side} alone \(.*fc.bias\).*the unfreeze'):
        Runner.from_cfg(cfg).test()
