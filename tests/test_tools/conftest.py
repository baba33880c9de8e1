"""The scripts of tools/ as modules."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

import mmpeft
from mmpeft.checkpoint.keys import adapter_state_dict
from mmpeft.checkpoint.manifest import describe
from mmpeft.engine.launch import import_task, read_config
from tests.cases import randomize


@pytest.fixture(scope='session')
def compose(script):
    """Write the config of a method on one of the demo's tasks."""
    return script('demo', 'experiment').compose


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
    import_task(cfg)
    init_default_scope(cfg.default_scope)
    base = Path(cfg.model.backbone.checkpoint)
    if not base.exists():
        plain = MODELS.build(dict(cfg.model.backbone, checkpoint=None))
        plain.init_weights()
        base.parent.mkdir(parents=True, exist_ok=True)
        torch.save(getattr(plain, 'model', plain).state_dict(), base)
    model = MODELS.build(cfg.model)
    model.backbone.init_weights()
    hook = cfg.default_hooks.peft
    targets = dict(module='backbone') | dict(hook.get('targets', {}))
    mmpeft.inject(model, hook.method, targets, hook.get('unfreeze', ()))
    randomize(model, std=0.02)
    meta = dict(mmpeft=describe(model) | dict(holds_base=False, base_checkpoint=None))
    torch.save(dict(meta=meta, state_dict=adapter_state_dict(model)), out)
