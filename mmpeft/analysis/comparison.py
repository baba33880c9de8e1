"""Whether two models compute the same: their maps and predictions on one batch, as numbers.

Quantities are compared by the largest difference, relative to the largest
value; the corners of a box to its own largest coordinate. Predictions may
differ more than maps, because heads enlarge rounding: the size of a box is an
exponential. Decisions (which boxes survive, which pixels a mask has) change
where two numbers are equal up to rounding, so a small share of them may differ.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmpeft.errors import UsageError

from .instances import NEAR, corners_of, paired, ties

DECISIONS = 0.01
"""The share of decisions that may differ."""

TIES = 0.1
"""The share of instances of which one model keeps another one of equal score."""

BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The relative difference of maps that rounding may make."""

HEADS = 10
"""How many times more the numbers of predictions may differ, up to what makes two boxes one."""


@dataclass(frozen=True)
class Difference:
    """How much one output differs.

    Attributes:
        name: Of the output.
        relative: The largest difference by the largest value; of decisions,
            the share that differs.
        absolute: The largest difference; None for decisions.
        of: What was compared, in words.
        share: Of decisions, the share that may differ.
        heads: Whether it is a number that heads have computed.
    """

    name: str
    relative: float
    absolute: float | None
    of: str
    share: float | None = None
    heads: bool = False

    def exceeds(self, bound: float) -> bool:
        """Whether it is more than a bound of maps allows, or NaN."""
        return not self.relative <= self._allowed(bound)

    def _allowed(self, bound):
        if self.share is not None:
            return self.share
        return max(bound, min(HEADS * bound, NEAR)) if self.heads else bound


def default_bound(module: nn.Module) -> float:
    """The relative difference that rounding may make, by the coarsest dtype of the weights."""
    dtypes = {p.dtype for p in module.parameters() if p.dtype in BOUNDS}
    return max((BOUNDS[dtype] for dtype in dtypes), default=BOUNDS[torch.float32])


@torch.no_grad()
def observe(model: nn.Module, batch: Any) -> dict:
    """The ``maps`` of all calls of a model's backbone, and its ``predictions``, in evaluation.

    Random numbers that the model draws are equal in all calls.

    Args:
        model: Of mmengine, with ``test_step`` and a ``backbone``.
        batch: As a dataloader gives it; is not changed.
    """
    maps = []
    handle = model.backbone.register_forward_hook(lambda *call: maps.extend(tree_leaves(call[-1])))
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            predictions = model.test_step(copy.deepcopy(batch))
    finally:
        handle.remove()
        model.train(was_training)
    return dict(maps=[value.detach().clone() for value in maps], predictions=predictions)


def differences(one: Mapping, other: Mapping) -> list[Difference]:
    """Compare two results of :func:`observe`.

    Raises:
        UsageError: They have other numbers or shapes of maps or predictions.
    """
    if [m.shape for m in one['maps']] != [m.shape for m in other['maps']]:
        raise UsageError('The backbones give maps of other numbers or shapes.')
    if len(one['predictions']) != len(other['predictions']):
        raise UsageError('The models give predictions for another number of images.')
    levels = {}  # of equal channels and size, over all crops of a sliding window
    for pair in zip(one['maps'], other['maps'], strict=True):
        levels.setdefault(f'backbone {"x".join(map(str, pair[0].shape[1:]))}', []).append(pair)
    found = [quantity(name, pairs) for name, pairs in levels.items()]
    pairs = list(zip(one['predictions'], other['predictions'], strict=True))
    if pairs and 'pred_instances' in pairs[0][0]:
        found += _instances([(a.pred_instances, b.pred_instances) for a, b in pairs])
    if pairs and 'seg_logits' in pairs[0][0]:
        logits = [(a.seg_logits.data, b.seg_logits.data) for a, b in pairs]
        found.append(quantity('logits', logits, heads=True))
    if pairs and 'pred_score' in pairs[0][0]:
        scores = [(a.pred_score, b.pred_score) for a, b in pairs]
        found.append(quantity('scores of classes', scores, heads=True))
    if pairs and 'pred_sem_seg' in pairs[0][0]:
        maps = [(a.pred_sem_seg.data, b.pred_sem_seg.data) for a, b in pairs]
        found.append(_pixels('segmentation map', maps))
    return found


def quantity(
    name: str, pairs: Iterable[tuple[Tensor, Tensor]], heads: bool = False, rows: bool = False
) -> Difference:
    """The largest difference in pairs, absolute and relative to the largest second value.

    Args:
        name: Of the output.
        pairs: Of tensors of equal shapes.
        heads: Whether heads have computed them.
        rows: Take each row (dimension 0) relative to the largest value in it.

    Raises:
        UsageError: The shapes of a pair differ.
    """
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in pairs]
    if any(a.shape != b.shape for a, b in pairs):
        raise UsageError(f'{name}: the models give tensors of other shapes.')
    if rows:
        pairs = [row for a, b in pairs for row in zip(a, b, strict=True)]
    found = [((a - b).abs().max().item(), b.abs().max().item()) for a, b in pairs if b.numel()]
    found = found or [(0.0, 0.0)]
    of = f'{sum(b.numel() for _, b in pairs):,} numbers'
    apart, sizes = zip(*found, strict=True)
    if not rows:
        sizes = [_largest(sizes)] * len(sizes)
    relative = [d / size if size else d for d, size in zip(apart, sizes, strict=True)]
    return Difference(name, _largest(relative), _largest(apart), of, heads=heads)


def table(found: Iterable[Difference], bound: float) -> str:
    """The differences in lines, with what exceeds its bound marked."""
    lines = [f'{"":24} {"largest":>10} {"relative":>10} {"bound":>8}']
    for row in found:
        absolute = '' if row.absolute is None else f'{row.absolute:.2e}'
        mark = '  EXCEEDED' if row.exceeds(bound) else ''
        numbers = f'{absolute:>10} {row.relative:10.2e} {row._allowed(bound):8.0e}'
        lines.append(f'{row.name:24} {numbers}  {row.of}{mark}')
    return '\n'.join(lines)


def _largest(values):
    """NaN if one is."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def _pixels(name, pairs):
    total = sum(b.numel() for _, b in pairs)
    differing = sum((a != b).sum().item() for a, b in pairs)
    of = f'{differing:,} of {total:,} pixels'
    return Difference(name, differing / max(total, 1), None, of, DECISIONS)


def _instances(images):
    """Of instances that are in both: corners, scores and masks; and how many are in one alone."""
    boxes, scores, masks, unpaired, tied, total = [], [], [], 0, 0, 0
    for a, b in images:
        rows, columns = paired(a, b)
        total += max(len(a), len(b))
        decided = ties(a, b, rows, columns)
        tied += decided
        unpaired += max(len(a), len(b)) - len(rows) - decided
        ours, theirs = corners_of(a)[rows], corners_of(b)[columns]
        nearest = torch.cdist(ours, theirs).argmin(-1, keepdim=True).expand(-1, -1, 2)
        boxes.append((ours, theirs.gather(1, nearest)))
        scores.append((a.scores[rows], b.scores[columns]))
        if 'masks' in a:
            masks.append((torch.as_tensor(a.masks)[rows], torch.as_tensor(b.masks)[columns]))
    found = [
        Difference(name, count / max(total, 1), None, f'{count} of {total} instances', share)
        for name, count, share in (
            ('unmatched instances', unpaired, DECISIONS),
            ('equal-score replacements', tied, TIES),
        )
    ]
    found.append(quantity('corners of boxes', boxes, heads=True, rows=True))
    found.append(quantity('scores', scores, heads=True))
    return found + ([_pixels('masks', masks)] if masks else [])
