"""Tables of predicted memory: their unit, their totals, and files."""

import csv
import io
import json

import pytest
from rich.console import Console

from mmpeft.analysis.memory import Memory
from mmpeft.analysis.memory_table import table, write


def memory(unit):
    """A total is 7, 6 and 5 units: that of small includes a block."""
    return Memory(unit, unit, unit, dict(speed=4 * unit, balanced=3 * unit, small=unit), unit)


@pytest.mark.parametrize('unit, size', [('GiB', 2**30), ('MiB', 2**20)])
def test_a_table_has_totals_with_the_block_that_runs_again(unit, size):
    found = table([('it', memory(size))])
    row = tuple(cell for column in found.columns for cell in column.cells)
    assert row == ('it', *'1.00 1.00 1.00 4.00 3.00 1.00 7.00 6.00 5.00'.split())
    assert found.title == unit


def test_one_unit_for_a_table_whose_names_stay_whole():
    names = [f'mmpretrain::resnet/resnet{n}_8xb32_in1k.py, 1' for n in (18, 34)]
    found = table([(names[0], memory(2**30)), (names[1], memory(2**20))])
    assert found.title == 'GiB' and list(found.columns[-1].cells) == ['5.00', '0.00']
    out = Console(file=io.StringIO(), width=120)
    out.print(found)
    lines = out.file.getvalue().splitlines()
    shown = ''.join(line.split('│')[1] for line in lines if line.startswith('│'))
    assert shown.replace(' ', '') == ''.join(names).replace(' ', '')


def test_files(tmp_path):
    rows = [('a', memory(2**20)), ('b', memory(2**21))]
    for suffix in ('json', 'csv', 'md'):
        write(tmp_path / f'm.{suffix}', rows)
    (one, _) = json.loads((tmp_path / 'm.json').read_text())
    assert one['run'] == 'a' and one['total, small'] == 5 * 2**20
    (_, two) = csv.DictReader((tmp_path / 'm.csv').open())
    assert two['run'] == 'b' and int(two['saved, speed']) == 8 * 2**20
    lines = (tmp_path / 'm.md').read_text().splitlines()
    assert lines[0].startswith('| run (MiB) | weights') and lines[3].endswith('10.00 |')
