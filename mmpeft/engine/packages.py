"""The OpenMMLab packages: where their configs are, and importing what a config needs."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config

from mmpeft.errors import MissingFileError, UsageError, suggest

INSTALL = dict(
    mmdet="'mmpeft[det]'",
    mmseg="'mmpeft[seg]'",
    mmrotate="'mmpeft[rotate]'",
    mmpretrain="'mmpeft[cls]'",
)
"""What pip installs each package by."""


def package_configs(package: str, asked_by: str) -> Path:
    """The folder of configs that a package of :data:`INSTALL`, or mmpeft, ships.

    Raises:
        UsageError: The package, which ``asked_by`` names, is unknown, not
            installed, or ships no configs.
    """
    if package != 'mmpeft' and package not in INSTALL:
        raise UsageError(f'{asked_by}: {package!r} is unknown. {suggest(package, INSTALL)}')
    spec = find_spec(package)
    if spec is None:
        raise UsageError(not_installed(asked_by, package))
    folder = Path(spec.origin).parent / '.mim' / 'configs'
    if not folder.is_dir():
        raise UsageError(f'{asked_by}: {package} was installed without its configs ({folder}).')
    return folder


def find_config(name: str) -> Path:
    """The file of a config such as ``mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py``.

    Raises:
        UsageError: The package is not installed, or has no such config.
    """
    package, _, path = name.partition('::')
    folder = package_configs(package, name)
    file = folder / (path if path.endswith('.py') else f'{path}.py')
    if not file.is_file():
        known = [str(found.relative_to(folder)) for found in sorted(folder.glob('[!_]*/*.py'))]
        hint = suggest(path, known, otherwise=f'Its configs are in {folder}.')
        raise MissingFileError(f'{package} has no config {path!r}. {hint}')
    return file


def import_task(cfg: Config) -> None:
    """Import and register the package that a config's ``default_scope`` names.

    Raises:
        UsageError: It is not installed, or cannot be imported.
    """
    scope = cfg.get('default_scope')
    if scope not in INSTALL:
        return
    for package in ('mmdet', 'mmrotate') if scope == 'mmrotate' else (scope,):
        try:
            import_module(f'{package}.utils').register_all_modules(init_default_scope=False)
        except ImportError as error:
            if find_spec(package) is None:
                raise UsageError(not_installed(cfg.filename, package)) from error
            raise UsageError(
                f'{cfg.filename} needs {package}, which is installed but does not import: {error}. '
                'Bring its dependencies to versions that fit each other; requirements/ lists a set '
                'that does.'
            ) from error


def not_installed(config: str | Path | None, package: str) -> str:
    """What to write where a config needs a package that is missing."""
    return (
        f'{config} needs {package}, which is not installed. Write: pip install {INSTALL[package]}'
    )
