"""VTAB-1k in small: two tasks of random images with the lists that the real ones have."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.engine.config import compose
from mmpeft.engine.launch import build_runner
from mmpeft.engine.packages import import_task
from mmpeft.errors import MissingFileError, UsageError

pytestmark = pytest.mark.usefixtures('scope')
CONFIG = 'mmpeft::lora/convnext_vtab.py'
RATE = 'optim_wrapper.optimizer.lr'
SMALL = {
    'model.backbone': dict(name='convnextv2_atto', pretrained=False, depths=(1, 1, 1, 1)),
    'model.head.in_channels': 320,
    'train_cfg.max_epochs': 1,
    'param_scheduler': [],
    'default_hooks.peft.method.rank': 2,
    'log_level': 'ERROR',
}
for loader in ('train', 'val', 'test'):
    SMALL[f'{loader}_dataloader.num_workers'] = 0
    SMALL[f'{loader}_dataloader.persistent_workers'] = False
    SMALL[f'{loader}_dataloader.batch_size'] = 4
    SMALL[f'{loader}_dataloader.dataset.serialize_data'] = False
    SMALL[f'{loader}_dataloader.dataset.pipeline.1.scale'] = (32, 32)


@pytest.fixture(scope='module')
def protocol(script):
    return script('projects/vtab', 'vtab.protocol')


def make_task(root, task, classes, a_class=2):
    """Images whose brightness is their class, below ``images`` and in four lists."""
    generator, lists = np.random.default_rng(0), dict(train800=[], val200=[], test=[])
    for name, lines in lists.items():
        (root / task / 'images' / name).mkdir(parents=True)
        for index in range(a_class * classes):
            label, file = index % classes, f'images/{name}/{index}.png'
            image = generator.integers(0, 32, (32, 32, 3)) + 223 * label // classes
            cv2.imwrite(str(root / task / file), image.astype(np.uint8))
            lines.append(f'{file} {label}')
    lists['train800val200'] = lists['train800'] + lists['val200']
    for name, lines in lists.items():
        (root / task / f'{name}.txt').write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='module')
def data(tmp_path_factory, protocol):
    root = tmp_path_factory.mktemp('data') / 'vtab-1k'
    for task in ('kitti', 'patch_camelyon'):
        make_task(root, task, protocol.TASKS[task])
    return root


@pytest.fixture
def tool(script, data, tmp_path, monkeypatch, capsys):
    """benchmark.py as from its command line, on the two tasks."""

    def call(*words):
        cfg = compose(CONFIG, options=SMALL)
        cfg.dump(tmp_path / 'small.py')
        words = ['benchmark.py', tmp_path / 'small.py', '--tasks', 'patch_camelyon', 'kitti',
                 '--data', data, '--work-dir', tmp_path / 'work', *words]  # fmt: skip
        monkeypatch.setattr(sys, 'argv', [str(word) for word in words])
        script('projects/vtab', 'benchmark').main()
        lines = (tmp_path / 'work/runs.jsonl').read_text().splitlines()
        return [json.loads(line) for line in lines], capsys.readouterr().out

    return call


def test_two_tasks_from_command_to_table(protocol, tool, tmp_path):
    records, printed = tool('--seeds', 0, 1)
    assert [(r['task'], r['seed']) for r in records] == [
        (task, seed) for task in ('patch_camelyon', 'kitti') for seed in (0, 1)
    ]
    for record in records:
        assert record['split'] == 'test' and record['memory'] is None and record['seconds'] > 0
        assert record['other_parameters'] == 321 * protocol.TASKS[record['task']]
    config = f'{records[-1]["work_dir"]}/small.py'
    cfg = compose(config)
    model = mmpeft.init_model(config, f'{records[-1]["work_dir"]}/epoch_1.pth')
    trained = mmpeft.summary(model)
    assert records[-1]['backbone_parameters'] == trained.adapters + trained.unfrozen
    assert cfg.train_dataloader.dataset.ann_file == 'train800val200.txt'
    root = Path(cfg.test_dataloader.dataset.data_root)
    right = [classifies(model, root, line) for line in (root / 'test.txt').read_text().splitlines()]
    accuracy = [record['scores']['accuracy/top1'] for record in records]
    assert accuracy[-1] == pytest.approx(100 * np.mean(right), abs=1e-4)
    means = np.mean(accuracy[::2]), np.mean(accuracy[1::2])
    line = next(line for line in printed.splitlines() if 'mean of 2 tasks' in line)
    assert f'{np.mean(means):.2f}' in line and f'{np.std(means, ddof=1):.2f}' in line

    journal = tmp_path / 'work/runs.jsonl'
    journal.write_text(journal.read_text().replace('"accuracy/top1": ', '"accuracy/top1": 1'))
    again, printed = tool('--seeds', 0, 1)  # reads the records, and runs nothing
    assert len(again) == 4 and min(r['scores']['accuracy/top1'] for r in again) >= 10


def classifies(model, root, line):
    """Whether a line's image is classified as it says, by torch alone."""
    file, label = line.split()
    image = torch.tensor(cv2.imread(str(root / file))[..., ::-1].copy())
    with torch.no_grad():
        pooled = model.backbone(image.permute(2, 0, 1)[None] / 255)[-1].mean((2, 3))
    return model.head.fc(pooled).argmax().item() == int(label)


def test_an_interrupted_run_goes_on(protocol, data, tmp_path, monkeypatch):
    """From its last checkpoint, though it is killed between training and the record."""
    cfg = compose(CONFIG, options=SMALL)
    import_task(cfg)
    with monkeypatch.context() as patch:
        patch.setattr('mmengine.runner.Runner.test', lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            protocol.benchmark(cfg, tmp_path, ['patch_camelyon'], root=data)
    (checkpoint,) = tmp_path.glob('*/epoch_1.pth')
    before = checkpoint.stat().st_mtime_ns
    (record,) = protocol.benchmark(cfg, tmp_path, ['patch_camelyon'], root=data)
    assert checkpoint.stat().st_mtime_ns == before
    assert 0 <= record['accuracy'] <= 100


def test_a_rate_that_diverges_loses(protocol, data, tmp_path):
    cfg = compose(CONFIG, options=SMALL | {'train_cfg.max_epochs': 4})
    import_task(cfg)
    grid = {RATE: [1e30, 1e-3]}
    (record,) = protocol.benchmark(cfg, tmp_path, ['patch_camelyon'], grid=grid, root=data)
    trials = [json.loads(line) for line in (tmp_path / 'runs.jsonl').read_text().splitlines()]
    assert [trial['scores'] is None for trial in trials] == [True, False, False]
    assert trials[0]['error'] and record == trials[2] | dict(accuracy=record['accuracy'])
    (config,) = Path(record['work_dir']).glob('*.py')
    assert compose(config).optim_wrapper.optimizer.lr == 1e-3


def test_an_evaluator_without_the_accuracy_is_refused(protocol, data, tmp_path):
    evaluator = dict(test_evaluator=dict(type='Accuracy', topk=(2,)))
    cfg = compose(CONFIG, options=SMALL | evaluator)
    import_task(cfg)
    with pytest.raises(UsageError, match=r'the evaluator of this config gives accuracy/top2'):
        protocol.benchmark(cfg, tmp_path, ['patch_camelyon'], grid={RATE: [1e-3, 1e-4]}, root=data)


def test_a_grid_of_the_methods_own_arguments(protocol, data, tmp_path):
    cfg = compose(CONFIG, options=SMALL)
    import_task(cfg)
    protocol.benchmark(cfg, tmp_path, ['patch_camelyon'], grid=dict(rank=[1, 3]), root=data)
    trials = [json.loads(line) for line in (tmp_path / 'runs.jsonl').read_text().splitlines()]
    assert trials[0]['backbone_parameters'] < trials[1]['backbone_parameters']


def test_a_task_changes_data_and_classes_alone(protocol):
    cfg = compose('mmpeft::liera/convnext_vtab.py')
    other = protocol.for_task(cfg, 'sun397', protocol.TUNING)
    assert other.model.head.num_classes == 397
    loaders = [other[f'{name}_dataloader'].dataset for name in ('train', 'val', 'test')]
    assert {loader.data_root for loader in loaders} == {'data/vtab-1k/sun397'}
    assert [loader.ann_file for loader in loaders] == ['train800.txt', 'val200.txt', 'val200.txt']
    assert other.model.backbone == cfg.model.backbone
    with pytest.raises(UsageError, match="no task 'cifar100'. Did you mean 'cifar'"):
        protocol.for_task(cfg, 'cifar100')


def test_data_that_is_missing_is_named(protocol, data, tmp_path):
    """And where it comes from; no task is run if one is missing."""
    cfg = compose(CONFIG, options=SMALL)
    with pytest.raises(MissingFileError, match=r'dtd/train800val200.txt.*/NOAH') as error:
        protocol.benchmark(cfg, tmp_path, ['kitti', 'dtd'], root=data)
    assert 'test.txt' in str(error.value)
    with pytest.raises(
        UsageError, match="optim_wrapper.optimiser.lr: the config has no 'optimiser'"
    ):
        protocol.benchmark(
            cfg, tmp_path, ['kitti'], grid={'optim_wrapper.optimiser.lr': [1, 2]}, root=data
        )
    assert not list(tmp_path.iterdir())
    shutil.copytree(data / 'kitti', tmp_path / 'kitti')
    (tmp_path / 'kitti/val200.txt').unlink()
    with pytest.raises(MissingFileError, match='val200.txt'):  # which tuning alone needs
        protocol.benchmark(cfg, tmp_path, ['kitti'], grid={RATE: [1, 2]}, root=tmp_path)


def test_the_runner_reads_the_layout(protocol, data):
    cfg = protocol.for_task(compose(CONFIG, options=SMALL), 'kitti', root=data)
    import_task(cfg)
    cfg.work_dir = str(data.parent / 'work')
    runner = build_runner(cfg)
    dataset = runner.build_dataloader(cfg.train_dataloader).dataset
    assert len(dataset) == 2 * 2 * 4
    images = runner.model.data_preprocessor(dict(inputs=[dataset[0]['inputs']]))['inputs']
    assert images.shape == (1, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert dataset[5]['data_samples'].gt_label.item() == 1
