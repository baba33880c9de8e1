"""Maps that are computed again are not saved, and equal what was not."""

import copy
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GlobalResponseNormMlp
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.execution.recompute import (
    cast,
    is_tagged,
    restored,
    saved_or_recomputed,
    tag_for_recompute,
    through,
)
from tests.cases import randomize
from tests.comparing import assert_as_plain, assert_equal, plain, results


def kept_bytes(model, x):
    """What autograd keeps for backward, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return y, sum(n for key, n in sizes.items() if key not in own)


@pytest.mark.parametrize('norm', [nn.LayerNorm(64), nn.RMSNorm(64), nn.GELU(), nn.SiLU()])
def test_a_norms_output_is_not_kept(norm):
    tokens, kept = 100, {}
    for way in ('auto', 'plain'):
        model = nn.Sequential(copy.deepcopy(norm), nn.Linear(64, 80)).double()
        mmpeft.inject(model, dict(type='LoRA', rank=2), execution=way)
        x = torch.randn(tokens, 64, dtype=torch.float64, requires_grad=True)
        y, kept[way] = kept_bytes(model, x)
        y.sum().backward()
    assert kept['plain'] - kept['auto'] > tokens * 64 * 8 * 0.9


def test_an_input_that_was_changed_is_kept_itself():
    x = torch.randn(4, 3, requires_grad=True)
    y = tag_for_recompute(F.gelu(x), F.gelu, x)
    assert saved_or_recomputed([y])[1] == [x]
    y = y.add_(1)
    assert saved_or_recomputed([y])[1] == [y]

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.norm(x).add_(1))

    model = Shifted().double()
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    randomize(model)
    assert_as_plain(model, x.double().detach())


def test_a_tag_follows_a_cast():
    x = torch.randn(4, 3, requires_grad=True)
    y = cast(tag_for_recompute(F.gelu(x), F.gelu, x), torch.bfloat16)
    recipes, kept = saved_or_recomputed([y])
    assert kept == [x] and torch.equal(restored(recipes, kept)[0][0], y)


def test_what_needs_no_gradient_has_no_tag():
    x = torch.randn(4, 3)
    y = tag_for_recompute(F.gelu(x), F.gelu, x)
    assert saved_or_recomputed([y]) == ([None], [y])


def test_backward_computes_a_map_once_for_all_that_need_it():
    calls = []

    def double(x):
        calls.append(1)
        return 2 * x

    x = torch.randn(4, 3, requires_grad=True)
    y = tag_for_recompute(2 * x, double, x)
    first, kept = saved_or_recomputed([y])
    second, others = through(torch.neg, y)
    with torch.no_grad():
        for passes in (1, 2):
            assert torch.equal(second(*others), -2 * x)
            assert torch.equal(restored(first, kept)[0][0], 2 * x) and len(calls) == passes
    assert y._mmpeft_recompute[0].value is None  # nothing is held after backward


def test_a_response_norm_keeps_the_input_of_the_activation_alone():
    """Of the maps of a ConvNeXt-V2 MLP: x, and the four times wider input of the GELU."""
    mlp = GlobalResponseNormMlp(64, 256).double()
    mmpeft.inject(mlp, dict(type='LoRA', rank=1))
    x = torch.randn(2, 10, 10, 64, dtype=torch.float64, requires_grad=True)
    _, kept = kept_bytes(mlp, x)
    assert 5 * x.nbytes <= kept < 5.2 * x.nbytes


@pytest.mark.parametrize(
    'around', [save_on_cpu, partial(saved_tensors_hooks, torch.clone, torch.clone)]
)
@pytest.mark.parametrize('memory', ['speed', 'small'])
def test_a_tag_from_outside_a_checkpoint_does_not_count_in_it(memory, around):
    """Under other hooks a second run gets its input as another object, without the tag."""

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 2, 2), nn.BatchNorm2d(16)
            self.act = nn.SiLU(inplace=True)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(16, 32, 1), nn.GELU(), nn.Conv2d(32, 16, 1), nn.SiLU())
                for _ in range(2)
            )

        def forward(self, x):
            x = self.act(self.norm(self.stem(x)))
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if memory == 'speed' else block(x)
            return x

    torch.manual_seed(0)
    model, x = Blocks().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    mmpeft.inject(model, dict(type='FLoRA', rank=2), memory=memory)
    randomize(model)

    def run(x):
        with around():
            return model(x)

    found = results(model, x, run)
    with plain(model):
        assert_equal(found, results(model, x), 1e-10)


def test_a_tag_from_a_checkpoint_does_not_count_behind_it():
    """What it needs would be kept outside."""
    x = torch.randn(4, 3, requires_grad=True)

    def block(x):
        hidden = x * 2
        y = tag_for_recompute(F.silu(hidden), F.silu, hidden)
        assert is_tagged(y)
        return y

    y = checkpoint(block, x, use_reentrant=False)
    assert not is_tagged(y)
    y.sum().backward()
    gc.collect()
    assert not is_tagged(y)  # also when the checkpoint is gone
