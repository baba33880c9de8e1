"""The demo's tasks with a method, as configs and checkpoints that the tools take."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from mmpeft.checkpoint.keys import adapter_state_dict
from mmpeft.checkpoint.manifest import describe
from mmpeft.engine.building import adapt, build_model
from mmpeft.engine.config import compose as compose_config
from mmpeft.engine.config import read_config
from tests.cases import randomize


@pytest.fixture(scope='session')
def compose():
    """Write the config of a method on one of the demo's tasks."""

    def write(method, task, folder):
        path = folder / f'{method}_{task}.py'
        compose_config(f'mmpeft::demo/_base_/{task}.py', method).dump(path)
        return path

    return write


@pytest.fixture(scope='session')
def adapted_demo(tmp_path_factory, compose):
    """A demo task's config and a checkpoint with adapters off their start, in a folder of theirs.

    The base has random weights, and there is no data. Paths in the config are
    relative to the folder. ``adapt`` makes the checkpoint of another config there.
    """
    folder = tmp_path_factory.mktemp('adapted_demo')

    def make(task, method='flora'):
        config = compose(method, task, folder)
        checkpoint = config.with_suffix('.pth')
        if not checkpoint.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                _adapt(read_config(config), checkpoint)
        return config, checkpoint

    make.folder, make.adapt = folder, _adapt
    return make


def _adapt(cfg, out):
    torch.manual_seed(0)
    model = build_model(cfg)
    base = Path(cfg.model.backbone.checkpoint)
    if not base.exists():
        plain = MODELS.build(dict(cfg.model.backbone, checkpoint=None))
        plain.init_weights()
        base.parent.mkdir(parents=True, exist_ok=True)
        torch.save(getattr(plain, 'model', plain).state_dict(), base)
    model.backbone.init_weights()
    adapt(model, cfg)
    randomize(model, std=0.02)
    meta = dict(mmpeft=describe(model) | dict(holds_base=False, base_checkpoint=None))
    torch.save(dict(meta=meta, state_dict=adapter_state_dict(model)), out)
