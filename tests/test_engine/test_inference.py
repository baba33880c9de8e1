"""Models for inference from whatever training and merging save."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner

import mmpeft
from mmpeft.engine.building import build_model
from mmpeft.engine.config import compose
from mmpeft.engine.merging import merged, write_merged
from mmpeft.engine.tta import enable_tta
from mmpeft.errors import MissingFileError, UsageError
from tests import toy
from tests.cases import randomize

pytestmark = [
    pytest.mark.usefixtures('scope'),
    pytest.mark.filterwarnings('ignore:.*adapters have more parameters'),
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A trained toy: its config, its folder, and its scores on the validation images."""
    folder = tmp_path_factory.mktemp('inference')
    pretrained = toy.save_weights(folder / 'pretrained.pth')
    cfg = toy.toy_config(folder / 'run', **{'model.backbone.checkpoint': pretrained})
    runner = Runner.from_cfg(cfg)
    runner.train()
    return cfg, folder / 'run', toy.scores(runner.val())


def without_hook(cfg):
    cfg = compose(cfg)
    cfg.default_hooks.pop('peft')
    return cfg


def scores_of(model):
    loader = Runner.build_dataloader(model.cfg.val_dataloader, seed=0)
    with torch.no_grad():
        found = [model.test_step(batch) for batch in loader]
    return np.array([each['scores'].tolist() for batch in found for each in batch])


@pytest.mark.parametrize('file', ['epoch_3.pth', 'epoch_3.safetensors'])
@pytest.mark.parametrize('hook', [True, False])
def test_adapters(file, hook, run):
    """With the hook by the config, without it by what the file lists."""
    cfg, folder, expected = run
    model = mmpeft.init_model(cfg if hook else without_hook(cfg), folder / file)
    assert not model.training and len(mmpeft.summary(model).rows) == 4
    np.testing.assert_array_equal(scores_of(model), expected)
    assert set(model.dataset_meta) == {'classes', 'palette'}


def test_a_merged_checkpoint_by_its_config_and_by_that_of_training(run, tmp_path):
    cfg, folder, expected = run
    plain, state = merged(mmpeft.init_model(cfg, folder / 'epoch_3.pth'), cfg)
    config = write_merged(tmp_path / 'merged.pth', plain, state)
    for each in (config, cfg):
        model = mmpeft.init_model(each, tmp_path / 'merged.pth')
        assert not getattr(model, 'peft', [])
        np.testing.assert_allclose(scores_of(model), expected, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_with_everything_needs_no_base(run, tmp_path):
    cfg, *_ = run
    cfg = compose(cfg, None, {'default_hooks.peft.save_frozen': True})
    cfg.work_dir = str(tmp_path / 'run')
    runner = Runner.from_cfg(cfg)
    runner.train()
    elsewhere = compose(cfg, None, {'model.backbone.checkpoint': 'none.pth'})
    model = mmpeft.init_model(elsewhere, tmp_path / 'run/epoch_3.pth')
    np.testing.assert_array_equal(scores_of(model), toy.scores(runner.val()))


def test_adapters_at_their_start(run):
    cfg, _, expected = run
    model = mmpeft.init_model(cfg)
    assert len(mmpeft.summary(model).rows) == 4
    assert np.abs(scores_of(model) - expected).max() > 1e-3
    other = mmpeft.init_model(without_hook(cfg), method='ia3')
    assert {row.method for row in mmpeft.summary(other).rows} == {'IA3()'}


def test_a_data_preprocessor_beside_the_model():
    """As mmpretrain's configs have it; one in the model comes first."""
    cfg = compose('mmpretrain::resnet/resnet18_8xb16_cifar10.py', 'lora')

    def means(model):
        return model.data_preprocessor.mean.flatten().tolist()

    model = mmpeft.init_model(cfg)
    assert means(model) == pytest.approx(cfg.data_preprocessor.mean)
    plain, _ = merged(model, cfg)
    assert means(MODELS.build(plain.model)) == pytest.approx(cfg.data_preprocessor.mean)
    cfg.model.data_preprocessor = dict(mean=[1.0, 2.0, 3.0], std=[1.0, 1.0, 1.0])
    assert means(mmpeft.init_model(cfg)) == [1, 2, 3]
    enable_tta(cfg)
    assert means(build_model(cfg).module) == [1, 2, 3]


def test_random_numbers_go_on_as_before(run):
    cfg, folder, _ = run
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    mmpeft.init_model(cfg, folder / 'epoch_3.pth')
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize('file', ['epoch_3.pth', 'epoch_3.safetensors'])
def test_heads_that_do_not_fit_are_refused(file, run, monkeypatch):
    cfg, folder, _ = run
    original = toy.ToyClassifier.__init__

    def more_classes(self, backbone):
        original(self, backbone)
        self.head = torch.nn.Linear(16, 7)

    monkeypatch.setattr(toy.ToyClassifier, '__init__', more_classes)
    with pytest.raises(UsageError, match=r'head\.bias.*\(3,\).*\(7,\)'):
        mmpeft.init_model(cfg, folder / file)


def test_another_method_or_base_is_refused(run):
    cfg, folder, _ = run
    with pytest.raises(UsageError, match='it has FLoRA at .* and the model DoRA'):
        mmpeft.init_model(cfg, folder / 'epoch_3.pth', method='dora')
    other = compose(cfg, None, {'model.backbone.checkpoint': None})
    for file in ('epoch_3.pth', 'epoch_3.safetensors'):
        with pytest.raises(UsageError, match='another frozen base'):
            mmpeft.init_model(other, folder / file)


def test_what_does_not_exist(run):
    cfg, *_ = run
    with pytest.raises(MissingFileError, match='no checkpoint .none.pth'):
        mmpeft.init_model(cfg, 'none.pth')
    with pytest.raises(UsageError, match='has no PEFTHook, and no checkpoint was given'):
        mmpeft.init_model(without_hook(cfg))


@pytest.mark.parametrize('task', ['coco', 'dota', 'ade20k', 'classification', 'internvit'])
def test_the_inference_functions_of_each_task(task, tmp_path):
    """The functions of mmdet, mmseg and mmpretrain take the model; twice the same predictions."""
    config = f'mmpeft::demo/_base_/{task}.py'
    options = {'model.backbone.checkpoint': None, 'randomness': dict(seed=3)}
    first = mmpeft.init_model(config, method='lora', options=options)
    randomize(first, 0.05)
    file = mmpeft.save_adapter(first, tmp_path / 'adapter.safetensors')
    second = mmpeft.init_model(config, file, method='lora', options=options)
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    one, two = (predicted(model, image) for model in (first, second))
    assert one.shape == two.shape and torch.equal(one, two)


def predicted(model, image):
    if model.cfg.default_scope == 'mmseg':
        from mmseg.apis import inference_model

        return inference_model(model, image).seg_logits.data
    if model.cfg.default_scope == 'mmpretrain':
        from mmpretrain.apis import ImageClassificationInferencer

        return torch.tensor(ImageClassificationInferencer(model)(image)[0]['pred_scores'])
    from mmdet.apis import inference_detector

    model.cfg.test_dataloader.dataset.pipeline[0].type = 'mmdet.LoadImageFromNDArray'
    found = inference_detector(model, image).pred_instances
    return torch.cat([found.scores[:, None], torch.as_tensor(found.bboxes)], 1)
