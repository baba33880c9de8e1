"""Whether two models compute the same: their maps and predictions on one batch, as numbers.

Quantities are compared by the largest difference, relative to the largest
value. Decisions (which boxes survive, which pixels a mask has) change where
two numbers are equal up to rounding, so a small share of them may differ.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmpeft.errors import UsageError

from .instances import corners_of, paired

DECISIONS = 0.01
"""The share of decisions that may differ."""

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
        """Whether it is more than a bound allows, or NaN."""
        return not self.relative <= self._allowed(bound)

    def _allowed(self, bound):
        return DECISIONS if self.absolute is None else bound


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
        found.append(quantity('logits', logits))
    if pairs and 'pred_sem_seg' in pairs[0][0]:
        maps = [(a.pred_sem_seg.data, b.pred_sem_seg.data) for a, b in pairs]
        found.append(_pixels('segmentation map', maps))
    return found


def quantity(name: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    """The largest difference in pairs, absolute and relative to the largest second value.

    Raises:
        UsageError: The shapes of a pair differ.
    """
    pairs = list(pairs)
    if any(a.shape != b.shape for a, b in pairs):
        raise UsageError(f'{name}: the models give tensors of other shapes.')
    sides = [[pair[side].double().flatten().cpu() for pair in pairs] for side in (0, 1)]
    one, other = (torch.cat([torch.zeros(1, dtype=torch.float64), *side]) for side in sides)
    absolute, size = (one - other).abs().max().item(), other.abs().max().item()
    of = f'{len(other) - 1:,} numbers'
    return Difference(name, absolute / size if size else absolute, absolute, of)


def table(found: Iterable[Difference], bound: float) -> str:
    """The differences in lines, with what exceeds its bound marked."""
    lines = [f'{"":24} {"largest":>10} {"relative":>10} {"bound":>8}']
    for row in found:
        absolute = '' if row.absolute is None else f'{row.absolute:.2e}'
        mark = '  EXCEEDED' if row.exceeds(bound) else ''
        numbers = f'{absolute:>10} {row.relative:10.2e} {row._allowed(bound):8.0e}'
        lines.append(f'{row.name:24} {numbers}  {row.of}{mark}')
    return '\n'.join(lines)


def _pixels(name, pairs):
    total = sum(b.numel() for _, b in pairs)
    differing = sum((a != b).sum().item() for a, b in pairs)
    of = f'{differing:,} of {total:,} pixels'
    return Difference(name, differing / max(total, 1), None, of)


def _instances(images):
    """Of instances that are in both: corners, scores and masks; and how many are in one alone."""
    boxes, scores, masks, unpaired, total = [], [], [], 0, 0
    for a, b in images:
        rows, columns = paired(a, b)
        total += max(len(a), len(b))
        unpaired += max(len(a), len(b)) - len(rows)
        ours, theirs = corners_of(a)[rows], corners_of(b)[columns]
        nearest = torch.cdist(ours, theirs).argmin(-1, keepdim=True).expand(-1, -1, 2)
        boxes.append((ours, theirs.gather(1, nearest)))
        scores.append((a.scores[rows], b.scores[columns]))
        if 'masks' in a:
            masks.append((torch.as_tensor(a.masks)[rows], torch.as_tensor(b.masks)[columns]))
    of = f'{unpaired} of {total} instances'
    found = [Difference('instances without pair', unpaired / max(total, 1), None, of)]
    found += [quantity('corners of boxes', boxes), quantity('scores', scores)]
    return found + ([_pixels('masks', masks)] if masks else [])
