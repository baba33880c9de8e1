"""The contract: a method is a function phi(W) = g(f(W)) on a frozen weight.

A :class:`Method` holds hyper-parameters and pure functions, nothing trained;
what is trained for one weight is held by an :class:`~.adapter.Adapter`.
Methods that cannot be written on a weight act on activations: see
:mod:`.activation`.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError

from .normal_form import NormalForm
from .spec import WeightSpec

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

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'apply' in cls.__dict__ and 'normal_form' not in cls.__dict__:
            cls.normal_form = Method.normal_form  # the inherited one is of another phi

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

    def normal_form(
        self, factors: Factors, spec: WeightSpec, training: bool = False
    ) -> NormalForm | None:
        """What :meth:`apply` computes, as thin factors; None to build phi(W)."""
        return None

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


def gaussian(weight: Tensor, *shape: int, std: float = 1.0) -> Tensor:
    """A new Gaussian factor, of the weight's dtype and device."""
    return torch.randn(shape, dtype=weight.dtype, device=weight.device) * std


def check_choice(method: Method, name: str, choices) -> None:
    """Raise UsageError unless a field holds one of the choices."""
    value = getattr(method, name)
    if value not in choices:
        raise UsageError(
            f'{type(method).__name__}: {name}={value!r} is unknown. '
            f'Write one of {", ".join(map(repr, choices))}.'
        )
