"""Put adapters on a model."""

import json
import re
import sys
import warnings
from dataclasses import asdict, dataclass

from rich.progress import track
from torch import nn

from mmpeft.errors import UsageError, near
from mmpeft.execution import AUTO, CHOICES
from mmpeft.methods import Method
from mmpeft.registry import METHODS

from .attach import adapter_parameters, attach, make_adapter, share
from .freeze import freeze_statistics
from .ranks import settle_ranks
from .reattach import names_of, speed_up
from .summary import Summary, summary
from .targets import Targets, select, target_module


@dataclass(frozen=True)
class Injection:
    """What was done to a model by one :func:`inject`; kept in ``model.peft``.

    Attributes:
        method: With its budget spent.
        targets: As given.
        unfreeze: As given.
        trained_before: Parameters that :func:`inject` froze, to be thawed
            when the adapters go. Names are those of the model without adapters.
        frozen_before: Parameters that ``unfreeze`` made train, likewise.
        execution: As given.
    """

    method: Method
    targets: Targets
    unfreeze: tuple[str, ...]
    trained_before: tuple[str, ...] = ()
    frozen_before: tuple[str, ...] = ()
    execution: str = AUTO

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
        targets: A :class:`~mmpeft.injection.targets.Targets` or a dict of its fields.
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
    frozen = () if method.trains_base else _to_freeze(model, root, keep=thawed)
    record = Injection(
        method,
        targets,
        unfreeze,
        trained_before=names_of(model, frozen),
        frozen_before=names_of(model, [p for p in thawed.values() if not p.requires_grad]),
        execution=execution,
    )
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not method.trains_base:
        freeze_statistics(root)
    for parameter in thawed.values():
        parameter.requires_grad_(True)
    for site in sites:
        attach(site.module, site.tensor, adapters[site.identity], execution)
    speed_up(model, [record])
    model.peft = [*getattr(model, 'peft', []), record]
    result = summary(model)
    _warn_outgrown(result)
    return result


def _make_adapters(sites, empty):
    adapters, held = {}, {}
    for site in track(sites, 'adapters', transient=True, disable=not sys.stderr.isatty()):
        if site.identity not in adapters:
            adapter = make_adapter(site.method, site.spec, site.weight, empty)
            share(adapter, held)
            adapters[site.identity] = adapter
    return adapters


def _to_freeze(model, root, keep):
    kept = {id(p) for p in adapter_parameters(root)} | {id(p) for p in keep.values()}
    for record in getattr(model, 'peft', []):
        earlier = target_module(model, record.targets.module)
        kept.update(id(p) for p in _matching(earlier, record.unfreeze).values())
    return [p for p in root.parameters() if p.requires_grad and id(p) not in kept]


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
