"""Instances of two predictions that are one.

Boxes are compared by their corners, in any order, because a rotated box has
several descriptions.
"""

import torch
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

NEAR = 0.01
"""How far apart, relative to their size, and in score, two boxes may be that are one."""

EQUAL = 1e-5
"""How far apart scores may be that are equal but for rounding."""


def corners(boxes: Tensor) -> Tensor:
    """The four corners of boxes, (N, 4, 2).

    Args:
        boxes: (N, 4) as x1, y1, x2, y2, or (N, 5) as x, y, w, h and an angle
            in radians.
    """
    if boxes.shape[-1] == 4:
        low, high = boxes.split(2, -1)
        boxes = torch.cat([(low + high) / 2, high - low, boxes.new_zeros(len(boxes), 1)], -1)
    signs = boxes.new_tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    across, up = (signs * boxes[:, None, 2:4]).unbind(-1)
    cos, sin = boxes[:, 4:].cos(), boxes[:, 4:].sin()
    return boxes[:, None, :2] + torch.stack([across * cos - up * sin, across * sin + up * cos], -1)


def paired(a: InstanceData, b: InstanceData) -> tuple[Tensor, Tensor]:
    """Indices of the instances of two sets that are one: of equal label, near in place and score.

    As many pairs as possible, those of the least distance.
    """
    ours, theirs = corners_of(a), corners_of(b)
    size = torch.cdist(theirs, theirs).flatten(1)
    size = size.amax(1).clamp_min(1e-6) if len(b) else size.sum(1)
    pairs = [torch.zeros(2, 0, dtype=torch.long, device=a.labels.device)]
    for label in a.labels.unique().tolist():
        i, j = (a.labels == label).nonzero()[:, 0], (b.labels == label).nonzero()[:, 0]
        apart = torch.cdist(ours[i, None], theirs[None, j]).amin(-1).amax(-1) / size[j]
        apart = torch.maximum(apart, (a.scores[i, None] - b.scores[None, j]).abs())
        # Far ones all cost the same, so that none is paired at the expense of a near one.
        cost = apart.nan_to_num(nan=1.0, posinf=1.0).clamp_max(2 * NEAR).cpu().numpy()
        first, second = linear_sum_assignment(cost)
        near = cost[first, second] <= NEAR
        pairs.append(torch.stack([i[first[near]], j[second[near]]]))
    return torch.cat(pairs, 1).unbind()


def ties(a: InstanceData, b: InstanceData, rows: Tensor, columns: Tensor) -> int:
    """How many instances of one set have in place of a pair another one of equal score.

    Of two boxes with equal scores, suppression and the limit of instances keep either.

    Args:
        a: One set.
        b: The other.
        rows: From :func:`paired`, as ``columns``.
    """
    left = []
    for instances, pairs in ((a, rows), (b, columns)):
        alone = torch.ones_like(instances.scores, dtype=torch.bool)
        alone[pairs] = False
        left.append(instances.scores[alone].double())
    equal = (left[0][:, None] - left[1]).abs() <= EQUAL
    return int(equal.cpu().numpy()[linear_sum_assignment(~equal.cpu().numpy())].sum())


def corners_of(instances: InstanceData) -> Tensor:
    """The corners of the boxes of instances in float64, (N, 4, 2).

    An infinite size is the largest of its dtype, so that two of them are equal.
    """
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
    largest = torch.finfo(boxes.dtype).max
    return corners(boxes.clamp(-largest, largest).double())
