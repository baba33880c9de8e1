"""What all tests share: no GPU, one seed, one process, scripts as modules, the default scope."""

import ast
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from time import perf_counter

# The tests compare with figures of the CPU, and mmcv may have no CUDA operators.
os.environ['CUDA_VISIBLE_DEVICES'] = ''

import pytest  # noqa: E402
import torch  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402

from tests.durations import LONG, SLOW  # noqa: E402

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    """Mark what took long when it was last recorded (``durations.py``), with its fixtures."""
    seconds = json.loads((ROOT / 'tests/durations.json').read_text())
    for item in items:
        path, name = item.nodeid.split('[')[0].split('::', 1)
        took = sum(seconds.get(f'{path}::{each}', 0) for each in {name, *item.fixturenames})
        for mark, least in dict(slow=SLOW, long=LONG).items():
            if took >= least:
                item.add_marker(mark)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """Write into the report what a fixture took that several tests share."""
    start = perf_counter()
    try:
        return (yield)
    finally:
        if fixturedef.scope == 'module':
            item = request._pyfuncitem  # the first test that asks for it
            item.user_properties.append((fixturedef.argname, perf_counter() - start))


@pytest.fixture(autouse=True)
def _one_process():
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes the stack for each accelerator
    torch.set_num_threads(1)
    _forget_accelerate()
    yield
    _forget_accelerate()
    left = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} & {*os.environ}
    assert not left, f'{left} would make the next test one process of several'


def _forget_accelerate():
    """Drop what a Trainer leaves for its process: another one, or a child, would train so too."""
    for name in [name for name in os.environ if name.startswith('ACCELERATE_')]:
        del os.environ[name]


@pytest.fixture(scope='session', autouse=True)
def _unformatted_configs():
    """Let Runners log and write their configs as they are; yapf takes longer than a toy trains."""

    def unformatted(text, **kwargs):
        ast.parse(text)  # yapf refuses what is no Python
        return f'{text}\n', True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', unformatted)
        yield


@pytest.fixture(scope='session')
def script():
    """Import a script by its folder and name; what it imports beside it is found."""

    def load(folder, name):
        sys.path.insert(0, str(ROOT / folder))
        try:
            return import_module(name)
        finally:
            sys.path.remove(str(ROOT / folder))

    return load


@pytest.fixture
def scope():
    """Leave the global default scope as it was."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)
