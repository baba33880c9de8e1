"""The documents that are made of the methods' cards."""

import re
import sys
from pathlib import Path

import pytest
import yaml

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.methods.base import FAMILIES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def tool(script):
    return script('analysis_tools', 'methods_page')


@pytest.fixture(scope='module')
def texts(tool):
    return tool.documents()


def test_documents_are_up_to_date(tool, texts):
    stale = [path for path, text in texts.items() if (ROOT / path).read_text() != text]
    assert not stale, 'write them by: python tools/analysis_tools/methods_page.py'


def test_check_names_what_is_stale_and_writes_nothing(tool, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr(tool, 'documents', lambda: texts)
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(sys, 'argv', ['methods_page.py', '--check'])
    tool.main()
    readme = tmp_path / 'configs/adalora/README.md'
    readme.write_text('old')
    with pytest.raises(UsageError, match='1 documents are stale: configs/adalora/README.md'):
        tool.main()
    assert readme.read_text() == 'old'
    monkeypatch.setattr(sys, 'argv', ['methods_page.py'])
    tool.main()
    assert readme.read_text() == texts['configs/adalora/README.md']


def test_readmes_by_hand_stay(texts):
    readme = 'configs/flora/README.md'
    assert readme not in texts and (ROOT / readme).exists()


def test_every_method_stands_in_its_family(texts):
    page = texts['docs/methods.md']
    sections = re.split(r'^### ', page, flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0].lower() for section in sections] == list(FAMILIES)
    for name in mmpeft.METHODS.module_dict:
        card = mmpeft.METHODS.get(name).card
        section = sections[FAMILIES.index(card.family)]
        assert card.suits in section and card.cost in section, name


def test_an_update_in_the_lie_algebra_shows_in_the_formula(tool):
    formulas = {entry.name: entry.formula for entry in tool.entries()}
    assert formulas['liera_flora'] == 'W ⊙ (1 + s · G ×₁A₁ ×₂A₂ … ×ₙAₙ)'
    assert formulas['flora'].startswith('W + ')
    assert formulas['liera_dora'].endswith('V = W ⊙ (1 + s · B A)')


def test_sizes_are_the_papers(tool):
    """LieRA's Table 2 for LoRA, and what the READMEs by hand say."""
    found = {entry.name: entry for entry in tool.entries()}
    assert found['lora'].size(rank=16) == '17,271,104 (19.69%)'
    for name, entry in found.items():
        text = (ROOT / f'configs/{name}/README.md').read_text()
        (said,) = re.findall(r'Adapter parameters: (none|[\d,]+)', text)
        if said == 'none':
            assert name in ('frozen', 'full')
        elif tool.MARK not in text:
            assert said == entry.size().split()[0], name


def test_metafiles_name_what_is_there():
    for path in (ROOT / 'configs').glob('*/metafile.yml'):
        content = yaml.safe_load(path.read_text())
        (collection,) = content['Collections']
        assert (ROOT / collection['README']).exists()
        leaves = {str(leaf.relative_to(ROOT)) for leaf in path.parent.glob('convnext_*.py')}
        assert leaves <= {model['Config'] for model in content['Models']}
        for model in content['Models']:
            assert model['In Collection'] == collection['Name']
            assert (ROOT / model['Config']).exists()


def test_a_config_that_does_not_say_what_it_is(tool, tmp_path, monkeypatch):
    folder = tmp_path / 'configs/_base_/methods'
    folder.mkdir(parents=True)
    (folder / 'new.py').write_text("peft = dict(method=dict(type='LoRA'))\n")
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    with pytest.raises(UsageError, match='new.py does not open with what the method is'):
        tool.entries()


def test_a_new_method_takes_one_config(tool, tmp_path, monkeypatch):
    """All else is written: its config for COCO, its documents, its entries in others."""
    for path in ('README.md', 'docs/methods.md', 'configs/_base_/methods/new.py'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f'above\n{tool.BEGIN}\nold\n{tool.END}\nbelow\n')
    lora = (ROOT / 'configs/_base_/methods/lora.py').read_text()
    (tmp_path / 'configs/_base_/methods/new.py').write_text(
        '# New: what it is (arXiv:2600.00001).\n' + lora
    )
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    texts = tool.documents()
    other = (ROOT / 'configs/lora/convnext_coco.py').read_text()
    assert texts['configs/new/convnext_coco.py'] == other.replace('lora', 'new')
    assert '# New\n' in texts['configs/new/README.md']
    assert 'What it is ([arXiv:2600.00001]' in texts['configs/new/README.md']
    assert yaml.safe_load(texts['configs/new/metafile.yml'])['Models'][0]['Name'] == (
        'new_convnext_coco'
    )
    for path in ('README.md', 'docs/methods.md'):
        assert texts[path].startswith('above\n') and texts[path].endswith('below\n')
        assert '`new`' in texts[path] and 'old' not in texts[path]
    (tmp_path / 'README.md').write_text('no marks')
    with pytest.raises(UsageError, match='README.md has lost its marks'):
        tool.documents()
