"""Products with an adapted matrix whose dense gradient is never formed.

For W' = W + s U V with U (O, r) and V (r, I), autograd's own way forms W' in
forward, keeps it, and forms dy^T x (O, I) in backward only to multiply it
with V and U. Here forward is one product with W', nothing of W' is kept, and
the gradients of U and V come from products with x V^T and dy U, r wide.

Tensors hold tokens in rows, (..., I), or in columns, (N, I, T) as in a
contiguous feature map; ``columns`` says which.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .precision import without_autocast


def times(x: Tensor, weight: Tensor, bias: Tensor | None, columns: bool) -> Tensor:
    """x W^T + b for rows, W x + b for columns; ``weight`` is (O, I)."""
    if not columns:
        return torch.nn.functional.linear(x, weight, bias)
    y = torch.matmul(weight, x)
    return y if bias is None else y.add_(bias[:, None])


def outer(left: Tensor, right: Tensor, columns: bool) -> Tensor:
    """The sum over tokens of left right^T; (O, I) for tensors of O and I channels."""
    if not columns:
        return left.flatten(0, -2).T @ right.flatten(0, -2)
    if len(left) == 1:
        return left[0] @ right[0].T
    return torch.einsum('nat,nbt->ab', left, right)


def channel_sum(dy: Tensor, columns: bool) -> Tensor:
    """The gradient of a bias."""
    return dy.sum((0, 2)) if columns else dy.flatten(0, -2).sum(0)


def tokens(x: Tensor, columns: bool) -> int:
    """How many tokens a tensor holds."""
    return len(x) * x.shape[2] if columns else x.numel() // x.shape[-1]


def thin_pays(shape: tuple[int, int], rank: int) -> bool:
    """Whether products as wide as the rank are cheaper than the dense gradient, a token.

    Thin: x V^T, dy U and their products with dy and x, 2 r (O + I). Dense: O I.
    """
    out, features = shape
    return 2 * rank * (out + features) < out * features


class LowRank(Function):
    """y = x (W + s U V)^T + b.

    In low precision the update is added inside the product, where sums are
    float32: W' itself would round a small update away.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias, up, down, scale, columns):
        ctx.scale, ctx.columns, ctx.with_bias = scale, columns, bias is not None
        ctx.save_for_backward(x, weight, up, down)
        if x.dtype.itemsize >= 4:
            merged = torch.addmm(weight, up, down, alpha=scale)
            return times(x, merged, bias, columns)
        branch = times(times(x, down, None, columns), up * scale, bias, columns)
        return _accumulated(branch, x, weight, columns)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, weight, up, down = ctx.saved_tensors
        scale, columns = ctx.scale, ctx.columns
        need_x, _, need_bias, need_up, need_down = ctx.needs_input_grad[:5]
        if not columns:
            dy = dy.contiguous()
        dx = d_up = d_down = d_bias = inner = None
        if thin_pays(weight.shape, up.shape[1]):
            inner = times(dy, (up * scale).T, None, columns)
            if need_up:
                d_up = outer(dy, times(x, down, None, columns), columns).mul_(scale)
            if need_down:
                d_down = outer(inner, x, columns)
        else:
            dense = outer(dy, x, columns)
            d_up = torch.mm(dense, down.T).mul_(scale)
            d_down = torch.mm(up.T, dense).mul_(scale)
        if need_x:
            low = x.dtype.itemsize < 4
            if low or (inner is not None and tokens(x, columns) < weight.shape[0]):
                if inner is None:
                    inner = times(dy, (up * scale).T, None, columns)
                branch = times(inner, down.T, None, columns)
                dx = _accumulated(branch, dy, weight.T, columns)
            else:
                dx = times(dy, torch.addmm(weight, up, down, alpha=scale).T, None, columns)
        if need_bias and ctx.with_bias:
            d_bias = channel_sum(dy, columns)
        return dx, None, d_bias, d_up, d_down, None, None


def _accumulated(y, x, weight, columns):
    """y + x W^T, in one product that rounds once; ``y`` is used up."""
    if columns:
        return torch.baddbmm(y, weight.expand(len(x), -1, -1), x)
    shape = y.shape
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), weight.T).view(shape)


class Multiplied(Function):
    """y = x (W * (1 + s U V))^T + b, or with exp(s U V); nothing of W' is kept.

    In low precision the first-order product W * s U V is multiplied apart,
    since 1 + s U V would round a small update away.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias, up, down, scale, exact, columns):
        ctx.scale, ctx.exact, ctx.columns = scale, exact, columns
        ctx.with_bias = bias is not None
        ctx.save_for_backward(x, weight, up, down)
        if x.dtype.itemsize >= 4:
            return times(x, _multiplied(weight, up, down, scale, exact), bias, columns)
        change = _change(up, down, scale, exact).mul_(weight).to(x.dtype)
        return _accumulated(times(x, change, bias, columns), x, weight, columns)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, weight, up, down = ctx.saved_tensors
        scale, exact, columns = ctx.scale, ctx.exact, ctx.columns
        need_x, _, need_bias, need_up, need_down = ctx.needs_input_grad[:5]
        dx = d_up = d_down = d_bias = None
        if not columns:
            dy = dy.contiguous()
        merged = None
        if need_x or exact:
            merged = _multiplied(weight, up, down, scale, exact)
        if need_x:
            dx = times(dy, merged.to(dy.dtype).T, None, columns)
        if need_up or need_down:
            dense = outer(dy, x, columns).to(up.dtype).mul_(merged if exact else weight)
            d_up = torch.mm(dense, down.T).mul_(scale)
            d_down = torch.mm(up.T, dense).mul_(scale)
        if need_bias and ctx.with_bias:
            d_bias = channel_sum(dy, columns)
        return dx, None, d_bias, d_up, d_down, None, None, None


def _multiplied(weight, up, down, scale, exact):
    delta = torch.mm(up, down)
    if exact:
        return delta.mul_(scale).exp_().mul_(weight)
    return torch.addcmul(weight, weight, delta, value=scale)


def _change(up, down, scale, exact):
    delta = torch.mm(up, down).mul_(scale)
    return delta.expm1_() if exact else delta


class Decomposed(Function):
    """y = x (m / ||V|| * V)^T + b by rows of V = W + s U D (DoRA).

    The norm's gradient is exact, or left out with ``detach``. In low precision
    the change of W is multiplied apart, as in :class:`Multiplied`.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias, up, down, magnitude, scale, detach, columns):
        direction = torch.addmm(weight.to(up.dtype), up, down, alpha=scale)
        norm = torch.linalg.vector_norm(direction, dim=1)
        ratio = torch.where(norm > 0, magnitude / norm.clamp_min(1e-30), 1)
        merged = direction.mul_(ratio[:, None])
        if x.dtype.itemsize >= 4:
            y = times(x, merged, bias, columns)
        else:
            y = times(x, merged.sub_(weight).to(x.dtype), bias, columns)
            y = _accumulated(y, x, weight, columns)
        ctx.scale, ctx.detach, ctx.columns = scale, detach, columns
        ctx.save_for_backward(x, weight, bias, up, down, norm, ratio, y)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        x, weight, bias, up, down, norm, ratio, y = ctx.saved_tensors
        scale, columns = ctx.scale, ctx.columns
        need_x, _, need_bias, need_up, need_down, need_magnitude = ctx.needs_input_grad[:6]
        if not columns:
            dy = dy.contiguous()
        direction = torch.addmm(weight.to(up.dtype), up, down, alpha=scale)
        narrow = times(x, down.to(x.dtype), None, columns)
        d_up = outer(dy, narrow, columns).to(up.dtype).mul_(ratio[:, None])
        scaled_up = (up * ratio[:, None]).to(dy.dtype)
        d_down = outer(times(dy, scaled_up.T, None, columns), x, columns).to(up.dtype)
        d_bias = channel_sum(dy, columns) if bias is not None else None
        d_ratio = channel_sum(dy * y, columns)
        if bias is not None:
            d_ratio -= bias * d_bias
        d_ratio = d_ratio.to(up.dtype) / ratio
        if not ratio.all():
            lost = (outer(dy, x, columns).to(up.dtype) * direction).sum(1)
            d_ratio = torch.where(ratio == 0, lost, d_ratio)
        d_magnitude = torch.where(norm > 0, d_ratio / norm.clamp_min(1e-30), 0)
        if not ctx.detach:
            # d||V|| / dV = V / ||V||
            pull = -d_magnitude * ratio / norm.clamp_min(1e-30)
            pulled = direction * pull[:, None]
            d_up = d_up + pulled @ down.T
            d_down = d_down + up.T @ pulled
        dx = None
        if need_x:
            dx = times(dy, direction.mul_(ratio[:, None]).to(dy.dtype).T, None, columns)
        return (
            dx,
            None,
            d_bias if need_bias else None,
            d_up * scale,
            d_down * scale,
            d_magnitude,
            None,
            None,
            None,
        )
