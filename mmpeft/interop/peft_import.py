"""From what Hugging Face's peft stores to adapted models; see :mod:`.peft_names`."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmpeft.checkpoint.safe_patterns import check_patterns
from mmpeft.errors import UsageError, suggest
from mmpeft.injection.attach import adapt
from mmpeft.injection.freeze import Injection
from mmpeft.injection.site import Site, attached, sites_at
from mmpeft.injection.weights import layers, weights_of
from mmpeft.methods.dora import DoRA
from mmpeft.methods.lora import LoRA

from .peft_names import FACTORS, PREFIX, Names, check_layer, peft_shapes

READ = """
    peft_type r rank_pattern lora_alpha alpha_pattern use_rslora use_dora lora_dropout
    modules_to_save init_lora_weights bias
""".split()
"""Keys of ``adapter_config.json`` that are read."""

WITHOUT_EFFECT = """
    task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    target_modules exclude_modules layers_to_transform layers_pattern megatron_core eva_config
    qalora_group_size runtime_config fan_in_fan_out
""".split()
"""Keys that no output of a stored adapter depends on. All others must be unset."""

KEEPS_BASE = (True, False, 'gaussian', 'eva', 'orthogonal')
"""Values of ``init_lora_weights`` that leave the base as it is."""


def from_peft(
    model: nn.Module,
    config: Mapping,
    state: Mapping[str, Tensor],
    module: str = '',
    names: Names | None = None,
    inference: bool = False,
) -> nn.Module:
    """Adapt a model with what peft has stored, in place.

    Args:
        model: The base with its pretrained weights, without adapters.
        config: The content of ``adapter_config.json``.
        state: The content of ``adapter_model.safetensors``.
        module: Target module of the injection, below which the base is frozen.
        names: How peft's base calls the modules.
        inference: Drop dropout, which matters in training only.

    Raises:
        UsageError: It is not LoRA or DoRA, does not fit the model, or peft
            computes something else; the model is unchanged.
    """
    names = names or Names()
    if any(vars(m).get('peft') for m in model.modules()) or attached(model):
        raise UsageError('The model has adapters already. Give the base alone (mmpeft.remove).')
    _check_config(config, inference)
    factors, saved = _sorted_tensors(model, config, state, names)
    sites, values = [], []
    for path, (theirs, given) in factors.items():
        method = _method(config, theirs)
        _check_factors(model, path, method, given)
        sites += sites_at(model, [(path, 'weight', method, None)])
        values.append(given)
    _check_tied(sites, values)
    _check_saved(model, saved)
    trained = _trained(model, sites, saved, module)
    method = Counter(site.method for site in sites).most_common(1)[0][0]
    sites = adapt(model, Injection(method, module, trained), sites, empty=True)
    own = {key: value for key, value in model.state_dict().items() if key in saved}
    with torch.no_grad():
        for site, given in zip(sites, values, strict=True):
            for name, value in given.items():
                factor = site.adapter.factors[name]
                factor.copy_(value.reshape(factor.shape))
        for key, value in saved.items():
            own[key].copy_(value)
    return model


def _check_config(config, inference):
    kind = str(config.get('peft_type')).rpartition('.')[2]
    if kind != 'LORA':
        raise UsageError(
            f'The folder holds peft_type={kind!r}. Only LORA (and DoRA) can be converted.'
        )
    modules = config.get('modules_to_save') or []
    if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise UsageError(
            f"modules_to_save={modules!r} in the folder's config is not a list of names."
        )
    for key in ('rank_pattern', 'alpha_pattern'):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise UsageError(f"{key}={patterns!r} in the folder's config is not a dict.")
        check_patterns(patterns)
    init = config.get('init_lora_weights', True)
    if init not in KEEPS_BASE:
        raise UsageError(
            f'init_lora_weights={init!r} changes the base weights, which the folder does not '
            "hold. Convert it first, by peft's path_initial_model_for_weight_conversion."
        )
    odd = [k for k, value in config.items() if value and k not in READ + WITHOUT_EFFECT]
    odd += ['bias'] if config.get('bias', 'none') != 'none' else []
    if odd:
        raise UsageError(
            f"{odd[0]}={config[odd[0]]!r} in the folder's config has no equivalent here. Merge it "
            'with peft (merge_and_unload) and use the merged weights as a base.'
        )
    if config.get('lora_dropout') and not inference:
        raise UsageError(
            f'lora_dropout={config["lora_dropout"]} drops elements of the input; dropout here '
            'drops whole channels. Write inference=True (--inference) to leave it out: outputs '
            'are equal.'
        )


def _sorted_tensors(model, config, state, names):
    """Factors by our path, each with peft's, and tensors of saved modules by our key."""
    own = model.state_dict()
    factors, saved = {}, {}
    for key, value in state.items():
        if not key.startswith(PREFIX):
            raise UsageError(f'{key!r} does not start with {PREFIX!r}, as all keys of peft do.')
        inner = key.removeprefix(PREFIX)
        path, _, last = inner.removesuffix('.weight').rpartition('.')
        if last in FACTORS:
            given = factors.setdefault(_ours(model, names, path), (path, {}))[1]
            given[FACTORS[last]] = value
            continue
        path, _, last = inner.rpartition('.')
        if not _is_saved(config, path):
            raise UsageError(f'{key!r} is neither a factor of LoRA nor of modules_to_save.')
        target = f'{_ours(model, names, path)}.{last}'
        if target not in own or own[target].shape != value.shape:
            raise UsageError(f'{key!r} of modules_to_save does not fit the model.')
        saved[target] = value
    if not factors:
        raise UsageError('The folder holds no factors of LoRA.')
    for key in own.keys() - saved.keys():
        path = names.theirs(key.rpartition('.')[0])
        if path and _is_saved(config, path):
            raise UsageError(f'The folder lacks {key} of modules_to_save.')
    return factors, saved


def _ours(model, names, theirs):
    path = names.ours(theirs)
    known = [p for p, _ in layers(model)]
    if path not in known:
        raise UsageError(
            f'The folder has tensors of a layer {theirs!r}, which the model does not have. '
            f"{suggest(theirs, known)} Say which module is peft's base (module, --module)."
        )
    return path


def _is_saved(config, path):
    modules = config.get('modules_to_save') or ()
    return any(re.fullmatch(rf'(.*\.)?{re.escape(m)}(\..*)?', path) for m in modules)


def _method(config, path):
    """LoRA or DoRA, as peft's config describes it for a layer of peft's base."""
    rank = _looked_up(config.get('rank_pattern'), path, config.get('r', 8))
    alpha = _looked_up(config.get('alpha_pattern'), path, config.get('lora_alpha', 8))
    is_number = isinstance(alpha, int | float) and math.isfinite(alpha)
    if not isinstance(rank, int) or rank < 1 or not is_number:
        raise UsageError(
            f"r={rank!r} or lora_alpha={alpha!r} in the folder's config is not a number."
        )
    scaling = dict(alpha=alpha)
    if config.get('use_rslora'):
        scaling = dict(scale=alpha / math.sqrt(rank))
    kind = DoRA if config.get('use_dora') else LoRA
    detached = dict(detach_norm=True) if kind is DoRA else {}
    return kind(rank=rank, layout='channel', **scaling, **detached)


def _looked_up(patterns, path, default):
    """The value of the first pattern that the end of a path matches, as in peft."""
    matched = (v for p, v in (patterns or {}).items() if re.match(rf'(.*\.)?({p})$', path))
    return next(matched, default)


def _check_factors(model, path, method, given):
    layer = model.get_submodule(path)
    spec = dict(weights_of(layer)).get('weight')
    if spec is None:
        raise UsageError(f'{path} is a {type(layer).__name__}, which has no weight to adapt.')
    check_layer(model, path, 'weight', spec)
    wanted = peft_shapes(spec, method.rank)
    if not isinstance(method, DoRA):
        del wanted['magnitude']
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    if shapes != wanted:
        raise UsageError(
            f'{path} does not fit: the folder has {shapes}, its config and the model need '
            f'{wanted}. Give the base that it was trained on.'
        )
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    for value in given.values():
        if not value.is_floating_point() or torch.promote_types(value.dtype, dtype) != dtype:
            raise UsageError(
                f'{path}: the folder holds {value.dtype}, which the adapter of this base, '
                f'{dtype}, would round. Convert the model first (model.double()).'
            )


def _check_tied(sites: list[Site], values):
    first = {}
    for site, given in zip(sites, values, strict=True):
        other, theirs = first.setdefault(site.tie_key, (site, given))
        if any(not torch.equal(value, theirs[name]) for name, value in given.items()):
            raise UsageError(
                f'{other.path} and {site.path} share one weight, and the folder has two adapters '
                'for it.'
            )


def _check_saved(model, saved):
    """peft saves a copy of a module, which a tied weight is no longer equal to."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for held in names.values():
        inside = [name for name in held if name in saved]
        if inside and len(held) > 1:
            other = next((name for name in held if name != inside[0]), '')
            raise UsageError(
                f'modules_to_save holds {inside[0]}, which is tied to {other} in this model; peft '
                'trained a copy of it. Untie them first (tie_word_embeddings=False in the config '
                'of a Hugging Face model).'
            )


def _trained(model, sites, saved, module):
    """Names below the target module of the saved modules' parameters."""
    prefix = f'{module}.' if module else ''
    if outside := [site.path for site in sites if not site.path.startswith(prefix)]:
        raise UsageError(f'{outside[0]} is adapted, and is not below {module!r}.')
    own = model.state_dict(keep_vars=True)
    trained = []
    for key in sorted(key for key in saved if key.startswith(prefix)):
        if isinstance(own[key], nn.Parameter):
            trained.append(key.removeprefix(prefix))
        elif not torch.equal(own[key], saved[key]):
            raise UsageError(
                f'modules_to_save changes {key!r}, a buffer, which would be part of the frozen '
                'base. Name a target module that does not contain it, such as the backbone.'
            )
    return tuple(trained)
