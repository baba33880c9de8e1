"""Misspelt arguments in configs."""

import pytest
from mmengine.registry import DATASETS, MODELS

from mmpeft.engine.unexpected import naming_arguments
from mmpeft.errors import UsageError
from tests.toy import toy_config


@pytest.mark.parametrize(
    'key, message',
    [
        ('model.backbone.chekpoint', "ToyBackbone has no argument 'chekpoint'.*'checkpoint'"),
        ('train_dataloader.dataset.nois', "ToyImages has no argument 'nois'.*Did you mean 'noise'"),
    ],
)
def test_the_key_is_named(key, message, tmp_path):
    cfg = toy_config(tmp_path, **{key: 1})
    with pytest.raises(UsageError, match=f'^{key}: {message}'), naming_arguments(cfg):
        MODELS.build(cfg.model)
        DATASETS.build(cfg.train_dataloader.dataset)


def test_other_errors_are_left(tmp_path):
    for text in ('unsupported operand', "X.__init__() got an unexpected keyword argument 'other'"):
        with pytest.raises(TypeError, match=text[:3]), naming_arguments(toy_config(tmp_path)):
            raise TypeError(text)
