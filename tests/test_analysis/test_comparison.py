"""How two results of a model are compared."""

import math

import pytest
import torch
from mmengine.structures import InstanceData

from mmpeft.analysis.comparison import differences, quantity, table
from mmpeft.analysis.instances import corners
from mmpeft.errors import UsageError


class Sample(dict):
    """Stands for a data sample."""

    __getattr__ = dict.__getitem__


def instances(boxes, scores, labels, masks=None):
    masks = {} if masks is None else dict(masks=masks)
    return Sample(
        pred_instances=InstanceData(
            bboxes=torch.as_tensor(boxes, dtype=torch.float),
            scores=torch.as_tensor(scores, dtype=torch.float),
            labels=torch.as_tensor(labels),
            **masks,
        )
    )


def compared(one, other):
    found = differences(dict(maps=[], predictions=[one]), dict(maps=[], predictions=[other]))
    return {row.name: row for row in found}


BOXES = [[0.0, 0, 10, 10], [20, 20, 40, 30], [20, 20, 40, 30]]


def test_instances_are_paired_in_any_order():
    order = [2, 0, 1]
    masks = torch.rand(3, 5, 5) > 0.5
    one = instances(BOXES, [0.9, 0.8, 0.8], [1, 2, 3], masks)
    moved = (torch.tensor(BOXES) + 0.01)[order]
    other = instances(moved, [0.8, 0.9, 0.8], [3, 1, 2], masks[order].numpy())
    rows = compared(one, other)
    assert rows['instances without pair'].relative == 0
    assert rows['corners of boxes'].absolute == pytest.approx(0.01, rel=1e-4)
    assert rows['corners of boxes'].relative == pytest.approx(0.01 / 40.01, rel=1e-4)
    assert rows['scores'].absolute == 0
    assert rows['masks'].relative == 0
    masks[0, 0, 0] ^= True
    assert compared(one, other)['masks'].relative == 1 / 75


@pytest.mark.parametrize(
    'boxes, scores, labels',
    [
        ([BOXES[0], BOXES[1]], [0.9, 0.8], [1, 2]),
        (BOXES, [0.9, 0.8, 0.8], [1, 2, 2]),
        (BOXES, [0.9, 0.8, 0.7], [1, 2, 3]),
        ([*BOXES[:2], [20, 20, 41, 30]], [0.9, 0.8, 0.8], [1, 2, 3]),
        ([*BOXES[:2], [math.nan] * 4], [0.9, 0.8, 0.8], [1, 2, 3]),
    ],
    ids=['missing', 'label', 'score', 'place', 'nan'],
)
def test_an_instance_without_its_like_is_counted(boxes, scores, labels):
    row = compared(
        instances(boxes, scores, labels),
        instances(BOXES, [0.9, 0.8, 0.8], [1, 2, 3]),
    )['instances without pair']
    assert row.relative == 1 / 3 and row.exceeds(1.0)


def test_no_instances_at_all():
    none = instances(torch.zeros(0, 5), [], torch.zeros(0, dtype=torch.long))
    assert not any(row.exceeds(0) for row in compared(none, none).values())
    one = instances([[5.0, 5, 4, 2, 0.1]], [0.5], [0])
    assert compared(none, one)['instances without pair'].relative == 1
    assert compared(one, none)['instances without pair'].relative == 1


def test_descriptions_of_one_rotated_box_are_one():
    box = torch.tensor([[30.0, 20, 8, 3, 0.4]])
    for same in ([30, 20, 8, 3, 0.4 + math.pi], [30, 20, 3, 8, 0.4 - math.pi / 2]):
        rows = compared(instances(box, [0.5], [0]), instances([same], [0.5], [0]))
        assert rows['instances without pair'].relative == 0
        assert rows['corners of boxes'].absolute < 1e-5


def test_corners():
    flat = corners(torch.tensor([[1.0, 2, 5, 4]]))
    assert flat.tolist() == [[[1, 2], [5, 2], [5, 4], [1, 4]]]
    torch.testing.assert_close(corners(torch.tensor([[3.0, 3, 4, 2, 0]])), flat)
    turned = corners(torch.tensor([[3.0, 3, 4, 2, math.pi / 2]]))
    torch.testing.assert_close(turned[0, 0], torch.tensor([4.0, 1.0]))


def test_quantities():
    one, other = torch.tensor([1.0, 4.0]), torch.tensor([1.5, 2.0])
    row = quantity('x', [(one, other)])
    assert (row.absolute, row.relative) == (2, 1) and row.exceeds(0.99) and not row.exceeds(1)
    assert quantity('x', [(torch.tensor([math.nan]), one[:1])]).exceeds(1e9)
    assert 'EXCEEDED' in table([row], 0.5) and 'EXCEEDED' not in table([row], 1)
    with pytest.raises(UsageError, match='other shapes'):
        quantity('x', [(one, one[:1])])
