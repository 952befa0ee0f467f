"""A few photographs that come with an installed library: to look at, not to measure on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from timm.data import ImageNetInfo

from wsolnb.data.base import FolderDataset
from wsolnb.data.sample import Sample


class Shown(NamedTuple):
    """A photograph. file: in `skimage/data`. label: the class of ImageNet that is looked for. credit: who made it."""

    file: str
    label: int
    credit: str


SHOWN = {
    "cat": Shown("chelsea.png", 285, "Chelsea, by Stéfan van der Walt, CC0"),
    "coffee": Shown("coffee.png", 967, "by Rachel Michetti, CC0, courtesy of Pikolo Espresso Bar"),
    "motorcycle": Shown("motorcycle_left.png", 665, "Middlebury 2014 stereo benchmark, by Nera Nesic and others"),
    "rocket": Shown("rocket.jpg", 657, "launch of DSCOVR on Falcon 9, SpaceX, public domain"),
}


class Photographs(FolderDataset):
    """Photographs of scikit-image, each with one class of ImageNet-1k, and no box or mask: nobody has drawn any.

    `class_names` are the 1,000 of ImageNet. names: which of `SHOWN`, in which order; default all.
    """

    name = "photographs"
    remedy = "install scikit-image again: pip install --force-reinstall --no-deps scikit-image"
    multi_label = True
    split = "test"

    def __init__(self, names: tuple[str, ...] = tuple(SHOWN)):
        self.image_ids, self.labels = names, tuple((SHOWN[name].label,) for name in names)
        self.class_names = tuple(ImageNetInfo().label_descriptions())
        self.root = Path(find_spec("skimage").origin).parent / "data"

    def sources(self) -> list[Path]:
        """Return the files of the photographs."""
        return [self.image_path(index) for index in range(len(self))]

    def image_path(self, index: int) -> Path:
        """Return the file of photograph `index`."""
        return self.root / SHOWN[self.image_ids[index]].file

    def annotate(self, index: int, sample: Sample) -> None:
        """Add nothing: boxes and masks of these photographs are not known."""
