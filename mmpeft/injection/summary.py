"""What was adapted, what was left, and what it costs in parameters."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from torch import nn

from mmpeft.methods.spec import WeightSpec

from .attach import adapter_parameters, adapters_of, attachments
from .weights import layers, weights_of


@dataclass(frozen=True)
class Row:
    """One adapted weight or place.

    Attributes:
        name: Path of the weight or module in the model.
        kind: Kind of the layer or place.
        shape: Of the weight; (output channels, input channels) of a place.
        method: The method and the arguments that differ from its defaults.
        weight: Parameters of the frozen weight or module.
        adapter: Parameters of the adapter; those that it holds in common
            with others count in the first row.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    method: str
    weight: int
    adapter: int


@dataclass
class Summary:
    """Parameters of an adapted model.

    Attributes:
        rows: The adapted weights and places.
        module: Path of the target module.
        base: Parameters of the target module without adapters.
        adapters: Parameters of all adapters.
        unfrozen: Parameters of the target module that train themselves.
        outside: Trainable parameters outside the target module (neck, heads).
        left: Layers with weights that were not adapted: kind to count.
    """

    rows: list[Row] = field(default_factory=list)
    module: str = ''
    base: int = 0
    adapters: int = 0
    unfrozen: int = 0
    outside: int = 0
    left: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """What trains in the target module, as a share of its own parameters."""
        return (self.adapters + self.unfrozen) / max(self.base, 1)

    @property
    def outgrown(self) -> list[Row]:
        """Adapters with more parameters than the weight that they adapt."""
        return [row for row in self.rows if row.adapter > row.weight]

    def to_dict(self) -> dict:
        """All figures, for JSON."""
        return asdict(self) | dict(share=self.share)

    def __str__(self):
        left = ', '.join(f'{n} {kind}' for kind, n in sorted(self.left.items())) or 'none'
        methods = Counter(row.method for row in self.rows)
        lines = [
            f'adapted in {self.module or "the model"}: {len(self.rows)} weights or places'
            + ''.join(f'\n  {n} x {method}' for method, n in methods.most_common()),
            f'left as they are: {left}',
            f'adapters {self.adapters:,} + unfrozen {self.unfrozen:,} '
            f'= {self.share:.2%} of the {self.base:,} parameters there',
            f'trainable outside (neck, heads): {self.outside:,}',
        ]
        return '\n'.join(lines)


def summary(model: nn.Module) -> Summary:
    """Count what :func:`mmpeft.inject` did to a model.

    Args:
        model: With or without adapters; meta tensors will do.

    Returns:
        One row a weight, and totals.
    """
    path = next((record.targets.module for record in getattr(model, 'peft', [])), '')
    root = model.get_submodule(path)
    prefix = f'{path}.' if path else ''
    rows, counted = [], set()
    for attachment in attachments(root):
        for adapter in attachment.adapters:
            if id(adapter) in counted:
                continue
            own = [p for p in adapter.parameters() if id(p) not in counted]
            counted.update(id(p) for p in [adapter, *own])
            rows.append(
                Row(
                    prefix + attachment.name,
                    _kind(adapter.spec),
                    tuple(adapter.spec.shape),
                    str(adapter.method),
                    adapter.spec.numel,
                    sum(p.numel() for p in own),
                )
            )
    of_adapters = {id(p) for p in adapter_parameters(root)}
    own = [p for p in root.parameters() if id(p) not in of_adapters]
    inside = {id(p) for p in root.parameters()}
    return Summary(
        rows=rows,
        module=path,
        base=sum(p.numel() for p in own),
        adapters=sum(row.adapter for row in rows),
        unfrozen=sum(p.numel() for p in own if p.requires_grad),
        outside=sum(
            p.numel() for p in model.parameters() if p.requires_grad and id(p) not in inside
        ),
        left=_left(root),
    )


def _left(root):
    touched = [path for path, layer in layers(root) if adapters_of(layer, '')]
    left = Counter()
    for path, layer in layers(root):
        if any(path == t or path.startswith(f'{t}.') for t in touched):
            continue
        for tensor, spec in weights_of(layer):
            if not spec.is_bias and not adapters_of(layer, tensor):
                left[_kind(spec)] += 1
    return dict(left)


def _kind(spec):
    if not isinstance(spec, WeightSpec):
        return '/'.join(sorted(spec.kinds))
    for kind in ('depthwise', 'conv', 'linear', 'embedding', 'norm'):
        if kind in spec.kinds:
            return f'{kind} bias' if spec.is_bias else kind
    return 'other'
