"""The launch tools, from the command line on a COCO set of a few images."""

import argparse
import json
import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config

from mmpeft.engine import launch
from mmpeft.engine.command_line import add_arguments, run
from mmpeft.errors import MissingFileError, UsageError

ROOT = Path(__file__).parents[2]

TINY = """
_base_ = '{root}/configs/frozen/convnext_coco.py'

data_root = '{data}/'
metainfo = dict(classes=('bright', 'dark'))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)

model = dict(
    backbone=dict(name='convnextv2_atto', pretrained=False, checkpoint='{base}',
        depths=(1, 1, 1, 1)),
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        mask_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=32, num_classes=2),
        mask_head=dict(num_convs=1, in_channels=32, conv_out_channels=32, num_classes=2)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(
        rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)))
"""
METHOD = "dict(type='LoRA', rank=2)"


def write_coco(root, images=4, size=64):
    """Rectangles on noise in COCO's format, at the places that COCO 2017 has."""
    import cv2

    rng = np.random.default_rng(0)
    for split in ('train2017', 'val2017'):
        (root / split).mkdir(parents=True)
        content = dict(
            images=[],
            annotations=[],
            categories=[dict(id=1, name='bright'), dict(id=2, name='dark')],
        )
        for i in range(1, images + 1):
            image = rng.integers(100, 150, (size, size, 3), dtype=np.uint8)
            name = f'{i:012d}.png'
            content['images'].append(dict(id=i, file_name=name, width=size, height=size))
            for k, shade in enumerate((230, 20)):
                x, y = (int(v) + 32 * k * (i % 2) for v in rng.integers(2, 8, 2))
                w, h = (int(v) for v in rng.integers(16, 24, 2))
                image[y : y + h, x : x + w] = shade
                content['annotations'].append(
                    dict(
                        id=len(content['annotations']) + 1,
                        image_id=i,
                        category_id=k + 1,
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                    )
                )
            cv2.imwrite(str(root / split / name), image)
        (root / 'annotations').mkdir(exist_ok=True)
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(content))


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A folder with a data set, a base and tiny.py, a config for them."""
    folder = tmp_path_factory.mktemp('launch')
    write_coco(folder / 'data')
    base = folder / 'base.pth'
    torch.save(timm.create_model('convnextv2_atto', depths=(1, 1, 1, 1)).state_dict(), base)
    (folder / 'tiny.py').write_text(TINY.format(root=ROOT, data=folder / 'data', base=base))
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def call(*command, cwd, **environment):
    env = os.environ | dict(
        PYTHON=sys.executable,
        PYTHONPATH=str(ROOT),
        PORT=free_port(),
        OMP_NUM_THREADS='1',
        CUDA_VISIBLE_DEVICES='-1',
    )
    env.update(environment)
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope='module')
def trained(tiny):
    """What `dist_train.sh CONFIG 1 --shard` leaves on two nodes without accelerators."""
    words = ['tiny.py', 1, '--auto-scale-lr', '--shard', '--method', METHOD]
    port = free_port()
    nodes = [dict(NNODES='2', NODE_RANK=rank, PORT=port) for rank in '01']
    script = ROOT / 'tools/dist_train.sh'
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda node: call(script, *words, cwd=tiny, **node), nodes))
    log = ''.join(done.stdout + done.stderr for done in both)
    assert [done.returncode for done in both] == [0, 0], log[-6000:]
    return tiny / 'work_dirs/lora_rank-2/tiny', log


def test_two_nodes_train_without_a_gpu(trained):
    folder, log = trained
    checkpoint = torch.load(folder / 'epoch_1.pth', map_location='cpu', weights_only=False)
    assert 'parameters are spread over 2 processes' in log
    # four images, one in each of two processes: two steps
    assert checkpoint['meta']['iter'] == 2
    assert 'coco/bbox_mAP' in log and 'coco/segm_mAP' in log
    # --auto-scale-lr: 2 of the 32 images that 1e-4 is for
    assert checkpoint['optimizer']['param_groups'][0]['initial_lr'] == pytest.approx(1e-4 / 16)
    state = checkpoint['state_dict']
    moved = [k for k in state if k.endswith('lora_B') and state[k].abs().max() > 0]
    assert moved


def test_two_processes_test_with_flips_and_pictures(tiny, trained):
    """By the composed config in the work directory, which knows the method."""
    composed = trained[0] / 'tiny.py'
    before = composed.read_text()
    done = call(
        *(ROOT / 'tools/dist_test.sh', composed, trained[0] / 'epoch_1.pth', 2),
        *('--tta', '--out', 'found.pkl', '--show-dir', 'drawn', '--work-dir', 'tested'),
        cwd=tiny,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert 'coco/segm_mAP' in done.stdout + done.stderr
    found = pickle.loads((tiny / 'found.pkl').read_bytes())
    assert len(found) == 4
    assert all(len(each['pred_instances']['masks']) == 5 for each in found)
    # upstream's visualizers draw in the first process alone, which has half of the images
    assert len(list(tiny.glob('tested/*/drawn/*.png'))) == 2
    assert composed.read_text() == before and "type='LoRA'" in before


def test_missing_data_is_one_paragraph(tiny, tmp_path, script, monkeypatch, scope):
    """The key and the file; no work directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'other.py').write_text(
        f"_base_ = '{tiny}/tiny.py'\n"
        "train_dataloader = dict(dataset=dict(data_root='data/cats/'))\n"
    )
    monkeypatch.setattr(sys, 'argv', ['train.py', 'other.py'])
    with pytest.raises(SystemExit) as ended:
        run(script('tools', 'train').main)
    assert 'data/cats/annotations/instances_train2017.json' in ended.value.code
    assert 'train_dataloader.dataset.ann_file' in ended.value.code
    assert not (tmp_path / 'work_dirs').exists()


@pytest.mark.parametrize('script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_scripts_say_how_they_are_called(script, tmp_path):
    done = call(ROOT / f'tools/{script}.sh', cwd=tmp_path)
    assert done.returncode == 2
    assert f'tools/{script}.sh ' in done.stderr and 'CONFIG' in done.stderr


def slurm_words(folder, script, *words, **env):
    """What a Slurm script calls srun with, by an srun that prints its arguments."""
    srun = folder / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    plain = {k: v for k, v in os.environ.items() if k not in ('GPUS', 'GPUS_PER_NODE')}
    env = plain | dict(PATH=f'{folder}:{os.environ["PATH"]}', **env)
    words = [ROOT / f'tools/{script}.sh', *words]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split('\n')


def test_slurm_passes_arguments_on(tmp_path):
    given = 'part', 'job', 'a config.py', 'out', '--amp'
    words = slurm_words(tmp_path, 'slurm_train', *given, GPUS='16', SRUN_ARGS='-x n1')
    assert ['-p', 'part'] == words[:2]
    assert {'--ntasks=16', '--gres=gpu:8', '-x', 'n1', 'a config.py', '--work-dir=out'} <= {*words}
    assert words[-4:-1] == ['--amp', '--launcher', 'slurm']


@pytest.mark.parametrize(
    'env, expected',
    [({}, (8, 8)), (dict(GPUS='4'), (4, 4)), (dict(GPUS='4', GPUS_PER_NODE='2'), (4, 2))],
)
def test_slurm_asks_a_node_for_no_more_gpus_than_it_uses(env, expected, tmp_path):
    words = slurm_words(tmp_path, 'slurm_test', 'part', 'job', 'config.py', 'a.pth', **env)
    tasks, each = expected
    assert {f'--ntasks={tasks}', f'--gres=gpu:{each}', f'--ntasks-per-node={each}'} <= {*words}


@pytest.mark.parametrize('launcher', ['none', 'pytorch'])
def test_a_local_rank_is_set_for_launched_processes_only(monkeypatch, launcher):
    monkeypatch.setenv('LOCAL_RANK', 'put back')
    monkeypatch.delenv('LOCAL_RANK')
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config = str(ROOT / 'configs/frozen/convnext_coco.py')
    launch.load_config(parser.parse_args([config, '--launcher', launcher]))
    assert os.environ.get('LOCAL_RANK') == dict(none=None, pytorch='0')[launcher]


def test_checkpoint_that_does_not_exist(tmp_path):
    with pytest.raises(MissingFileError, match='no checkpoint .*missing.pth'):
        launch.check_checkpoint(tmp_path / 'missing.pth')
    launch.check_checkpoint('https://example.com/remote.pth')


def test_auto_scale_lr_needs_a_batch_size():
    for without in (dict(), dict(auto_scale_lr=None)):
        with pytest.raises(UsageError, match='base_batch_size'):
            launch.enable_auto_scale_lr(Config(without))
    cfg = Config(dict(auto_scale_lr=dict(enable=False, base_batch_size=16)))
    launch.enable_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable


def test_sharding_is_an_argument_of_the_hook():
    cfg = Config(dict(default_hooks=dict(peft=dict(type='mmpeft.PEFTHook'))))
    launch.enable_shard(cfg)
    assert cfg.default_hooks.peft.shard
    with pytest.raises(UsageError, match=r'--shard: \S+ has no PEFTHook, .* Add --method'):
        launch.enable_shard(Config(dict()))
