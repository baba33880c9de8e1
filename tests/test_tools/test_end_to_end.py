"""From data to a deployed model, through the real tools, on each of the formats.

The tools of a task are called one after another in one process, as from a
shell. There is no time limit: a busy machine may take long.
"""

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch

from mmpeft.engine.config import read_config
from mmpeft.engine.launch import run

ROOT = Path(__file__).parents[2]
CALLER = """
import json, os, runpy, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
for script, *arguments in json.loads(sys.argv[2]):
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name='__main__')
"""


def call(folder, *commands):
    """Call tools one after another in one process, in a folder."""
    commands = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', CALLER, str(ROOT), commands],
        cwd=folder,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def upstream(package, tool):
    return Path(find_spec(package).origin).with_name('.mim') / 'tools' / tool


@pytest.fixture(scope='module')
def workplace(tmp_path_factory, compose):
    """A folder with demo data, a base and flora_coco.py, a config of the demo."""
    folder = tmp_path_factory.mktemp('workplace')
    digits = ROOT / 'projects/demo/digits.py'
    call(folder, [digits, '--out', 'data/digits', '--train', 4, '--val', 4, '--source', 10])
    torch.manual_seed(0)
    settings = read_config(compose('flora', 'coco', folder)).model.backbone
    base = timm.create_model(settings.name, depths=settings.depths, num_classes=10)
    (folder / 'work_dirs/demo').mkdir(parents=True)
    torch.save(base.state_dict(), folder / 'work_dirs/demo/base.pth')
    return folder


# Upstream package, metrics, and steps in which four images are learnt well enough to compare.
TASKS = dict(
    coco=('mmdet', ['coco/bbox_mAP', 'coco/segm_mAP'], 16),
    ade20k=('mmseg', ['mIoU'], 10),
    dota=('mmrotate', ['dota/mAP'], 16),
    classification=('mmpretrain', ['accuracy/top1'], 16),
)


def validate_on_train(task):
    """Options by which the few images that were learnt are those that are evaluated."""
    if task == 'coco':
        ann = 'annotations/instances_train.json'
        return [
            f'test_dataloader.dataset.ann_file={ann}',
            'test_dataloader.dataset.data_prefix.img=train/',
            f'test_evaluator.ann_file=data/digits/coco/{ann}',
        ]
    if task == 'dota':
        return [
            'test_dataloader.dataset.ann_file=train/annfiles/',
            'test_dataloader.dataset.data_prefix.img_path=train/images/',
        ]
    if task == 'classification':
        return ['test_dataloader.dataset.ann_file=train.txt']
    return [
        'test_dataloader.dataset.data_prefix.img_path=images/training',
        'test_dataloader.dataset.data_prefix.seg_map_path=annotations/training',
    ]


def metrics(folder, work_dir):
    (path,) = (folder / work_dir).glob('*/*.json')
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_one_score_from_adapters_from_everything_and_from_merged_weights(task, workplace):
    package, names, steps = TASKS[task]
    source = f'mmpeft::demo/_base_/{task}.py'
    train = [ROOT / 'tools/train.py', source, '--method', 'flora', '--work-dir']
    config = f'{task}_adapter/{task}.py'  # as the training has composed it
    options = [
        '--cfg-options',
        f'train_cfg.max_iters={steps}',
        'train_cfg.val_interval=1000',
        f'default_hooks.checkpoint.interval={steps}',
        'train_dataloader.batch_size=4',
        'optim_wrapper.optimizer.lr=2e-3',
        'param_scheduler.0.end=5',
        'param_scheduler.1.begin=5',
        f'param_scheduler.1.end={steps}',
    ]
    checkpoints = {name: f'{task}_{name}/iter_{steps}.pth' for name in ('adapter', 'everything')}
    data = ['--cfg-options', *validate_on_train(task)]
    merged = f'{task}_merged/model'
    out = {} if task == 'ade20k' else {name: f'{task}_{name}.pkl' for name in checkpoints}

    def saved(name):
        return ['--out', out[name]] if name in out else []

    (workplace / f'{task}_merged').mkdir()
    test = [ROOT / 'tools/test.py', config]
    merge = [ROOT / 'tools/merge.py', config, checkpoints['adapter'], f'{merged}.pth']
    call(
        workplace,
        [*train, f'{task}_adapter', *options],
        [*train, f'{task}_everything', *options, 'default_hooks.peft.save_frozen=True'],
        *(
            [*test, checkpoints[name], '--work-dir', f'{task}_test_{name}', *saved(name), *data]
            for name in checkpoints
        ),
        [*merge, '--backbone', 'mmpretrain'],
    )
    plain = (workplace / f'{merged}.py').read_text()
    assert 'mmpeft' not in plain.replace('work_dirs', '')
    call(
        workplace,
        [
            *[upstream(package, 'test.py'), f'{merged}.py', f'{merged}.pth'],
            *['--work-dir', f'{task}_test_merged', *data],
        ],
    )
    scores = {
        name: metrics(workplace, f'{task}_test_{name}')
        for name in ('adapter', 'everything', 'merged')
    }
    for name in names:
        found = [scores[run][name] for run in scores]
        assert found[0] == found[1]
        assert found[2] == pytest.approx(found[0], abs=2e-3)
        assert found[0] > 0.02, f'{name} tells nothing: {found}'
    sizes = {name: (workplace / path).stat().st_size for name, path in checkpoints.items()}
    assert sizes['adapter'] < sizes['everything'] - 4_000_000
    if out:
        first, second = (pickle.loads((workplace / path).read_bytes()) for path in out.values())
        for a, b in zip(first, second, strict=True):
            found = [each.get('pred_instances', each) for each in (a, b)]
            name = 'scores' if 'scores' in found[0] else 'pred_score'
            assert torch.equal(*(torch.as_tensor(each[name]) for each in found))
    if task == 'coco':
        check_inferencer(workplace, merged)


def check_inferencer(folder, merged):
    """mmdet's DetInferencer on the merged model, in a process without mmpeft."""
    picture = next((folder / 'data/digits/coco/train').glob('*.jpg'))
    code = (
        'import sys\n'
        'from mmdet.apis import DetInferencer\n'
        f"inferencer = DetInferencer({merged + '.py'!r}, {merged + '.pth'!r}, device='cpu')\n"
        f"found = inferencer({str(picture)!r}, out_dir='seen')['predictions'][0]\n"
        "assert 'mmpeft' not in sys.modules\n"
        "print('BEST', max(found['scores']), inferencer.model.dataset_meta['classes'][0])\n"
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    best, name = done.stdout.split('BEST')[1].split()
    assert float(best) > 0.05 and name == 'zero'
    assert list((folder / 'seen/vis').glob('*.jpg'))


@pytest.mark.slow
def test_merging_an_upstream_backbone_leaves_a_plain_config(workplace):
    """A ResNet of mmdet: adapt, merge, and compare with the adapted model tensor by tensor."""
    config = workplace / 'resnet.py'
    config.write_text(
        "_base_ = './flora_coco.py'\n"
        "model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18, num_stages=4,\n"
        '    out_indices=(0, 1, 2, 3), frozen_stages=1, norm_eval=True,\n'
        "    norm_cfg=dict(type='BN', requires_grad=True)),\n"
        '    neck=dict(in_channels=[64, 128, 256, 512]))\n'
        'default_hooks = dict(peft=dict(unfreeze=(), targets=dict(exclude=['
        "r'^conv1', r'^layer1'])))\n"
    )
    options = ['train_cfg.max_iters=2', 'default_hooks.checkpoint.interval=2']
    call(
        workplace,
        [*[ROOT / 'tools/train.py', config, '--work-dir', 'resnet'], '--cfg-options', *options],
        [ROOT / 'tools/merge.py', config, 'resnet/iter_2.pth', 'resnet/merged.pth'],
    )
    assert 'mmpeft' not in (workplace / 'resnet/merged.py').read_text()
    code = (
        'import sys, torch\n'
        'from mmdet.apis import init_detector\n'
        "model = init_detector('resnet/merged.py', 'resnet/merged.pth', device='cpu')\n"
        "assert 'mmpeft' not in sys.modules\n"
        "torch.save(model.state_dict(), 'resnet/loaded.pth')\n"
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=workplace, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = torch.load(workplace / 'resnet/loaded.pth')
    stored = torch.load(workplace / 'resnet/merged.pth', weights_only=False)['state_dict']
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)


@pytest.fixture
def train(script, workplace, monkeypatch, scope):
    """Call tools/train.py in this process, in the workplace."""
    monkeypatch.chdir(workplace)

    def tool(*arguments):
        monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
        run(script('tools', 'train').main)

    return tool


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'option, expected',
    [
        ('default_hooks.peft.method.kernal_rank=1', "FLoRA has no argument 'kernal_rank'. Did"),
        ('default_hooks.peft.targets.include=[stagess]', "pattern 'stagess' matches no weight"),
        ('default_hooks.peft.method.rank=5000', 'rank=5000 is larger than any of its weights'),
        ('model.backbone.checkpoint=none.pth', "'none.pth' does not exist"),
        ('train_dataloader.dataset.ann_file=none.json', 'none.json'),
    ],
)
def test_mistakes_end_in_one_paragraph(option, expected, train, workplace):
    arguments = ['flora_coco.py', '--work-dir', 'mistake', '--cfg-options', option]
    with pytest.raises(SystemExit) as ended:
        train(*arguments, 'log_level=ERROR')
    paragraph = ended.value.code
    assert paragraph.startswith('train.py: ') and expected in paragraph
    assert '\n' not in paragraph
    assert not list(workplace.glob('mistake/*.pth'))


@pytest.mark.slow
def test_a_shell_shows_the_paragraph_alone(tmp_path):
    """And merging overwrites nothing."""
    out, checkpoint = tmp_path / 'model.pth', tmp_path / 'any.pth'
    out.write_text('precious')
    torch.save(dict(state_dict={}), checkpoint)
    command = [ROOT / 'tools/merge.py', ROOT / 'configs/flora/convnext_coco.py', checkpoint, out]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    (paragraph,) = [line for line in done.stderr.splitlines() if line.startswith('merge.py: ')]
    assert 'exist already' in paragraph
    assert out.read_text() == 'precious' and len(list(tmp_path.iterdir())) == 2
