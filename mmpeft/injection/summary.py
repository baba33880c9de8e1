"""What was adapted, what was skipped, and what it costs in parameters."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from torch import nn

from mmpeft.methods.spec import KINDS, InsertionPoint, WeightSpec
from mmpeft.quantization import Quantized, stored_in

from .site import Site, adapters_of, attached, own_parameters
from .weights import is_below, join, layers, newly_initialized, unknown_parameters, weights_of
from .wrappers import is_flattened, is_partitioned, refuse_sharded, unwrapped


@dataclass(frozen=True)
class SummaryRow:
    """One adapter.

    Attributes:
        name: Path of the weight or module in the model.
        kind: Kind of the layer or insertion point.
        shape: Of the weight; (output, input channels) of an insertion point.
        method: The method and the arguments that differ from its defaults.
        weight: Parameters of the frozen weight or module.
        adapter: Parameters of the adapter; shared ones count in the first row.
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
        rows: One for each adapter.
        module: Path of the target module; paths where there are several.
        base: Parameters of the target without adapters.
        adapters: Parameters of all adapters.
        unfrozen: Parameters of the target that train themselves.
        outside: Trainable parameters outside the target (neck, heads).
        skipped: How many weights of each kind in the target are not adapted.
        unknown: Elements of what no method is defined on, by name; see
            :func:`~mmpeft.injection.weights.unknown_parameters`.
        stored: Bytes of the target without adapters, by format or dtype; empty where nothing is
            in few bits.
    """

    rows: list[SummaryRow] = field(default_factory=list)
    module: str = ''
    base: int = 0
    adapters: int = 0
    unfrozen: int = 0
    outside: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """What trains in the target, as a fraction of its own parameters."""
        return (self.adapters + self.unfrozen) / max(self.base, 1)

    @property
    def unknown_share(self) -> float:
        """What no method is defined on, as a fraction of the target's parameters."""
        return sum(self.unknown.values()) / max(self.base, 1)

    @property
    def oversized(self) -> list[SummaryRow]:
        """Rows of adapters with more parameters than the weight that they adapt."""
        return [row for row in self.rows if row.adapter > row.weight]

    def to_dict(self) -> dict:
        """All figures, for JSON."""
        return asdict(self) | dict(share=self.share)

    def __str__(self):
        skipped = ', '.join(f'{n} {kind}' for kind, n in sorted(self.skipped.items())) or 'none'
        methods = Counter(row.method for row in self.rows)
        lines = [
            f'adapted in {self.module or "the model"}: {len(self.rows)} weights or modules'
            + ''.join(f'\n  {n} x {method}' for method, n in methods.most_common()),
            f'skipped: {skipped}',
            *(
                f'of unsupported layers, not adapted: {name}, {size:,} = {size / self.base:.2%}'
                for name, size in self.unknown.items()
            ),
            f'adapters {self.adapters:,} + unfrozen {self.unfrozen:,} '
            f'= {self.share:.2%} of the {self.base:,} parameters there',
            f'trainable outside (neck, heads): {self.outside:,}',
        ]
        if self.stored:
            parts = (f'{size / 2**20:,.1f} MiB {kind}' for kind, size in self.stored.items())
            lines.append(f'stored there without adapters: {", ".join(parts)}')
        return '\n'.join(lines)


def summary(model: nn.Module) -> Summary:
    """Count what :func:`mmpeft.inject` did to a model, on the meta device too.

    Raises:
        UsageError: FullyShardedDataParallel or DeepSpeed left this rank parts of the parameters.
    """
    if is_flattened(model) or is_partitioned(model):
        refuse_sharded(model, 'summary')
    with unwrapped(model) as bare:
        return _summary(bare)


def _summary(model):
    modules = {record.module: None for record in getattr(model, 'peft', [])} or {'': None}
    modules = [path for path in modules if not is_below(path, modules.keys() - {path})]
    roots = [model.get_submodule(path) for path in modules]
    rows = summary_rows(attached(model))
    own = {id(p): p for root in roots for p in own_parameters(root)}.values()
    stored = Counter()
    if any(isinstance(p, Quantized) for p in own):
        for p in own:
            stored[stored_in(p)] += p.nbytes
    inside = {id(p) for root in roots for p in root.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    return Summary(
        rows=rows,
        module=' and '.join(modules),
        base=sum(p.numel() for p in own),
        adapters=sum(row.adapter for row in rows),
        unfrozen=sum(p.numel() for p in own if p.requires_grad),
        outside=sum(p.numel() for p in outside if p.requires_grad),
        skipped=dict(sum(map(_skipped, roots), Counter())),
        unknown={
            join(path, name): size
            for path, root in zip(modules, roots, strict=True)
            for name, size in unknown_parameters(root).items()
        },
        stored=dict(stored),
    )


def summary_rows(sites: Iterable[Site]) -> list[SummaryRow]:
    """One row for each adapter of sites; tied weights have one."""
    rows, counted = [], set()
    for site in sites:
        if id(site.adapter) not in counted:
            own = {id(p): p.numel() for p in site.adapter.parameters() if id(p) not in counted}
            counted.update(own, [id(site.adapter)])
            kind, shape = kind_of(site.spec), tuple(site.spec.shape)
            size = sum(own.values())
            row = SummaryRow(site.name, kind, shape, str(site.method), site.spec.numel, size)
            rows.append(row)
    return rows


def _skipped(root) -> Counter:
    adapted = [path for path, layer in layers(root) if adapters_of(layer, '')]
    adapted += newly_initialized(root)
    return Counter(
        kind_of(spec)
        for path, layer in layers(root)
        if not is_below(path, adapted)
        for tensor, spec in weights_of(layer)
        if not spec.is_bias and not adapters_of(layer, tensor)
    )


def kind_of(spec: WeightSpec | InsertionPoint) -> str:
    """The kind of a layer in one word; those of an insertion point joined by slashes."""
    if not isinstance(spec, WeightSpec):
        return '/'.join(sorted(spec.kinds))
    kinds = [kind for kind in ('depthwise', *KINDS) if kind in spec.kinds] or ['other']
    return f'{kinds[0]} bias' if spec.is_bias else kinds[0]
