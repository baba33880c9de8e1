"""The documents that docs/methods_page.py makes from the methods' files and cards."""

import re
import sys
from pathlib import Path

import pytest

import mmpeft

ROOT = Path(__file__).parents[1]
FILES = [path.stem for path in ROOT.glob('configs/_base_/methods/*.py')]


@pytest.fixture(scope='module')
def tool(script):
    return script('docs', 'methods_page')


@pytest.fixture(scope='module')
def found(tool):
    return tool.entries(ROOT / 'configs/_base_/methods')


def test_documents_are_up_to_date(tool):
    stale = [path for path, text in tool.documents().items() if (ROOT / path).read_text() != text]
    assert not stale, 'write them by: python docs/methods_page.py'


def test_check_names_what_is_stale_and_writes_nothing(tool, tmp_path, monkeypatch):
    texts = {'README.md': 'readme', 'docs/methods.md': 'page'}
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr(tool, 'documents', lambda: texts)
    (tmp_path / 'docs').mkdir()
    for path, text in texts.items():
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(sys, 'argv', ['methods_page.py', '--check'])
    tool.main()
    page = tmp_path / 'docs/methods.md'
    page.write_text('old')
    with pytest.raises(SystemExit, match='Out of date: docs/methods.md'):
        tool.main()
    assert page.read_text() == 'old'
    monkeypatch.setattr(sys, 'argv', ['methods_page.py'])
    tool.main()
    assert page.read_text() == 'page'


def test_every_method_stands_in_its_family(tool):
    page = (ROOT / 'docs/methods.md').read_text()
    sections = re.split(r'^### ', page.partition('\n## The methods')[2], flags=re.MULTILINE)[1:]
    sections = dict(zip(tool.FAMILIES, sections, strict=True))
    assert all(section.splitlines()[0].lower() == family for family, section in sections.items())
    for name in mmpeft.METHODS.module_dict:
        card = mmpeft.METHODS.get(name).card
        assert card.suits in sections[card.family], name


def test_overview_names_every_file_once(tool, found):
    table = tool.overview(found)
    assert sorted(re.findall(r'`(\w+)`', table)) == sorted(FILES)
    assert table in (ROOT / 'README.md').read_text()


def test_an_update_in_the_lie_algebra_shows_in_the_formula(found):
    formulas = {e.name: e.formula for members in found.values() for e in members}
    assert formulas['liera_flora'] == "W' = W ⊙ (1 + s · G ×₁A₁ ×₂A₂ … ×ₙAₙ)"
    assert formulas['flora'].startswith("W' = W + ")
    assert formulas['liera_dora'].endswith('V = W ⊙ (1 + s · B A)')
    assert formulas['bitfit'].startswith("b' = b + ")


def test_sizes_are_the_papers(found):
    """LieRA's Table 2 for LoRA in loralib's layout."""
    lora = next(entry for entry in found['extension'] if entry.name == 'lora')
    lora.config['layout'] = 'loralib'
    count, share = lora.trained()
    assert count == 17_271_104 and share == pytest.approx(0.1969, abs=1e-4)


def test_a_file_that_does_not_say_what_it_is(tool, tmp_path):
    (tmp_path / 'new.py').write_text("peft = dict(method=dict(type='LoRA'))\n")
    with pytest.raises(SystemExit, match='new.py must begin with a line such as'):
        tool.entries(tmp_path)


def test_a_new_method_takes_one_file(tool, tmp_path, monkeypatch):
    """Its entries in both documents are written."""
    for path in ('README.md', 'docs/methods.md', 'configs/_base_/methods/new.py'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f'above\n{tool.BEGIN}\nold\n{tool.END}\nbelow\n')
    lora = (ROOT / 'configs/_base_/methods/lora.py').read_text()
    (tmp_path / 'configs/_base_/methods/new.py').write_text(
        '# New: what it is (arXiv:2600.00001).\n' + lora
    )
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    texts = tool.documents()
    for path in ('README.md', 'docs/methods.md'):
        assert texts[path].startswith('above\n') and texts[path].endswith('below\n')
        assert '`new`' in texts[path] and 'old' not in texts[path]
    assert '| New: what it is |' in texts['docs/methods.md']
    assert '[arXiv:2600.00001](https://arxiv.org/abs/2600.00001).' in texts['docs/methods.md']
    (tmp_path / 'README.md').write_text('no marks')
    with pytest.raises(SystemExit, match='README.md has lost its marks'):
        tool.documents()
