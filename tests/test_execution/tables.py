"""Layers at sizes at which every kernel is selected, and adapted ones."""

import torch
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.injection.weights import weights_of
from mmpeft.methods import ActivationMethod, DeltaMethod
from mmpeft.methods.spec import ConvGeometry
from tests.cases import KINDS, LAYERS, METHODS, Layer, randomize

LARGE = dict(
    large_linear=Layer(lambda: nn.Linear(20, 12), (5, 7, 20)),
    without_bias=Layer(lambda: nn.Linear(12, 20, bias=False), (3, 12)),
    pointwise=Layer(lambda: nn.Conv2d(10, 8, 1), (2, 10, 6, 5)),
    pointwise_padded=Layer(lambda: nn.Conv2d(8, 6, 1, stride=2, padding=1), (2, 8, 7, 6)),
    pointwise_strided=Layer(lambda: nn.Conv2d(8, 6, 1, stride=(2, 3)), (2, 8, 7, 6)),
    kernel=Layer(lambda: nn.Conv2d(8, 10, 3, stride=2, padding=1, dilation=2), (2, 8, 13, 12)),
    circular=Layer(lambda: nn.Conv2d(8, 10, 3, padding=1, padding_mode='circular'), (2, 8, 6, 7)),
    same=Layer(lambda: nn.Conv2d(8, 10, (4, 3), padding='same'), (2, 8, 6, 7)),
    patches=Layer(lambda: nn.Conv2d(6, 8, 2, stride=2), (2, 6, 8, 8)),
    sequence=Layer(lambda: nn.Conv1d(8, 6, 5, padding=2, bias=False), (3, 8, 11)),
    volume=Layer(lambda: nn.Conv3d(4, 6, 3, padding=(1, 0, 2)), (1, 4, 5, 5, 5)),
    large_depthwise=Layer(lambda: nn.Conv2d(16, 16, 7, padding=3, groups=16), (2, 16, 12, 13)),
    depthwise_same=Layer(
        lambda: nn.Conv2d(24, 24, (4, 5), padding='same', groups=24), (1, 24, 14, 14)
    ),
    depthwise_wide=Layer(
        lambda: nn.Conv2d(24, 24, (3, 5), padding=(2, 1), groups=24), (1, 24, 14, 14)
    ),
)
TABLE = LAYERS | LARGE


def adapted(layer, config, dtype=torch.float64, way=execution.AUTO):
    """A layer of the table with an adapter that is not at its start."""
    torch.default_generator.manual_seed(0)
    model = layer.build(dtype)
    mmpeft.inject(model, config, dict(kinds=KINDS), execution=way)
    randomize(model)
    return model


def geometry_of(layer):
    """How a convolution's kernel slides."""
    return ConvGeometry.of(layer, dict(weights_of(layer))['weight'])


def weight_methods():
    """Names of the methods that adapt weights, and whether each declares a normal form."""
    found = {}
    for name, config in METHODS.items():
        method = mmpeft.METHODS.build(config)
        if method.adapts and not isinstance(method, ActivationMethod) and name != 'bitfit':
            thin = getattr(type(method), 'low_rank', DeltaMethod.low_rank)
            found[name] = thin is not DeltaMethod.low_rank
    return found


NORMAL = [name for name, has_form in weight_methods().items() if has_form]
OTHER = [name for name, has_form in weight_methods().items() if not has_form]
