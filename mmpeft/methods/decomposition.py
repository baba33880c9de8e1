"""Singular triplets of a weight as a matrix, W = U diag(S) V^T."""

import torch
from torch import Tensor

from .spec import WeightSpec

OVERSAMPLING = 8

Triplets = tuple[Tensor, Tensor, Tensor]


def channel_matrix(weight: Tensor, spec: WeightSpec) -> Tensor:
    """The stored weight unfolded along its first mode: (shape[0], the rest)."""
    return weight.reshape(spec.shape[0], -1)


def leading(matrix: Tensor, rank: int | None = None, niter: int | None = None) -> Triplets:
    """The triplets of the largest singular values, in descending order.

    On the meta device nothing is decomposed.

    Args:
        matrix: (n, m)
        rank: Number of triplets k, at most min(n, m), which None stands for.
        niter: Power iterations of a randomised decomposition (Halko et al.,
            arXiv:0909.4061), which draws random numbers; exact if None.

    Returns:
        U (n, k), S (k,) and V^T (k, m), each with memory of its own.
    """
    k = min(matrix.shape) if rank is None else rank
    if matrix.is_meta:
        return _shapes(matrix, k)
    if niter is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        size = min(k + OVERSAMPLING, *matrix.shape)
        left, values, right = torch.svd_lowrank(matrix, size, niter)
        right = right.mT
    return _own(left[:, :k]), _own(values[:k]), _own(right[:k])


def trailing(matrix: Tensor, rank: int) -> Triplets:
    """The triplets of the smallest of the min(n, m) singular values; see :func:`leading`."""
    if matrix.is_meta:
        return _shapes(matrix, rank)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _own(left[:, -rank:]), _own(values[-rank:]), _own(right[-rank:])


def _shapes(matrix, k):
    n, m = matrix.shape
    return matrix.new_empty(n, k), matrix.new_empty(k), matrix.new_empty(k, m)


def _own(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)
