"""Finished trainings in a table."""

import json

import pytest

from mmpeft.engine.config import compose
from mmpeft.errors import MissingFileError

pytestmark = pytest.mark.usefixtures('scope')


@pytest.fixture(scope='module')
def tool(script):
    return script('projects/demo', 'compare_runs')


@pytest.fixture
def trained(tmp_path):
    """Make the work directory of a training with given box APs of its evaluations."""

    def make(method, seed, *scores):
        folder = tmp_path / method / str(seed)
        logs = folder / '20250101/vis_data'
        logs.mkdir(parents=True)
        compose('mmpeft::demo/_base_/coco.py', method).dump(folder / 'coco.py')
        lines = [{'loss': 2.0, 'time': 0.5}, {'loss': 1.0, 'time': 0.7}]
        lines += [{'coco/bbox_mAP': s, 'coco/segm_mAP': 0.5, 'time': 9, 'step': 9} for s in scores]
        lines.append({'update/norm': 3.0, 'step': 9})  # of UpdateHook, which is no evaluation
        (logs / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
        return folder

    return make


def test_runs_of_one_method_are_a_row(trained, tool, monkeypatch, capsys, tmp_path):
    folders = [trained('lora', 0, 0.9, 0.2), trained('frozen', 0, 0.1), trained('lora', 1, 0.3)]
    lora, frozen = tool.compare(folders)
    assert lora['method'] == 'LoRA(rank=16)' and lora['runs'] == 2
    assert lora['scores']['coco/bbox_mAP'] == pytest.approx((0.25, 0.5**0.5 / 10))
    assert lora['seconds'] == pytest.approx(0.6)
    assert frozen['scores']['coco/bbox_mAP'] == (0.1, None)
    assert frozen['parameters'] == 1_200 < lora['parameters']
    words = ['compare_runs.py', *map(str, folders), '--out', str(tmp_path / 'table.md')]
    monkeypatch.setattr('sys.argv', words)
    tool.main()
    shown = capsys.readouterr().out
    assert (tmp_path / 'table.md').read_text() in shown
    assert '| Frozen() | 1,200 | 0.100 | 0.500 | 1 | 0.60 |' in shown
    assert '| 0.250 ± 0.071 | 0.500 ± 0.000 | 2 | 0.60 |' in tool.markdown([lora, frozen])


def test_what_is_no_finished_training(trained, tool, tmp_path):
    with pytest.raises(MissingFileError, match='has not ended'):
        tool.compare([trained('lora', 0)])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(MissingFileError, match='no config of a training'):
        tool.compare([tmp_path / 'empty'])
