"""Make the demo's data: handwritten digits in four real formats.

    python projects/demo/digits.py --out data/digits --seed 0

The same scenes are written as COCO (instances with masks), ADE20K (label
images) and DOTA (oriented boxes). ``classification`` has scenes of one digit
in lists of files and labels, four times as many. ``source`` holds single digits,
dark ink on white paper, on which the demo trains the network that it then adapts:

    data/digits/
      coco/{train,val}/*.jpg            coco/annotations/instances_{train,val}.json
      ade20k/images/{training,validation}/*.jpg
      ade20k/annotations/{training,validation}/*.png
      dota/{train,val}/images/*.png     dota/{train,val}/annfiles/*.txt
      classification/{train,val}.txt    classification/{train,val}/*.png
      source/{train,val}.npz
      made_with.json

Train and val share no scan. The same arguments give the same bytes. The folder
``--out`` appears when all is written.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask
from digit_scenes import CLASSES, draw_scan, draw_scene, load_scans, upright_box
from tqdm import trange

ADE20K_SPLITS = {'train': 'training', 'val': 'validation'}


def main():
    args = parse_args()
    out = Path(args.out)
    wanted = {name: value for name, value in vars(args).items() if name != 'out'}
    wanted['formats'] = ['ade20k', 'classification', 'coco', 'dota']
    if made(out, wanted):
        print(f'{out} exists already.')
        return
    part = out.with_name(f'{out.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    scans = load_scans()
    for index, split in enumerate(('train', 'val')):
        for purpose, write in enumerate((write_source, write_scenes, write_singles)):
            rng = np.random.default_rng([args.seed, index, purpose])
            write(part, split, rng, scans[split], args)
    (part / 'made_with.json').write_text(json.dumps(wanted, indent=2))
    os.replace(part, out)
    print(f'Wrote {args.train} + {args.val} scenes to {out}.')


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', default='data/digits', help='folder to make')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--train', type=int, default=1200, help='scenes to train on')
    parser.add_argument('--val', type=int, default=150, help='scenes to validate on')
    parser.add_argument('--size', type=int, default=128, help='side of a scene in pixels')
    parser.add_argument('--source', type=int, default=6000, help='single digits to train on')
    return parser.parse_args()


def made(out, wanted):
    """Whether ``out`` holds what is wanted.

    Raises:
        SystemExit: It holds something else.
    """
    if not out.exists():
        return False
    record = out / 'made_with.json'
    found = json.loads(record.read_text()) if record.is_file() else 'no made_with.json'
    if found == wanted:
        return True
    raise SystemExit(
        f'{out} exists and was made with other arguments ({found}, not {wanted}). '
        'Remove it, or name another folder with --out.'
    )


def write_source(root, split, rng, scans, args):
    """Write single digits, ``images`` uint8 (N, 40, 40, 3) and ``labels`` (N, )."""
    total = args.source if split == 'train' else args.source // 10
    images, labels = [], []
    for _ in range(total):
        pick = rng.integers(len(scans[1]))
        images.append(draw_scan(rng, scans[0][pick]))
        labels.append(scans[1][pick])
    path = root / 'source' / f'{split}.npz'
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=np.stack(images), labels=np.array(labels))


def write_scenes(root, split, rng, scans, args):
    """Draw the scenes of a split and write them in each format."""
    coco = dict(images=[], annotations=[], categories=coco_categories())
    for index in trange(getattr(args, split), desc=f'{split} scenes'):
        scene, name = draw_scene(rng, *scans, size=args.size), f'{split}_{index:05d}'
        add_coco(coco, root / 'coco' / split, name, scene)
        write_ade20k(root / 'ade20k', ADE20K_SPLITS[split], name, scene)
        write_dota(root / 'dota' / split, name, scene)
    path = root / 'coco' / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco))


def write_singles(root, split, rng, scans, args):
    """Write scenes of one digit, as large as the source's, and a list of them with their labels."""
    folder, lines = root / 'classification', []
    for index in range(4 * getattr(args, split)):
        scene = draw_scene(rng, *scans, size=40, count=(1, 1), height=(30, 40), turn=10)
        name = f'{split}/{index:05d}.png'
        write_image(folder / name, scene.image)
        lines.append(f'{name} {scene.digits[0].label}\n')
    (folder / f'{split}.txt').write_text(''.join(lines))


def add_coco(coco, folder, name, scene):
    """Write the image and add its instances; what is hidden counts neither in mask nor box."""
    image_id, (height, width) = len(coco['images']), scene.image.shape[:2]
    file_name = f'{name}.jpg'
    write_image(folder / file_name, scene.image)
    coco['images'].append(dict(id=image_id, file_name=file_name, height=height, width=width))
    for digit in scene.digits:
        mask = pycocotools.mask.encode(np.asfortranarray(digit.mask, np.uint8))
        x1, y1, x2, y2 = upright_box(digit.mask).tolist()
        coco['annotations'].append(
            dict(
                id=len(coco['annotations']) + 1,
                image_id=image_id,
                category_id=digit.label + 1,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                area=int(digit.mask.sum()),
                iscrowd=0,
                segmentation=dict(size=mask['size'], counts=mask['counts'].decode()),
            )
        )


def coco_categories():
    return [dict(id=label + 1, name=name) for label, name in enumerate(CLASSES)]


def write_ade20k(root, split, name, scene):
    """Write image and labels: 0 other (the rims), 1 background, 2 to 11 the digits."""
    labels = np.where(scene.rim, 0, 1).astype(np.uint8)
    for digit in scene.digits:
        labels[digit.mask] = digit.label + 2
    write_image(root / 'images' / split / f'{name}.jpg', scene.image)
    write_image(root / 'annotations' / split / f'{name}.png', labels)


def write_dota(folder, name, scene):
    """Write image and oriented boxes; a digit of which a part is hidden is difficult."""
    write_image(folder / 'images' / f'{name}.png', scene.image)
    lines = [
        ' '.join([*(f'{v:.1f}' for v in digit.corners.ravel()), CLASSES[digit.label],
                  str(int(digit.hidden > 0))])
        for digit in scene.digits
    ]  # fmt: skip
    path = folder / 'annfiles' / f'{name}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')


def write_image(path, image):
    """Write an RGB image or a map of labels.

    Raises:
        OSError: OpenCV could not write the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image[..., ::-1] if image.ndim == 3 else image
    if not cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise OSError(f'Could not write {path}.')


if __name__ == '__main__':
    main()
