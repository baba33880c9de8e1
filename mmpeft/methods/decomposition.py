"""Singular triplets of a weight as a matrix, W = U diag(S) V^T."""

import torch
from torch import Tensor

from .spec import WeightSpec

OVERSAMPLING = 8

Triplets = tuple[Tensor, Tensor, Tensor]


def channel_matrix(weight: Tensor, spec: WeightSpec) -> Tensor:
    """The stored weight unfolded along its first mode: (shape[0], the rest)."""
    return weight.reshape(spec.shape[0], -1)


def leading(matrix: Tensor, rank: int, niter: int | None = None) -> Triplets:
    """The triplets of the largest singular values, in descending order.

    On the meta device nothing is decomposed.

    Args:
        matrix: (n, m)
        rank: Number of triplets k, at most min(n, m).
        niter: Power iterations of a randomised decomposition (Halko et al.,
            arXiv:0909.4061), which draws random numbers; exact if None.

    Returns:
        U (n, k), S (k,) and V^T (k, m), each with memory of its own.
    """
    if niter is None or matrix.is_meta:
        return _exact(matrix, slice(0, rank))
    size = min(rank + OVERSAMPLING, *matrix.shape)
    left, values, right = torch.svd_lowrank(matrix, size, niter)
    return _own(left[:, :rank]), _own(values[:rank]), _own(right.mT[:rank])


def trailing(matrix: Tensor, rank: int) -> Triplets:
    """The triplets of the smallest of the min(n, m) singular values; see :func:`leading`."""
    return _exact(matrix, slice(min(matrix.shape) - rank, None))


def _exact(matrix, chosen):
    n, m = matrix.shape
    k = min(n, m)
    if matrix.is_meta:
        left, values, right = (matrix.new_empty(size) for size in ((n, k), (k,), (k, m)))
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _own(left[:, chosen]), _own(values[chosen]), _own(right[chosen])


def _own(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)
