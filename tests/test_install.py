"""Packaging: what a plain install needs, ships and pins."""

import ast
import importlib.metadata as metadata
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MIM = ROOT / 'mmpeft/.mim'
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / 'configs').rglob('*.py'))
LOCK = sorted((ROOT / 'requirements').glob('*.txt'))

# Named by packages of the lock and left out of it: see requirements/runtime.txt and dev.txt.
LEFT_OUT = {'opencv-python', 'imagecorruptions-imaug', 'modelindex', 'mat4py'}

WITHOUT_EXTRAS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'mmcv', 'mmdet', 'mmseg', 'mmrotate', 'mmpretrain', 'timm',
                                      'torchvision', 'safetensors', 'sklearn', 'pycocotools'}:
            raise ModuleNotFoundError(f'{name} is blocked', name=name)

sys.meta_path.insert(0, Blocker())
import torch
import mmpeft

model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
mmpeft.inject(model, dict(type='FLoRA', rank=2, kernel_rank=1))
mmpeft.merge(model)
print(*sorted(model.state_dict()))
"""


def requirements(*files):
    """The requirements in files of requirements/, as name -> Requirement."""
    lines = [line.split('#')[0].strip() for file in files for line in file.read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith('--')]
    return {canonicalize_name(need.name): need for need in found}


def pinned(need):
    """The one version that a requirement allows."""
    (specifier,) = need.specifier
    assert specifier.operator == '==' and '*' not in specifier.version, f'{need} is not pinned'
    return specifier.version


@pytest.fixture(scope='module')
def setup_arguments():
    with pytest.MonkeyPatch.context() as patch:
        arguments = {}
        patch.setattr(setuptools, 'setup', lambda **given: arguments.update(given))
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / 'setup.py'))
    return arguments


def run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_core_works_with_torch_and_mmengine_alone():
    done = run(sys.executable, '-c', WITHOUT_EXTRAS, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['0.bias', '0.weight', '2.bias', '2.weight']


def test_without_mmengine_the_error_says_what_to_install():
    code = "import sys; sys.modules['mmengine'] = None; import mmpeft"
    done = run(sys.executable, '-c', code, cwd=ROOT)
    assert done.returncode != 0
    assert 'pip install onedl-mmengine' in done.stderr.splitlines()[-1]


def test_plain_install_requires_no_openmmlab_distribution(setup_arguments):
    assert setup_arguments['install_requires']
    for line in setup_arguments['install_requires']:
        assert 'mm' not in Requirement(line).name


def test_extras_name_what_each_task_imports(setup_arguments):
    extras = {
        extra: {Requirement(line).name for line in lines}
        for extra, lines in setup_arguments['extras_require'].items()
    }
    engine = {'onedl-mmengine', 'onedl-mmcv', 'timm', 'torch', 'torchvision'}
    assert extras['det'] >= engine | {'onedl-mmdetection'}
    assert extras['seg'] >= engine | {'onedl-mmsegmentation'}
    assert extras['rotate'] >= engine | {'onedl-mmdetection', 'onedl-mmrotate'}
    assert extras['cls'] >= engine | {'onedl-mmpretrain'}
    assert extras['dev'] >= {'pytest', 'ruff'}
    assert extras['all'] == set.union(*(v for k, v in extras.items() if k != 'all'))
    assert extras['docs'] >= {'sphinx', 'myst-parser', 'furo'}


def test_lock_lies_within_the_ranges_of_setup(setup_arguments):
    lock = requirements(*LOCK)
    ranges = setup_arguments['install_requires'] + setup_arguments['extras_require']['all']
    for need in map(Requirement, ranges):
        assert pinned(lock[canonicalize_name(need.name)]) in need.specifier, need


def test_lock_pins_each_package_once():
    for first, file in enumerate(LOCK):
        for name, need in requirements(file).items():
            assert pinned(need)
            twice = [other.name for other in LOCK[first + 1 :] if name in requirements(other)]
            assert not twice, f'{name} stands in {file.name} and in {twice}'


def test_lock_holds_what_its_packages_need():
    """Looks at the installed packages whose version is the pinned one."""
    lock, checked = requirements(*LOCK), 0
    for name, need in lock.items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if installed.version != pinned(need):
            continue
        for line in installed.requires or ():
            wanted = Requirement(line)
            if wanted.marker and not wanted.marker.evaluate({'extra': ''}):
                continue
            if wanted.name in LEFT_OUT:
                continue
            assert canonicalize_name(wanted.name) in lock, f'{name} needs {wanted}'
            version = pinned(lock[canonicalize_name(wanted.name)])
            assert wanted.specifier.contains(version, prereleases=True), f'{name} needs {wanted}'
            checked += 1
    assert checked


def test_changelog_starts_with_this_version(setup_arguments):
    top = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), flags=re.MULTILINE)[1]
    assert top == setup_arguments['version']


@pytest.mark.parametrize('config', CONFIGS, ids=str)
def test_base_of_every_config_is_shipped(config):
    tree = ast.parse((MIM / config).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '_base_':
            bases = ast.literal_eval(node.value)
            for base in [bases] if isinstance(bases, str) else bases:
                package, _, path = base.rpartition('::')
                if package in ('', 'mmpeft'):
                    parent = MIM / 'configs' if package else (MIM / config).parent
                    assert (parent / path).is_file(), f'{config} inherits from {base}'


def test_wheel_serves_its_configs(tmp_path):
    """Built, unpacked elsewhere and inherited from, as after `pip install mmpeft`."""
    source = tmp_path / 'source'
    source.mkdir()
    for folder in ('mmpeft', 'configs', 'tools'):
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignore)
    for file in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(ROOT / file, source)
    # Litter of a used checkout that must not be shipped.
    (source / 'configs/__pycache__').mkdir()
    (source / 'configs/__pycache__/litter.pyc').touch()
    (source / 'tools/epoch_1.pth').touch()

    build = ['-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--no-index']
    built = run(sys.executable, *build, '--wheel-dir', tmp_path, source, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob('mmpeft-*.whl')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / 'site')
    shipped = {path.relative_to(tmp_path / 'site') for path in (tmp_path / 'site').rglob('*')}
    assert {Path('mmpeft/.mim') / config for config in CONFIGS} <= shipped
    assert not [path for path in shipped if path.suffix in ('.pyc', '.pth')]
    assert {path.parts[0].split('-')[0] for path in shipped} == {'mmpeft'}

    base = next(config for config in CONFIGS if config.match('*/_base_/default_runtime.py'))
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = 'mmpeft::{base.relative_to('configs')}'\n")
    code = (
        'import mmpeft, mmengine, sys; print(mmpeft.__file__); '
        'print(sorted(mmengine.Config.fromfile(sys.argv[1])))'
    )
    read = run(
        *(sys.executable, '-c', code, str(child)),
        cwd=tmp_path,
        env={'PYTHONPATH': str(tmp_path / 'site'), 'PATH': '/usr/bin:/bin'},
    )
    assert read.returncode == 0, read.stderr
    assert str(tmp_path / 'site') in read.stdout and 'default_hooks' in read.stdout


def test_install_names_a_python_that_does_not_do(tmp_path):
    done = run(
        ROOT / 'requirements/install.sh',
        tmp_path / 'venv',
        env={'PYTHON': '/bin/false', 'PATH': '/usr/bin:/bin'},
    )
    assert done.returncode != 0
    assert '/bin/false is not a Python' in done.stderr and 'PYTHON=' in done.stderr
    assert not (tmp_path / 'venv').exists()


def test_make_installs_again_only_when_the_lock_changes(tmp_path):
    for path in ('Makefile', 'setup.py', 'requirements/install.sh'):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    shutil.copytree(ROOT / 'requirements', tmp_path / 'requirements', dirs_exist_ok=True)
    install = tmp_path / 'requirements/install.sh'
    install.write_text('#!/bin/sh\necho installing; mkdir -p "$1"; test ! -e interrupted\n')
    make = ['make', 'install', 'VENV=venv']

    (tmp_path / 'interrupted').touch()
    assert run(*make, cwd=tmp_path).returncode != 0
    (tmp_path / 'interrupted').unlink()
    assert 'installing' in run(*make, cwd=tmp_path).stdout
    assert 'installing' not in run(*make, cwd=tmp_path).stdout
    with open(tmp_path / 'requirements/runtime.txt', 'a') as file:
        file.write('another==1.0\n')
    assert 'installing' in run(*make, cwd=tmp_path).stdout
    assert len(list((tmp_path / 'venv').glob('installed-*'))) == 1
