"""The parameter table against the papers' counts."""

import csv
import json
import sys
from importlib import util
from pathlib import Path

import pytest
from mmengine.registry import DefaultScope

from mmpeft.errors import UsageError

ROOT = Path(__file__).parents[2]
LARGE = 'model.backbone.name=convnextv2_large'


@pytest.fixture(autouse=True)
def scope():
    """Leave the global default scope as it was."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture
def table(monkeypatch):
    """Run the tool with arguments."""
    path = ROOT / 'tools/analysis_tools/param_table.py'
    spec = util.spec_from_file_location('param_table', path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(method, *arguments):
        config = ROOT / f'configs/{method}/convnext_coco.py'
        words = ['param_table.py', config, *arguments]
        monkeypatch.setattr(sys, 'argv', [str(word) for word in words])
        module.main()

    return call


def test_compares_ranks(table, tmp_path, capsys):
    """FLoRA's Table 1: LoRA on ConvNeXt-V2-L with 12.94, 25.89 and 51.78 M."""
    out = tmp_path / 'ranks.json'
    table('lora', '--rank', 8, 16, 32, '--cfg-options', LARGE, '--out', out)
    counts = {entry['rank']: entry['adapters'] for entry in json.loads(out.read_text())}
    assert counts == {8: 12_946_080, 16: 25_892_160, 32: 51_784_320}
    shown = capsys.readouterr().out
    assert 'stages_3.blocks.2.mlp.fc2.weight' in shown
    assert all(f'{count:,}' in shown for count in counts.values())


def test_rows_add_up(table, tmp_path):
    out = tmp_path / 'rows.csv'
    table('flora', '--out', out)
    rows = list(csv.DictReader(out.open()))
    # ConvNeXt-V2-B: a stem, 3 between the stages, 36 blocks of 3 weights
    assert len(rows) == 1 + 3 + 36 * 3
    depthwise = [row for row in rows if row['kind'] == 'depthwise']
    # 128 channels at rank 32 and 2: core 32*1*2*2, factors 128*32, 1, 7*2 and 7*2
    assert int(depthwise[0]['adapter']) == 32 * 4 + 128 * 32 + 1 + 2 * 14
    assert all(int(row['adapter']) < int(row['weight']) for row in depthwise)


def test_markdown_and_methods_without_rank(table, tmp_path):
    out = tmp_path / 'rows.md'
    table('bitfit', '--out', out, '--cfg-options', 'model.backbone.depths=(1, 1, 1, 1)')
    lines = out.read_text().splitlines()
    assert lines[0].startswith('| rank | name |') and 'depthwise bias' in out.read_text()
    with pytest.raises(UsageError, match='BitFit has no rank'):
        table('bitfit', '--rank', 4)


def test_arguments_of_the_hook_that_training_would_refuse(table):
    with pytest.raises(UsageError, match="check_base='no' must be True or False"):
        table('lora', '--cfg-options', 'default_hooks.peft.check_base=no')


def test_refuses_before_it_writes(table, tmp_path):
    out = tmp_path / 'rows.xlsx'
    with pytest.raises(UsageError, match='.csv, .json, .md'):
        table('lora', '--out', out)
    assert not out.exists()
