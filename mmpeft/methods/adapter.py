"""What is trained for one frozen weight, or at one place of a network."""

import warnings
from itertools import count

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.quantization import dequantized

from .base import Factors, Method
from .precision import in_double, outside_autocast
from .spec import WeightSpec

# Attribute that FSDP and fully_shard give to every module whose parameters they shard.
SHARDED = '_is_fsdp_managed_module'
PATIENCE = 100
"""Backward passes after which a method with an allocator says that it has none."""


class Adapter(nn.Module):
    """The trained and fixed tensors of a method at one site.

    They are float32 where the weight has less precision.

    Args:
        method: Defines what they mean.
        spec: The role of the weight, or the place in the network.
        weight: The frozen weight, with its pretrained values.
        empty: Leave the stored values open (NaN), to be loaded, and spare
            what it takes to compute them.
    """

    injection: int = 0  # the index in ``model.peft`` of the injection that it belongs to
    allocated: bool = False  # an allocator has it, see mmpeft.allocate
    penalized: bool = False  # a backward pass went through its term of the loss
    in_few_bits: bool = False  # its frozen weight is stored so

    def __init__(self, method: Method, spec: WeightSpec, weight: Tensor, empty: bool = False):
        super().__init__()
        self.method, self.spec, self.shapes = method, spec, {}
        like = dequantized(weight.detach())
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        with torch.no_grad():
            factors = method.init(like.to('meta') if empty else like, spec)
            self._check(factors)
            self.shapes = {name: tuple(value.shape) for name, value in factors.items()}
            for name, value in factors.items():
                kind = nn.Buffer if isinstance(value, nn.Buffer) else nn.Parameter
                if value.untyped_storage()._cdata == like.untyped_storage()._cdata:
                    value = value.clone()  # training would change the weight
                setattr(self, name, kind(_unset(value, like.device) if empty else value))
            for name, value in method.rebuilt(spec).items():
                value = value.to(like) if value.is_floating_point() else value.to(like.device)
                setattr(self, name, nn.Buffer(value, persistent=False))
        self._expect_allocation()

    def _check(self, factors):
        """What :meth:`Method.init` returned; TypeError names what it should be."""
        name = f'{type(self.method).__name__}.init'
        if not isinstance(factors, dict):
            raise TypeError(f'{name} returned a {type(factors).__name__}, not tensors by name.')
        for key, value in factors.items():
            if hasattr(self, key):
                raise TypeError(f'{name}: adapters have an attribute {key!r}. Choose another name.')
            trains = value.is_floating_point() or value.is_complex()
            if not trains and not isinstance(value, nn.Buffer):
                raise TypeError(f'{name}: {key!r} is {value.dtype}. Fixed tensors are nn.Buffer.')

    def __setstate__(self, state):
        super().__setstate__(state)
        self._expect_allocation()

    def _apply(self, fn, recurse=True):
        open_values = [name for name, buffer in self._buffers.items() if buffer.is_meta]
        super()._apply(fn, recurse)
        for name, value in self.method.rebuilt(self.spec).items() if open_values else ():
            if name in open_values and not self._buffers[name].is_meta:  # after to_empty
                self._buffers[name].copy_(value)
        return self

    def _replicate_for_data_parallel(self):
        raise UsageError(
            'nn.DataParallel copies a model in each pass, and adapters do not follow. Take '
            'DistributedDataParallel: start the script with torchrun, or show it one GPU '
            '(CUDA_VISIBLE_DEVICES=0).'
        )

    @property
    def factors(self) -> Factors:
        """All tensors by name."""
        return {**self._parameters, **self._buffers}

    @property
    def dtype(self) -> torch.dtype:
        """Of what is trained."""
        return next(self.parameters(recurse=False)).dtype

    @property
    def device(self) -> torch.device:
        """Of what is trained."""
        return next(self.parameters(recurse=False)).device

    def check_sharding(self) -> None:
        """Warn where FSDP's mixed precision has cast the factors for a forward pass.

        Raises:
            UsageError: FSDP has made a weight in few bits plain.
        """
        if self.in_few_bits and SHARDED in self.__dict__:
            raise UsageError(
                'FSDP shards the values of weights in few bits, in their whole size. Use '
                'DistributedDataParallel, or leave frozen_dtype out.'
            )
        if SHARDED in self.__dict__ and self.dtype.itemsize < 4:
            warnings.warn(
                f'The factors of adapters are computed in {self.dtype}, to which FSDP casts all '
                'that it shards together, so small updates are rounded away. With fully_shard '
                'call mmpeft.training.sharding.shard_adapters(block) before fully_shard(block), '
                'which keeps them as they are; FullyShardedDataParallel has no such choice but to '
                'leave out param_dtype.',
                stacklevel=2,
            )

    def penalty(self) -> Tensor | None:
        """The method's term of the training loss, a scalar."""
        return self.method.penalty(self.factors, self.spec)

    def extra_repr(self):
        return str(self.method)

    def _expect_allocation(self):
        parameter = next(self.parameters(recurse=False), None)
        if parameter is None or not self.method.allocates or not parameter.requires_grad:
            return
        passes = count(1)

        def hook(gradient):
            if not self.allocated and next(passes) < PATIENCE:
                return
            handle.remove()
            if not self.allocated:
                warnings.warn(
                    f'{type(self.method).__name__} decides during training which parameters it '
                    'keeps, but no allocator is running: after the optimizer is built, write '
                    'monitor = mmpeft.monitor(model, optimizer, steps=...) or mmpeft.allocate.',
                    stacklevel=2,
                )

        handle = parameter.register_hook(hook)


class WeightAdapter(Adapter):
    """The map W -> phi(W), which ``torch.nn.utils.parametrize`` calls.

    It is computed in the factors' dtype, outside autocast, and rounded once
    to the weight's.
    """

    def __init__(self, method: Method, spec: WeightSpec, weight: Tensor, empty: bool = False):
        super().__init__(method, spec, maybe_transposed(weight, spec), empty)

    def forward(self, weight: Tensor) -> Tensor:
        """phi(W), of the shape and dtype of ``weight``."""
        self.check_sharding()
        with outside_autocast(weight.device.type):
            return self.map(weight, self.factors, self.dtype, self.training)

    def in_double(self, weight: Tensor) -> Tensor:
        """phi(W) as in evaluation, computed in float64 (complex128) and returned in it."""
        weight, factors = in_double(weight), {k: in_double(v) for k, v in self.factors.items()}
        return self.map(weight, factors, weight.dtype)

    def map(
        self, weight: Tensor, factors: Factors, dtype: torch.dtype, training: bool = False
    ) -> Tensor:
        """phi(W) for given factors, computed in ``dtype``."""
        weight = dequantized(weight)
        seen = maybe_transposed(weight, self.spec).to(dtype)
        adapted = self.method.apply(seen, factors, self.spec, training)
        if self.spec.padding_idx is not None:
            row = torch.arange(weight.shape[0], device=weight.device) == self.spec.padding_idx
            adapted = torch.where(row[:, None], weight.to(dtype), adapted)
        adapted = maybe_transposed(adapted.to(weight.dtype), self.spec)
        return adapted.contiguous() if self.spec.fan_in_fan_out else adapted


def maybe_transposed(weight, spec):
    """A weight as methods see it from what is stored, and the reverse."""
    return weight.mT if spec.fan_in_fan_out else weight


def _unset(value, device):
    fill = float('nan') if value.is_floating_point() else 0
    return torch.full(value.shape, fill, dtype=value.dtype, device=device)
