"""Adapted layers as numpy arrays, and small networks, for tests of single methods."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.injection.site import adapters_of
from mmpeft.injection.weights import weights_of
from mmpeft.methods import Adapter, Method
from mmpeft.methods.spec import WeightSpec
from tests.cases import KINDS, LAYERS, randomize

# Layers with a weight of each role and proportion.
WEIGHTS = dict(
    wide=lambda: nn.Linear(9, 5),
    tall=lambda: nn.Linear(4, 7),
    conv1d=lambda: nn.Conv1d(4, 6, 3),
    grouped=lambda: nn.Conv2d(4, 6, 3, groups=2),
    depthwise=lambda: nn.Conv2d(6, 6, 3, groups=6),
    conv3d=lambda: nn.Conv3d(4, 5, (1, 2, 3)),
    transposed=lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    embedding=lambda: nn.Embedding(9, 5),
)
LAYOUTS = ('loralib', 'channel')
IMAGES = (2, 3, 5, 5)


class EqualBlocks(nn.Module):
    """Two weights of each of three shapes, and one alone; on ``IMAGES``."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Sequential(*(nn.Conv2d(8, 8, 3, groups=8, padding=1) for _ in range(2)))
        self.up = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))

    def forward(self, x):
        x = self.depthwise(self.stem(x)).mean((2, 3))
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def spec_of(layer: nn.Module) -> WeightSpec:
    """The role of a layer's weight."""
    return dict(weights_of(layer))['weight']


def weights_in(model: nn.Module) -> list[tuple[Tensor, WeightSpec]]:
    """Each weight that a method of updates can adapt, with its role."""
    return [
        (getattr(module, name).detach(), spec)
        for module in model.modules()
        for name, spec in weights_of(module)
        if not spec.is_bias and len(spec.shape) > 1
    ]


def weights_of_all_layers() -> list[tuple[Tensor, WeightSpec]]:
    """The same of the whole table of layers."""
    return [pair for case in LAYERS.values() for pair in weights_in(case.make())]


def adapted(layer: nn.Module, config: dict, std: float = 0.3) -> tuple:
    """Adapt a layer in float64 and move its factors off their start.

    Returns:
        The frozen weight, the adapted one and the factors, as numpy arrays.
    """
    layer.double()
    mmpeft.inject(layer, config, dict(kinds=KINDS))
    randomize(layer, std)
    factors = {k: v.detach().numpy() for k, v in adapters_of(layer, 'weight')[0].factors.items()}
    frozen = layer.parametrizations.weight.original.detach().numpy()
    return frozen, layer.weight.detach().numpy(), factors


def init(layer: nn.Module, method: Method) -> dict[str, Tensor]:
    """Initial factors for a layer's weight, in float64."""
    return method.init(copy.deepcopy(layer).weight.detach().double(), spec_of(layer))


def count(factors: dict[str, Tensor]) -> int:
    """Numbers in all factors together."""
    return sum(factor.numel() for factor in factors.values())


def adapter_at(model: nn.Module, path: str, tensor: str = 'weight') -> Adapter:
    """The first adapter of a weight."""
    return adapters_of(model.get_submodule(path), tensor)[0]


def trained_steps(model: nn.Module, steps: int, lr: float = 0.05) -> None:
    """Train on random ``IMAGES``."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    x = torch.randn(IMAGES)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def numpy_svd(weight: np.ndarray, like: np.ndarray | None = None) -> tuple:
    """U, S, V of the kernel as a matrix; signs of U's first columns as in ``like``."""
    left, values, right = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
    right = right.T
    if like is not None:
        signs = np.sign((left[:, : like.shape[1]] * like).sum(0))
        left[:, : like.shape[1]] *= signs
        right[:, : like.shape[1]] *= signs
    return left, values, right


def refused_beyond(size: int, svd=torch.linalg.svd):
    """An SVD that fails for matrices whose smaller side is above a size."""

    def small(matrix, *args, **kwargs):
        assert min(matrix.shape) <= size, 'an exact decomposition of the whole matrix'
        return svd(matrix, *args, **kwargs)

    return small
