"""Random small networks, and an account of what each should be that mmpeft has no part in.

An :class:`Account` holds plain tensors, and the formulas that change them. Of
mmpeft it uses what defines a method (``apply``), and for adapters of activations
their hooks; what injects, executes, stores, exchanges and merges is what it checks.
"""

import copy
import re
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.injection.calls import unwatch
from mmpeft.injection.site import attached
from mmpeft.methods import ActivationMethod
from tests.cases import Attention, Bottleneck, ConvNeXtBlock, TorchAttention, TransformerBlock

WIDTH, SIZE = 8, 4
STATISTICS = nn.modules.batchnorm._NormBase
# Of a sum of squares, relative; gradients lose twice as much.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.1}


class ChannelsLast(nn.Module):
    """Layers on (N, H, W, C), around which the map goes."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x.movedim(1, -1)).movedim(-1, 1)


class Tokens(nn.Module):
    """Blocks on (N, H W, C)."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        y = self.blocks(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)


class Convolution(nn.Module):
    """A convolution that keeps the size, with a norm."""

    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x):
        return x + self.norm(self.conv(x)[..., :SIZE, :SIZE]).tanh()


class Tied(nn.Module):
    """An embedding of positions and a linear layer that share a weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out.weight = self.embed.weight

    def forward(self, x):
        y = x.movedim(1, -1) + self.embed(torch.arange(SIZE, device=x.device))
        return x + self.out(y).tanh().movedim(-1, 1)


class Positions(nn.Module):
    """An embedding with an entry that stays."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SIZE, WIDTH, padding_idx=1)

    def forward(self, x):
        return x + self.embed(torch.arange(SIZE, device=x.device)).T[:, None]


def _conv(norm=None, **arguments):
    conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, **arguments)
    return Convolution(conv, norm or nn.BatchNorm2d(WIDTH))


BLOCKS = dict(
    conv=_conv,
    groups=lambda: _conv(nn.GroupNorm(2, WIDTH), groups=2),
    circular=lambda: _conv(padding_mode='circular', bias=False),
    depthwise=lambda: _conv(groups=WIDTH),
    transposed=lambda: Convolution(
        nn.ConvTranspose2d(WIDTH, WIDTH, 2, groups=2), nn.BatchNorm2d(WIDTH)
    ),
    linear=lambda: ChannelsLast(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6, bias=False), nn.GELU(), nn.Linear(6, WIDTH)
    ),
    attention=lambda: Tokens(TransformerBlock(Attention(WIDTH), WIDTH)),
    torch_attention=lambda: Tokens(TransformerBlock(TorchAttention(WIDTH), WIDTH)),
    convnext=lambda: ConvNeXtBlock(WIDTH, channels_last=True),
    resnet=lambda: Bottleneck(WIDTH, WIDTH, 1),
    tied=Tied,
    positions=Positions,
)


class Network(nn.Module):
    """Blocks that each keep the size of a map, with statistics inside and behind them."""

    def __init__(self, blocks):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.body = nn.Sequential(*(BLOCKS[name]() for name in blocks))
        self.neck = nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.neck(self.body(self.stem(x).tanh())).tanh().mean((2, 3)))


def network(blocks, dtype, frozen) -> Network:
    """A plain network with statistics that are not those of a new one.

    Args:
        blocks: Names in ``BLOCKS``.
        dtype: Of its tensors.
        frozen: Path of a sub-module that does not train, or None.
    """
    net = Network(blocks)
    for module in net.modules():
        if isinstance(module, STATISTICS):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if frozen:
        net.get_submodule(frozen).requires_grad_(False)
    return net.to(dtype)


def images(dtype) -> Tensor:
    """A batch for a network."""
    return torch.randn(2, 3, SIZE, SIZE).to(dtype)


def plain(key: str) -> str:
    """The name in the network without adapters."""
    return re.sub(r'parametrizations\.(\w+)\.original$', r'\1', key)


def state_of(model) -> dict[str, Tensor]:
    """Clones of what a model holds."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are equal to the last bit, signs of zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(v.detach().contiguous().reshape(-1).view(torch.uint8) for v in (a, b)))


def distance(values, expected) -> float:
    """Of two lists of tensors, relative to the latter, in the Euclidean norm."""
    pairs = [
        (a.detach().double(), b.detach().double()) for a, b in zip(values, expected, strict=True)
    ]
    error = sum((a - b).square().sum().item() for a, b in pairs) ** 0.5
    size = sum(b.square().sum().item() for _, b in pairs) ** 0.5
    return error / max(size, 1e-3)


@dataclass(frozen=True)
class Formula:
    """An adapter as its method's formula and the keys of its tensors.

    Attributes:
        layer: Path of the layer.
        tensor: Name of the weight; '' for activations.
        method: Its function.
        spec: The role of the weight.
        keys: State-dict keys of what it holds, by name.
        fixed: What it holds and does not store, by name.
    """

    layer: str
    tensor: str
    method: object
    spec: object
    keys: dict[str, str]
    fixed: dict[str, Tensor]

    @classmethod
    def of(cls, site, start) -> 'Formula':
        """Of a site with an adapter whose keys start so."""
        fixed, held = site.adapter._non_persistent_buffers_set, site.adapter.factors
        keys = {name: f'{start}.{name}' for name in held if name not in fixed}
        rebuilt = {name: held[name].clone() for name in fixed}
        return cls(site.path, site.tensor, site.method, site.spec, keys, rebuilt)

    def apply(self, weight, factors, training):
        """phi(W), computed and returned in the factors' dtype."""
        own = {name: factors[key] for name, key in self.keys.items()}
        dtype = next(value.dtype for value in own.values() if value.is_floating_point())
        fixed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.fixed.items()}
        weight = weight.to(dtype)
        changed = self.method.apply(weight, own | fixed, self.spec, training)
        row = getattr(self.spec, 'padding_idx', None)
        if row is None:
            return changed
        return torch.cat([changed[:row], weight[row : row + 1], changed[row + 1 :]])

    def penalty(self, factors):
        """The method's term of the loss, or None."""
        own = {name: factors[key] for name, key in self.keys.items()}
        return self.method.penalty(own | self.fixed, self.spec)


@dataclass
class Account:
    """What a network is and computes.

    Attributes:
        network: Plain; its tensors are not looked at, its ties and types are.
        values: Parameters and buffers of the plain network by name, without
            what adapters make of them.
        trains: Parameters of the plain network that require gradients.
        still: Paths of layers whose statistics are held.
        injections: Arguments of ``inject``, in order.
        formulas: Of all adapters, in the order of the injections.
        factors: What the adapters hold, by key.
        ties: The first key of each factor that stands under several.
    """

    network: nn.Module
    values: dict[str, Tensor]
    trains: set[str]
    still: set[str] = field(default_factory=set)
    injections: list[dict] = field(default_factory=list)
    formulas: list[Formula] = field(default_factory=list)
    factors: dict[str, Tensor] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model) -> 'Account':
        """Of a plain model."""
        names = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        return cls(copy.deepcopy(model), state_of(model), names)

    def copy(self, **changes) -> 'Account':
        """One that goes another way from here on."""
        own = {k: copy.copy(v) for k, v in vars(self).items() if k != 'network'}
        return replace(self, **own | changes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the network."""
        return self.values['head.bias'].dtype

    @property
    def methods(self) -> list:
        """Of the injections."""
        return [mmpeft.METHODS.build(injection['method']) for injection in self.injections]

    @property
    def acts(self) -> bool:
        """Whether adapters change activations."""
        return any(not f.tensor for f in self.formulas)

    @property
    def drops(self) -> bool:
        """Whether a training step is random."""
        return any(getattr(f.method, 'dropout', 0) for f in self.formulas)

    @property
    def adapted(self) -> set[str]:
        """Plain names of the weights that have adapters."""
        return {f'{f.layer}.{f.tensor}' for f in self.formulas if f.tensor}

    def tied(self) -> set[str]:
        """Names of parameters of the plain network that are others, too."""
        every = {name for name, _ in self.network.named_parameters(remove_duplicate=False)}
        return every - {name for name, _ in self.network.named_parameters()}

    def through(self, path, tensor) -> list[str]:
        """Keys of all factors that a weight is read through; of tied ones the first."""
        found = [f for f in self.formulas if (f.layer, f.tensor) == (path, tensor)]
        return [self.ties.get(key, key) for f in found for key in f.keys.values()]

    def keys(self) -> set[str]:
        """Of the state dict."""
        adapted = self.adapted
        renamed = {
            f'{key.rpartition(".")[0]}.parametrizations.{key.rpartition(".")[2]}.original'
            if key in adapted
            else key
            for key in self.values
        }
        return renamed | set(self.factors)

    def frozen(self) -> set[str]:
        """Plain names of what an adapter file does not hold."""
        if not self.injections or any(method.trains_base for method in self.methods):
            return set()
        roots = [injection['targets']['module'] for injection in self.injections]
        return {k for k in self.values if k not in self.trains and any(map(below(k), roots))}

    def freeze(self, injection) -> None:
        """Account for what an injection does to the plain network."""
        method, root = mmpeft.METHODS.build(injection['method']), injection['targets']['module']
        self.injections.append(injection)
        if not method.trains_base:
            thawed = {key for each in self.injections for key in self._thawed(each)}
            self.trains -= {key for key in self.values if below(key)(root)} - thawed
            self.still |= {
                path
                for path, module in self.network.named_modules()
                if isinstance(module, STATISTICS) and (path == root or below(path)(root))
            }
        self.trains |= self._thawed(injection)

    def take_in(self, model, injection) -> None:
        """Account for an injection that was made into the model."""
        self.freeze(injection)
        names = {id(module): path for path, module in model.named_modules()}
        chains = Counter()
        for site in attached(model):
            start = f'{site.path}.parametrizations.{site.tensor}.{chains[site.name]}'
            chains[site.name] += 1
            if site.adapter.injection == len(self.injections) - 1:
                start = start if site.tensor else names[id(site.adapter)]
                self.formulas.append(Formula.of(site, start))
        first = {}
        for key, value in model.state_dict(keep_vars=True).items():
            self.ties[key] = first.setdefault(id(value), key)
        self.see(model)

    def see(self, model) -> None:
        """Take over what may have changed: all that trains, and statistics that are not held."""
        buffers = {name for name, _ in self.network.named_buffers()}
        held = {name for name in buffers if name.rpartition('.')[0] in self.still}
        own = {key for f in self.formulas for key in f.keys.values()}
        for key, value in state_of(model).items():
            if key in own:
                self.factors[key] = value
            elif plain(key) in self.trains | buffers - held:
                self.values[plain(key)] = value

    def effective(self, path, tensor, factors, original, training=False) -> Tensor:
        """phi(W) of a weight; in float64 where the original is."""
        if original.dtype == torch.float64:
            factors = {k: v.double() if v.is_floating_point() else v for k, v in factors.items()}
        value = original
        for formula in self.formulas:
            if (formula.layer, formula.tensor) == (path, tensor):
                value = formula.apply(value, factors, training)
                value = value if original.dtype == torch.float64 else value.to(original.dtype)
        return value

    def penalty(self, factors) -> Tensor:
        """Of all adapters, each once."""
        found = {tuple(self.ties[k] for k in f.keys.values()): f for f in reversed(self.formulas)}
        terms = [formula.penalty(factors) for formula in found.values()]
        return sum((term for term in terms if term is not None), torch.zeros(()))

    def merged(self) -> dict[str, Tensor]:
        """Values with the adapters in them."""
        values = dict(self.values)
        for name in self.adapted:
            path, _, tensor = name.rpartition('.')
            original = self.values[name].double()
            value = self.effective(path, tensor, self.factors, original=original)
            values[name] = value.to(self.dtype)
        return values

    def bare(self) -> nn.Module:
        """The plain network with the values."""
        net, leaves = copy.deepcopy(self.network), {}
        for path, module in net.named_modules():
            for name, own in module._parameters.items():
                if own is not None:
                    value = self.values[f'{path}.{name}' if path else name]
                    known = leaves.setdefault(id(own), nn.Parameter(value.clone()))
                    if not same_bits(known, value):  # what was tied is no longer
                        known = nn.Parameter(value.clone())
                    module._parameters[name] = known
            for name, own in module._buffers.items():
                if own is not None:
                    module._buffers[name] = self.values[f'{path}.{name}'].clone()
        for name, parameter in net.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in self.trains)
        return net

    def reference(self, modes) -> tuple[nn.Module, dict[str, Tensor]]:
        """A plain network that computes the same.

        Args:
            modes: Whether each module trains, by path.

        Returns:
            The network, its adapted weights no parameters but functions of
            the leaves; and the leaves that require gradients, by key.
        """
        net = self.bare()
        leaves = dict(net.named_parameters(remove_duplicate=False))
        shared = {}
        for key, value in self.factors.items():
            leaves[key] = shared.setdefault(self.ties[key], value.clone())
        for injection, method in zip(self.injections, self.methods, strict=True):
            if isinstance(method, ActivationMethod):
                mmpeft.inject(net, **injection | dict(execution='plain', empty=True))
        unwatch(net)  # its leaves are no parameters
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point())
        for path, module in net.named_modules():
            for name in list(module._parameters):
                if f'{path}.{name}' in leaves:
                    module._parameters[name] = leaves[f'{path}.{name}']
        for name in self.adapted:
            path, _, tensor = name.rpartition('.')
            layer = net.get_submodule(path)
            training = modes[path] and path not in self.still
            original = layer._parameters[tensor]
            weight = self.effective(path, tensor, leaves, original, training)
            del layer._parameters[tensor]
            setattr(layer, tensor, weight)
        for path, module in net.named_modules():
            module.training = modes.get(path, True) and path not in self.still
        return net, leaves

    def _thawed(self, injection):
        root = injection['targets']['module']
        prefix = f'{root}.' if root else ''
        every = list(self.network.named_parameters(remove_duplicate=False))
        matched = {
            id(p)
            for name, p in every
            if below(name)(root)
            and any(re.search(u, name.removeprefix(prefix)) for u in injection['unfreeze'])
        }
        return {name for name, p in every if id(p) in matched}


def below(name: str):
    """Whether a name is of something in a module."""
    return lambda root: not root or name.startswith(f'{root}.')


@dataclass
class Combined(Account):
    """phi(W) = W + sum_i w_i (phi_i(W) - W), for trained parameters too.

    Attributes:
        parts: Weight and account of each.
    """

    parts: list[tuple[float, Account]] = field(default_factory=list)

    @classmethod
    def over(cls, base, parts, heads) -> 'Combined':
        """Of parts on a base; ``heads`` is the part whose heads are taken, or None to mix."""
        injections = [each for _, part in parts for each in part.injections]
        roots = [each['targets']['module'] for each in injections]
        values = dict(base.values)
        for key, value in base.values.items():
            given = [(w, p.values[key]) for w, p in parts if key not in p.frozen()]
            if heads is not None and not any(map(below(key), roots)):
                given = [(1.0, heads.values[key])]
            if given and not value.is_floating_point():
                values[key] = max(given, key=lambda pair: pair[0])[1]
            elif given:
                added = sum(w * (v.double() - value.double()) for w, v in given)
                values[key] = (value.double() + added).to(value.dtype)
        return cls(
            base.network,
            values,
            set(),
            set().union(*(part.still for _, part in parts)),
            injections,
            [each for _, part in parts for each in part.formulas],
            {key: v for _, p in parts if p.acts for key, v in p.factors.items()},
            {key: t for _, p in parts if p.acts for key, t in p.ties.items()},
            parts=parts,
        )

    def frozen(self):
        return set.intersection(*(part.frozen() for _, part in self.parts))

    def effective(self, path, tensor, factors, original, training=False):
        return original + sum(
            weight * (part.effective(path, tensor, part.factors, original) - original)
            for weight, part in self.parts
        )
