"""From adapted models to what Hugging Face's peft stores; see :mod:`.peft_names`."""

import re
from collections import Counter

import torch
from torch import Tensor, nn

from mmpeft.checkpoint.keys import adapter_keys, adapter_state_dict
from mmpeft.errors import UsageError
from mmpeft.injection.site import Site, attached
from mmpeft.injection.weights import layers
from mmpeft.methods import Method
from mmpeft.methods.adapter import maybe_transposed
from mmpeft.methods.delta import DeltaMethod
from mmpeft.methods.dora import DoRA, output_norm
from mmpeft.methods.lora import LoRA
from mmpeft.methods.matrix import MatrixMethod, matrix_shape
from mmpeft.methods.normal_form import NormalForm

from .peft_names import PREFIX, SUFFIXES, Names, check_layer, peft_shapes


def to_peft(
    model: nn.Module, names: Names | None = None, inference: bool = False, as_lora: bool = False
) -> tuple[dict, dict[str, Tensor]]:
    """What ``adapter_config.json`` and ``adapter_model.safetensors`` hold for a model's adapters.

    Args:
        model: After :func:`mmpeft.inject`; is not changed.
        names: How peft's base calls the modules. What trains outside
            ``names.module`` is left out.
        inference: Drop settings that matter in training only: dropout, MPC.
        as_lora: Write other additive updates that are products of thin factors (FLoRA, PiSSA,
            kernels in loralib's layout) as the LoRA that computes the same. It serves inference:
            trained further, its factors would be others.

    Raises:
        UsageError: peft has no equivalent; the message names the first such layer.
    """
    names = names or Names()
    methods, state, turns = {}, {}, False
    for site in attached(model):
        check_layer(model, site.path, site.tensor, site.spec)
    for site in attached(model):
        path = names.theirs(site.path)
        if not path:
            raise UsageError(
                f'{site.name} is adapted, and {names.module or "the model"!r}, which is to be '
                "peft's base, has no such layer below it."
            )
        if path in methods:
            raise UsageError(
                f'{site.name} has several adapters, one on the other, and a folder of peft holds '
                'one. Merge the first into the base (mmpeft.merge).'
            )
        methods[path], factors = _converted(site, inference, as_lora)
        turns |= site.spec.fan_in_fan_out
        state |= {f'{PREFIX}{path}.{SUFFIXES[k]}': value for k, value in factors.items()}
    if not methods:
        raise UsageError('There is nothing to convert: the model has no adapters.')
    kinds = Counter(type(method).__name__ for method in methods.values())
    if len(kinds) > 1:
        raise UsageError(
            f'The model is adapted by {" and ".join(kinds)}, and a folder of peft holds one of '
            'them. Convert models that have only one.'
        )
    saved, theirs = _modules_to_save(model, names)
    state |= {PREFIX + key: value for key, value in theirs.items()}
    paths = {names.theirs(path) for path, _ in layers(model)} - {None}
    more = dict(modules_to_save=saved or None, fan_in_fan_out=turns)
    config = _config(methods, paths) | more
    return config, {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}


def _converted(site: Site, inference, as_lora) -> tuple[Method, dict[str, Tensor]]:
    """An adapter as peft has it: a method, and its factors in peft's shapes."""
    method, factors = site.method, site.adapter.factors
    reason = _without_equal(site)
    product = thin_product(site) if reason else None
    if product and as_lora:
        up, down = product
        method, factors = LoRA(rank=len(down)), dict(lora_A=down, lora_B=up)
    elif reason:
        lora = ', or write the LoRA that computes the same, for inference, by as_lora=True '
        raise UsageError(
            f'{site.name} {reason}. Merge it into the weights (mmpeft.merge)'
            f'{lora + "(--as-lora)" if product else ""}.'
        )
    training = [f'{k}={getattr(method, k)!r}' for k in ('dropout', 'mpc') if getattr(method, k)]
    if training and not inference:
        raise UsageError(
            f'{site.name} was trained with {training[0]}, which peft does not have in this form. '
            'If the adapter is for inference, write inference=True (--inference): outputs are '
            'equal.'
        )
    shapes = peft_shapes(site.spec, method.rank)
    return method, {name: value.reshape(shapes[name]) for name, value in factors.items()}


def thin_product(site: Site) -> tuple[Tensor, Tensor] | None:
    """U (out, r) and V (r, in * kernel) with phi(W) = W + U V, unfolded; None if there are none.

    A kernel in loralib's layout of rank r has them with r * k * k, k of each axis: the k rows of
    B that one output owns are blocks of U's row, over copies of A.
    """
    method, spec, factors = site.method, site.spec, site.adapter.factors
    form = method.normal_form(factors, spec)
    if form is not None:
        is_sum = isinstance(form, NormalForm) and form.is_thin
        return (form.up * form.scale, form.unfolded()) if is_sum else None
    if type(method).apply is DeltaMethod.apply and isinstance(method, MatrixMethod):
        if method.update == 'additive' and spec.is_plain:
            up, down = method.matrices(factors)
            copies = len(up) // spec.out_features
            up = up.reshape(spec.out_features, -1) * method.scaling
            return up, torch.block_diag(*[down] * copies)
    return None


def _without_equal(site):
    """What peft does not have of an adapter; None if it has everything."""
    method, spec = site.method, site.spec
    if type(method) not in (LoRA, DoRA):
        return f'is adapted by {type(method).__name__}, and only LoRA and DoRA are converted'
    if method.update != 'additive':
        return f'is adapted with update={method.update!r}, which peft does not have'
    if method.matrix_shape(spec) != matrix_shape(spec, method.rank, 'channel'):
        return "is a kernel adapted in loralib's layout, and peft has layout='channel' alone"
    if isinstance(method, DoRA):
        weight = maybe_transposed(site.original, spec).to(site.adapter.dtype)
        direction = LoRA.apply(method, weight, site.adapter.factors, spec)
        if (output_norm(direction, spec) == 0).any():
            return 'has an output channel of zeros, where peft divides by its norm and gives NaN'
    return None


def _config(methods, paths):
    """``adapter_config.json`` of methods by the folder's paths; ``paths`` are all there are."""
    ranks = {path: method.rank for path, method in methods.items()}
    alphas = {path: _alpha(method) for path, method in methods.items()}
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    targets = sorted(methods)
    if any(path.endswith(f'.{target}') for path in paths - methods.keys() for target in targets):
        targets = '|'.join(map(re.escape, targets))  # peft matches a list with the ends of paths
    return dict(
        peft_type='LORA',
        task_type=None,
        base_model_name_or_path=None,
        inference_mode=True,
        target_modules=targets,
        r=rank,
        rank_pattern={f'^{re.escape(p)}': r for p, r in sorted(ranks.items()) if r != rank},
        lora_alpha=alpha,
        alpha_pattern={f'^{re.escape(p)}': a for p, a in sorted(alphas.items()) if a != alpha},
        lora_dropout=0.0,
        use_rslora=False,
        use_dora=type(next(iter(methods.values()))) is DoRA,
        bias='none',
        init_lora_weights=True,
    )


def _alpha(method):
    alpha = method.scaling * method.rank if method.alpha is None else method.alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _modules_to_save(model, names):
    """Modules that train beside the adapters, and their tensors, by peft's names."""
    own, adapters = model.state_dict(), adapter_keys(model)
    base = f'{names.module}.' if names.module else ''
    stored = [k for k in adapter_state_dict(model) if k.startswith(base) and k not in adapters]
    frozen = {name for name, _ in model.named_parameters()} - set(stored)
    paths = {path: names.theirs(path) for path, _ in layers(model) if path}
    saved, state = [], {}
    for path, theirs in paths.items():
        keys = [key for key in own if key.startswith(f'{path}.')]
        whole = set(keys) & set(stored) and not set(keys) & frozen
        if whole and _can_be_saved(model.get_submodule(path), theirs, paths):
            saved.append(theirs)
            state |= {theirs + key.removeprefix(path): own[key] for key in keys}
            stored = [key for key in stored if key not in keys]
    if stored:
        raise UsageError(
            f'{stored[0]} trains beside the adapters ({len(stored)} tensors do). peft stores '
            'whole modules, and finds them by the end of their names. The module of this tensor '
            'is frozen in part, or its name is not unique.'
        )
    return saved, state


def _can_be_saved(module, theirs, paths):
    # peft wraps every module whose name ends so, and a wrapper is called, never indexed.
    clear = theirs and sum(str(other).endswith(theirs) for other in paths.values()) == 1
    return clear and not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
