"""Write the table of backbones into docs/backbones.md.

    python docs/backbones_page.py [--check]

Licences and normalisation are those of timm's `pretrained_cfg`; memory is predicted as
tools/analysis_tools/memory_table.py does, on tensors without data.
"""

import argparse
import warnings
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

from mmpeft.analysis.memory import predict
from mmpeft.execution import MEMORY, SPEED
from mmpeft.injection.inject import inject
from mmpeft.models import TimmBackbone

ROOT = Path(__file__).resolve().parents[1]
PAGE = 'docs/backbones.md'
BEGIN = '<!-- written by docs/backbones_page.py from here -->'
END = '<!-- to here -->'
IMAGES = (1, 3, 1024, 1024)
# What a config says beside the name. Patches of 14 do not make strides of 4 to 32, those of 16 do;
# Swin decides by img_size in which stages windows are shifted.
PLAIN, PYRAMID, PATCH16 = dict(out_indices=(-1,)), {}, dict(out_indices=(-1,), patch_size=16)
BACKBONES = {
    'vit_small_patch16_dinov3.lvd1689m': PLAIN,
    'vit_base_patch16_dinov3.lvd1689m': PLAIN,
    'vit_large_patch16_dinov3.lvd1689m': PLAIN,
    'vit_large_patch16_dinov3.sat493m': PLAIN,
    'vit_huge_plus_patch16_dinov3.lvd1689m': PLAIN,
    'vit_7b_patch16_dinov3.lvd1689m': PLAIN,
    'eva02_base_patch14_224.mim_in22k': PATCH16,
    'eva02_large_patch14_224.mim_m38m': PATCH16,
    'vit_pe_spatial_small_patch16_512.fb': PLAIN,
    'vit_pe_spatial_base_patch16_512.fb': PLAIN,
    'vit_pe_spatial_large_patch14_448.fb': PATCH16,
    'vit_base_patch16_siglip_512.v2_webli': PLAIN,
    'vit_large_patch16_siglip_512.v2_webli': PLAIN,
    'vit_intern300m_patch14_448.ogvl_2pt5': PATCH16,
    'convnext_tiny.dinov3_lvd1689m': PYRAMID,
    'convnext_small.dinov3_lvd1689m': PYRAMID,
    'convnext_base.dinov3_lvd1689m': PYRAMID,
    'convnext_large.dinov3_lvd1689m': PYRAMID,
    'convnextv2_base.fcmae_ft_in22k_in1k': PYRAMID,
    'convnextv2_large.fcmae_ft_in22k_in1k': PYRAMID,
    'swin_tiny_patch4_window7_224.ms_in22k': dict(img_size=1024),
    'swin_base_patch4_window12_384.ms_in22k': dict(img_size=1024),
    'swinv2_base_window12to16_192to256.ms_in22k_ft_in1k': dict(img_size=1024),
    'sam2_hiera_tiny.fb_r896_2pt1': PYRAMID,
    'sam2_hiera_base_plus.fb_r896_2pt1': PYRAMID,
    'sam2_hiera_large.fb_r1024_2pt1': PYRAMID,
}


def build(name: str, arguments: dict, memory: str = SPEED) -> nn.Module:
    """A model whose backbone has LoRA of rank 16 in all its layers."""
    model = nn.Module()
    model.backbone = TimmBackbone(name, **arguments)
    inject(model, dict(type='LoRA', rank=16), dict(module='backbone'), memory=memory)
    return model


def facts(name: str) -> list[str]:
    """What timm says of the weights: licence, mean and standard deviation in [0, 255]."""
    weights = timm.get_pretrained_cfg(name)
    numbers = (', '.join(f'{255 * x:.6g}' for x in part) for part in (weights.mean, weights.std))
    return [str(weights.license), *numbers]


def sizes(name: str, arguments: dict) -> list[str]:
    """Channels of the levels, millions of parameters, and the GiB of a training step."""
    with torch.device('meta'):
        backbone = build(name, arguments).backbone
    widths = [getattr(backbone, norm).weight.numel() for norm in backbone.newly_initialized]
    frozen = sum(p.numel() for p in backbone.parameters() if not p.requires_grad)
    memory = predict(partial(build, name, arguments), IMAGES)
    totals = [f'{total / 2**30:.1f}' for total in memory.totals.values()]
    return [', '.join(map(str, widths)), f'{frozen / 1e6:,.0f} M', *totals]


def row(name: str) -> str:
    """The line of a backbone."""
    arguments = BACKBONES[name]
    beside = ', '.join(f'`{k}={v}`' for k, v in arguments.items() if k != 'out_indices')
    cells = [f'`{name}`', beside, *facts(name), *sizes(name, arguments)]
    return f'| {" | ".join(cells)} |'


def table(plain: bool) -> str:
    """The plain transformers, or the pyramids."""
    names = [name for name, arguments in BACKBONES.items() if ('out_indices' in arguments) == plain]
    columns = ['timm name', 'extra arguments', 'licence', 'mean', 'std', 'channels', 'parameters']
    columns += [f'GiB, {memory}' for memory in MEMORY]
    head = f'| {" | ".join(columns)} |\n|{"---|" * len(columns)}'
    return '\n'.join([head, *map(row, names)])


def document() -> str:
    """What the page should hold."""
    before, _, rest = (ROOT / PAGE).read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    plain = f'Plain transformers, in the configs `vit`:\n\n{table(True)}'
    pyramids = f'Pyramids, in the configs `convnext`:\n\n{table(False)}'
    return f'{before}{BEGIN}\n\n{plain}\n\n{pyramids}\n\n{END}{after}'


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--check', action='store_true', help='fail if it is out of date')
    check = parser.parse_args().check
    warnings.simplefilter('ignore')
    text = document()
    if check and (ROOT / PAGE).read_text() != text:
        raise SystemExit(f'Out of date: {PAGE}. Run python docs/backbones_page.py.')
    (ROOT / PAGE).write_text(text)


if __name__ == '__main__':
    main()
