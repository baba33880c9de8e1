"""The contract: a method is a function phi(W) = g(f(W)) on a frozen weight.

A :class:`Method` holds hyper-parameters and pure functions, nothing trained;
what is trained for one weight is held by an :class:`~.adapter.Adapter`.
Methods that cannot be written on a weight act on activations: see
:mod:`.activation`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.weights import WeightSpec, layers, weights_of

from .updates import UPDATES

Factors = dict[str, Tensor]

FAMILIES = ('ends', 'reconstruction', 'extension', 'combination', 'activations')


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a reader chooses a method by; docs/methods.md is made of these.

    Attributes:
        family: Of ``FAMILIES``, the branches of subspace tuning.
        formula: phi(W) in one line.
        trains: What is trained, and where it starts.
        paper: Title, equation and arXiv number.
        cost: What a training step pays beside building and multiplying W',
            and what an adapter file holds beside the trained values.
        suits: When to choose it.
    """

    family: str
    formula: str
    trains: str
    paper: str
    cost: str
    suits: str

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f'family={self.family!r} is none of {FAMILIES}')


@dataclass(frozen=True, kw_only=True)
class Method:
    """Hyper-parameters of a method and the functions that define it.

    Subclasses are frozen dataclasses: their fields are the arguments that a
    config gives. They define :attr:`card`, :meth:`init` and :meth:`apply`.

    Attributes:
        card: The method in a few words.
        kinds: Kinds of layers that are adapted unless the targets say
            otherwise.
        adapts: Whether the method has adapters at all.
        trains_base: Whether the weights of the target module train themselves.
        merges: Whether adapters can be folded into the weights.
        shared: Names of factors that all weights of one :meth:`share_key`
            hold in common.
    """

    card: ClassVar[Card]
    kinds: ClassVar[tuple[str, ...] | None] = ('conv', 'linear')
    adapts: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ()

    def candidates(self, root: nn.Module) -> Iterator[tuple[str, nn.Module, str, WeightSpec]]:
        """All that could be adapted below a module.

        Yields:
            Path, layer, name of the tensor in the layer, and its role.
        """
        for path, layer in layers(root):
            for tensor, spec in weights_of(layer):
                if self.accepts(spec):
                    yield f'{path}.{tensor}' if path else tensor, layer, tensor, spec

    def accepts(self, spec: WeightSpec) -> bool:
        """Whether the method is defined on a parameter of this role."""
        return not spec.is_bias and len(spec.shape) > 1

    def init(self, weight: Tensor, spec: WeightSpec) -> Factors:
        """Initial values of what an adapter holds for a weight, by name.

        Tensors are trained. An ``nn.Buffer`` is fixed and stored with the
        adapter, such as the factors of a decomposition of the weight. Runs
        once in an adapter's life: a loaded adapter takes shapes alone from
        here, by a weight on the meta device.
        """
        raise NotImplementedError

    def rebuilt(self, spec: WeightSpec) -> Factors:
        """What is fixed and not stored: a function of role and arguments alone."""
        return {}

    def share_key(self, spec: WeightSpec) -> Any:
        """Weights of equal keys hold the :attr:`shared` factors in common."""
        return tuple(spec.shape)

    def apply(self, weight: Tensor, factors: Factors, spec: WeightSpec, training=False) -> Tensor:
        """phi(W): the adapted weight, of the shape and dtype of ``weight``."""
        raise NotImplementedError

    def penalty(self, factors: Factors, spec: WeightSpec) -> Tensor | None:
        """A scalar to add to the training loss, its weight included; None for none."""
        return None

    def allocator(self, adapters: dict[str, nn.Module], steps: int):
        """What decides during training where the parameters go, if anything.

        Args:
            adapters: All adapters of this method in a model, by path.
            steps: Optimizer steps of the whole run.

        Returns:
            Allocator | None: See :mod:`.allocator`.
        """
        return None

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

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'delta' in cls.__dict__ and 'low_rank' not in cls.__dict__:
            cls.low_rank = DeltaMethod.low_rank  # an inherited one is of another dW

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

    def low_rank(
        self, factors: Factors, spec: WeightSpec
    ) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """dW before scaling by thin factors of its channel modes, which is faster to train.

        dW[o, i, k] = sum_ab U[o, a] G[a, b, k] V[b, i].

        Returns:
            U (out, a); G (a, b, *kernel) or None for the identity without a
            kernel; V (b, in) or None for the identity. None if dW is not of
            this form, as on grouped and transposed convolutions.
        """
        return None

    def apply(self, weight: Tensor, factors: Factors, spec: WeightSpec, training=False) -> Tensor:
        """phi(W) = update(W, scaling * dW)."""
        delta = self.scaling * self.delta(factors, spec)
        if training and self.dropout:
            delta = delta * input_dropout_mask(delta, spec, self.dropout)
        return UPDATES[self.update](weight, delta)


@dataclass(frozen=True, kw_only=True)
class Ranked(Method):
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
        if hasattr(super(), '__post_init__'):
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

    def with_rank(self, rank: int) -> 'Ranked':
        """The same method at another rank, its budget spent."""
        return replace(self, rank=rank, budget=None)


@dataclass(frozen=True, kw_only=True)
class RankMethod(Ranked, DeltaMethod):
    """A method that gives an update dW of a rank."""


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
