"""Results as a JSON file that is whole at any time."""

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import torch

import mmpeft
from mmpeft.errors import MissingFileError, UsageError

PACKAGES = ('torch', 'timm', 'peft', 'lycoris-lora')


class Record:
    """Plain data and the file that holds it.

    Args:
        path: Of the file; one that is there is kept beside it as
            ``<name>.previous.json``.
        data: To begin with.

    Attributes:
        data: Whatever JSON can hold.
    """

    def __init__(self, path: Path, data: dict):
        self.path = path
        self.data = data
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_suffix('.previous.json'))
        self.save()

    def save(self) -> None:
        """Write the file anew; whoever reads it meanwhile gets the old one whole."""
        draft = self.path.with_suffix('.draft')
        draft.write_text(json.dumps(self.data, indent=1) + '\n')
        os.replace(draft, self.path)


def read(path: Path, tool: str) -> dict:
    """The data of a file that a tool wrote.

    Raises:
        UsageError: It is missing or was written by another tool.
    """
    if not path.is_file():
        raise MissingFileError(f'--report: there is no file {str(path)!r}.')
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f'--report: {str(path)!r} is not JSON: {error}.') from error
    if not isinstance(data, dict) or data.get('tool') != tool:
        raise UsageError(f'--report: {str(path)!r} was not written by {tool}.py.')
    return data


def environment(device: str) -> dict:
    """What the figures were measured on, and how busy it was."""
    return dict(
        date=time.strftime('%Y-%m-%d %H:%M'),
        device=torch.cuda.get_device_name() if device != 'cpu' else _processor(),
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        load=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
        python=platform.python_version(),
        mmpeft=mmpeft.__version__,
        **{name: version for name in PACKAGES if (version := _version(name))},
    )


def described(data: dict) -> str:
    """The environment and the arguments that matter, as a sentence."""
    there, asked = data['environment'], data['arguments']
    threads = f', {there["threads"]} threads' if asked['device'] == 'cpu' else ''
    versions = ', '.join(f'{name} {there[name]}' for name in PACKAGES if name in there)
    amp = asked.get('amp', 'none')
    dtype = 'without autocast' if amp == 'none' else f'{amp} autocast'
    busy = f'; load {there["load"]:.1f} at the start' if there.get('load') else ''
    return f'{there["device"]}{threads}, {dtype}; {versions}; {there["date"]}{busy}.'


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor():
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()
