"""The demo's data, read back by the datasets of mmdet, mmseg, mmrotate and mmpretrain."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
SPLITS = dict(train='training', val='validation')
SIZES = dict(train=6, val=4)


@pytest.fixture(scope='module')
def digits(script):
    return script('projects/demo', 'digits')


@pytest.fixture(scope='module')
def make(digits):
    """Call the tool in this process."""

    def tool(out, seed):
        words = ['digits.py', '--out', out, '--seed', seed]
        words += ['--train', 6, '--val', 4, '--source', 20]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', list(map(str, words)))
            digits.main()

    return tool


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def data(tmp_path_factory, make):
    out = tmp_path_factory.mktemp('data') / 'digits'
    make(out, 3)
    return out


@pytest.fixture(scope='module')
def coco(data):
    from mmcv.transforms import Compose, LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    def read(split):
        dataset = CocoDataset(
            data_root=str(data / 'coco'),
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=split),
            metainfo=dict(classes=DIGITS),
            test_mode=True,
        )
        load = Compose([LoadImageFromFile(), LoadAnnotations(with_mask=True)])
        scenes = {}
        for index in range(len(dataset)):
            scene = load(dataset.get_data_info(index))
            scenes[Path(scene['img_path']).stem] = scene
        return scenes

    return {split: read(split) for split in SPLITS}


@pytest.mark.parametrize('split', SPLITS)
def test_coco_boxes_enclose_their_masks(coco, split):
    assert len(coco[split]) == SIZES[split]
    for scene in coco[split].values():
        boxes = scene['gt_bboxes'].tensor.numpy()
        masks = scene['gt_masks'].masks
        assert len(boxes) == len(masks) == len(scene['gt_bboxes_labels']) > 0
        assert cv2.imread(scene['img_path']).shape == (128, 128, 3)
        for box, mask in zip(boxes, masks, strict=True):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert (masks.sum(0) <= 1).all(), 'a pixel belongs to the topmost digit alone'


@pytest.mark.parametrize('split', SPLITS)
def test_ade20k_labels_are_the_masks(data, coco, split):
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations

    dataset = BaseSegDataset(
        data_root=str(data / 'ade20k'),
        data_prefix=dict(
            img_path=f'images/{SPLITS[split]}', seg_map_path=f'annotations/{SPLITS[split]}'
        ),
        metainfo=dict(classes=('background', *DIGITS)),
        reduce_zero_label=True,
    )
    load = LoadAnnotations(imdecode_backend='cv2')
    assert len(dataset) == SIZES[split]
    for index in range(len(dataset)):
        info = load(dataset.get_data_info(index))
        scene = coco[split][Path(info['img_path']).stem]
        expected = np.zeros((128, 128), int)
        for label, mask in zip(scene['gt_bboxes_labels'], scene['gt_masks'].masks, strict=True):
            expected[mask.astype(bool)] = label + 1
        found = info['gt_seg_map']
        rim = found == 255
        assert 0 < rim.mean() < 0.2
        assert (expected[rim] == 0).all(), 'only background may be undecided'
        assert (found[~rim] == expected[~rim]).all()


def difficulties_of(data, split, name):
    lines = (data / 'dota' / split / 'annfiles' / f'{name}.txt').read_text().splitlines()
    return [int(line.split()[-1]) for line in lines]


@pytest.mark.parametrize('split', SPLITS)
def test_dota_boxes_are_tight_around_the_digits(data, coco, split):
    from mmrotate.datasets import DOTADataset

    dataset = DOTADataset(
        data_root=str(data / 'dota'),
        ann_file=f'{split}/annfiles/',
        data_prefix=dict(img_path=f'{split}/images/'),
        metainfo=dict(classes=DIGITS),
        test_mode=True,
    )
    assert len(dataset) == SIZES[split]
    turned = 0
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        name = Path(info['img_path']).stem
        scene, difficulties = coco[split][name], difficulties_of(data, split, name)
        assert [i['bbox_label'] for i in info['instances']] == list(scene['gt_bboxes_labels'])
        assert cv2.imread(info['img_path']).shape == (128, 128, 3)
        for instance, mask, hidden in zip(
            info['instances'], scene['gt_masks'].masks, difficulties, strict=True
        ):
            corners = np.array(instance['bbox']).reshape(4, 2)
            sides = np.roll(corners, -1, 0) - corners
            sides /= np.linalg.norm(sides, axis=1, keepdims=True)
            assert abs((sides * np.roll(sides, -1, 0)).sum(1)).max() < 0.03, 'right angles'
            turned += abs(sides[0]).min() > 0.1
            y, x = np.nonzero(mask)
            pixels = np.concatenate([np.stack([x + i, y + j], 1) for i in (0, 1) for j in (0, 1)])
            inward = np.stack([-sides[:, 1], sides[:, 0]], 1)
            depth = ((pixels[:, None] - corners) * inward).sum(-1).min(0)
            assert (depth > -0.15).all(), 'the box encloses the mask'
            assert hidden or (depth < 0.15).all(), 'every side touches it'
    assert turned


@pytest.mark.parametrize('split', SPLITS)
def test_classification_lists_pictures_of_one_digit(data, digits, split):
    from mmpretrain.datasets import CustomDataset

    dataset = CustomDataset(
        data_root=str(data / 'classification'),
        ann_file=f'{split}.txt',
        metainfo=dict(classes=DIGITS),
    )
    assert len(dataset) == 4 * SIZES[split]
    rng = np.random.default_rng([3, list(SPLITS).index(split), 2])
    for index in range(len(dataset)):
        info, scene = dataset.get_data_info(index), _single(digits, rng, split)
        assert (cv2.imread(info['img_path'])[..., ::-1] == scene.image).all()
        assert [digit.label for digit in scene.digits] == [info['gt_label']]


def _single(digits, rng, split):
    scans = digits.load_scans()[split]
    return digits.draw_scene(rng, *scans, size=40, count=(1, 1), height=(30, 40), turn=10)


def test_source_holds_single_digits_of_every_class(data):
    with np.load(data / 'source' / 'train.npz') as source:
        assert source['images'].shape == (20, 40, 40, 3) and source['images'].dtype == np.uint8
        assert source['labels'].shape == (20,) and set(source['labels']) <= set(range(10))


def test_train_and_val_share_no_scan(digits):
    splits = digits.load_scans()
    train, val = ({scan.tobytes() for scan in splits[name][0]} for name in SPLITS)
    assert len(splits['train'][0]) + len(splits['val'][0]) == 1797
    assert not train & val


def test_seed_decides_every_byte(data, make, tmp_path):
    make(tmp_path / 'same', 3)
    make(tmp_path / 'other', 4)
    same, other, found = (files_of(p) for p in (tmp_path / 'same', tmp_path / 'other', data))
    assert same == found
    assert other.keys() == found.keys()
    assert all(other[name] != found[name] for name in found if name.endswith('.jpg'))


def test_what_exists_is_kept(data, make):
    before = {path: path.stat().st_mtime_ns for path in data.rglob('*')}
    make(data, 3)
    with pytest.raises(SystemExit, match='--out') as error:
        make(data, 5)
    assert str(data) in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in data.rglob('*')} == before


def test_interruption_leaves_no_half_made_folder(data, make, digits, tmp_path, monkeypatch):
    part = tmp_path / 'digits.part'
    (part / 'coco' / 'train').mkdir(parents=True)
    (part / 'coco' / 'train' / 'left_over.jpg').write_bytes(b'half an imag')

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits.json, 'dumps', interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / 'digits', 3)
    assert not (tmp_path / 'digits').exists()
    make(tmp_path / 'digits', 3)
    assert files_of(tmp_path / 'digits') == files_of(data)
    assert not part.exists()
