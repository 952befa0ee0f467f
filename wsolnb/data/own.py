"""A user's own images: a folder for each class, or a CSV of labels; masks and boxes where there are any.

Masks and boxes are truth for evaluation. Both are optional. They lie beside the images:

    masks/             a PNG for an image, under the image's path: masks/cat/a.png belongs to cat/a.jpg
    boxes.csv          image,x0,y0,x1,y1[,label]: one line for each box, in pixels, half-open

Images are read as they are shown: an image that its EXIF orientation turns is turned, and mask and boxes are those of
the turned image.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from wsolnb.data.base import FolderDataset, decode, hold_out, number
from wsolnb.data.sample import IGNORE, Sample, tight_box
from wsolnb.errors import nearest

SPLITS = ("train", "val", "test")
PICTURES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"}
"""File name extensions of images, in lower case; files with others are no images and are passed over."""
UNREADABLE = {".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw", ".raw"}
"""Extensions of pictures that cannot be read here. Such a picture is an error, because it would be missed if it were
passed over."""
TURNED_ASIDE = {"thumbs.db", "desktop.ini", "__macosx"}
"""What operating systems leave in folders, besides hidden files."""

UNKNOWN = 128
"""Value of a mask file of a single-label data set that says: not known, not counted."""
MASK_REMEDY = (
    "save masks as grey PNG of the image's size: 0 background, 255 (or 1) object, 128 not counted; where images have "
    "several labels 0 background, 1 the first class by name, 2 the second, ..., 255 not counted"
)
KEEP_ONCE = "keep every image once; a CSV has several labels in one line: cat;dog"
BOXES_REMEDY = (
    "boxes.csv begins with the line image,x0,y0,x1,y1 and has one line for each box: the image as the data set calls "
    "it, left, top, right and bottom in pixels of the image as it is shown, the right and bottom edges not inside"
)


class Row(NamedTuple):
    """One listed image. name: relative, with `/`. split: '' where none is given. where: the place for messages."""

    name: str
    path: Path
    labels: tuple[str, ...]
    split: str
    where: str


HEAD = 1 << 16
"""Bytes of a file that are compared before the whole file is."""


def _twins(rows: Sequence[Row]) -> list[Row]:
    """Return two rows whose image files are equal byte for byte, or nothing. Only files of equal size are opened."""
    left = list(rows)
    for told in (lambda path: path.stat().st_size, partial(_digest, size=HEAD), _digest):
        alike: defaultdict[object, list[Row]] = defaultdict(list)
        for row in left:
            with contextlib.suppress(OSError):  # what cannot be read, and what is empty, is told by its reader
                if value := told(row.path):
                    alike[value].append(row)
        found = [group for group in alike.values() if len(group) > 1]
        left = [row for group in found for row in group]
    for group in found:
        with contextlib.suppress(Exception), Image.open(group[0].path):  # a web page in place of each is another fault
            return group[:2]
    return []


def _digest(path: Path, size: int = -1) -> bytes:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(size)).digest()


class OwnImages(FolderDataset):
    """What both readers share: splits, classes, and the optional truth."""

    upright = True
    image_remedy = "replace the file, save it anew as JPEG or PNG with 8 bits a channel, or remove it"

    def _take(self, rows: Sequence[Row], val_fraction: float, test_fraction: float, seed: int) -> None:
        """Set images, classes and truth of the split from all images of the data set."""
        self._check_distinct(rows)
        parts = {name: [row for row in rows if row.split == name] for name in SPLITS}
        self.class_names = tuple(sorted({label for row in parts["train"] for label in row.labels}))
        self.multi_label = any(len(row.labels) > 1 for row in rows)
        self._check_classes(parts)
        index = {name: position for position, name in enumerate(self.class_names)}
        labels = {row.name: tuple(sorted(index[label] for label in row.labels)) for row in rows}
        for name, fraction in (("test", test_fraction), ("val", val_fraction)):
            if not parts[name]:
                pool = parts["train"]
                kept, held = hold_out([labels[row.name] for row in pool], fraction, seed)
                parts["train"], parts[name] = [pool[i] for i in kept], [pool[i] for i in held]
        chosen = parts["train"] + parts["val"] if self.split == "trainval" else parts[self.split]
        if not chosen:
            problem = f"no image of {self.root} is left for the split {self.split!r}"
            raise self.problem(problem, f"give at least one class three images or more; {self.remedy}")
        self.image_ids = tuple(row.name for row in chosen)
        self.labels = tuple(labels[name] for name in self.image_ids)
        self._paths = tuple(row.path for row in chosen)
        self._masks = self._list_masks(rows)
        self._boxes = self._read_boxes(labels)
        self._check_copies(rows)

    def _check_distinct(self, rows: Sequence[Row]) -> None:
        seen: dict[str, Row] = {}
        for row in rows:
            for key in (row.name, os.path.realpath(row.path)):  # links: one image is in one class and one split
                other = seen.setdefault(key, row)
                if other is not row:
                    more = " with other labels" if set(other.labels) != set(row.labels) else ""
                    problem = f"{row.where}: {row.name!r} is listed a second time{more}, first at {other.where}"
                    raise self.problem(problem, KEEP_ONCE)

    def _check_copies(self, rows: Sequence[Row]) -> None:
        """Raise DataError for two equal files: one of them could be trained on and the other be scored."""
        if twins := _twins(rows):
            other, row = twins
            more = " with other labels" if set(other.labels) != set(row.labels) else ""
            problem = f"{row.where}: {row.name!r} is the same file as {other.name!r}, byte for byte{more}"
            raise self.problem(problem, KEEP_ONCE)

    def _check_classes(self, parts: Mapping[str, Sequence[Row]]) -> None:
        if not parts["train"]:
            raise self.problem(f"{self.root} has no image for training")
        for name in ("val", "test"):
            for row in parts[name]:
                for label in sorted(set(row.labels).difference(self.class_names)):
                    hint = nearest(label, self.class_names)
                    problem = f"{row.where}: the class {label!r} is in {name}, but train has no image of it{hint}"
                    raise self.problem(problem, "add images of it to train, or remove those")
        self._check_names()
        if len(self.class_names) < 2:
            problem = f"{self.root} has one class only: {self.class_names[0]!r}"
            raise self.problem(problem, f"a classifier needs two classes or more; {self.remedy}")

    def _check_names(self) -> None:
        """Raise DataError for classes that are one class, or several, written in another way."""
        folded: dict[str, str] = {}
        for name in self.class_names:
            if (other := folded.setdefault(name.casefold(), name)) != name and len(
                name
            ) > 1:  # but letters may be classes
                raise self.problem(
                    f"the classes {other!r} and {name!r} differ in capital letters only", "write them alike"
                )
        for name in self.class_names:
            parts = [part.strip() for part in re.split(r"[,|/+]", name)]
            if len(parts) > 1 and set(parts) <= set(self.class_names):
                problem = f"the class {name!r} is made of the classes {', '.join(map(repr, parts))}"
                raise self.problem(problem, f"write several labels of an image as {';'.join(parts)} in a CSV")

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self._paths[index]

    # ---------------------------------------------------------------------------------------------------- truth

    def _list_masks(self, rows: Sequence[Row]) -> dict[str, Path]:
        """Return the mask file of each image that has one, of all splits."""
        folder = self.root / "masks"
        if not folder.is_dir():
            return {}
        files = {}
        for name, path in self._pictures(folder):
            if path.suffix.lower() != ".png":
                raise self.problem(f"{path} is no PNG file", MASK_REMEDY)
            files[name[: -len(path.suffix)]] = path
        by_stem = Counter(_stem(row.name) for row in rows)
        found: dict[str, Path] = {}
        for row in rows:
            stem = _stem(row.name)
            if stem in files and by_stem[stem] > 1:
                problem = f"{files[stem]} could belong to {by_stem[stem]} images that are called {stem}"
                raise self.problem(problem, f"call the mask of {row.name} masks/{row.name}.png")
            mask = files.get(row.name, files.get(stem))
            if mask:
                found[row.name] = mask
        if files and not found:
            problem = f"no mask in {folder} belongs to an image: {next(iter(files.values()))} for one"
            raise self.problem(problem, f"call the mask of {rows[0].name} masks/{_stem(rows[0].name)}.png")
        return found

    def _read_boxes(self, labels: Mapping[str, tuple[int, ...]]) -> dict[str, list[tuple]]:
        """Return (class index, x0, y0, x1, y1) of every box, by image, of all splits."""
        path = self.root / "boxes.csv"
        found: dict[str, list[tuple]] = {}
        if not path.exists():
            return found
        corners = ("x0", "y0", "x1", "y1")
        for where, row in self._csv(path, ("image", *corners), ("label",), BOXES_REMEDY):
            name = self._inside(row["image"], where)
            if name not in labels:
                if (self.root / name).is_file():
                    continue  # of an image that the labels leave out
                problem = f"{where}: there is no image {name!r}{nearest(name, labels)}"
                raise self.problem(problem, f"write it as the data set does: {next(iter(labels))}")
            try:
                box = [number(row[corner]) for corner in corners]
            except ValueError as error:
                raise self.problem(f"{where}: {error}", f"write numbers as 12 or 3.5; {BOXES_REMEDY}") from error
            shown = ", ".join(f"{value:g}" for value in box)
            if min(box) >= -0.5 and max(box) <= 1.5:  # a little beyond the image, too
                problem = f"{where}: the box {shown} is in shares of the image's sides, from 0 to 1, not in pixels"
                raise self.problem(problem, "multiply x by the image's width and y by its height in pixels")
            if box[2] <= box[0] or box[3] <= box[1]:
                problem = f"{where}: the box {shown} of {name!r} ends before it begins"
                raise self.problem(problem, f"are these x, y, width, height, or swapped corners? {BOXES_REMEDY}")
            entry = (self._label_of_box(row, name, labels[name], where), *box)
            if entry in found.setdefault(name, []):
                raise self.problem(
                    f"{where}: the box {shown} of {name!r} is listed a second time", "keep every box once"
                )
            found[name].append(entry)
        return found

    def _label_of_box(self, row: Mapping[str, str], name: str, labels: tuple[int, ...], where: str) -> int:
        own, given = [self.class_names[label] for label in labels], _composed(row.get("label", ""))
        if given in own:
            return labels[own.index(given)]
        if given or len(own) > 1:
            what = f"the label {given!r}" if given else "no label"
            problem = f"{where}: the box has {what}, its image {name!r} has {', '.join(map(repr, own))}"
            raise self.problem(problem, "say in a column `label` which of the image's labels the box is of")
        return labels[0]

    def annotate(self, index: int, sample: Sample) -> None:
        """Add the mask and the boxes, where there are any.

        The boxes of an image that has a mask and no line in boxes.csv are the tight ones of its classes.
        """
        name = sample.image_id
        if name in self._masks:
            sample.mask = self._read_mask(self._masks[name], sample)
        if name in self._boxes:
            objects = np.array(self._boxes[name], np.float64)
            sample.boxes, sample.box_labels = objects[:, 1:], objects[:, 0].astype(np.int64)
            self._check_inside(index, sample)
        elif sample.mask is not None:
            regions = {label: sample.mask == (label + 1 if self.multi_label else 1) for label in sample.labels}
            seen = {label: tight_box(region) for label, region in regions.items() if region.any()}
            sample.boxes = np.array(list(seen.values())).reshape(-1, 4)
            sample.box_labels = np.array(list(seen), np.int64)

    def _check_inside(self, index: int, sample: Sample) -> None:
        height, width = sample.size
        for box in sample.boxes:
            # One pixel of room: some tools count the last pixel, others from 1.
            if box.min() < -1 or box[2] > width + 1 or box[3] > height + 1:
                shown = ", ".join(f"{value:g}" for value in box)
                problem = f"the box {shown} reaches out of {self.image_path(index)} ({width}x{height} as it is shown)"
                remedy = f"is it of another size of the image, or x, y, width, height? {BOXES_REMEDY}"
                raise self.problem(problem, remedy)

    def _read_mask(self, path: Path, sample: Sample) -> np.ndarray:
        """Return a mask file as a sample's mask (H, W) uint8."""
        values = decode(path, MASK_REMEDY, _levels)
        if values.ndim > 2:
            raise self.problem(f"{path} is in colour, where a mask has one value a pixel", MASK_REMEDY)
        if values.shape != sample.size:
            (height, width), (rows, columns) = sample.size, values.shape
            problem = f"{path} is {columns}x{rows}, its image {width}x{height} as it is shown"
            if (columns, rows) == sample.size:
                problem += "; the image may be turned by its EXIF orientation, and the mask not"
            raise self.problem(problem, MASK_REMEDY)
        if values.max() > 255 and not (values % 257).any():  # 16 bits: 65535 is white
            values = values // 257
        found = set(np.unique(values).tolist())
        if self.multi_label:
            self._check_class_values(path, found, sample)
            return values.astype(np.uint8)
        odd = sorted(found - {0, 1, UNKNOWN, 255})
        if len(odd) > 8:
            problem = f"{path} has {len(found)} levels of grey: its edges were smoothed, or it went through JPEG"
            raise self.problem(problem, MASK_REMEDY)
        if odd:
            raise self.problem(f"{path} holds the value {odd[0]}, which stands for nothing", MASK_REMEDY)
        if {1, 255} <= found:
            raise self.problem(f"{path} holds 1 and 255: which of them is the object is not clear", MASK_REMEDY)
        return np.select([values == UNKNOWN, values > 0], [IGNORE, 1], 0).astype(np.uint8)

    def _check_class_values(self, path: Path, found: set[int], sample: Sample) -> None:
        own = {label + 1 for label in sample.labels}
        if found == {0, IGNORE} or found == {IGNORE}:
            problem = f"{path} says object or not (0 and 255), in a data set of several labels an image"
            raise self.problem(problem, MASK_REMEDY)
        for value in sorted(found - {0, IGNORE} - own):
            known = 0 < value <= len(self.class_names)
            what = f"the class {self.class_names[value - 1]!r}" if known else "nothing"
            names = ", ".join(f"{label + 1} {self.class_names[label]}" for label in sample.labels)
            raise self.problem(f"{path} holds {value}, which is {what}; the image is labelled {names}", MASK_REMEDY)

    # ---------------------------------------------------------------------------------------------------- files

    def _pictures(self, folder: Path) -> Iterator[tuple[str, Path]]:
        """Yield the images below a folder, as (path from there, file), sorted by that path; links are followed."""
        found, above = [], {os.path.realpath(folder)}
        for place, folders, files in os.walk(folder, followlinks=True):
            known = [os.path.realpath(os.path.join(place, name)) for name in folders]
            kept = [n for n, real in zip(folders, known, strict=True) if _visible(n) and real not in above]
            above.update(os.path.realpath(os.path.join(place, name)) for name in kept)
            folders[:] = kept
            for name in filter(_visible, files):
                path = Path(place, name)
                if path.suffix.lower() in UNREADABLE:
                    problem = f"{path} is of a format that is not read"
                    raise self.problem(problem, "convert it to JPEG or PNG, or remove it")
                if path.suffix.lower() in PICTURES:
                    self._check_link(path)
                    found.append((_composed(path.relative_to(folder).as_posix()), path))
        yield from sorted(found)

    def _check_link(self, path: Path) -> None:
        if not path.exists():
            problem = f"{path} is a link to {os.readlink(path)}, which does not exist"
            raise self.problem(problem, "bring the file back, or remove the link")

    def _inside(self, name: str, where: str) -> str:
        """Return a listed path in one form; DataError for one that is absolute or leads out of the folder."""
        given = name.replace("\\", "/")
        if PurePosixPath(given).is_absolute() or re.match(r"[A-Za-z]:/", given):
            remedy = f"write paths as they are seen from {self.root}"
            raise self.problem(f"{where}: {name!r} is an absolute path", remedy)
        plain = posixpath.normpath(given)
        if plain.split("/")[0] == "..":
            remedy = "move the images there, or link to them there"
            raise self.problem(f"{where}: {name!r} leads out of {self.root}", remedy)
        return _composed(plain)

    def _csv(
        self, path: Path, needed: Sequence[str], optional: Sequence[str], remedy: str
    ) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield (place for messages, fields by column) of a CSV's lines; separated by comma, semicolon or tab."""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.problem(f"{path} is no UTF-8 text", "save it as `CSV UTF-8`") from error
        except OSError as error:
            raise self.problem(f"cannot read {path}: {error.strerror}", remedy) from error
        if "\0" in text:
            raise self.problem(f"{path} is no text: it holds zero bytes", "save it as `CSV UTF-8`")
        head = next((line for line in text.splitlines() if line.strip()), "")
        separator = max(",;\t", key=head.count)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        names: list[str] = []
        empty = True
        try:
            for fields in lines:
                where = f"{path}, line {lines.line_num}"
                fields = [field.strip() for field in fields]
                if not any(fields):
                    continue
                if not names:
                    names = [field.casefold() for field in fields]
                    self._check_header(where, names, needed, optional, remedy)
                    continue
                if len(fields) != len(names):
                    count = f"{len(fields)} field{'s' * (len(fields) != 1)}"
                    problem = f"{where}: {count}, the header has {len(names)}: {separator.join(fields)}"
                    raise self.problem(problem, 'a field that holds the separator is put into quotes: "cat;dog"')
                empty = False
                yield where, dict(zip(names, fields, strict=True))
        except csv.Error as error:
            raise self.problem(f"{path}, line {lines.line_num}: {error}", remedy) from error
        if empty:
            raise self.problem(f"empty: {path}", remedy)

    def _check_header(
        self, where: str, names: Sequence[str], needed: Sequence[str], optional: Sequence[str], remedy: str
    ) -> None:
        for name in needed:
            if name not in names:
                shown = ", ".join(map(repr, names))
                raise self.problem(f"{where}: the header has no column {name!r}, only {shown}", remedy)
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise self.problem(f"{where}: the header has the column {twice[0]!r} twice", remedy)
        for name in set(names).difference(needed, optional):
            if hint := nearest(name, set(optional).difference(names)):
                raise self.problem(f"{where}: the header has an unknown column {name!r}{hint}", remedy)


class ImageFolder(OwnImages):
    """Single-label images in a folder for each class.

    root: holds `CLASS/...`, or `train/CLASS/...` and, where there are such, `val/CLASS/...` and `test/CLASS/...`.
        Subfolders of a class are read too. May hold `masks/` and `boxes.csv`; both call an image by its path from here.
    split: `train`, `val`, `test` or `trainval`. A part that the root does not have is held out of train by `hold_out`
        with `seed`: first `test_fraction` of every class for test, then `val_fraction` of the rest for val. A class
        with two images gives one to test only, and a class with one image gives none.

    Classes are the folders of train, sorted by name. Files that are hidden or no images are passed over. Image ids are
    paths from the root, with `/`.
    Mask: 1 object, 0 background, 255 not counted. Boxes: those of boxes.csv, else the tight one of the mask.

    Raises DataError for missing, damaged or inconsistent files, ParameterError for an unknown split.
    """

    name = "folder"
    remedy = (
        "give a folder with one subfolder of images for each class (cat/, dog/), or with train/, val/ and test/ that "
        "hold such subfolders; masks/ and boxes.csv beside them are optional"
    )

    def __init__(
        self, root: str | Path, split: str, val_fraction: float = 0.2, test_fraction: float = 0.2, seed: int = 0
    ):
        self.open(root, split, ".")
        folders = self._folders(self.root)
        # A folder `train` without folders is a class of that name.
        parts = {name.casefold(): path for name, path in folders.items() if name.casefold() in SPLITS and _nested(path)}
        if not folders:
            raise self.problem(f"missing: {self.root / 'CLASS'}, a folder of images for each class")
        if not parts:
            rows = self._of_classes(folders, "train", "")
            if rows and all(row.name.count("/") > 1 for row in rows):
                problem = f"the folders of {self.root} hold folders: {', '.join(folders)}"
                raise self.problem(
                    problem, f"call parts train, val and test, or give one of these folders; {self.remedy}"
                )
        elif "train" not in parts:
            raise self.problem(f"{self.root} has {', '.join(sorted(parts))} but no train")
        else:
            self._check_beside(folders, set(parts.values()))
            rows = [r for n, path in parts.items() for r in self._of_classes(self._folders(path), n, f"{path.name}/")]
        self._take(rows, val_fraction, test_fraction, seed)

    def _folders(self, folder: Path) -> dict[str, Path]:
        """Return the subfolders that are not hidden, by name, without the mirror tree of the masks.

        Raises DataError for an image between them: it has no class.
        """
        found: dict[str, Path] = {}
        for path in sorted(filter(lambda path: _visible(path.name), folder.iterdir())):
            self._check_link(path)
            if not path.is_dir():
                if path.suffix.lower() in PICTURES:
                    raise self.problem(f"{path} lies in the folder of no class")
            elif path != self.root / "masks":
                other = found.setdefault(_composed(path.name), path)
                if other != path:
                    problem = f"{str(other)!r} and {str(path)!r} differ by blanks or by the coding of letters only"
                    raise self.problem(problem, "put the images into one of them")
        return found

    def _check_beside(self, folders: Mapping[str, Path], parts: Collection[Path]) -> None:
        """Raise DataError for images beside train, val and test, which would be missed."""
        for name, folder in folders.items():
            missed = None if folder in parts else next(self._pictures(folder), None)
            if missed:
                usual = {"valid": "val", "validation": "val", "dev": "val", "testing": "test"}.get(name.casefold())
                hint = f" (did you mean {usual!r}?)" if usual else ""
                problem = f"{missed[1]} is in no class of train, val or test{hint}"
                raise self.problem(problem, "call the parts train, val and test, and move other images away")

    def _of_classes(self, folders: Mapping[str, Path], split: str, before: str) -> list[Row]:
        rows = []
        for label, folder in folders.items():
            images = list(self._pictures(folder))
            if not images and split == "train":
                held = sorted(path.name for path in folder.iterdir())[:3]
                what = f"it holds {', '.join(held)}" if held else "it is empty"
                problem = f"no image of the class {label!r} in {folder}: {what}"
                raise self.problem(problem, f"add images ({', '.join(sorted(PICTURES)[:6])}, ...) or remove the folder")
            rows += [Row(f"{before}{label}/{name}", path, (label,), split, str(path)) for name, path in images]
        return rows


class LabelTable(OwnImages):
    """Images with one label or several, listed in a CSV.

    root: a CSV with the columns `image,label[,split]`, or a folder that holds it as `labels.csv`. Images are given by
        their path from the CSV's folder, or from `images/` there. Separators are commas, semicolons or tabs. Several
        labels of an image stand in one field, separated by `;` (in quotes where `;` separates the columns): then the
        data set is multi-label. May lie beside `masks/` and `boxes.csv`.
    split: `train`, `val`, `test` or `trainval`. Without the column `split` all images are `train`, and a part that no
        line names is held out of train by `hold_out` with `seed`: first `test_fraction` of every class (an image's
        first one) for test, then `val_fraction` of the rest for val.

    Classes are the labels of train, sorted by name; blanks around them do not count. Image ids are the listed paths.
    Mask: of a multi-label data set 0 background, class index + 1, 255 not counted; else 1 object, 0 background, 255 not
    counted. Boxes: those of boxes.csv, else the tight ones of the classes in the mask.

    Raises DataError for missing, damaged or inconsistent files, ParameterError for an unknown split.
    """

    name = "csv"
    remedy = (
        "give a CSV that begins with the line image,label or image,label,split (or a folder that holds it as "
        "labels.csv) and has one line for each image: its path from the CSV's folder, its label (several as cat;dog), "
        "and train, val or test"
    )

    def __init__(
        self, root: str | Path, split: str, val_fraction: float = 0.2, test_fraction: float = 0.2, seed: int = 0
    ):
        table = Path(root)
        if not table.is_file():
            self.open(root, split, ".")
            table = self.root / "labels.csv"
            if not table.exists():
                others = sorted(p.name for p in self.root.glob("*.csv") if p.name != "boxes.csv")
                hint = f"; there is {others[0]}, which can be given itself" if others else ""
                raise self.problem(f"missing: {table}{hint}")
        self.open(table.parent, split, ".")
        self._table = table.name
        rows = [self._row(*line) for line in self._csv(table, ("image", "label"), ("split",), self.remedy)]
        self._take(rows, val_fraction, test_fraction, seed)

    def _row(self, where: str, fields: Mapping[str, str]) -> Row:
        name = self._inside(fields["image"], where) if fields["image"] else ""
        labels = [_composed(label) for label in fields["label"].split(";")]
        if not name or not all(labels):
            raise self.problem(f"{where}: no {'label' if name else 'image'}")
        split = fields.get("split", "train").casefold()
        check = f"{where}: the image is in no split, but in"
        if split not in SPLITS:
            raise self.problem(f"{check} {split!r}{nearest(split, SPLITS)}", "write train, val or test")
        return Row(name, self._find(name, where), tuple(dict.fromkeys(labels)), split, where)

    def _find(self, name: str, where: str) -> Path:
        # File systems differ in how they code an accented letter: as one character, or as two.
        forms = dict.fromkeys((name, unicodedata.normalize("NFD", name)))
        for folder in (self.root, self.root / "images"):
            for form in forms:
                if (folder / form).is_file():
                    return folder / form
        path = self.root / name
        raise self.problem(f"{where}: {'no file but a folder' if path.is_dir() else 'missing'}: {path}")


def _visible(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in TURNED_ASIDE


def _nested(folder: Path) -> bool:
    return any(path.is_dir() and _visible(path.name) for path in folder.iterdir())


def _composed(text: str) -> str:
    """Return a name or a path without blanks around its parts, its accented letters as single characters."""
    return "/".join(part.strip() for part in unicodedata.normalize("NFC", text).split("/"))


def _stem(name: str) -> str:
    """Return the path without its extension."""
    return name.removesuffix(PurePosixPath(name).suffix)


def _levels(image: Image.Image) -> Image.Image | np.ndarray:
    """Return the stored values of a mask file, (H, W); (H, W, 3) where it is in colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "P":
        # Palette indices, unless the palette is black and white in whichever order: then what is shown.
        shown = np.asarray(image.convert("RGB"))
        return shown[..., 0] if np.isin(np.unique(shown.reshape(-1, 3).sum(axis=1)), (0, 765)).all() else image
    if image.mode == "L" or image.mode.startswith("I"):
        return image
    colours = np.asarray(image.convert("RGB"))
    return colours[..., 0] if (colours == colours[..., :1]).all() else colours
