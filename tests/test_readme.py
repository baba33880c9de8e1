"""The README's examples, as they stand."""

import copy
import json
import re
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.engine.config import compose
from mmpeft.engine.data_check import missing_data
from mmpeft.engine.launch import build_runner
from mmpeft.engine.packages import import_task
from mmpeft.methods import Adapter
from tests.cases import randomize

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, flags=re.DOTALL)
SMALL = dict(name='convnextv2_atto', pretrained=False, depths=(1, 1, 1, 1))


def make_pets(root):
    """Two classes of rectangles in COCO's format."""
    (root / 'images').mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ('train', 'val'):
        images, annotations = [], []
        for number in range(2):
            name = f'{split}{number}.jpg'
            picture = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            picture[10:40, 20:50] = 255 * number
            cv2.imwrite(str(root / 'images' / name), picture)
            images.append(dict(id=number, file_name=name, width=64, height=64))
            corners = [20, 10, 50, 10, 50, 40, 20, 40]
            annotations.append(
                dict(
                    id=number + 1,
                    image_id=number,
                    category_id=number + 1,
                    bbox=[20, 10, 30, 30],
                    area=900,
                    iscrowd=0,
                    segmentation=[corners],
                )
            )
        categories = [dict(id=1, name='cat'), dict(id=2, name='dog')]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / f'{split}.json').write_text(json.dumps(content))


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_a_new_dataset_by_inheritance(tmp_path, monkeypatch):
    block = next(b for b in BLOCKS if 'data/pets' in b)
    assert len(block.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    make_pets(tmp_path / 'data/pets')
    (tmp_path / 'pets.py').write_text(block)
    smaller = {
        'model.backbone': SMALL,
        'model.neck.in_channels': [40, 80, 160, 320],
        'train_cfg.max_epochs': 1,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'test_dataloader.num_workers': 0,
        'test_dataloader.persistent_workers': False,
        'train_dataloader.batch_size': 2,
        'model.train_cfg.rpn_proposal.max_per_img': 20,
        'model.train_cfg.rcnn.sampler.num': 8,
        'model.test_cfg.rpn.max_per_img': 20,
        'train_dataloader.dataset.pipeline.2.scale': (64, 64),
        'val_dataloader.dataset.pipeline.1.scale': (64, 64),
        'default_hooks.peft.method.rank': 4,
        'work_dir': str(tmp_path / 'work'),
        'log_level': 'ERROR',
    }
    config = compose('pets.py', options=smaller)
    import_task(config)
    assert not missing_data(config, ('train', 'val', 'test'))
    runner = build_runner(config)
    runner.train()
    assert any(isinstance(module, Adapter) for module in runner.model.modules())
    assert runner.model.roi_head.bbox_head.num_classes == 2
    assert runner.train_dataloader.dataset.metainfo['classes'] == ('cat', 'dog')
    stored = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    assert stored['meta']['dataset_meta']['classes'] == ('cat', 'dog')


def test_adapting_ones_own_config():
    block = next(b for b in BLOCKS if b.startswith('default_hooks'))
    names = {}
    exec(block, names)
    hook = mmpeft.registry.HOOKS.build(names['default_hooks']['peft'])
    assert hook.method.rank == 32 and hook.targets.module == 'backbone'


def test_several_adapters_on_one_base(tmp_path, monkeypatch):
    block = next(b for b in BLOCKS if 'AdapterLibrary' in b)
    monkeypatch.chdir(tmp_path)
    detector, x = build_detector(), torch.randn(1, 3, 8, 8)
    before, expected = detector(x), {}
    for seed, name in enumerate(re.findall(r"'(\w+)\.safetensors'", block)):
        adapted = copy.deepcopy(detector)
        mmpeft.inject(adapted, dict(type='FLoRA', rank=2), dict(module='backbone'))
        torch.manual_seed(seed)
        randomize(adapted)
        nn.init.normal_(adapted.head.weight)
        expected[name] = adapted(x)
        mmpeft.save_adapter(adapted, f'{name}.safetensors')
    names = dict(detector=detector)
    exec(block, names)
    assert len(expected) == 2 and names['adapters'].current == 'harbour'
    for name, output in expected.items():
        assert torch.equal(names['adapters'].use(name)(x), output)
    assert not torch.equal(names['adapters'].use('both')(x), expected['city'])
    assert torch.equal(names['adapters'].use(None)(x), before)


def build_detector():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    parts = dict(backbone=backbone, head=nn.Conv2d(8, 2, 1))
    return nn.Sequential(OrderedDict(parts))


def test_the_table_of_families_is_true():
    """Each method's config stands in the row of its family, and in no other."""
    rows = re.findall(r'^\| \[(\w+)\]\(docs/methods.md#\w+\) \| .* \| (.+) \|$', README, re.M)
    listed = {name: family for family, names in rows for name in re.findall(r'`(\w+)`', names)}
    assert len(listed) == sum(names.count('`') for _, names in rows) / 2
    true = {}
    for path in (ROOT / 'configs/_base_/methods').glob('*.py'):
        config = {}
        exec(path.read_text(), config)
        true[path.stem] = mmpeft.METHODS.build(config['peft']['method']).card.family
    assert listed == true


def test_links_lead_somewhere():
    pages = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')]
    for path in (*pages, *(ROOT / 'configs').glob('*/README.md')):
        for link in re.findall(r'\]\((?!http)([^)]+)\)', path.read_text()):
            file, _, anchor = link.partition('#')
            target = path.parent / file if file else path
            assert target.exists(), f'{path.name}: {link}'
            assert not anchor or anchor in anchors_of(target), f'{path.name}: {link}'


def anchors_of(path):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r'^#+ (.+)$', path.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', text.lower()).replace(' ', '-') for text in headings}
