"""The documents: links lead somewhere, files exist, code runs, and the site builds."""

import copy
import re
import subprocess
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState
from torch import nn

import mmpeft
from mmpeft.engine.config import compose
from mmpeft.engine.packages import import_task
from mmpeft.registry import HOOKS
from tests.allocating import network
from tests.cases import randomize
from tests.hf_zoo import VISION, WORDS
from tests.zoo import TIMM

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = [
    *ROOT.glob('*.md'),
    *DOCS.glob('*.md'),
    *ROOT.glob('configs/*/README.md'),
    *ROOT.glob('projects/**/README.md'),
]
# What a run makes, and what a reader is to make.
MADE = re.compile(r'work_dirs/|data/|/(mine|new|my\w*|pets|digits|merged)\.|[<>{*]|NAME|\.\.\.')


def blocks(page, language='python'):
    text = (DOCS / page).read_text()
    return re.findall(rf'^```{language}\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE)


def anchors_of(path):
    """What GitHub and the site make of a page's headings."""
    text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    plain = (re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading) for heading in headings)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in plain}


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r'\]\((?!https?:)([^)]+)\)', text):
        file, _, anchor = link.partition('#')
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


# The changelog names files of earlier versions.
@pytest.mark.parametrize(
    'page',
    [p for p in PAGES if p.stem != 'CHANGELOG'],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_that_are_named_exist(page):
    ending = r'\.(?:py|sh|md|txt|json|jsonl|yml)'
    named = re.findall(
        rf'(?<![\w/.-])((?:tools|configs|docs|mmpeft|tests|requirements|projects)/[^\s`)\]:"]*{ending})\b',
        page.read_text(),
    )
    for name in named:
        if not MADE.search(name):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_command_has_lines_of_its_own(page):
    text = page.read_text().replace('\\\n', '')
    for block in re.findall(r'^ *```bash\n(.*?)^ *```', text, flags=re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            assert len(re.findall(r'tools/\w+\.(?:py|sh)', line)) <= 1, line
            assert not line.strip().startswith(('configs/', 'work_dirs/', 'data/', '-')), line


def test_the_layout_names_what_is_there():
    named = re.findall(r'`([a-z_/]+\.py)`', (DOCS / 'layout.md').read_text())
    assert named
    assert [
        name for name in named if not any((ROOT / r / name).exists() for r in ('mmpeft', ''))
    ] == []


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / 'index.md').read_text()
    listed = set(re.findall(r'^(\w+)$', index, re.MULTILINE))
    assert listed == {path.stem for path in DOCS.glob('*.md')} - {'index'}


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_api(tmp_path, monkeypatch, capsys):
    """All blocks of the page, one after the other."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in blocks('api.md'):
        exec(block, names)
    assert names['summary'].adapters > 0 and (tmp_path / 'adapter.safetensors').exists()
    assert 'FLoRA' in repr(mmpeft.summary(names['model'])) + capsys.readouterr().out


def test_deploy(tmp_path, monkeypatch):
    """The block of the page, and the options of its commands."""
    monkeypatch.chdir(tmp_path)
    base, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(2, 6)
    model, another_base = copy.deepcopy(base), copy.deepcopy(base)
    mmpeft.inject(model, dict(type='LoRA', rank=2))
    randomize(model)
    (block,) = blocks('deploy.md')
    exec(block, dict(model=model, another_base=another_base))
    assert torch.equal(another_base(x), model(x)) and not torch.equal(model(x), base(x))
    text = (DOCS / 'deploy.md').read_text()
    used = set(re.findall(r'(?<=[ `(])--[a-z-]+', text))
    names = re.findall(r'tools/(\w+)\.py', text)
    tools = ''.join((ROOT / f'tools/{name}.py').read_text() for name in names)
    assert used and [option for option in used if f"'{option}'" not in tools] == []


def anywhere(section, monkeypatch, tmp_path, **names):
    """The names after all blocks of a section of anywhere.md, which begin with some."""
    text = (DOCS / 'anywhere.md').read_text().split(f'\n## {section}\n')[1].split('\n## ')[0]
    monkeypatch.chdir(tmp_path)
    names['torch'] = torch
    for block in re.findall(r'^```python\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names


def images_and_labels(batches=20):
    pairs = [(torch.randn(4, 3, 6, 6), torch.arange(4)) for _ in range(batches)]
    return torch.utils.data.DataLoader(pairs, batch_size=None)


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
@pytest.mark.parametrize('section', ['A loop of your own', 'Accelerate', 'Lightning'])
def test_anywhere_in_loops(section, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
    names = dict(model=network().float(), loader=images_and_labels())
    names = anywhere(section, monkeypatch, tmp_path, **names)
    monitor = names.get('monitor') or names['classifier'].monitor
    (allocator,) = monitor.allocation.allocators
    assert allocator.step == monitor.iteration == allocator.steps > 9
    assert not monitor.optimizer._optimizer_step_post_hooks


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_anywhere_in_a_trainer(tmp_path, monkeypatch):
    words = [dict(input_ids=torch.randint(3, 40, (6,)), labels=i % 2) for i in range(24)]
    model = hf.BertForSequenceClassification(hf.BertConfig(**WORDS))
    names = dict(model=model, pretrained=copy.deepcopy(model), dataset=words)
    before = copy.deepcopy(model.state_dict())
    # The page is written for a GPU.
    monkeypatch.setattr('transformers.training_args.is_torch_bf16_gpu_available', lambda: True)
    names = anywhere('Hugging Face Trainer', monkeypatch, tmp_path, **names)
    assert (tmp_path / 'work_dirs/bert/checkpoint-10/adapter.safetensors').is_file()
    assert not torch.equal(model.classifier.weight, before['classifier.weight'])
    merged = hf.BertForSequenceClassification.from_pretrained('merged').eval()
    given = words[0]['input_ids'][None]
    with torch.no_grad():
        expected = names['pretrained'].eval()(given).logits
        torch.testing.assert_close(merged(given).logits, expected)


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_anywhere_in_diffusers(tmp_path, monkeypatch):
    import diffusers

    blocks = dict(down_block_types=['CrossAttnDownBlock2D'], up_block_types=['CrossAttnUpBlock2D'])
    size = dict(block_out_channels=[8], norm_num_groups=4, layers_per_block=1, sample_size=8)
    unet = diffusers.UNet2DConditionModel(
        **blocks, **size, cross_attention_dim=8, attention_head_dim=4
    )
    pairs = [(torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)) for _ in range(20)]
    names = dict(unet=unet, scheduler=diffusers.DDPMScheduler(), loader=pairs)
    anywhere('Diffusers', monkeypatch, tmp_path, **names)
    rows = mmpeft.summary(unet).rows
    assert rows and all('attn' in row.name for row in rows)


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_anywhere_what_to_adapt(tmp_path, monkeypatch):
    vision = hf.CLIPVisionConfig(**VISION)
    text = hf.LlamaConfig(**WORDS)
    llava = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision, text, image_token_index=49, image_seq_length=16)
    )
    segmenter = nn.ModuleDict({k: nn.Conv2d(4, 4, 3) for k in ('down_blocks', 'up_blocks')})
    segmenter = nn.ModuleDict({k: nn.ModuleList([v]) for k, v in segmenter.items()})
    names = dict(classifier=TIMM['vit'].build(), llava=llava, segmenter=segmenter, mmpeft=mmpeft)
    section = 'What to adapt, and what to unfreeze'
    anywhere(section, monkeypatch, tmp_path, **names)

    def trains(model):
        return {name for name, p in model.named_parameters() if p.requires_grad}

    def where(model):
        return {row.name for row in mmpeft.summary(model).rows}

    classifier = names['classifier']
    assert {'head.weight', 'head.bias'} <= trains(classifier)
    assert where(classifier) and not {n for n in where(classifier) if n.startswith('head')}
    assert all('language_model' in name for name in where(llava))
    others = {name for name in trains(llava) if 'parametrizations' not in name}
    assert others and all('multi_modal_projector' in name for name in others)
    assert where(segmenter) == {'up_blocks.0.weight'}

    pixels, words = torch.randn(1, 3, 32, 32), torch.tensor([[5] + [49] * 16 + [7, 9]])
    optimizer = torch.optim.AdamW([p for p in llava.parameters() if p.requires_grad], 1e-3)
    with mmpeft.monitor(llava, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            llava(input_ids=words, pixel_values=pixels, labels=words).loss.backward()
            optimizer.step()
    assert all(p.grad.any() for n, p in llava.named_parameters() if 'projector' in n)


def test_several_adapters_on_one_base(tmp_path, monkeypatch):
    block = next(b for b in blocks('serving.md') if 'AdapterLibrary' in b)
    monkeypatch.chdir(tmp_path)
    detector, x = build_detector(), torch.randn(1, 3, 8, 8)
    before, expected = detector(x), {}
    for seed, name in enumerate(re.findall(r"'(\w+)\.safetensors'", block)):
        adapted = copy.deepcopy(detector)
        mmpeft.inject(adapted, dict(type='FLoRA', rank=2), dict(module='backbone'))
        torch.manual_seed(seed)
        randomize(adapted)
        nn.init.normal_(adapted.head.weight)
        expected[name] = adapted(x)
        mmpeft.save_adapter(adapted, f'{name}.safetensors')
    names = dict(detector=detector)
    exec(block, names)
    adapters = names['adapters']
    assert len(expected) == 2 and adapters.current == 'harbour'
    for name, output in expected.items():
        assert torch.equal(adapters.use(name)(x), output)
    adapters.combine('both', {'city': 0.7, 'harbour': 0.3}, heads='city')
    assert not torch.equal(adapters.use('both')(x), expected['city'])
    assert torch.equal(adapters.use(None)(x), before)


def build_detector():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    parts = dict(backbone=backbone, head=nn.Conv2d(8, 2, 1))
    return nn.Sequential(OrderedDict(parts))


@pytest.mark.parametrize('page', ['configs.md', 'hook.md'])
def test_hooks_of_the_pages_can_be_built(page):
    found = [block for block in blocks(page) if block.startswith('default_hooks')]
    assert found
    for block in found:
        names = {}
        exec(block, names)
        HOOKS.build(names['default_hooks']['peft'])


@pytest.mark.usefixtures('scope')
def test_a_dataset_of_label_images(tmp_path, monkeypatch):
    block = next(b for b in blocks('configs.md') if 'data/aerial' in b)
    monkeypatch.chdir(tmp_path)
    for folder, ending in (('images', 'jpg'), ('annotations', 'png')):
        for split in ('training', 'validation'):
            (tmp_path / 'data/aerial' / folder / split).mkdir(parents=True)
            picture = np.full((64, 64, 3) if ending == 'jpg' else (64, 64), 3, np.uint8)
            cv2.imwrite(str(tmp_path / f'data/aerial/{folder}/{split}/a.{ending}'), picture)
    (tmp_path / 'aerial.py').write_text(block)
    config = compose('aerial.py')
    import_task(config)
    from mmseg.registry import DATASETS

    for loader in (config.train_dataloader, config.val_dataloader):
        dataset = DATASETS.build(loader.dataset)
        (sample,) = dataset
        assert sample['data_samples'].gt_sem_seg.data.unique().tolist() == [2]
        assert dataset.metainfo['classes'] == ('road', 'roof', 'tree')


def test_site_builds_without_warnings(tmp_path):
    command = ['-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', DOCS, tmp_path / 'html']
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    html = tmp_path / 'html'
    assert (html / 'searchindex.js').stat().st_size > 100_000
    assert 'id="pissa"' in (html / 'methods.html').read_text()
    reference = (html / 'reference/mmpeft.html').read_text()
    missing = [n for n in mmpeft.__all__ if n[0] != '_' and f'id="mmpeft.{n}"' not in reference]
    assert not missing
    for page in html.rglob('*.html'):
        check_local_links(page, html)


def check_local_links(page, root):
    """What a page of the site refers to is there, anchors included."""
    text = page.read_text()
    for link in re.findall(r'(?:href|src)="([^"]+)"', text):
        file, _, anchor = link.partition('#')
        if re.match(r'\w+:|//', link):
            continue
        target = page if not file else (page.parent / file.partition('?')[0]).resolve()
        assert target.exists(), f'{page.relative_to(root)}: {link}'
        if anchor and target.suffix == '.html' and '_modules' not in target.parts:
            assert anchor in anchors(target), f'{page.relative_to(root)}: {link}'


@cache
def anchors(page):
    return set(re.findall(r'id="([^"]+)"', page.read_text()))
