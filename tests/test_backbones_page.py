"""The tables of docs/backbones.md are what their script writes."""

from pathlib import Path

import pytest
import timm

from tests.backbones import SMALL

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs/backbones.md').read_text()


@pytest.fixture(scope='module')
def tool(script):
    return script('docs', 'backbones_page')


def lines():
    """The tables' lines by the model."""
    found = [line for line in PAGE.splitlines() if line.startswith('| `') and '.py' not in line]
    return {line.split('`')[1]: line for line in found}


def test_every_backbone_has_a_line_with_its_licence_and_normalisation(tool):
    assert list(lines()) == list(tool.BACKBONES)
    for name, line in lines().items():
        assert f'| {" | ".join(tool.facts(name))} |' in line
    assert (
        'dinov3-license | 109.65, 104.805, 75.48 |' in lines()['vit_large_patch16_dinov3.sat493m']
    )


@pytest.mark.parametrize(
    'name', ['vit_small_patch16_dinov3.lvd1689m', 'convnext_tiny.dinov3_lvd1689m']
)
def test_sizes_and_memory_are_current(tool, name):
    assert tool.row(name) == lines()[name]


def test_every_kind_has_a_small_form(tool):
    kinds = [
        {timm.models.model_entrypoint(n).__module__ for n in names} for names in (lines(), SMALL)
    ]
    assert kinds[0] <= kinds[1]
