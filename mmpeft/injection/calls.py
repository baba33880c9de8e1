"""Whether the forward of an adapted module runs: a trace tells before, a watch in the first pass.

Some networks read the weight of a layer and never call the layer: torchvision's Swin does so with
``qkv`` and ``proj``, timm's EVA-02 with ``qkv``. A hook on such a layer never runs.
"""

import copy
import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from mmpeft.errors import TrainingError
from mmpeft.methods.spec import ConvGeometry

from .site import Site, attached, own_parameters
from .weights import PARAMETRIZATIONS, is_below, join, layers, weights_of


def uncalled(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of children whose weight their module reads, and never calls them.

    Modules whose forward cannot be traced have none.
    """
    traced, found = {}, set()
    for path, module in modules.items():
        # Modules of one class with equal settings (but for sizes) are traced once.
        settings = [(k, v) for k, v in vars(module).items() if isinstance(v, bool | str)]
        held = [(k, type(v)) for k, v in (module._parameters | module._modules).items()]
        key = type(module), *settings, *held
        if key not in traced:
            traced[key] = _uncalled(module)
        found |= {join(path, child) for child in traced[key]}
    return found


class _Tracer(fx.Tracer):
    """Traces the forward of one module, and of none below it."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, module, path):
        return True


def _uncalled(module):
    tracer = _Tracer()
    tracer.graph = fx.Graph()
    arguments = inspect.signature(module.forward).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
    # A forward may draw random numbers, or set attributes: those of a shallow copy.
    with suppress(Exception), torch.random.fork_rng(()):
        tracer.trace(copy.copy(module), defaults)
    called, read = set(), set()
    for node in tracer.graph.nodes:
        path, _, parametrized = str(node.target).partition(f'.{PARAMETRIZATIONS}')
        if node.op == 'call_module' and not parametrized:
            called.add(path)
        elif any(user.target is not getattr for user in node.users):  # more than weight.dtype
            read.add(path if parametrized else path.rpartition('.')[0])
    return read - called - {''}


class _Watch(TorchFunctionMode):
    """Checks the first forward pass of a model with gradients, and is gone then."""

    def __init__(self, model):
        super().__init__()
        self.used = None  # identities of the parameters that functions got in the pass
        self.uncompiled = nullcontext()
        self.handles = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, model, args):
        skipped = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.used is None and torch.is_grad_enabled() and not skipped:
            self.used = set()
            if 'torch._dynamo' in sys.modules:  # compiled blocks would be compiled for this mode
                self.uncompiled = torch.compiler.set_stance('force_eager')
            self.uncompiled.__enter__()
            self.__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor | tuple):
            given = (*args, *(kwargs or {}).values())
            self.used.update(id(value) for value in given if isinstance(value, nn.Parameter))
        return result

    def after(self, model, args, output):
        if self.used is not None:
            self.__exit__(None, None, None)
            self.uncompiled.__exit__(None, None, None)
            used, self.used = self.used, None
            if output is not None:  # None after an exception
                unwatch(model)
                _check_adapters(model, used)


def watch(model: nn.Module) -> None:
    """Let the first forward pass with gradients raise if an activation adapter is dead.

    Dead is an adapter that took no part in any pass although a weight of its module did in this
    one. A module that is not used in the pass, such as a head of another task or an expert that
    gets no token, is left alone. Passes under ``torch.compile``, ``torch.export`` and
    ``torch.jit.trace`` are not checked.

    Raises:
        TrainingError: Later, by ``model(...)``; names the module.
    """
    unwatch(model)
    acting = [site for site in attached(model) if not site.tensor]
    if acting:
        _Watch(model)
    follow_patches(model, acting)


def follow_patches(model: nn.Module, sites: Iterable[Site]) -> None:
    """Let adapters that need the grid of an image's patches learn it.

    They follow the last 2-d convolution with a stride before them that is in none of their blocks:
    some attention reduces its keys and values by one.
    """
    sites = {site.path: site.adapter for site in sites if site.method.needs_grid}
    blocks = [p if 'block' in a.spec.kinds else p.rpartition('.')[0] or p for p, a in sites.items()]
    patches = None
    for path, module in layers(model) if sites else ():
        inside = is_below(path, blocks)
        if path in sites and patches is not None:
            sites[path].follow(patches)
        spec = dict(weights_of(module)).get('weight')
        if spec and not inside and 'conv' in spec.kinds and len(spec.kernel_size) == 2:
            if max(ConvGeometry.of(module, spec).stride) > 1 and not spec.transposed:
                patches = module


def unwatch(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    for hook in list(model._forward_hooks.values()):
        owner = getattr(hook, '__self__', None)
        for handle in owner.handles if isinstance(owner, _Watch) else ():
            handle.remove()


def _check_adapters(model, used):
    # A tied weight may have been used elsewhere.
    held = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    used = {p for p in used if held[p] == 1}
    for site in attached(model):
        if site.tensor or site.adapter.ran:
            continue
        module = site.layer.get_submodule(site.spec.ends[-1] if site.spec.ends else '')
        if used.intersection(map(id, own_parameters(module))):
            raise TrainingError(
                f'{type(site.method).__name__} at {site.path!r} never ran in the first forward '
                "pass: the network reads this module's weight without calling it, so the adapter "
                'would not train. Leave it out '
                f'with targets=dict(exclude={site.path!r}), or take a method on weights, such as '
                'LoRA.'
            )
