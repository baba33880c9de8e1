"""Classes that data does not have, data without labels, and heads of other classes."""

import json
from types import SimpleNamespace

import pytest
from mmdet.datasets import CocoDataset
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.runner import BaseLoop
from torch import nn

from mmpeft.engine.datasets import check_datasets
from mmpeft.errors import UsageError

IMAGE = dict(id=1, file_name='1.png', width=8, height=8)
BOX = dict(id=1, image_id=1, category_id=2, bbox=[1, 1, 4, 4], area=16, iscrowd=0)


class Loop(BaseLoop):
    def run(self):
        pass


class Head(nn.Module):
    def __init__(self, num_classes, **attributes):
        super().__init__()
        self.num_classes = num_classes
        vars(self).update(attributes)


class RPNHead(Head):
    pass


class Listed(BaseDataset):
    """A dataset of a task without instances."""

    def load_data_list(self):
        return [dict(img_path='1.png', gt_label=0)]


@pytest.fixture
def coco(tmp_path):
    """Make a dataset of cats and dogs in COCO's format."""

    def make(classes=('cat', 'dog'), annotations=(BOX,)):
        file = tmp_path / 'train.json'
        categories = [dict(id=i, name=name) for i, name in enumerate(('cat', 'dog'), 1)]
        content = dict(images=[IMAGE], annotations=list(annotations), categories=categories)
        file.write_text(json.dumps(content))
        metainfo, prefix = dict(classes=classes), dict(img='')
        return CocoDataset(ann_file=str(file), metainfo=metainfo, data_prefix=prefix, pipeline=[])

    return make


def check(dataset, split='train', warned=None, **heads):
    """Check a Runner with a loop over a dataset and a model with heads, as in a detector."""
    loop = Loop(None, SimpleNamespace(dataset=dataset))
    logger = SimpleNamespace(warning=(warned if warned is not None else []).append)
    model = nn.ModuleDict({name.replace('__', '_'): head for name, head in heads.items()})
    check_datasets(SimpleNamespace(logger=logger, **{f'_{split}_loop': loop}), model)


def test_what_fits_is_not_mentioned(coco):
    warned = []
    roi_head = nn.ModuleDict(dict(bbox_head=Head(2), mask_head=Head(1, class_agnostic=True)))
    other = dict(rpn_head=Head(1), semantic_head=Head(183), backbone=Head(1000), loss=Head(1))
    other |= dict(bbox_head=RPNHead(1))
    check(coco(), warned=warned, roi_head=roi_head, **other)
    check(ConcatDataset([coco(), coco()]), warned=warned, bbox_head=Head(2))
    assert warned == []


def test_a_head_of_fewer_classes_is_refused(coco):
    roi_head = nn.ModuleDict(dict(bbox_head=nn.ModuleList([Head(2), Head(1)])))
    text = r"2 classes \('cat', 'dog'\), and model\.roi_head\.bbox_head\.1\.num_classes=1: "
    for dataset in (coco(), RepeatDataset(coco(), 2), ConcatDataset([coco(), coco()])):
        with pytest.raises(UsageError, match=text + '.* Set num_classes=2 there'):
            check(dataset, roi_head=roi_head)
    labelled = Listed(metainfo=dict(classes=('a', 'b', 'c')))
    for name in ('head', 'decode_head', 'auxiliary_head'):
        with pytest.raises(UsageError, match=rf'3 classes .*model\.{name}\.num_classes=2'):
            check(labelled, **{name: Head(2)})


def test_the_keys_of_mask2former_are_named(coco):
    text = r'panoptic_head\.num_classes=1: .* Set num_things_classes \+ num_stuff_classes=2 there'
    with pytest.raises(UsageError, match=text):
        check(coco(), panoptic_head=Head(1))


def test_a_head_of_more_classes_has_a_warning(coco):
    warned = []
    check(coco(), warned=warned, bbox_head=Head(3))
    (text,) = warned
    assert 'model.bbox_head.num_classes=3' in text and 'Set num_classes=2' in text


@pytest.mark.parametrize(
    'head', [dict(out_channels=1), dict(boundary_threshold=0.1), dict(num_classes=None)]
)
def test_heads_whose_labels_are_others_are_not_compared(head):
    check(Listed(metainfo=dict(classes=('a', 'b', 'c'))), head=Head(**dict(num_classes=2) | head))


def test_models_and_datasets_whose_labels_are_others_are_not_compared(coco):
    check(coco(), language_model=nn.Identity(), bbox_head=Head(1))
    check(coco(), 'val', bbox_head=Head(1))
    check(Listed(), head=Head(1))
    check(Listed(metainfo=dict(classes=('a', 'b'), thing_classes=('a',))), bbox_head=Head(1))
    ships = Listed(metainfo=dict(classes=('ship', 'carrier')))
    ships.classwise = False
    check(ships, bbox_head=Head(1))


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_a_misspelt_class_is_named(coco, split):
    text = (
        rf"{split}_dataloader\.dataset\.dataset: .*train\.json has no category 'Dog', .* "
        r"has 'cat', 'dog'\. Did you mean 'dog'\?"
    )
    with pytest.raises(UsageError, match=text):
        check(RepeatDataset(coco(('cat', 'Dog')), 2), split)


def test_one_class_without_a_comma_is_a_text(coco):
    with pytest.raises(UsageError, match=r"is the text 'cat'.*\('cat',\)"):
        check(coco('cat'))


def test_data_without_an_instance_is_refused(coco):
    with pytest.raises(UsageError, match=r'None of the 1 images .*train\.json'):
        check(RepeatDataset(coco(annotations=()), 1))
    check(ConcatDataset([coco(annotations=()), coco()]))
    check(coco(annotations=()), 'val')
