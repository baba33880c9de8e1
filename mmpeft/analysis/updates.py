"""Updates dW = phi(W) - W of adapted weights, and the figures that papers report of them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from math import isnan, nan
from statistics import fmean

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError, suggest
from mmpeft.injection.site import Site, attached, chains_by_weight
from mmpeft.injection.summary import kind_of
from mmpeft.injection.wrappers import refuse_sharded, unwrapped
from mmpeft.methods.adapter import maybe_transposed
from mmpeft.methods.normal_form import NormalForm
from mmpeft.methods.precision import in_double
from mmpeft.methods.spec import WeightSpec
from mmpeft.quantization import dequantized


@dataclass(frozen=True, eq=False)
class Update:
    """What the adapters of one weight add to it, as in evaluation, in float64.

    Attributes:
        name: Path of the weight in the model without adapters.
        spec: Its role.
        weight: W, as methods see it; the values that few bits stand for.
        delta: dW, likewise.
        eps: The relative precision of the adapters' parameters, from which dW is computed.
        factors: (O, r) and (r, I) whose product is dW as a matrix, where r is small; else None.
    """

    name: str
    spec: WeightSpec
    weight: Tensor
    delta: Tensor
    eps: float
    factors: tuple[Tensor, Tensor] | None = None

    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (O, r), S (r,) and V (I, r) of dW unfolded along its first axis, without what is zero.

        Singular values count as zero below max(O, I) eps max(|W|, |dW|), in Frobenius norms and
        eps that of float64: what the difference of two weights leaves. Without factors, those
        below ``self.eps`` max(|W|, |dW|) do too: DoRA's magnitudes are norms of W, rounded.
        """
        delta = self.delta.flatten(1) if self.delta.ndim > 1 else self.delta[:, None]
        if self.factors is None:
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            v = vh.mT
        else:
            (left, up), (right, down) = map(torch.linalg.qr, (self.factors[0], self.factors[1].mT))
            u, s, vh = torch.linalg.svd(up @ down.mT)
            u, v = left @ u, right @ vh.mT
        size = max(self.weight.norm().item(), self.delta.norm().item())
        eps = max(delta.shape) * torch.finfo(s.dtype).eps
        eps = max(eps, self.eps) if self.factors is None else eps
        rank = int((s > eps * size).sum())
        return u[:, :rank], s[:rank], v[:, :rank]


@dataclass(frozen=True)
class UpdateFigures:
    """Figures of the update of one weight, or their means.

    Attributes:
        name: Of the weight.
        kind: Of its layer.
        shape: Of the weight.
        norm: The Frobenius norm of dW.
        relative: That by the norm of W; NaN where W is zero, such as a new bias.
        amplification: The feature amplification factor |dW| / |U^T W V|, U and V the singular
            vectors of dW whose singular values are not zero: how much dW amplifies what W has in
            the directions of dW (LoRA, Section 7.3; FLoRA, Section 6.2.2). 0 where dW is zero,
            else NaN where W has nothing in these directions.
        effective_rank: exp of the entropy of S / sum(S), S the singular values of dW (Roy and
            Vetterli, 2007, "The effective rank: a measure of effective dimensionality"). 0 where
            dW is zero.
        share: |dW|^2 by its sum over all weights.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    norm: float
    relative: float
    amplification: float
    effective_rank: float
    share: float


FIGURES = tuple(field.name for field in fields(UpdateFigures) if field.type is float)


def adapted_weights(model: nn.Module) -> dict[str, list[Site]]:
    """The sites of each adapted weight in the order in which they apply, by the weight's name.

    A weight that several layers hold has the name that it has in the first.

    Args:
        model: With adapters.

    Raises:
        UsageError: The model has no adapters of weights, or is sharded.
    """
    refuse_sharded(model, 'analysis.updates')
    with unwrapped(model) as bare:
        sites = attached(bare)
    found = chains_by_weight(site for site in sites if site.tensor)
    if not found:
        methods = ' and '.join(sorted({type(site.method).__name__ for site in sites}))
        raise UsageError(
            f'{methods} changes activations, so there is no update of a weight.'
            if methods
            else 'The model has no adapters, so there is no update of a weight: it is plain, '
            'merged, or its weights train themselves.'
        )
    return {chains[0][0].name: chains[0] for chains in found}


@torch.no_grad()
def update_of(chain: list[Site]) -> Update:
    """What the adapters at the sites of :func:`adapted_weights` add to their weight."""
    site = chain[0]
    weight = in_double(dequantized(site.original.detach()))
    adapted = weight
    for each in chain:
        adapted = each.adapter.in_double(adapted)
    delta = maybe_transposed(adapted - weight, site.spec)
    dtypes = {p.dtype for each in chain for p in each.adapter.parameters() if p.is_floating_point()}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return Update(
        site.name, site.spec, maybe_transposed(weight, site.spec), delta, eps, _factors(chain)
    )


def updates(model: nn.Module) -> Iterator[Update]:
    """The update of each adapted weight, one after another; see :func:`adapted_weights`."""
    return map(update_of, adapted_weights(model).values())


def without_updates(model: nn.Module) -> dict[str, int]:
    """The methods of a model that act on activations, each with the number of its adapters."""
    with unwrapped(model) as bare:
        return dict(Counter(type(s.method).__name__ for s in attached(bare) if not s.tensor))


def figures(found: Iterable[Update]) -> list[UpdateFigures]:
    """The figures of updates, in their order.

    Thin additive updates (LoRA and its kin, FLoRA) take products as wide as their rank; others a
    singular value decomposition each.
    """
    rows = [_figures(update) for update in found]
    total = sum(row.norm**2 for row in rows)
    return [replace(row, share=row.norm**2 / total if total else 0.0) for row in rows]


def means(rows: Iterable[UpdateFigures]) -> dict[str, float]:
    """The means of figures over weights, as in FLoRA's Fig. 4, without the share.

    Weights of which a figure is NaN are left out of its mean, which is NaN if none is left.
    """
    rows = list(rows)
    columns = {name: [getattr(row, name) for row in rows] for name in FIGURES[:-1]}
    numbers = {name: [v for v in column if not isnan(v)] for name, column in columns.items()}
    return {name: fmean(column) if column else nan for name, column in numbers.items()}


def cosines(model: nn.Module, other: nn.Module) -> dict[str, float]:
    """The cosines <dW, dW'> / (|dW| |dW'|) between two models' updates, by weight.

    The last, ``'all'``, is that of all these updates as one vector. NaN where an update is zero.

    Args:
        model: With adapters.
        other: With adapters of some of the same weights, on the same base.

    Raises:
        UsageError: See :func:`adapted_weights`; the models adapt no weight in common, or one that
            has other values in the two.
    """
    one, two = adapted_weights(model), adapted_weights(other)
    names = [name for name in one if name in two]
    if not names:
        first = next(iter(one))
        raise UsageError(f'The models adapt no weight in common: {first!r}. {suggest(first, two)}')
    found, dots, squares = {}, 0.0, [0.0, 0.0]
    for name in names:
        ours, theirs = update_of(one[name]), update_of(two[name])
        if not torch.equal(ours.weight, theirs.weight):
            raise UsageError(
                f'{name} is not the same weight in the two models. Compare updates that were '
                'trained on one base.'
            )
        dot = (ours.delta * theirs.delta).sum().item()
        norms = [update.delta.norm().item() for update in (ours, theirs)]
        found[name] = _ratio(dot, norms[0] * norms[1])
        dots += dot
        squares = [total + norm**2 for total, norm in zip(squares, norms, strict=True)]
    return found | {'all': _ratio(dots, (squares[0] * squares[1]) ** 0.5)}


def _factors(chain):
    """The factors of a single thin additive update in float64."""
    adapter, spec = chain[0].adapter, chain[0].spec
    factors = {k: v.double() if v.is_floating_point() else v for k, v in adapter.factors.items()}
    form = adapter.method.normal_form(factors, spec) if len(chain) == 1 else None
    if not isinstance(form, NormalForm) or not form.is_thin:
        return None
    up, down = form.scale * form.up, form.unfolded()
    return (up, down) if 2 * up.shape[1] <= min(len(up), down.shape[1]) else None


def _figures(update):
    u, s, v = update.singular()
    weight = update.weight.flatten(1) if update.weight.ndim > 1 else update.weight[:, None]
    norm, kept = update.delta.norm().item(), (u.mT @ weight @ v).norm().item()
    share = s / s.sum()
    return UpdateFigures(
        name=update.name,
        kind=kind_of(update.spec),
        shape=tuple(update.spec.shape),
        norm=norm,
        relative=_ratio(norm, weight.norm().item()),
        amplification=_ratio(norm, kept) if len(s) else 0.0,
        effective_rank=torch.exp(-(share * share.log()).sum()).item() if len(s) else 0.0,
        share=0.0,
    )


def _ratio(a, b):
    return a / b if b else nan
