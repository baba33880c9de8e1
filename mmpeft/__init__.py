"""Parameter-efficient fine-tuning of large vision backbones in OpenMMLab."""

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'mmpeft needs mmengine, which two distributions provide. Where neither is installed, write '
        "pip install 'mmpeft[det]' (or [seg], [rotate], [all]) for OpenMMLab as OneDL maintains it "
        'for current PyTorch, or pip install onedl-mmengine for the methods alone. Never install '
        'both mmengine and onedl-mmengine: each overwrites the other.',
        name='mmengine',
    ) from error

from importlib import import_module

from mmpeft.checkpoint.adapter_file import load_adapter, save_adapter
from mmpeft.checkpoint.base_state import load_base, save_pretrained
from mmpeft.checkpoint.keys import adapter_state_dict
from mmpeft.injection.compile import compile_blocks
from mmpeft.injection.inject import inject
from mmpeft.injection.merge import merge, merged, remove, unmerge
from mmpeft.injection.summary import summary
from mmpeft.serving.library import AdapterLibrary
from mmpeft.serving.shared_base import share_base
from mmpeft.training.allocation import allocate
from mmpeft.training.monitor import Monitor as monitor
from mmpeft.training.penalty import penalty
from mmpeft.training.sensitivity import sensitivity

from .registry import METHODS, register_config_packages
from .version import __version__

__all__ = [
    'METHODS',
    'AdapterLibrary',
    '__version__',
    'adapter_state_dict',
    'allocate',
    'compile_blocks',
    'init_model',
    'inject',
    'load_adapter',
    'load_base',
    'merge',
    'merged',
    'monitor',
    'penalty',
    'remove',
    'save_adapter',
    'save_pretrained',
    'sensitivity',
    'share_base',
    'summary',
    'unmerge',
]

LATE = {
    'mmpeft.engine.inference': ('init_model',),
    'mmpeft.engine.hooks': ('PEFTHook', 'SeedHook', 'UpdateHook'),
    'mmpeft.engine.layer_decay': ('LayerDecayConstructor',),
    'mmpeft.models': ('InternViT', 'LayerNorm2d', 'SimpleFeaturePyramid', 'TimmBackbone'),
}

register_config_packages()


def __getattr__(name: str):
    # Imported on use: inference and hooks bring mmengine's Runner, and backbones timm.
    for module, names in LATE.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
