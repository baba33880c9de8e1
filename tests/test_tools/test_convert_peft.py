"""convert_peft.py: adapters of a detector to peft and back, through files."""

import json
import re

import peft
import pytest
import timm
import torch

import mmpeft
from mmpeft.engine.config import read_config
from mmpeft.errors import UsageError
from mmpeft.interop.peft_folder import save_peft

pytestmark = pytest.mark.filterwarnings('ignore')

CONFIG = """
_base_ = './dora_coco.py'
default_hooks = dict(peft=dict(targets=dict(kinds=('pointwise', 'linear'))))
"""


@pytest.fixture
def tool(script, adapted_demo, monkeypatch):
    """The script, called where the demo's base is."""
    module = script('tools', 'convert_peft')
    monkeypatch.chdir(adapted_demo.folder)

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['convert_peft.py', *map(str, arguments)])
        module.main()

    return call


@pytest.fixture
def adapted(adapted_demo, tool):
    """A detector with DoRA on its 1x1 convolutions: config and checkpoint."""
    adapted_demo('coco', 'dora')
    config, checkpoint = (adapted_demo.folder / name for name in ('child.py', 'child.pth'))
    config.write_text(CONFIG)
    if not checkpoint.exists():
        adapted_demo.adapt(read_config(config), checkpoint)
    return config, checkpoint


def trained(model):
    return mmpeft.adapter_state_dict(model)


@torch.no_grad()
def test_timm_adapted_by_peft_computes_what_the_backbone_does(tool, adapted, tmp_path, capsys):
    tool('to', *adapted, tmp_path / 'folder', '--timm')
    ours = mmpeft.init_model(*adapted)
    outside = sum(not key.startswith('backbone.model') for key in trained(ours))
    assert f'{outside} trained tensors are outside' in capsys.readouterr().out
    settings = read_config(adapted[0]).model.backbone
    base = timm.create_model(settings.name, depths=settings.depths, num_classes=0)
    weights = torch.load(settings.checkpoint)
    weights = {re.sub(r'^(stem|stages)_', r'\1.', key): value for key, value in weights.items()}
    missing, unexpected = base.load_state_dict(weights, strict=False)
    assert {key.split('.')[0] for key in missing} == {'head'} and not unexpected
    images = torch.randn(1, 3, 64, 64)
    before = base.forward_features(images)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / 'folder').eval()
    there, here = theirs.forward_features(images), ours.backbone.model(images)[-1]
    assert (there - here).abs().max() < 2e-6 * here.abs().max()
    assert (there - before).abs().max() > 1e-3 * here.abs().max()

    files = adapted[0], tmp_path / 'folder', tmp_path / 'back.pth'
    tool('from', *files, '--timm', '--cfg-options', 'default_hooks.peft.targets=None')
    assert {path.name for path in tmp_path.iterdir()} == {'folder', 'back.pth', 'back.py'}
    again = mmpeft.init_model(tmp_path / 'back.py', tmp_path / 'back.pth')
    assert torch.equal(again.backbone.model(images)[-1], here)


def test_there_and_back_with_the_heads(tool, adapted, tmp_path):
    tool('to', *adapted, tmp_path / 'folder')
    config = json.loads((tmp_path / 'folder/adapter_config.json').read_text())
    assert {'neck', 'rpn_head'} <= set(config['modules_to_save'])
    ours = mmpeft.init_model(*adapted)
    for name in ('back.pth', 'back.safetensors'):
        out = tmp_path / name
        tool('from', adapted[0], tmp_path / 'folder', out)
        source = tmp_path / 'back.py' if out.suffix == '.pth' else adapted[0]
        again = trained(mmpeft.init_model(source, out))
        assert again.keys() == trained(ours).keys()
        assert all(torch.equal(value, again[key]) for key, value in trained(ours).items())
        with pytest.raises(UsageError, match=r'exists? already\. Give another name'):
            tool('from', adapted[0], tmp_path / 'folder', out)
        out.unlink()
        beside = 'back.py' if out.suffix == '.pth' else 'back.safetensors.json'
        with pytest.raises(UsageError, match=f'{beside} exists already'):
            tool('from', adapted[0], tmp_path / 'folder', out)


def test_adapters_on_a_trained_detector(tool, adapted_demo, adapted, tmp_path):
    """The base is the plain checkpoint that load_from names, there and back."""
    config, checkpoint = adapted
    plain = mmpeft.merge(mmpeft.init_model(config, checkpoint))
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / 'plain.pth')
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = '{config}'\nload_from = '{tmp_path}/plain.pth'\n")
    model = mmpeft.init_model(child, tmp_path / 'plain.pth')
    key = 'backbone.model.stages_3.blocks.0.mlp.fc1.weight'
    assert torch.equal(model.state_dict()[key], plain.state_dict()[key])
    mmpeft.inject(model, dict(type='LoRA', rank=1), dict(module='backbone', include=['fc1']))
    folder = save_peft(model, tmp_path / 'folder')
    tool('from', child, folder, tmp_path / 'back.pth')
    again = mmpeft.init_model(tmp_path / 'back.py', tmp_path / 'back.pth')
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_what_is_refused(tool, adapted_demo, adapted, tmp_path):
    config, checkpoint = adapted_demo('ade20k')
    with pytest.raises(UsageError, match='conv_dw.weight is of a grouped convolution'):
        tool('to', config, checkpoint, tmp_path / 'folder')
    with pytest.raises(UsageError, match='neither .pth nor .safetensors'):
        tool('from', adapted[0], tmp_path, tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match='no adapter_model.safetensors'):
        tool('from', adapted[0], tmp_path, tmp_path / 'out.pth')
    assert not list(tmp_path.iterdir())
