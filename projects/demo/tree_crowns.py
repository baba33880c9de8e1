"""Aerial photographs with boxes around trees, drawn by hand, which deepforest's package carries."""

import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from material import checked

COMMAND = 'pip install --no-deps deepforest==2.1.0  # 21 MB, MIT'
# Of each photograph (PNG) and its boxes (XML).
FILES = {
    '2019_YELL_2_528000_4978000_image_crop2': (
        'a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767',
        'bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11',
    ),
    '2019_YELL_2_541000_4977000_image_crop': (
        '178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131',
        'cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631',
    ),
    'OSBS_029': (
        'd9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee',
        '1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c',
    ),
    'SOAP_061': (
        '256508f1a62149bec4a80879077a865caf50e8cace095e6564c76befa480d424',
        '4833280af75fd9c47965a93e38945282835e9e725cac412bdb9469d63480947c',
    ),
}
BIG, TEST, OSBS, SOAP = FILES
KEYS = 'xmin', 'ymin', 'xmax', 'ymax'


def tree_crowns(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A photograph, uint8 (H, W, 3) in RGB, and its boxes, (N, 4) of x1, y1, x2, y2 in pixels.

    Args:
        name: Of :data:`FILES`.

    Raises:
        SystemExit: The file is missing or another one; says which command installs it.
    """
    package = find_spec('deepforest')
    folder = Path(package.origin).parent if package else Path('site-packages/deepforest')
    image, boxes = (
        checked(folder / 'data' / f'{name}.{kind}', sha256, COMMAND)
        for kind, sha256 in zip(('png', 'xml'), FILES[name], strict=True)
    )
    found = ElementTree.parse(boxes).getroot().iter('bndbox')
    corners = [[float(box.findtext(key)) for key in KEYS] for box in found]
    return cv2.imread(str(image))[..., ::-1], np.array(corners)
