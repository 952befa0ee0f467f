"""The command `wsolnb localize`: which network it asks, and the files that it writes.

    maps/NAME.npz            `maps` (K, H, W) float16 in [0, 1] and `classes` (K,) of the network (`wsolnb.data.store`)
    masks/NAME.png           palette indices in VOC's colours: 0 background, else an index of classes.txt
    voc/NAME.xml             boxes as Pascal VOC writes them: counted from 1, both corners inside
    coco/instances.json      images, categories and boxes `x, y, width, height`; the mask inside each box as run lengths
    coco/results.json        the same boxes with the probability of their class, for `loadRes` of pycocotools
    classes.txt              index in the masks (and COCO's category), class of the network, name; separated by tabs
    contact_sheet.png        image, map, box and mask side by side; from the eleventh row on contact_sheet_2.png, ...

The files of an image are written before the next image is looked at. The files of all images are written at the end,
however the command ends.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np

from wsolnb.backbones import load_classifier
from wsolnb.data.exports import CocoFiles, palette_png, voc_xml
from wsolnb.data.pictures import find_images, unique_names
from wsolnb.data.sample import IGNORE
from wsolnb.data.store import ClassMaps, Store
from wsolnb.errors import DataError, ParameterError, RunError, WsolnbError, check_choice
from wsolnb.files import FULL, to_json, write_atomically
from wsolnb.localization import Localized, localize
from wsolnb.methods import methods
from wsolnb.methods.base import LocalizationModel
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.grad_cam import GradCAM
from wsolnb.notebook import viz
from wsolnb.train.loop import pick_device
from wsolnb.train.recipe import RECORD, load_trained

OF_ANY_CLASSIFIER = ("cam", "layercam", "grad_cam", "lpcam")
"""The maps that a published convolutional network draws without any training."""

BACKBONE = "efficientnet_lite0"
"""The default network; its weights came with the installation."""

ROWS, SIDE = 10, 320
"""Rows of a contact sheet, and the longer side of its pictures in pixels."""

Say = Callable[[str], None]


def open_model(
    method: str, backbone: str, checkpoint: str, layer: str, class_names: Sequence[str], warn: Say
) -> tuple[LocalizationModel, str, int | None]:
    """Return a model, the name of its map, and the side of the images that it was trained on (None: any side).

    method, backbone, checkpoint, layer: of the command; empty where they were not given. class_names: of a checkpoint
    of another program. warn: is told which tensors of such a checkpoint were left out.
    Raises ParameterError for what does not fit together, WeightsError for weights that are missing or do not fit.
    """
    size, trained = None, bool(checkpoint) and (Path(checkpoint).parent / RECORD).is_file()
    if trained or (checkpoint and method and method not in OF_ANY_CLASSIFIER):
        model, recipe = load_trained(checkpoint)
        if not isinstance(model, LocalizationModel):
            problem = f"{checkpoint} is of the method {recipe.method!r}, which draws no map of a class"
            raise ParameterError(problem, "give the checkpoint of a classifier or of a map decoder")
        if backbone and backbone != recipe.backbone:
            raise ParameterError(f"{checkpoint} is of {recipe.backbone!r}, not {backbone!r}", "leave --backbone out")
        size = recipe.map_size
        method = model.maps[0] if method in ("", recipe.method) else method
    elif checkpoint:
        if not backbone:
            problem = f"{checkpoint} does not say what network it is of"
            raise ParameterError(problem, "name it by --backbone, such as resnet50 or another network of timm")
        network, left_out = load_classifier(backbone, checkpoint)
        if left_out:
            shown = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
            warn(f"left out of {checkpoint}: {len(left_out)} tensors that {backbone} has no place for: {shown}")
        model = CAMClassifier.of(network, class_names)
        if model.classifier.bias is None:
            warn(f"{checkpoint} has no bias of the classifier: none is used")
    else:
        method = method or "cam"
        if method not in OF_ANY_CLASSIFIER and method in methods():
            problem = f"{method} has to be trained, and no checkpoint was given"
            remedy = "train one (`wsolnb reproduce`) and give --checkpoint FOLDER/last.safetensors of a folder with "
            remedy += f"{RECORD} in outputs/mini/checkpoints; or use one of {', '.join(OF_ANY_CLASSIFIER)}"
            raise ParameterError(problem, remedy)
        check_choice("no method", method, OF_ANY_CLASSIFIER)
        model = CAMClassifier.published(backbone or BACKBONE)
    if class_names and (trained or not checkpoint):
        raise ParameterError("names of classes for a model that knows its own", "leave --names out")
    method = method or "cam"
    if layer and method != "grad_cam":
        raise ParameterError(f"--layer {layer!r} for the method {method!r}", "use --method grad_cam, or leave it out")
    if method == "grad_cam" and isinstance(model, CAMClassifier):
        model = GradCAM.over(model, layer)
    return model, method, size


def read_names(path: str) -> list[str]:
    """Return the lines of a text file, the names of a network's classes in their order.

    Raises DataError for a file that is missing, empty or no text.
    """
    try:
        names = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "give a text file with one name of a class per line") from error
    if not names:
        raise DataError(f"empty: {path}", "give a text file with one name of a class per line")
    return names


def claim_folder(folder: Path, overwrite: bool) -> None:
    """Make the output folder; RunError where it cannot be written, or holds files that are not to be replaced."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = next(folder.iterdir(), None)
    except OSError as error:
        problem = f"the folder {folder} cannot be made: {error.strerror or error}"
        raise RunError(problem, "name another folder by --out") from error
    if taken and not overwrite:
        remedy = "name another folder by --out, or give --overwrite: files of the same names are replaced"
        raise RunError(f"the folder {folder} is not empty: it holds {taken.name}", remedy)
    probe = folder / ".writable"
    write_atomically(probe, "")
    probe.unlink()


def thumbnail(found: Localized) -> Localized:
    """Return a result at the size of a contact sheet's pictures; boxes are scaled, no longer whole pixels."""
    height, width = found.mask.shape
    scale = min(1, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    factors = np.array([size[0] / width, size[1] / height] * 2)
    return found._replace(
        image=cv2.resize(found.image, size, interpolation=cv2.INTER_AREA),
        maps=np.stack([cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in found.maps]),
        mask=cv2.resize(found.mask, size, interpolation=cv2.INTER_NEAREST),
        boxes=tuple(box * factors for box in found.boxes),
    )


class Writer:
    """The files of one call of the command; see the module."""

    def __init__(self, folder: Path):
        self.folder, self.coco, self.store = folder, CocoFiles(), Store(folder / "maps")
        self.indices: dict[int, int] = {}
        self.names: dict[int, str] = {}
        self.rows: list[viz.SheetRow] = []
        self.pages = 0

    def add(self, found: Localized, name: str) -> None:
        """Write the map, the mask and the boxes of an image under a name of its own.

        Raises RunError where a file cannot be written, or a palette has no more colours for another class.
        """
        self.store.write_maps(ClassMaps(name, found.classes, found.maps))
        for index, label in zip(found.classes, found.names, strict=True):
            self.indices.setdefault(index, len(self.indices) + 1)
            self.names[self.indices[index]] = label
        path, own = Path(found.name), [self.indices[index] for index in found.classes]
        objects = [(n, box) for n, boxes in zip(found.names, found.boxes, strict=True) for box in boxes.tolist()]
        write_atomically(self.folder / "voc" / f"{name}.xml", voc_xml(path, found.mask.shape, objects), lasting=False)
        image = self.coco.add(path.as_posix(), found.mask.shape)
        for place, (number, boxes) in enumerate(zip(own, found.boxes, strict=True)):
            for box in boxes:
                x0, y0, x1, y1 = box
                inside = np.zeros_like(found.mask, dtype=bool)
                inside[y0:y1, x0:x1] = found.mask[y0:y1, x0:x1] == place + 1
                self.coco.add_object(image, number, box, inside, found.probabilities[place])
        small = thumbnail(found)
        self.rows += [viz.SheetRow(name, small, place, number) for place, number in enumerate(own)]
        if max(own) >= IGNORE:
            problem = f"the mask of {found.name}: class {max(own)} of this folder has no colour, a palette ends at 254"
            raise RunError(problem, "ask for fewer classes by --class, or for fewer images")
        values = np.array([0, *own], np.uint8)
        write_atomically(self.folder / "masks" / f"{name}.png", palette_png(values[found.mask]), lasting=False)
        while len(self.rows) >= ROWS:  # a page at a time: memory does not grow with the number of images
            self._draw()

    def finish(self) -> None:
        """Write what is about all images: classes, COCO's files, the last contact sheet."""
        of_index = {number: index for index, number in self.indices.items()}
        lines = ["index\tclass\tname", "0\t\tbackground"]
        lines += [f"{number}\t{of_index[number]}\t{name}" for number, name in self.names.items()]
        write_atomically(self.folder / "classes.txt", "\n".join(lines) + "\n")
        write_atomically(self.folder / "coco" / "instances.json", to_json(self.coco.instances(self.names)))
        write_atomically(self.folder / "coco" / "results.json", to_json(self.coco.results))
        if self.rows:
            self._draw()

    def _draw(self) -> None:
        """Draw the first rows that are not drawn yet as the next page, and forget them."""
        file, rows = io.BytesIO(), self.rows[:ROWS]
        figure = viz.results_sheet(rows)
        figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
        self.pages, self.rows = self.pages + 1, self.rows[ROWS:]
        name = "contact_sheet.png" if self.pages == 1 else f"contact_sheet_{self.pages}.png"
        write_atomically(self.folder / name, file.getvalue())


def run(
    paths: Sequence[str | Path], out: Path, *, method: str = "", backbone: str = "", checkpoint: str = "",
    layer: str = "", classes: Sequence[str] = (), names: str = "", threshold: float | None = None,
    image_size: int | None = None, device: str = "auto", overwrite: bool = False, say: Say, warn: Say,
) -> int:  # fmt: skip
    """Localize in images and folders of images, and write everything to a folder; returns how many were left out.

    say, warn: are given one line for an image, and what went wrong. The other arguments are those of the command.
    Raises what `open_model`, `claim_folder`, `find_images` and `localize` raise.
    """
    found = find_images(paths, without=out)
    claim_folder(out, overwrite)  # before the network is made, which takes seconds
    model, method, trained_size = open_model(
        method, backbone, checkpoint, layer, read_names(names) if names else (), warn
    )
    model.to(pick_device(device))
    failures: list[str] = []

    def fail(error: WsolnbError) -> None:
        failures.append(error.problem)
        warn(f"left out: {error.problem}")

    options = {"method": method, "classes": classes or None, "threshold": threshold, "skipped": fail}
    looked = localize(found.files, model, image_size=image_size or trained_size, **options)
    for folder in found.empty:
        fail(DataError(f"no image in the folder {folder}"))
    if found.passed:
        shown = ", ".join(path.name for path in found.passed[:3]) + (", ..." if len(found.passed) > 3 else "")
        warn(f"passed over {len(found.passed)} files in folders, no images by their names: {shown}")
    called = dict(zip(map(str, found.files), unique_names(found.files), strict=True))
    writer = Writer(out)
    try:
        for one in looked:
            try:
                writer.add(one, called[one.name])
            except WsolnbError as error:
                if getattr(error.__cause__, "errno", None) in FULL:  # the next image would fare no better
                    raise
                fail(error)
            for name, probability, boxes in zip(one.names, one.probabilities, one.boxes, strict=True):
                box = " ".join(map(str, boxes[0])) if len(boxes) else "none"
                likely = f"  {probability:.2f}" if model.classifies else ""
                say(f"{one.name}  {name}{likely}  box {box}")
    finally:
        writer.finish()
    return len(failures)
