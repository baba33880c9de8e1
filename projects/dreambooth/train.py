"""Train adapters on a few images of a subject.

    python projects/dreambooth/train.py projects/dreambooth/configs/sdxl_liera.py
    accelerate launch --num_processes 4 --mixed_precision bf16 projects/dreambooth/train.py CONFIG

Adapters are written into the work directory, which generate.py and export.py take.
"""

import argparse

from dreambooth.models import SAMPLER
from dreambooth.training import train

from mmpeft.engine.command_line import add_config_arguments, run
from mmpeft.engine.config import compose, read_config, run_name
from mmpeft.engine.key_values import check_options


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_arguments(parser)
    parser.add_argument('--model', help="folder of diffusers, or a model's name on the hub")
    parser.add_argument('--images', help='folder with images of the subject')
    parser.add_argument('--class-name', help='what the subject is, such as cat')
    parser.add_argument('--work-dir', help='where adapters, checkpoints and the log go')
    parser.add_argument('--resume', action='store_true', help='go on from the last checkpoint')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    known = read_config(args.config).to_dict()
    known.pop('peft', None)  # of the method file, whose method is in default_hooks
    check_options(args.cfg_options or {}, known, {'sampler': SAMPLER, 'default_hooks': None})
    cfg = compose(args.config, args.method, args.cfg_options)
    cfg.model = args.model or cfg.model
    cfg.subject.images = args.images or cfg.subject.images
    cfg.subject.class_name = args.class_name or cfg.subject.class_name
    name = run_name(args.config, args.method)
    train(cfg, args.work_dir or f'work_dirs/dreambooth/{name}', args.resume)


if __name__ == '__main__':
    run(main)
