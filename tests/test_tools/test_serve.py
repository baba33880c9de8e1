"""Several adapters with heads of their own on one frozen backbone, through the tool."""

import copy
import json
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import mmpeft
from mmpeft.checkpoint.keys import frozen_keys
from mmpeft.checkpoint.manifest import describe
from mmpeft.engine.config import read_config
from mmpeft.engine.prediction import load_on_one_base, pictures_in
from mmpeft.errors import UsageError
from mmpeft.injection.weights import plain_key
from tests.cases import randomize
from tests.networks import Net

pytestmark = pytest.mark.filterwarnings('ignore')

# 80 classes of COCO beside the demo's ten digits.
EIGHTY = """
_base_ = './flora_coco.py'
model = dict(
    roi_head=dict(bbox_head=dict(num_classes=80), mask_head=dict(num_classes=80)),
    test_cfg=dict(rcnn=dict(score_thr=0.0)),  # untrained: one of 81 is no more than likely
)
test_dataloader = dict(dataset=dict(metainfo=dict(_delete_=True)))
"""
CONFIGS = dict(
    eighty='eighty',
    digits='lora_coco',
    roads='liera_dota',
    scenes='houlsby_ade20k',
    single='dora_classification',
)


@pytest.fixture(scope='module')
def serve(script):
    return script('tools', 'serve')


@pytest.fixture(scope='module')
def folder(tmp_path_factory, compose):
    """Configs on one base, an adapter for each, and two pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('serve')
    for name in ('flora_coco', *list(CONFIGS.values())[1:]):
        compose(*name.split('_'), folder)
    (folder / 'eighty.py').write_text(EIGHTY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = read_config('flora_coco.py').model.backbone
        network = timm.create_model(settings.name, depths=settings.depths, num_classes=10)
        (folder / 'work_dirs/demo').mkdir(parents=True)
        torch.save(network.state_dict(), folder / 'work_dirs/demo/base.pth')
        for name, config in CONFIGS.items():
            make_adapter(name, f'{config}.py')
        (folder / 'pictures').mkdir()
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 255, (96, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'pictures/{number}.png')
    return folder


def make_adapter(name, config):
    """As training would save it: a file of save_adapter for one, checkpoints for the others."""
    model = mmpeft.init_model(config)
    randomize(model, 0.05)
    if name == 'digits':
        mmpeft.save_adapter(model, f'{name}.safetensors')
        return
    meta = dict(mmpeft=describe(model) | dict(holds_base=False, base_checkpoint=None))
    torch.save(dict(meta=meta, state_dict=mmpeft.adapter_state_dict(model)), f'{name}.pth')


def arguments(names):
    files = {name: f'{name}.safetensors' if name == 'digits' else f'{name}.pth' for name in names}
    return [f'--adapter={name}={CONFIGS[name]}.py:{files[name]}' for name in names]


def call(serve, monkeypatch, *words):
    monkeypatch.setattr(sys, 'argv', ['serve.py', *map(str, words)])
    serve.main()


def test_five_models_on_one_backbone(serve, folder, monkeypatch):
    monkeypatch.chdir(folder)
    adapters = serve.adapters_of([a.split('=', 1)[1] for a in arguments(CONFIGS)])
    loaded, shared = load_on_one_base(adapters, 'cpu')
    first, *others = loaded.values()
    state = {plain_key(k): v for k, v in first.state_dict().items()}
    sizes = 0
    for model in others:
        own = model.state_dict()
        frozen = frozen_keys(model)
        assert frozen and all(key.startswith('backbone.') for key in frozen)
        for key in frozen:
            assert own[key].data_ptr() == state[plain_key(key)].data_ptr(), key
        sizes += sum(own[key].nbytes for key in frozen)
    assert shared == sizes > 4 * 7_000_000
    assert first.roi_head.bbox_head.num_classes == 80
    assert others[0].roi_head.bbox_head.num_classes == 10
    x = torch.randn(1, 3, 64, 64)
    for name in ('digits', 'scenes'):
        alone = mmpeft.init_model(*adapters[name])
        with torch.no_grad():
            pairs = zip(alone.extract_feat(x), loaded[name].extract_feat(x), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), name


def test_predictions_and_pictures_of_each(serve, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    call(serve, monkeypatch, *arguments(CONFIGS), '--out', 'seen', '--device', 'cpu', 'pictures')
    assert '5 models share' in capsys.readouterr().out
    for name in CONFIGS:
        classes = json.loads((folder / f'seen/{name}/classes.json').read_text())
        assert len(classes) == dict(eighty=80, scenes=11).get(name, 10)
        assert len(list((folder / f'seen/{name}/vis').iterdir())) == 2
        if name == 'scenes':
            assert len(list((folder / f'seen/{name}/pred').iterdir())) == 2
            continue
        for number in range(2):
            found = json.loads((folder / f'seen/{name}/preds/{number}.json').read_text())
            if name == 'single':
                assert found['pred_label'] == np.argmax(found['pred_scores'])
                assert found['pred_class'] == classes[found['pred_label']]
                continue
            assert found['scores'] and len(found['scores']) == len(found['bboxes'])
            assert max(found['labels']) < len(classes)
            assert len(found['bboxes'][0]) == (5 if name == 'roads' else 4)


def test_one_of_two_and_nothing_overwritten(serve, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = [*arguments(['eighty', 'digits']), '--out', 'one', '--device', 'cpu', 'pictures/1.png']
    call(serve, monkeypatch, *words, '--use', 'digits')
    assert [path.name for path in (folder / 'one').iterdir()] == ['digits']
    written = folder / 'one/digits/preds/1.json'
    before = written.read_text()
    written.write_text('precious')
    with pytest.raises(UsageError, match='one/digits exists already'):
        call(serve, monkeypatch, *words, '--use', 'digits')
    assert written.read_text() == 'precious'
    call(serve, monkeypatch, *words, '--use', 'digits', '--overwrite')
    assert written.read_text() == before


def test_another_base_is_refused(serve, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    state = torch.load('work_dirs/demo/base.pth')
    state['stem.0.bias'][0] += 1e-3
    torch.save(state, tmp_path / 'base.pth')
    checkpoint = str(tmp_path / 'base.pth')
    (folder / 'elsewhere.py').write_text(
        f"_base_ = './lora_coco.py'\nmodel = dict(backbone=dict(checkpoint={checkpoint!r}))\n"
    )
    mmpeft.save_adapter(mmpeft.init_model('elsewhere.py'), tmp_path / 'a.safetensors')
    words = arguments(['eighty']) + [f'--adapter=other=elsewhere.py:{tmp_path / "a.safetensors"}']
    expected = r"'eighty' and 'other' have different .*stem_0\.bias is .*\(eighty\) and \w{16} "
    with pytest.raises(UsageError, match=expected):
        call(serve, monkeypatch, *words, '--out', tmp_path / 'out', '--device', 'cpu', 'pictures')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'words, message',
    [
        (['--adapter', 'a=b.py'], r'write NAME=CONFIG:FILE'),
        (['--adapter', '../a=b.py:c.pth'], r'write NAME=CONFIG:FILE'),
        (['--adapter', 'a=b.py:c', '--adapter', 'a=d.py:e'], "'a' comes twice"),
        (['--adapter', 'coco=b.py:c', '--use', 'koko'], "no adapter 'koko'"),
        (['--adapter', 'a=none.py:c.pth'], "no config 'none.py'"),
        (['--adapter', 'a=flora_coco.py:none.pth'], "no checkpoint 'none.pth'"),
        (['--adapter', 'a=plain.py:digits.safetensors'], 'has no model'),
        (['--adapter', 'a=eighty.py:digits.safetensors'], 'differ in|does not fit'),
    ],
)
def test_mistakes(serve, folder, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    (folder / 'plain.py').write_text("default_scope = 'mmdet'\n")
    with pytest.raises(UsageError, match=message):
        call(serve, monkeypatch, *words, '--out', 'none', '--device', 'cpu', 'pictures')
    assert not (folder / 'none').exists()


def test_pictures(tmp_path):
    for name in ('b.png', 'a.JPG', 'note.txt', 'more/a.png', 'empty/x.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert pictures_in([tmp_path]) == [str(tmp_path / 'a.JPG'), str(tmp_path / 'b.png')]
    with pytest.raises(UsageError, match='under one name'):
        pictures_in([tmp_path, tmp_path / 'more'])
    for missing in ('none', 'empty'):
        with pytest.raises(FileNotFoundError, match='no pictures'):
            pictures_in([tmp_path / missing])


def test_what_only_some_freeze_is_not_shared():
    base = Net()
    models = {name: copy.deepcopy(base) for name in ('a', 'b', 'c')}
    unfreeze = dict(a=(), b=[r'norm'], c=())
    for name, model in models.items():
        mmpeft.inject(
            model, dict(type='LoRA', rank=1), dict(module='backbone'), unfreeze=unfreeze[name]
        )
    freed = mmpeft.share_base(models)
    plain = {n: {plain_key(k): v for k, v in m.state_dict().items()} for n, m in models.items()}
    same = {
        (name, key)
        for name in 'bc'
        for key, value in plain[name].items()
        if key in plain['a'] and value.data_ptr() == plain['a'][key].data_ptr()
    }
    expected = {('c', key) for key in base.state_dict() if key.startswith('backbone')}
    trained = {key for key in base.state_dict() if 'norm.weight' in key or 'norm.bias' in key}
    expected |= {('b', key) for _, key in expected if key not in trained}
    assert same == expected
    assert freed == sum(base.state_dict()[key].nbytes for _, key in expected)
    assert mmpeft.share_base(models) == 0


def test_merging_one_of_those_that_share():
    base = Net().eval()
    models = {name: copy.deepcopy(base) for name in 'ab'}
    x = torch.randn(2, 8, 6, 6)
    for model in models.values():
        mmpeft.inject(model, dict(type='LoRA', rank=1), dict(module='backbone'))
        randomize(model)
    expected = models['b'](x)
    mmpeft.share_base(models)
    mmpeft.merge(models['a'])
    assert torch.equal(models['b'](x), expected)
