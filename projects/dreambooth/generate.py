"""Images of a trained subject, before and after training, from the same prompts and seeds.

    python projects/dreambooth/generate.py WORK_DIR --seeds 0 1 2 3

Writes WORK_DIR/images: sheet.png with all of them, each by itself, and images.json, which
evaluate.py takes.
"""

import argparse
import json
from pathlib import Path

import torch
from dreambooth.data import prompts_of, read_prompts, subject_name
from dreambooth.models import adapted_parts, load_adapters, load_pipeline
from dreambooth.pictures import generate, sheet

from mmpeft.engine.command_line import run
from mmpeft.engine.config import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dir', type=Path, help='of train.py')
    parser.add_argument('--model', help='the folder, if it was moved since')
    parser.add_argument('--prompts', help='file with a prompt a line, such as: a {} in the jungle')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = read_config(args.work_dir / 'config.py')
    cfg.model = args.model or cfg.model
    if args.prompts:
        cfg.prompts = read_prompts(args.prompts, cfg.subject.class_name)
    prompts = prompts_of(cfg, subject_name(cfg))
    pipeline = load_pipeline(cfg).to(args.device)
    out = args.work_dir / 'images'
    made = {}
    for name in ('before', 'after'):
        if name == 'after':
            load_adapters(adapted_parts(pipeline, cfg), args.work_dir)
        made[name] = [*generate(pipeline, prompts, args.seeds, cfg.resolution, **cfg.sampler)]
        (out / name).mkdir(parents=True, exist_ok=True)
    sheet(prompts, args.seeds, made).save(out / 'sheet.png')
    rows = []
    plain = prompts_of(cfg, cfg.subject.class_name)
    for number, prompt in enumerate(plain):
        for column, seed in enumerate(args.seeds):
            file = f'{number:02}_{seed}.png'
            for name, images in made.items():
                images[number * len(args.seeds) + column].save(out / name / file)
            rows.append(dict(file=file, prompt=prompt, seed=seed))
    (out / 'images.json').write_text(json.dumps(rows, indent=1))
    print(f'{out / "sheet.png"}: {len(prompts)} prompts, {len(args.seeds)} seeds')


if __name__ == '__main__':
    run(main)
