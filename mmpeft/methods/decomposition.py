"""Singular triplets of a weight as a matrix, W = U diag(S) V^T."""

import torch
from torch import Tensor, nn

from .base import Factors

OVERSAMPLING = 8

Triplets = tuple[Tensor, Tensor, Tensor]


def leading(matrix: Tensor, rank: int | None, niter: int | None = None) -> Triplets:
    """The triplets of the largest singular values, in descending order.

    Args:
        matrix: (n, m)
        rank: Number of triplets k, capped by n and m; None for all.
        niter: Power iterations of a randomised decomposition (Halko et al.,
            arXiv:0909.4061), which draws random numbers; exact if None.

    Returns:
        U (n, k), S (k,) and V^T (k, m), each with memory of its own.
    """
    if niter is None:
        return _chosen(*torch.linalg.svd(matrix, full_matrices=False), slice(rank))
    size = min(rank + OVERSAMPLING, *matrix.shape)
    left, values, right = torch.svd_lowrank(matrix, size, niter)
    return _chosen(left, values, right.mT, slice(rank))


def trailing(matrix: Tensor, rank: int) -> Triplets:
    """The triplets of the smallest of the min(n, m) singular values; see :func:`leading`."""
    return _chosen(*torch.linalg.svd(matrix, full_matrices=False), slice(-rank, None))


def stored_triplets(weight: Tensor, rank: int | None) -> Factors:
    """The leading triplets of a weight unfolded along its first mode, fixed and stored.

    Returns:
        ``left`` U (n, k), ``values`` S (k,) and ``right`` V^T (k, m).
    """
    triplets = map(nn.Buffer, leading(weight.flatten(1), rank))
    return dict(zip(('left', 'values', 'right'), triplets, strict=True))


def _chosen(left, values, right, places):
    parts = left[:, places], values[places], right[places]
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)
