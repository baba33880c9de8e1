"""Take LoRA and DoRA to Hugging Face's peft, or from it.

    python tools/convert_peft.py to CONFIG CHECKPOINT FOLDER
    python tools/convert_peft.py from CONFIG FOLDER OUT.pth

``to`` writes a folder from which ``peft.PeftModel.from_pretrained(base,
FOLDER)`` adapts the same base. ``from`` writes a checkpoint for mmpeft's tools
and beside it OUT.py, the config with the folder's ranks and layers; or, as
OUT.safetensors, a file for ``mmpeft.load_adapter``.

peft's base is the whole model unless ``--module`` names a part of it. ``--timm``
takes timm's own model: ``backbone.model``, under the names that
``timm.create_model(name)`` has.
"""

import argparse
from pathlib import Path

import torch

import mmpeft
from mmpeft.checkpoint.atomic import replacing
from mmpeft.checkpoint.keys import adapter_state_dict
from mmpeft.checkpoint.manifest import describe
from mmpeft.engine.inference import init_model
from mmpeft.engine.launch import add_arguments, check_checkpoint, load_config, run
from mmpeft.errors import UsageError
from mmpeft.interop.peft_folder import read_peft, save_peft
from mmpeft.interop.peft_import import from_peft
from mmpeft.interop.peft_names import Names
from mmpeft.models import TimmBackbone


def parse_args():
    parser = argparse.ArgumentParser(description="Convert adapters to and from peft's format")
    ways = parser.add_subparsers(dest='way', required=True)
    for way, source, out in (
        ('to', 'checkpoint with adapters, or what save_adapter wrote', 'folder for peft'),
        ('from', 'folder of peft', 'OUT.pth or OUT.safetensors'),
    ):
        one = ways.add_parser(way)
        one.add_argument('config', help='config of the model, with default_hooks.peft')
        one.add_argument('source', type=Path, help=source)
        one.add_argument('out', type=Path, help=out)
        base = one.add_mutually_exclusive_group()
        base.add_argument('--module', default='', help='the part of the model that peft adapts')
        base.add_argument('--timm', action='store_true', help="timm's model is what peft adapts")
        one.add_argument(
            '--inference', action='store_true', help='leave out what only training knows: dropout'
        )
        one.add_argument('--overwrite', action='store_true', help='replace files that exist')
        add_arguments(one)
    return parser.parse_args()


def load(cfg, source=None):
    """The model of a config with the adapters of a file; its base alone without one."""
    if source is not None and source.suffix != '.safetensors':
        return init_model(cfg, source)
    model = mmpeft.remove(init_model(cfg, cfg.get('load_from')))
    return model if source is None else mmpeft.load_adapter(model, source)


def base_checkpoint(cfg):
    """The checkpoint of the whole plain model that the adapters of a config start from."""
    return cfg.get('load_from') or cfg.default_hooks.peft.get('base_checkpoint')


def write(model, cfg, out):
    """Write an adapter file, or a checkpoint and the config that it is of."""
    if out.suffix == '.safetensors':
        mmpeft.save_adapter(model, out)
        return
    base = base_checkpoint(cfg)
    description = describe(model) | dict(holds_base=False, base_checkpoint=base)
    with replacing(out) as temporary:
        state = adapter_state_dict(model)
        torch.save(dict(meta=dict(mmpeft=description), state_dict=state), temporary)
    (record,) = model.peft
    cfg.default_hooks.peft = dict(type='mmpeft.PEFTHook', base_checkpoint=base, **record.config())
    for key in ('peft', 'load_from', 'work_dir', 'launcher'):
        cfg.pop(key, None)
    cfg.dump(out.with_suffix('.py'))


def base_names(args, model):
    """How peft's base calls the modules of a model.

    Raises:
        UsageError: ``--timm`` with a backbone that is none of timm's.
    """
    if not args.timm:
        return Names(args.module)
    if not isinstance(model.backbone, TimmBackbone):
        kind = type(model.backbone).__name__
        raise UsageError(f'--timm: the backbone is a {kind}. Write --module backbone.')
    return Names('backbone.model', model.backbone.names_in_whole())


def convert_to(args, cfg):
    """Write the adapters of a checkpoint as a folder of peft."""
    check_checkpoint(args.source)
    model = load(cfg, args.source)
    names = base_names(args, model)
    save_peft(model, args.out, names, args.inference, args.overwrite)
    outside = [k for k in adapter_state_dict(model) if not k.startswith(names.module)]
    print(
        f'{args.out}, for {names.module or "the model"}; {len(outside)} tensors that train lie '
        'outside of it'
    )


def convert_from(args, cfg):
    """Write the adapters of a folder of peft as a file of ours.

    Raises:
        UsageError: The file exists, or its kind is unknown.
    """
    beside = {'.pth': '.py', '.safetensors': '.json'}.get(args.out.suffix)
    if beside is None:
        raise UsageError(f'{str(args.out)!r} ends in neither .pth nor .safetensors.')
    taken = [str(p) for p in (args.out, args.out.with_suffix(beside)) if p.exists()]
    if taken and not args.overwrite:
        raise UsageError(f'{" and ".join(taken)} exist already. Name another, or --overwrite.')
    config, state = read_peft(args.source)
    model = load(cfg)
    module = cfg.default_hooks.peft.get('targets', {}).get('module', 'backbone')
    from_peft(model, config, state, module, base_names(args, model), args.inference)
    write(model, cfg, args.out)
    print(f'{args.out}: {mmpeft.summary(model).adapters:,} adapter parameters')
    if not config.get('modules_to_save'):
        print('The folder holds no heads: they are as the config and its load_from give them.')


def main():
    args = parse_args()
    cfg = load_config(args)
    if 'peft' not in cfg.get('default_hooks', {}):
        raise UsageError(f'{args.config} has no default_hooks.peft. Add it, with any method.')
    (convert_to if args.way == 'to' else convert_from)(args, cfg)


if __name__ == '__main__':
    run(main)
