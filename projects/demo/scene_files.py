"""Write scenes in the formats of COCO, ADE20K and DOTA, and as lists of files and labels.

FOLDER/
  coco/{train,val}/*.jpg            coco/annotations/instances_{train,val}.json
  ade20k/images/{training,validation}/*.jpg
  ade20k/annotations/{training,validation}/*.png
  dota/{train,val}/images/*.png     dota/{train,val}/annfiles/*.txt
  classification/{train,val}.txt    classification/{train,val}/*.png
  made_with.json
"""

import json
import os
import shutil
from contextlib import contextmanager

import cv2
import numpy as np
import pycocotools.mask
from scenes import draw_scene, upright_box
from tqdm import trange

ADE20K_SPLITS = {'train': 'training', 'val': 'validation'}


def made(out, wanted):
    """Whether a folder holds what is wanted, by its ``made_with.json``.

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


@contextmanager
def making(out, made_with):
    """A folder to write into, which becomes ``out`` when all is written."""
    part = out.with_name(f'{out.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    (part / 'made_with.json').write_text(json.dumps(made_with, indent=2))
    os.replace(part, out)


def write_scenes(root, split, rng, source, classes, number, size, **place):
    """Draw the scenes of a split and write them for detection and segmentation.

    Args:
        root (Path): Takes ``coco``, ``ade20k`` and ``dota``.
        split (str): ``'train'`` or ``'val'``.
        rng (np.random.Generator): The only source of randomness.
        source: See :func:`scenes.draw_scene`.
        classes (tuple[str]): Names of the labels.
        number (int): Scenes.
        size (int): Their side, pixels.
        **place: For the source.
    """
    categories = [dict(id=label + 1, name=name) for label, name in enumerate(classes)]
    coco = dict(images=[], annotations=[], categories=categories)
    for index in trange(number, desc=f'{split} scenes', disable=None):
        scene, name = draw_scene(rng, source, size=size, **place), f'{split}_{index:05d}'
        add_coco(coco, root / 'coco' / split, name, scene)
        write_ade20k(root / 'ade20k', ADE20K_SPLITS[split], name, scene)
        write_dota(root / 'dota' / split, name, scene, classes)
    path = root / 'coco' / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco))


def write_singles(root, split, rng, source, number, size, **place):
    """Write scenes of one instance, and a list of them with their labels.

    The arguments are those of :func:`write_scenes`; ``place`` goes to the source.
    """
    folder, lines = root / 'classification', []
    for index in range(number):
        scene = draw_scene(rng, source, size=size, count=(1, 1), **place)
        name = f'{split}/{index:05d}.png'
        write_image(folder / name, scene.image)
        lines.append(f'{name} {scene.instances[0].label}\n')
    (folder / f'{split}.txt').write_text(''.join(lines))


def add_coco(coco, folder, name, scene):
    """Write the image and add its instances; what is hidden counts neither in mask nor box."""
    image_id, (height, width) = len(coco['images']), scene.image.shape[:2]
    file_name = f'{name}.jpg'
    write_image(folder / file_name, scene.image)
    coco['images'].append(dict(id=image_id, file_name=file_name, height=height, width=width))
    for instance in scene.instances:
        mask = pycocotools.mask.encode(np.asfortranarray(instance.mask, np.uint8))
        x1, y1, x2, y2 = upright_box(instance.mask).tolist()
        coco['annotations'].append(
            dict(
                id=len(coco['annotations']) + 1,
                image_id=image_id,
                category_id=instance.label + 1,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                area=int(instance.mask.sum()),
                iscrowd=0,
                segmentation=dict(size=mask['size'], counts=mask['counts'].decode()),
            )
        )


def write_ade20k(root, split, name, scene):
    """Write image and labels: 0 other (the rims), 1 background, then the classes from 2 on."""
    labels = np.where(scene.rim, 0, 1).astype(np.uint8)
    for instance in scene.instances:
        labels[instance.mask] = instance.label + 2
    write_image(root / 'images' / split / f'{name}.jpg', scene.image)
    write_image(root / 'annotations' / split / f'{name}.png', labels)


def write_dota(folder, name, scene, classes):
    """Write image and oriented boxes; an instance of which a part is hidden is difficult."""
    write_image(folder / 'images' / f'{name}.png', scene.image)
    lines = [
        ' '.join([*(f'{v:.1f}' for v in instance.corners.ravel()), classes[instance.label],
                  str(int(instance.hidden > 0))])
        for instance in scene.instances
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
