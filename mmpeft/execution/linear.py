"""Products with an adapted matrix whose dense gradient is never formed.

For W' = W + s U V with U (O, r) and V (r, I), autograd's own way forms W' in
forward, keeps it, and forms dy^T x (O, I) in backward only to multiply it
with V and U. Here nothing of W' is kept, and the gradients of U and V come
from products with x V^T and dy U, r wide. Forward is one product with W', or
the update goes beside it, ``branch``, where there are few tokens.
"""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .matmul import as_output, changes_of, is_low, linear, together
from .precision import without_autocast
from .recompute import to_keep


def thin_pays(shape: tuple[int, int], rank: int) -> bool:
    """Whether products as wide as the rank are cheaper than the dense gradient, a token.

    Thin: x V^T, dy U and their products with dy and x, 2 r (O + I). Dense: O I.
    """
    out, features = shape
    return 2 * rank * (out + features) < out * features


def branch_pays(tokens: int, out: int, features: int, taps: int = 1) -> bool:
    """Whether the update beside the layer is cheaper than in its weight.

    The branch adds to a map of O channels in forward and of I in backward;
    the weight is built in both. Both are bound by the elements that they read
    and write.
    """
    return tokens * (out + features) < 2 * out * features * taps


class LowRank(Function):
    """y = x (W + s U V)^T + b.

    In low precision the update is added inside the product, where sums are
    float32: W' itself would round a small update away.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias, up, down, scale, layout, branch):
        ctx.scale, ctx.layout, ctx.branch = scale, layout, branch or is_low(x)
        ctx.with_bias = bias is not None
        narrow = None
        if ctx.branch:
            narrow = layout.times(x, down)
            y = together(layout, x, weight, narrow, up * scale, bias)
        else:
            y = layout.times(x, _merged(weight, up, down, scale), bias)
        ctx.input, kept = to_keep(x)
        ctx.save_for_backward(weight, up, down, narrow, *kept)
        return as_output(y)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        weight, up, down, narrow, *kept = ctx.saved_tensors
        x, scale, layout = ctx.input(*kept), ctx.scale, ctx.layout
        need_x, _, need_bias, need_up, need_down = ctx.needs_input_grad[:5]
        dy = dy.contiguous()
        dx = d_up = d_down = d_bias = inner = None
        thin = thin_pays(weight.shape, up.shape[1])
        if thin or (need_x and ctx.branch):
            inner = layout.times(dy, (up * scale).T)
        if thin:
            if need_up:
                narrow = layout.times(x, down) if narrow is None else narrow
                d_up = layout.outer(dy, narrow).mul_(scale)
            if need_down:
                d_down = layout.outer(inner, x)
        else:
            dense = layout.outer(dy, x)
            d_up = torch.mm(dense, down.T).mul_(scale)
            d_down = torch.mm(up.T, dense).mul_(scale)
        if need_x and ctx.branch:
            dx = together(layout, dy, weight.T, inner, down.T)
        elif need_x:
            dx = layout.times(dy, _merged(weight, up, down, scale).T)
        if need_bias and ctx.with_bias:
            d_bias = layout.total(dy)
        return dx, None, d_bias, d_up, d_down, None, None, None


def _merged(weight, up, down, scale):
    """W + s U V."""
    return linear(up * scale, down.T).add_(weight)


class Multiplied(Function):
    """y = x (W * (1 + s U V))^T + b, or with exp(s U V); nothing of W' is kept.

    In low precision the first-order product W * s U V is multiplied apart,
    since 1 + s U V would round a small update away.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias, up, down, scale, exact, layout):
        ctx.scale, ctx.exact, ctx.layout = scale, exact, layout
        ctx.with_bias = bias is not None
        ctx.input, kept = to_keep(x)
        ctx.save_for_backward(weight, up, down, *kept)
        if not is_low(x):
            return as_output(layout.times(x, _multiplied(weight, up, down, scale, exact), bias))
        change = _change(up, down, scale, exact).mul_(weight).to(x.dtype)
        return as_output(layout.accumulate(layout.times(x, change, bias), x, weight))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        weight, up, down, *kept = ctx.saved_tensors
        x, scale, exact, layout = ctx.input(*kept), ctx.scale, ctx.exact, ctx.layout
        need_x, _, need_bias, need_up, need_down = ctx.needs_input_grad[:5]
        dx = d_up = d_down = d_bias = merged = None
        dy = dy.contiguous()
        if need_x or exact:
            merged = _multiplied(weight, up, down, scale, exact)
        if need_x:
            dx = layout.times(dy, merged.to(dy.dtype).T)
        if need_up or need_down:
            dense = layout.outer(dy, x).to(up.dtype).mul_(merged if exact else weight)
            d_up = linear(dense, down).mul_(scale)
            d_down = linear(up.T, dense.T).mul_(scale)
        if need_bias and ctx.with_bias:
            d_bias = layout.total(dy)
        return dx, None, d_bias, d_up, d_down, None, None, None


def _multiplied(weight, up, down, scale, exact):
    """W * (1 + s U V) or W * exp(s U V)."""
    if exact:
        # On a CPU torch's powers of 2 take a quarter of the time of its powers of e.
        return linear(up * (scale / math.log(2)), down.T).exp2_().mul_(weight)
    delta = linear(up, down.T)
    return torch.addcmul(weight, weight, delta, value=scale, out=delta)


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
    def forward(ctx, x, weight, bias, up, down, magnitude, scale, detach, layout):
        direction = _merged(weight, up, down, scale)
        norm = torch.linalg.vector_norm(direction, dim=1)
        ratio = torch.where(norm > 0, magnitude / norm.clamp_min(1e-30), 1)
        merged = direction.mul_(ratio[:, None])
        if is_low(x):
            y = layout.times(x, merged.sub_(weight).to(x.dtype), bias)
            y = layout.accumulate(y, x, weight)
        else:
            y = layout.times(x, merged, bias)
        ctx.scale, ctx.detach, ctx.layout = scale, detach, layout
        ctx.input, kept = to_keep(x)
        ctx.save_for_backward(weight, bias, up, down, norm, ratio, y, *kept)
        # What follows may change the output in place. The map kept is an alias, which autograd
        # does not refuse then; it is computed again.
        output = as_output(y)
        ctx.changes = changes_of(output)
        return output

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        weight, bias, up, down, norm, ratio, y, *kept = ctx.saved_tensors
        x, scale, layout = ctx.input(*kept), ctx.scale, ctx.layout
        need_x, _, need_bias, need_up, need_down, need_magnitude = ctx.needs_input_grad[:6]
        dy = dy.contiguous()
        direction = _merged(weight, up, down, scale)
        narrow = layout.times(x, down.to(x.dtype))
        d_up = layout.outer(dy, narrow).to(up.dtype).mul_(ratio[:, None])
        scaled_up = (up * ratio[:, None]).to(dy.dtype)
        d_down = layout.outer(layout.times(dy, scaled_up.T), x).to(up.dtype)
        d_bias = layout.total(dy) if bias is not None else None
        if ctx.changes():
            y = layout.times(x, (direction * ratio[:, None]).to(x.dtype), bias)
        d_ratio = layout.total(dy * y)
        if bias is not None:
            d_ratio -= bias * d_bias
        d_ratio = d_ratio.to(up.dtype) / ratio
        if not ratio.all():
            lost = (layout.outer(dy, x).to(up.dtype) * direction).sum(1)
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
            dx = layout.times(dy, direction.mul_(ratio[:, None]).to(dy.dtype).T)
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


class Frozen(Function):
    """y = x W^T + b with nothing in it that trains."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return as_output(linear(x, weight, bias))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dy):
        return linear(dy, ctx.saved_tensors[0].T), None, None
