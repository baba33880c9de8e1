"""The table of updates of a config and its adapter files."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

import mmpeft
from mmpeft.analysis.update_table import update_table, write_updates
from mmpeft.analysis.updates import UpdateFigures, cosines, figures, means, updates
from mmpeft.errors import UsageError
from tests.cases import randomize
from tests.toy import save_weights, toy_config

pytestmark = [
    pytest.mark.usefixtures('scope'),
    pytest.mark.filterwarnings('ignore:.*adapters have more parameters'),
]


@pytest.fixture
def tool(script, monkeypatch, tmp_path):
    """updates.py on a config without a hook; ``tool.file(method)`` makes adapters for it."""
    module = script('tools/analysis_tools', 'updates')
    checkpoint = save_weights(tmp_path / 'pretrained.pth')
    cfg = toy_config(tmp_path, **{'model.backbone.checkpoint': checkpoint})
    cfg.default_hooks.pop('peft')
    cfg.dump(tmp_path / 'config.py')

    def call(*arguments):
        words = ['updates.py', tmp_path / 'config.py', *arguments]
        monkeypatch.setattr('sys.argv', [str(word) for word in words])
        module.main()

    def file(method):
        model = mmpeft.init_model(cfg, method=method)
        randomize(model, 0.1)
        return mmpeft.save_adapter(model, tmp_path / f'{len(method)}.safetensors'), model

    call.file = file
    return call


def test_a_method_on_a_config_against_another(tool, tmp_path, capsys):
    flora = "dict(type='FLoRA', rank=2)"
    (file, model), (other, theirs) = tool.file(flora), tool.file('lora')
    words = [file, '--method', flora, '--against', other, '--against-method', 'lora']
    words += ['--kernels', 'stem', '--pictures', tmp_path / 'pictures', '--count', 4]
    tool(*words, '--out', tmp_path / 'updates.json')
    rows, angles = figures(updates(model)), cosines(model, theirs)
    written = json.loads((tmp_path / 'updates.json').read_text())
    assert [line['name'] for line in written] == [row.name for row in rows]
    for line, row in zip(written, rows, strict=True):
        own = {name: line[name] for name in ('norm', 'amplification', 'effective_rank', 'share')}
        assert own == pytest.approx({name: getattr(row, name) for name in own})
        assert line['cosine'] == pytest.approx(angles[row.name])
    shown = capsys.readouterr().out
    assert f'{angles["all"]:.4g}' in shown and f'{means(rows)["amplification"]:.4g}' in shown
    assert [p.name for p in tmp_path.glob('pictures/*')] == ['backbone.stem.weight.png']


@pytest.mark.parametrize('suffix', ['csv', 'md'])
def test_tables(suffix, tool, tmp_path):
    file, model = tool.file('bitfit')
    out = tmp_path / f'updates.{suffix}'
    tool(file, '--method', 'bitfit', '--out', out)
    rows = figures(updates(model))
    lines = out.read_text().splitlines()
    if suffix == 'csv':
        read = list(csv.DictReader(lines))
        assert [float(line['norm']) for line in read] == pytest.approx([r.norm for r in rows])
    else:
        assert len(lines) == 2 + len(rows) and f'{rows[0].norm:.4g}' in lines[2]


def test_figures_that_are_not_defined(tmp_path):
    """Biases of zeros have no relative update; the files stay valid."""
    row = UpdateFigures('fc.bias', 'linear bias', (3,), 1.0, math.nan, math.nan, 1.0, 0.5)
    rows = [row, replace(row, name='norm.bias', relative=0.25, amplification=4.0)]
    assert means(rows) == dict(norm=1, relative=0.25, amplification=4, effective_rank=1)
    for suffix, undefined in (('json', 'null'), ('csv', ',1.0,,,1.0,'), ('md', '| 1 | - | - | 1')):
        out = tmp_path / f'updates.{suffix}'
        write_updates(out, rows, {'fc.bias': math.nan, 'all': math.nan})
        text = out.read_text()
        assert undefined in text and 'nan' not in text.lower()
    out = Console(file=io.StringIO(), width=200)
    out.print(update_table(rows[:1], {'fc.bias': math.nan, 'all': math.nan}))
    assert 'nan' not in out.file.getvalue()


def test_what_it_leaves_out(tool, tmp_path, capsys):
    methods = "[dict(type='LoRA', rank=1), dict(method=dict(type='ParallelAdapter', rank=1))]"
    file, _ = tool.file('lora')
    with pytest.raises(UsageError, match=r'\.csv, \.json, \.md'):
        tool(file, '--method', 'lora', '--out', tmp_path / 'updates.txt')
    with pytest.raises(UsageError, match='Name it by --against'):
        tool(file, '--method', 'lora', '--against-method', 'lora')
    with pytest.raises(UsageError, match='--count 0: a picture has 1 kernel or more'):
        tool(file, '--method', 'lora', '--kernels', 'stem', '--count', 0)
    with pytest.raises(UsageError, match="'dw9' matches no adapted weight"):
        tool(file, '--method', 'lora', '--kernels', 'dw9')
    with pytest.raises(UsageError, match=r'backbone\.fc\.weight has the shape'):
        tool(file, '--method', 'lora', '--kernels', 'fc', '--pictures', tmp_path / 'pictures')
    assert not (tmp_path / 'pictures').exists()
    tool(tool.file(methods)[0], '--method', methods)
    assert 'left out: 4 adapters of ParallelAdapter' in capsys.readouterr().out
    with pytest.raises(UsageError, match='ParallelAdapter changes activations'):
        tool(tool.file('parallel')[0], '--method', 'parallel')
