"""``scale='auto'``: what its derivation predicts of a step of Adam, and where its number goes."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import mmpeft
from mmpeft.analysis.updates import updates
from mmpeft.checkpoint.manifest import check_manifest, describe
from mmpeft.engine.injections import inject_all, injections
from mmpeft.errors import UsageError
from mmpeft.injection.site import attached
from tests.adapting import spec_of

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
RATE = 1e-4
METHODS = dict(
    lora=dict(type='LoRA', rank=4),
    loralib=dict(type='LoRA', rank=4, layout='loralib'),
    flora=dict(type='FLoRA', rank=16, kernel_rank=2),
    flora_unit=dict(type='FLoRA', rank=16, kernel_rank=2, init_std=1.0),
    flora_factor=dict(type='FLoRA', rank=16, kernel_rank=2, zero='factor0'),
    liera=dict(type='LieRA', rank=4),
    liera_exact=dict(type='LieRA', rank=4, layout='loralib', update='lie_exact'),
    flora_lie=dict(type='FLoRA', rank=16, update='lie'),
)
LAYERS = dict(
    linear=(lambda: nn.Linear(160, 240, bias=False), (512, 160)),
    conv=(lambda: nn.Conv2d(48, 96, 3, bias=False), (8, 48, 10, 10)),
    depthwise=(lambda: nn.Conv2d(192, 192, 7, groups=192, bias=False), (8, 192, 14, 14)),
)


def random(layer):
    nn.init.normal_(layer.weight, std=0.03)


def realistic(layer):
    """A few strong directions, rows of different size, kernels with a centre."""
    with torch.no_grad():
        weight = layer.weight.flatten(1)
        u, s, vh = torch.linalg.svd(torch.randn_like(weight), full_matrices=False)
        weight = (u * torch.arange(1, len(s) + 1) ** -0.7) @ vh
        weight = weight * (0.5 * torch.randn(len(weight), 1)).exp()
        if layer.weight.ndim == 4:
            line = torch.linspace(-1.5, 1.5, layer.weight.shape[-1])
            weight = weight.view_as(layer.weight) * (-(line[:, None] ** 2) - line**2).exp()
        layer.weight.copy_(0.1 * weight.view_as(layer.weight))


def step(model, size):
    """One step of Adam towards random outputs, from isotropic inputs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE, eps=0)
    x = torch.randn(size, dtype=torch.float64)
    y = model(x)
    F.mse_loss(y, torch.randn_like(y)).backward()
    for parameter in trained:  # of factors whose gradient is zero nothing moves
        if not parameter.grad.any():
            parameter.grad = None
    optimizer.step()


@pytest.mark.parametrize('name', [name for name in METHODS if 'lie' not in name])
def test_the_constant_over_many_starts(name):
    """c: the root mean square of dW where the factor that starts at zero has random signs."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 40), nn.Conv2d(6, 20, 3), nn.Conv2d(12, 12, 5, groups=12)]
    method = mmpeft.METHODS.build(METHODS[name] | dict(rank=3))
    for layer in layers:
        weight, spec, squares = layer.weight.double(), spec_of(layer), []
        for _ in range(400):
            factors = method.init(weight, spec)
            (zero,) = (name for name, value in factors.items() if not value.any())
            factors[zero] = torch.randint_like(factors[zero], 2) * 2 - 1
            squares.append(method.delta(factors, spec).square().mean().item())
        assert method.first_step(spec) == pytest.approx(np.sqrt(np.mean(squares)), rel=0.1)


@pytest.mark.parametrize('weights', [random, realistic])
@pytest.mark.parametrize('name', METHODS)
def test_the_first_step_changes_outputs_as_predicted(name, weights):
    """On fresh isotropic inputs, by rate * s * c / rms(W), or rate * s * c of a Lie update.

    The few numbers of FLoRA's factors on the axes of a kernel, in one draw, move it by up to a
    factor of 4, and weights that few elements dominate under a Lie update by 2. A Gaussian core of
    few numbers is not isotropic.
    """
    for layer, (make, size) in LAYERS.items():
        torch.manual_seed(1)
        model = nn.Sequential(make().double())
        weights(model[0])
        mmpeft.inject(model, METHODS[name] | dict(scale=3.0))
        (site,), x = attached(model), torch.randn(size, dtype=torch.float64)
        expected = RATE * 3 * site.method.first_step(site.spec)
        if site.method.update == 'additive':
            expected /= site.original.square().mean().sqrt().item()
        before = model(x).detach()
        step(model, size)
        ratio = ((model(x) - before).norm() / before.norm()).item() / expected
        if 'flora' in name and layer != 'linear':
            assert 1 / 4 < ratio < 4, layer
        elif 'lie' in name and weights is realistic:
            assert 1 / 2 < ratio < 2, layer
        else:
            assert ratio == pytest.approx(1, rel=0.3 if name == 'flora_factor' else 0.15), layer


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 32, 7, padding=3, groups=32), nn.GELU(),
            nn.Conv2d(32, 128, 1), nn.GELU(), nn.Conv2d(128, 32, 1),
        )  # fmt: skip
        for layer in self.backbone[::2]:
            nn.init.normal_(getattr(layer, 'weight', torch.empty(1)), std=0.04)

    def forward(self, x):
        return self.backbone(x)


def network():
    torch.manual_seed(0)
    return Network().double()


@pytest.mark.parametrize('name', [name for name in METHODS if name != 'flora_unit'])
def test_the_first_step_is_as_large_as_that_of_the_weights_themselves(name):
    """Together, in Frobenius norm: Adam moves each of their elements by the rate."""
    sizes = []
    for seed in range(6):  # of the factors
        model = network()
        torch.manual_seed(seed)
        mmpeft.inject(model, METHODS[name] | dict(rank=3, scale='auto'))
        step(model, (8, 3, 32, 32))
        found = list(updates(model))
        whole = RATE * sum(update.delta.numel() for update in found) ** 0.5
        sizes.append(sum(update.delta.norm().item() ** 2 for update in found) ** 0.5 / whole)
    assert np.mean(sizes) == pytest.approx(1, rel=0.2), sizes


def test_the_number():
    """s^2 sum(n c^2 w^2) = sum(n), by numpy; additive ones need no values."""
    model = network()
    weights = [p.detach().numpy() for p in model.parameters() if p.ndim > 1]
    counts = np.array([w.size for w in weights])
    lora = np.sqrt([4 / (3 * w.size / len(w)) for w in weights])
    sizes = np.array([np.sqrt((w**2).mean()) for w in weights])
    for name, constant in (('lora', lora), ('liera', lora * sizes), ('flora_lie', sizes)):
        other = copy.deepcopy(model)
        mmpeft.inject(other, METHODS[name] | dict(scale='auto'))
        exact = np.sqrt(counts.sum() / (counts * constant**2).sum())
        assert other.peft[0].method.scale == pytest.approx(exact, rel=0.05)
        assert float(f'{exact:.1e}') == other.peft[0].method.scale
    other = copy.deepcopy(model).to('meta')
    mmpeft.inject(other, METHODS['flora'] | dict(scale='auto'))
    assert other.peft[0].method.scale == 1
    for parameter in model.parameters():
        parameter.detach().zero_()
    with pytest.raises(UsageError, match='they are zero or infinite'):
        mmpeft.inject(model, METHODS['liera'] | dict(scale='auto'))


@pytest.mark.parametrize(
    'name, lora, loralib', [('convnextv2_base', 12, 13), ('vit_base_patch16_224', 14, 7.6)]
)
def test_the_table_of_docs_scale(name, lora, loralib):
    with torch.device('meta'):
        model = timm.create_model(name)
    for layout, expected in dict(channel=lora, loralib=loralib).items():
        mmpeft.inject(model, dict(type='LoRA', rank=16, layout=layout, scale='auto'))
        assert model.peft[0].method.scale == expected
        mmpeft.remove(model)


def test_files_and_the_summary_have_the_number(tmp_path):
    model, method = network(), METHODS['liera'] | dict(scale='auto')
    base = copy.deepcopy(model)
    mmpeft.inject(model, method)
    scale = model.peft[0].method.scale
    assert isinstance(scale, float) and f'scale={scale}' in str(mmpeft.summary(model))
    manifest = describe(model)
    stored = [each['scale'] for each in manifest['methods']]
    assert stored == [scale] == [manifest['injections'][0]['method']['scale']]
    step(model, (2, 3, 32, 32))
    mmpeft.save_adapter(model, tmp_path / 'adapter.safetensors')
    other = copy.deepcopy(base)
    mmpeft.load_adapter(other, tmp_path / 'adapter.safetensors')
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(other(x), model(x))
    manifest['methods'][0]['scale'] = 'auto'
    with pytest.raises(UsageError, match="scale='auto' in place of a number"):
        check_manifest(manifest)


def test_a_checkpoint_of_a_config_keeps_its_number():
    """Also over weights from which another one would follow."""
    model, method = network(), METHODS['liera'] | dict(scale='auto')
    inject_all(model, injections(method))
    manifest, other = describe(model), network()
    with torch.no_grad():
        other.backbone[0].weight.mul_(30)
    inject_all(other, injections(method), manifest)
    assert other.peft[0].method == model.peft[0].method
    plain = network()
    with torch.no_grad():
        plain.backbone[0].weight.mul_(30)
    inject_all(plain, injections(method))
    assert plain.peft[0].method != model.peft[0].method
