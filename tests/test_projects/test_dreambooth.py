"""DreamBooth on tiny pipelines: training, resuming, files for diffusers, measures, figures."""

import json
import re
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from skimage.data import chelsea
from torch import nn

import mmpeft
from mmpeft.engine.config import compose
from mmpeft.errors import UsageError
from tests.cases import randomize
from tests.pipelines import clip_folder, dino_folder, pipeline_folder
from tests.processes import launch

pytestmark = pytest.mark.filterwarnings('ignore')

PROJECT = Path(__file__).parents[2] / 'projects' / 'dreambooth'
CONFIGS = PROJECT / 'configs'
CROPS = (100, 20, 340, 260), (130, 40, 330, 240), (80, 10, 360, 290)


@pytest.fixture(scope='module', autouse=True)
def project(script):
    return script('projects/dreambooth', 'dreambooth')


@pytest.fixture(autouse=True)
def _new_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope='module')
def material(tmp_path_factory):
    """A folder with both kinds of pipelines and photographs of a cat."""
    folder = tmp_path_factory.mktemp('dreambooth')
    for name in ('sd15', 'sdxl'):
        pipeline_folder(folder / name, sdxl=name == 'sdxl')
    (folder / 'cat').mkdir()
    for number, box in enumerate(CROPS):
        Image.fromarray(chelsea()).crop(box).save(folder / 'cat' / f'{number}.png')
    return folder


def options(material, name, **more):
    """What makes the run of a config small, as --cfg-options take it."""
    small = dict(resolution=32, steps=4, save_every=2, lr=1e-2, batch_size=2)
    small |= {'sampler.num_inference_steps': 2, 'default_hooks.peft.method.rank': 4}
    folders = {'model': material / name.split('_')[0], 'subject.images': material / 'cat'}
    return small | {key: str(value) for key, value in folders.items()} | more


def config(material, name, method=None, **more):
    return compose(CONFIGS / f'{name}.py', method, options(material, name, **more))


def adapted(cfg):
    """A pipeline whose parts have adapters off their start."""
    from dreambooth.models import inject, load_pipeline

    pipeline = load_pipeline(cfg)
    parts = inject(pipeline, cfg)
    for part in parts.values():
        randomize(part, 0.02)
    return pipeline, parts


@torch.no_grad()
def latents_of(pipeline):
    noise = torch.Generator().manual_seed(3)
    given = dict(num_inference_steps=2, height=32, width=32, output_type='latent')
    return pipeline('a picture of a sks cat', generator=noise, **given).images


def plain(cfg):
    from dreambooth.models import load_pipeline

    return load_pipeline(cfg)


def assert_close(one, other):
    error = (one - other).abs().max() / other.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize(
    'name, method, encoders',
    [
        ('sd15_flora', None, True),
        ('sdxl_lora', None, True),
        ('sdxl_lora', dict(type='DoRA', rank=2), False),
    ],
)
def test_diffusers_reads_a_lora_file(name, method, encoders, material, tmp_path):
    from dreambooth.export import save_lora

    cfg = config(material, name, text_encoders=encoders)
    cfg.default_hooks.peft.method = method or cfg.default_hooks.peft.method
    pipeline, parts = adapted(cfg)
    assert len(parts) == (1 if not encoders else 3 if name.startswith('sdxl') else 2)
    save_lora(pipeline, parts, tmp_path)
    other = plain(cfg)
    before = latents_of(other)
    other.load_lora_weights(tmp_path, weight_name='pytorch_lora_weights.safetensors')
    after = latents_of(pipeline)
    assert_close(latents_of(other), after)
    assert (after - before).abs().max() > 1e-2 * before.abs().max()


def test_a_method_without_a_lora_is_sent_to_the_merged_model(material, tmp_path):
    from dreambooth.export import save_lora, save_merged

    cfg = config(material, 'sdxl_liera')
    pipeline, parts = adapted(cfg)
    with pytest.raises(UsageError, match='no LoRA file of this unet: .*LieRA.*--merged FOLDER'):
        save_lora(pipeline, parts, tmp_path / 'lora')
    save_merged(parts, tmp_path / 'merged')
    other = plain(cfg)
    other.unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / 'merged' / 'unet')
    assert_close(latents_of(other), latents_of(pipeline))


def test_a_resumed_run_equals_one_that_was_not_interrupted(material, tmp_path, monkeypatch):
    """With a text encoder, and a method that has an allocator, a penalty and dropout."""
    from dreambooth import training

    cfg = config(material, 'sd15_flora', text_encoders=True, accumulation=2)
    cfg.default_hooks.peft.method = dict(type='AdaLoRA', rank=2, dropout=0.1)
    training.train(cfg, tmp_path / 'whole')
    record = training.record

    def stopped(accelerator, work_dir, values):
        record(accelerator, work_dir, values)
        if values['step'] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, 'record', stopped)
    with pytest.raises(KeyboardInterrupt):
        training.train(cfg, tmp_path / 'parts')
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / 'parts').glob('step_*')] == ['step_2']
    training.train(cfg, tmp_path / 'parts', resume=True)
    names = {p.name for p in (tmp_path / 'whole').glob('*.safetensors')}
    assert names == {f'{part}.safetensors' for part in ('unet', 'text_encoder')}
    for name in names:
        whole, parts = (load_file(tmp_path / run / name) for run in ('whole', 'parts'))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole), name
    logs = [(tmp_path / run / 'log.jsonl').read_text() for run in ('whole', 'parts')]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 4

    shutil.rmtree(tmp_path / 'parts/step_4')
    training.train(cfg, tmp_path / 'parts', resume=True)
    assert (tmp_path / 'parts/log.jsonl').read_text() == logs[0]

    with pytest.raises(UsageError, match='has a run already. Add --resume'):
        training.train(cfg, tmp_path / 'parts')
    cfg.lr = 1.0
    with pytest.raises(UsageError, match='was started with another lr. Resume'):
        training.train(cfg, tmp_path / 'parts', resume=True)


@pytest.mark.parametrize('precision, dtype', [('no', 'float32'), ('bf16', 'bfloat16')])
def test_the_loss_falls(precision, dtype, material, tmp_path, monkeypatch):
    """On SDXL with both text encoders; each adapter moves, the frozen base does not."""
    from dreambooth import training

    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', precision)
    cfg = config(material, 'sdxl_lora', text_encoders=True, steps=6, dtype=dtype)
    training.train(cfg, tmp_path)
    log = (tmp_path / 'log.jsonl').read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in log]
    assert len(losses) == 6 and sum(losses[-2:]) < 0.8 * sum(losses[:2])
    for name in ('unet', 'text_encoder', 'text_encoder_2'):
        state = load_file(tmp_path / f'{name}.safetensors')
        assert all(value.any() for value in state.values()), name


class Recorded(nn.Module):
    """In place of a UNet: half of what it is given."""

    dtype, device = torch.float64, torch.device('cpu')

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None):
        self.given = sample, timestep, encoder_hidden_states
        return diffusers.models.unets.unet_2d_condition.UNet2DConditionOutput(sample=sample / 2)


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
def test_the_loss(kind, material):
    from dreambooth.denoising import Denoising

    pipeline = plain(config(material, 'sd15_flora'))
    pipeline.scheduler.register_to_config(prediction_type=kind)
    pipeline.unet = unet = Recorded()
    prompts = ['a picture of a sks cat', 'a picture of a cat']
    loss_of = Denoising(pipeline, dict(unet=unet), prompts, prior_weight=0.3)
    moments = torch.randn(4, 8, 3, 3, dtype=torch.float64)
    prompt = torch.tensor([0, 1, 1, 0])
    torch.manual_seed(5)
    loss = loss_of(moments, torch.zeros(4, 6), prompt)
    torch.manual_seed(5)
    mean, spread = moments.chunk(2, 1)
    latents = (mean + torch.randn_like(mean) * (spread / 2).exp()) * 0.18215
    noise = torch.randn_like(latents)
    noisy, times, words = unet.given
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[times.numpy()][:, None, None, None]
    latents, noise = latents.numpy(), noise.numpy()
    np.testing.assert_allclose(noisy, kept**0.5 * latents + (1 - kept) ** 0.5 * noise, atol=1e-5)
    velocity = kept**0.5 * noise - (1 - kept) ** 0.5 * latents
    target = noise if kind == 'epsilon' else velocity
    errors = ((noisy.numpy() / 2 - target) ** 2).mean((1, 2, 3))
    expected = (errors[0] + errors[3]) / 2 + 0.3 * (errors[1] + errors[2]) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(words[0], words[3]) and torch.equal(words[1], words[2])
    assert not torch.equal(words[0], words[1])

    pipeline.scheduler.register_to_config(prediction_type='sample')
    with pytest.raises(UsageError, match="predicts 'sample'"):
        Denoising(pipeline, dict(unet=unet), prompts, 1.0)


def test_images_are_cut_to_squares(material):
    """Their sizes and cuts are those that SDXL is conditioned on."""
    from dreambooth.data import encode_images

    pipeline = plain(config(material, 'sdxl_lora'))
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None], (64, 96, 3))
    latents = encode_images(pipeline, [Image.fromarray(ramp)], 32)
    assert latents.sizes.tolist() == [[64, 96, 0, 8, 32, 32]]
    cut = pipeline.image_processor.preprocess(Image.fromarray(ramp[:, 16:80]), 32, 32)
    with torch.no_grad():
        expected = pipeline.vae.encode(cut).latent_dist.parameters
    torch.testing.assert_close(latents.moments, expected, atol=2e-2, rtol=0)


def test_prompts(tmp_path):
    from dreambooth.data import read_prompts

    own = tmp_path / 'own.txt'
    own.write_text('a {} in the snow\n\na red {}\n')
    assert read_prompts(own, 'cat') == ['a {} in the snow', 'a red {}']
    published = tmp_path / 'prompts_and_classes.txt'
    line = "'a {{0}} {{1}} {}'.format(unique_token, class_token),\n"
    published.write_text(
        'Object Prompts\nprompt_list = [\n' + line.format('on a mirror')
        + ']\nLive Subject Prompts\nprompt_list = [\n' + line.format('in a chef outfit') + ']\n'
    )  # fmt: skip
    assert read_prompts(published, 'dog') == ['a {} in a chef outfit']
    assert read_prompts(published, 'vase') == ['a {} on a mirror']


@pytest.mark.parametrize(
    'changed, message',
    [
        ({'model': 'no/such'}, "'no/such' cannot be read as a pipeline .*hf download no/such "),
        ({'subject.images': '/nowhere'}, "no images in '/nowhere'.*git clone .*dreambooth"),
        ({'prompts': ['a cat']}, "prompt 'a cat' needs {} once"),
        ({'prompt': 'a {} {place}'}, "prompt 'a {} {place}' .*no other braces"),
        ({'accumulation': 0}, 'accumulation=0 is not a positive integer'),
        ({'steps': 0}, 'steps=0 is not a positive integer'),
        ({'model': '{cat}'}, 'cannot be read as a pipeline .*--model FOLDER'),
    ],
)
def test_what_is_missing_is_said(changed, message, material, tmp_path, monkeypatch):
    from dreambooth.training import train

    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    changed = {k: str(material / 'cat') if v == '{cat}' else v for k, v in changed.items()}
    with pytest.raises(UsageError, match=message) as raised:
        train(config(material, 'sd15_flora', **changed), tmp_path / 'run')
    assert '\n' not in str(raised.value)
    assert not (tmp_path / 'run').exists()


def test_measures(tmp_path):
    """Against means over pairs in numpy."""
    from dreambooth.fidelity import Clip, Dino, agreement, likeness, likeness_among

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)) for _ in range(5)]
    clip = Clip(clip_folder(tmp_path / 'clip'))
    prompts = clip.prompts(['a cat in the jungle', 'a cat'])
    for model in (clip, Dino(dino_folder(tmp_path / 'dino'))):
        features = model.images(images)
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
        made, real = features[:2].numpy(), features[2:].numpy()
        pairs = [float(a @ b) for a in made for b in real]
        assert likeness(features[:2], features[2:]) == pytest.approx(np.mean(pairs), rel=1e-5)
        others = [float(a @ b) for i, a in enumerate(real) for j, b in enumerate(real) if i != j]
        assert likeness_among(features[2:]) == pytest.approx(np.mean(others), rel=1e-5)
        assert len({round(pair, 6) for pair in pairs}) == 6
    own = clip.images(images[:2])
    expected = np.mean([float(a @ b) for a, b in zip(own, prompts, strict=True)])
    assert agreement(own, prompts) == pytest.approx(expected, rel=1e-5)


def test_images_of_the_class_that_are_there_stay(material, tmp_path):
    from dreambooth.training import make_class_images

    cfg = config(material, 'sd15_flora', **{'prior.number': 5})
    for name in '0001', '0002', '0003':
        Image.new('RGB', (32, 32), 'red').save(tmp_path / f'{name}.png')
    make_class_images(cfg, plain(cfg), 'a picture of a cat', tmp_path)
    red = {p.stem: Image.open(p).getpixel((0, 0)) == (255, 0, 0) for p in tmp_path.iterdir()}
    assert red == {'0000': False, '0001': True, '0002': True, '0003': True, '0004': False}


def call(name, *arguments):
    """Run a script of the project in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [name, *map(str, arguments)])
        runpy.run_path(str(PROJECT / f'{name}.py'), run_name='__main__')


def test_from_images_to_files(material, tmp_path, capsys):
    """Trained in two processes, as two accumulated batches train it in one, then used here."""
    from dreambooth import training
    from dreambooth.models import load_adapters

    more = options(material, 'sd15_flora') | {'prior.number': 2}
    changes = [f'{key}={value}' for key, value in more.items()]
    run, config_file = tmp_path / 'run', CONFIGS / 'sd15_flora.py'
    arguments = config_file, '--work-dir', run, '--cfg-options', *changes
    done = launch(2, PROJECT / 'train.py', *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    twin = compose(config_file, None, more | dict(accumulation=2))
    twin.prior.images = str(run / 'class')
    training.train(twin, tmp_path / 'twin')
    one, two = (load_file(folder / 'unet.safetensors') for folder in (tmp_path / 'twin', run))
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-4, rtol=1e-3)

    call('generate', run, '--seeds', 0, 7)
    images = run / 'images'
    listed = json.loads((images / 'images.json').read_text())
    assert len(listed) == 8 and listed[1] == dict(
        file='00_7.png', prompt='a cat in the jungle', seed=7
    )
    before, after = (Image.open(images / x / '00_7.png') for x in ('before', 'after'))
    assert before.size == (32, 32) and before.tobytes() != after.tobytes()
    page = Image.open(images / 'sheet.png')
    assert page.height == 24 + 4 * (24 + 2 * 256) and page.width >= 90 + 2 * 256
    tile = page.crop((90 + 256, 48 + 256, 90 + 512, 48 + 512))  # the second seed, after
    assert tile.tobytes() == after.resize((256, 256)).tobytes()

    clip, dino = clip_folder(tmp_path / 'clip'), dino_folder(tmp_path / 'dino')
    capsys.readouterr()
    call('evaluate', run, '--clip', clip, '--dino', dino)
    table = json.loads((images / 'fidelity.json').read_text())
    assert table['before'].keys() == table['after'].keys() == {'CLIP-I', 'DINO', 'CLIP-T'}
    assert f'| after | {table["after"]["CLIP-I"]:.3f} |' in capsys.readouterr().out

    (tmp_path / 'one').mkdir()
    shutil.copy(material / 'cat/0.png', tmp_path / 'one')
    call('evaluate', run, '--clip', clip, '--dino', dino, '--images', tmp_path / 'one')
    assert '| real images |  |  |  |' in capsys.readouterr().out

    pipeline = plain(twin)
    load_adapters(dict(unet=pipeline.unet), run)
    expected = latents_of(pipeline)
    call('export', run, '--merged', tmp_path / 'merged')
    call('export', run, '--lora', tmp_path / 'lora')
    merged, with_lora = plain(twin), plain(twin)
    merged.unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / 'merged/unet')
    with_lora.load_lora_weights(tmp_path / 'lora', weight_name='pytorch_lora_weights.safetensors')
    for other in (merged, with_lora):
        assert_close(latents_of(other), expected)


@pytest.mark.parametrize(
    'option, message',
    [
        ('accumulaton=4', "no 'accumulaton'. Did you mean 'accumulation'"),
        ('sampler.num_infernce_steps=3', "Did you mean 'num_inference_steps'"),
        ('peft.method.rank=3', "no 'peft.method.rank'"),
    ],
)
def test_an_option_that_nothing_reads(option, message, capsys):
    with pytest.raises(SystemExit, match=message):
        call('train', CONFIGS / 'sd15_flora.py', '--cfg-options', 'sampler.eta=1', option)


# From the config.json of the published UNets.
SD15 = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
SDXL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type='text_time',
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
RANKS = (2, 4, 8, 16, 32)


def lora_size(rank, shape, layout):
    outputs, inputs, k = shape[0], shape[1], shape[-1] if len(shape) > 2 else 1
    return rank * (k * k * (inputs + outputs) if layout == 'loralib' else k * k * inputs + outputs)


def flora_size(rank, shape):
    ranks = [min(most, size) for most, size in zip((rank, rank, 2, 2), shape, strict=False)]
    return np.prod(ranks) + sum(r * size for r, size in zip(ranks, shape, strict=True))


@pytest.mark.parametrize(
    'name, model, numbers, size, layers',
    [
        ('SD 1.5', 'sd15', SD15, 859_520_964, 282),
        ('SDXL', 'sdxl', SDXL, 2_567_463_684, 794),
    ],
)
def test_the_readme_has_the_parameters_of_the_published_unets(name, model, numbers, size, layers):
    with torch.device('meta'):
        unet = diffusers.UNet2DConditionModel(**numbers)
    shapes = [m.weight.shape for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sum(p.numel() for p in unet.parameters()) == size and len(shapes) == layers
    text = (PROJECT / 'README.md').read_text()
    rows = {
        'LoRA, LieRA': partial(lora_size, layout='loralib'),
        "LoRA, LieRA, `layout='channel'`": partial(lora_size, layout='channel'),
        'FLoRA': flora_size,
    }
    for label, formula in rows.items():
        row = re.search(rf'^\| {name} \| {re.escape(label)} \| (.*) \|$', text, re.MULTILINE)
        for rank, cell in zip(RANKS, row[1].split(' | '), strict=True):
            count = sum(formula(rank, shape) for shape in shapes)
            assert cell == f'{count / 1e6:.2f} M, {count / size:.2%}', (label, rank)
    for file in CONFIGS.glob(f'{model}_*.py'):
        method = compose(file).default_hooks.peft.method
        formula = rows['FLoRA' if method.type == 'FLoRA' else 'LoRA, LieRA']
        expected = sum(formula(method.rank, shape) for shape in shapes)
        assert mmpeft.inject(unet, method).adapters == expected, file
        mmpeft.remove(unet)
