"""The demo's data, read back by the datasets of mmdet, mmseg, mmrotate and mmpretrain."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

CLASSES = dict(
    digits=('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine'),
    photos=('mammal', 'bird', 'fish', 'flower', 'fruit', 'vegetable', 'tool', 'instrument'),
)
SPLITS = dict(train='training', val='validation')
SIZES = dict(train=6, val=4)


@pytest.fixture(scope='module', params=CLASSES)
def kind(request):
    return request.param


@pytest.fixture(scope='module')
def digits(script):
    return script('projects/demo', 'digits')


@pytest.fixture(scope='module')
def photos(script):
    return script('projects/demo', 'photos')


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """Cut-outs and photographs of one's own: four of each, with grain, of every shape."""
    root, rng = tmp_path_factory.mktemp('own'), np.random.default_rng(0)
    for name in CLASSES['photos']:
        for number in range(4):
            height, width = rng.integers(30, 220, 2)
            picture = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
            picture[..., 3] = 0
            centre, axes = (width // 2, height // 2), (width // 2 - 4, height // 3)
            cv2.ellipse(alpha := picture[..., 3].copy(), centre, axes, 0, 0, 360, 255, -1)
            picture[..., 3] = alpha
            write(root / 'cutouts' / name / f'{number}.png', picture)
    for number in range(4):
        picture = rng.integers(0, 256, (160, 240, 3), dtype=np.uint8)
        write(root / 'photographs' / f'{number}.jpg', picture)
    return root


def write(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


@pytest.fixture(scope='module')
def make(kind, request):
    """Call the tool in this process."""
    module, words = request.getfixturevalue(kind), ['--source', 20]
    if kind == 'photos':
        folder = request.getfixturevalue('own')
        words = ['--cutouts', folder / 'cutouts', '--photographs', folder / 'photographs']

    def tool(out, seed):
        given = ['--out', out, '--seed', seed, '--train', 6, '--val', 4, *words]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', list(map(str, [f'{kind}.py', *given])))
            module.main()

    return tool


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def data(tmp_path_factory, make, kind):
    out = tmp_path_factory.mktemp('data') / kind
    make(out, 3)
    return out


@pytest.fixture(scope='module')
def coco(data, kind):
    from mmcv.transforms import Compose, LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    def read(split):
        dataset = CocoDataset(
            data_root=str(data / 'coco'),
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=split),
            metainfo=dict(classes=CLASSES[kind]),
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
        assert (masks.sum(0) <= 1).all(), 'a pixel belongs to the topmost instance alone'


def test_truth_is_read_for_the_pictures(coco, script, data, kind):
    from mmdet.datasets import CocoDataset

    dataset = CocoDataset(
        data_root=str(data / 'coco'),
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val'),
        metainfo=dict(classes=CLASSES[kind]),
        test_mode=True,
    )
    info = dataset.get_data_info(1)
    seen = script('projects/demo', 'demo_pictures').truth_of(info, dataset)
    scene = coco['val'][Path(info['img_path']).stem]
    assert seen.labels == scene['gt_bboxes_labels'].tolist()
    assert (np.stack(seen.masks) == scene['gt_masks'].masks).all()
    boxes = [[*corners.min(0), *corners.max(0)] for corners in seen.outlines]
    assert boxes == scene['gt_bboxes'].tensor.tolist()


@pytest.mark.parametrize('split', SPLITS)
def test_ade20k_labels_are_the_masks(data, coco, kind, split):
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations

    dataset = BaseSegDataset(
        data_root=str(data / 'ade20k'),
        data_prefix=dict(
            img_path=f'images/{SPLITS[split]}', seg_map_path=f'annotations/{SPLITS[split]}'
        ),
        metainfo=dict(classes=('background', *CLASSES[kind])),
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
def test_dota_boxes_are_tight_around_the_instances(data, coco, kind, split):
    from mmrotate.datasets import DOTADataset

    dataset = DOTADataset(
        data_root=str(data / 'dota'),
        ann_file=f'{split}/annfiles/',
        data_prefix=dict(img_path=f'{split}/images/'),
        metainfo=dict(classes=CLASSES[kind]),
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
@pytest.mark.parametrize('kind', ['digits'], indirect=True)
def test_classification_lists_pictures_of_one_digit(data, digits, kind, split):
    from mmpretrain.datasets import CustomDataset

    dataset = CustomDataset(
        data_root=str(data / 'classification'),
        ann_file=f'{split}.txt',
        metainfo=dict(classes=CLASSES[kind]),
    )
    assert len(dataset) == 4 * SIZES[split]
    rng = np.random.default_rng([3, list(SPLITS).index(split), 2])
    for index in range(len(dataset)):
        info, scene = dataset.get_data_info(index), _single(digits, rng, split)
        assert (cv2.imread(info['img_path'])[..., ::-1] == scene.image).all()
        assert [digit.label for digit in scene.instances] == [info['gt_label']]


def _single(digits, rng, split):
    from scenes import draw_scene

    source = digits.Digits(*digits.load_scans()[split])
    return draw_scene(rng, source, size=40, count=(1, 1), height=(30, 40), turn=10)


@pytest.mark.parametrize('kind', ['digits'], indirect=True)
def test_source_holds_single_digits_of_every_class(data, kind):
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
    import scene_files

    part = tmp_path / 'scenes.part'
    (part / 'coco' / 'train').mkdir(parents=True)
    (part / 'coco' / 'train' / 'left_over.jpg').write_bytes(b'half an imag')

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scene_files.json, 'dumps', interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / 'scenes', 3)
    assert not (tmp_path / 'scenes').exists()
    make(tmp_path / 'scenes', 3)
    assert files_of(tmp_path / 'scenes') == files_of(data)
    assert not part.exists()


def test_train_and_val_share_no_cutout_and_no_photograph(photos, own):
    splits = photos.load_photos(own / 'cutouts', own / 'photographs')
    for pictures in ('photographs', 'cutouts'):
        found = {}
        for split, source in splits.items():
            parts = getattr(source, pictures)
            parts = sum(parts, []) if pictures == 'cutouts' else parts
            found[split] = {part.tobytes() for part in parts}
        number = 4 * 8 if pictures == 'cutouts' else 4
        assert len(found['train']) + len(found['val']) == number and found['val']
        assert not found['train'] & found['val']


def test_drawings_are_left_out(own, tmp_path, script):
    read = script('projects/demo', 'photo_scenes').read_cutout
    picture = cv2.imread(str(own / 'cutouts/bird/0.png'), cv2.IMREAD_UNCHANGED)
    write(tmp_path / 'photo.png', picture)
    write(tmp_path / 'opaque.png', picture[..., :3])
    picture[..., :3] = [10, 200, 30]
    write(tmp_path / 'drawing.png', picture)
    assert read(tmp_path / 'photo.png').max() == 1
    assert read(tmp_path / 'opaque.png') is None and read(tmp_path / 'drawing.png') is None


@pytest.mark.parametrize('lacking', ['cutouts', 'photographs'])
def test_missing_pictures_name_the_command(photos, own, tmp_path, lacking):
    folders = {name: own / name for name in ('cutouts', 'photographs')} | {lacking: tmp_path}
    with pytest.raises(SystemExit, match='apt-get install .*tuxpaint-stamps-default') as error:
        photos.load_photos(**folders)
    assert str(tmp_path) in str(error.value) and '--cutouts' in str(error.value)


def test_missing_folders_are_named(photos, own, tmp_path):
    with pytest.raises(SystemExit, match='none does not exist'):
        photos.load_photos(tmp_path / 'none', own / 'photographs')
    with pytest.raises(SystemExit, match=r'neither the folder mammal .* nor animals/mammals'):
        photos.load_photos(tmp_path, own / 'photographs')
    with pytest.raises(SystemExit, match='none does not exist'):
        photos.load_photos(own / 'cutouts', tmp_path / 'none')


def test_seen_is_what_was_written(script, own, tmp_path):
    """A scene of one cut-out: the image is the photograph outside of it."""
    module = script('projects/demo', 'photo_scenes')
    from scenes import draw_scene

    source = module.load_photos(own / 'cutouts', own / 'photographs')['train']
    scene = draw_scene(np.random.default_rng(2), source, size=96, count=(1, 1))
    behind = source.background(np.random.default_rng(2), 96)
    (instance,) = scene.instances
    outside = ~(instance.mask | scene.rim)
    assert 0.02 < instance.mask.mean() < 0.6
    assert abs(scene.image[outside] / 255 - behind[outside]).max() <= 0.06
    assert abs(scene.image[instance.mask] / 255 - behind[instance.mask]).mean() > 0.1
