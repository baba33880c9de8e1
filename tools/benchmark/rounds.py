"""Measure several things in turn, and compare them within each round.

A B C A B C ...: whatever slows the machine down for a while slows all of them
down, and the ratio to the floor of the same round hardly moves.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch

Phases = dict[str, float]


class Clock:
    """Times between marks: of the GPU's own stream where there is one.

    On a GPU nothing waits between marks, as in training, so that what the
    CPU prepares while the GPU works costs nothing here either.
    """

    def __init__(self, device: str):
        self.is_cuda = device != 'cpu'
        self.marks = []
        if self.is_cuda:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        """Note this moment."""
        if self.is_cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each two marks."""
        if self.is_cuda:
            torch.cuda.synchronize()
            return [first.elapsed_time(second) / 1e3 for first, second in pairwise(self.marks)]
        return [second - first for first, second in pairwise(self.marks)]


def in_turn(entries: dict[str, Callable[[], Phases]], rounds: int) -> Iterable[tuple[str, Phases]]:
    """Call all entries, one after the other, as many times as there are rounds.

    Yields:
        Name and what the entry returned, as soon as it has.
    """
    for _ in range(rounds):
        for name, step in entries.items():
            yield name, step()


def median_of(step: Callable[[], Phases], times: int) -> Phases:
    """Several calls in a row as one, by the median of each phase."""
    calls = [step() for _ in range(times)]
    return {phase: statistics.median(call[phase] for call in calls) for phase in calls[0]}


def totals(rounds: Sequence[Phases], phases: Iterable[str]) -> list[float]:
    """The sum over some phases in each round."""
    return [sum(one.get(phase, 0.0) for phase in phases) for one in rounds]


def ratios(of: Sequence[Phases], to: Sequence[Phases], phases: Iterable[str]) -> list[float]:
    """Of the same phases of two entries, round by round; rounds that one lacks are left out.

    A phase that takes no time in ``to`` has no ratio.
    """
    phases = tuple(phases)
    pairs = zip(totals(of, phases), totals(to, phases), strict=False)
    return [a / b for a, b in pairs if b > 0]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and quartiles; None of nothing."""
    if not values:
        return None
    if len(values) == 1:
        return dict(median=values[0], low=values[0], high=values[0])
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return dict(median=middle, low=low, high=high)
