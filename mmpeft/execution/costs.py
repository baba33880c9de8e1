"""Which form of an update is cheaper, by the sizes of a layer."""

from math import prod

from mmpeft.methods.normal_form import NormalForm


def thin_pays(out: int, features: int, rank: int) -> bool:
    """Whether thin products are cheaper than the dense gradient of a matrix, by position.

    Thin: x V^T, dy U and their products with dy and x, 2 r (O + I). Dense: O I.
    """
    return 2 * rank * (out + features) < out * features


def branch_pays(positions: int, out: int, features: int, *kernel: int) -> bool:
    """Whether an update is cheaper as a branch beside a layer than in its weight.

    The branch adds to a map of O channels in forward and of I in backward; the weight is built
    in both. Both are bound by the elements that they read and write.
    """
    return positions * (out + features) < 2 * out * features * prod(kernel)


def tucker_pays(form: NormalForm, out: int, features: int, *kernel: int) -> bool:
    """Whether thin convolutions are clearly cheaper than the dense gradient, by position.

    They have few channels, and run at a fraction of a wide convolution's speed.
    """
    taps, rank = prod(kernel), form.up.shape[1]
    if form.core is None or form.down is None:
        cost = 2 * rank * (out + taps * features)
    else:
        inner = len(form.down)
        cost = 2 * (rank * out + inner * features) + 3 * taps * rank * inner
    return 2 * cost < taps * out * features
