"""The same network with the adapters of peft and LyCORIS, imported where they are used."""

import warnings

from torch import nn

from mmpeft.errors import UsageError


def peft_lora(model: nn.Module, rank: int, paths: list[str]) -> nn.Module:
    """peft's LoRA on the layers at the paths."""
    return _with_peft(model, 'LoraConfig', paths, r=rank, lora_alpha=rank)


def peft_dora(model: nn.Module, rank: int, paths: list[str]) -> nn.Module:
    """peft's DoRA, which takes the norm as a constant in backward."""
    return _with_peft(model, 'LoraConfig', paths, r=rank, lora_alpha=rank, use_dora=True)


def peft_hira(model: nn.Module, rank: int, paths: list[str]) -> nn.Module:
    """peft's HiRA, which is first-order LieRA."""
    return _with_peft(model, 'HiraConfig', paths, r=rank)


def _with_peft(model, config, paths, **arguments):
    import peft

    if not hasattr(peft, config):
        raise UsageError(f'peft {peft.__version__} has no {config}')
    config = getattr(peft, config)(target_modules=paths, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # The network itself with its layers exchanged, without peft's wrapper around it.
        return peft.get_peft_model(model, config).base_model.model


class WithLoCon(nn.Module):
    """A network whose layers call LyCORIS' modules, which stand beside it."""

    def __init__(self, model, adapters):
        super().__init__()
        self.model = model
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x):
        return self.model(x)


def locon(model: nn.Module, rank: int, paths: list[str], tucker: bool = False) -> nn.Module:
    """LyCORIS's LoCon on the layers at the paths, in its default way of computing."""
    from lycoris.modules.locon import LoConModule

    adapters = []
    for path in paths:
        layer = model.get_submodule(path)
        adapter = LoConModule(path, layer, lora_dim=rank, alpha=rank, use_tucker=tucker)
        adapter.to(layer.weight.device)
        adapter.apply_to()
        adapters.append(adapter)
    return WithLoCon(model, adapters).train(model.training)
