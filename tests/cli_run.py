"""What the tests of the command line look at: pictures that it wrote, and what was made."""

from pathlib import Path

import numpy as np
from PIL import Image

from varkern import images


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def expected(made):
    return images.to_uint8(made)[..., 0]


def made_files(folder):
    """Contents of a folder's pictures, by name in order."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.png"))}
