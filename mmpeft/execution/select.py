"""Which kernel computes with an adapted weight: by the layer, its input and the method's form."""

import torch
from torch import Tensor, nn

from mmpeft.methods import WeightAdapter
from mmpeft.methods.precision import outside_autocast
from mmpeft.methods.spec import ConvGeometry

from .costs import tucker_pays
from .cpu import depthwise
from .kernels import AUTO, ConvKernel, DepthwiseKernel, Kernel, LinearKernel


def select_kernel(layer: nn.Module, x: Tensor) -> Kernel | None:
    """The fastest kernel for a layer.

    Args:
        layer: Enabled, and with one adapter on its weight.
        x: Its input: (..., in) of a linear layer, (N, in, *size) of a convolution.

    Returns:
        Takes x; None to build the weight and go on as torch does.
    """
    if not torch.is_grad_enabled() or not has_one_adapter(layer):
        return None
    adapter, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    spec, geometry = adapter.spec, None
    if not isinstance(layer, nn.Linear):
        if x.ndim != len(spec.shape):
            return None
        geometry = ConvGeometry.of(layer, spec)
        if 'depthwise' in spec.kinds:
            pays = depthwise.pays(layer, geometry, x)
            return DepthwiseKernel(layer, geometry) if pays else None
    if not spec.is_plain or original.requires_grad:
        return None  # the others have no gradient for the original weight
    with outside_autocast(adapter.device.type):
        form = adapter.method.normal_form(adapter.factors, spec, adapter.training)
    if form is None:
        return None
    is_additive, is_normalized = form.update == 'additive', form.magnitude is not None
    if geometry is None or (spec.is_matrix and not any(map(any, geometry.padding))):
        return None if is_normalized and not is_additive else LinearKernel(layer, geometry, form)
    if is_normalized or not is_additive:
        return None
    if layer.execution == AUTO and not tucker_pays(form, *spec.shape):
        return None
    return ConvKernel(layer, geometry, form)


def has_one_adapter(layer: nn.Module) -> bool:
    """Whether a layer's weight carries one adapter and nothing else."""
    chain = layer.parametrizations.weight
    return len(chain) == 1 and isinstance(chain[0], WeightAdapter)
