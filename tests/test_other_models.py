"""configs/upstream: detectors and segmentors as upstream defines them, in real Runners.

Each trains for two steps on the demo's scenes. A file of backbone weights stands for the pretrained
one, and is read by the config's own initialisation.
"""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.analysis.comparison import differences
from mmpeft.engine.config import read_config
from mmpeft.engine.merging import plain_config
from mmpeft.engine.packages import import_task
from mmpeft.errors import TrainingError, UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.injection.weights import plain_key
from tests.tasks import adapt

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs/other_models.md').read_text()
CONFIGS = ROOT / 'configs/upstream'

FEW = dict(score_thr=0.0, nms_pre=100, max_per_img=20)
BOXES = {'bbox_head.num_classes': 10, 'test_cfg': FEW}
QUERIES = {
    'bbox_head.num_classes': 10,
    'num_queries': 20,
    'encoder.num_layers': 1,
    'decoder.num_layers': 1,
    'test_cfg.max_per_img': 20,
}
STAGES = {
    f'roi_head.bbox_head.{stage}': dict(num_classes=10, fc_out_channels=64) for stage in range(2)
}
PROPOSALS = {
    'train_cfg.rpn_proposal': dict(nms_pre=100, max_per_img=50),
    'test_cfg.rpn': dict(nms_pre=100, max_per_img=20),
    'test_cfg.rcnn': FEW,
}
LABELS = {
    'decode_head': dict(num_classes=11, channels=64),
    'data_preprocessor.size': (128, 128),
}
# The backbones stay as they are.
SMALLER_HEADS = {
    'retinanet_r50_coco': BOXES | {'bbox_head.stacked_convs': 1},
    'rtmdet_tiny_coco': BOXES,
    'deformable-detr_swin-t_coco': QUERIES,
    'dino_swin-t_coco': QUERIES,
    'segformer_mit-b0_ade20k': LABELS,
    'roi-trans_r50_dota': STAGES | PROPOSALS,
}

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


@pytest.fixture(autouse=True)
def scope():
    """Leave the global default scope as it was."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory, script):
    """The demo's data, four scenes to train on and two to look at."""
    folder = tmp_path_factory.mktemp('scenes')
    digits = script('projects/demo', 'digits')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', f'- --out {folder}/d --train 4 --val 2 --source 10'.split())
        digits.main()
    return folder / 'd'


@pytest.fixture
def workplace(scenes, tmp_path, monkeypatch):
    """A folder to work in, with data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(scenes)
    return tmp_path


def config(name, **changes):
    """A config of configs/upstream on the demo's data, for two steps that leave a trace."""
    cfg = read_config(CONFIGS / f'{name}.py')
    task = name.rpartition('_')[2]
    demo = Config.fromfile(ROOT / f'configs/demo/_base_/{task}.py')
    for key in ('train_dataloader', 'val_dataloader', 'train_cfg'):
        cfg[key] = demo[key]
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.train_dataloader.batch_size = 2
    if task == 'coco':
        cfg.train_dataloader.dataset.pipeline[1].with_mask = False
    cfg.test_dataloader = cfg.val_dataloader
    cfg.val_evaluator = cfg.test_evaluator = []
    cfg.param_scheduler = None
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks', []) if hook.type == 'EMAHook']
    for hook in cfg.custom_hooks:
        hook.momentum = 0.3
    cfg.merge_from_dict(
        {f'model.{key}': value for key, value in SMALLER_HEADS[name].items()}
        | {
            'optim_wrapper.optimizer': dict(_delete_=True, type='AdamW', lr=3e-4, weight_decay=0.0),
            'default_hooks.checkpoint': dict(by_epoch=False, interval=2),
            'work_dir': 'trained',
            'log_level': 'ERROR',
            'randomness': dict(seed=0),
        }
        | changes
    )
    import_task(cfg)
    return cfg


def pretrain(cfg):
    """Write a file of backbone weights in place of the one that upstream's config names.

    Returns:
        What is in it, by name.
    """
    init_default_scope(cfg.default_scope)
    settings = cfg.model.backbone
    pretrained = settings.pop('init_cfg')
    assert pretrained.type == 'Pretrained' and '://' in pretrained.checkpoint
    torch.manual_seed(1)
    backbone = MODELS.build(settings)
    backbone.init_weights()
    calibrate(backbone)
    # RTMDet's file holds a whole model, and Swin's own loader wants such names too.
    prefix = 'backbone.' * ('prefix' in pretrained or 'convert_weights' in settings)
    state = backbone.state_dict()
    torch.save(dict(state_dict={prefix + k: v for k, v in state.items()}), 'backbone.pth')
    settings.init_cfg = pretrained | dict(checkpoint='backbone.pth')
    if 'convert_weights' in settings:
        settings.convert_weights = False
    return state


@torch.no_grad()
def calibrate(backbone):
    """Norms as of a network that has learnt something, with statistics of what they see."""
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm | nn.modules.batchnorm._NormBase):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = 0.5
            module.train()
    for _ in range(3):
        backbone(torch.randn(2, 3, 128, 128))


class Note(Hook):
    """Keeps the adapters as they start, and what the model says of the validation images."""

    @torch.no_grad()
    def before_train(self, runner):
        self.start = copy.deepcopy(named_adapters(runner.model))
        for name, parameter in runner.model.named_parameters():
            # A fresh head scores all places alike, a trained one does not.
            if re.search(r'(_cls|cls_branches)\b.*weight', name):
                parameter.mul_(10)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.raw = raw_outputs(runner.model, data_batch)
        self.samples, self.predictions = outputs, [predictions(sample) for sample in outputs]

    after_test_iter = after_val_iter


@torch.no_grad()
def raw_outputs(model, batch):
    """The backbone's maps and the outputs of the head (the RPN's, if there are two)."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    maps = model.backbone(data['inputs'])
    if hasattr(model, 'rpn_head'):
        return flat([maps, model.rpn_head(model.neck(maps))])
    return flat([maps, model(**data, mode='tensor')])


def flat(node):
    """All tensors in nested sequences."""
    if torch.is_tensor(node):
        return [node]
    return [tensor for child in node if child is not None for tensor in flat(child)]


def predictions(sample):
    """What was found in an image."""
    if 'pred_instances' not in sample:
        return [sample.pred_sem_seg.data, sample.seg_logits.data]
    found = sample.pred_instances
    return [found.labels, found.scores, getattr(found.bboxes, 'tensor', found.bboxes)]


def run(cfg, what, **changes):
    """The model and the notes of a Runner."""
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(changes)
    runner, note = Runner.from_cfg(cfg), Note()
    runner.register_hook(note)
    getattr(runner, what)()
    return runner.model, note


def check_base(model, base, path='backbone'):
    """What is frozen below a path is what was in the file, to the last bit."""
    root = model.get_submodule(path)
    trained = {name for name, p in root.named_parameters() if p.requires_grad}
    state = {plain_key(key): value for key, value in root.state_dict().items()}
    frozen = [key for key in base if key not in trained]
    assert len(frozen) > 0.9 * len(base)
    assert [key for key in frozen if not torch.equal(state[key], base[key])] == []


def check_adapters_moved(model, note):
    """Without weight decay Adam moves only what has had a gradient other than zero."""
    now = {name: list(a.parameters()) for name, a in named_adapters(model).items()}
    start = {name: list(a.parameters()) for name, a in note.start.items()}
    assert now.keys() == start.keys()
    assert [name for name in now if all(map(torch.equal, now[name], start[name]))] == []


def check_gradients(model):
    """Those that torch's own autograd computes, layer for layer by their plain forward."""
    model = model.double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        sum(map_.square().mean() for map_ in model.train().backbone(images)).backward()
        adapters = named_adapters(model.backbone).values()
        return [p.grad for adapter in adapters for p in adapter.parameters()]

    ours = gradients()
    for layer in model.modules():
        execution.disable(layer)
    for a, b in zip(ours, gradients(), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


def check_equal(note, other):
    """All outputs, to the last bit."""
    for a, b in pairs(note, other):
        assert torch.equal(a, b)


def check_close(note, other, tolerance=1e-4):
    """All outputs, to within a share of each tensor's largest element.

    Of boxes whose scores are equal up to rounding another one may come first, or be kept.
    """
    assert all(a.isfinite().all() for a, _ in pairs(note, other))
    for a, b in zip(note.raw, other.raw, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    found = differences(*(dict(maps=[], predictions=n.samples) for n in (note, other)))
    assert found and [row for row in found if row.exceeds(tolerance)] == []


def pairs(note, other):
    found = [flat([n.raw, n.predictions]) for n in (note, other)]
    assert all(len(tensor) for tensor in found[0])
    return zip(*found, strict=True)


def merged(cfg, checkpoint):
    """What a Runner without mmpeft notes of the merged checkpoint, made as tools/merge.py does."""
    model = mmpeft.init_model(cfg, checkpoint)
    adapted = {row.name for row in mmpeft.summary(model).rows}
    before = {plain_key(key): value.clone() for key, value in model.state_dict().items()}
    after = mmpeft.merge(model).state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == adapted
    torch.save(dict(state_dict=after), 'merged.pth')
    plain = plain_config(cfg)
    assert 'mmpeft' not in str(plain.to_dict())
    return run(plain, 'test', load_from='merged.pth', work_dir='merged')[1]


def in_page(name):
    """A config's row of the page: adapted weights, adapters' parameters, share."""
    (row,) = [line for line in PAGE.splitlines() if f'configs/upstream/{name}.py) |' in line]
    return [cell.strip() for cell in row.split('|')][4:7]


def test_every_config_is_a_case():
    assert {path.stem for path in CONFIGS.glob('*.py')} == set(SMALLER_HEADS)


@pytest.mark.parametrize('name', SMALLER_HEADS)
def test_trained_loaded_and_merged(name, workplace):
    cfg = config(name)
    base = pretrain(cfg)
    model, trained = run(cfg, 'train')
    check_base(model, base)
    check_adapters_moved(model, trained)
    summary = mmpeft.summary(model)
    figures = [f'{len(summary.rows)}', f'{summary.adapters:,}', f'{summary.share:.2%}']
    assert in_page(name) == figures

    _, loaded = run(cfg, 'test', load_from='trained/iter_2.pth', work_dir='loaded')
    check_equal(loaded, trained)
    check_close(merged(cfg, 'trained/iter_2.pth'), trained)
    check_gradients(model)


@pytest.mark.parametrize(
    'name, method',
    [
        ('deformable-detr_swin-t_coco', dict(type='HoulsbyAdapter', rank=8)),
        ('segformer_mit-b0_ade20k', dict(type='HoulsbyAdapter', rank=8)),
        ('retinanet_r50_coco', dict(type='VPT', deep=True)),
    ],
)
def test_methods_on_activations(name, method, workplace):
    """In recomputed blocks too, behind a patch embedding that nothing trains in."""
    changes = {'default_hooks.peft.method': method | dict(_delete_=True)}
    if 'deformable' not in name:
        changes['default_hooks.peft.targets'] = dict(_delete_=True, module='backbone')
    if method['type'] == 'VPT':
        changes['model.backbone.frozen_stages'] = -1
    else:
        changes['model.backbone.with_cp'] = True
    cfg = config(name, **changes)
    base = pretrain(cfg)
    model, trained = run(cfg, 'train')
    check_base(model, base)
    check_adapters_moved(model, trained)
    _, loaded = run(cfg, 'test', load_from='trained/iter_2.pth', work_dir='loaded')
    check_equal(loaded, trained)
    with pytest.raises(UsageError, match='cannot be merged'):
        mmpeft.merge(model)


def test_the_transformer_of_a_detr(workplace, monkeypatch):
    """The page's config: backbone, encoder and decoder adapted in a detector that is trained."""
    (block,) = [b for b in re.findall(r'```python\n(.*?)```', PAGE, re.S) if 'decoder' in b]
    (workplace / 'detr_coco.py').write_text(block)
    monkeypatch.setitem(SMALLER_HEADS, 'detr_coco', QUERIES)
    monkeypatch.setattr(f'{__name__}.CONFIGS', workplace)
    cfg = config('detr_coco')
    pretrain(cfg)
    init_default_scope('mmdet')
    detector = MODELS.build(copy.deepcopy(cfg.model))
    detector.init_weights()
    base = copy.deepcopy(detector.state_dict())
    torch.save(dict(state_dict=base), 'detector.pth')

    model, trained = run(cfg, 'train')
    frozen = {key: v for key, v in base.items() if re.match('(backbone|encoder|decoder)', key)}
    check_base(model, frozen, '')
    check_adapters_moved(model, trained)
    adapted = {row.name.partition('.')[0] for row in mmpeft.summary(model).rows}
    assert adapted == {'backbone', 'encoder', 'decoder'}
    attention = model.decoder.layers[0].self_attn.attn
    assert attention.parametrizations.keys() == {'in_proj_weight'}
    assert all(p.requires_grad for p in model.bbox_head.parameters())
    assert model.query_embedding.weight.requires_grad
    _, loaded = run(cfg, 'test', load_from='trained/iter_2.pth', work_dir='loaded')
    check_equal(loaded, trained)
    check_close(merged(cfg, 'trained/iter_2.pth'), trained)


def build(name, **changes):
    """A config's model with adapters, and the config."""
    cfg = config(name, **changes)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    adapt(model, cfg)
    return model, cfg


def trained_stages(model):
    """The stages of a backbone in which anything trains."""
    below = model.backbone.stages.named_parameters()
    return {name.partition('.')[0] for name, parameter in below if parameter.requires_grad}


def test_the_last_stage_alone():
    name = 'deformable-detr_swin-t_coco'
    include = {'default_hooks.peft.targets.include': (r'^stages\.3\.',)}
    assert trained_stages(build(name, **include)[0]) == {'3'}
    module = {'default_hooks.peft.targets.module': 'backbone.stages.3'}
    below = module | {'default_hooks.peft.unfreeze': ()}
    assert trained_stages(build(name, **below)[0]) == {'0', '1', '2', '3'}


def test_tables_of_relative_positions_can_be_thawed():
    tables = {'default_hooks.peft.unfreeze': ('relative_position_bias_table',)}
    model, _ = build('dino_swin-t_coco', **tables)
    for block in model.backbone.stages[2].blocks:
        assert block.attn.w_msa.relative_position_bias_table.requires_grad
        assert not block.norm1.weight.requires_grad


def test_rates():
    """The backbone's own, not a tenth of it; and layer by layer by the names that layers have."""
    keys = {f'backbone.stages.{stage}': dict(lr_mult=0.5 ** (3 - stage)) for stage in range(4)}
    custom = {'optim_wrapper.paramwise_cfg.custom_keys': keys}
    model, cfg = build('deformable-detr_swin-t_coco', **custom)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rates = {id(p): group['lr'] / 3e-4 for group in groups for p in group['params']}
    for name, adapter in named_adapters(model.backbone).items():
        stage = re.match(r'stages\.(\d)', name)
        expected = 0.5 ** (3 - int(stage[1])) if stage else 1.0
        assert [rates[id(p)] for p in adapter.parameters()] == pytest.approx([expected] * 2), name
    assert rates[id(model.encoder.layers[0].self_attn.sampling_offsets.weight)] == pytest.approx(
        0.1
    )


def test_adapters_in_frozen_stages_stop_the_run(workplace):
    cfg = config('rtmdet_tiny_coco', **{'model.backbone.frozen_stages': 0})
    pretrain(cfg)
    with pytest.raises(TrainingError, match=r'3 of 33 adapters .*backbone\.stem\.0.*frozen_stages'):
        run(cfg, 'train')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('method', ['LoRA', 'FLoRA', 'LieRA', 'DoRA'])
def test_activations_in_place(method, dtype):
    """DETR's MLPs and RTMDet's channel attention change what an adapted layer returned."""

    def gradients(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(48, 64, 1),
            nn.Hardsigmoid(inplace),
            nn.Flatten(2),
            nn.LayerNorm(9),
            nn.SiLU(inplace),
            nn.Linear(9, 48),
            nn.ReLU(inplace),
            nn.Linear(48, 40),
            nn.SiLU(inplace),
        )
        mmpeft.inject(model, dict(type=method, rank=2), dict(exclude=('7',)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            for batch in (1, 2):
                model(torch.randn(batch, 48, 3, 3)).float().square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    tolerance = 1e-5 if dtype == torch.float32 else 0.25
    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
