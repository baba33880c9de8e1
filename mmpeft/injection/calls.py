"""Whether the forward of an adapted module runs: a trace tells before, a watch in the first pass.

Some networks read the weight of a layer and never call the layer: torchvision's Swin does so with
``qkv`` and ``proj``, timm's EVA-02 with ``qkv``. A hook on such a layer never runs.
"""

import copy
import inspect
from collections import Counter
from contextlib import suppress

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from mmpeft.errors import TrainingError
from mmpeft.methods import Adapter

from .site import attached
from .weights import PARAMETRIZATIONS


class _Tracer(fx.Tracer):
    """Traces the forward of one module, and of none below it."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, module, path):
        return True


def uncalled(module: nn.Module) -> set[str]:
    """Modules below a module whose weight its own forward reads, and which it never calls.

    Returns:
        Their paths below the module. Empty where the forward cannot be traced.
    """
    tracer = _Tracer()
    tracer.graph = fx.Graph()
    arguments = inspect.signature(module.forward).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
    # A forward may draw random numbers, or set attributes: those of a shallow copy.
    with suppress(Exception), torch.random.fork_rng(()):
        tracer.trace(copy.copy(module), defaults)
    called, read = set(), set()
    for node in tracer.graph.nodes:
        path, _, rest = str(node.target).partition(f'.{PARAMETRIZATIONS}')
        if node.op == 'call_module' and not rest:
            called.add(path)
        # ``layer.weight.dtype`` takes an attribute alone.
        elif node.op in ('call_module', 'get_attr') and any(
            u.target is not getattr for u in node.users
        ):
            read.add(path if rest else path.rpartition('.')[0])
    return read - called - {''}


def construction(module: nn.Module) -> tuple:
    """Equal for modules whose forwards do the same, as far as classes and plain settings tell."""
    settings = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
    own = {name: type(value) for name, value in (module._parameters | module._modules).items()}
    return type(module), *settings.items(), *own.items()


class _UsedParameters(TorchFunctionMode):
    """Notes the parameters that functions which return tensors get while it is active."""

    def __init__(self):
        super().__init__()
        self.ids = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor | tuple):
            given = (*args, *(kwargs or {}).values())
            self.ids.update(id(value) for value in given if isinstance(value, nn.Parameter))
        return result


class _Watch:
    """Hooks of a model that check its first forward pass with gradients, and then go."""

    def __init__(self, model):
        self.used = None
        self.handles = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, model, args):
        skipped = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.used is None and torch.is_grad_enabled() and not skipped:
            self.used = _UsedParameters()
            self.used.__enter__()

    def after(self, model, args, output):
        if self.used is None:
            return
        used, self.used = self.used, None
        used.__exit__(None, None, None)
        if output is not None:  # None after an exception
            self.remove()
            check_ran(model, used.ids)

    def remove(self):
        while self.handles:
            self.handles.pop().remove()


def watch(model: nn.Module) -> None:
    """Let the first forward pass with gradients raise if an activation adapter is dead.

    Dead is an adapter that takes no part in the pass although a weight of its module does. A
    module that is not used at all in the pass, such as a head of another task or an expert that
    gets no token, is left alone: only the pass that uses it could tell. Passes under
    ``torch.compile``, ``torch.export`` and ``torch.jit.trace`` are not checked.

    Raises:
        TrainingError: Later, by ``model(...)``; names the module.
    """
    if not _watches(model) and any(not site.tensor for site in attached(model)):
        _Watch(model)


def unwatch(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    for hook in _watches(model):
        hook.remove()


def check_ran(model: nn.Module, used: set[int]) -> None:
    """Check that no activation adapter of a model is dead.

    Args:
        model: With adapters.
        used: Identities of the parameters that took part in a forward pass.

    Raises:
        TrainingError: One is.
    """
    # A tied weight may have been used elsewhere.
    held = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    used = {p for p in used if held[p] == 1}
    for site in attached(model):
        if site.tensor or site.adapter.ran:
            continue
        module = site.layer.get_submodule(site.spec.ends[-1] if site.spec.ends else '')
        adapters = {p for m in module.modules() if isinstance(m, Adapter) for p in m.parameters()}
        if used.intersection(id(p) for p in module.parameters() if p not in adapters):
            raise TrainingError(
                f'{type(site.method).__name__} at {site.path!r} took no part in the first forward '
                'pass, although a weight of this module did: the network reads the weight '
                'and never calls the module, so that the adapter would not train. Leave it out '
                f'with targets=dict(exclude={site.path!r}), or take a method on weights, such as '
                'LoRA.'
            )


def _watches(model):
    hooks = model._forward_hooks.values()
    return [h.__self__ for h in hooks if isinstance(getattr(h, '__self__', None), _Watch)]
