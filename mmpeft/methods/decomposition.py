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


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Those of a matrix (n, m) in descending order, (min(n, m),); the eigenvalues of its Gram."""
    matrix = matrix if matrix.shape[0] < matrix.shape[1] else matrix.mT
    return torch.linalg.eigvalsh(matrix @ matrix.mT).flip(0).clamp_min(0)


def core_energy(tensor: Tensor) -> Tensor:
    """How much of a tensor's squared norm its leading multilinear singular vectors capture.

    The vectors of a mode are the left singular ones of the tensor unfolded along it (HOSVD,
    De Lathauwer et al., 2000). For a matrix no others capture more; for N modes they leave at
    most N times the squared norm that the best of these ranks leave.

    Returns:
        Of the tensor's shape: at (J_1 - 1, ..., J_N - 1) what J_n vectors of each mode n capture.
    """
    shape, tensor = tensor.shape, tensor.squeeze()
    if tensor.ndim < 3:
        squares = torch.zeros_like(tensor).view(-1, tensor.shape[-1] if tensor.ndim else 1)
        values = squared_singular_values(tensor.view(squares.shape))
        squares.diagonal().copy_(values)
    else:
        for mode in range(tensor.ndim):
            unfolding = tensor.movedim(mode, 0).flatten(1)
            vectors = torch.linalg.eigh(unfolding @ unfolding.mT).eigenvectors.flip(1)
            tensor = torch.tensordot(vectors, tensor, ([0], [mode])).movedim(0, mode)
        squares = tensor.square()
    squares = squares.view(shape)
    for mode in range(len(shape)):
        squares = squares.cumsum(mode)
    return squares


def _chosen(left, values, right, places):
    parts = left[:, places], values[places], right[places]
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)
