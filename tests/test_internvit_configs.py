"""The InternViT configs: read, built whole without memory, and run small."""

from pathlib import Path

import pytest
import torch

from mmpeft.engine.config import read_config
from tests.tasks import adapt, batch, build

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('scope')
SHARES = dict(
    flora=0.00667,
    liera=0.00666,
    lora=0.00666,
    dora=0.00690,
    bitfit=0.000157,
    full=1.0,
    frozen=0.0,
)


def read(method):
    return read_config(ROOT / f'configs/{method}/internvit_ade20k.py')


def test_every_config_is_a_case():
    assert {path.parent.name for path in ROOT.glob('configs/*/internvit_ade20k.py')} == set(SHARES)


@pytest.mark.parametrize('method', SHARES)
def test_shares_of_the_whole_model(method):
    cfg = read(method)
    with torch.device('meta'):
        model = build(cfg)
        summary = adapt(model, cfg)
    share = 1.0 if method == 'full' else summary.share
    assert share == pytest.approx(SHARES[method], abs=2e-5)
    assert summary.base == 5_902_793_600
    frozen = {p.dtype for p in model.backbone.parameters() if not p.requires_grad}
    assert frozen == (set() if method == 'full' else {torch.bfloat16})
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}


def test_recipe():
    cfg = read('flora')
    assert cfg.model.test_cfg.to_dict() == dict(
        mode='slide', crop_size=(504, 504), stride=(322, 322)
    )
    assert cfg.train_cfg.max_iters == 80_000
    assert cfg.optim_wrapper.optimizer.lr == 4e-5
    assert cfg.auto_scale_lr.base_batch_size == 16 == 8 * cfg.train_dataloader.batch_size
    crops = [t for t in cfg.train_dataloader.dataset.pipeline if t.type == 'RandomCrop']
    assert crops[0].crop_size == (504, 504)
    assert cfg.model.decode_head.channels == cfg.model.auxiliary_head.channels == 1536
    assert cfg.model.backbone.drop_path == 0.4 and cfg.model.backbone.with_cp


@pytest.mark.parametrize('method', ['flora', 'dora', 'full'])
def test_small_models_learn_and_predict(method):
    cfg = read(method)
    width = 32
    arch = dict(depth=4, width=width, heads=2, hidden=64, image_size=56)
    cfg.model.backbone.update(arch=arch, checkpoint=None, drop_path=0.0)
    cfg.model.neck.embed_dim = width
    cfg.model.data_preprocessor.size = (112, 112)
    cfg.model.decode_head.update(in_channels=[width] * 4, channels=32)
    cfg.model.auxiliary_head.update(in_channels=width, channels=32)
    cfg.model.test_cfg.update(crop_size=(112, 112), stride=(70, 70))
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.norm_cfg.type = 'BN'
    model = build(cfg)
    adapt(model, cfg)
    data = model.data_preprocessor(batch('mmseg', 112), True)
    losses = model(**data, mode='loss')
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    from mmseg.structures import SegDataSample

    size = (100, 150)
    sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size))
    images = dict(inputs=[torch.zeros(3, *size, dtype=torch.uint8)], data_samples=[sample])
    with torch.no_grad():
        (result,) = model.test_step(images)
    assert result.pred_sem_seg.data.shape == (1, 100, 150)
