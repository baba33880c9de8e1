"""Whether two models compute the same: their maps and predictions on one batch, as numbers.

Quantities are compared by the largest difference, relative to the largest
value. Decisions (which boxes survive, which pixels a mask has) turn over where
two numbers are equal to rounding, so that a small share of them may differ.
Boxes are compared by their corners, in any order, because a rotated box has
several descriptions.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mmpeft.errors import UsageError

# Of decisions, how many may differ. Boxes are one where corners, relative to the box, and scores
# differ by no more.
DECISIONS = 0.01
BOUNDS = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@dataclass(frozen=True)
class Difference:
    """How much one output differs.

    Attributes:
        name: Of the output.
        relative: The largest difference by the largest value; of decisions,
            the share that differs.
        absolute: The largest difference; None for decisions.
        of: What was compared, in words.
    """

    name: str
    relative: float
    absolute: float | None
    of: str

    def exceeds(self, bound: float) -> bool:
        """Whether it is more than a bound allows, or no number."""
        return not self.relative <= (bound if self.absolute is not None else DECISIONS)


def default_bound(module: nn.Module) -> float:
    """The relative difference that rounding may make, by the coarsest dtype of the weights."""
    dtypes = {p.dtype for p in module.parameters() if p.dtype in BOUNDS}
    return max((BOUNDS[dtype] for dtype in dtypes), default=BOUNDS[torch.float32])


@torch.no_grad()
def observe(model: nn.Module, batch) -> dict:
    """What a model makes of a batch in evaluation.

    Args:
        model: Of mmengine, with ``test_step`` and a ``backbone``.
        batch: As a dataloader gives it; is not changed.

    Returns:
        ``maps``, of all calls of the backbone, and ``predictions``.
    """
    maps = []
    handle = model.backbone.register_forward_hook(lambda *call: maps.extend(_tensors(call[-1])))
    was_training = model.training
    model.eval()
    try:
        predictions = model.test_step(copy.deepcopy(batch))
    finally:
        handle.remove()
        model.train(was_training)
    return dict(maps=[value.detach().clone() for value in maps], predictions=predictions)


def differences(one: Mapping, other: Mapping) -> list[Difference]:
    """Compare two results of :func:`observe`.

    Raises:
        UsageError: They are not alike: maps or predictions of another number
            or shape.
    """
    found = []
    for kind, level in _by_shape(one['maps'], other['maps']).items():
        found.append(quantity(f'backbone {"x".join(map(str, kind))}', *level))
    if len(one['predictions']) != len(other['predictions']):
        raise UsageError('The models give predictions for another number of images.')
    pairs = list(zip(one['predictions'], other['predictions'], strict=True))
    if pairs and 'pred_instances' in pairs[0][0]:
        found += _instances([(a.pred_instances, b.pred_instances) for a, b in pairs])
    if pairs and 'seg_logits' in pairs[0][0]:
        found.append(_all('logits', [(a.seg_logits.data, b.seg_logits.data) for a, b in pairs]))
    if pairs and 'pred_sem_seg' in pairs[0][0]:
        maps = [(a.pred_sem_seg.data, b.pred_sem_seg.data) for a, b in pairs]
        found.append(_decisions('segmentation map', 'pixels', maps))
    return found


def quantity(name: str, one: Iterable[Tensor], other: Iterable[Tensor]) -> Difference:
    """The largest difference of tensors, absolute and relative to the largest of ``other``.

    Raises:
        UsageError: Their numbers or shapes differ.
    """
    one, other = list(one), list(other)
    if [value.shape for value in one] != [value.shape for value in other]:
        raise UsageError(f'{name}: the models give tensors of other shapes.')
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a.numel()]
    # torch's maximum keeps NaN, which Python's does not.
    zero = torch.zeros((), dtype=torch.float64)
    absolute = torch.stack([zero, *((a - b).abs().max().cpu() for a, b in pairs)]).max().item()
    size = torch.stack([zero, *(b.abs().max().cpu() for _, b in pairs)]).max().item()
    relative = absolute / size if size else absolute
    return Difference(name, relative, absolute, f'{sum(b.numel() for _, b in pairs):,} numbers')


def table(found: Iterable[Difference], bound: float) -> str:
    """The differences in lines, with what exceeds its bound marked."""
    lines = [f'{"":24} {"largest":>10} {"relative":>10} {"bound":>8}']
    for row in found:
        absolute = '' if row.absolute is None else f'{row.absolute:.2e}'
        allowed = bound if row.absolute is not None else DECISIONS
        mark = '  EXCEEDED' if row.exceeds(bound) else ''
        lines.append(
            f'{row.name:24} {absolute:>10} {row.relative:10.2e} {allowed:8.0e}  {row.of}{mark}'
        )
    return '\n'.join(lines)


def corners(boxes: Tensor) -> Tensor:
    """The four corners of boxes.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2, or (N, 5) as x, y, w, h and an angle
            in radians.

    Returns:
        (N, 4, 2)
    """
    signs = boxes.new_tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    if boxes.shape[-1] == 4:
        centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        return centre[:, None] + signs * size[:, None]
    across, up = (signs * boxes[:, None, 2:4]).unbind(-1)
    cos, sin = boxes[:, 4:].cos(), boxes[:, 4:].sin()
    return boxes[:, None, :2] + torch.stack([across * cos - up * sin, across * sin + up * cos], -1)


def _tensors(output):
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values for tensor in _tensors(value)]


def _by_shape(one, other):
    """Maps of equal channels and size together: levels, over all crops of a sliding window."""
    if [m.shape for m in one] != [m.shape for m in other]:
        raise UsageError('The backbones give maps of other numbers or shapes.')
    levels = {}
    for a, b in zip(one, other, strict=True):
        level = levels.setdefault(tuple(a.shape[1:]), ([], []))
        level[0].append(a)
        level[1].append(b)
    return levels


def _all(name, pairs):
    return quantity(name, *map(list, zip(*pairs, strict=True)))


def _decisions(name, unit, pairs):
    total = sum(b.numel() for _, b in pairs)
    differing = sum((a != b).sum().item() for a, b in pairs)
    of = f'{differing:,} of {total:,} {unit}'
    return Difference(name, differing / max(total, 1), None, of)


def _instances(images):
    boxes, scores, masks, unpaired, total = [], [], [], 0, 0
    for a, b in images:
        rows, columns = _paired(a, b)
        total += max(len(a), len(b))
        unpaired += max(len(a), len(b)) - len(rows)
        ours, theirs = _corners(a)[rows], _corners(b)[columns]
        nearest = torch.cdist(ours, theirs).argmin(-1, keepdim=True).expand(-1, -1, 2)
        boxes.append((ours, theirs.gather(1, nearest)))
        scores.append((a.scores[rows], b.scores[columns]))
        if 'masks' in a:
            masks.append((_masks(a)[rows], _masks(b)[columns]))
    of = f'{unpaired} of {total} instances'
    found = [Difference('instances without pair', unpaired / max(total, 1), None, of)]
    found += [_all('corners of boxes', boxes), _all('scores', scores)]
    return found + ([_decisions('masks', 'pixels', masks)] if masks else [])


def _paired(a, b):
    """Indices of the instances of two sets that are one: of equal label, near in place and score.

    As many pairs as possible, those of the least distance.
    """
    ours, theirs = _corners(a), _corners(b)
    size = (
        torch.cdist(theirs, theirs).amax((1, 2)).clamp_min(1e-6) if len(b) else theirs.sum((1, 2))
    )
    rows, columns = [], []
    for label in a.labels.unique().tolist():
        i, j = (a.labels == label).nonzero()[:, 0], (b.labels == label).nonzero()[:, 0]
        apart = torch.cdist(ours[i, None], theirs[None, j]).amin(-1).amax(-1) / size[j]
        apart = torch.maximum(apart, (a.scores[i, None] - b.scores[None, j]).abs())
        # Far ones all cost the same, so that none is paired at the expense of a near one.
        cost = apart.nan_to_num(nan=1.0, posinf=1.0).clamp_max(2 * DECISIONS).cpu().numpy()
        first, second = linear_sum_assignment(cost)
        near = cost[first, second] <= DECISIONS
        rows.append(i[first[near]])
        columns.append(j[second[near]])
    none = torch.zeros(0, dtype=torch.long, device=a.labels.device)
    return torch.cat([none, *rows]), torch.cat([none, *columns])


def _corners(instances):
    return corners(getattr(instances.bboxes, 'tensor', instances.bboxes).double())


def _masks(instances):
    masks = instances.masks
    return masks if isinstance(masks, Tensor) else torch.from_numpy(np.asarray(masks))
