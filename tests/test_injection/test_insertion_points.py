"""Where the insertion points of networks are, as lists and in a forward pass."""

import mmdet.models
import pytest
import timm
import torch
import torchvision
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.insertion_points import Search
from mmpeft.injection.weights import weights_of
from mmpeft.methods.spec import POINT_KINDS, ConvGeometry
from mmpeft.models import InternViT, TimmBackbone
from tests.cases import BLOCKS, Attention, TransformerBlock, mlp

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def found(model, kind):
    """Path and axis of the insertion points of a kind, in the order of the modules."""
    points = Search(model).find(kind)
    return [(path, points[path].axis) for path, _ in model.named_modules() if path in points]


def at(axis, *paths):
    return [(path, axis) for path in paths]


def each(pattern, depths):
    """A pattern such as ``stages.{}.blocks.{}`` for each block of each stage."""
    return [pattern.format(s, b) for s, depth in enumerate(depths) for b in range(depth)]


def every(blocks, *names):
    return [f'{block}.{name}' for block in blocks for name in names]


def assert_none(model, *kinds):
    assert {kind: found(model, kind) for kind in kinds} == {kind: [] for kind in kinds}


CONVNEXT = dict(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=5)


@pytest.mark.parametrize('name, axis', [('convnextv2_atto', 1), ('convnextv2_base', -1)])
def test_timm_convnext_v2(name, axis):
    model = timm.create_model(name, **CONVNEXT)
    blocks = each('stages.{}.blocks.{}', CONVNEXT['depths'])
    assert found(model, 'mlp') == at(axis, *every(blocks, 'mlp'))
    assert found(model, 'mixer') == at(1, *every(blocks, 'conv_dw'))
    assert found(model, 'border') == at(1, *every(blocks, 'conv_dw'))
    assert_none(model, 'attention', 'branch', 'tokens')
    layers = at(1, 'stem.0')
    for stage, depth in enumerate(CONVNEXT['depths']):
        layers += at(1, f'stages.{stage}.downsample.1') if stage else []
        for block in (f'stages.{stage}.blocks.{n}' for n in range(depth)):
            layers += at(1, f'{block}.conv_dw') + at(axis, f'{block}.mlp.fc1', f'{block}.mlp.fc2')
    assert found(model, 'layer') == layers + at(-1, 'head.fc')


def test_timm_backbone():
    model = TimmBackbone('convnextv2_atto', depths=(1, 2, 1, 1), dims=(8, 16, 24, 32))
    blocks = each('model.stages_{}.blocks.{}', (1, 2, 1, 1))
    assert found(model, 'mlp') == at(1, *every(blocks, 'mlp'))
    assert found(model, 'mixer') == found(model, 'border') == at(1, *every(blocks, 'conv_dw'))
    assert_none(model, 'attention', 'branch', 'tokens')
    assert len(found(model, 'layer')) == 4 + 3 * 5


def test_timm_vit():
    model = timm.create_model('vit_tiny_patch16_224', depth=2, embed_dim=24, num_classes=5)
    blocks = ['blocks.0', 'blocks.1']
    assert found(model, 'tokens') == at(-1, *blocks)
    assert found(model, 'attention') == at(-1, *every(blocks, 'attn'))
    assert found(model, 'mlp') == at(-1, *every(blocks, 'mlp'))
    assert_none(model, 'branch', 'mixer', 'border')
    linear = every(blocks, 'attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')
    assert found(model, 'layer') == at(1, 'patch_embed.proj') + at(-1, *linear, 'head')


def test_timm_swin():
    model = timm.create_model(
        'swin_tiny_patch4_window7_224', depths=(2, 1), embed_dim=12, num_heads=(3, 6), num_classes=5
    )
    blocks = each('layers.{}.blocks.{}', (2, 1))
    assert found(model, 'attention') == at(-1, *every(blocks, 'attn'))
    assert found(model, 'mlp') == at(-1, *every(blocks, 'mlp'))
    assert_none(model, 'branch', 'mixer', 'border', 'tokens')
    parts = 'attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'
    assert found(model, 'layer') == at(1, 'patch_embed.proj') + at(
        -1,
        *every(blocks[:2], *parts),
        'layers.1.downsample.reduction',
        *every(blocks[2:], *parts),
        'head.fc',
    )


def resnet_layers(blocks, convolutions, shortcuts):
    layers = ['conv1']
    for block in blocks:
        layers += every([block], *convolutions)
        layers += [f'{block}.downsample.0'] if block in shortcuts else []
    return layers


@pytest.mark.parametrize('source', ['torchvision', 'timm', 'mmdet'])
def test_resnet_of_basic_blocks(source):
    model = dict(
        torchvision=lambda: torchvision.models.resnet18(),
        timm=lambda: timm.create_model('resnet18'),
        mmdet=lambda: mmdet.models.ResNet(18),
    )[source]()
    blocks = [f'layer{stage}.{block}' for stage in (1, 2, 3, 4) for block in (0, 1)]
    shortcuts = ['layer2.0', 'layer3.0', 'layer4.0']
    assert found(model, 'branch') == at(1, *every(blocks, 'bn2'))
    strided = every(shortcuts, 'conv1')
    borders = [p for p in every(blocks, 'conv1', 'conv2') if p not in strided]
    assert found(model, 'border') == at(1, *borders)
    assert_none(model, 'attention', 'mixer', 'mlp', 'tokens')
    convolutions = at(1, *resnet_layers(blocks, ('conv1', 'conv2'), shortcuts))
    assert found(model, 'layer') == convolutions + at(-1, *(['fc'] if source != 'mmdet' else []))


@pytest.mark.parametrize('source', ['torchvision', 'timm', 'timm_grouped', 'mmdet'])
def test_resnet_of_bottlenecks(source):
    model = dict(
        torchvision=lambda: torchvision.models.resnet50(),
        timm=lambda: timm.create_model('resnet50'),
        # As wide inside as outside: no mlp for all that.
        timm_grouped=lambda: timm.create_model('resnext50_32x4d', base_width=8),
        mmdet=lambda: mmdet.models.ResNet(50),
    )[source]()
    depths = 3, 4, 6, 3
    blocks = [f'layer{n + 1}.{block}' for n, depth in enumerate(depths) for block in range(depth)]
    shortcuts = [f'layer{n}.0' for n in (1, 2, 3, 4)]
    assert found(model, 'branch') == at(1, *every(blocks, 'bn3'))
    assert found(model, 'border') == at(
        1, *(f'{block}.conv2' for block in blocks if block not in shortcuts[1:])
    )
    assert_none(model, 'attention', 'mixer', 'mlp', 'tokens')
    convolutions = at(1, *resnet_layers(blocks, ('conv1', 'conv2', 'conv3'), shortcuts))
    assert found(model, 'layer') == convolutions + at(-1, *(['fc'] if source != 'mmdet' else []))


@pytest.mark.parametrize('version', [1, 2])
def test_torchvision_swin_never_calls_the_layers_of_its_attention(version):
    swin = torchvision.models.swin_transformer
    model = swin.SwinTransformer(
        [4, 4],
        12,
        [2, 1],
        [2, 4],
        [4, 4],
        num_classes=5,
        **(dict(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2))
        if version == 2
        else {},
    )
    blocks = ['features.1.0', 'features.1.1', 'features.3.0']
    assert found(model, 'attention') == at(-1, *every(blocks, 'attn'))
    assert found(model, 'mlp') == at(-1, *every(blocks, 'mlp'))
    assert_none(model, 'branch', 'mixer', 'border', 'tokens')
    parts = ('attn.cpb_mlp.0', 'attn.cpb_mlp.2') if version == 2 else ()
    parts += 'mlp.0', 'mlp.3'
    assert found(model, 'layer') == at(1, 'features.0.0') + at(
        -1, *every(blocks[:2], *parts), 'features.2.reduction', *every(blocks[2:], *parts), 'head'
    )


def test_torchvision_vit_never_calls_out_proj():
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 16, 32, num_classes=5)
    blocks = ['encoder.layers.encoder_layer_0', 'encoder.layers.encoder_layer_1']
    assert found(model, 'tokens') == at(-1, *blocks)
    assert found(model, 'attention') == at(-1, *every(blocks, 'self_attention'))
    assert found(model, 'mlp') == at(-1, *every(blocks, 'mlp'))
    assert_none(model, 'branch', 'mixer', 'border')
    linear = *every(blocks, 'mlp.0', 'mlp.3'), 'heads.head'
    assert found(model, 'layer') == at(1, 'conv_proj') + at(-1, *linear)


def test_torchvision_convnext():
    config = torchvision.models.convnext.CNBlockConfig
    model = torchvision.models.ConvNeXt([config(8, 16, 2), config(16, None, 1)], num_classes=5)
    blocks = ['features.1.0.block', 'features.1.1.block', 'features.3.0.block']
    assert found(model, 'mlp') == at(1, *blocks)
    assert found(model, 'mixer') == found(model, 'border') == at(1, *every(blocks, '0'))
    assert_none(model, 'attention', 'branch', 'tokens')
    layers = at(1, 'features.0.0')
    for block in blocks:
        layers += at(1, 'features.2.1') if block == blocks[2] else []
        layers += at(1, f'{block}.0') + at(-1, f'{block}.3', f'{block}.5')
    assert found(model, 'layer') == layers + at(-1, 'classifier.2')


def mmdet_swin():
    return mmdet.models.SwinTransformer(
        embed_dims=12, depths=(2, 1), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1)
    )


def test_mmdet_swin():
    blocks = each('stages.{}.blocks.{}', (2, 1))
    assert found(mmdet_swin(), 'attention') == at(-1, *every(blocks, 'attn.w_msa'))
    assert found(mmdet_swin(), 'mlp') == at(-1, *every(blocks, 'ffn.layers'))
    assert_none(mmdet_swin(), 'branch', 'mixer', 'border', 'tokens')
    parts = 'attn.w_msa.qkv', 'attn.w_msa.proj', 'ffn.layers.0.0', 'ffn.layers.1'
    assert found(mmdet_swin(), 'layer') == at(1, 'patch_embed.projection') + at(
        -1,
        *every(blocks[:2], *parts),
        'stages.0.downsample.reduction',
        *every(blocks[2:], *parts),
    )


def holding(**children):
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def linear(*shape):
    return nn.Linear(*shape)


def intern_vit_block(width=8):
    attention = holding(
        qkv=linear(width, 3 * width),
        q_norm=nn.RMSNorm(width),
        k_norm=nn.RMSNorm(width),
        proj=linear(width, width),
    )
    perceptron = holding(fc1=linear(width, 4 * width), act=nn.GELU(), fc2=linear(4 * width, width))
    block = holding(
        norm1=nn.RMSNorm(width), attn=attention, norm2=nn.RMSNorm(width), mlp=perceptron
    )
    block.ls1, block.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
    return block


def test_intern_vit():
    encoder = holding(layers=nn.ModuleList([intern_vit_block(), intern_vit_block()]))
    model = holding(patch_embedding=nn.Conv2d(3, 8, 14, 14), encoder=encoder)
    blocks = ['encoder.layers.0', 'encoder.layers.1']
    assert found(model, 'tokens') == at(-1, *blocks)
    assert found(model, 'attention') == at(-1, *every(blocks, 'attn'))
    assert found(model, 'mlp') == at(-1, *every(blocks, 'mlp'))
    assert_none(model, 'branch', 'mixer', 'border')
    parts = 'attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'
    assert found(model, 'layer') == at(1, 'patch_embedding') + at(-1, *every(blocks, *parts))


def split(**names):
    return holding(**{name: linear(8, 8) for name in names.values()})


def perceptron():
    return holding(fc1=linear(8, 16), fc2=linear(16, 8))


@pytest.mark.parametrize(
    'names',
    [
        dict(q='q_proj', k='k_proj', v='v_proj', out='out_proj'),
        dict(q='q_proj', k='k_proj', v='v_proj', out='projection_layer'),
        dict(q='to_q', k='to_k', v='to_v', out='to_out'),
        dict(q='query', k='key', v='value', out='dense'),
        dict(q='wq', k='wk', v='wv', out='wo'),
    ],
    ids=lambda names: names['q'],
)
def test_split_attention_of_transformers(names):
    layer = holding(attention=split(**names), mlp=perceptron())
    model = holding(encoder=holding(layer=nn.ModuleList([layer])))
    assert found(model, 'attention') == at(-1, 'encoder.layer.0.attention')
    assert found(model, 'mlp') == at(-1, 'encoder.layer.0.mlp')
    assert found(model, 'tokens') == at(-1, 'encoder.layer.0')
    paths = [f'encoder.layer.0.attention.{name}' for name in names.values()]
    assert found(model, 'layer') == at(-1, *paths, *every(['encoder.layer.0.mlp'], 'fc1', 'fc2'))


def test_attention_in_grandchildren_as_in_bert():
    attention = holding(
        self=holding(query=linear(8, 8), key=linear(8, 8), value=linear(8, 8)),
        output=holding(dense=linear(8, 8), LayerNorm=nn.LayerNorm(8)),
    )
    model = holding(layer=nn.ModuleList([holding(attention=attention, mlp=perceptron())]))
    assert found(model, 'attention') == at(-1, 'layer.0.attention')


@pytest.mark.parametrize(
    'attention',
    [
        lambda: holding(q=linear(8, 8), kv=linear(8, 16), proj=linear(8, 8)),
        lambda: holding(qkv=linear(8, 36), proj=linear(12, 8)),
        lambda: holding(q=linear(8, 6), k=linear(8, 6), v=linear(8, 6), proj=linear(6, 8)),
        lambda: holding(
            cpb_mlp=nn.Sequential(linear(2, 16), nn.ReLU(), linear(16, 6)),
            qkv=linear(8, 24),
            proj=linear(8, 8),
        ),
    ],
    ids=['key and value in one', 'wide', 'narrow', 'with an mlp in it'],
)
def test_attention_of_other_shapes(attention):
    model = nn.Sequential(attention(), perceptron())
    assert found(model, 'attention') == at(-1, '0')
    assert found(model, 'mlp') == at(-1, '1')
    (point,) = Search(model).find('attention').values()
    assert point.shape == (8, 8)


@pytest.mark.parametrize(
    'model',
    [
        lambda: nn.Sequential(linear(8, 8), linear(8, 8), linear(8, 8), linear(8, 8)),
        lambda: split(a='one', b='two', c='three', d='four'),
        lambda: nn.Sequential(mlp(8), mlp(8), mlp(8)),
        lambda: nn.Sequential(linear(8, 24), linear(24, 8)),
    ],
)
def test_no_attention(model):
    assert_none(model(), 'attention', 'tokens')


@pytest.mark.parametrize(
    'layers, axis',
    [
        ([linear(8, 8), linear(8, 8)], -1),
        ([nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)], 1),
        ([nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1)], 1),
        ([linear(8, 32), nn.GELU(), linear(16, 8)], -1),
        ([linear(8, 16), linear(8, 16), linear(16, 8)], -1),
    ],
    ids=['square', 'convolutions', 'with a depthwise one', 'gated', 'gated apart'],
)
def test_mlp(layers, axis):
    assert found(holding(mlp=nn.Sequential(*layers)), 'mlp') == at(axis, 'mlp')


@pytest.mark.parametrize(
    'layers',
    [
        [linear(8, 4), linear(4, 8)],
        [linear(8, 16), linear(16, 6)],
        [linear(8, 16), linear(8, 8)],
        [linear(8, 16)],
        [linear(8, 16), linear(16, 16), linear(16, 8)],
        [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 8, 1)],
        [linear(8, 8), linear(8, 8), linear(8, 8)],
    ],
    ids=['squeeze', 'ends elsewhere', 'no chain', 'one', 'three', 'mixes', 'three square ones'],
)
def test_no_mlp(layers):
    assert found(holding(mlp=nn.Sequential(*layers)), 'mlp') == []


def test_a_flat_convnext_block_is_a_branch():
    """Its forward adds the input, so that only what comes before can be its end."""
    model = holding(
        depthwise_conv=nn.Conv2d(8, 8, 7, padding=3, groups=8),
        norm=nn.LayerNorm(8),
        pointwise_conv1=linear(8, 32),
        pointwise_conv2=linear(32, 8),
    )
    assert found(model, 'branch') == at(-1, 'pointwise_conv2')
    assert found(model, 'border') == at(1, 'depthwise_conv')
    assert_none(model, 'mlp', 'mixer')


def test_a_branch_without_a_norm_at_its_end_ends_with_a_convolution():
    model = holding(
        norm1=nn.BatchNorm2d(4),
        conv1=nn.Conv2d(4, 4, 3, padding=1),
        norm2=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 4, 3, padding=1),
        skip=nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
    )
    assert found(model, 'branch') == at(1, 'conv2')


@pytest.mark.parametrize(
    'model',
    [
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
        lambda: holding(a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 8, 3)),
        lambda: holding(a=nn.Conv2d(4, 4, 3, 2), b=nn.Conv2d(4, 4, 3)),
        lambda: holding(a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(6, 4, 3)),
        lambda: holding(a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)),
    ],
    ids=['stem', 'widens', 'strides', 'no chain', 'no kernel'],
)
def test_no_branch(model):
    assert_none(model(), 'branch', 'border')


def depthwise(width=8):
    return nn.Conv2d(width, width, 3, padding=1, groups=width)


@pytest.mark.parametrize(
    'block, expected',
    [
        (lambda: holding(conv=depthwise(), mlp=mlp(8)), True),
        (lambda: holding(mlp=nn.Sequential(depthwise(), linear(8, 16), linear(16, 8))), True),
        (lambda: holding(mlp=nn.Sequential(linear(8, 16), depthwise(16), linear(16, 8))), False),
        (lambda: holding(mlp=mlp(8), conv=depthwise()), False),
        (lambda: holding(conv=depthwise(4), mlp=mlp(8)), False),
        (lambda: holding(conv=nn.Conv2d(8, 8, 3, padding=1), mlp=mlp(8)), False),
        (lambda: holding(conv=depthwise(), attn=Attention(8), mlp=mlp(8)), False),
        (lambda: holding(stem=depthwise(), stage=nn.Sequential(mlp(8), mlp(8))), False),
    ],
    ids=['before', 'first', 'within', 'after', 'narrow', 'dense', 'beside attention', 'in a stem'],
)
def test_mixer(block, expected):
    model = nn.Sequential(block())
    convolution = at(1, *(p for p, m in model.named_modules() if isinstance(m, nn.Conv2d)))
    assert found(model, 'mixer') == (convolution if expected else [])


def test_a_depthwise_convolution_within_an_mlp_has_a_border():
    model = nn.Sequential(linear(8, 16), depthwise(16), linear(16, 8))
    assert found(model, 'border') == at(1, '1')


def test_a_transposed_convolution_has_no_border():
    model = holding(a=nn.Conv2d(4, 4, 3, padding=1), b=nn.ConvTranspose2d(4, 4, 3, padding=1))
    assert found(model, 'border') == at(1, 'a')


@pytest.mark.parametrize(
    'convolution, expected',
    [
        (dict(kernel_size=3, padding=1), True),
        (dict(kernel_size=3, padding='same', dilation=2), True),
        (dict(kernel_size=(1, 3), padding=(0, 1)), True),
        (dict(kernel_size=3), False),
        (dict(kernel_size=2, padding=1), False),
        (dict(kernel_size=3, padding=1, padding_mode='reflect'), False),
    ],
)
def test_border(convolution, expected):
    model = holding(a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, **convolution))
    assert found(model, 'border') == at(1, *(['b'] if expected else []))


class Rotary(TransformerBlock):
    def forward(self, x, rope=None):
        return x


class Sized(TransformerBlock):
    def forward(self, x, feat_size):
        return x


def windowed():
    block = TransformerBlock(Attention(8), 8)
    block.attn.window_size = (7, 7)
    return block


def sequence_first():
    return TransformerBlock(nn.MultiheadAttention(8, 2), 8)


@pytest.mark.parametrize(
    'block',
    [
        windowed,
        sequence_first,
        lambda: TransformerBlock(Attention(8, window=4), 8),
        lambda: Rotary(Attention(8), 8),
        lambda: Sized(Attention(8), 8),
        lambda: holding(attn=Attention(8), conv=nn.Conv2d(8, 8, 3), mlp=mlp(8)),
        lambda: holding(attn=Attention(8), other=Attention(8), mlp=mlp(8)),
    ],
    ids=['window', 'sequence first', 'table', 'rotary', 'size', 'convolution', 'two attentions'],
)
def test_blocks_that_prompts_do_not_suit_are_no_tokens(block):
    assert_none(nn.Sequential(block()), 'tokens')


def test_attention_that_its_wrapper_turns_takes_prompts():
    block = holding(attn=holding(attn=nn.MultiheadAttention(8, 2)), mlp=mlp(8))
    block.attn.batch_first = True
    assert found(block, 'tokens') == at(-1, '')


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read, self.both = linear(4, 4), linear(4, 4), linear(4, 4)

    def forward(self, x):
        x = self.called(x.to(self.both.weight.dtype))
        return self.both(nn.functional.linear(x, self.read.weight, self.read.bias))


def test_layers_that_are_only_read_are_none():
    assert found(Reads(), 'layer') == at(-1, 'called', 'both')


NETWORKS = dict(
    convnext_conv=lambda: timm.create_model('convnextv2_atto', **CONVNEXT),
    convnext_linear=lambda: timm.create_model('convnextv2_base', **CONVNEXT),
    vit=lambda: timm.create_model('vit_tiny_patch16_224', depth=2, embed_dim=24, img_size=64),
    resnet=lambda: torchvision.models.resnet18(),
    resnet_mmdet=lambda: mmdet.models.ResNet(50),
    vit_torchvision=lambda: torchvision.models.VisionTransformer(64, 8, 2, 4, 16, 32),
    swin_torchvision=lambda: torchvision.models.SwinTransformer([4, 4], 12, [2, 1], [2, 4], [4, 4]),
    swin_mmdet=mmdet_swin,
    intern_vit=lambda: InternViT(
        dict(depth=2, width=16, heads=2, hidden=32, image_size=64, patch_size=16)
    ),
    mobilenet=lambda: torchvision.models.mobilenet_v2(),
    **{f'small_{name}': block.build for name, block in BLOCKS.items()},
)


@pytest.mark.parametrize('name', NETWORKS)
@torch.no_grad()
def test_places_are_reached_and_their_channels_are_where_they_are_said_to_be(name):
    model = NETWORKS[name]().float()
    model.eval()
    search, reached = Search(model), {}
    every_kind = [item for kind in POINT_KINDS for item in search.find(kind).items()]

    def remember(path):
        def hook(_, args, kwargs, output):
            x = next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v))
            reached[path] = x.shape, (output[0] if isinstance(output, tuple) else output).shape

        return hook

    for path, _ in every_kind:
        model.get_submodule(path).register_forward_hook(remember(path), with_kwargs=True)
    small = BLOCKS.get(name.removeprefix('small_')) if name.startswith('small_') else None
    model(small.input(torch.float32) if small else torch.randn(2, 3, 64, 64))
    assert every_kind and set(reached) == {path for path, _ in every_kind}
    for path, point in every_kind:
        given, returned = reached[path]
        assert returned[point.axis] == point.out_features, path
        if 'branch' not in point.kinds:
            assert given[point.axis] == point.in_features, path
        if 'tokens' in point.kinds:
            assert len(given) == 3 and given == returned, path


def test_what_an_insertion_point_is():
    model = timm.create_model('convnextv2_atto', **CONVNEXT)
    search = Search(model)
    found = {kind: search.find(kind) for kind in ('mixer', 'mlp', 'border', 'layer')}
    mlp_point = found['mlp']['stages.1.blocks.0.mlp']
    mixer, border, layer = (
        found[kind]['stages.1.blocks.0.conv_dw'] for kind in ('mixer', 'border', 'layer')
    )
    assert mixer.kinds == {'mixer'} and border.kinds == {'border'} and mlp_point.kinds == {'mlp'}
    assert layer.kinds == {'layer', 'conv', 'depthwise'}
    assert {point.shape for point in (mixer, border, layer, mlp_point)} == {(16, 16)}
    assert mixer.numel == 16 * 49 + 16
    assert mlp_point.numel == 2 * 16 * 64 + 64 + 16 + 2 * 64
    convolution = model.stages[1].blocks[0].conv_dw
    assert layer.layer == dict(weights_of(convolution))['weight']
    assert mixer.layer is border.layer is mlp_point.layer is mixer.geometry is None
    assert layer.geometry == border.geometry
    assert border.geometry == ConvGeometry((1, 1), ((3, 3), (3, 3)), 'zeros', (1, 1))
    assert [[path for path, point in f.items() if point.first] for f in found.values()] == [
        ['stages.0.blocks.0.conv_dw'],
        ['stages.0.blocks.0.mlp'],
        ['stages.0.blocks.0.conv_dw'],
        ['stem.0'],
    ]


def test_a_branch_counts_its_block_and_has_its_widths():
    model = torchvision.models.resnet18()
    point = Search(model).find('branch')['layer2.0.bn2']
    assert point.shape == (128, 64)
    assert point.numel == sum(p.numel() for p in model.layer2[0].parameters())


def test_layers_can_be_told_apart_by_their_own_kinds():
    model = timm.create_model('convnextv2_atto', **CONVNEXT)
    method = dict(type='ParallelAdapter', rank=2)
    names = [row.name for row in mmpeft.inject(model, method, dict(kinds='depthwise')).rows]
    assert names == every(each('stages.{}.blocks.{}', CONVNEXT['depths']), 'conv_dw')


@pytest.mark.parametrize(
    'padding, expected',
    [
        (2, ((2, 2), (2, 2))),
        ((1, 0), ((1, 1), (0, 0))),
        ('valid', ((0, 0), (0, 0))),
        ('same', ((1, 1), (3, 3))),
    ],
)
def test_window(padding, expected):
    layer = nn.Conv2d(2, 2, (3, 4), dilation=(1, 2), padding=padding)
    window = ConvGeometry.of(layer, dict(weights_of(layer))['weight'])
    assert window == ConvGeometry((1, 1), expected, 'zeros', (1, 2))


@pytest.mark.parametrize('name', BLOCKS)
def test_an_adapted_network_has_the_places_of_the_plain_one(name):
    plain, model = BLOCKS[name].build(), BLOCKS[name].build()
    mmpeft.inject(model, dict(type='HoulsbyAdapter', rank=2))
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    expected, search = Search(plain), Search(model)
    for kind in POINT_KINDS:
        assert list(search.find(kind).items()) == list(expected.find(kind).items())


@pytest.mark.parametrize(
    'model, method, message',
    [
        (
            torchvision.models.resnet18,
            'ScaledParallelAdapter',
            r"at insertion points of kind 'mlp' \(layers d -> h -> d with h >= d\), and ResNet "
            r"has none\. It has 8 'branch', 21 'layer', 13 'border', 8 'block'\. .*VPT.* would fit",
        ),
        (mmdet_swin, 'VPT', r"'tokens' .*not over windows\).*'border'.*3 'attention', 3 'mlp'"),
        (
            lambda: nn.Sequential(nn.Embedding(3, 4)),
            'HoulsbyAdapter',
            r'It has no insertion point of any kind\. Methods on weights, such as LoRA',
        ),
    ],
    ids=['resnet', 'swin', 'nothing'],
)
def test_a_network_without_a_place_is_told_what_would_fit(model, method, message):
    model = model()
    with pytest.raises(UsageError, match=message) as error:
        mmpeft.inject(model, dict(type=method))
    told = str(error.value).partition('It has')[2]
    assert method not in told
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, 'peft')
