"""Equal factors give equal outputs and gradients in peft and LyCORIS, attached and merged.

They are compared where they are right. peft's LoRA on kernels knows no
dilation, groups or padding modes, its LoKr on Conv1d no Tucker layout; its
(IA)^3 scales the bias along, and so has none here. LyCORIS squares the scale
when it merges, which is 1 then.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peft
import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
from mmpeft.injection.weights import weights_of
from mmpeft.methods.pissa import PiSSA
from tests.cases import SelfAttention, randomize

pytestmark = pytest.mark.filterwarnings('ignore')

TOLERANCE = dict(rtol=1e-10, atol=1e-11)
LINEAR = nn.Linear(24, 40), (5, 3, 24)
EMBEDDING = nn.Embedding(30, 12), (5, 3)
CONV1D = nn.Conv1d(12, 24, 5, stride=2, padding=1), (2, 12, 15)
CONV2D = nn.Conv2d(12, 24, 3, stride=2, padding=1), (2, 12, 9, 9)
CONV2D_WIDE = nn.Conv2d(12, 24, (3, 5), padding=(0, 2)), (2, 12, 7, 7)
CONV2D_1X1 = nn.Conv2d(12, 24, 1), (2, 12, 5, 5)
CONV2D_GROUPS = nn.Conv2d(12, 24, 3, dilation=2, groups=2), (2, 12, 9, 9)
DEPTHWISE = nn.Conv2d(12, 12, 5, padding=2, groups=12), (2, 12, 7, 7)
CONV3D = nn.Conv3d(6, 12, (1, 3, 2)), (1, 6, 3, 5, 5)


@dataclass
class Case:
    """A method of ours and its equal.

    Attributes:
        base: The layer and the size of an input.
        config: Our method.
        peer: peft's configuration, or what makes LyCORIS' module of a layer.
        names: Our factors' names to the peer's; those that it stores
            transposed end in ``.T``.
        shift: What the peer's factors have more than ours.
        wrong: Factors for which the peer's gradient is wrong.
    """

    base: tuple[nn.Module, tuple[int, ...]]
    config: dict
    peer: object
    names: dict[str, str]
    shift: float = 0.0
    wrong: tuple[str, ...] = ()

    def input(self):
        layer, size = self.base
        if isinstance(layer, nn.Embedding):
            return torch.randint(layer.num_embeddings, size)
        return torch.randn(size, dtype=torch.float64)

    def ours(self):
        """Our model and its factors."""
        model = nn.Sequential(copy.deepcopy(self.base[0])).double()
        mmpeft.inject(model, self.config, dict(kinds=('conv', 'linear', 'embedding')))
        randomize(model)
        return model, adapters_of(model[0], 'weight')[0].factors

    def written(self, name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A factor of ours as the peer stores it."""
        if self.names[name].endswith('.T'):
            value = value.T
        return (value + self.shift).reshape(like.shape)

    def copy_factors(self, factors: dict, theirs: Callable[[str], torch.Tensor]) -> dict:
        """Give the peer our factors; returns the peer's by our names."""
        peers = {name: theirs(path.removesuffix('.T')) for name, path in self.names.items()}
        with torch.no_grad():
            for name, value in peers.items():
                value.copy_(self.written(name, factors[name], value))
        assert set(peers) == set(factors)
        return peers


def close(a, b):
    torch.testing.assert_close(a, b, **TOLERANCE)


def with_peft(model: nn.Sequential, config, dtype=torch.float64) -> tuple[nn.Module, Callable]:
    """The model with a peft adapter on its layer, and how to find its factors."""
    config.target_modules = {'0'}
    model = peft.get_peft_model(model.to(dtype), config).base_model.model.to(dtype)

    def find(path):
        holder = model[0]
        for name in path.split('.'):
            holder = holder['default'] if name == 'default' else getattr(holder, name)
        return holder

    return model, find


def assert_equal_gradients(case, ours, factors, theirs, peers, x):
    upstream = torch.randn_like(ours(x))
    for model in (ours, theirs):
        model.zero_grad()
        (model(x) * upstream).sum().backward()
    for name, value in peers.items():
        if factors[name].requires_grad and name not in case.wrong:
            close(case.written(name, factors[name].grad, value) - case.shift, value.grad)


LORA = dict(lora_A='lora_A.default.weight', lora_B='lora_B.default.weight')
DORA = LORA | dict(magnitude='lora_magnitude_vector.default.weight')
ADALORA = dict(lora_A='lora_A.default', lora_B='lora_B.default', lora_E='lora_E.default')
VERA = dict(
    vera_A='vera_A.default',
    vera_B='vera_B.default',
    vera_b='vera_lambda_b.default',
    vera_d='vera_lambda_d.default',
)
LOHA = dict(loha_B1='hada_w1_a', loha_A1='hada_w1_b', loha_B2='hada_w2_a', loha_A2='hada_w2_b')
LOHA_TUCKER = LOHA | dict(
    loha_B1='hada_w1_a.T', loha_B2='hada_w2_a.T', loha_T1='hada_t1', loha_T2='hada_t2'
)
LOKR = dict(lokr_C='lokr_w1', lokr_B='lokr_w2_a', lokr_A='lokr_w2_b')
LOKR_TUCKER = LOKR | dict(lokr_B='lokr_w2_a.T', lokr_T='lokr_t2')
LOKR_BOTH = dict(lokr_C1='lokr_w1_a', lokr_C2='lokr_w1_b', lokr_B='lokr_w2_a', lokr_A='lokr_w2_b')
LOKR_WHOLE = dict(lokr_C='lokr_w1', lokr_block='lokr_w2')


def in_peft(names):
    """Names of LyCORIS' factors as peft keeps them."""
    return {
        ours: path.removesuffix('.T') + '.default' + path[len(path.removesuffix('.T')) :]
        for ours, path in names.items()
    }


def lora(base):
    config = dict(type='LoRA', rank=3, alpha=6, layout='channel')
    return Case(base, config, peft.LoraConfig(r=3, lora_alpha=6), LORA)


def dora(base):
    config = dict(type='DoRA', rank=3, alpha=6, layout='channel', detach_norm=True)
    return Case(base, config, peft.LoraConfig(r=3, lora_alpha=6, use_dora=True), DORA)


def adalora(base):
    # peft divides by the rank and 1e-5.
    scale = 6 / (3 + 1e-5)
    config = dict(type='AdaLoRA', rank=2, init_rank=3, scale=scale, layout='channel')
    peer = peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=6, total_step=10)
    return Case(base, config, peer, ADALORA)


def loha(base, names, effective=True):
    config = dict(type='LoHa', rank=4, alpha=2, layout='tucker' if effective else 'channel')
    peer = peft.LoHaConfig(r=4, alpha=2, use_effective_conv2d=effective)
    # The gradient of B1 contracts the factors of B2's side, and the reverse.
    wrong = ('loha_B1', 'loha_B2') if names is LOHA_TUCKER else ()
    return Case(base, config, peer, in_peft(names), wrong=wrong)


def lokr(base, names, effective=True, rank=1, factor=-1, both=False):
    layout = 'tucker' if effective else 'channel'
    config = dict(type='LoKr', rank=rank, alpha=0.5, factor=factor, layout=layout)
    peer = peft.LoKrConfig(
        r=rank,
        alpha=0.5,
        use_effective_conv2d=effective,
        decompose_factor=factor,
        decompose_both=both,
    )
    return Case(base, config | dict(decompose_both=both), peer, in_peft(names))


def scaling(base, type, factor):
    layer = copy.deepcopy(base[0])
    layer.bias = None
    peer = peft.IA3Config(feedforward_modules=['0'] if type == 'SSL' else [])
    return Case((layer, base[1]), dict(type=type), peer, {factor: 'ia3_l.default'}, shift=1.0)


PEFT = dict(
    lora_linear=lora(LINEAR),
    lora_conv1d=lora(CONV1D),
    lora_conv2d=lora(CONV2D),
    lora_conv2d_wide=lora(CONV2D_WIDE),
    lora_conv3d=lora(CONV3D),
    lora_embedding=Case(
        EMBEDDING,
        dict(type='LoRA', rank=3, alpha=6),
        peft.LoraConfig(r=3, lora_alpha=6),
        dict(lora_B='lora_embedding_A.default.T', lora_A='lora_embedding_B.default.T'),
    ),
    dora_linear=dora(LINEAR),
    dora_conv2d=dora(CONV2D),
    adalora_linear=adalora(LINEAR),
    adalora_conv2d=adalora(CONV2D),
    vera_linear=Case(LINEAR, dict(type='VeRA', rank=7), peft.VeraConfig(r=7), VERA),
    loha_linear=loha(LINEAR, LOHA),
    loha_conv1d=loha(CONV1D, LOHA_TUCKER),
    loha_conv2d=loha(CONV2D, LOHA_TUCKER),
    loha_conv2d_wide=loha(CONV2D_WIDE, LOHA_TUCKER),
    loha_conv2d_1x1=loha(CONV2D_1X1, LOHA),
    loha_conv2d_groups=loha(CONV2D_GROUPS, LOHA_TUCKER),
    loha_conv2d_channel=loha(CONV2D, LOHA, effective=False),
    loha_depthwise_channel=loha(DEPTHWISE, LOHA, effective=False),
    lokr_linear=lokr(LINEAR, LOKR),
    lokr_linear_factor=lokr(LINEAR, LOKR, rank=3, factor=2),
    lokr_linear_both=lokr(LINEAR, LOKR_BOTH, both=True),
    lokr_linear_whole=lokr(LINEAR, LOKR_WHOLE, rank=4),
    lokr_conv1d_channel=lokr(CONV1D, LOKR, effective=False),
    lokr_conv2d=lokr(CONV2D, LOKR_TUCKER),
    lokr_conv2d_wide=lokr(CONV2D_WIDE, LOKR_TUCKER),
    lokr_conv2d_1x1=lokr(CONV2D_1X1, LOKR),
    lokr_conv2d_groups=lokr(CONV2D_GROUPS, LOKR_TUCKER),
    lokr_conv2d_channel=lokr(CONV2D, LOKR, effective=False),
    lokr_conv2d_whole=lokr(CONV2D, LOKR_WHOLE, rank=6),
    lokr_depthwise=lokr(DEPTHWISE, LOKR_TUCKER),
    ia3_linear=scaling(LINEAR, 'IA3', 'shift_out'),
    ia3_conv2d=scaling(CONV2D, 'IA3', 'shift_out'),
    ia3_conv2d_groups=scaling(CONV2D_GROUPS, 'IA3', 'shift_out'),
    ssl_linear=scaling(LINEAR, 'SSL', 'shift_in'),
    ssl_conv2d=scaling(CONV2D, 'SSL', 'shift_in'),
    ssl_conv2d_groups=scaling(CONV2D_GROUPS, 'SSL', 'shift_in'),
)


@pytest.mark.parametrize('name', PEFT)
def test_equals_peft(name):
    case = PEFT[name]
    ours, factors = case.ours()
    plain = nn.Sequential(copy.deepcopy(case.base[0]))
    theirs, find = with_peft(plain, copy.deepcopy(case.peer))
    peers = case.copy_factors(factors, find)
    x = case.input()
    close(ours(x), theirs(x))
    assert_equal_gradients(case, ours, factors, theirs, peers, x)
    mmpeft.merge(ours)
    theirs[0].merge()
    close(ours(x), theirs(x))
    close(ours[0].weight, theirs[0].base_layer.weight)


def test_lora_on_attention_equals_peft():
    """The input projection alone: peft adds the output projection's update twice."""
    plain = SelfAttention().double()
    ours = copy.deepcopy(plain)
    mmpeft.inject(ours, dict(type='LoRA', rank=3, alpha=6), dict(include=['attn.in_proj_weight']))
    randomize(ours)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=['attn'])
    theirs = peft.get_peft_model(plain, config).base_model.model.double()
    factors = adapters_of(ours.attn, 'in_proj_weight')[0].factors
    theirs.attn.lora_A['default'].weight.data = factors['lora_A'].data.clone()
    theirs.attn.lora_B['default'].weight.data = factors['lora_B'].data.clone()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    close(ours(x), theirs(x))
    mmpeft.merge(ours)
    theirs.attn.merge()
    close(ours(x), theirs(x))


@pytest.mark.parametrize('alpha', [4, 1])
def test_pissa_starts_and_trains_as_pefts(alpha):
    layer, size = copy.deepcopy(LINEAR[0]), LINEAR[1]
    method = PiSSA(rank=4, alpha=alpha)
    weight = layer.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=alpha, init_lora_weights='pissa')
    theirs, find = with_peft(nn.Sequential(copy.deepcopy(layer)), config, dtype=torch.float32)
    a, b = find('lora_A.default.weight'), find('lora_B.default.weight')

    factors = method.init(weight, dict(weights_of(layer))['weight'])
    loose = dict(rtol=1e-5, atol=1e-6)
    for ours, peer in ((factors['start_A'], a), (factors['start_B'].T, b.T)):
        q1, q2 = (torch.linalg.qr(rows.detach().T)[0] for rows in (ours, peer))
        torch.testing.assert_close(q1 @ q1.T, q2 @ q2.T, **loose)
        torch.testing.assert_close(ours.norm(dim=1), peer.detach().norm(dim=1), **loose)
    torch.testing.assert_close(factors['start_B'] @ factors['start_A'], (b @ a).detach(), **loose)

    # From here on in float64; a singular pair may differ in its sign.
    model = nn.Sequential(layer).double()
    mmpeft.inject(model, dict(type='PiSSA', rank=4, alpha=alpha))
    randomize(model)
    ours = adapters_of(model[0], 'weight')[0].factors
    theirs.double()
    with torch.no_grad():
        start = ours['start_B'] @ ours['start_A']
        theirs[0].base_layer.weight.copy_(weight - alpha / 4 * start)
        a.copy_(ours['start_A'] + ours['lora_A'])
        b.copy_(ours['start_B'] + ours['lora_B'])
    x = torch.randn(size, dtype=torch.float64)
    close(model(x), theirs(x))
    upstream = torch.randn_like(model(x))
    (model(x) * upstream).sum().backward()
    (theirs(x) * upstream).sum().backward()
    close(ours['lora_A'].grad, a.grad)
    close(ours['lora_B'].grad, b.grad)
    mmpeft.merge(model)
    theirs[0].merge()
    close(model[0].weight, theirs[0].base_layer.weight)


def lycoris(module, base, names, rank=4, layout='tucker', **options):
    """A function of the scale that gives a case."""
    type = {LohaModule: 'LoHa', LokrModule: 'LoKr'}[module]
    tucker = layout == 'tucker'

    def case(scale):
        peer = partial(
            module, 'peer', lora_dim=rank, alpha=scale * rank, use_tucker=tucker, **options
        )
        config = dict(type=type, rank=rank, scale=scale, layout=layout)
        return Case(base, config | options, peer, names)

    return case


loha_module, lokr_module = partial(lycoris, LohaModule), partial(lycoris, LokrModule, rank=1)
LYCORIS = dict(
    loha_linear=loha_module(LINEAR, LOHA),
    loha_conv1d=loha_module(CONV1D, LOHA_TUCKER),
    loha_conv2d=loha_module(CONV2D, LOHA_TUCKER),
    loha_conv2d_wide=loha_module(CONV2D_WIDE, LOHA_TUCKER),
    loha_conv2d_1x1=loha_module(CONV2D_1X1, LOHA),
    loha_conv2d_groups=loha_module(CONV2D_GROUPS, LOHA_TUCKER),
    loha_conv2d_channel=loha_module(CONV2D, LOHA, layout='channel'),
    loha_conv3d=loha_module(CONV3D, LOHA_TUCKER),
    loha_depthwise=loha_module(DEPTHWISE, LOHA_TUCKER, rank=1),
    lokr_linear=lokr_module(LINEAR, LOKR),
    lokr_linear_factor=lokr_module(LINEAR, LOKR, factor=2, rank=3),
    lokr_linear_both=lokr_module(LINEAR, LOKR_BOTH, decompose_both=True),
    lokr_conv1d=lokr_module(CONV1D, LOKR_TUCKER),
    lokr_conv2d=lokr_module(CONV2D, LOKR_TUCKER),
    lokr_conv2d_wide=lokr_module(CONV2D_WIDE, LOKR_TUCKER),
    lokr_conv2d_1x1=lokr_module(CONV2D_1X1, LOKR),
    lokr_conv2d_groups=lokr_module(CONV2D_GROUPS, LOKR_TUCKER),
    lokr_conv2d_channel=lokr_module(CONV2D, LOKR, layout='channel'),
    lokr_conv3d=lokr_module(CONV3D, LOKR_TUCKER),
    lokr_depthwise=lokr_module(DEPTHWISE, LOKR_TUCKER),
)


@pytest.mark.parametrize('name', LYCORIS)
@pytest.mark.parametrize('scale', [0.5, 1.0])
def test_equals_lycoris(name, scale):
    case = LYCORIS[name](scale)
    ours, factors = case.ours()
    base = copy.deepcopy(case.base[0]).double()
    theirs = case.peer(base).double()
    peers = case.copy_factors(factors, theirs.get_parameter)
    x = case.input()
    close(ours(x), theirs(x))
    assert_equal_gradients(case, ours, factors, theirs, peers, x)
    if scale == 1:
        merged, _ = theirs.get_merged_weight(shape=theirs.shape)
        mmpeft.merge(ours)
        close(ours[0].weight, merged)
