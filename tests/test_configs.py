"""Every config that trains is read, built small, run, and built full size without memory."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmpeft
from mmpeft.engine.config import compose, read_config
from tests.tasks import adapt, batch, build, shrink

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('scope')
METHODS = sorted(path.stem for path in (ROOT / 'configs/_base_/methods').glob('*.py'))
# The package of each dataset; a new task has configs/frozen/convnext_<dataset>.py alone.
SCOPES = dict(coco='mmdet', ade20k='mmseg', dota='mmrotate', vtab='mmpretrain')
DATASETS = ('coco', 'ade20k', 'dota')
# The methods of the papers; all others are chosen by --method.
PAPERS = ('bitfit', 'dora', 'flora', 'frozen', 'full', 'liera', 'lora')
LEAVES = sorted(
    (path.parent.name, path.stem.removeprefix('convnext_'))
    for path in (ROOT / 'configs').glob('*/convnext_*.py')
)
# All others train less than a quarter of the backbone's parameters.
LARGE = dict(full=0, diff_pruning=2.0)

torch.set_num_threads(2)


def read(method, dataset):
    return copy.deepcopy(_read(method, dataset))


@cache
def _read(method, dataset):
    return read_config(ROOT / f'configs/{method}/convnext_{dataset}.py')


def with_method(method, dataset='coco'):
    """The frozen config of a dataset with another method."""
    return compose(_read('frozen', dataset), method)


def method_file(method):
    return Config.fromfile(ROOT / f'configs/_base_/methods/{method}.py').peft


@pytest.mark.parametrize('method, dataset', LEAVES)
def test_is_read(method, dataset):
    cfg = read(method, dataset)
    assert cfg.default_scope == SCOPES[dataset]
    expected = method_file(method).to_dict()
    if method in ('lora', 'dora', 'liera'):
        expected['method']['layout'] = 'loralib'  # as the papers count
    if dataset == 'vtab' and method not in ('frozen', 'full'):
        expected['targets'] = dict(kinds=('conv',))
    assert cfg.default_hooks.peft == expected
    assert cfg.default_hooks.seed.type == 'mmpeft.SeedHook'
    assert cfg.model.backbone.type == 'mmpeft.TimmBackbone'


@pytest.mark.parametrize('dataset', SCOPES)
def test_is_what_it_prints(dataset):
    cfg = with_method('flora', dataset)
    assert Config.fromstring(cfg.pretty_text, '.py').to_dict() == cfg.to_dict()


def test_the_papers_runs_are_there():
    assert {(method, dataset) for method in PAPERS for dataset in DATASETS} <= set(LEAVES)


def test_no_metafile_without_weights():
    assert not list(ROOT.glob('configs/**/metafile.yml'))


def test_every_folder_says_what_it_is_for():
    folders = [path for path in ROOT.glob('configs/[!_]*') if any(path.glob('*.py'))]
    assert {path.name for path in folders} == {*PAPERS, 'upstream'}
    assert [path for path in folders if not (path / 'README.md').exists()] == []


def test_every_method_has_a_file():
    """Of those that are registered; a method may have several."""
    configured = {method_file(method).method.type for method in METHODS}
    assert configured == set(mmpeft.METHODS.module_dict)


def test_recipes():
    coco, ade, dota = (read('liera', dataset) for dataset in DATASETS)
    for cfg, images in zip((coco, ade, dota), (32, 16, 16), strict=True):
        assert cfg.optim_wrapper.optimizer.type == 'AdamW'
        assert cfg.optim_wrapper.optimizer.lr == 1e-4
        assert cfg.optim_wrapper.optimizer.weight_decay == 0.05
        assert cfg.auto_scale_lr.base_batch_size == images == 8 * cfg.train_dataloader.batch_size
    assert coco.train_cfg.max_epochs == dota.train_cfg.max_epochs == 12
    assert ade.train_cfg.max_iters == 160_000
    assert ade.model.test_cfg.to_dict() == dict(
        mode='slide', crop_size=(640, 640), stride=(426, 426)
    )
    assert ade.model.decode_head.num_classes == 150


def test_oriented_rcnn_is_upstreams():
    """But for the backbone, the model equals mmrotate's own recipe."""
    import mmrotate

    recipe = '.mim/configs/oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py'
    upstream = Config.fromfile(Path(mmrotate.__file__).parent / recipe)
    theirs, ours = (_plain(cfg.model) for cfg in (upstream, read('flora', 'dota')))
    for model in (theirs, ours):
        del model['backbone']
        del model['neck']['in_channels']
    assert ours == theirs


def _plain(node):
    if isinstance(node, dict):
        return {
            key: value.rpartition('.')[2] if key == 'type' else _plain(value)
            for key, value in node.items()
            if key != '_scope_'
        }
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    return pytest.approx(node) if isinstance(node, float) else node


@pytest.mark.parametrize('dataset', SCOPES)
def test_trains_and_predicts(dataset):
    cfg = shrink(with_method('flora', dataset))
    model = build(cfg)
    cfg.default_hooks.peft.method.rank = 4
    adapt(model, cfg)

    data = model.data_preprocessor(batch(cfg.default_scope), training=True)
    loss, logged = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert loss.isfinite(), logged
    trained = {n for n, p in model.backbone.named_parameters() if p.grad is not None}
    assert any(n.startswith('norm') for n in trained)
    assert all('parametrizations' in n or n.startswith('norm') for n in trained)

    model.eval()
    with torch.no_grad():
        results = model.test_step(batch(cfg.default_scope))
    if cfg.default_scope == 'mmseg':
        assert results[0].pred_sem_seg.data.shape == (1, 128, 128)
    elif cfg.default_scope in ('mmdet', 'mmrotate'):
        boxes = results[0].pred_instances.bboxes
        assert boxes.shape[1] == (5 if dataset == 'dota' else 4)
    else:
        assert results[0].pred_score.shape == (cfg.model.head.num_classes,)


def test_decay_spares_norms_and_biases():
    cfg = shrink(read('full', 'coco'))
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(group['params'][0]): group['weight_decay'] for group in groups}
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition('.')[0])
        spared = name.endswith('.bias') or '.grn.' in name or isinstance(layer, nn.LayerNorm)
        assert decay[id(parameter)] == (0 if spared else 0.05), name


@pytest.mark.filterwarnings('ignore:.* adapters have more parameters:UserWarning')
@pytest.mark.parametrize(
    'method, dataset, count',
    [('lora', 'coco', 17_271_104), ('dora', 'ade20k', 17_381_312), ('liera', 'dota', 17_271_104)],
)
def test_full_size_needs_no_weights(method, dataset, count, monkeypatch):
    """Building with pretrained=True fetches nothing; the meta device holds the full size."""
    import timm

    create = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        assert not pretrained, 'building a model must not fetch weights'
        return create(*args, pretrained=pretrained, **kwargs)

    monkeypatch.setattr(timm, 'create_model', offline)
    cfg = read(method, dataset)
    assert cfg.model.backbone.pretrained
    with torch.device('meta'):
        model = build(cfg)
    result = adapt(model, cfg)
    # LieRA's Table 2: 17.27M adapters at rank 16, and 3,840 parameters of the four output norms.
    assert result.adapters == count
    assert result.unfrozen == 3_840
    assert result.base == 87_690_752 + 3_840


@pytest.mark.filterwarnings('ignore:.* adapters have more parameters:UserWarning')
def test_lieras_counts_on_vtab():
    """LieRA's Table 1: adapters of the convolutions, the last norm and the 100-way head."""
    cfg = read('liera', 'vtab')
    with torch.device('meta'):
        plain = build(cfg)
    for rank, published in {2: 1.90, 4: 3.70, 8: 7.30, 16: 14.48}.items():
        model = copy.deepcopy(plain)
        cfg.default_hooks.peft.method.rank = rank
        result = adapt(model, cfg)
        assert result.adapters == rank * 898_964
        head = sum(p.numel() for p in model.head.parameters())
        assert (result.unfrozen, head) == (2 * 1024, 100 * 1025)
        millions = (result.adapters + result.unfrozen + head) / 1e6
        assert millions == pytest.approx(published, abs=0.01)


def test_vtab_is_run_as_lieras_paper_does():
    cfgs = {method: read(method, 'vtab') for method in PAPERS if method != 'bitfit'}
    for method, cfg in cfgs.items():
        images = cfg.model.data_preprocessor
        assert (images.mean, images.std, images.to_rgb) == ([0] * 3, [255] * 3, True)
        assert cfg.optim_wrapper.optimizer.lr == (1e-4 if method == 'full' else 1e-3)
        assert cfg.optim_wrapper.optimizer.weight_decay == 0.05
        assert cfg.train_dataloader.dataset.ann_file == 'train800val200.txt'
        assert cfg.test_dataloader.dataset.ann_file == 'test.txt'
        assert cfg.train_cfg.val_interval == cfg.train_cfg.max_epochs == 100
        assert 'save_best' not in cfg.default_hooks.checkpoint


@pytest.fixture(scope='module')
def full_width():
    """COCO's model with the widths of ConvNeXt-V2-B and a block a stage, without memory."""
    cfg = read('frozen', 'coco')
    cfg.model.backbone.depths = (1, 1, 1, 1)
    with torch.device('meta'):
        return build(cfg)


@pytest.mark.parametrize('method', METHODS)
def test_method_fits_the_backbone(method, full_width):
    result = adapt(copy.deepcopy(full_width), with_method(method))
    if method == 'full':
        assert result.unfrozen == result.base
    else:
        assert result.unfrozen == 3_840
        assert (result.adapters == 0) == (method == 'frozen')
        assert result.adapters < result.base * LARGE.get(method, 0.25)


USERS = """
_base_ = 'mmpeft::flora/convnext_coco.py'
data_root = 'data/cats/'
metainfo = dict(classes=('cat', 'dog'))
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
model = dict(roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)))
default_hooks = dict(peft=dict(method=dict(rank=16)))
"""


def test_inherits_across_packages(tmp_path):
    path = tmp_path / 'cats.py'
    path.write_text(USERS)
    cfg = read_config(path)
    assert cfg.train_dataloader.dataset.data_root == 'data/cats/'
    assert cfg.default_hooks.peft.method.to_dict() == dict(
        type='FLoRA', rank=16, kernel_rank=2, scale=4.0
    )
    assert "_scope_='mmpeft'" not in cfg.pretty_text
    assert build(shrink(cfg)).roi_head.bbox_head.num_classes == 2


@pytest.mark.parametrize('dataset', DATASETS)
def test_a_method_file_adapts_an_upstream_config(tmp_path, dataset):
    """`_base_` of another package, a method file of ours, and one line."""
    upstream = dict(
        coco='mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        ade20k='mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py',
        dota='mmrotate::oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py',
    )[dataset]
    path = tmp_path / 'child.py'
    path.write_text(
        f"_base_ = ['{upstream}', 'mmpeft::_base_/methods/flora.py']\n"
        'default_hooks = dict(peft=_base_.peft)\n'
    )
    hooks = read_config(path).default_hooks
    assert hooks.peft.method.type == 'FLoRA'
    assert 'checkpoint' in hooks
