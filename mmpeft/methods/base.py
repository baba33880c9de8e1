"""The contract: a method is a function phi(W) = g(f(W)) on a frozen weight.

A :class:`Method` holds hyper-parameters and pure functions, nothing trained.
An :class:`Adapter` holds what is trained for one weight and is the module
that ``torch.nn.utils.parametrize`` calls in place of the weight.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.weights import WeightSpec

from .updates import UPDATES

Factors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Hyper-parameters of a method and the functions that define it.

    Subclasses are frozen dataclasses: their fields are the arguments that a
    config gives. They define :meth:`init` and :meth:`apply`.

    Attributes:
        kinds: Kinds of layers that are adapted unless the targets say
            otherwise.
        adapts: Whether the method has adapters at all.
        trains_base: Whether the weights of the target module train themselves.
    """

    kinds: ClassVar[tuple[str, ...] | None] = ('conv', 'linear')
    adapts: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False

    def accepts(self, spec: WeightSpec) -> bool:
        """Whether the method is defined on a parameter of this role."""
        return not spec.is_bias and len(spec.shape) > 1

    def init(self, weight: Tensor, spec: WeightSpec) -> Factors:
        """Initial values of what is trained for a weight, by name."""
        raise NotImplementedError

    def apply(self, weight: Tensor, factors: Factors, spec: WeightSpec, training=False) -> Tensor:
        """phi(W): the adapted weight, of the shape and dtype of ``weight``."""
        raise NotImplementedError

    def config(self) -> dict:
        """The method as ``METHODS.build`` takes it; defaults included."""
        return dict(type=type(self).__name__, **asdict(self))

    def __str__(self):
        changed = [
            f'{f.name}={value!r}'
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default
        ]
        return f'{type(self).__name__}({", ".join(changed)})'


@dataclass(frozen=True, kw_only=True)
class DeltaMethod(Method):
    """A method that gives an update dW of the weight's shape.

    phi(W) = update(W, scaling * dW), with ``update`` of :mod:`.updates`.

    Attributes:
        update: ``'additive'``, ``'lie'`` or ``'lie_exact'``.
        dropout: Probability with which dW ignores an input channel during a
            training step. A channel is dropped at all positions alike, which
            makes the dropout of LoRA's branch a function of the weight.
    """

    update: str = 'additive'
    dropout: float = 0.0

    def __post_init__(self):
        check_choice(self, 'update', UPDATES)
        if not 0 <= self.dropout < 1:
            raise UsageError(
                f'{type(self).__name__}: dropout={self.dropout} is no probability below 1.'
            )

    @property
    def scaling(self) -> float:
        """The factor before dW."""
        return 1.0

    def delta(self, factors: Factors, spec: WeightSpec) -> Tensor:
        """dW before scaling, of the weight's shape."""
        raise NotImplementedError

    def apply(self, weight: Tensor, factors: Factors, spec: WeightSpec, training=False) -> Tensor:
        """phi(W) = update(W, scaling * dW)."""
        delta = self.scaling * self.delta(factors, spec)
        if training and self.dropout:
            delta = delta * input_dropout_mask(delta, spec, self.dropout)
        return UPDATES[self.update](weight, delta)


@dataclass(frozen=True, kw_only=True)
class RankMethod(DeltaMethod):
    """A method whose size is governed by a rank.

    Attributes:
        rank: The rank, as the method understands it.
        budget: In place of ``rank``: the number of parameters that all
            adapters together may have, such as ``'12.9M'``. The largest rank
            that fits is taken.
    """

    rank: int | tuple[int, ...] = 8
    budget: int | str | None = None

    def __post_init__(self):
        super().__post_init__()
        ranks = (self.rank,) if isinstance(self.rank, int) else tuple(self.rank)
        object.__setattr__(self, 'rank', self.rank if isinstance(self.rank, int) else ranks)
        if not ranks or any(not isinstance(r, int) or r < 1 for r in ranks):
            raise UsageError(
                f'{type(self).__name__}: rank={self.rank!r} must be a positive integer'
                ' or one positive integer a mode.'
            )

    def max_rank(self, spec: WeightSpec) -> int:
        """The size of the weight's largest channel mode; no rank beyond it makes sense."""
        return max(spec.in_features, spec.out_features)

    def with_rank(self, rank: int) -> 'RankMethod':
        """The same method at another rank, its budget spent."""
        return replace(self, rank=rank, budget=None)


class Adapter(nn.Module):
    """What is trained for one frozen weight, and the map W -> phi(W).

    Low-precision weights get float32 factors: the map is computed in the
    factors' dtype, outside autocast, and rounded once to the weight's.

    Args:
        method: Defines the map.
        spec: The weight's role.
        weight: The frozen weight, with its pretrained values.
    """

    def __init__(self, method: Method, spec: WeightSpec, weight: Tensor):
        super().__init__()
        self.method = method
        self.spec = spec
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad():
            for name, value in method.init(weight.detach().to(dtype), spec).items():
                self.register_parameter(name, nn.Parameter(value))

    @property
    def factors(self) -> Factors:
        """What is trained, by name."""
        return dict(self._parameters)

    def forward(self, weight: Tensor) -> Tensor:
        """phi(W), of the shape and dtype of ``weight``."""
        device = weight.device.type
        if device != 'meta' and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.map(weight, self.factors)
        return self.map(weight, self.factors)

    def map(self, weight: Tensor, factors: Factors) -> Tensor:
        """phi(W) for given factors, in their precision."""
        dtype = next(iter(factors.values())).dtype
        adapted = self.method.apply(weight.to(dtype), factors, self.spec, self.training)
        if self.spec.padding_idx is not None:
            row = torch.arange(weight.shape[0], device=weight.device) == self.spec.padding_idx
            adapted = torch.where(row[:, None], weight.to(dtype), adapted)
        return adapted.to(weight.dtype)

    def extra_repr(self):
        return str(self.method)


def gaussian(weight: Tensor, *shape: int, std: float = 1.0) -> Tensor:
    """A new Gaussian factor, of the weight's dtype and device."""
    return torch.randn(shape, dtype=weight.dtype, device=weight.device) * std


def input_dropout_mask(weight: Tensor, spec: WeightSpec, p: float) -> Tensor:
    """A random 0 or 1 / (1 - p) for each input channel, shaped to multiply a weight.

    Args:
        weight: Gives dtype and device.
        spec: The weight's role; a grouped convolution's rows see the channels
            of their own group.
        p: Probability of 0.

    Returns:
        Broadcastable to ``spec.shape``.
    """
    keep = torch.full((spec.in_features,), 1 - p, dtype=weight.dtype, device=weight.device)
    mask = torch.bernoulli(keep) / (1 - p)
    ones = (1,) * len(spec.kernel_size)
    if len(spec.shape) == 1:
        return mask
    if spec.input_first:
        return mask.view(-1, 1, *ones)
    rows = mask.view(spec.groups, 1, -1).expand(-1, spec.shape[0] // spec.groups, -1)
    return rows.reshape(spec.shape[0], -1, *ones)


def check_choice(method: Method, name: str, choices) -> None:
    """Raise UsageError unless a field holds one of the choices."""
    value = getattr(method, name)
    if value not in choices:
        raise UsageError(
            f'{type(method).__name__}: {name}={value!r} is unknown. '
            f'Write one of {", ".join(map(repr, choices))}.'
        )
