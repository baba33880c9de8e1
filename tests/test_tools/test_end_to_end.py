"""From data to a deployed model, through the real tools, on each of the formats.

Our tools are called in this process; what runs merged models is one that never imports mmpeft.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from mmdet.apis import init_detector

from mmpeft.engine.command_line import run
from mmpeft.engine.config import read_config

pytestmark = pytest.mark.filterwarnings('ignore')

ROOT = Path(__file__).parents[2]
# Upstream's test.py, and then some lines of code.
WITHOUT_MMPEFT = """
import runpy, sys
import torch
torch.set_num_threads(1)
code, *sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
exec(code)
assert 'mmpeft' not in sys.modules
"""


def upstream_test(package, code, *arguments, cwd):
    """Call an upstream package's test.py, and run code after it; nothing imports mmpeft."""
    tool = Path(find_spec(package).origin).with_name('.mim') / 'tools/test.py'
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', WITHOUT_MMPEFT, code, str(tool), *arguments],
        cwd=cwd,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.fixture(scope='module')
def workplace(tmp_path_factory, compose, script):
    """A folder with demo data, a base and flora_coco.py, a config of the demo."""
    folder = tmp_path_factory.mktemp('workplace')
    words = f'digits.py --out {folder}/data/digits --train 4 --val 4 --source 10'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', words.split())
        script('projects/demo', 'digits').main()
    torch.manual_seed(0)
    settings = read_config(compose('flora', 'coco', folder)).model.backbone
    base = timm.create_model(settings.name, depths=settings.depths, num_classes=10)
    (folder / 'work_dirs/demo').mkdir(parents=True)
    torch.save(base.state_dict(), folder / 'work_dirs/demo/base.pth')
    return folder


@pytest.fixture
def call(script, workplace, monkeypatch, scope):
    """Call one of our tools in this process, in the workplace."""
    monkeypatch.chdir(workplace)

    def tool(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, arguments)])
        run(script('tools', name).main)

    return tool


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


@pytest.mark.parametrize('task', TASKS)
def test_one_score_from_adapters_and_from_merged_weights(task, workplace, call):
    package, names, steps = TASKS[task]
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
    data = ['--cfg-options', *validate_on_train(task)]
    config = f'{task}_adapter/{task}.py'  # as the training has composed it
    checkpoints = {'adapter': f'{task}_adapter/iter_{steps}.pth'}
    if task == 'ade20k':
        checkpoints['everything'] = f'{task}_everything/iter_{steps}.pth'
    for name, checkpoint in checkpoints.items():
        words = [f'mmpeft::demo/_base_/{task}.py', '--method', 'flora']
        saved = [f'default_hooks.peft.save_frozen={name == "everything"}']
        call('train', *words, '--work-dir', f'{task}_{name}', *options, *saved)
        call('test', config, checkpoint, '--work-dir', f'{task}_test_{name}', *data)
    merged = f'{task}_merged/model'
    (workplace / f'{task}_merged').mkdir()
    merging = [config, checkpoints['adapter'], f'{merged}.pth', '--backbone', 'mmpretrain']
    call('merge', *merging)
    plain = (workplace / f'{merged}.py').read_text()
    assert 'mmpeft' not in plain.replace('work_dirs', '')
    words = [f'{merged}.py', f'{merged}.pth', '--work-dir', f'{task}_test_merged', *data]
    upstream_test(package, INFER if task == 'coco' else '', *words, cwd=workplace)
    scores = {name: metrics(workplace, f'{task}_test_{name}') for name in (*checkpoints, 'merged')}
    for name in names:
        found = [scores[run][name] for run in scores]
        assert all(value == found[0] for value in found[:-1])
        assert found[-1] == pytest.approx(found[0], abs=2e-3)
        assert found[0] > 0.02, f'{name} tells nothing: {found}'
    if task == 'ade20k':
        check_checkpoints(*(workplace / path for path in checkpoints.values()))


def check_checkpoints(adapter, everything):
    """What both hold is the same, and the base makes the difference."""
    first, second = (torch.load(p, weights_only=False)['state_dict'] for p in (adapter, everything))
    assert first.keys() < second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert adapter.stat().st_size < everything.stat().st_size - 4_000_000


# mmdet's DetInferencer on the merged model of the task coco.
INFER = """
from pathlib import Path
from mmdet.apis import DetInferencer
picture = next(Path('data/digits/coco/train').glob('*.jpg'))
inferencer = DetInferencer('coco_merged/model.py', 'coco_merged/model.pth', device='cpu')
found = inferencer(str(picture), out_dir='seen')['predictions'][0]
assert max(found['scores']) > 0.05
assert inferencer.model.dataset_meta['classes'][0] == 'zero'
assert list(Path('seen/vis').glob('*.jpg'))
"""


def test_merging_an_upstream_backbone_leaves_a_plain_config(workplace, call):
    """A ResNet of mmdet: adapt, merge, and compare with the adapted model tensor by tensor."""
    (workplace / 'resnet.py').write_text(
        "_base_ = './flora_coco.py'\n"
        "model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18, num_stages=4,\n"
        '    out_indices=(0, 1, 2, 3), frozen_stages=1, norm_eval=True,\n'
        "    norm_cfg=dict(type='BN', requires_grad=True)),\n"
        '    neck=dict(in_channels=[64, 128, 256, 512]))\n'
        'default_hooks = dict(peft=dict(unfreeze=(), targets=dict(exclude=['
        "r'^conv1', r'^layer1'])))\n"
    )
    options = ['train_cfg.max_iters=2', 'train_cfg.val_interval=1000']
    options += ['default_hooks.checkpoint.interval=2', 'train_dataloader.batch_size=2']
    call('train', 'resnet.py', '--work-dir', 'resnet', '--cfg-options', *options)
    call('merge', 'resnet.py', 'resnet/iter_2.pth', 'resnet/merged.pth')
    assert 'mmpeft' not in (workplace / 'resnet/merged.py').read_text()
    loaded = init_detector('resnet/merged.py', 'resnet/merged.pth', device='cpu').state_dict()
    stored = torch.load('resnet/merged.pth', weights_only=False)['state_dict']
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)


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
def test_mistakes_end_in_one_paragraph(option, expected, call, workplace):
    arguments = ['flora_coco.py', '--work-dir', 'mistake', '--cfg-options', option]
    with pytest.raises(SystemExit) as ended:
        call('train', *arguments, 'log_level=ERROR')
    paragraph = ended.value.code
    assert paragraph.startswith('train.py: ') and expected in paragraph
    assert '\n' not in paragraph
    assert not list(workplace.glob('mistake/*.pth'))


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
    assert 'exists already' in paragraph
    assert out.read_text() == 'precious' and len(list(tmp_path.iterdir())) == 2
