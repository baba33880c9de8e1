"""The project on commonsense reasoning, with questions on scikit-learn's data sets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from sklearn import datasets

import mmpeft
from mmpeft.checkpoint.adapter_file import read_adapter
from mmpeft.checkpoint.journal import read_journal
from mmpeft.engine.recipe import adapt, read_recipe
from mmpeft.errors import MissingFileError, UsageError
from tests.test_projects.language import save_llama

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / 'projects/commonsense'
SHARDED_RUN = ROOT / 'tests/test_projects/sharded_run.py'
LORA = PROJECT / 'configs/lora_r16_llama_7b.py'
# Where a run on a CPU, with a few examples, differs from the recipe.
SMALL = ('training.use_cpu=True', 'training.warmup_steps=2', 'training.disable_tqdm=True')
SMALL += ('held_out=0',)


@pytest.fixture(scope='module')
def project(script):
    """The project's modules by name."""
    names = 'protocol', 'recipe', 'training', 'evaluation'
    modules = {n: script('projects/commonsense', f'commonsense.{n}') for n in names}
    return type('Project', (), modules)


@pytest.fixture(scope='module')
def material(project, tmp_path_factory):
    """A folder with a model, a training file, and the eight sets with its questions."""
    folder = tmp_path_factory.mktemp('commonsense')
    loaded = {name: getattr(datasets, f'load_{name}')() for name in ('iris', 'wine', 'digits')}
    questions = []
    for name, (_, answers) in project.protocol.SETS.items():
        own = []
        for number, (data, bunch) in enumerate(loaded.items()):
            axis, right = number % 2, answers[number % 2]
            size = bunch.data.shape[axis]
            shown = (f'{a}: {size + 7 * i * (a != right)}' for i, a in enumerate(answers, 1))
            asked = f'How many {("samples", "features")[axis]} has {data}? {" ".join(shown)}'
            said = f'the correct answer is {right}'
            own.append(dict(instruction=asked, input='', output=said, answer=right))
        (folder / 'sets' / name).mkdir(parents=True)
        (folder / 'sets' / name / 'test.json').write_text(json.dumps(own))
        questions += own
    (folder / 'train.json').write_text(json.dumps(questions))
    torch.manual_seed(0)
    texts = [project.protocol.prompt(q['instruction']) + q['output'] for q in questions]
    save_llama(folder / 'llama', texts + [bunch.DESCR for bunch in loaded.values()])
    return folder


def arguments(material, *options, config=LORA):
    given = '--model', material / 'llama', '--data', material / 'train.json'
    once = {option.partition('=')[0]: option for option in (*SMALL, *options)}
    return [*map(str, (config, *given)), '--cfg-options', *once.values()]


def test_prompts(project):
    task = 'Below is an instruction that describes a task'
    ends = 'Write a response that appropriately completes the request.'
    prompt = project.protocol.prompt
    assert prompt('Add.') == f'{task}. {ends}\n\n### Instruction:\nAdd.\n\n### Response:\n'
    assert prompt('Add.', '1 2') == (
        f'{task}, paired with an input that provides further context. {ends}'
        '\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n'
    )


@pytest.mark.parametrize(
    'name, text, expected',
    [
        ('boolq', 'the correct answer is true, not false', 'true'),
        ('boolq', 'True', ''),
        ('piqa', 'solution3 or solution2 or solution1', 'solution2'),
        ('social_i_qa', 'answer12', 'answer1'),
        ('ARC-Easy', 'answer1\n### Response:\n answer4', 'answer4'),
        ('openbookqa', 'answer6', ''),
        ('hellaswag', 'ending4', 'ending4'),
        ('winogrande', '', ''),
    ],
)
def test_answers_in_texts(project, name, text, expected):
    assert project.protocol.extract_answer(text, project.protocol.SETS[name][1]) == expected


def test_labels_and_the_end_of_the_text(project, material):
    words = hf.AutoTokenizer.from_pretrained(material / 'llama')
    item = json.loads((material / 'train.json').read_text())[0]
    asked = project.protocol.prompt(item['instruction'])
    before, after = words(asked)['input_ids'], words(item['output'])['input_ids'][1:]
    assert before[0] == words.bos_token_id
    whole = [*before, *after, words.eos_token_id]
    encode = project.training.encode
    assert encode(item, words, 256, True) == dict(
        input_ids=whole, attention_mask=[1] * len(whole), labels=whole
    )
    answers = encode(item, words, 256, False)
    assert answers['input_ids'] == whole
    assert answers['labels'] == [-100] * len(before) + whole[len(before) :]
    cut = encode(item, words, len(before) + 1, False)
    assert cut['input_ids'] == whole[: len(before) + 1] and cut['labels'][-1] == after[0]


SIZES = dict(
    llama_7b=dict(vocab_size=32000, intermediate_size=11008),
    llama3_8b=dict(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
)


def llama_on_meta(base, layers=32):
    heads = dict(hidden_size=4096, num_attention_heads=32, num_hidden_layers=layers)
    with torch.device('meta'):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES[base], **heads))


@pytest.mark.parametrize('base', SIZES)
def test_shares_of_the_papers_rows(project, base):
    """Of the base, or of base and adapters together (LLaMA3, r = 32)."""
    text = (PROJECT / 'README.md').read_text()
    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if f'_{base}` |' in line]
    assert len(rows) == (4 if base == 'llama_7b' else 6)
    model = llama_on_meta(base)
    whole = sum(p.numel() for p in model.parameters())
    assert whole == dict(llama_7b=6_738_415_616, llama3_8b=8_030_261_248)[base]
    for _, config, rate, adapters, share, papers in rows:
        cfg = read_recipe(PROJECT / 'configs' / f'{config.strip("`")}.py')
        assert cfg.training.learning_rate == float(rate)
        small = llama_on_meta(base, layers=2)
        found = 16 * adapt(small, cfg, empty=True).adapters
        assert f'{found:,}' == adapters and f'{found / whole:.2%}' == share
        assert papers in (share, f'{found / (found + whole):.2%}')
        rank = 16 if 'r16' in config else 32
        assert papers == {16: ('0.42%', '0.35%'), 32: ('0.83%', '0.70%')}[rank][base != 'llama_7b']
    summary = adapt(model, cfg, empty=True)  # of r = 32, with all layers
    assert (summary.adapters, summary.base, len(summary.rows)) == (found, whole, 160)


def test_the_other_configs(project):
    text = (PROJECT / 'README.md').read_text()
    doras = dict(re.findall(r'`(dora_\w+)` \(([\d,]+) = ', text))
    for config, expected in doras.items():
        base = config.partition('_r')[2][3:]
        cfg = read_recipe(PROJECT / f'configs/{config}.py')
        found = 16 * adapt(llama_on_meta(base, 2), cfg, empty=True).adapters
        assert f'{found:,}' == expected
    configs = sorted((PROJECT / 'configs').glob('*.py'))
    assert len(configs) == 5 * 2 * 2 and len(doras) == 4
    for path in configs:
        name, rank, base = re.fullmatch(r'(\w+)_r(\d\d)_(llama_7b|llama3_8b)', path.stem).groups()
        cfg = read_recipe(path)
        method = mmpeft.METHODS.build(cfg.peft.method.to_dict())
        assert type(method).__name__.lower() == name and method.rank == int(rank)
        assert method.scaling == (1 if name in ('pissa', 'milora') else 2)
        assert method.dropout == 0.05 and cfg.batch_size == 16 and cfg.training.warmup_steps == 100


def test_from_training_to_the_table(project, material, tmp_path, capsys):
    """Train here, evaluate in another process with merged weights, here without merging."""
    run = tmp_path / 'run'
    options = 'dtype=float32', 'held_out=4', 'train_on_prompt=False', 'batch_size=8'
    steps = 'training.num_train_epochs=14', 'training.eval_steps=10', 'training.save_steps=10'
    rate = 'training.learning_rate=0.01', 'training.logging_steps=4'
    given = arguments(material, *options, *steps, *rate)
    project.training.main([*given, '--work-dir', str(run)])
    assert not list((run / 'checkpoint-42').glob('*model*'))
    state = json.loads((run / 'checkpoint-42/trainer_state.json').read_text())
    losses = [entry['loss'] for entry in state['log_history'] if 'loss' in entry]
    assert losses[-1] < 0.3 * losses[0]
    best = Path(state['best_model_checkpoint'], 'adapter.safetensors')
    assert best.read_bytes() == (run / 'adapter.safetensors').read_bytes()

    sets = '--sets', str(material / 'sets')
    decode = '--cfg-options', 'generation.num_beams=2', 'generation.max_new_tokens=10'
    capsys.readouterr()
    done = subprocess.run(
        [sys.executable, PROJECT / 'evaluate.py', run, *sets, *decode],
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (answers,) = run.glob('answers-*')
    records = {path.stem.rpartition('-')[0]: read_journal(path) for path in answers.iterdir()}
    assert records.keys() == project.protocol.SETS.keys()
    right = {n: [r['text'].endswith(r['answer']) for r in own] for n, own in records.items()}
    scores = [100 * sum(right[name]) / 3 for name in project.protocol.SETS]
    assert sum(scores) / 8 > 60  # guessing: 35
    row = ' | '.join(f'{score:.1f}' for score in [*scores, sum(scores) / 8])
    assert done.stdout.splitlines()[-1].endswith(f' | {row} |')

    only = '--only', 'boolq', 'ARC-Easy'
    project.evaluation.main([str(run), *sets, *only, '--no-merge', *decode])
    (beside,) = set(run.glob('answers-*')) - {answers}
    asked = [*beside.iterdir()]
    assert len(asked) == 2
    assert all((answers / path.name).read_text() == path.read_text() for path in asked)
    cfg = read_recipe(run / 'recipe.py')
    words, model = project.recipe.load_base(cfg)
    adapt(model.eval(), cfg, empty=True)
    mmpeft.load_adapter(model, run / 'adapter.safetensors')
    ids = words('How many samples has iris?', return_tensors='pt')['input_ids']
    with torch.no_grad():
        before = model(ids).logits
        merged_too = mmpeft.merge(model)(ids).logits
    torch.testing.assert_close(merged_too, before, atol=1e-4, rtol=1e-4)
    # A killed evaluation goes on behind its last whole line, and asks nothing else again.
    (path,) = beside.glob('boolq-*.jsonl')
    path.write_text(path.read_text()[:-30])
    capsys.readouterr()
    project.evaluation.main([str(run), *sets, *only, '--no-merge', *decode])
    assert capsys.readouterr().out.count(' of 3') == 1
    assert read_journal(path) == read_journal(answers / path.name)


@pytest.mark.parametrize('way', ['fsdp', 'deepspeed'])
def test_sharded_by_accelerate(way, project, material, tmp_path):
    """Two processes, resumed or not, train what one process does."""
    options = 'dtype=float32', 'peft.method.dropout=0.0', 'held_out=4', 'batch_size=4'
    steps = 'training.max_steps=4', 'training.eval_steps=2', 'training.save_steps=2'
    given = arguments(material, *options, *steps, 'training.per_device_train_batch_size=2')
    project.training.main([*given, '--work-dir', str(tmp_path / 'one')])
    given.remove('training.use_cpu=True')
    launch = '-m', 'accelerate.commands.launch', '--config_file', PROJECT / f'{way}.yaml'
    launch += '--num_processes', 2, '--main_process_port', 0, SHARDED_RUN
    done = subprocess.run(
        [sys.executable, *map(str, launch), *given, '--work-dir', str(tmp_path / 'two')],
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = 'one/adapter', 'two/through', 'two/adapter'
    one, two, resumed = (read_adapter(tmp_path / f'{n}.safetensors')[1] for n in names)
    assert all(torch.equal(two[key], resumed[key]) for key in two)
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=1e-3)


def test_few_bits(project, material, tmp_path):
    given = arguments(material, 'frozen_dtype=nf4', 'training.max_steps=2')
    project.training.main([*given, '--work-dir', str(tmp_path)])
    only = str(tmp_path), '--sets', str(material / 'sets'), '--only', 'boolq'
    few = '--cfg-options', 'generation.num_beams=1', 'generation.max_new_tokens=1'
    project.evaluation.main([*only, *few])
    project.evaluation.main([*only, '--no-merge', *few])
    merged, beside = tmp_path.glob('answers-*/boolq-*.jsonl')
    assert len(merged.read_text().splitlines()) == len(beside.read_text().splitlines()) == 3


def test_examples_without_an_answer_are_left_out(project, material, tmp_path, capsys):
    words = hf.AutoTokenizer.from_pretrained(material / 'llama')
    items = json.loads((material / 'train.json').read_text())
    starts = sorted(
        len(words(project.protocol.prompt(i['instruction']))['input_ids']) for i in items
    )
    given = 'train_on_prompt=False', 'training.max_steps=1', f'cutoff={starts[9]}'
    project.training.main([*arguments(material, *given), '--work-dir', str(tmp_path / 'run')])
    lost = sum(start >= starts[9] for start in starts)
    assert (
        0 < lost < 24
        and f'{lost} without any of their answer are left out' in capsys.readouterr().out
    )
    with pytest.raises(UsageError, match='cutoff=8 leaves an answer to 0 of the 24 examples'):
        project.training.main(arguments(material, *given[:2], 'cutoff=8'))
    kept = f'held_out={24 - lost}'
    with pytest.raises(UsageError, match=f'leaves an answer to {24 - lost} of .*{kept} of them do'):
        project.training.main(arguments(material, *given, kept))


def test_another_method(project):
    cfg = read_recipe(LORA, method='flora', options={'peft.method.rank': 4})
    summary = adapt(llama_on_meta('llama_7b', 1), cfg, empty=True)
    assert {row.method for row in summary.rows} == {'FLoRA(scale=4.0, rank=4)'}
    assert {row.name.split('.')[-2] for row in summary.rows} == {
        f'{name}_proj' for name in ('q', 'k', 'v', 'up', 'down')
    }


def wrong_file(folder, content):
    path = folder / 'wrong.json'
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'There is no file .*commonsense_170k.json is in the folder .*--data names'),
        ('[', 'is not JSON'),
        ('{}', 'has to hold a list'),
        ('[{"instruction": "", "input": "", "output": 1}]', 'Item 0 .* no text at output, answer'),
    ],
)
def test_a_wrong_training_file_is_one_sentence(project, tmp_path, content, message):
    path = tmp_path / 'none.json' if content is None else wrong_file(tmp_path, content)
    with pytest.raises(UsageError, match=message):
        project.training.main([str(LORA), '--data', str(path)])


@pytest.mark.parametrize(
    'option, message',
    [
        ('batch_size=6', 'batch_size=6 is not a multiple of the 4 examples that 1 processes'),
        ('held_out=24', 'held_out=24 of the 24 examples .* leave none'),
        ('training.learning_rat=1', "no 'learning_rat'.*Did you mean 'learning_rate'"),
        ('cut_off=1', "there is no 'cut_off'.*Did you mean 'cutoff'"),
    ],
)
def test_a_wrong_option_is_one_sentence(project, material, option, message):
    with pytest.raises(UsageError, match=message):
        project.training.main(arguments(material, option))


def test_a_run_s_folder_has_its_method_and_config(project, material, monkeypatch):
    folders = []
    monkeypatch.setattr(
        project.training, 'train', lambda cfg, folder, resume: folders.append(folder)
    )
    for method in (), ('--method', 'pissa'):
        project.training.main([*arguments(material), *method])
    name = LORA.stem
    assert folders == [
        Path('work_dirs/commonsense', name),
        Path('work_dirs/commonsense/pissa', name),
    ]


def test_what_is_missing_is_named(project, material, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    given = [*arguments(material), '--model', 'huggyllama/llama-7b']
    with pytest.raises(
        MissingFileError, match=r'no model .*hf download huggyllama/llama-7b --local'
    ):
        project.training.main(given)
    with pytest.raises(MissingFileError, match='no model .*--model FOLDER'):
        project.training.main([*arguments(material), '--model', str(tmp_path / 'none')])
    with pytest.raises(UsageError, match="no set 'bolq'.*Did you mean 'boolq'"):
        project.evaluation.main([str(tmp_path), '--only', 'bolq'])
    with pytest.raises(MissingFileError, match='not a work directory of train.py'):
        project.evaluation.main([str(tmp_path)])
    (tmp_path / 'boolq').mkdir()
    item = dict(instruction='', input='', output='', answer='yes')
    (tmp_path / 'boolq/test.json').write_text(json.dumps([item]))
    with pytest.raises(UsageError, match="the answer 'yes', and boolq knows true, false"):
        project.protocol.read_set(tmp_path, 'boolq')
