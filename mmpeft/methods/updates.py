"""How an update dW is applied to a weight W.

``additive``   W + dW
``lie``        W * (1 + dW)      LieRA, Eq. 8 (first order)
``lie_exact``  W * exp(dW)       LieRA, Eq. 5 and 6

Weights without zeros form a Lie group under the elementwise product. dW is an
element of its Lie algebra, which is additive, so that any method can give dW.
"""

from typing import Literal

import torch
from torch import Tensor


def additive(weight: Tensor, delta: Tensor) -> Tensor:
    """W + dW, elementwise; both of the same shape."""
    return weight + delta


def lie(weight: Tensor, delta: Tensor) -> Tensor:
    """W + W * dW (LieRA, Eq. 8), elementwise; both of the same shape."""
    return torch.addcmul(weight, weight, delta)


def lie_exact(weight: Tensor, delta: Tensor) -> Tensor:
    """W * exp(dW) (LieRA, Eq. 5 and 6), elementwise; both of the same shape."""
    return weight * delta.exp()


UPDATES = {'additive': additive, 'lie': lie, 'lie_exact': lie_exact}
Update = Literal['additive', 'lie', 'lie_exact']
