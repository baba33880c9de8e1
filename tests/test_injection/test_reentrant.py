"""Reentrant checkpointing behind a frozen stem, in models of all kinds."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.injection.reentrant import _trains
from mmpeft.injection.site import adapter_parameters, named_adapters
from tests.hf_zoo import HF
from tests.zoo import TIMM, Network

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


class Block(nn.Module):
    """A block of mmdet's kind, which recomputes a function of its own."""

    with_cp = False

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        def inner(x):
            return x + self.fc2(self.fc1(x).relu())

        return checkpoint(inner, x, use_reentrant=True) if self.with_cp else inner(x)


class Words(nn.Module):
    """Recomputes what begins with indices, too, and is given keyword arguments."""

    with_cp = False

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Embedding(40, 4), nn.Linear(4, 4))
        self.block = Block()

    def forward(self, words):
        if not self.with_cp:
            return self.block(self.first(words))
        x = checkpoint(self.first, words, use_reentrant=True)
        return checkpoint(lambda x: self.block(x), x, use_reentrant=True)


def with_cp(model):
    for module in model.modules():
        module.with_cp = True


def in_transformers(model):
    model.gradient_checkpointing_enable(dict(use_reentrant=True))


def in_timm(model):
    model.set_grad_checkpointing()


NETWORKS = dict(
    hand=(
        Network(
            lambda: nn.Sequential(nn.Linear(4, 4), Block(), Block()), lambda: (torch.randn(2, 4),)
        ),
        with_cp,
    ),
    words=(Network(Words, lambda: (torch.tensor([[1, 5, 7]]),)), with_cp),
    bert=(HF['bert'], in_transformers),
    gpt2=(HF['gpt2'], in_transformers),
    llama=(HF['llama'], in_transformers),
    vit=(HF['vit'], in_transformers),
    timm_vit=(TIMM['vit'], in_timm),
    timm_convnext=(TIMM['convnext'], in_timm),
)
METHODS = dict(
    lora=(dict(type='LoRA', rank=2), dict(kinds=('linear',))),
    houlsby=(dict(type='HoulsbyAdapter'), {}),
)


def gradients(network, method, targets, recompute=None):
    torch.manual_seed(0)
    model = network.build().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    mmpeft.inject(model, method, targets)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    if recompute is not None:
        recompute(model)
    torch.manual_seed(1)
    given = network.inputs()
    given = {k: _double(v) for k, v in given.items()} if isinstance(given, dict) else given
    output = model(**given) if isinstance(given, dict) else model(*map(_double, given))
    output = output[0] if not torch.is_tensor(output) else output
    (
        output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    ).sum().backward()
    return {
        f'{path}.{name}': p.grad
        for path, adapter in named_adapters(model).items()
        for name, p in adapter.named_parameters()
    }


def _double(value):
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


@pytest.mark.parametrize(
    'name, method',
    [
        (name, method)
        for name in NETWORKS
        for method in METHODS
        if method != 'houlsby' or name not in ('hand', 'words', 'gpt2', 'timm_convnext')
    ],
)
def test_every_adapter_gets_the_gradient_that_it_gets_without(name, method, monkeypatch):
    monkeypatch.setattr('timm.layers.use_reentrant_ckpt', lambda: True)
    monkeypatch.setattr('timm.models._manipulate.use_reentrant_ckpt', lambda: True)
    network, recompute = NETWORKS[name]
    expected = gradients(network, *METHODS[method])
    found = gradients(network, *METHODS[method], recompute)
    for key, value in found.items():
        if expected[key] is None:  # not part of this output, such as BERT's pooler
            assert value is None
            continue
        assert value is not None and value.any(), key
        torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-12)


def test_a_segment_in_which_nothing_trains_stays_without_gradient():
    frozen, adapted = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
    mmpeft.inject(adapted, dict(type='LoRA', rank=1))
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match='None of the inputs have requires_grad=True'):
        assert not checkpoint(frozen, x, use_reentrant=True).requires_grad
    assert checkpoint(adapted, x, use_reentrant=True).requires_grad and not x.requires_grad
    with torch.no_grad():
        assert not checkpoint(adapted, x, use_reentrant=True).requires_grad
    assert _trains(adapted.forward) and not _trains(frozen.forward)


def test_all_adapters_move_in_transformers():
    """Two of thirty trainable tensors moved, and the loss still fell."""
    network = HF['bert']
    model = network.build()
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(include=r'encoder\.'))
    model.gradient_checkpointing_enable()
    model.train()
    assert isinstance(model, hf.PreTrainedModel)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        network.loss(model).backward()
        optimizer.step()
    assert len(trained) == 24
    assert not [name for name, p in trained.items() if torch.equal(p, before[name])]
