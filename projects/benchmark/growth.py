"""How step and saved bytes over the floor's grow: with the rank, the image and the network."""

import re
from dataclasses import dataclass, field

from records import FLOOR, Result

IMAGES = re.compile(r'(\w+), (\d+ x (\d+)x\d+)$')
Workloads = dict[str, dict[str, Result]]


@dataclass
class Curves:
    """The medians of several variants.

    Attributes:
        title: What stays as it is.
        label: What grows.
        measure: Of :data:`records.MEASURES`.
        lines: Ratios by variant, then by rank or size.
        members: Workloads that they are made of.
    """

    title: str
    label: str
    measure: str = 'step'
    lines: dict[str, dict[float, float]] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)

    def add(self, x: float | None, result: Result, floor: Result) -> None:
        """Add a point."""
        if result.rounds and x is not None:
            self.lines.setdefault(result.variant, {})[x] = result.over(floor, self.measure)
            self.members.add(result.workload)

    def points(self) -> list[float]:
        """All ranks or sizes."""
        return sorted(set().union(*self.lines.values()))


def by_rank(workloads: Workloads, measure: str = 'step') -> list[Curves]:
    """Curves of the workloads that were measured at several ranks."""
    found = []
    for results in workloads.values():
        curves = Curves(results[FLOOR].text, 'rank', measure)
        for result in results.values():
            curves.add(result.rank, result, results[FLOOR])
        found.append(curves)
    return [curves for curves in found if len(curves.points()) > 1]


def by_size(workloads: Workloads, measure: str = 'step') -> list[Curves]:
    """Curves of timm networks at several image sizes, and of several networks of one family.

    Variants that were not measured at all sizes are left out.
    """
    found = {}
    for results in workloads.values():
        floor = results[FLOOR]
        image = IMAGES.match(floor.text)
        if not image or len({result.rank for result in results.values()} - {None}) > 1:
            continue
        model, size, height = image.groups()
        family, batch = model.split('_')[0], size.split()[0]
        for title, label, x in (
            (f'{model}, batch of {batch}', 'side of the image', int(height)),
            (f'{family}, {size}', 'millions of parameters', round(floor.parameters / 1e6, 1)),
        ):
            curves = found.setdefault((title, label), Curves(title, label, measure))
            for result in results.values():
                if result is not floor:
                    curves.add(x, result, floor)
    several = [curves for curves in found.values() if len(curves.points()) > 1]
    for curves in several:
        count = len(curves.points())
        curves.lines = {name: line for name, line in curves.lines.items() if len(line) == count}
    return [curves for curves in several if curves.lines]


def single(workloads: Workloads) -> Workloads:
    """Workloads of one rank, without networks in free form that were measured for their size."""
    ranks, sizes = (
        set().union(*(c.members for c in curves))
        for curves in (by_rank(workloads), by_size(workloads))
    )
    grown = ranks | {name for name in sizes if ':' in name}
    return {name: results for name, results in workloads.items() if name not in grown}
