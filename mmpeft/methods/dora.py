"""DoRA: weight-decomposed low-rank adaptation (arXiv:2402.09353).

    W' = m * V / ||V||,   V = update(W, dW),   m starts at ||W||

(Eq. 5; Subspace tuning, Eq. 27)
with one magnitude and one norm for each output channel. The norms divide
before they multiply, so that the start is W to the last bit, and a channel
whose weights are all zero stays zero instead of becoming NaN.
"""

from dataclasses import replace

import torch

from .base import Card, register
from .channels import magnitude_ratio, output_norm, per_output
from .lora import LoRA


@register
class DoRA(LoRA):
    """LoRA on the direction of the weight, with its magnitude trained apart.

    ``detach_norm`` takes ||V|| as a constant in backward (the paper's Sec. 4.3,
    as peft does): cheaper, and no longer the exact gradient.
    """

    card = Card(
        family='combination',
        formula='m · V / ‖V‖ by output channel, V = W + s · B A',
        suits='Low ranks, where LoRA falls short; takes more time per step.',
    )

    detach_norm: bool = False

    def init(self, weight, spec):
        return super().init(weight, spec) | {'magnitude': output_norm(weight, spec)}

    def apply(self, weight, factors, spec, training=False):
        direction = super().apply(weight, factors, spec, training)
        return self._normed(direction, factors['magnitude'], spec)

    def update_gradient(self, weight, gradient, spec):
        magnitude = output_norm(weight, spec)
        with torch.enable_grad():
            direction = weight.detach().requires_grad_()
            normed = self._normed(direction, magnitude, spec)
            (gradient,) = torch.autograd.grad(normed, direction, gradient)
        return super().update_gradient(weight, gradient, spec)

    def _normed(self, direction, magnitude, spec):
        ratio = magnitude_ratio(magnitude, output_norm(direction, spec), self.detach_norm)
        return direction * per_output(ratio, spec)

    def normal_form(self, factors, spec, training=False):
        form = super().normal_form(factors, spec, training)
        if form is None:
            return None
        return replace(form, magnitude=factors['magnitude'], detach_norm=self.detach_norm)
