"""Datasets that cannot be built."""

import json
from types import SimpleNamespace

import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config

from mmpeft.engine.loops import build_loops
from mmpeft.errors import DamagedFileError, UsageError
from tests.test_engine.test_datasets import IMAGE


class Run:
    """A Runner whose loop is its dataset."""

    def __init__(self, file):
        dataset = dict(ann_file=str(file), metainfo=dict(classes=('cow',)))
        dataset |= dict(filter_cfg=dict(filter_empty_gt=True), pipeline=[])
        dataset |= dict(data_prefix=dict(img=''))
        self.cfg = Config(dict(train_dataloader=dict(dataset=dict(dataset=dataset))))

    @property
    def train_loop(self):
        return CocoDataset(**self.cfg.train_dataloader.dataset.dataset)


def test_a_dataset_without_images_names_file_and_classes(tmp_path):
    file = tmp_path / 'train.json'
    content = dict(images=[IMAGE], annotations=[], categories=[dict(id=1, name='cat')])
    file.write_text(json.dumps(content))
    text = (
        r'dataset of train_dataloader has no image\. It reads .*train\.json '
        r"\(train_dataloader\.dataset\.dataset\.ann_file\), .* 'cow'\. .* the categories 'cat'\."
    )
    with pytest.raises(UsageError, match=text):
        build_loops(Run(file), ['train'])


@pytest.mark.parametrize('content, fault', [('', 'it is empty'), ('{"images": [', 'line 1')])
def test_a_file_that_is_no_json_is_named(content, fault, tmp_path):
    file = tmp_path / 'train.json'
    file.write_text(content)
    with pytest.raises(DamagedFileError, match=rf'train\.json \(train_.*ann_file\).*{fault}'):
        build_loops(Run(file), ['train'])


def test_other_errors_are_left(tmp_path):
    class Other(SimpleNamespace):
        @property
        def train_loop(self):
            raise ValueError('something else')

    with pytest.raises(ValueError, match='something else'):
        build_loops(Other(cfg=Config(dict())), ['train'])
