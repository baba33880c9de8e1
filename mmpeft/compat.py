"""``_base_ = 'mmpeft::...'`` and ``'mmseg::...'`` in configs.

mmengine finds the package behind ``name::`` in a table from import names to
distribution names. mmpeft is not in it, and mmseg's entry holds for one of the
two distributions that carry this import name. An import name as the entry is
looked up as a module, whoever distributes it.
"""

from mmengine.config.utils import MODULE2PACKAGE

CONFIG_PACKAGES = ('mmpeft', 'mmseg')


def register_config_packages():
    """Let configs inherit from :data:`CONFIG_PACKAGES` by ``name::path``."""
    MODULE2PACKAGE.update({name: name for name in CONFIG_PACKAGES})
