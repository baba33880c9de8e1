"""Ranks of many weights within one budget of parameters, from what each further rank gains."""

from collections.abc import Iterable, Sequence


def distribute(
    budget: int, sizes: Sequence[Sequence[int]], gains: Sequence[Sequence[float]]
) -> list[int]:
    """Spend a budget where a parameter gains most.

    A step of gradient descent of rate 1 / L that may move W_i by a matrix of rank r_i alone lowers
    a loss of smoothness L by sum_i sum_{k <= r_i} s_ik^2 / 2L, with s_ik the k-th singular value of
    dL/dW_i (Eckart and Young, 1936). So gains[i] are the s_ik^2, and the sum over all ranks within
    the budget is a knapsack of multiple choice. It is filled in the order of gain per parameter,
    averaged over the ranks where it would rise (Sinha and Zoltners, 1979). Where it falls
    everywhere, no other ranks of that size gain more, up to the first rank that does not fit.

    Every weight has rank 1 at least: one without an adapter could never train, whatever the batches
    left out. Of two weights of equal sizes the one that gains more from each rank has no lower
    rank; where they gain the same the ranks differ by the remainder at most, the first higher. No
    rank can be raised by one within the budget. EVA (arXiv:2410.07170) orders all weights'
    components so too, by the variance of inputs; GoRA (arXiv:2502.12171) gives each weight a part
    of the budget by its gradient.

    Args:
        budget: Parameters of all weights, not less than rank 1 takes.
        sizes: For each weight the parameters at ranks 1, 2, ..., increasing, up to the highest.
        gains: For each weight what each of these ranks adds, not negative.

    Returns:
        A rank for each weight.
    """
    ranks, left = [1] * len(sizes), budget - sum(own[0] for own in sizes)
    steps = []
    for index, (own, gained) in enumerate(zip(sizes, gains, strict=True)):
        costs = [high - low for low, high in zip(own, own[1:], strict=False)]
        rates = falling(costs, gained[1:])
        total = -sum(gained)
        steps += [(-rate, total, rank, index) for rank, rate in enumerate(rates, 2)]
    for *_, rank, index in sorted(steps):
        cost = sizes[index][rank - 1] - sizes[index][rank - 2]
        if ranks[index] == rank - 1 and cost <= left:
            ranks[index], left = rank, left - cost
    return ranks


def falling(costs: Iterable[int], gains: Iterable[float]) -> list[float]:
    """Gain over cost of each step in a row, averaged over neighbours where it would rise.

    These are the slopes of the concave hull of gain over cost.
    """
    blocks = []
    for cost, gain in zip(costs, gains, strict=True):
        count = 1
        while blocks and blocks[-1][1] / blocks[-1][0] < gain / cost:
            before = blocks.pop()
            cost, gain, count = cost + before[0], gain + before[1], count + before[2]
        blocks.append((cost, gain, count))
    return [gain / cost for cost, gain, count in blocks for _ in range(count)]
