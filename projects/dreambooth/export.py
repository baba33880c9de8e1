"""Write a trained subject for users of diffusers.

    python projects/dreambooth/export.py WORK_DIR --merged FOLDER
    python projects/dreambooth/export.py WORK_DIR --lora FOLDER

--merged writes FOLDER/unet, a plain model. --lora writes the file that
pipeline.load_lora_weights(FOLDER) reads, of LoRA, DoRA and sums that a LoRA equals.
"""

import argparse
from pathlib import Path

from dreambooth.export import save_lora, save_merged
from dreambooth.models import adapted_parts, load_adapters, load_pipeline

from mmpeft.engine.command_line import run
from mmpeft.engine.config import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dir', type=Path, help='of train.py')
    parser.add_argument('--model', help='the folder, if it was moved since')
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument('--merged', type=Path, help='folder for plain models')
    ways.add_argument('--lora', type=Path, help='folder for a LoRA file')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = read_config(args.work_dir / 'config.py')
    cfg.model = args.model or cfg.model
    pipeline = load_pipeline(cfg)
    parts = adapted_parts(pipeline, cfg)
    load_adapters(parts, args.work_dir)
    if args.merged:
        save_merged(parts, args.merged)
    else:
        save_lora(pipeline, parts, args.lora)
    print(args.merged or args.lora)


if __name__ == '__main__':
    run(main)
