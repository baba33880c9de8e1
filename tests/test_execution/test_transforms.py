"""What torch records or transforms is computed by torch's operations alone, and is the same."""

import os
from functools import partial

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mmpeft
from mmpeft import execution
from mmpeft.methods import ActivationMethod
from tests.cases import (
    METHODS,
    NO_PLACE,
    Attention,
    Bottleneck,
    ConvNeXtBlock,
    Patches,
    TransformerBlock,
    randomize,
)
from tests.comparing import assert_equal, plain, results
from tests.test_execution.tables import LARGE, NORMAL, adapted

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

NETWORKS = dict(
    vit=lambda: VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=4
    ),
    convnext=lambda: ConvNeXt(
        depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), use_grn=True, ls_init_value=None, num_classes=4
    ),
    resnet=lambda: ResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, channels=(8, 8, 16, 16)),
)
FAMOUS = ('lora_channel', 'flora', 'liera', 'dora')
# A block, the size of its input, and two of its layers.
COMPILED = dict(
    vit=(
        lambda: nn.Sequential(Patches(8, flat=True), TransformerBlock(Attention(8), 8)),
        (2, 3, 4, 6),
        r'qkv|mlp\.0',
    ),
    convnext=(lambda: ConvNeXtBlock(6, channels_last=True), (2, 6, 4, 4), r'conv_dw|mlp\.0'),
    resnet=(lambda: Bottleneck(4, 4, 1), (2, 4, 5, 5), r'conv[12]'),
)
LAYERS = (lambda: nn.Linear(5, 6), lambda: nn.Conv2d(4, 4, 3, padding=1))
EVERY = bool(os.environ.get('MMPEFT_EVERY_PAIR'))
CASES = ('large_linear', 'pointwise_strided', 'kernel', 'circular', 'large_depthwise', 'sequence')
FORMS = ('lora', 'lora_channel', 'flora', 'lotr', 'liera', 'flora_lie_exact', 'dora', 'vera')


def network(kind, name):
    torch.default_generator.manual_seed(0)
    model = NETWORKS[kind]()
    mmpeft.inject(model, METHODS[name])
    randomize(model, 0.02)
    return model


def assert_compiled(model, x, tolerance):
    model(x)  # the first pass checks activation adapters
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    for mode in (True, False):
        model.train(mode)
        with torch.set_grad_enabled(mode):
            torch.default_generator.manual_seed(1)
            expected = model(x)
            torch.default_generator.manual_seed(1)
            found = compiled(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def on_weights(name):
    found = mmpeft.METHODS.get(METHODS[name]['type'])
    return found.adapts and not issubclass(found, ActivationMethod)


def block(kind, name):
    """A block with a method, on two of its layers if it adapts weights."""
    torch.default_generator.manual_seed(0)
    build, size, layers = COMPILED[kind]
    model = nn.Sequential(build()).double()
    mmpeft.inject(model, METHODS[name], dict(include=[layers]) if on_weights(name) else {})
    randomize(model, 0.02)
    return model, torch.randn(size, dtype=torch.float64)


def layer(kind, name):
    """A layer with a method."""
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]()).double()
    mmpeft.inject(model, METHODS[name])
    randomize(model, 0.02)
    return model, torch.randn(2, 4, 5, 5, dtype=torch.float64)


def cases_of(name, turn):
    """A method's turn: of the layers if it adapts weights, or of the blocks; or all blocks."""
    if on_weights(name) and not EVERY:
        return [layer(turn % len(LAYERS), name)]
    kinds = [kind for kind in COMPILED if (METHODS[name]['type'], kind) not in NO_PLACE]
    return [block(kind, name) for kind in (kinds if EVERY else [kinds[turn % len(kinds)]])]


def test_a_block_compiled_without_graph_breaks():
    assert_compiled(*block('vit', 'dora'), 1e-10)


@pytest.mark.parametrize('turn, name', enumerate(METHODS))
def test_all_methods_compiled_without_graph_breaks(turn, name):
    """In training and in evaluation; on all blocks with MMPEFT_EVERY_PAIR=1."""
    for model, x in cases_of(name, turn):
        assert_compiled(model, x, 1e-10)


@pytest.mark.parametrize('rows, linears', [(1, 3), (64, 1)])
def test_compiled_evaluation_of_many_positions_has_the_update_in_the_weight(rows, linears):
    """In a graph the weight is built in one product and one pass; a branch takes two products."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(rows, 16)
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    randomize(model)
    found = []

    def note(graph, inputs):
        found.append(sum('linear' in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    with torch.no_grad():
        y = torch.compile(model, backend=note)(x)
        torch.testing.assert_close(y, model(x))
    assert found == [linears]


@pytest.mark.parametrize('kind', NETWORKS)
def test_networks_compiled_without_graph_breaks(kind):
    assert_compiled(network(kind, 'flora'), torch.randn(2, 3, 32, 32), 1e-4)


@pytest.mark.parametrize('kind', ['vit', 'convnext'])
def test_gradients_of_a_compiled_training_step(kind):
    model, x = network(kind, 'flora').double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = results(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend='aot_eager', fullgraph=True)
    found = results(model, x, compiled)
    assert len(expected) > 20 and all(value.any() for value in expected.values())
    assert_equal(found, expected, 1e-10)


@pytest.mark.parametrize('case, name', zip(['large_linear', 'kernel'] * 4, FORMS, strict=True))
def test_gradients_of_compiled_layers(case, name):
    model, x = adapted(LARGE[case], METHODS[name]), LARGE[case].input()
    torch._dynamo.reset()
    found = results(model, x, torch.compile(model, backend='aot_eager', fullgraph=True))
    with plain(model):
        assert_equal(found, results(model, x), 1e-10)


@pytest.mark.parametrize('name', ['lora_channel', 'flora', 'liera', 'dora', 'ia3'])
def test_selective_checkpoints_keep_outputs_that_nothing_changes(name):
    """With torch's own example of a policy: products and convolutions are kept."""
    aten = torch.ops.aten
    kept = [aten.mm.default, aten.addmm.default, aten.convolution.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    for kind in COMPILED:
        model, x = block(kind, name)

        def selective(x, model=model):
            return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

        assert_equal(results(model, x, selective), results(model, x), 1e-10)


@pytest.mark.parametrize(
    'name, strict',
    [
        ('flora', False),
        ('dora', False),
        ('lora_channel', True),
        ('liera', True),
    ],
)
def test_exported(name, strict):
    model, x = network('convnext', name).eval(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('name', ['flora', 'dora'])
def test_traced_with_gradients(name):
    model, x = network('convnext', name).eval(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)


def test_scripted_after_merging():
    model, x = network('resnet', 'flora').eval(), torch.randn(2, 3, 32, 32)
    mmpeft.merge(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def function_of(model, x):
    """A scalar of a model's parameters, and the parameters that train."""
    held = {k: v.detach() for k, v in model.named_parameters()}
    trained = {k: held[k] for k, v in model.named_parameters() if v.requires_grad}

    def function(parameters, x=x):
        return functional_call(model, held | parameters, (x,)).square().sum()

    return function, trained


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('case', CASES)
def test_transforms_of_torch_func(case, name):
    model, x = adapted(LARGE[case], METHODS[name]), LARGE[case].input()
    function, trained = function_of(model, x)
    tangents = {k: torch.randn_like(v) for k, v in trained.items()}
    images = torch.stack([x, 2 * x, -x])

    def transformed():
        of_images = vmap(grad(function), in_dims=(None, 0), randomness='same')(trained, images)
        product = jvp(grad(function), (trained,), (tangents,))[1]
        with forward_ad.dual_level():
            dual = {k: forward_ad.make_dual(v, tangents[k]) for k, v in trained.items()}
            forward = forward_ad.unpack_dual(function(dual)).tangent
        return {
            **{f'vmap {k}': v for k, v in of_images.items()},
            **{f'hessian {k}': v for k, v in product.items()},
            'forward': forward,
        }

    found = transformed()
    with plain(model):
        assert_equal(found, transformed(), 1e-10)


def test_a_hessian():
    model, x = adapted(LARGE['without_bias'], METHODS['flora']), torch.randn(3, 12).double()
    function, trained = function_of(model, x)
    name = next(iter(trained))

    def of_one(value):
        return function(trained | {name: value})

    found = hessian(of_one)(trained[name])
    with plain(model):
        torch.testing.assert_close(found, hessian(of_one)(trained[name]), rtol=0, atol=1e-9)


@pytest.mark.parametrize('number, name', enumerate(NORMAL))
def test_without_gradients(number, name, subtests):
    """On layers that select each kernel, each executed in another way."""
    ways = execution.CHOICES
    for turn, case in enumerate(CASES):
        with subtests.test(case), torch.no_grad():
            way = ways[(number + turn) % len(ways)]
            model, x = adapted(LARGE[case], METHODS[name], way=way), LARGE[case].input()
            found = model(x)
            with plain(model):
                torch.testing.assert_close(found, model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_nothing_that_was_computed_before_is_used_again(context):
    model, x = adapted(LARGE['large_linear'], METHODS['dora']), LARGE['large_linear'].input()
    model.eval()

    def check():
        with context():
            found = model(x)
            with plain(model):
                assert torch.equal(
                    torch.round(found, decimals=9), torch.round(model(x), decimals=9)
                )
        return found

    adapter = model[0].parametrizations.weight[0]
    outputs = [check()]
    adapter.lora_B.data[0, 0] += 1
    outputs.append(check())
    adapter.lora_B.data = adapter.lora_B.data + 1
    outputs.append(check())
    model[0].parametrizations.weight.original.data[0, 0] += 1
    outputs.append(check())
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    outputs.append(check())
    assert all(not torch.equal(a, b) for a, b in zip(outputs, outputs[1:], strict=False))
