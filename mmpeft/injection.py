"""Put adapters on a model, take them off, fold them in."""

import json
import re
import sys
import warnings
from dataclasses import asdict, dataclass

import torch
from rich.progress import track
from torch import nn

from .attachment import adapter_parameters, attach, attachments, detach, make_adapter, share
from .errors import UsageError, near
from .execution import AUTO, CHOICES, PLAIN, disable, enable_frozen
from .freezing import freeze_statistics, unfreeze_statistics
from .methods import Method
from .ranks import settle_ranks
from .registry import METHODS
from .summary import Summary, summary
from .targets import Targets, select, target_module
from .weights import original_of


@dataclass(frozen=True)
class Injection:
    """What was done to a model by one :func:`inject`; kept in ``model.peft``.

    Attributes:
        method: With its budget spent.
        targets: As given.
        unfreeze: As given.
        trained_before: Parameters that :func:`inject` froze, to be thawed
            when the adapters go.
    """

    method: Method
    targets: Targets
    unfreeze: tuple[str, ...]
    trained_before: tuple[str, ...]

    def config(self) -> dict:
        """Plain data from which an equal injection can be made."""
        plain = dict(
            method=self.method.config(), targets=asdict(self.targets), unfreeze=self.unfreeze
        )
        return json.loads(json.dumps(plain))


def inject(
    model: nn.Module, method, targets=None, unfreeze=(), empty=False, execution=AUTO
) -> Summary:
    """Freeze a model's target module and adapt it, in place.

    The weights keep their names in the model's state dict but for torch's
    ``parametrizations``: ``fc.weight`` becomes
    ``fc.parametrizations.weight.original``, and the adapter's parameters
    stand beside it as ``fc.parametrizations.weight.0.<name>``. Weights that
    are tied in the model share one adapter. Methods that act on activations
    leave all keys as they are and add ``<module>.peft_adapters.0.<name>``.

    Args:
        model: Any module; pretrained weights must be in it already.
        method: A method or its config, such as ``dict(type='FLoRA', rank=32)``.
        targets: A :class:`~mmpeft.targets.Targets` or a dict of its fields.
        unfreeze: Patterns (regular expressions) of parameter names below the
            target module that train themselves, such as norms that are new.
        empty: Leave what the adapters hold open (NaN), to be loaded. Spares
            the decompositions that some methods start from.
        execution: ``'auto'`` takes for each layer the fastest way that
            computes the same; ``'merged'`` and ``'branch'`` put thin updates
            into the weight, or beside the layer; ``'plain'`` builds weights
            as torch's parametrize does and leaves frozen layers alone.

    Returns:
        The summary of the adapted model.

    Raises:
        UsageError: The targets select nothing, a pattern matches nothing, a
            rank or budget does not fit, or an argument is unknown. The model
            is as it was.
    """
    method = METHODS.build(method)
    targets = Targets.of(targets)
    if execution not in CHOICES:
        raise UsageError(f'execution={execution!r} is none of {", ".join(map(repr, CHOICES))}.')
    unfreeze = (unfreeze,) if isinstance(unfreeze, str) else tuple(unfreeze)
    root = target_module(model, targets.module)
    sites = select(model, method, targets)
    method = settle_ranks(method, sites, targets.max_share)
    thawed = _matching(root, unfreeze)
    adapters = _make_adapters(sites, empty)
    trained_before = []
    if not method.trains_base:
        trained_before = _freeze(model, root, keep=thawed)
        freeze_statistics(root)
    for parameter in thawed.values():
        parameter.requires_grad_(True)
    for site in sites:
        attach(site.module, site.tensor, adapters[site.identity], execution)
    if execution != PLAIN and not method.trains_base:
        enable_frozen(root)

    model.peft = [
        *getattr(model, 'peft', []),
        Injection(method, targets, unfreeze, tuple(trained_before)),
    ]
    result = summary(model)
    _warn_outgrown(result)
    return result


def remove(model: nn.Module) -> nn.Module:
    """Take all adapters off, in place: the base as it was before.

    Args:
        model: With adapters or without.

    Returns:
        The same model.
    """
    for attachment in _separable(model):
        detach(attachment)
    return _restore(model)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Fold all adapters into the weights, in place: plain modules, plain keys.

    phi(W) is computed in float64 and rounded once to the weight's dtype.

    Args:
        model: With adapters or without.

    Returns:
        The same model, which computes what it did in evaluation mode.

    Raises:
        UsageError: A method cannot be merged; the model is as it was. Or a
            merged weight has NaN or infinity; weights before it are merged,
            those from it on still adapted.
    """
    adapted = _separable(model)
    _check_merges(adapted)
    was_training = model.training
    model.eval()
    merged = set()
    for attachment in adapted:
        original = original_of(attachment.layer, attachment.tensor)
        value = original
        if id(original) not in merged:
            value = original.double()
            for adapter in attachment.adapters:
                value = adapter.in_double(value)
            if not value.isfinite().all():
                raise UsageError(
                    f'The merged {attachment.name} has NaN or infinite elements. The adapter was '
                    'trained to destruction: use an earlier checkpoint.'
                )
            merged.add(id(original))
        detach(attachment)
        original.copy_(value)
    model.train(was_training)
    return _restore(model)


def _make_adapters(sites, empty):
    adapters, held = {}, {}
    for site in track(sites, 'adapters', transient=True, disable=not sys.stderr.isatty()):
        if site.identity not in adapters:
            adapter = make_adapter(site.method, site.spec, site.weight, empty)
            share(adapter, held)
            adapters[site.identity] = adapter
    return adapters


def _separable(model):
    adapted = list(attachments(model))
    for attachment in adapted:
        tensor = attachment.tensor
        if tensor and len(attachment.adapters) < len(attachment.layer.parametrizations[tensor]):
            raise UsageError(
                f'{attachment.name} carries a parametrization that is not of mmpeft beside the '
                'adapter, so neither can be taken off alone. Remove it first with '
                'torch.nn.utils.parametrize.remove_parametrizations.'
            )
    return adapted


def _check_merges(adapted):
    fixed = [(a.name, m) for a in adapted for m in (p.method for p in a.adapters) if not m.merges]
    if fixed:
        name, method = fixed[0]
        raise UsageError(
            f'{type(method).__name__} acts on activations ({len(fixed)} places, such as {name!r}) '
            'and is no function of a weight, so it cannot be merged. Deploy the model with its '
            'adapters attached: save_adapter and load_adapter, or the checkpoint itself.'
        )


def _restore(model):
    for record in model.__dict__.pop('peft', []):
        root = target_module(model, record.targets.module)
        unfreeze_statistics(root)
        for layer in root.modules():
            disable(layer)
        for name, parameter in model.named_parameters():
            if name in record.trained_before:
                parameter.requires_grad_(True)
    return model


def _freeze(model, root, keep):
    adapters = {id(p) for p in adapter_parameters(root)}
    kept = {id(p) for p in keep.values()}
    for record in getattr(model, 'peft', []):
        earlier = target_module(model, record.targets.module)
        kept.update(id(p) for p in _matching(earlier, record.unfreeze).values())
    names = {id(p): name for name, p in model.named_parameters()}
    frozen = []
    for parameter in root.parameters():
        if parameter.requires_grad and id(parameter) not in adapters | kept:
            parameter.requires_grad_(False)
            frozen.append(names[id(parameter)])
    return frozen


def _matching(root, patterns):
    names = dict(root.named_parameters())
    found = {}
    for pattern in patterns:
        matches = {name: p for name, p in names.items() if re.search(pattern, name)}
        if not matches:
            raise UsageError(f'unfreeze: {pattern!r} matches no parameter. {near(pattern, names)}')
        found |= matches
    return found


def _warn_outgrown(result):
    outgrown = result.outgrown
    if not outgrown:
        return
    worst = max(outgrown, key=lambda row: row.adapter / row.weight)
    total = sum(row.adapter for row in outgrown)
    warnings.warn(
        f'{len(outgrown)} of {len(result.rows)} adapters have more parameters than the weight '
        f'that they adapt, and hold {total / max(result.adapters, 1):.0%} of the budget. The worst '
        f'is {worst.name}: {worst.adapter:,} for {worst.weight:,}. Lower the rank there '
        '(targets.overrides), cap it (targets.max_share=1.0), leave such layers out '
        "(targets.exclude_kinds=('depthwise',)) or choose a leaner layout.",
        stacklevel=3,
    )
