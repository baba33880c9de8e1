"""Every method on configs of each task and of upstream: built, one step, run again.

Each method is on one of the configs; on all of them with MMPEFT_EVERY_PAIR=1.
"""

import copy
import os
from functools import cache

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

import mmpeft
from mmpeft.engine.building import adapt, build_model
from mmpeft.engine.config import compose, find_hook
from mmpeft.engine.method_argument import method_files
from mmpeft.errors import UsageError
from mmpeft.injection.site import named_adapters
from tests.tasks import batch
from tests.toy import same, scores, toy_config, weights

pytestmark = [
    pytest.mark.usefixtures('scope'),
    pytest.mark.filterwarnings('ignore:.*adapters have more parameters'),
]

CONFIGS = dict(
    coco='mmpeft::demo/_base_/coco.py',
    ade20k='mmpeft::demo/_base_/ade20k.py',
    dota='mmpeft::demo/_base_/dota.py',
    internvit='mmpeft::demo/_base_/internvit.py',
    retinanet='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    segformer='mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    resnet='mmpretrain::resnet/resnet18_8xb32_in1k.py',
)
CLASSES = {'model.decode_head.num_classes': 150, 'model.data_preprocessor.size': (64, 64)}
NARROW = {'model.backbone.base_channels': 8, 'model.backbone.stem_channels': 8}
DEMO = CLASSES | {'model.decode_head.loss_decode.class_weight': None}
SMALLER = dict(
    ade20k=DEMO,
    internvit=DEMO | {'model.backbone.checkpoint': None},  # without it, random weights
    segformer=CLASSES,
    retinanet=NARROW
    | {
        'model.backbone.depth': 18,
        'model.neck.in_channels': [8, 16, 32, 64],
        'model.bbox_head.stacked_convs': 1,
    },
    resnet=NARROW | {'model.head.in_channels': 64},
)
METHODS = sorted(method_files())
# A residual block of convolutions has no MLP.
WITHOUT_MLP = 'retinanet', 'resnet'
REFUSED = [(n, m) for n in WITHOUT_MLP for m in ('scaled_parallel', 'adaptformer', 'convpass')]


def configs_for(number, method):
    """The config whose turn it is among those that the method fits, or all of them."""
    found = [name for name in CONFIGS if (name, method) not in REFUSED]
    return found if os.environ.get('MMPEFT_EVERY_PAIR') else [found[number % len(found)]]


PAIRS = [(name, m) for number, m in enumerate(METHODS) for name in configs_for(number, m)]


@cache
def base_of(name):
    """Config and plain model."""
    options = SMALLER.get(name, {}) | {'model.backbone.init_cfg': None}
    cfg = compose(CONFIGS[name], options=options)
    model = build_model(cfg)
    for (
        module
    ) in model.modules():  # zero, so that a scale has no gradient, but in pretrained models
        if type(module).__name__ == 'GlobalResponseNorm':
            torch.nn.init.ones_(module.weight)
    return cfg, model


@pytest.mark.parametrize('name, method', PAIRS)
def test_every_method_takes_a_step_on_every_config(name, method):
    """A loss reaches every adapter, and a step of the config's optimizer changes each."""
    plain, model = base_of(name)
    cfg, model = compose(plain, method), copy.deepcopy(model)
    found = find_hook(cfg).method
    if hasattr(mmpeft.METHODS.get(found.type), 'rank'):
        found.rank = 2
    adapt(model, cfg)
    if cfg.optim_wrapper.get('paramwise_cfg'):
        cfg.optim_wrapper.paramwise_cfg.bypass_duplicate = True  # adapters may share
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    adapters = named_adapters(model.backbone)
    before = {n: {k: v.clone() for k, v in a.state_dict().items()} for n, a in adapters.items()}
    data = model.data_preprocessor(batch(cfg.default_scope, 64), training=True)
    loss, logged = model.parse_losses(model(**data, mode='loss'))
    loss = loss + (mmpeft.penalty(model) or 0)
    assert loss.isfinite(), logged
    optimizer.update_params(loss)
    for path, adapter in adapters.items():
        values = adapter.state_dict()
        assert any(not value.equal(before[path][k]) for k, value in values.items()), path
    assert method in ('frozen', 'full') or adapters


@pytest.mark.parametrize('name, method', REFUSED)
def test_a_method_without_an_insertion_point_is_refused(name, method):
    plain, model = base_of(name)
    with pytest.raises(UsageError, match="'mlp'.*ResNet has none"):
        adapt(copy.deepcopy(model), compose(plain, method))


@pytest.fixture
def plain(tmp_path):
    """A config file of a run without mmpeft's hook."""
    cfg = toy_config(tmp_path / 'never')
    cfg.default_hooks.pop('peft')
    cfg.pop('work_dir')
    cfg.dump(tmp_path / 'toy.py')
    return tmp_path / 'toy.py'


ONE = "dict(type='FLoRA', rank=2, scale=1.0)"
TWO = "[dict(method=dict(type='LoRA', rank=2), targets=dict(include=['fc'])), {'type': 'BitFit'}]"


@pytest.mark.parametrize('method', [ONE, TWO])
def test_the_composed_config_runs_again_from_the_work_directory(method, plain, tmp_path):
    cfg = compose(plain, method)
    cfg.work_dir = str(tmp_path / 'run')
    first = Runner.from_cfg(cfg)
    first.train()
    written = tmp_path / 'run/toy.py'
    text = written.read_text()
    assert '_base_' not in text and "type='mmpeft.PEFTHook'" in text
    again = Config.fromfile(written)
    assert again.to_dict() == cfg.to_dict()
    again.work_dir = str(tmp_path / 'again')
    second = Runner.from_cfg(again)
    second.train()
    assert same(weights(first), weights(second))
    again.merge_from_dict(dict(load_from=str(tmp_path / 'run/epoch_3.pth'), work_dir='run/test'))
    again.work_dir = str(tmp_path / 'test')
    assert (scores(Runner.from_cfg(again).test()) == scores(first.val())).all()


ATTENTION_AND_BIASES = [
    dict(method=dict(type='LoRA', rank=2), targets=dict(include=[r'stage', r'fc'])),
    dict(method=dict(type='BitFit'), targets=dict(exclude=['norm']), unfreeze=[r'^norm\.']),
]


def test_two_methods_by_config(plain, tmp_path):
    """LoRA in some layers and biases everywhere: trained, saved, loaded and merged, all equal."""
    cfg = compose(plain, ATTENTION_AND_BIASES)
    cfg.work_dir = str(tmp_path / 'run')
    runner = Runner.from_cfg(cfg)
    runner.train()
    model, expected = runner.model, scores(runner.val())
    rows = {row.name: row.method for row in mmpeft.summary(model).rows}
    assert rows['backbone.fc.weight'] == 'LoRA(rank=2)'
    assert rows['backbone.fc.bias'] == rows['backbone.stem.bias'] == 'BitFit()'
    assert 'backbone.stem.weight' not in rows and 'backbone.norm.bias' not in rows
    assert model.backbone.norm.weight.requires_grad

    cfg.load_from, cfg.work_dir = str(tmp_path / 'run/epoch_3.pth'), str(tmp_path / 'test')
    assert (scores(Runner.from_cfg(cfg).test()) == expected).all()
    loaded = mmpeft.init_model(cfg, tmp_path / 'run/epoch_3.pth')
    from_file = mmpeft.init_model(cfg, tmp_path / 'run/epoch_3.safetensors')
    images = torch.randn(4, 3, 8, 8)
    outputs = [m.eval().cpu().double()(images.double(), []) for m in (model, loaded, from_file)]
    merged = mmpeft.merge(loaded)(images.double(), [])
    for other in (*outputs[1:], merged):
        for one, two in zip(outputs[0], other, strict=True):
            torch.testing.assert_close(one['scores'], two['scores'], rtol=1e-10, atol=1e-10)


def test_the_order_of_methods_is_part_of_a_checkpoint(plain, tmp_path):
    cfg = compose(plain, ATTENTION_AND_BIASES)
    cfg.work_dir = str(tmp_path / 'run')
    Runner.from_cfg(cfg).train()
    fewer = compose(plain, ATTENTION_AND_BIASES[:1])
    with pytest.raises(UsageError, match='BitFit at backbone'):
        mmpeft.init_model(fewer, tmp_path / 'run/epoch_3.pth')
