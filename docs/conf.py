"""Sphinx: the pages of this folder, and a reference made from the docstrings.

The pages of the reference, one for each folder of the package, are written to docs/_build before
Sphinx reads its sources, so that they list the modules that there are.
"""

import re
import sys
from pathlib import Path
from types import FunctionType

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import mmpeft  # noqa: E402

project = 'mmpeft'
release = version = mmpeft.__version__
copyright = 'the authors of mmpeft, Apache 2.0'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
exclude_patterns = ['_build', 'benchmark']

html_theme = 'furo'
html_title = f'mmpeft {release}'
html_theme_options = dict(sidebar_hide_name=False)
html_copy_source = False

viewcode_follow_imported_members = False
myst_heading_anchors = 4
autodoc_default_options = {'members': True, 'ignore-module-all': True, 'show-inheritance': True}
autodoc_inherit_docstrings = False
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# References into mmpeft have to lead somewhere; other projects are not looked up.
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!\.?mmpeft).*')]

ROOMS = {
    'mmpeft': 'Public names',
    'quantization': 'Weights in few bits',
    'methods': 'Methods',
    'injection': 'Injection',
    'execution': 'Execution',
    'training': 'Training',
    'checkpoint': 'Adapter files',
    'serving': 'Serving',
    'interop': 'Other formats',
    'analysis': 'Analysis',
    'engine': 'Runner',
    'models': 'Models',
}


def write_reference(app):
    """Write a page of ``automodule`` directives for each folder of the package."""
    folder = DOCS / 'reference'
    folder.mkdir(exist_ok=True)
    pages = []
    for room, title in ROOMS.items():
        pages.append(room)
        lines = [title, '=' * len(title), '']
        for name in mmpeft.__all__ if room == 'mmpeft' else ():
            if not name.startswith('_'):
                kind = 'class' if isinstance(getattr(mmpeft, name), type) else 'function'
                lines += [f'.. auto{kind if name != "METHODS" else "data"}:: mmpeft.{name}', '']
        for module in modules_of(room):
            lines += [module, '-' * len(module), '', f'.. automodule:: {module}', '']
        write(folder / f'{room}.rst', lines)
    lines = ['Reference', '=' * 9, '', 'Made from the docstrings.', '', '.. toctree::', '']
    write(folder / 'index.rst', lines + [f'   {name}' for name in pages])


def modules_of(room):
    """The modules of a folder, those of its folders included."""
    if room == 'mmpeft':
        return ['mmpeft.errors', 'mmpeft.registry']
    files = sorted((ROOT / 'mmpeft' / room).rglob('*.py'))
    names = ['.'.join(file.relative_to(ROOT).with_suffix('').parts) for file in files]
    return [name.removesuffix('.__init__') for name in names]


def write(path, lines):
    """Write a file unless it has this text already, so that Sphinx reads it again only then."""
    text = '\n'.join(lines) + '\n'
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def plain_text(app, what, name, obj, options, lines):
    """Read docstrings as text: formulas in indented blocks as they stand, no emphasis by ``*``."""
    text = '\n'.join(lines).strip('\n')
    out, sections = [], False
    for paragraph in re.split(r'\n{2,}', text):
        block = paragraph.split('\n')
        sections = sections or bool(re.match(r'(Args|Attributes|Returns|Raises|Yields):', block[0]))
        indented = [line.startswith('    ') for line in block]
        if sections or not any(indented) or block[0].startswith('.. '):
            out += [escaped(line) for line in block]
        elif all(indented):
            out += ['::', '', *block]
        else:  # aligned by hand
            out += [f'| {escaped(line)}' for line in block]
        out.append('')
    lines[:] = out


def escaped(line):
    """A line whose stars and bars are not markup, except in ``code``."""
    parts = re.split(r'(``.*?``|\*\*\w+)', line)
    return ''.join(p if p[:2] in ('``', '**') else re.sub(r'([*|])', r'\\\1', p) for p in parts)


def find_again(app, env, node, contnode):
    """Resolve a reference to where a name is imported, such as ``mmpeft.models.TimmBackbone``."""
    module, _, name = node.get('reftarget', '').rpartition('.')
    if node.get('refdomain') != 'py' or not module.startswith('mmpeft'):
        return None
    found = getattr(sys.modules.get(module), name, None)
    home = getattr(found, '__module__', None)
    if found is None or home is None or not isinstance(found, type | FunctionType):
        return contnode if found is not None else None
    domain, target = env.get_domain('py'), f'{home}.{found.__qualname__}'
    document = node['refdoc']
    return domain.resolve_xref(env, document, app.builder, 'obj', target, node, contnode)


def setup(app):
    app.connect('builder-inited', write_reference)
    app.connect('autodoc-process-docstring', plain_text, priority=100)  # before napoleon
    app.connect('missing-reference', find_again)
