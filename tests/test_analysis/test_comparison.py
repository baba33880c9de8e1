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
    assert rows['unmatched instances'].relative == 0
    assert rows['corners of boxes'].absolute == pytest.approx(0.01, rel=1e-4)
    assert rows['corners of boxes'].relative == pytest.approx(0.01 / 10.01, rel=1e-4)
    assert rows['scores'].absolute == 0
    assert rows['masks'].relative == 0
    masks[0, 0, 0] ^= True
    assert compared(one, other)['masks'].relative == 1 / 75


@pytest.mark.parametrize(
    'name, boxes, scores, labels',
    [
        ('missing', [BOXES[0], BOXES[1]], [0.9, 0.8], [1, 2]),
        ('label', BOXES, [0.9, 0.8, 0.8], [1, 2, 2]),
        ('score', BOXES, [0.9, 0.8, 0.7], [1, 2, 3]),
        ('place', [*BOXES[:2], [20, 20, 41, 30]], [0.9, 0.8, 0.8], [1, 2, 3]),
        ('nan', [*BOXES[:2], [math.nan] * 4], [0.9, 0.8, 0.8], [1, 2, 3]),
    ],
)
def test_an_instance_without_its_like_is_counted(name, boxes, scores, labels):
    rows = compared(
        instances(boxes, scores, labels),
        instances(BOXES, [0.9, 0.8, 0.8], [1, 2, 3]),
    )
    alone, tied = rows['unmatched instances'], rows['equal-score replacements']
    assert {alone.relative, tied.relative} == {0, 1 / 3}
    assert alone.exceeds(1.0) or tied.exceeds(1.0)
    assert (tied.relative > 0) == (name in ('label', 'place', 'nan'))


def many(boxes, scores, labels=None):
    """Twenty boxes, the last ones as given."""
    first = torch.arange(20.0 - len(boxes))[:, None] * 50 + torch.tensor([0.0, 5, 30, 40])
    scores = torch.cat([torch.linspace(0.9, 0.5, 20)[: len(first)], torch.tensor(scores)])
    labels = [0] * 20 if labels is None else labels
    return instances(torch.cat([first, torch.tensor(boxes)]), scores, labels)


def exceeded(one, other, bound=1e-5):
    return {name for name, row in compared(one, other).items() if row.exceeds(bound)}


def test_a_tie_of_two_boxes_is_no_difference():
    """Suppression keeps one of two that overlap, and a limit one of two that do not."""
    first, near, far = [[100.0, 90, 300, 200]], [[110.0, 95, 310, 220]], [[500.0, 90, 700, 99]]
    kept = many(first, [0.4])
    for other in (near, far):
        assert exceeded(many(other, [0.4 + 1e-7]), kept) == set()
        assert exceeded(many(other, [0.402]), kept) == {'unmatched instances'}
    both = many(first + near, [0.4, 0.4])
    assert exceeded(many(near + first, [0.4, 0.4]), both) == set()
    assert exceeded(kept, many([], [])) == {'unmatched instances'}


def test_boxes_that_moved_while_scores_did_not_are_no_ties():
    scores = torch.full((20,), 0.25).tolist()
    boxes = torch.rand(20, 4).add(torch.tensor([0, 0, 2, 2])).mul(100)
    wrong = exceeded(many((boxes * 1.05).tolist(), scores), many(boxes.tolist(), scores))
    assert wrong == {'equal-score replacements'}
    slightly = many((boxes * (1 + 2e-4)).tolist(), scores)
    assert exceeded(slightly, many(boxes.tolist(), scores)) == {'corners of boxes'}


@pytest.mark.parametrize('logarithm', [30.0, 85.0, 200.0])
def test_huge_boxes_of_an_untrained_head(logarithm):
    """exp(t) with t rounded otherwise; beyond 88 it is infinite. A huge box hides no wrong one."""
    sizes = (torch.tensor([logarithm]) * torch.tensor([1, 1 + 5e-7])).exp()
    one, other = ([[100.0, 80, size, size / 2, 0.5]] for size in sizes.tolist())
    small = torch.rand(19, 5) * 10 + 20
    rest = dict(scores=torch.linspace(0.9, 0.5, 20), labels=[0] * 20)
    base = instances(torch.cat([small, torch.tensor(one)]), **rest)
    assert exceeded(instances(torch.cat([small, torch.tensor(other)]), **rest), base) == set()
    moved = small + torch.tensor([0.02, 0, 0, 0, 0])
    wrong = exceeded(instances(torch.cat([moved, torch.tensor(other)]), **rest), base)
    assert wrong == {'corners of boxes'}


def test_no_instances_at_all():
    none = instances(torch.zeros(0, 5), [], torch.zeros(0, dtype=torch.long))
    assert not any(row.exceeds(0) for row in compared(none, none).values())
    one = instances([[5.0, 5, 4, 2, 0.1]], [0.5], [0])
    assert compared(none, one)['unmatched instances'].relative == 1
    assert compared(one, none)['unmatched instances'].relative == 1


def test_descriptions_of_one_rotated_box_are_one():
    box = torch.tensor([[30.0, 20, 8, 3, 0.4]])
    for same in ([30, 20, 8, 3, 0.4 + math.pi], [30, 20, 3, 8, 0.4 - math.pi / 2]):
        rows = compared(instances(box, [0.5], [0]), instances([same], [0.5], [0]))
        assert rows['unmatched instances'].relative == 0
        assert rows['corners of boxes'].absolute < 1e-5


def test_corners():
    flat = corners(torch.tensor([[1.0, 2, 5, 4]]))
    assert flat.tolist() == [[[1, 2], [5, 2], [5, 4], [1, 4]]]
    torch.testing.assert_close(corners(torch.tensor([[3.0, 3, 4, 2, 0]])), flat)
    turned = corners(torch.tensor([[3.0, 3, 4, 2, math.pi / 2]]))
    torch.testing.assert_close(turned[0, 0], torch.tensor([4.0, 1.0]))


def test_what_is_allowed_of_maps_and_of_predictions():
    maps, heads = torch.ones(4), torch.tensor([1.0, 1, 1, 1 + 5e-5])
    assert quantity('map', [(heads, maps)]).exceeds(1e-5)
    assert not quantity('scores', [(heads, maps)], heads=True).exceeds(1e-5)
    assert quantity('scores', [(heads + 0.04, maps)], heads=True).exceeds(5e-3)
    assert not quantity('scores', [(heads + 0.04, maps)], heads=True).exceeds(5e-2)


def test_quantities():
    one, other = torch.tensor([1.0, 4.0]), torch.tensor([1.5, 2.0])
    row = quantity('x', [(one, other)])
    assert (row.absolute, row.relative) == (2, 1) and row.exceeds(0.99) and not row.exceeds(1)
    assert quantity('x', [(torch.tensor([math.nan]), one[:1])]).exceeds(1e9)
    assert 'EXCEEDED' in table([row], 0.5) and 'EXCEEDED' not in table([row], 1)
    with pytest.raises(UsageError, match='other shapes'):
        quantity('x', [(one, one[:1])])
