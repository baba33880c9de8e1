"""LoRA and DoRA to and from what Hugging Face's peft stores of them.

The tensors are the same and only change their shape, so that there and back
is equal to the last bit:

    here                          in peft
    lora_A (r, in k k)            lora_A.weight (r, in), of a kernel (r, in, k, k)
    lora_B (out, r)               lora_B.weight (out, r), of a kernel (out, r, 1, 1)
    magnitude (out,)              lora_magnitude_vector (out,), of a kernel (1, out, 1, 1)
    scale, or alpha / rank        lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

What trains beside the adapters goes into peft's ``modules_to_save``. Where
peft would compute something else, conversion is refused: on grouped and
dilated kernels, inside ``nn.MultiheadAttention``, with another update than
W + dW. peft's DoRA always takes the norm as a constant in backward, which is
``detach_norm`` here.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.checkpoint.keys import adapter_keys, adapter_state_dict
from mmpeft.checkpoint.patterns import check_patterns
from mmpeft.errors import UsageError, near
from mmpeft.injection.inject import inject
from mmpeft.injection.site import adapters_of, attached
from mmpeft.injection.weights import layers, weights_of
from mmpeft.methods.channels import output_norm
from mmpeft.methods.dora import DoRA
from mmpeft.methods.lora import LoRA
from mmpeft.methods.matrix import matrix_shape
from mmpeft.methods.spec import WeightSpec

PREFIX = 'base_model.model.'
SUFFIXES = dict(lora_A='lora_A.weight', lora_B='lora_B.weight', magnitude='lora_magnitude_vector')
FACTOR = re.compile(r'(?P<path>.+)\.lora_(?P<name>A|B|magnitude_vector)(\.weight)?')
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Keys of adapter_config.json: what is read, and what no output of a stored adapter depends on.
# Any other key must be unset.
READ = """
    peft_type r rank_pattern lora_alpha alpha_pattern use_rslora use_dora lora_dropout
    modules_to_save init_lora_weights bias
""".split()
WITHOUT_EFFECT = """
    task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    target_modules exclude_modules layers_to_transform layers_pattern megatron_core eva_config
    qalora_group_size runtime_config
""".split()
KEEPS_BASE = (True, False, 'gaussian', 'eva', 'orthogonal')


@dataclass(frozen=True)
class Names:
    """How the folder calls the modules of a model.

    Attributes:
        module: What the folder is relative to, such as ``'backbone.model'``;
            '' for the model.
        renamed: Paths below ``module`` with those in the folder; others have
            none there. As they are if None.
    """

    module: str = ''
    renamed: Mapping[str, str] | None = None

    def theirs(self, path: str) -> str | None:
        """The folder's name of a module of the model, None if it has none."""
        prefix = f'{self.module}.' if self.module else ''
        if not path.startswith(prefix):
            return None
        inner = path.removeprefix(prefix)
        return inner if self.renamed is None else self.renamed.get(inner)

    def ours(self, path: str) -> str | None:
        """The model's name of a module of the folder, None if it has none."""
        if self.renamed is not None:
            path = {theirs: own for own, theirs in self.renamed.items()}.get(path)
        return path if path is None or not self.module else f'{self.module}.{path}'


def to_peft(
    model: nn.Module, names: Names | None = None, inference: bool = False
) -> tuple[dict, dict[str, Tensor]]:
    """Config and state dict, as peft stores them, of a model's adapters.

    Args:
        model: After :func:`mmpeft.inject`; is not changed.
        names: How the base of peft calls the modules. What trains outside
            ``names.module`` is left out.
        inference: Leave out what only training knows: dropout, MPC.

    Returns:
        The content of ``adapter_config.json`` and of
        ``adapter_model.safetensors``, its tensors on the CPU.

    Raises:
        UsageError: There is something that peft has no equal of; the first
            such layer is named.
    """
    names = names or Names()
    methods, state = {}, {}
    for site in attached(model):
        path = names.theirs(site.path)
        if not path:
            raise UsageError(
                f'{site.name} is adapted, and {names.module or "the model"!r}, which is to '
                'be the base of peft, has no such layer below it.'
            )
        method, factors = _converted(model, site, inference)
        methods[path] = method
        state |= {f'{PREFIX}{path}.{SUFFIXES[k]}': value for k, value in factors.items()}
    if not methods:
        raise UsageError('There is nothing to convert: the model was not adapted.')
    kinds = Counter(type(method).__name__ for method in methods.values())
    if len(kinds) > 1:
        raise UsageError(
            f'The model is adapted by {" and ".join(kinds)}, and a folder of peft holds one of '
            'them. Convert models that have one alone.'
        )
    saved, theirs = _modules_to_save(model, names)
    state |= {PREFIX + key: value for key, value in theirs.items()}
    paths = {names.theirs(path) for path, _ in layers(model)} - {None}
    config = _config(methods, paths) | dict(modules_to_save=saved or None)
    return config, {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}


def from_peft(
    model: nn.Module,
    config: Mapping,
    state: Mapping[str, Tensor],
    module: str = '',
    names: Names | None = None,
    inference: bool = False,
) -> nn.Module:
    """Adapt a model by what peft has stored, in place.

    Args:
        model: The base with its pretrained weights, not adapted.
        config: The content of ``adapter_config.json``.
        state: The content of ``adapter_model.safetensors``.
        module: Target module of the injection: what is below it is the
            frozen base.
        names: How the base of peft calls the modules.
        inference: Leave out what only training knows: dropout.

    Returns:
        The same model.

    Raises:
        UsageError: It is no LoRA or DoRA, does not fit the model, or peft
            computes something else; the model is as it was.
    """
    names = names or Names()
    if getattr(model, 'peft', []):
        raise UsageError('The model is adapted already. Give the base alone (mmpeft.remove).')
    _check_config(config, inference)
    factors, saved = _sorted(model, config, state, names)
    _check_patterns(config, [theirs for theirs, _ in factors.values()])
    specs = {path: _spec(model, path) for path in factors}
    methods = {}
    for path, (theirs, given) in factors.items():
        methods[path] = _method(config, theirs)
        factors[path] = _checked(model, path, methods[path], given, specs[path])
    _check_tied(model, factors)
    injection = _injection(model, methods, specs, saved, module)
    inject(model, **injection, empty=True)
    own = model.state_dict()
    with torch.no_grad():
        for path, given in factors.items():
            (adapter,) = adapters_of(model.get_submodule(path), 'weight')
            for name, value in given.items():
                adapter.factors[name].copy_(value)
        for key, value in saved.items():
            own[key].copy_(value)
    return model


def _converted(model, site, inference):
    """A method of ours as peft has it, and its factors in peft's shapes."""
    name = site.name
    chain = adapters_of(site.layer, site.tensor)
    if len(chain) > 1:
        raise UsageError(
            f'{name} has {len(chain)} adapters, one on the other, and a folder of '
            'peft holds one. Merge the first into the base.'
        )
    adapter = site.adapter
    method, spec = adapter.method, adapter.spec
    if type(method) not in (LoRA, DoRA):
        raise UsageError(
            f'{name} is adapted by {type(method).__name__}. Only LoRA and DoRA are converted; '
            'merge others into the weights (mmpeft.merge).'
        )
    if method.update != 'additive':
        raise UsageError(
            f'{name} is adapted with update={method.update!r}, which peft does not have. Merge it '
            'into the weights (mmpeft.merge).'
        )
    _check_layer(model, site.path, site.tensor, spec)
    own, plain = (matrix_shape(spec, method.rank, layout) for layout in (method.layout, 'channel'))
    if own != plain:
        raise UsageError(
            f"{name} is a kernel adapted in loralib's layout, which peft does not have. Convert "
            "adapters that were trained with layout='channel', or merge (mmpeft.merge)."
        )
    training = [k for k in ('dropout', 'mpc') if getattr(method, k)]
    if training and not inference:
        raise UsageError(
            f'{name} was trained with {training[0]}={getattr(method, training[0])!r}, which is '
            'something else in peft. Where the adapter is to be run and not trained on, say so '
            '(inference=True, --inference): outputs are equal.'
        )
    factors = adapter.factors
    if isinstance(method, DoRA):
        weight = site.original
        direction = LoRA.apply(method, weight.to(adapter.dtype), factors, spec)
        if (output_norm(direction, spec) == 0).any():
            raise UsageError(
                f'{name} has an output channel of zeros, where peft divides by its norm and '
                'gives NaN. Merge instead (mmpeft.merge).'
            )
    shapes = _shapes(spec, method.rank)
    return method, {name: value.view(shapes[name]) for name, value in factors.items()}


def _shapes(spec: WeightSpec, rank):
    """Of peft's tensors for a weight."""
    ones = (1,) * len(spec.kernel_size)
    return dict(
        lora_A=(rank, *spec.shape[1:]),
        lora_B=(spec.shape[0], rank, *ones),
        magnitude=(1, spec.shape[0], *ones) if ones else (spec.shape[0],),
    )


def _check_layer(model, path, tensor, spec):
    layer = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition('.')[0])
    kind = next((kind for kind in LAYERS if isinstance(layer, kind)), None)
    own = type(layer).__name__.removeprefix('Parametrized')
    reason = None
    if kind is None or tensor != 'weight':
        reason = 'is no linear layer or convolution of torch'
    elif own not in (kind.__name__, 'NonDynamicallyQuantizableLinear'):
        reason = f'belongs to a {own}, which may not use its weight as it is'
    elif isinstance(parent, nn.MultiheadAttention):
        reason = 'is read by nn.MultiheadAttention, past what peft puts there'
    elif spec.groups > 1:
        reason = 'is of a grouped convolution'
    elif kind is not nn.Linear and math.prod(spec.kernel_size) > 1 and set(layer.dilation) != {1}:
        reason = 'is of a dilated convolution'
    elif kind is not nn.Linear and layer.padding_mode != 'zeros':
        reason = f'is of a convolution with padding_mode={layer.padding_mode!r}'
    if reason:
        raise UsageError(
            f'{path}.{tensor} {reason}, where peft computes something else. Leave it out '
            '(targets.exclude), or merge (mmpeft.merge).'
        )


def _config(methods, paths):
    """``adapter_config.json`` of methods by the folder's paths; ``paths`` are all there are."""
    ranks = {path: method.rank for path, method in methods.items()}
    alphas = {path: _alpha(method) for path, method in methods.items()}
    rank, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    targets = sorted(methods)
    if any(path.endswith(f'.{target}') for path in paths - methods.keys() for target in targets):
        targets = '|'.join(map(re.escape, targets))  # peft takes the ends of paths in a list
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
        fan_in_fan_out=False,
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
            'whole modules, which it tells by the end of their names, and the one that this '
            'belongs to is frozen in part or not told apart so.'
        )
    return saved, state


def _can_be_saved(module, theirs, paths):
    # peft wraps every module whose name ends so, and a wrapper is called, never indexed.
    clear = theirs and sum(str(other).endswith(theirs) for other in paths.values()) == 1
    return clear and not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)


def _check_config(config, inference):
    kind = str(config.get('peft_type')).rpartition('.')[2]
    if kind != 'LORA':
        raise UsageError(f'The folder holds peft_type={kind!r}. Only LORA (and DoRA) is converted.')
    modules = config.get('modules_to_save') or []
    if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise UsageError(f"modules_to_save={modules!r} in the folder's config is no list of names.")
    init = config.get('init_lora_weights', True)
    if init not in KEEPS_BASE:
        raise UsageError(
            f'init_lora_weights={init!r} changes the base weights, which the folder does not '
            "hold. Convert it with peft first: save_pretrained('NEW', "
            "path_initial_model_for_weight_conversion='FOLDER-AT-START')."
        )
    odd = [k for k, value in config.items() if value and k not in READ + WITHOUT_EFFECT]
    odd += ['bias'] if config.get('bias', 'none') != 'none' else []
    if odd:
        raise UsageError(
            f"{odd[0]}={config[odd[0]]!r} in the folder's config has no equal here. Merge it with "
            'peft (merge_and_unload) and use the merged weights as a base.'
        )
    if config.get('lora_dropout') and not inference:
        raise UsageError(
            f'lora_dropout={config["lora_dropout"]} drops elements of the input; dropout here '
            'drops whole channels. Where the adapter is to be run, or trained on without it, say '
            'so (inference=True, --inference): outputs are equal.'
        )


def _sorted(model, config, state, names):
    """Factors by path of ours, each with peft's, and tensors of saved modules by key of ours."""
    own = model.state_dict()
    factors, saved = {}, {}
    for key, value in state.items():
        if not key.startswith(PREFIX):
            raise UsageError(f'{key!r} does not start with {PREFIX!r}, as all that peft saves.')
        inner = key.removeprefix(PREFIX)
        if factor := FACTOR.fullmatch(inner):
            path, name = factor['path'], f'lora_{factor["name"]}'
            given = factors.setdefault(_ours(model, names, path), (path, {}))[1]
            given['magnitude' if name == 'lora_magnitude_vector' else name] = value
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
            f'The folder is of a layer {theirs!r}, which the model does not have. '
            f'{near(theirs, known)} Say which module the base of peft is (module, --module).'
        )
    return path


def _is_saved(config, path):
    modules = config.get('modules_to_save') or ()
    return any(re.fullmatch(rf'(.*\.)?{re.escape(m)}(\..*)?', path) for m in modules)


def _spec(model, path):
    layer = model.get_submodule(path)
    specs = dict(weights_of(layer))
    if 'weight' not in specs:
        raise UsageError(f'{path} is a {type(layer).__name__}, which has no weight to adapt.')
    _check_layer(model, path, 'weight', specs['weight'])
    return specs['weight']


def _method(config, path):
    """LoRA or DoRA as peft's config has it for a layer of peft's base."""
    rank = _looked_up(config.get('rank_pattern'), path, config.get('r', 8))
    alpha = _looked_up(config.get('alpha_pattern'), path, config.get('lora_alpha', 8))
    if not isinstance(rank, int) or rank < 1 or not _is_number(alpha):
        raise UsageError(f"r={rank!r} or lora_alpha={alpha!r} in the folder's config is no number.")
    scaling = dict(alpha=alpha)
    if config.get('use_rslora'):
        scaling = dict(scale=alpha / math.sqrt(rank))
    kind = DoRA if config.get('use_dora') else LoRA
    detached = dict(detach_norm=True) if kind is DoRA else {}
    return kind(rank=rank, layout='channel', **scaling, **detached)


def _is_number(value):
    return isinstance(value, int | float) and math.isfinite(value)


def _looked_up(patterns, path, default):
    """As peft does: the first pattern that the end of a path matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(_at_the_end(pattern), path):
            return value
    return default


def _at_the_end(pattern):
    return rf'(.*\.)?({pattern})$'


def _check_patterns(config, paths):
    for key in ('rank_pattern', 'alpha_pattern'):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise UsageError(f"{key}={patterns!r} in the folder's config is no dict.")
        check_patterns(map(_at_the_end, patterns), paths)


def _checked(model, path, method, given, spec):
    """Peft's factors of a layer in our shapes."""
    wanted = _shapes(spec, method.rank)
    if not isinstance(method, DoRA):
        del wanted['magnitude']
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    if shapes != wanted:
        raise UsageError(
            f'{path} does not fit: the folder has {shapes}, and its config and the model want '
            f'{wanted}. Give the base that it was trained on.'
        )
    dtype = torch.promote_types(model.get_submodule(path).weight.dtype, torch.float32)
    for value in given.values():
        if not value.is_floating_point() or torch.promote_types(value.dtype, dtype) != dtype:
            raise UsageError(
                f'{path}: the folder holds {value.dtype}, which the adapter of this base, '
                f'{dtype}, would round. Convert the model first (model.double()).'
            )
    rows, inner, columns = matrix_shape(spec, method.rank, 'channel')
    plain = dict(lora_A=(inner, columns), lora_B=(rows, inner), magnitude=(rows,))
    return {name: value.reshape(plain[name]) for name, value in given.items()}


def _check_tied(model, factors):
    first = {}
    for path, given in factors.items():
        other = first.setdefault(id(model.get_submodule(path).weight), path)
        if any(not torch.equal(value, factors[other][name]) for name, value in given.items()):
            raise UsageError(
                f'{other} and {path} share one weight, and the folder has two adapters for it.'
            )


def _injection(model, methods, specs, saved, module):
    """Arguments by which :func:`inject` adapts exactly these layers so."""
    prefix = f'{module}.' if module else ''
    if outside := [path for path in methods if not path.startswith(prefix)]:
        raise UsageError(f'{outside[0]} is adapted, and is not below {module!r}.')
    common = Counter(methods.values()).most_common(1)[0][0].config()
    if all(spec.is_matrix for spec in specs.values()):
        common['layout'] = LoRA.layout
    patterns = {path: f'^{re.escape(path.removeprefix(prefix))}\\.weight$' for path in methods}
    overrides = {}
    for path, method in methods.items():
        own = {key: getattr(method, key) for key in ('rank', 'alpha', 'scale')}
        changed = {key: value for key, value in own.items() if value != common[key]}
        if changed:
            overrides[patterns[path]] = changed
    return dict(
        method=common,
        targets=dict(module=module, include=list(patterns.values()), overrides=overrides),
        unfreeze=_thawed(model, saved, prefix),
    )


def _thawed(model, saved, prefix):
    """Patterns of the saved modules' parameters below a prefix."""
    own = model.state_dict(keep_vars=True)
    patterns = []
    for key in sorted(key for key in saved if key.startswith(prefix)):
        if isinstance(own[key], nn.Parameter):
            patterns.append(f'^{re.escape(key.removeprefix(prefix))}$')
        elif not torch.equal(own[key], saved[key]):
            raise UsageError(
                f'modules_to_save changes {key!r}, a buffer, which would be one of the frozen '
                'base. Name a module to adapt that it lies outside of, such as the backbone.'
            )
    return tuple(patterns)
