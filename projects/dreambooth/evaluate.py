"""CLIP-I, DINO and CLIP-T of the images that generate.py has written.

python projects/dreambooth/evaluate.py WORK_DIR
"""

import argparse
import json
from pathlib import Path

from diffusers.utils import load_image
from dreambooth.data import read_images
from dreambooth.fidelity import Clip, Dino, agreement, likeness, likeness_among

from mmpeft.engine.command_line import run
from mmpeft.engine.config import read_config
from mmpeft.errors import MissingFileError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dir', type=Path, help='of train.py')
    parser.add_argument('--images', help='folder with real images, if it was moved since')
    parser.add_argument('--clip', default='openai/clip-vit-base-patch32', help='folder or name')
    parser.add_argument('--dino', default='facebook/dino-vits16', help='folder or name')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = read_config(args.work_dir / 'config.py')
    folder = args.work_dir / 'images'
    if not (folder / 'images.json').is_file():
        raise MissingFileError(f'There is no {folder}/images.json. Run generate.py first.')
    listed = json.loads((folder / 'images.json').read_text())
    clip, dino = Clip(args.clip), Dino(args.dino)
    real = read_images(args.images or cfg.subject.images)
    subject = {'CLIP-I': clip.images(real), 'DINO': dino.images(real)}
    prompts = clip.prompts([each['prompt'] for each in listed])
    pairs = subject if len(real) > 1 else {}
    table = {'real images': {name: likeness_among(each) for name, each in pairs.items()}}
    for name in ('before', 'after'):
        images = [load_image(str(folder / name / each['file'])) for each in listed]
        seen = {'CLIP-I': clip.images(images), 'DINO': dino.images(images)}
        table[name] = {key: likeness(seen[key], subject[key]) for key in seen}
        table[name]['CLIP-T'] = agreement(seen['CLIP-I'], prompts)
    (folder / 'fidelity.json').write_text(json.dumps(table, indent=1))
    print('| images | CLIP-I | DINO | CLIP-T |\n| --- | --- | --- | --- |')
    for name, row in table.items():
        cells = (f'{row[key]:.3f}' if key in row else '' for key in ('CLIP-I', 'DINO', 'CLIP-T'))
        print(f'| {name} | {" | ".join(cells)} |')


if __name__ == '__main__':
    run(main)
