"""From a parameter budget to ranks, and checks of ranks."""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.methods import Method, Ranked
from mmpeft.methods.spec import InsertionPoint, WeightSpec

from .distribution import distribute
from .site import Site

UNITS = {'': 1, 'k': 1e3, 'm': 1e6, 'b': 1e9, 'g': 1e9}


def adapters_size(pairs: Iterable[tuple[Method, WeightSpec | InsertionPoint]]) -> int:
    """Parameters of adapters, those that they share counted once."""
    total, tied = 0, {}
    for method, spec in pairs:
        for name, value in method.init(torch.empty(spec.shape, device='meta'), spec).items():
            if isinstance(value, nn.Buffer):
                continue
            if name in method.tied:
                tied[method, name, method.tie_key(spec)] = value.numel()
            else:
                total += value.numel()
    return total + sum(tied.values())


def parse_count(count: int | str) -> int:
    """A number such as 12900000, ``'12.9M'`` or ``'300k'``.

    Raises:
        UsageError: It is not a positive number.
    """
    text = re.sub('[ ,_]', '', str(count)).lower()
    number = re.fullmatch(r'(\d*\.?\d+(?:e\+?\d+)?)([kmbg]?)', text)
    value = round(float(number[1]) * UNITS[number[2]]) if number else 0
    if value < 1:
        raise UsageError(
            f"budget={count!r} is not a number of parameters, such as 12_900_000 or '12.9M'."
        )
    return value


def most_within(
    limit: float, size: Callable[[int], int], highest: int, grows: bool = True
) -> int | None:
    """The rank of the most parameters within a limit; the highest of equals.

    Args:
        limit: Number of parameters.
        size: Parameters at a rank.
        highest: The ranks are 1 to this.
        grows: Parameters never fall with the rank, so that not all ranks are tried.

    Returns:
        None if no rank is within the limit.
    """
    ranks = range(1, highest + 1)
    if grows:
        return bisect_right(ranks, limit, key=size) or None
    return max((r for r in ranks if size(r) <= limit), key=lambda r: (size(r), r), default=None)


def resolve_ranks(
    method: Method,
    sites: list[Site],
    max_share: float | None = None,
    sensitivity: Mapping[str, Tensor] | None = None,
) -> Method:
    """Give each site its final rank, in place: spend the budget, check, cap.

    Args:
        method: The method before the targets' overrides, returned with its budget spent on one
            rank for all sites.
        sites: Of the method and its overrides.
        max_share: As in :class:`~mmpeft.injection.targets.Targets`.
        sensitivity: As in :func:`mmpeft.inject`.

    Raises:
        UsageError: The budget is smaller than rank 1 needs, a rank is larger than any of its
            weights allows, ``sensitivity`` is given without a budget or lacks a site, or
            ``max_share`` for a method without ranks.
    """
    ranked = [site for site in sites if isinstance(site.method, Ranked)]
    free = budgeted(ranked)
    if sensitivity is not None and not free:
        raise UsageError(
            f'sensitivity distributes the budget of a method, and {method} leaves no rank open. '
            "Write a budget in place of the rank, such as budget='300k', or leave sensitivity out."
        )
    if isinstance(method, Ranked) and method.budget is not None:
        budget = parse_count(method.budget)
        method = _spend_budget(method, ranked, free, budget)
        if sensitivity is not None:
            share = 1.0 if max_share is None else max_share
            _distribute(budget - _size(set(ranked) - set(free)), free, share, sensitivity)
    check_ranks(ranked)
    if max_share is not None:
        if sites and not ranked:
            raise UsageError(
                f'targets.max_share lowers ranks, and {type(method).__name__} has none. Leave '
                'max_share out.'
            )
        for site in ranked:
            site.method = _capped(site, max_share)
    return method


def budgeted(sites: Iterable[Site]) -> list[Site]:
    """The sites whose rank the budget of their method decides."""
    return [site for site in sites if getattr(site.method, 'budget', None) is not None]


def _size(sites):
    return adapters_size((s.method, s.spec) for s in {s.tie_key: s for s in sites}.values())


def _distribute(budget, sites, max_share, sensitivity):
    sizes_of = cache(_sizes)  # networks repeat their blocks
    sizes, gains, tied = [], [], defaultdict(list)
    for site in sites:
        tied[site.tie_key].append(site)
    for site, *_ in tied.values():
        if site.name not in sensitivity:
            raise UsageError(
                f'sensitivity has no entry {site.name!r}. Measure it with the method and targets '
                'that are injected: mmpeft.sensitivity(model, method, batches, loss, targets).'
            )
        gained, most = sensitivity[site.name].tolist(), min(budget, max_share * site.spec.numel)
        sizes.append(sizes_of(site.method, site.spec, len(gained), most))
        gains.append(gained[: len(sizes[-1])])
    for same, rank in zip(tied.values(), distribute(budget, sizes, gains), strict=True):
        for site in same:
            site.method = site.method.with_rank(rank)


def _sizes(method, spec, highest, most):
    """Parameters at rank 1 and at those up to ``highest`` where they are no more than ``most``."""
    found = []
    for rank in range(1, highest + 1):
        size = adapters_size([(method.with_rank(rank), spec)])
        if found and size > most:
            break
        found.append(size)
    return found


def _spend_budget(method, sites, free, budget):
    sites = list({site.tie_key: site for site in sites}.values())

    @cache
    def needed(rank):
        return adapters_size(
            (s.method if s.method.budget is None else s.method.with_rank(rank), s.spec)
            for s in sites
        )

    highest = max((site.method.max_rank(site.spec) for site in free), default=1)
    rank = most_within(budget, needed, highest, method.grows)
    if rank is None:
        least = min([1] if method.grows else range(1, highest + 1), key=needed)
        raise UsageError(
            f'budget={method.budget!r} is too small: {type(method).__name__} on these '
            f'{len(sites)} weights needs {needed(least):,} parameters at rank {least}. Raise it, '
            'or narrow the targets.'
        )
    for site in free:
        site.method = site.method.with_rank(rank)
    return method.with_rank(rank)


def check_ranks(sites: Iterable[Site]) -> None:
    """Refuse ranks that are larger than any of their weights allows.

    Raises:
        UsageError: The message names the largest possible rank.
    """
    allowed = defaultdict(list)
    for site in (site for site in sites if isinstance(site.method, Ranked)):
        allowed[site.method].append((site.method.max_rank(site.spec), site.name))
    for method, limits in allowed.items():
        highest, name = max(limits)
        if max((method.rank,) if isinstance(method.rank, int) else method.rank) > highest:
            raise UsageError(
                f'{type(method).__name__}: rank={method.rank} is larger than any of its weights '
                f'allows; the largest possible is {highest}, at {name!r}. Lower the rank.'
            )


def _capped(site, max_share):
    @cache
    def size(rank):
        return adapters_size([(method.with_rank(rank), site.spec)])

    method, limit = site.method, max_share * site.spec.numel
    if adapters_size([(method, site.spec)]) <= limit:
        return method
    if not isinstance(method.rank, int):
        raise UsageError(
            f'targets.max_share caps a single rank, and {site.name!r} has rank={method.rank}.'
        )
    highest = method.rank if method.grows else method.max_rank(site.spec)
    rank = most_within(limit, size, highest, method.grows)
    return method.with_rank(min(range(1, highest + 1), key=size) if rank is None else rank)
