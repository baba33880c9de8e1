"""How an update dW is applied to a weight W.

``additive``   W + dW
``lie``        W * (1 + dW)      LieRA, Eq. 8 (first order)
``lie_exact``  W * exp(dW)       LieRA, Eq. 5 and 6

Weights without zeros form a Lie group under the elementwise product. dW is an
element of its Lie algebra, which is additive, so that any method can give dW.
"""

from typing import Literal

import torch

UPDATES = {
    'additive': torch.add,
    'lie': lambda weight, delta: torch.addcmul(weight, weight, delta),
    'lie_exact': lambda weight, delta: weight * delta.exp(),
}
Update = Literal['additive', 'lie', 'lie_exact']
