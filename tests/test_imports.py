"""The import graph of mmpeft: rooms import downward only, no cycles, a light `import mmpeft`."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmpeft'
# From low to high. A room imports itself and the levels before its own.
LEVELS = (
    ('errors', 'registry', 'version', 'transforms'),
    ('quantization',),
    ('methods',),
    ('execution',),
    ('injection',),
    ('checkpoint',),
    ('training',),
    ('serving', 'interop', 'analysis'),
    ('engine',),
)
BELOW = {
    room: {other for level in LEVELS[:height] for other in level}
    for height, rooms in enumerate(LEVELS)
    for room in rooms
}
BELOW['registry'] = {'errors', 'version'}
BELOW['models'] = {'errors', 'registry', 'quantization'}
BELOW['datasets'] = {'errors', 'registry'}
for room in (*LEVELS[-2], *LEVELS[-1]):
    BELOW[room] |= {'models', 'datasets'}
# What `import mmpeft` may need beside the standard library.
LIGHT = ('torch', 'mmengine', 'numpy', 'rich', 'safetensors')
HEAVY = ('mmcv', 'mmdet', 'mmseg', 'mmrotate', 'mmpretrain', 'timm', 'transformers', 'peft')


def name_of(path):
    """The dotted name of a file's module, relative to ``mmpeft``; '' for mmpeft itself."""
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob('*.py'))}


def room_of(module):
    return module.partition('.')[0]


def imports_of(module, top_level_only=False):
    """Modules of mmpeft that a module imports, anywhere in the file.

    Args:
        module (str): A key of ``MODULES``.
        top_level_only (bool): Leave out imports inside functions.

    Yields:
        tuple[str, int]: The imported module and the line.
    """
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    nodes = _at_import(tree) if top_level_only else ast.walk(tree)
    package = module.split('.') if path.name == '__init__.py' else module.split('.')[:-1]
    package = [part for part in package if part]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition('.')[0] == 'mmpeft':
                    yield alias.name.partition('.')[2], node.lineno
        elif isinstance(node, ast.ImportFrom):
            source = (node.module or '').split('.') if node.module else []
            if node.level:
                source = [*package[: len(package) - node.level + 1], *source]
            elif source and source[0] == 'mmpeft':
                source = source[1:]
            else:
                continue
            for alias in node.names:
                inner = '.'.join([*source, alias.name])
                yield inner if inner in MODULES else '.'.join(source), node.lineno


def _at_import(tree):
    """All nodes but those inside functions."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [
            child
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ]


def test_every_import_is_of_a_module_that_exists():
    unknown = [
        f'{module}:{line} imports {imported}'
        for module in MODULES
        for imported, line in imports_of(module)
        if imported not in MODULES
    ]
    assert not unknown


@pytest.mark.parametrize('room', sorted({room_of(module) for module in MODULES} - {''}))
def test_a_room_imports_only_rooms_below_it(room):
    assert room in BELOW, f'mmpeft/{room} has no place in LEVELS'
    wrong = [
        f'{MODULES[module].relative_to(ROOT)}:{line} imports {imported or "mmpeft itself"}'
        for module in MODULES
        if room_of(module) == room
        for imported, line in imports_of(module)
        if room_of(imported) not in BELOW[room] | {room}
    ]
    assert not wrong, '\n'.join(wrong)


def test_there_is_no_cycle():
    graph = {module: {imported for imported, _ in imports_of(module)} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pairs = pairwise(reversed(error.args[1]))
        pytest.fail('\n'.join(f'{a or "mmpeft"} imports {b or "mmpeft"}' for a, b in pairs))


def test_mmpeft_itself_imports_no_module_of_engine():
    imported = {name for name, _ in imports_of('', top_level_only=True)}
    assert imported and not {name for name in imported if room_of(name) == 'engine'}


@pytest.mark.parametrize('package, extra', [('mmpeft', ()), ('mmpeft.models', ('timm',))])
def test_import_needs_torch_and_mmengine_alone(package, extra):
    """In a fresh interpreter in which the heavy packages cannot be imported; models need timm."""
    code = f"""
import sys
for name in set({HEAVY!r}) - set({extra!r}):
    sys.modules[name] = None
import {package}
mmpeft.METHODS.get('FLoRA')
unwanted = 'mmpeft.engine', 'mmengine.runner', 'mmengine.hooks'
found = [name for name in sys.modules if name.startswith(unwanted)]
assert {bool(extra)} or not found, found
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_light_rooms_import_no_other_package():
    """Imports outside functions, of every module that `import mmpeft` loads."""
    loaded, waiting = set(), ['']
    while waiting:
        module = waiting.pop()
        if module in loaded:
            continue
        loaded.add(module)
        parents = {module.rpartition('.')[0]} if module else set()
        waiting += parents | {name for name, _ in imports_of(module, top_level_only=True)}
    foreign = {}
    for module in loaded:
        for node in _at_import(ast.parse(MODULES[module].read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                top = name.partition('.')[0]
                if top not in (*sys.stdlib_module_names, *LIGHT, 'mmpeft'):
                    foreign.setdefault(module, set()).add(top)
    assert not foreign
