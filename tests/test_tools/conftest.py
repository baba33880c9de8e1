"""The scripts of tools/ as modules."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture(scope='session')
def script():
    """Import a script by its folder and name; what it imports beside it is found."""

    def load(folder, name):
        sys.path.insert(0, str(TOOLS / folder))
        try:
            return import_module(name)
        finally:
            sys.path.remove(str(TOOLS / folder))

    return load


@pytest.fixture(scope='session')
def compose(script):
    """Write the config of a method on one of the demo's tasks."""
    return script('demo', 'experiment').compose
