"""How an update dW is applied to a weight W.

``additive``   W + dW
``lie``        W * (1 + dW)      LieRA, Eq. 8 (first order)
``lie_exact``  W * exp(dW)       LieRA, Eq. 5 and 6

Weights without zeros form a Lie group under the elementwise product. dW is an
element of its Lie algebra, which is additive, so that any method can give dW.
"""

from typing import Literal

import torch


def _additive(weight, delta, scale, out=None):
    return torch.add(weight, delta, alpha=scale, out=out)


def _lie(weight, delta, scale, out=None):
    return torch.addcmul(weight, weight, delta, value=scale, out=out)


def _lie_exact(weight, delta, scale, out=None):
    return torch.mul(weight, torch.mul(delta, scale, out=out).exp(), out=out)


# Functions of W, dW, the factor before it, and a tensor for the result, which may be dW.
UPDATES = dict(additive=_additive, lie=_lie, lie_exact=_lie_exact)
Update = Literal['additive', 'lie', 'lie_exact']
