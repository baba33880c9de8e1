"""The blocks of a network, found from its structure: what it repeats, in lists of modules."""

import warnings
from collections import Counter

from torch import nn

from .insertion_points import smallest
from .points import LISTS, layer_spec
from .statistics import STATISTICS, FrozenStatistics
from .weights import join, layers, lineage

# What models call the switch of their own recomputation: mmdet and mmengine, timm, transformers,
# and InternViT here.
SWITCHES = 'with_cp', 'grad_checkpointing', 'gradient_checkpointing', 'recomputes'

BLOCKS = 'two modules of one class, each with two layers or more, in an nn.Sequential or ModuleList'


def blocks(root: nn.Module) -> dict[str, nn.Module]:
    """The smallest elements of lists with two layers or more, of classes that occur twice or more.

    By their paths. A list is an ``nn.Sequential`` or an ``nn.ModuleList``; if these hold no blocks,
    it is any module whose children are all of one class.
    """
    modules = dict(layers(root))
    return _blocks_in(modules, _is_list) or _blocks_in(modules, _is_uniform)


def target_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The :func:`blocks` of the modules that were the targets of an adapted model."""
    return {
        join(record.module, path): block
        for record in model.peft
        for path, block in blocks(model.get_submodule(record.module)).items()
    }


def recomputable_blocks(root: nn.Module) -> list[nn.Module]:
    """The blocks that can run twice, and that the network does not run twice itself.

    A norm that counts statistics would count them twice; its block is left out with a warning.
    A network without blocks causes one too.
    """
    modules, blocks_of_root, found, counting = dict(layers(root)), blocks(root), [], []
    if not blocks_of_root:
        warnings.warn(
            f"memory='small' finds no blocks in {type(root).__name__} ({BLOCKS}), so it keeps what "
            "backward needs. 'balanced' needs no blocks.",
            stacklevel=2,
        )
    for path, block in blocks_of_root.items():
        related = [*(modules[above] for above in lineage(path)), *block.modules()]
        if any(getattr(module, name, False) is True for module in related for name in SWITCHES):
            continue
        norms = [m for m in block.modules() if isinstance(m, STATISTICS)]
        if any(m.track_running_stats and not isinstance(m, FrozenStatistics) for m in norms):
            counting.append(path)
            continue
        found.append(block)
    if counting:
        warnings.warn(
            f"memory='small': {len(counting)} blocks, such as {counting[0]!r}, hold norms whose "
            'running statistics train, and would count each batch twice. These blocks keep what '
            'backward needs.',
            stacklevel=2,
        )
    return found


def _blocks_in(modules, is_list):
    lists = [path for path, m in modules.items() if is_list(m)]
    paths = [join(path, name) for path in lists for name in modules[path]._modules]
    elements = {path: modules[path] for path in paths if path in modules}
    held = Counter(top for p, m in modules.items() if layer_spec(m) for top in lineage(p))
    kinds = Counter(map(_kind, elements.values()))
    is_block = {p: held[p] > 1 and kinds[_kind(m)] > 1 for p, m in elements.items()}
    return smallest({p: m for p, m in elements.items() if is_block[p] and not isinstance(m, LISTS)})


def _is_list(module):
    return isinstance(module, nn.Sequential | LISTS)


def _is_uniform(module):
    kinds = [*map(_kind, module._modules.values())]
    return len(kinds) > 1 and len(set(kinds)) == 1


def _kind(module):
    return type(module).__module__, type(module).__qualname__
