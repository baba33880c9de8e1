"""The contract: a method is a function phi(W) = g(f(W)) on a frozen weight.

A :class:`Method` holds hyper-parameters and pure functions. What is trained
for one weight is held by an :class:`~.adapter.Adapter`. Methods that cannot
be written as a function of a weight act on activations: see :mod:`.activation`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from math import prod, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.registry import METHODS

from .arguments import check_ranges, check_types, require
from .normal_form import NormalForm, Scales
from .spec import WeightSpec

Factors = dict[str, Tensor]

# The inner three are the branches of subspace tuning.
FAMILIES = dict(
    ends='the two baselines: nothing in the backbone trains, or everything',
    reconstruction='`f(W)`: scale or turn the directions that a weight has, or change some entries',
    extension='`g(W)`: add an update of few numbers to a weight, or multiply the weight by it',
    combination='`g(f(W))`: both',
    activations='change activations instead of weights; these cannot be merged',
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What docs/methods.md says of a method.

    Attributes:
        family: A key of :data:`FAMILIES`.
        formula: phi(W) in one line.
        suits: When to choose it.
    """

    family: str
    formula: str
    suits: str

    def __post_init__(self):
        require(self, 'family', self.family in FAMILIES, f'must be one of {", ".join(FAMILIES)}.')


@dataclass(frozen=True, kw_only=True)
class Method:
    """Hyper-parameters of a method and the functions that define it.

    Subclasses are frozen dataclasses (:func:`register`) whose fields are the
    arguments in a config. They define :attr:`card`, :meth:`init` and :meth:`apply`.

    Attributes:
        kinds: Kinds of layers that are adapted unless the targets name others.
        adapts: Whether the method has adapters at all.
        trains_base: Whether the weights of the target module train themselves.
        merges: Whether adapters can be folded into the weights.
        tied: Names of factors that all weights of one :meth:`tie_key` share.
        tied_in_layer: Whether they share them only with their own bias.
        renamed: Former names of arguments and the present ones.
    """

    card: ClassVar[Card]
    kinds: ClassVar[tuple[str, ...] | None] = ('conv', 'linear')
    adapts: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    tied: ClassVar[tuple[str, ...]] = ()
    tied_in_layer: ClassVar[bool] = False
    renamed: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'apply' in cls.__dict__ and 'normal_form' not in cls.__dict__:
            cls.normal_form = Method.normal_form  # the inherited one is of another phi

    def __post_init__(self):
        """Check the arguments; subclasses call this first and then check further."""
        check_types(self)
        check_ranges(self)

    @property
    def allocates(self) -> bool:
        """Whether training needs :meth:`allocator`."""
        return type(self).allocator is not Method.allocator

    def accepts(self, spec: WeightSpec) -> bool:
        """Whether the method is defined on a parameter of this role."""
        return not spec.is_bias and len(spec.shape) > 1

    def resolve(self, weights: Iterable[tuple[Tensor, WeightSpec]]) -> 'Method':
        """The method with the arguments filled in that follow from all weights of an injection."""
        return self

    def init(self, weight: Tensor, spec: WeightSpec) -> Factors:
        """Initial values of an adapter's tensors, by name.

        Tensors are trained. An ``nn.Buffer`` is fixed and stored with the
        adapter, such as the factors of a decomposition of the weight. With
        these values phi(W) is W to the last bit; where a formula only comes
        near, as an orthogonal matrix from vectors, apply its difference from
        the start. This runs once, when an adapter is made; for an adapter that
        is about to be loaded, the weight is on the meta device and only shapes
        are used.
        """
        raise NotImplementedError(f'{type(self).__name__} has no init.')

    def rebuilt(self, spec: WeightSpec) -> Factors:
        """Fixed tensors that are not stored: functions of role and arguments alone."""
        return {}

    def tie_key(self, spec: WeightSpec) -> Any:
        """Weights of equal keys share the factors named in :attr:`tied`."""
        return tuple(spec.shape)

    def apply(self, weight: Tensor, factors: Factors, spec: WeightSpec, training=False) -> Tensor:
        """phi(W): a weight of the shape and dtype of ``weight``, which itself is left unchanged."""
        raise NotImplementedError(f'{type(self).__name__} has no apply.')

    def normal_form(
        self, factors: Factors, spec: WeightSpec, training: bool = False
    ) -> NormalForm | Scales | None:
        """What :meth:`apply` computes, as thin factors or scales; None to build phi(W)."""
        return None

    def penalty(self, factors: Factors, spec: WeightSpec) -> Tensor | None:
        """A scalar to add to the training loss, already weighted; None if there is none."""
        return None

    def allocator(self, adapters: dict[str, nn.Module], steps: int):
        """The :class:`~.allocator.Allocator` of the method's adapters, by path, if it has one.

        ``steps`` are the optimizer steps of the whole run.
        """
        return None

    def config(self) -> dict:
        """The method as ``METHODS.build`` takes it, defaults included."""
        return dict(type=type(self).__name__, **asdict(self))

    def definition(self) -> dict:
        """The arguments that phi and the factors' shapes depend on.

        Methods of equal definitions can load each other's adapters.
        """
        trains_only = ('dropout', 'budget')
        return {key: value for key, value in self.config().items() if key not in trains_only}

    @classmethod
    def modernize(cls, arguments: dict, version: tuple[int, ...]) -> dict:
        """Arguments as an earlier version stored them, (0, 3) say, under their present names."""
        return {cls.renamed.get(name, name): value for name, value in arguments.items()}

    def __str__(self):
        changed = [
            f'{f.name}={value!r}'
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default
        ]
        return f'{type(self).__name__}({", ".join(changed)})'


def register(method: type[Method]) -> type[Method]:
    """Make a class a frozen dataclass with keyword arguments, and register it as a method.

    Raises:
        TypeError: The class has no ``card`` of its own or inherited.
    """
    if not isinstance(getattr(method, 'card', None), Card):
        raise TypeError(
            f'{method.__name__} has no card = Card(family=..., formula=..., suits=...).'
        )
    return METHODS.register_module(module=dataclass(frozen=True, kw_only=True)(method))


def uniform(weight: Tensor, *shape: int) -> Tensor:
    """A new factor as linear layers start, within 1 / sqrt(n) where an output sums n numbers."""
    bound = 1 / sqrt(prod(shape[1:]))
    return weight.new_empty(shape).uniform_(-bound, bound)


def gaussian(weight: Tensor, *shape: int, std: float = 1.0) -> Tensor:
    """A new Gaussian factor, of the weight's dtype and device."""
    return torch.randn(shape, dtype=weight.dtype, device=weight.device) * std
