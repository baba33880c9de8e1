"""The comparison of methods: what runs, and how it is summed up."""

import json
import sys

import pytest

from mmpeft.engine.sweep import Run, compare, markdown
from mmpeft.errors import MissingFileError

CONFIG = 'mmpeft::demo/_base_/coco.py'
pytestmark = pytest.mark.usefixtures('scope')

# Stands for train.py: notes its arguments, and writes what a Runner logs.
TRAINER = """
import json, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index('--work-dir') + 1])
(folder / 'called.json').write_text(json.dumps(words))
if 'dora' in words:
    raise SystemExit('out of luck')
logs = folder / '20250101/vis_data'
logs.mkdir(parents=True, exist_ok=True)
seed = int(next(word[-1] for word in words if word.startswith('randomness.seed=')))
lines = [{'loss': 2.0, 'time': 0.5}, {'coco/bbox_mAP': 0.9, 'time': 1}]
lines.append({'coco/bbox_mAP': 0.2 + 0.1 * seed, 'coco/segm_mAP': 0.5, 'data_time': 1, 'step': 9})
(logs / 'scalars.json').write_text('\\n'.join(map(json.dumps, lines)))
"""


@pytest.fixture
def trainer(tmp_path):
    path = tmp_path / 'trainer.py'
    path.write_text(TRAINER)
    return path


@pytest.fixture
def sweep(script, trainer, monkeypatch, tmp_path):
    """Call the tool with a stand-in for train.py, in an empty folder."""
    module = script('tools/analysis_tools', 'sweep')
    monkeypatch.setattr(module, 'TRAIN', trainer)
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['sweep.py', CONFIG, *map(str, words)])
        module.main()

    return call


def test_from_methods_to_a_table(sweep, tmp_path, capsys):
    words = ['--methods', 'lora', 'bitfit', 'dora', '--budget', '100k', '--out', 'out']
    sweep(*words, '--seeds', 0, 1, '--cfg-options', 'train_cfg.max_iters=2')
    shown = capsys.readouterr().out
    assert '6 of 6: out/dora/seed1' in shown
    assert '| lora | ' in shown and '| 0.250 ± 0.071 | 0.500 ± 0.000 | 2 |' in shown
    assert 'dora failed: status 1: out of luck' in shown
    called = json.loads((tmp_path / 'out/lora/seed1/called.json').read_text())
    assert called[:3] == [CONFIG, '--method', 'lora']
    options = called[called.index('--cfg-options') + 1 :]
    assert options == [
        'train_cfg.max_iters=2',
        'randomness.seed=1',
        'default_hooks.peft.method.budget=100k',
    ]
    assert 'budget' not in (tmp_path / 'out/bitfit/seed0/called.json').read_text()
    rows = {row['method']: row for row in json.loads((tmp_path / 'out/results.json').read_text())}
    assert 90_000 < rows['lora']['parameters'] - 1_216 <= 100_000  # and the new norms
    assert list(rows)[-1] == 'dora' and rows['dora']['runs'] == 0

    sweep(*words, '--seeds', 0, 1, 2, '--cfg-options', 'train_cfg.max_iters=2')
    shown = capsys.readouterr().out
    # two new seeds, and three runs that failed
    assert '5 of 5' in shown and '| 0.300 ± 0.100 |' in shown


def test_other_arguments_are_another_run(trainer, tmp_path):
    run = Run(CONFIG, 'frozen', 0, (), None, tmp_path)
    run.train(trainer)
    assert run.result()['scores'] == {'coco/bbox_mAP': 0.2, 'coco/segm_mAP': 0.5}
    assert Run(CONFIG, 'frozen', 0, (), None, tmp_path).result() == run.result()
    assert not Run(CONFIG, 'frozen', 0, ('load_from=a.pth',), None, tmp_path).result()


def test_a_method_that_does_not_fit_has_no_parameters(trainer, tmp_path):
    run = Run(CONFIG, 'lora', 0, (), '10', tmp_path)
    run.train(trainer)
    (row,) = compare([run])
    assert row['parameters'] is None and row['runs'] == 1
    assert '| lora |  | 0.200 | 0.500 | 1 |' in markdown([row])


def test_a_start_that_does_not_exist(sweep):
    with pytest.raises(MissingFileError, match=r'no checkpoint .none\.pth'):
        sweep('--methods', 'lora', '--cfg-options', 'load_from=none.pth')
