"""Data that is not where a config says."""

import pytest
from mmengine.config import Config

from mmpeft.engine.data_check import check_data, missing_data
from mmpeft.errors import MissingFileError


def test_data_paths_are_found_where_mmengine_looks(tmp_path):
    (tmp_path / 'there').mkdir()
    there = dict(data_root=str(tmp_path), data_prefix=dict(img='there'))
    plain = dict(data_root='no/', ann_file='a.json', data_prefix=dict(img='b/', seg=None))
    cfg = Config(
        dict(
            train_dataloader=dict(
                dataset=dict(
                    type='RepeatDataset', dataset=dict(type='Concat', datasets=[there, plain])
                )
            ),
            val_dataloader=dict(dataset=dict(data_root='s3://bucket', ann_file='a.json')),
            val_evaluator=[dict(type='A'), dict(type='B', ann_file='no/c.json')],
            test_dataloader=dict(dataset=dict(ann_file='lost.json', backend_args=dict(backend=1))),
            test_evaluator=dict(type='B', ann_file='no/d.json'),
        )
    )
    prefix = 'train_dataloader.dataset.dataset.datasets.1'
    assert missing_data(cfg, ('train', 'val', 'test')) == [
        (f'{prefix}.ann_file', 'no/a.json'),
        (f'{prefix}.data_prefix.img', 'no/b'),
        ('val_evaluator.1.ann_file', 'no/c.json'),
        ('test_evaluator.ann_file', 'no/d.json'),
    ]
    assert missing_data(cfg, ()) == []


def test_missing_data_names_key_and_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data/pets').mkdir(parents=True)
    text = refused(train_dataloader=dict(dataset=dict(ann_file='data/coco/a.json')))
    assert 'data/coco/a.json (train_dataloader.dataset.ann_file)' in text
    assert '(ln -s /where/it/is data/coco)' in text
    assert 'set train_dataloader.dataset.data_root or train_dataloader.dataset.ann_file' in text
    prefix = dict(data_root='data/pets', data_prefix=dict(img='no/img'))
    text = refused(train_dataloader=dict(dataset=prefix))
    assert '(ln -s /where/it/is data/pets/no)' in text
    assert 'set train_dataloader.dataset.data_root or train_dataloader.dataset.data_prefix' in text
    text = refused(val_evaluator=dict(ann_file='data/pets/val.json'))
    assert 'set val_evaluator.ann_file, and' in text
    check_data(Config(dict(val_evaluator=dict(ann_file='data/pets'))), ('val',))


def refused(**config):
    with pytest.raises(MissingFileError) as error:
        check_data(Config(config), ('train', 'val'))
    return str(error.value)
