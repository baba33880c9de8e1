"""The project on LLaVA, with scikit-image's photographs and what they show."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from PIL import Image
from skimage import data

import mmpeft
from mmpeft.checkpoint.adapter_file import read_adapter
from mmpeft.checkpoint.journal import read_journal
from mmpeft.engine.recipe import adapt, read_recipe
from mmpeft.errors import MissingFileError, UsageError
from tests.test_projects.language import small_llama_config, train_tokenizer

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / 'projects/llava'
FLORA = PROJECT / 'configs/flora_r128_llava_7b.py'
PHOTOGRAPHS = dict(
    astronaut='an astronaut',
    camera='a man with a camera',
    chelsea='a cat',
    coffee='a cup of coffee',
    coins='coins',
    rocket='a rocket',
    moon='the moon',
    horse='a horse',
)
ASKED = '<image>\nWhat does the photograph show?'
# Where a run on a CPU, with a few images, differs from the recipe.
SMALL = 'training.use_cpu=True', 'training.bf16=False', 'dtype=float32', 'batch_size=4'
SMALL += 'training.per_device_train_batch_size=4', 'training.dataloader_num_workers=0'
SMALL += 'training.disable_tqdm=True', 'peft.method.rank=16'


@pytest.fixture(scope='module')
def project(script):
    """The project's modules by name."""
    names = 'recipe', 'conversations', 'training', 'evaluation'
    modules = {n: script('projects/llava', f'llava_tuning.{n}') for n in names}
    return type('Project', (), modules)


def conversation(image, *texts):
    turns = [
        {'from': role, 'value': text}
        for role, text in zip(('human', 'gpt') * len(texts), texts, strict=False)
    ]
    return dict(id=image, conversations=turns) | (dict(image=image) if image else {})


def clip_config(**size):
    return hf.CLIPVisionConfig(image_size=32, patch_size=8, **size)


def save_llava(folder, texts):
    """Save LLaVA with two layers in each network, and its processor, into a folder."""
    words = train_tokenizer(texts, extra=['<image>'])
    vision = clip_config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    config = hf.LlavaConfig(
        vision, small_llama_config(words), image_token_index=words.convert_tokens_to_ids('<image>')
    )
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    side = dict(height=32, width=32)
    images = hf.LlavaImageProcessor(do_pad=True, size=side, crop_size=side)
    hf.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy='default',
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope='module')
def material(project, tmp_path_factory):
    """A folder with a model, photographs, and conversations on them."""
    folder = tmp_path_factory.mktemp('llava')
    (folder / 'images').mkdir()
    for name in PHOTOGRAPHS:
        pixels = getattr(data, name)()
        image = Image.fromarray(pixels if pixels.dtype == 'uint8' else pixels.astype('uint8') * 255)
        image.convert('RGB').resize((64, 48)).save(folder / f'images/{name}.png')
    items = [conversation(f'{name}.png', ASKED, said) for name, said in PHOTOGRAPHS.items()]
    (folder / 'train.json').write_text(json.dumps(items))
    torch.manual_seed(0)
    texts = [project.conversations.render(item['conversations'], '</s>')[0] for item in items]
    save_llava(folder / 'llava', texts)
    return folder


def items(material):
    return json.loads((material / 'train.json').read_text())


def arguments(material, *options):
    given = '--model', material / 'llava', '--data', material / 'train.json'
    given += '--images', material / 'images'
    once = {option.partition('=')[0]: option for option in (*SMALL, *options)}
    return [*map(str, (FLORA, *given)), '--cfg-options', *once.values()]


def test_conversations_as_text(project):
    turns = conversation('a.png', 'What?\n<image>', 'A cat.', 'Which colour?', 'Red.')
    text, answers = project.conversations.render(turns['conversations'], '</s>')
    assert text == (
        'A chat between a curious user and an artificial intelligence assistant. The assistant '
        "gives helpful, detailed, and polite answers to the user's questions. "
        'USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT: Red.</s>'
    )
    assert [text[slice(*answer)] for answer in answers] == [' A cat.</s>', ' Red.</s>']
    asked, none = project.conversations.render(turns['conversations'][:1], '</s>')
    assert text.startswith(asked) and asked.endswith('ASSISTANT:') and not none


def test_a_first_turn_that_is_no_question_is_left_out(project, material, tmp_path):
    late = item()
    late['conversations'] = [{'from': 'gpt', 'value': 'Hello.'}, *late['conversations']]
    (tmp_path / 'late.json').write_text(json.dumps([late]))
    read = project.conversations.read_conversations(tmp_path / 'late.json', material / 'images')
    assert read == [item()]


def test_labels_are_the_answers_alone(project, material):
    cfg = read_recipe(FLORA, model=str(material / 'llava'))
    processor, _ = project.recipe.load_base(cfg)
    words = processor.tokenizer
    items = [
        conversation('moon.png', ASKED, 'the moon', 'Which colour?', 'grey'),
        conversation(None, 'What does a rocket show?', 'a cat'),
    ]
    rows = project.conversations.Conversations(items, material / 'images', processor, 512)
    image, text = rows
    assert image['pixel_values'].shape == (3, 32, 32) and 'pixel_values' not in text
    assert image['input_ids'].count(processor.image_token_id) == 16
    said = [token for token in image['labels'] if token != -100]
    assert words.decode(said) == ' the moon</s> grey</s>'
    assert words.decode([t for t in text['labels'] if t != -100]) == ' a cat</s>'
    pairs = zip(image['input_ids'], image['labels'], strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    # As the processor and the tokenizer have it, each by itself.
    whole, _ = project.conversations.render(items[0]['conversations'], '</s>')
    opened = Image.open(material / 'images/moon.png')
    alone = processor(images=opened, text=whole, return_tensors='pt')
    assert alone['input_ids'][0].tolist() == image['input_ids']
    torch.testing.assert_close(alone['pixel_values'][0], image['pixel_values'])
    batch = project.conversations.Collator(words)([image, text])
    assert batch['pixel_values'].shape == (1, 3, 32, 32)
    assert batch['input_ids'].shape == batch['labels'].shape
    row = min((0, 1), key=lambda row: len(rows[row]['input_ids']))  # padded on the left
    assert batch['labels'][row, 0] == -100 and batch['attention_mask'][row, 0] == 0
    short = project.conversations.Conversations(items, material / 'images', processor, 90)
    assert short[0]['input_ids'] == image['input_ids'][:90]
    assert short[0]['labels'] == image['labels'][:90]


@pytest.mark.parametrize('method', ['lora', 'dora', 'flora'])
def test_shares(project, method):
    """LLaVA-1.5-7B's adapters and projector, of all parameters, adapters included."""
    vision = hf.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device('meta'):
        model = hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(vision, hf.LlamaConfig(vocab_size=32064))
        )
    whole = sum(p.numel() for p in model.parameters())
    cfg = read_recipe(PROJECT / f'configs/{method}_r128_llava_7b.py')
    found = adapt(model, cfg, empty=True)
    assert len(found.rows) == 7 * 32 and found.unfrozen == 20_979_712 and whole == 7_063_427_072
    row = next(
        line.strip('| ').split(' | ')
        for line in (PROJECT / 'README.md').read_text().splitlines()
        if f'`{method}_r128_llava_7b`' in line
    )
    share = (found.adapters + found.unfrozen) / (found.adapters + whole)
    assert row[2:4] == [f'{found.adapters:,}', f'{share:.2%}']
    trains = {n.split('.')[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {'language_model', 'multi_modal_projector'}


def test_from_training_to_exact_answers(project, material, tmp_path, capsys):
    """Train here, evaluate in another process with merged weights, here without merging."""
    run = tmp_path / 'run'
    rates = 'training.learning_rate=0.01', 'projector_rate=0.01', 'peft.method.scale=1.0'
    steps = 'training.num_train_epochs=40', 'training.save_steps=40', 'training.logging_steps=4'
    batch = 'batch_size=8', 'training.per_device_train_batch_size=8', 'peft.method.dropout=0.0'
    given = arguments(material, *rates, *steps, *batch)
    project.training.main([*given, '--work-dir', str(run)])
    state = json.loads((run / 'checkpoint-40/trainer_state.json').read_text())
    losses = [entry['loss'] for entry in state['log_history'] if 'loss' in entry]
    assert losses[-1] < 0.3 * losses[0]
    trained = read_adapter(run / 'adapter.safetensors')[1]
    base = hf.LlavaForConditionalGeneration.from_pretrained(material / 'llava').state_dict()
    own = {k: v for k, v in trained.items() if 'multi_modal_projector' in k}
    assert len(own) == 4 and not any(torch.equal(v, base[k]) for k, v in own.items())
    assert not [key for key in trained if 'vision_tower' in key]

    decode = '--cfg-options', 'generation.max_new_tokens=12'
    capsys.readouterr()
    done = subprocess.run(
        [sys.executable, PROJECT / 'evaluate.py', run, *decode],
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (merged,) = run.glob('train-*.jsonl')
    records = read_journal(merged)
    assert [record['answer'] for record in records] == [*PHOTOGRAPHS.values()]
    exact = sum(record['text'].strip() == record['answer'] for record in records)
    assert exact > 5 and f'{exact} of 8 exact = {exact / 8:.1%}' in done.stdout

    project.evaluation.main([str(run), '--no-merge', *decode])
    (beside,) = set(run.glob('train-*.jsonl')) - {merged}
    assert read_journal(beside) == read_journal(merged)
    cfg = read_recipe(run / 'recipe.py')
    processor, model = project.recipe.load_base(cfg)
    adapt(model.eval(), cfg, empty=True)
    mmpeft.load_adapter(model, run / 'adapter.safetensors')
    rows = project.conversations.Conversations(items(material), cfg.images, processor, 512)
    batch = project.conversations.Collator(processor.tokenizer)([*rows])
    with torch.no_grad():
        before = model(**batch).logits
        torch.testing.assert_close(
            mmpeft.merge(model)(**batch).logits, before, atol=1e-4, rtol=1e-4
        )
    # A killed evaluation goes on behind its last whole line.
    beside.write_text(beside.read_text()[:-30])
    project.evaluation.main([str(run), '--no-merge', *decode])
    assert read_journal(beside) == read_journal(merged)


def test_a_resumed_run(project, material, tmp_path):
    """To the same bits, in bfloat16 under autocast, on a base in nf4."""
    options = 'dtype=bfloat16', 'training.bf16=True', 'frozen_dtype=nf4', 'training.save_steps=2'
    options += 'training.max_steps=4', 'training.save_total_limit=2', 'peft.method.dropout=0.0'
    given = [*arguments(material, *options), '--work-dir', str(tmp_path)]
    project.training.main(given)
    through = read_adapter(tmp_path / 'adapter.safetensors')[1]
    assert {v.dtype for k, v in through.items() if 'projector' in k} == {torch.float32}
    assert not list((tmp_path / 'checkpoint-4').glob('*model*'))
    shutil.rmtree(tmp_path / 'checkpoint-4')
    project.training.main([*given, '--resume'])
    resumed = read_adapter(tmp_path / 'adapter.safetensors')[1]
    assert all(torch.equal(value, resumed[key]) for key, value in through.items())
    rates = torch.load(tmp_path / 'checkpoint-2/optimizer.pt')['param_groups']
    assert [group['initial_lr'] for group in rates] == [2e-4, 2e-5]


@pytest.mark.parametrize(
    'text, expected, exact',
    [(' A cat.', 'a cat', True), ('a cat', 'a cat.', True), ('cat', 'a cat', False)],
)
def test_exact(project, text, expected, exact):
    assert project.evaluation.is_exact(text, expected) == exact


def test_assembly(script, project, material, tmp_path):
    """The parts' weights are in the whole one, which computes LLaVA's projection of CLIP's maps."""
    assembly = script('projects/llava', 'llava_tuning.assembly')
    torch.manual_seed(0)
    words = train_tokenizer(['A photograph shows a cat.'], 280)
    language = hf.LlamaForCausalLM(small_llama_config(words)).float()
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    tower = hf.CLIPVisionModel(clip_config(**size))
    for part, name in ((language, 'language'), (words, 'language'), (tower, 'vision')):
        part.save_pretrained(tmp_path / name)
    layers = torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)
    projector = torch.nn.Sequential(*layers)
    named = {f'model.mm_projector.{k}': v for k, v in projector.state_dict().items()}
    torch.save(named, tmp_path / 'mm_projector.bin')
    folders = str(tmp_path / 'language'), str(tmp_path / 'vision')
    parts = assembly.assemble(*folders, tmp_path / 'mm_projector.bin', torch.float32)
    for part in parts:
        part.save_pretrained(tmp_path / 'whole')
    cfg = read_recipe(FLORA, model=str(tmp_path / 'whole'), options=dict(dtype='float32'))
    processor, model = project.recipe.load_base(cfg)
    assert model.get_input_embeddings().weight.shape[0] % 64 == 0
    image = Image.open(material / 'images/chelsea.png')
    given = processor(images=image, text='<image> A cat.', return_tensors='pt')
    with torch.no_grad():
        maps = tower(given['pixel_values'], output_hidden_states=True).hidden_states[-2][:, 1:]
        embedded = language.model.embed_tokens(given['input_ids'] % len(words))
        seen = given['input_ids'] == processor.image_token_id
        embedded[seen] = projector(maps)[0]
        expected = language(inputs_embeds=embedded).logits
        used = {k: given[k] for k in ('input_ids', 'attention_mask', 'pixel_values')}
        torch.testing.assert_close(model(**used).logits[..., : len(words)], expected)
    assert seen.sum() == 16

    wrong = {k: v[:3] for k, v in named.items()}
    torch.save(wrong, tmp_path / 'mm_projector.bin')
    with pytest.raises(UsageError, match='does not fit'):
        assembly.assemble(*folders, tmp_path / 'mm_projector.bin')
    torch.save(dict(weight=wrong), tmp_path / 'mm_projector.bin')
    with pytest.raises(UsageError, match='mlp2x_gelu'):
        assembly.main([str(tmp_path / 'mm_projector.bin')])
    with pytest.raises(MissingFileError, match='no projector'):
        assembly.main([str(tmp_path / 'none.bin')])


def item(**changed):
    return conversation('horse.png', ASKED, 'a horse') | changed


@pytest.mark.parametrize(
    'items, message',
    [
        ({}, 'has to hold a list'),
        ([dict(id=1)], "Conversation 0 .* has no 'conversations'"),
        ([item(conversations=item()['conversations'][:1])], "has no 'conversations'"),
        ([item(conversations=item()['conversations'][:1] * 2)], "where 'gpt' is to speak"),
        ([conversation(None, ASKED, 'a horse')], 'has 1 <image> in its texts'),
        ([item(image='none.png')], 'no image .*none.png. .1 of 1 are missing.*--images'),
        ([item(), item(image='a.png'), item(image='b.png')], 'a.png. .2 of 3 are missing'),
    ],
)
def test_wrong_conversations_are_one_sentence(project, material, tmp_path, items, message):
    (tmp_path / 'wrong.json').write_text(json.dumps(items))
    with pytest.raises(UsageError, match=message):
        project.conversations.read_conversations(tmp_path / 'wrong.json', material / 'images')


def test_a_run_s_folder_has_its_method_and_config(project, material, monkeypatch):
    folders = []
    monkeypatch.setattr(
        project.training, 'train', lambda cfg, folder, resume: folders.append(folder)
    )
    for method in (), ('--method', 'pissa'):
        project.training.main([*arguments(material), *method])
    name = FLORA.stem
    assert folders == [Path('work_dirs/llava', name), Path('work_dirs/llava/pissa', name)]


def test_what_is_missing_is_named(project, material, tmp_path):
    with pytest.raises(
        MissingFileError, match=r'no file .*llava_v1_5_mix665k\.json is at .*--data'
    ):
        project.training.main([*arguments(material), '--data', str(tmp_path / 'none.json')])
    with pytest.raises(MissingFileError, match=r'no model .*assemble\.py.*--model'):
        project.training.main([*arguments(material), '--model', str(tmp_path / 'none')])
    with pytest.raises(UsageError, match='batch_size=6 is not a multiple of the 4'):
        project.training.main(arguments(material, 'batch_size=6'))
    with pytest.raises(MissingFileError, match='not a work directory of train.py'):
        project.evaluation.main([str(tmp_path)])
