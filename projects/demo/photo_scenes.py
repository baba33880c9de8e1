"""Photo scenes: cut-outs of animals, plants and things with their real masks, on photographs."""

from pathlib import Path

import cv2
import numpy as np
from scenes import Sprite, turned

STAMPS = Path('/usr/share/tuxpaint/stamps')
PHOTOGRAPHS = Path('/usr/share/backgrounds/mate/nature')
# Where the stamps of a class lie.
FOLDERS = dict(
    mammal='animals/mammals',
    bird='animals/birds',
    fish='animals/fish',
    flower='plants/flowers',
    fruit='food/fruit',
    vegetable='food/vegetables',
    tool='household/tools',
    instrument='hobbies/music',
)
CLASSES = tuple(FOLDERS)
# Photographs that show what would be an instance without a mask.
SHOW_CLASSES = ('FreshFlower', 'Garden', 'LadyBird', 'YellowFlower')
NO_FISH = ('lobster', 'shrimp')  # which lie in the folder of fish
FLAT = 0.5  # a cut-out is a drawing where more of its pixels equal their neighbour
LARGEST = 160  # side of the cut-outs that are kept, pixels


class Photos:
    """Cut-outs, each class as often as another, as :func:`scenes.draw_scene` takes them.

    Args:
        cutouts (list[list[np.ndarray]]): Of each class, float32 (H, W, 4) from
            0 to 1, RGB times alpha, and alpha.
        photographs (list[np.ndarray]): uint8 (H, W, 3), RGB.
    """

    def __init__(self, cutouts, photographs):
        self.cutouts, self.photographs = cutouts, photographs

    def background(self, rng, size):
        """A square part of a photograph, mirrored half of the time."""
        whole = self.photographs[rng.integers(len(self.photographs))]
        side = int(rng.uniform(size, min(whole.shape[:2])))
        y, x = (rng.integers(length - side + 1) for length in whole.shape[:2])
        part = cv2.resize(
            whole[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA
        )
        step = rng.choice([1, -1])
        return part[:, ::step].astype(np.float32) / 255

    def place(self, rng, size, length=(36, 72), turn=20):
        """A cut-out somewhere, mirrored half of the time.

        Args:
            rng (np.random.Generator): The only source of randomness.
            size (int): Side of the picture in pixels.
            length (tuple[float, float]): Range of its longer side in pixels.
            turn (float): Largest rotation to either side in degrees.
        """
        label = rng.integers(len(self.cutouts))
        cutout = self.cutouts[label][rng.integers(len(self.cutouts[label]))]
        cutout = cutout[:, :: rng.choice([1, -1])]
        height, width = cutout.shape[:2]
        long = rng.uniform(*length)
        centre = rng.uniform(long / 2, size - long / 2, 2)
        zoom = long / max(height, width)
        linear = zoom * turned(rng.uniform(-turn, turn))
        if zoom < 1:  # warpAffine would leave pixels out
            cutout = cv2.resize(cutout, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
        affine = linear if zoom >= 1 else linear / zoom
        middle = np.array(cutout.shape[1::-1]) / 2 - 0.5
        affine = np.concatenate([affine, (centre - affine @ middle)[:, None]], 1)
        drawn = cv2.warpAffine(np.ascontiguousarray(cutout), affine, (size, size))
        alpha = drawn[..., 3]
        pixels = drawn[..., :3] / np.maximum(alpha[..., None], 1e-6)
        return Sprite(int(label), alpha, linear, lambda image: pixels)

    def split(self):
        """``{'train': Photos, 'val': Photos}``, which share no picture.

        Every fourth cut-out of a class and every fourth photograph are for validation.
        """
        return {
            split: Photos([_part(c, split) for c in self.cutouts], _part(self.photographs, split))
            for split in ('train', 'val')
        }


def load_photos(cutouts=STAMPS, photographs=PHOTOGRAPHS):
    """Read cut-outs and photographs.

    Args:
        cutouts (Path): Tux Paint's stamps, of which drawings are left out, or a
            folder with one folder a class (see ``CLASSES``) of PNG files with
            an alpha channel.
        photographs (Path): JPEG or PNG files on which none of the classes is to be seen.

    Returns:
        ``{'train': Photos, 'val': Photos}``; see :meth:`Photos.split`.

    Raises:
        SystemExit: A folder is missing, or has too few files; says what is
            needed, and which command installs it.
    """
    return Photos(
        [list(pictures.values()) for pictures in read_classes(cutouts).values()],
        read_photographs(photographs),
    ).split()


def read_classes(folder=STAMPS):
    """The cut-outs of a folder as :func:`load_photos` takes it, by class and by file."""
    own = (folder / CLASSES[0]).is_dir()
    if not own and not (folder / FOLDERS[CLASSES[0]]).is_dir():
        lacks = (
            f'has neither the folder {CLASSES[0]} (your own) nor {FOLDERS[CLASSES[0]]} (Tux Paint)'
        )
        _lacking(f'{folder} {lacks if folder.is_dir() else "does not exist"}')
    classes = {}
    for name, inner in FOLDERS.items():
        files = sorted((folder / (name if own else inner)).rglob('*.png'))
        read = {file: read_cutout(file) for file in files if _is_photo_of_class(file)}
        classes[name] = {file: picture for file, picture in read.items() if picture is not None}
        _enough(classes[name], folder / (name if own else inner), 'PNG photos with alpha')
    return classes


def read_photographs(folder=PHOTOGRAPHS):
    """The photographs of a folder on which none of the classes is to be seen."""
    if not folder.is_dir():
        _lacking(f'{folder} does not exist')
    files = sorted(p for p in folder.glob('*.*') if p.suffix.lower() in ('.jpg', '.png'))
    scenes = [_read(file)[..., 2::-1] for file in files if file.stem not in SHOW_CLASSES]
    _enough(scenes, folder, 'photographs')
    return scenes


def read_cutout(file):
    """A cut-out, float32 (H, W, 4) of RGB times alpha, and alpha; None for a drawing.

    Drawings have areas of one colour. A file without alpha counts as one.
    """
    picture = _read(file)
    if picture.ndim != 3 or picture.shape[2] != 4:
        return None
    solid = picture[..., 3] > 200
    pairs = solid[:, 1:] & solid[:, :-1]
    equal = (picture[:, 1:, :3] == picture[:, :-1, :3]).all(2)
    if not pairs.any() or equal[pairs].mean() > FLAT:
        return None
    picture = picture[..., [2, 1, 0, 3]].astype(np.float32) / 255
    picture[..., :3] *= picture[..., 3:]
    rows, columns = (np.flatnonzero(picture[..., 3].any(axis)) for axis in (1, 0))
    picture = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    zoom = LARGEST / max(picture.shape)
    if zoom < 1:
        picture = cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
    return picture


def _is_photo_of_class(file):
    name = file.stem
    return not ('cartoon' in str(file) or name.endswith('_mirror') or name in NO_FISH)


def _read(file):
    picture = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    if picture is None:
        raise SystemExit(f'{file} is not a picture that OpenCV can read. Remove it.')
    return picture


def _part(items, split):
    return [item for i, item in enumerate(items) if (i % 4 == 2) == (split == 'val')]


def _enough(found, folder, what):
    if len(found) < 4:
        _lacking(f'There are {len(found)} {what} in {folder}, and at least 4 are needed')


def _lacking(fault):
    raise SystemExit(
        f'{fault}. On Debian and Ubuntu the pictures are in two packages:\n'
        '  apt-get install --no-install-recommends tuxpaint-stamps-default mate-backgrounds\n'
        'Elsewhere name folders with --cutouts and --photographs: cut-outs are PNG files with '
        f'an alpha channel in the folders {", ".join(CLASSES)}.'
    )
