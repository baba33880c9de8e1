"""What composing changes in a config, and what it leaves."""

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

import mmpeft
from mmpeft.engine.amp import enable_amp
from mmpeft.engine.building import build_adapted
from mmpeft.engine.config import compose, find_hook, read_config, run_name
from mmpeft.engine.merging import plain_config
from mmpeft.errors import MissingFileError, UsageError

FLORA = 'mmpeft::flora/convnext_coco.py'
RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco'
DINO = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'


def hooked(**hook):
    return Config(dict(default_hooks=dict(peft=dict(type='mmpeft.PEFTHook', **hook))))


def test_the_method_is_replaced_and_the_rest_of_the_hook_stays():
    targets = dict(module='neck', kinds=('linear',), exclude=[r'^a\.'])
    cfg = hooked(
        method=dict(type='FLoRA', rank=9, kernel_rank=2),
        targets=targets,
        unfreeze=[r'norm'],
        base_checkpoint='base.pth',
    )
    hook = find_hook(compose(cfg, 'dora'))
    assert hook == dict(
        type='mmpeft.PEFTHook',
        method=dict(type='DoRA', rank=16),
        targets=targets,
        unfreeze=[r'norm'],
        base_checkpoint='base.pth',
    )
    assert find_hook(cfg).method.type == 'FLoRA'


def test_the_default_kinds_of_the_former_method_are_no_choice():
    cfg = hooked(method=dict(type='LoRA'), targets=dict(kinds=['conv', 'linear']))
    assert 'kinds' not in find_hook(compose(cfg, 'bitfit')).targets
    cfg = hooked(method=dict(type='LoRA'), targets=dict(kinds=['linear']))
    assert find_hook(compose(cfg, 'bitfit')).targets.kinds == ['linear']


def test_kinds_and_overrides_that_the_new_method_cannot_have_are_dropped(capsys):
    targets = dict(
        kinds=('linear', 'mlp'),
        exclude_kinds=('depthwise',),
        overrides={'a': dict(rank=2), 'b': dict(kernel_rank=1)},
    )
    cfg = hooked(method=dict(type='FLoRA', rank=4), targets=targets)
    found = find_hook(compose(cfg, 'houlsby')).targets
    assert found == dict(kinds=('mlp',), overrides={'a': dict(rank=2)})
    printed = capsys.readouterr().out
    assert 'targets.kinds: linear dropped' in printed
    assert 'targets.exclude_kinds: depthwise dropped' in printed
    assert "targets.overrides['b'] dropped" in printed


def test_a_config_without_the_hook_gets_one(capsys):
    plain = read_config(RETINANET)
    cfg = compose(RETINANET, "dict(type='LoRA', rank=4)")
    assert cfg.default_hooks.pop('peft') == dict(
        type='mmpeft.PEFTHook',
        method=dict(type='LoRA', rank=4),
        targets=dict(module='backbone'),
    )
    assert 'frozen_stages: 1 -> -1' in capsys.readouterr().out
    assert cfg.model.backbone.frozen_stages == -1
    cfg.model.backbone.frozen_stages = 1
    assert cfg.to_dict() == plain.to_dict()


def test_rates_of_a_backbone_that_trains_are_not_those_of_adapters(capsys):
    cfg = compose(DINO, 'flora')
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert keys.backbone.lr_mult == 1.0
    assert "custom_keys['backbone'].lr_mult: 0.1 -> 1" in capsys.readouterr().out
    options = {'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult': 0.5}
    cfg = compose(DINO, 'flora', options)
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult == 0.5
    # A backbone that trains itself keeps upstream's recipe, and so does a config with the hook.
    assert compose(DINO, 'full').model.backbone.frozen_stages == 1
    with_hook = compose(DINO, 'lora', {'model.backbone.frozen_stages': 2})
    assert compose(with_hook, 'dora').model.backbone.frozen_stages == 2


def test_options_come_last():
    options = {'default_hooks.peft.method.rank': 3, 'default_hooks.peft.targets.module': 'neck'}
    hook = find_hook(compose(FLORA, 'lora', options))
    assert hook.method == dict(type='LoRA', rank=3) and hook.targets.module == 'neck'
    two = compose(FLORA, [dict(type='LoRA'), dict(method=dict(type='BitFit'))])
    hook = find_hook(compose(two, None, {'default_hooks.peft.method.0.rank': 5}))
    assert hook.method == [dict(type='LoRA', rank=5), dict(method=dict(type='BitFit'))]


def test_another_type_over_the_arguments_of_a_method():
    options = {'default_hooks.peft.method.type': 'LoRA'}
    expected = "LoRA has no argument 'kernel_rank'.*for FLoRA.*--method.*_delete_=True"
    with pytest.raises(UsageError, match=expected):
        compose(FLORA, None, options)
    replaced = options | {'default_hooks.peft.method._delete_': True}
    assert find_hook(compose(FLORA, None, replaced)).method == dict(type='LoRA')
    with pytest.raises(UsageError, match="no method 'Lora'. Did you mean 'LoRA'"):
        compose(FLORA, None, {'default_hooks.peft.method.type': 'Lora'})


def test_options_that_do_not_fit_the_config():
    with pytest.raises(UsageError, match='--cfg-options do not fit the config'):
        compose(FLORA, None, {'model.backbone.name.size': 3})


def test_options_are_a_dict():
    with pytest.raises(UsageError, match=r"options=\['a=b'\] must be a dict by dotted keys"):
        compose(hooked(method=dict(type='LoRA')), options=['a=b'])


def test_what_was_given_is_not_changed():
    options = {'default_hooks.peft.method': dict(_delete_=True, type='IA3')}
    before = str(options)
    cfg = read_config(FLORA)
    compose(cfg, 'lora', options)
    assert str(options) == before and find_hook(cfg).method.type == 'FLoRA'


def test_the_hook_is_found_in_custom_hooks_too():
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook'), dict(type='PEFTHook', method={})]))
    assert find_hook(cfg) is cfg.custom_hooks[1]
    assert find_hook(Config(dict(default_hooks=dict(peft=None)))) is None
    assert compose(cfg, 'lora').custom_hooks[1].method.type == 'LoRA'


def test_a_config_whose_parts_are_none_gets_the_hook():
    cfg = compose(Config(dict(model=None, default_hooks=None)), 'lora')
    assert find_hook(cfg).method.type == 'LoRA'
    with pytest.raises(UsageError, match="targets='neck' must be a dict"):
        compose(cfg, "dict(method=dict(type='LoRA'), targets='neck')")


@pytest.mark.parametrize(
    'config, message',
    [
        ('configs/flora/convnet_coco.py', "Did you mean 'configs/flora/convnext_coco.py'.*mmdet::"),
        ('back.py', r'Name a file, such as one of configs/ .*\. Configs of a package .*mmpeft::'),
        ('mmdet::zzz', r"has no config 'zzz'\. Its configs are in .*mmdet"),
        ('mmdet::retinanet/retina_r50_fpn_1x_coco', 'retinanet/retinanet_r50_fpn_1x_coco.py'),
        ('mmdett::a/b.py', "'mmdett' is unknown. Did you mean 'mmdet'"),
    ],
)
def test_a_config_that_does_not_exist(config, message, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(UsageError, match=message):
        read_config(config)


def test_a_missing_config_is_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="There is no config 'none.py'"):
        read_config('none.py')


@pytest.mark.parametrize(
    'config, method, expected',
    [
        ('configs/flora/convnext_coco.py', None, 'flora/convnext_coco'),
        ('configs/flora/convnext_coco.py', 'pissa', 'pissa/convnext_coco'),
        (f'{RETINANET}.py', 'lora', 'lora/retinanet_r50_fpn_1x_coco'),
        (RETINANET, None, 'retinanet/retinanet_r50_fpn_1x_coco'),
        ('configs/mine.py', None, 'mine'),
        ('/tmp/mine.py', None, 'mine'),
        ('/tmp/mine.py', "dict(type='LoRA', rank=4)", 'lora_rank-4/mine'),
        ('/tmp/mine.py', "[dict(type='LoRA'), dict(type='BitFit')]", 'lora+bitfit/mine'),
    ],
)
def test_the_name_of_a_run(config, method, expected):
    assert run_name(config, method) == expected


def test_what_the_user_writes_out_wins():
    cfg = hooked(
        method=dict(type='FLoRA', rank=9),
        targets=dict(module='neck', kinds=('conv',), exclude=['a']),
        unfreeze=['norm'],
    )
    given = dict(method=dict(type='LoRA'), targets=dict(kinds=['linear']), unfreeze=[])
    for text in (given, str(given)):
        hook = find_hook(compose(cfg, text))
        assert hook.targets == dict(module='neck', kinds=['linear'], exclude=['a'])
        assert hook['unfreeze'] == []
    hook = find_hook(compose(cfg, dict(method=dict(type='LoRA'))))
    assert hook.targets.kinds == ('conv',) and hook['unfreeze'] == ['norm']


def test_arguments_of_a_hook_that_is_not_there():
    plain = read_config(DINO)
    with pytest.raises(UsageError, match='has no PEFTHook whose arguments default_hooks.peft'):
        compose(plain, options={'default_hooks.peft.method.rank': 4})


def test_a_hook_that_is_not_there():
    cfg = hooked(method=dict(type='LoRA'))
    with pytest.raises(UsageError, match=r"no hook default_hooks\.pefft.*Did you mean 'peft'"):
        compose(cfg, options={'default_hooks.pefft.method.rank': 4})
    options = {'default_hooks.logger.type': 'LoggerHook', 'default_hooks.peft.check_iters': 5}
    assert compose(cfg, options=options).default_hooks.logger == dict(type='LoggerHook')


def test_an_argument_of_the_method_is_no_key_of_the_config():
    with pytest.raises(UsageError, match='Write default_hooks.peft.method.rank'):
        compose(FLORA, 'lora', dict(rank=3))
    assert compose(FLORA, options=dict(resume=True)).resume


def test_a_dict_over_a_name_is_one_paragraph(tmp_path):
    (tmp_path / 'base.py').write_text("model = dict(arch='small')")
    (tmp_path / 'child.py').write_text("_base_ = './base.py'\nmodel = dict(arch=dict(depth=1))")
    with pytest.raises(UsageError, match='child.py: .*arch is a dict .*`_delete_=True`'):
        compose(tmp_path / 'child.py')


CLASSES = """
from mmengine.config import read_base

with read_base():
    from .base import *
from mmengine.optim import OptimWrapper
from mmpeft import PEFTHook
from mmpeft.methods.lora import LoRA
from mmseg.models import EncoderDecoder

model.update(type=EncoderDecoder)
default_hooks = dict(peft=dict(type=PEFTHook, method=dict(type=LoRA, rank=2)))
optim_wrapper = dict(type=OptimWrapper)
"""


def test_classes_as_types(tmp_path, scope, capsys):
    """As mmengine's configs in Python have them, and as they are dumped, by their modules."""
    backbone = "dict(type=TimmBackbone, name='convnextv2_atto', out_indices=(0,))"
    base = f'from mmpeft.models import TimmBackbone\nmodel = dict(backbone={backbone})\n'
    (tmp_path / 'base.py').write_text(base)
    (tmp_path / 'child.py').write_text(CLASSES)
    for file in (tmp_path / 'child.py', tmp_path / 'dumped.py'):
        cfg = read_config(file)
        assert cfg.default_scope == 'mmseg'
        assert find_hook(cfg).method == dict(type='LoRA', rank=2)
        assert find_hook(compose(cfg, 'dora')).method == dict(type='DoRA', rank=16)
        cfg.dump(tmp_path / 'dumped.py')
        assert plain_config(cfg).model.backbone.pretrained is False
        enable_amp(cfg)
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        cfg.model.pop('type')
        cfg.model = dict(type=Holder, **cfg.model)
        assert mmpeft.summary(build_adapted(cfg, memory='balanced')).rows


class Holder(nn.Module):
    """A model with nothing but a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)


def test_a_class_that_does_not_exist(tmp_path):
    (tmp_path / 'config.py').write_text(CLASSES.replace('LoRA', 'Lora').replace('.base', '.none'))
    (tmp_path / 'none.py').write_text('model = dict()')
    with pytest.raises(
        UsageError, match='config.py: Failed to import Lora from mmpeft.methods.lora'
    ):
        compose(tmp_path / 'config.py')
