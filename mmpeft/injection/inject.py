"""Inject a method into a model: freeze the target module, make adapters, attach them."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmpeft.errors import UsageError
from mmpeft.execution import AUTO, BALANCED, CHOICES, MEMORY, PLAIN, SPEED
from mmpeft.methods import Method, Ranked
from mmpeft.quantization import Quantized
from mmpeft.registry import METHODS

from .attach import adapt, make_adapters
from .freeze import Injection, plain_parameters, trained_parameters
from .patterns import matching, patterns_of
from .prompts import check_prompts
from .quantized import adopt_quantized, quantize_weights, to_quantize
from .ranks import resolve_ranks
from .site import adapters_of
from .summary import Summary, summary, summary_rows
from .targets import Targets, select, target_module
from .weights import is_below, newly_initialized
from .wrappers import on_inner


@partial(on_inner, adds=True)
def inject(
    model: nn.Module,
    method: Method | Mapping,
    targets: Targets | Mapping | None = None,
    unfreeze: str | Sequence[str] = (),
    empty: bool = False,
    execution: str = AUTO,
    memory: str = SPEED,
    frozen_dtype: str | None = None,
    sensitivity: Mapping[str, Tensor] | None = None,
) -> Summary:
    """Freeze a model's target module and adapt it, in place.

    The adapted weight ``fc.weight`` becomes
    ``fc.parametrizations.weight.original`` in the state dict, with the
    adapter's parameters ``fc.parametrizations.weight.0.<name>`` beside it.
    Tied weights share one adapter. Methods that act on activations change no
    keys and add ``<module>.peft_adapters.0.<name>``. A second injection keeps
    what the first one trains; methods on one weight apply in order.

    Args:
        model: With its pretrained weights.
        method: A method or its config, such as ``dict(type='FLoRA', rank=32)``.
        targets: A :class:`~mmpeft.injection.targets.Targets` or a dict of its fields.
        unfreeze: Patterns (regular expressions) of parameter names below the
            target module that train themselves. What the model marks as
            ``newly_initialized`` trains in any case.
        empty: Fill adapters with NaN, to be loaded; spares the decompositions that some
            methods start from. The default scale of a Lie update follows from the present
            weights: to load a state dict over other weights, pass ``model.peft[0].method``
            of the model that it came from.
        execution: ``'auto'`` computes each layer by the kernel that is expected to move the
            least memory; on a GPU, ``'composed'`` and ``'plain'`` are often faster. ``'merged'``
            puts thin updates into the weight, ``'branch'`` beside the layer. ``'composed'`` puts
            them beside the layer by torch's own layers, which needs fewer calls from Python and
            keeps each layer's input; ``'plain'`` builds weights as torch's parametrize
            does and leaves frozen layers unchanged.
        memory: What the target module keeps for backward. ``'speed'``: what it needs, each map
            once; ``'balanced'``: that without the inputs of GELU and SiLU, so that the products
            before them are done again in backward; ``'small'``: the inputs of blocks, which run
            again as a whole. Outputs and gradients are the same. Of several injections the one
            that keeps least counts.
        frozen_dtype: Store the frozen weights of linear layers and convolutions in few bits by
            torchao: ``'int8'``, ``'fp8'`` or ``'nf4'``; as they are if None. The adapters belong to
            the rounded weights.
        sensitivity: From :func:`mmpeft.sensitivity` with the same method and targets. The method's
            budget is distributed by it (:mod:`~mmpeft.injection.distribution`), within
            ``targets.max_share`` or, without it, the size of each weight. One rank for all if None.

    Raises:
        UsageError: The targets select nothing, a pattern matches nothing, a rank or budget
            does not fit, an argument is unknown, prompts and a method that convolves an image's
            tokens would meet in a block, an embedding to adapt has ``sparse=True``, the target
            has weights in few bits of other libraries than torchao and bitsandbytes, in formats
            that quantize inputs too, or without a shape so far, or the model is sharded or wrapped
            for DDP already. The model is unchanged, except that 4-bit layers of bitsandbytes may
            have become ``nn.Linear`` with equal values.
    """
    method = METHODS.build(method)
    targets = Targets.of(targets)
    if execution not in CHOICES:
        raise UsageError(f'execution={execution!r} is not one of {", ".join(map(repr, CHOICES))}.')
    _check_memory(memory, execution)
    unfreeze = patterns_of(unfreeze, 'unfreeze')
    _check_shapes(target_module(model, targets.module))
    _check_beside_earlier(model, method, targets.module)
    adopt_quantized(model, targets.module)
    sites = select(model, method, targets)
    _check_dense(sites)
    check_prompts(model, sites)
    method = _resolved(resolve_ranks(method, sites, targets.max_share, sensitivity), sites)
    root = target_module(model, targets.module)
    trained = _trained(root, unfreeze)
    _check_trainable(method, root, trained, frozen_dtype)
    if frozen_dtype is not None:
        own = plain_parameters(root)
        kept = [*trained_parameters(model), *(own[name] for name in trained)]
        stored = to_quantize(model, targets.module, frozen_dtype, kept)
        make_adapters(sites, empty=True)  # raises for what does not fit, while weights are whole
        quantize_weights(stored, frozen_dtype)
    injection = Injection(method, targets.module, trained, execution=execution, memory=memory)
    sites = adapt(model, injection, sites, empty)
    if isinstance(method, Ranked):  # other methods have no argument for their size
        _warn_oversized(Summary(summary_rows(sites)))
    result = summary(model)
    if method.adapts:
        _warn_unknown(result)
    _warn_rounded({n: p for n, p in plain_parameters(root).items() if p.requires_grad})
    return result


def _check_memory(memory, execution):
    if memory not in MEMORY:
        raise UsageError(f'memory={memory!r} is not one of {", ".join(map(repr, MEMORY))}.')
    if memory == BALANCED and execution == PLAIN:
        raise UsageError(
            "memory='balanced' does products again by mmpeft's own layers, and execution='plain' "
            "leaves torch's. Take execution='auto', or memory='small'."
        )


def _check_shapes(root):
    lazy = [name for name, weight in root.named_parameters() if is_lazy(weight)]
    if lazy:
        raise UsageError(
            f'{len(lazy)} parameters, such as {lazy[0]}, get their shapes from the first input. '
            'Call the model once before mmpeft.inject.'
        )


def _check_dense(sites):
    for site in sites:
        if site.tensor and getattr(site.layer, 'sparse', False):
            raise UsageError(
                f'{site.name} has sparse gradients, which do not pass through an adapter. Write '
                f'model.get_submodule({site.path!r}).sparse = False, which changes nothing else.'
            )


def _check_beside_earlier(model, method, module):
    for record in getattr(model, 'peft', []):
        whole = next((m for m in (record.method, method) if m.trains_base), None)
        if whole and (is_below(module, [record.module]) or is_below(record.module, [module])):
            raise UsageError(
                f'{type(whole).__name__} trains all of its target, so it cannot be combined with '
                f'{type(method if whole is record.method else record.method).__name__} on the '
                f'same modules ({record.module!r} and {module!r}). To train some weights beside '
                'adapters, name them in unfreeze.'
            )


def _resolved(method, sites):
    """Fill in what methods leave to the weights, in the sites' methods too."""
    weights = {}
    for site in (site for site in sites if site.tensor):
        # Earlier adapters may be NaN still, to be loaded.
        adapted = adapters_of(site.layer, site.tensor)
        weights[site.tie_key] = (site.original if adapted else site.weight), site.spec
    methods = {method, *(site.method for site in sites)}
    resolved = {each: each.resolve(weights.values()) for each in methods}
    for site in sites:
        site.method = resolved[site.method]
    return resolved[method]


def _trained(root, patterns):
    """Names of the parameters below a module that train: newly initialized, or matched."""
    names, new = plain_parameters(root), newly_initialized(root)
    matches = set(matching(names, patterns, 'unfreeze', 'parameter'))
    return tuple(name for name in names if name in matches or is_below(name, new))


def _check_trainable(method, root, trained, frozen_dtype):
    """Refuse to train what is, or is to be, in few bits."""
    own = plain_parameters(root)
    rounded = [name for name, weight in own.items() if isinstance(weight, Quantized)]
    if method.trains_base and (rounded or frozen_dtype):
        raise UsageError(
            f'{type(method).__name__} trains the weights themselves, and weights in few bits '
            f'{f"(such as {rounded[0]}) " if rounded else ""}stay frozen. Leave frozen_dtype out.'
        )
    for name in trained:
        if name in rounded:
            raise UsageError(
                f'{name} is stored in few bits ({own[name].format}), so it cannot be trained. '
                'Adapt it, or load the model without quantization.'
            )


def _warn_rounded(trained):
    low = [name for name, weight in trained.items() if weight.dtype.itemsize < 4]
    if low:
        warnings.warn(
            f'{len(low)} weights train in {trained[low[0]].dtype}, such as {low[0]}, in which a '
            'step that is much smaller than the weight is lost. Store what trains in float32 '
            "(in a config, model.backbone.frozen_dtype='float32'), and compute in fewer bits by "
            '--amp (torch.autocast).',
            stacklevel=4,
        )


def _warn_unknown(summary):
    if summary.unknown_share > 0.5:
        largest = sorted(summary.unknown, key=summary.unknown.get, reverse=True)[:3]
        warnings.warn(
            f'{summary.unknown_share:.0%} of the parameters in {summary.module or "the model"!r} '
            f'belong to unsupported layers ({", ".join(largest)}; the summary lists them all) and '
            'stay frozen. Let them train directly with unfreeze, or leave them as they are and '
            'filter this warning.',
            stacklevel=4,
        )


def _warn_oversized(summary):
    rows, oversized = summary.rows, summary.oversized
    if oversized:
        worst = max(oversized, key=lambda row: row.adapter / row.weight)
        part = sum(row.adapter for row in oversized) / sum(row.adapter for row in rows)
        warnings.warn(
            f'{len(oversized)} of {len(rows)} adapters have more parameters than the weight that '
            f'they adapt, and hold {part:.0%} of all adapter parameters. The largest ratio is at '
            f'{worst.name}: {worst.adapter:,} for {worst.weight:,}. Lower the rank there '
            '(targets.overrides), cap it (targets.max_share=1.0), exclude such layers '
            "(targets.exclude_kinds=('depthwise',)) or choose the layout 'channel', where the "
            'method has one.',
            stacklevel=4,  # the caller of inject, which on_inner calls
        )
