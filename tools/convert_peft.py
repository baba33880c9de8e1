"""Convert LoRA and DoRA to Hugging Face's peft, or from it.

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

from pathlib import Path

import mmpeft
from mmpeft.checkpoint.atomic import refuse_existing
from mmpeft.engine.command_line import add_arguments, parser_of, run
from mmpeft.engine.config import find_hook
from mmpeft.engine.inference import init_model
from mmpeft.engine.launch import load_config
from mmpeft.errors import UsageError
from mmpeft.interop.converted import base_names, files_of, write_converted
from mmpeft.interop.peft_folder import read_peft, save_peft
from mmpeft.interop.peft_import import from_peft


def parse_args():
    parser = parser_of(__doc__)
    ways = parser.add_subparsers(dest='way', required=True)
    for way, source, out in (
        ('to', 'checkpoint with adapters, or an adapter file', 'folder for peft'),
        ('from', 'folder of peft', 'OUT.pth or OUT.safetensors'),
    ):
        one = ways.add_parser(way)
        add_arguments(one)
        one.add_argument('source', type=Path, help=source)
        one.add_argument('out', type=Path, help=out)
        base = one.add_mutually_exclusive_group()
        base.add_argument('--module', default='', help='the part of the model that peft adapts')
        base.add_argument('--timm', action='store_true', help="timm's model is what peft adapts")
        one.add_argument(
            '--inference', action='store_true', help='drop what matters in training only: dropout'
        )
        if way == 'to':
            one.add_argument(
                '--as-lora',
                action='store_true',
                help='write thin additive updates of other methods (FLoRA, PiSSA) as LoRA',
            )
        one.add_argument('--overwrite', action='store_true', help='replace files that exist')
    return parser.parse_args()


def convert_to(args, cfg):
    """Write the adapters of a checkpoint as a folder of peft."""
    model = init_model(cfg, args.source)
    names = base_names(model, args.module, args.timm)
    save_peft(model, args.out, names, args.inference, args.overwrite, args.as_lora)
    outside = [k for k in mmpeft.adapter_state_dict(model) if not k.startswith(names.module)]
    print(
        f'{args.out}, for {names.module or "the model"}; {len(outside)} trained tensors are '
        'outside of it'
    )


def convert_from(args, cfg):
    """Write the adapters of a folder of peft as a file of ours."""
    files = files_of(args.out)
    if not args.overwrite:
        refuse_existing(*files)
    config, state = read_peft(args.source)
    hook = find_hook(cfg)
    model = mmpeft.remove(init_model(cfg, cfg.get('load_from')))
    module = (hook.get('targets') or {}).get('module', 'backbone')
    names = base_names(model, args.module, args.timm)
    from_peft(model, config, state, module, names, args.inference)
    write_converted(model, args.out, cfg, hook)
    print(f'{args.out}: {mmpeft.summary(model).adapters:,} adapter parameters')
    if not config.get('modules_to_save'):
        print('The folder holds no heads: they are those of the config and its load_from.')


def main():
    args = parse_args()
    cfg = load_config(args)
    if find_hook(cfg) is None:
        raise UsageError(f'{args.config} has no PEFTHook. Add --method, such as --method lora.')
    (convert_to if args.way == 'to' else convert_from)(args, cfg)


if __name__ == '__main__':
    run(main)
