"""The README's examples, as they stand."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.engine.config import compose
from mmpeft.engine.data_check import missing_data
from mmpeft.engine.launch import build_runner
from mmpeft.engine.packages import import_task
from mmpeft.methods import Adapter

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


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_a_new_dataset_of_classes_by_inheritance(tmp_path, monkeypatch):
    pages = (ROOT / 'docs/configs.md').read_text()
    block = next(b for b in re.findall(r'```python\n(.*?)```', pages, re.S) if 'data/flowers' in b)
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('daisy', 'rose', 'tulip'):
            folder = tmp_path / 'data/flowers' / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                picture = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / f'{number}.jpg'), picture)
    (tmp_path / 'flowers.py').write_text(block)
    smaller = {
        'model.backbone': SMALL,
        'model.head.in_channels': 320,
        'train_cfg': dict(max_epochs=1, val_interval=1),
        'randomness': dict(seed=0),
        'param_scheduler': [],
        'default_hooks.checkpoint.interval': 1,
        'default_hooks.peft.method.rank': 2,
        'work_dir': str(tmp_path / 'work'),
        'log_level': 'ERROR',
    }
    for loader in ('train', 'val', 'test'):
        smaller |= {
            f'{loader}_dataloader.num_workers': 0,
            f'{loader}_dataloader.persistent_workers': False,
            f'{loader}_dataloader.dataset.pipeline.1.scale': (32, 32),
        }
    config = compose('flowers.py', options=smaller)
    import_task(config)
    assert not missing_data(config, ('train', 'val', 'test'))
    runner = build_runner(config)
    runner.train()
    assert runner.model.head.fc.out_features == 3
    assert len(runner.train_dataloader.dataset) == len(runner.val_dataloader.dataset) == 6
    model = mmpeft.init_model(config, tmp_path / 'work/epoch_1.pth')
    assert model.dataset_meta['classes'] == ('daisy', 'rose', 'tulip')
    assert 0 < mmpeft.summary(model).adapters


def test_the_table_of_families_is_true():
    """Each method file stands in the row of its family, and in no other."""
    rows = re.findall(r'^\| \[(\w+)\]\(docs/methods.md#\w+\) \| .* \| (.+) \|$', README, re.M)
    listed = {name: family for family, names in rows for name in re.findall(r'`(\w+)`', names)}
    assert len(listed) == sum(names.count('`') for _, names in rows) / 2
    true = {}
    for path in (ROOT / 'configs/_base_/methods').glob('*.py'):
        config = {}
        exec(path.read_text(), config)
        true[path.stem] = mmpeft.METHODS.build(config['peft']['method']).card.family
    assert listed == true
