"""Backbones of docs/backbones.md under the heads of the recipes, small, with random weights.

Each trains two steps, is saved, loaded and merged. Backbones and methods take turns, so that
every head has FLoRA and LoRA on both kinds of backbones; MMPEFT_EVERY_PAIR=1 takes all backbones
under all heads with both.
"""

import copy
import os
from functools import cache
from pathlib import Path

import pytest
import torch

import mmpeft
from mmpeft.engine.config import compose
from mmpeft.models import TimmBackbone
from tests.backbones import PLAIN, SMALL
from tests.tasks import SMALLER, adapt, batch, build

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.usefixtures('scope'),
    pytest.mark.filterwarnings('ignore:.*adapters have more parameters'),
]
TASKS = ('coco', 'ade20k', 'dota')
QUERIES = ('vit-dino_coco', 'vit-mask2former_coco', 'vit-mask2former_ade20k')
METHODS = (dict(type='FLoRA', rank=2), dict(type='LoRA', rank=2))
# Widths of necks and heads, by their widths in the recipes.
WIDTHS = {128: 16, 256: 32, 512: 32, 1024: 64, 2048: 64}
WHOLE = ('backbone', 'data_preprocessor', 'train_cfg', 'test_cfg')


@cache
def read(config):
    return compose(ROOT / f'configs/frozen/{config}.py')


def small(config, backbone):
    """A recipe with a small backbone and narrow heads."""
    cfg = copy.deepcopy(read(config))
    cfg.model = type(cfg.model)({k: v if k in WHOLE else narrow(v) for k, v in cfg.model.items()})
    cfg.model.backbone.update(
        name=backbone, pretrained=False, drop_path=0.0, **{'out_indices': None} | SMALL[backbone]
    )
    if backbone in PLAIN:
        cfg.model.backbone.out_indices = (-1,)
        cfg.model.neck.update(in_channels=48, out_channels=32)
    return cfg


def narrow(node):
    if isinstance(node, dict):
        return {key: narrow(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(map(narrow, node))
    return WIDTHS.get(node, node) if type(node) is int else node


def train(model, scope, steps=2):
    """Two steps on two images with labels."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(steps):
        data = model.data_preprocessor(batch(scope), training=True)
        loss, logged = model.parse_losses(model(**data, mode='loss'))
        assert loss.isfinite(), logged
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def seen(model, scope):
    """The levels that the heads see, and what is predicted of two images."""
    data = model.data_preprocessor(batch(scope), training=False)
    levels = list(model.extract_feat(data['inputs']))
    results = model.test_step(batch(scope))
    if scope == 'mmseg':
        return levels, [result.seg_logits.data for result in results]
    return levels, [result.pred_instances.scores for result in results]


def check(cfg, method, tmp_path):
    scope = cfg.default_scope
    cfg.default_hooks.peft.method = method
    base = build(cfg)
    if hasattr(base, 'init_weights'):
        base.init_weights()
    model = copy.deepcopy(base)
    adapt(model, cfg)
    start = copy.deepcopy(model.backbone.state_dict())
    train(model, scope)
    moved = [k for k, v in model.backbone.state_dict().items() if not torch.equal(v, start[k])]
    assert moved and all('parametrizations' in k or k.startswith('norm') for k in moved)
    levels, predicted = seen(model, scope)
    mmpeft.save_adapter(model, tmp_path / 'adapter.safetensors')
    mmpeft.load_adapter(base, tmp_path / 'adapter.safetensors')
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    assert not base.load_state_dict(heads, strict=False).unexpected_keys
    for loaded, own in zip(seen(base.eval(), scope), (levels, predicted), strict=True):
        assert all(map(torch.equal, loaded, own))
    mmpeft.merge(model)
    for ours, merged in zip(levels, seen(model, scope)[0], strict=True):
        torch.testing.assert_close(merged, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


EVERY = bool(os.environ.get('MMPEFT_EVERY_PAIR'))
CASES = [
    pytest.param(name, task, method, id=f'{name}-{task}-{method["type"]}')
    for i, name in enumerate(SMALL)
    for j, task in enumerate(TASKS)
    for k, method in enumerate(METHODS)
    if EVERY or (i % 3 == j and (i // 3 + j) % 2 == k)
]


@pytest.mark.parametrize('backbone, task, method', CASES)
def test_a_backbone_under_a_head(backbone, task, method, tmp_path):
    plain = backbone in PLAIN
    cfg = small(f'{"vit" if plain else "convnext"}_{task}', backbone)
    if plain and task == 'dota':
        cfg.model.data_preprocessor.update(mean=[0.0] * 3, std=[60.0] * 3)
    widths = [32] * 4 if task == 'ade20k' else 48
    if not plain:
        first = 24 if 'swin' in backbone or 'sam2' in backbone else None
        widths = [first * 2**i for i in range(4)] if first else [8, 16, 24, 32]
    SMALLER[cfg.default_scope](cfg.model, widths)
    check(cfg, method, tmp_path)


def fewer_queries(cfg):
    """Few queries and one layer of each kind."""
    head = cfg.model.get('panoptic_head') or cfg.model.get('decode_head')
    if not head:  # DINO
        cfg.model.num_queries, cfg.model.bbox_head.embed_dims = 20, 32
        cfg.model.encoder.num_layers = cfg.model.decoder.num_layers = 1
        return cfg
    head.num_queries = 10
    head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 1
    (cfg.model.train_cfg or head.train_cfg).num_points = 64
    cfg.model.data_preprocessor.pop('batch_augments', None)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (128, 128)
    return cfg


@pytest.mark.parametrize('config', QUERIES)
def test_a_query_based_head(config, tmp_path):
    cfg = fewer_queries(small(config, 'vit_small_patch16_dinov3.lvd1689m'))
    check(cfg, METHODS[1], tmp_path)


@pytest.mark.parametrize('config', ['vit_coco', 'vit_ade20k', 'vit_dota', *QUERIES])
def test_a_recipe_fits_its_backbone(config):
    """In normalisation, widths, and the size of images; at full size, without memory."""
    cfg = read(config).model
    settings = {k: v for k, v in cfg.backbone.items() if k not in ('type', '_delete_')}
    with torch.device('meta'):
        backbone = TimmBackbone(**settings)
    (width,) = (getattr(backbone, norm).weight.numel() for norm in backbone.newly_initialized)
    assert width == cfg.neck.in_channels and backbone.pretrained
    for key in ('mean', 'std'):
        expected = [255 * value for value in backbone.pretrained_cfg[key]]
        assert cfg.data_preprocessor[key] == pytest.approx(expected)
    images = cfg.data_preprocessor
    divisors = images.get('pad_size_divisor'), (images.get('test_cfg') or {}).get('size_divisor')
    assert 32 in divisors and backbone.stride == 16
