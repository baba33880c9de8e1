"""MPC: matrix pattern constraints on the factors of an update (Subspace tuning, Sec. 4.2).

For dW = B A or B D A with r the inner size, B (n, r) and A (r, m) as torch
multiplies them; the paper writes the transposed product.

    MPC_o   ||B^T B - I||^2 + ||A A^T - I||^2              Eq. 20
    MPC_d   ||A A^T - I||^2 + ||B^T B - diag(B^T B)||^2    Eq. 21
    MPC_n   a non-linearity between the factors

in squared Frobenius norms. In MPC_d the factor next to the input is the
orthogonal one, as in the paper. MPC_o and MPC_d are terms of the training
loss; MPC_n acts on activations, h(x A) B, and is ``ParallelAdapter``.
"""

import torch
from torch import Tensor


def mpc_o(up: Tensor, down: Tensor) -> Tensor:
    """Eq. 20 for an update ``up @ down``; shapes (n, r) and (r, m)."""
    return _orthogonality(up.T @ up) + _orthogonality(down @ down.T)


def mpc_d(up: Tensor, down: Tensor) -> Tensor:
    """Eq. 21 for an update ``up @ down``; shapes (n, r) and (r, m)."""
    gram = up.T @ up
    return _orthogonality(down @ down.T) + (gram - gram.diagonal().diag()).square().sum()


def _orthogonality(gram):
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()


MPC = {'o': mpc_o, 'd': mpc_d}
