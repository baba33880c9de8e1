"""A weight stored in few bits, which computes as the values that it stands for."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_map_only

from mmpeft.errors import UsageError, suggest
from mmpeft.transforms import is_transformed

from .formats import FORMATS, READABLE, Parts, parts_of

aten = torch.ops.aten


class Quantized(Tensor):
    """A tensor whose memory is that of its parts.

    Its shape and dtype are those of the values; operations get the values, computed anew, and what
    changes it in place stores the result in its format. Copies, moves, pickles and state dicts keep
    the parts as they are.

    Args:
        parts: Plain tensors by name, on one device.
        format: What they mean: a key of :data:`.formats.READABLE`.
        shape: Of the values.
        dtype: Of the values.
    """

    @staticmethod
    def __new__(cls, parts: Parts, format: str, shape: torch.Size, dtype: torch.dtype):
        device = next(iter(parts.values())).device
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, parts: Parts, format: str, shape: torch.Size, dtype: torch.dtype):
        self.format, self.part_names = format, tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    @property
    def parts(self) -> Parts:
        """What is stored, by name."""
        return {name: getattr(self, name) for name in self.part_names}

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts.values())

    def values(self) -> Tensor:
        """A new plain tensor."""
        return READABLE[self.format].unpack(self.parts, self.shape).to(self.dtype)

    def with_parts(
        self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> 'Quantized':
        """The same format with other parts."""
        parts = {name: change(part) for name, part in self.parts.items()}
        return Quantized(parts, self.format, self.shape, dtype or self.dtype)

    def __repr__(self, *, tensor_contents=None):
        return f'Quantized({self.format}, {tuple(self.shape)}, {self.dtype}, {self.device})'

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self.clone()
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, False)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        is_parameter = isinstance(self, torch.nn.Parameter)
        return _rebuild, (self.parts, self.format, tuple(self.shape), self.dtype, is_parameter)

    def __tensor_flatten__(self):
        return list(self.part_names), (self.format, self.dtype)

    @staticmethod
    def __tensor_unflatten__(parts, context, shape, stride):
        return Quantized(parts, context[0], shape, context[1])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            function = linear if function is F.linear else function
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in KEEPING and isinstance(args[0], cls):
            return KEEPING[function](*args, **kwargs)
        if function._schema.is_mutable and not isinstance(args[0], Tensor):
            raise NotImplementedError(f'{function} cannot change a {args[0]!r}.')
        if isinstance(kwargs.get('out'), cls):
            raise NotImplementedError(f'{function} cannot write into a {kwargs["out"]!r}.')
        plain, options = tree_map_only(cls, cls.values, (args, kwargs))
        result = function(*plain, **options)
        if not (function._schema.is_mutable and isinstance(args[0], cls)):
            return result
        if not torch.equal(plain[0], args[0].values()):
            _copy(args[0], quantize(plain[0], args[0].format))
        return args[0]


def quantize(weight: Tensor, dtype: str) -> Quantized:
    """A weight (O, I), or a kernel (O, I, *kernel), in few bits.

    Args:
        weight: Of floating-point numbers.
        dtype: ``'int8'`` and ``'fp8'`` (float8_e4m3fn), with one scale for each row, or ``'nf4'``.

    Raises:
        UsageError: There is no such dtype, torchao is missing, or this machine cannot compute it.
    """
    check_format(dtype)
    weight = dequantized(weight.detach())
    exact = weight.float() if weight.dtype == torch.float64 else weight  # of which torchao has none
    try:
        quantized = Quantized(FORMATS[dtype].pack(exact), dtype, weight.shape, weight.dtype)
        quantized.values()
    except (NotImplementedError, RuntimeError) as error:
        raise UsageError(
            f'frozen_dtype={dtype!r}: torch and torchao cannot compute it on the device '
            f'{weight.device} here ({str(error).splitlines()[0]}). Take another of '
            f'{", ".join(map(repr, FORMATS))}, or leave frozen_dtype out.'
        ) from error
    return quantized


def adopted(tensor: Tensor) -> Tensor:
    """A weight that torchao or bitsandbytes quantized as one of ours: the same values and memory.

    Itself where it is of no format of ours, or plain.
    """
    found = parts_of(tensor)
    if found is None:
        return tensor
    name, parts, shape, dtype = found
    return Quantized(parts, name, shape, dtype)


def can_quantize(weight: Tensor, dtype: str) -> bool:
    """Whether a weight has a shape that a format can store."""
    return FORMATS[dtype].accepts(weight)


def check_format(dtype: str) -> None:
    """Raise UsageError for a format that cannot be written, or that lacks its library."""
    if dtype in READABLE and dtype not in FORMATS:
        raise UsageError(
            f'Weights in the format of {dtype} keep their values: no others can be stored so. '
            f'Take one of {", ".join(map(repr, FORMATS))} for frozen_dtype, or load the model '
            'without quantization.'
        )
    if dtype in ('bfloat16', 'float16'):
        raise UsageError(
            f'frozen_dtype={dtype!r} is no format of few bits ({", ".join(FORMATS)}). Convert the '
            f'model itself before mmpeft.inject, such as model.to(torch.{dtype}), and its adapters '
            "stay in float32. In a config InternViT does so (model.backbone.frozen_dtype='bfloat16'"
            '), and other models compute in mixed precision with --amp.'
        )
    if dtype not in FORMATS:
        raise UsageError(f'frozen_dtype={dtype!r} is unknown. {suggest(str(dtype), FORMATS)}')
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f'frozen_dtype={dtype!r} needs torchao ({error}). Install it with '
            "pip install 'mmpeft[quantized]', or leave frozen_dtype out."
        ) from error


def dequantized(tensor: Tensor) -> Tensor:
    """The values of a tensor: itself where it is plain."""
    return tensor.values() if isinstance(tensor, Quantized) else tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, which keeps the parts of W for backward, and neither its values nor x.

    Shapes: x (..., I), W (O, I), b (O,).
    """
    if not isinstance(weight, Quantized) or is_transformed():
        return F.linear(x, dequantized(weight), bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, dequantized(weight), bias)

    @staticmethod
    def backward(ctx, dy):
        need_x, _, need_bias = ctx.needs_input_grad
        dx = dy @ dequantized(*ctx.saved_tensors) if need_x else None
        return dx, None, dy.flatten(0, -2).sum(0) if need_bias else None


def stored_parts(tensor: Tensor) -> Parts:
    """The plain tensors that a tensor is stored as, by name; '' for a plain one itself."""
    tensor = adopted(tensor)
    return tensor.parts if isinstance(tensor, Quantized) else {'': tensor}


def stored_in(tensor: Tensor) -> str:
    """The name of the format or dtype that a tensor is stored in, such as ``'nf4'``."""
    tensor = adopted(tensor)
    if isinstance(tensor, Quantized):
        return tensor.format
    return str(tensor.dtype).removeprefix('torch.')


def _copy(target, source, non_blocking=False):
    if isinstance(source, Quantized) and source.format == target.format:
        for name, part in target.parts.items():
            part.copy_(getattr(source, name), non_blocking)
    else:
        values = dequantized(source).to(target.device, target.dtype).expand(target.shape)
        if not torch.equal(values, target.values()):
            _copy(target, quantize(values, target.format))
    return target


def _to(tensor, dtype=None, device=None, non_blocking=False, **kwargs):
    return tensor.with_parts(lambda part: part.to(device, non_blocking=non_blocking), dtype)


def _empty_like(tensor, dtype=None, device=None, **kwargs):
    return tensor.with_parts(lambda part: torch.empty_like(part, device=device), dtype)


def _equal(one, other):
    if not isinstance(other, Quantized) or one.format != other.format:
        return torch.equal(dequantized(one), dequantized(other))
    pairs = zip(one.parts.values(), other.parts.values(), strict=True)
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and all(torch.equal(a, b) for a, b in pairs)


def _detach(tensor):
    return tensor.with_parts(Tensor.detach)


def _view(tensor, shape):
    shape = torch.empty(tensor.shape, device='meta').view(shape).shape
    if len(shape) < 2 or shape[0] != tensor.shape[0]:
        return tensor.values().view(shape)
    return Quantized(tensor.parts, tensor.format, shape, tensor.dtype)


KEEPING = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.view.default: _view,
    aten.clone.default: lambda tensor, **kwargs: tensor.with_parts(Tensor.clone),
    aten._to_copy.default: _to,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
    aten.equal.default: _equal,
}
"""Operations that keep the format."""


def _rebuild(parts, format, shape, dtype, is_parameter):
    tensor = Quantized(parts, format, torch.Size(shape), dtype)
    return torch.nn.Parameter(tensor, False) if is_parameter else tensor


torch.serialization.add_safe_globals([_rebuild, Quantized])
