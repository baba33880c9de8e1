"""InternViT against transformers' own, its checkpoints, and what it is told wrongly."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mmpeft
from mmpeft.errors import MissingFileError, UsageError
from mmpeft.injection.site import adapter_parameters
from mmpeft.models import InternViT
from mmpeft.models.intern_vit_arch import ARCHITECTURES
from mmpeft.models.intern_vit_names import official_name, to_transformers
from mmpeft.quantization import FORMATS, quantize

ROOT = Path(__file__).parents[2]
SMALL = dict(depth=4, width=32, heads=4, hidden=48, image_size=56)
WITH_QK_NORM = dict(SMALL)
WITHOUT = dict(SMALL, qk_norm=False, qkv_bias=True, norm='layer')


def intern_vit(arch, **kwargs):
    """With all parameters random, norms and scales too."""
    torch.manual_seed(0)
    model = InternViT(arch, **kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def reference(arch):
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=arch['width'],
        num_hidden_layers=arch['depth'],
        num_attention_heads=arch['heads'],
        intermediate_size=arch['hidden'],
        image_size=[arch['image_size']] * 2,
        patch_size=[14, 14],
        use_qk_norm=arch.get('qk_norm', True),
        attention_bias=arch.get('qkv_bias', False),
        norm_type='layer_norm' if arch.get('norm') == 'layer' else 'rms_norm',
        layer_norm_eps=1e-6,
        hidden_act='gelu',
        use_mean_pooling=True,
        attn_implementation='eager',
    )
    torch.manual_seed(1)
    model = InternVLVisionModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def compare(ours, theirs, size):
    images = torch.randn(2, 3, *size)
    hidden = {}
    for index, layer in enumerate(theirs.encoder.layer):
        layer.register_forward_hook(
            lambda _, args, output, index=index: hidden.update({index: output})
        )
    theirs(images)
    grid = size[0] // 14, size[1] // 14
    for tap, result in zip(ours.out_indices, ours(images), strict=True):
        expected = hidden[tap][0] if isinstance(hidden[tap], tuple) else hidden[tap]
        expected = expected[:, 1:].transpose(1, 2).unflatten(2, grid)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('arch', [WITH_QK_NORM, WITHOUT], ids=['qk_norm', 'without'])
@pytest.mark.parametrize('size', [(56, 56), (70, 42)])
def test_equals_transformers_with_its_weights(arch, size, tmp_path):
    theirs = reference(arch)
    theirs.save_pretrained(tmp_path)
    ours = InternViT(arch, checkpoint=str(tmp_path)).eval()
    ours.init_weights()
    compare(ours, theirs, size)


@pytest.mark.parametrize('arch', [WITH_QK_NORM, WITHOUT], ids=['qk_norm', 'without'])
def test_transformers_equals_it_with_our_weights(arch):
    ours, theirs = intern_vit(arch), reference(arch)
    mine = to_transformers(ours.state_dict())
    missing, unexpected = theirs.load_state_dict(mine, strict=False)
    assert not unexpected and set(missing) <= {'embeddings.mask_token'}
    compare(ours, theirs, (56, 56))


def layouts(state):
    """The same weights as the several publishers name them."""

    def segmentation(key):
        for ours, theirs in {
            'embeddings.class_embedding': 'cls_token',
            'embeddings.position_embedding': 'pos_embed',
            'embeddings.patch_embedding.': 'patch_embed.proj.',
            'encoder.layers.': 'blocks.',
        }.items():
            key = key.replace(ours, theirs)
        return f'{key}.gamma' if key.endswith(('ls1', 'ls2')) else key

    return dict(
        official=state,
        prefixed={f'vision_model.{k}': v for k, v in state.items()},
        inside_a_chat_model={
            f'model.vision_tower.{k}': v for k, v in to_transformers(state).items()
        }
        | {'model.language_model.layers.0.mlp.weight': torch.zeros(2)},
        segmentation={segmentation(k): v for k, v in state.items()},
    )


@pytest.mark.parametrize('layout', ['official', 'prefixed', 'inside_a_chat_model', 'segmentation'])
@pytest.mark.parametrize('ending', ['safetensors', 'pth'])
def test_layouts(layout, ending, tmp_path):
    source = intern_vit(WITHOUT)
    state = {k: v.contiguous() for k, v in layouts(source.state_dict())[layout].items()}
    path = tmp_path / f'weights.{ending}'
    if ending == 'pth':
        torch.save(dict(module=state), path)
    else:
        save_file(state, path)
    model = InternViT(WITHOUT, checkpoint=str(path))
    model.init_weights()
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_name_that_is_no_part_of_the_network():
    assert official_name('language_model.layers.0.weight') is None
    assert official_name('vision_model.encoder.layer.3.attention.k_proj.bias') == (
        'encoder.layers.3.attn.qkv.bias',
        1,
    )


def shards(folder, state, count):
    """Write a checkpoint in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map, keys = {}, list(state)
    for i in range(count):
        name = f'model-{i + 1:05}-of-{count:05}.safetensors'
        part = {k: state[k].contiguous() for k in keys[i::count]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=weight_map)))


@pytest.fixture
def sharded(tmp_path):
    source = intern_vit(SMALL)
    shards(tmp_path / 'shards', source.state_dict(), 5)
    return source, tmp_path / 'shards'


def test_five_shards(sharded):
    source, folder = sharded
    for checkpoint in (folder, folder / 'model.safetensors.index.json'):
        model = InternViT(SMALL, checkpoint=str(checkpoint))
        model.init_weights()
        for key, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key


def damaged(folder, how):
    shard = folder / 'model-00003-of-00005.safetensors'
    if how == 'truncated':
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == 'missing':
        shard.unlink()
    elif how == 'no index':
        (folder / 'model.safetensors.index.json').write_text('{"metadata": 1}')


@pytest.mark.parametrize(
    'how, error, text',
    [
        ('truncated', UsageError, 'model-00003-of-00005.safetensors is damaged'),
        ('missing', MissingFileError, '1 of the 5 shards.*model-00003-of-00005.safetensors'),
        ('no index', UsageError, 'is not an index of safetensors shards'),
    ],
)
def test_damaged_checkpoints_change_nothing(how, error, text, sharded):
    _, folder = sharded
    damaged(folder, how)
    model = InternViT(SMALL, checkpoint=str(folder))
    with pytest.raises(error, match=text):
        model.init_weights()
    assert not any(p.any() for p in model.parameters())


def test_the_file_of_another_model(tmp_path):
    save_file(intern_vit(WITHOUT).state_dict(), tmp_path / '300m.safetensors')
    model = InternViT(SMALL, checkpoint=str(tmp_path / '300m.safetensors'))
    with pytest.raises(UsageError) as error:
        model.init_weights()
    text = str(error.value)
    assert '8 of 56 tensors are missing (such as encoder.layers.0.attn.q_norm.weight' in text
    assert '12 unexpected (such as encoder.layers.0.attn.qkv.bias' in text and "'300m'" in text
    with pytest.raises(MissingFileError, match='nothing.safetensors'):
        InternViT(SMALL, checkpoint='nothing.safetensors').init_weights()


def test_a_crop_that_the_patch_does_not_divide():
    with pytest.raises(UsageError, match='images of 500x504 pixels.*504x504'):
        intern_vit(SMALL)(torch.zeros(1, 3, 500, 504))


@pytest.mark.parametrize(
    'arguments, text',
    [
        (dict(arch='6B-v3'), "no arch='6B-v3'"),
        (dict(arch=dict(SMALL, widht=3)), "Did you mean 'width'"),
        (dict(arch=dict(depth=2)), 'lacks width, heads, hidden'),
        (dict(arch=dict(SMALL, heads=5)), 'not a multiple of heads'),
        (dict(arch=dict(SMALL, image_size=50)), 'not a multiple of patch_size'),
        (dict(arch=SMALL, out_indices=(1, 4)), 'blocks from 0 to 3'),
        (dict(arch=SMALL, frozen_dtype='half'), "frozen_dtype='half'"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(UsageError, match=text):
        InternViT(**arguments)


def test_parameters_of_the_published_models():
    counts = {}
    for name in ARCHITECTURES:
        with torch.device('meta'):
            counts[name] = sum(p.numel() for p in InternViT(name).parameters())
    # A block: qkv and proj, two MLP layers, biases, four norms, two scales.
    block = 4 * 3200**2 + 3200 + 2 * 3200 * 12800 + 12800 + 3200 + 6 * 3200
    stem = 3200 * (3 * 14**2 + 1) + 3200
    assert counts['6b'] == 48 * block + stem + (32**2 + 1) * 3200
    assert counts['6b-224px'] == 48 * block + stem + (16**2 + 1) * 3200
    assert counts['6b-45'] == 45 * block + stem + (32**2 + 1) * 3200
    assert counts['300m'] == 304_012_288


def test_taps():
    with torch.device('meta'):
        assert InternViT('6b').out_indices == (11, 23, 35, 47)
        assert InternViT('300m').out_indices == (5, 11, 17, 23)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('method', ['FLoRA', 'LieRA', 'DoRA', 'BitFit'])
def test_frozen_in_half_the_memory(dtype, amp, method):
    model = InternViT(SMALL, frozen_dtype=dtype)
    model.init_weights()
    mmpeft.inject(model, dict(type=method))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {getattr(torch, dtype)}
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    with torch.autocast('cpu', getattr(torch, dtype), enabled=amp):
        maps = model(torch.randn(1, 3, 56, 56))
    assert {m.dtype for m in maps} == {torch.float32}
    sum(m.square().mean() for m in maps).backward()
    gradients = [p.grad for p in adapter_parameters(model)]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize('kind', FORMATS)
def test_blocks_in_few_bits(kind, tmp_path):
    """Read from shards that hold queries, keys and values apart, one weight after another."""
    source = intern_vit(SMALL | dict(width=64, hidden=128))
    shards(tmp_path, to_transformers(source.state_dict()), 3)
    model = InternViT(source.arch.__dict__, checkpoint=str(tmp_path), frozen_dtype=kind).eval()
    block = model.encoder.layers[1]
    built = block.attn.qkv.weight
    model.init_weights()
    for name in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'):
        exact = source.encoder.layers[1].get_submodule(name).weight
        stored = block.get_submodule(name).weight
        assert torch.equal(stored, quantize(exact.bfloat16(), kind))
    assert (
        block.attn.qkv.weight is built
        and model.embeddings.patch_embedding.weight.dtype == torch.bfloat16
    )
    for a, b in zip(model(images := torch.randn(1, 3, 56, 56)), source(images), strict=True):
        assert ((a - b).norm() / b.norm()).item() < (0.25 if kind == 'nf4' else 0.06)


def test_half_precision_is_near_single():
    images = torch.randn(1, 3, 56, 56)
    source = intern_vit(SMALL)
    single = source(images)
    half = InternViT(SMALL, frozen_dtype='bfloat16').eval()
    half.load_state_dict(source.state_dict())
    for a, b in zip(half(images), single, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 0.03


@pytest.mark.parametrize('method', ['FLoRA', 'LieRA', 'LoRA', 'DoRA', 'BitFit', 'HoulsbyAdapter'])
def test_recomputation_gives_the_adapters_the_same_gradients(method):
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = InternViT(SMALL, with_cp=with_cp, drop_path=0.3)
        model.init_weights()
        mmpeft.inject(model, dict(type=method))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        torch.manual_seed(2)
        sum(m.square().mean() for m in model(torch.randn(2, 3, 56, 56))).backward()
        gradients.append([p.grad for p in adapter_parameters(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


def test_recomputation_saves_memory():
    saved = {}
    for with_cp in (False, True):
        model = InternViT(SMALL, with_cp=with_cp)
        mmpeft.inject(model, dict(type='BitFit'))
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(2, 3, 56, 56))
        saved[with_cp] = sum(sizes.values())
    assert saved[True] < 0.5 * saved[False]


def test_injection_adds_no_copy_of_a_frozen_weight():
    model = intern_vit(SMALL)
    before = {p.data_ptr() for p in model.parameters()}
    mmpeft.inject(model, dict(type='FLoRA', rank=2))
    adapters = {id(p) for p in adapter_parameters(model)}
    frozen = [p for p in model.parameters() if id(p) not in adapters]
    assert {p.data_ptr() for p in frozen} == before and len(frozen) == len(before)
    assert sum(p.numel() for p in adapter_parameters(model)) < 0.5 * sum(p.numel() for p in frozen)


def memory_of_loading(folder, arch, frozen_dtype, dtype, count):
    """Bytes by which a process grows at most while it builds a model and reads shards of a dtype.

    From its start, from when the model is built, of all shards, and of the largest.
    """
    with torch.device('meta'):
        empty = InternViT(arch).state_dict()
    state = {k: torch.zeros(empty[k].shape, dtype=dtype) for k in sorted(empty)}
    shards(folder, state, count)  # sorted, they are of equal size, as publishers cut them
    shards(folder / 'warm_up', intern_vit(WARM_UP).state_dict(), 5)
    script = folder / 'load.py'
    script.write_text(
        'from mmpeft.models.intern_vit import InternViT\n'
        'from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor\n'
        'nf4_tensor.CHUNK_SIZE = 2**16\n'  # the pieces of a weight, which take 16 times as much
        'def kib(name):\n'
        "    lines = open('/proc/self/status').read().splitlines()\n"
        '    return next(int(l.split()[1]) for l in lines if l.startswith(name))\n'
        'def build(arch, folder):\n'
        f'    return InternViT(arch, checkpoint=folder, frozen_dtype={frozen_dtype!r})\n'
        f'build({WARM_UP!r}, {str(folder / "warm_up")!r}).init_weights()\n'
        'start = kib("VmRSS")\n'
        f'model = build({arch!r}, {str(folder)!r})\n'
        'built = kib("VmRSS")\n'
        'model.init_weights()\n'
        'peak = kib("VmHWM")\n'
        'print("RESULT", 1024 * (peak - start), 1024 * (peak - built))\n'
    )
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    environment['MALLOC_MMAP_THRESHOLD_'] = '65536'  # what is freed is given back at once
    call = [sys.executable, script]
    run = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    sizes = [path.stat().st_size for path in folder.glob('*.safetensors')]
    return *map(int, run.stdout.split('RESULT')[1].split()), sum(sizes), max(sizes)


WARM_UP = SMALL | dict(width=64, hidden=128)


def test_loading_takes_the_model_and_one_shard(tmp_path):
    arch = dict(depth=20, width=512, heads=8, hidden=4096)
    _, grown, size, shard = memory_of_loading(tmp_path, arch, 'bfloat16', torch.bfloat16, 5)
    assert size > 150e6
    assert grown <= shard + 4e6  # and what the interpreter takes meanwhile


def test_loading_into_few_bits_never_holds_the_weights_whole(tmp_path):
    arch = dict(depth=14, width=384, heads=6, hidden=1536)
    grown, _, size, _ = memory_of_loading(tmp_path, arch, 'nf4', torch.float32, 8)
    assert size > 99e6
    assert grown < size / 2


@pytest.mark.parametrize('method', ['FLoRA', 'LieRA'])
def test_a_block_in_bfloat16(method):
    """Of the proportions of InternViT-6B, with heads of its width."""
    arch = dict(depth=1, width=384, heads=3, hidden=1536, image_size=56)
    model = InternViT(arch, frozen_dtype='bfloat16')
    model.init_weights()
    result = mmpeft.inject(model, dict(type=method, rank=16), dict(kinds=('linear',)))
    assert result.adapters == 16 * (4 * 384 + 2 * 384 + 2 * 5 * 384) + (
        4 * 256 if method == 'FLoRA' else 0
    )
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.01)
    maps = model(torch.randn(1, 3, 56, 56))
    assert maps[0].shape == (1, 384, 4, 4) and maps[0].isfinite().all()
    maps[0].square().mean().backward()
    gradients = [p.grad for p in adapter_parameters(model)]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


def test_injection_into_the_whole_model_is_quick():
    with torch.device('meta'):
        model = InternViT('6b', frozen_dtype='bfloat16')
    start = time.process_time()
    result = mmpeft.inject(model, dict(type='FLoRA', rank=16), dict(kinds=('linear',)))
    assert time.process_time() - start < 5
    assert len(result.rows) == 4 * 48
    assert result.share == pytest.approx(0.0067, abs=1e-4)


@pytest.mark.parametrize(
    'config, places',
    [
        (dict(type='HoulsbyAdapter'), {'attn', 'mlp'}),
        (dict(type='PfeifferAdapter'), {'mlp'}),
        (dict(type='ScaledParallelAdapter'), {'mlp'}),
        (dict(type='VPT', deep=True), {''}),
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) else '',
)
def test_adapters_of_activations_find_their_places(config, places):
    model = InternViT(SMALL, frozen_dtype='bfloat16', with_cp=True)
    model.init_weights()
    rows = mmpeft.inject(model, config).rows
    expected = {
        f'encoder.layers.{i}.{place}'.rstrip('.') for i in range(SMALL['depth']) for place in places
    }
    assert {row.name for row in rows} == expected
    sum(m.square().mean() for m in model(torch.randn(1, 3, 56, 70))).backward()
    assert all(p.grad is not None for p in adapter_parameters(model))
