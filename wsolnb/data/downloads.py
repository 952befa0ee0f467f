"""Data sets from their official addresses: a folder is there whole, or not at all.

Files are fetched into `<root>/.downloads` and checked against their published hash; an interrupted download is resumed
there. Files are unpacked into a hidden folder beside the data set's own folder, and this hidden folder is renamed when
all is done.
"""

from __future__ import annotations

import fcntl
import gzip
import shutil
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urljoin

import numpy as np
import pooch
import requests
import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict
from scipy.io import loadmat
from tqdm.auto import tqdm

from wsolnb.data.base import LocalizationDataset, save_picture
from wsolnb.data.readers import open_dataset
from wsolnb.errors import DataError, check_choice
from wsolnb.files import inside

TIMEOUT = 30
"""Seconds that a server may be silent."""
FAILURES = 5
"""A download is given up after this many attempts in a row that bring no further byte."""
WAIT = 1.0
"""Seconds before the second attempt; doubled before each further one, up to a minute."""
UNPACKED = 1.25
"""Size of an archive's contents divided by its own, where only its own is known. Photographs hardly shrink in an
archive."""


# --------------------------------------------------------------------------------------------------------- catalogue


class Source(BaseModel):
    """An archive of a data set.

    url: its address, https only unless `http`; of a file `by_hand`, which nobody may pass on, the page to ask at.
    name: of the file, default the end of the address. size: bytes; hash: `<algorithm>:<digest>`; None: not published.
    take: folder or file in the archive -> its place in the data set's folder; all else stays packed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    take: dict[str, str]
    name: str = ""
    size: int | None = None
    hash: str | None = None
    by_hand: bool = False
    http: bool = False

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.name or self.url.rpartition("/")[2]


class Split(BaseModel):
    """A split as published: number of images; the reader's name of it and further options, where they differ."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    split: str | None = None
    options: dict[str, Any] = {}


class Record(BaseModel):
    """What is known of a data set.

    page: of its publisher. reader: its name in `readers.DATASETS`; options: for the reader, `{root}` is the folder.
    folder: below the root that all data sets share, as the profile (a folder of params/, if one uses it) has it.
    terms: what its user accepts. classes, splits: the published numbers of classes, and of images per split. truths:
    how many images of a split have their boxes and masks checked, unless every image is decoded; None: all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    page: str
    reader: str
    folder: str
    licence: str
    terms: str
    classes: int
    splits: dict[str, Split]
    files: tuple[Source, ...]
    profile: str = ""
    options: dict[str, Any] = {}
    truths: int | None = None

    @property
    def size(self) -> str:
        """Size of the download, in words."""
        known = [source.size for source in self.files if source.size]
        least = "" if len(known) == len(self.files) else "over "
        return f"{least}{in_words(sum(known))}" if known else "not published"

    def locate(self, root: Path) -> Path:
        """Return the data set's folder: `root` itself, or the one that `download` makes in it."""
        return root / self.folder if (root / self.folder).is_dir() else root

    def open(self, folder: Path, split: str) -> LocalizationDataset:
        """Open a split, one of `splits`, with the reader; raises as `open_dataset`."""
        published = self.splits[split]
        options = {**self.options, **published.options}
        options = {k: v.format(root=folder) if isinstance(v, str) else v for k, v in options.items()}
        return open_dataset(self.reader, folder, published.split or split, **options)


@cache
def catalogue() -> dict[str, Record]:
    """Return the known data sets by name."""
    content = yaml.safe_load(Path(__file__).with_name("catalogue.yaml").read_text(encoding="utf-8"))
    return {name: Record(**fields) for name, fields in content.items()}


def get_record(name: str) -> Record:
    """Return the record of a data set; ParameterError for an unknown name, with the nearest one."""
    check_choice("no data set", name, catalogue())
    return catalogue()[name]


def in_words(size: float) -> str:
    """Return a number of bytes as text, such as `1.2 GB`."""
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB")
    return f"{size / unit:.1f} {name}"


# ---------------------------------------------------------------------------------------------------------- download


def download(name: str, root: Path, say: Callable[[str], None] = print) -> Path:
    """Fetch and unpack a data set, and return its folder; a folder that is there already is left as it is.

    root: folder of all data sets. say: told what is done.
    Raises ParameterError for an unknown name; DataError, which names the file, when a file cannot be fetched, differs
    from what was published or does not fit on the disk. The next call goes on from what is there.
    """
    record, store = get_record(name), root / ".downloads"
    target = root / record.folder
    if target.exists():
        say(f"{target} is there: nothing done. `wsolnb data check {name} {target}` says whether it is whole.")
        return target
    say(f"{record.title}, {record.size}, {record.page}\nLicence: {record.licence}. {record.terms}")
    try:
        with _alone(store):
            _ask_for(record, name, store)
            require_space(root, sum(_space(source, store) for source in record.files), record.title)
            archives = [fetch(source, store, say) for source in record.files]
            hidden = target.with_name(f".{target.name}.unpacking")
            try:
                shutil.rmtree(hidden, ignore_errors=True)
                for source, archive in zip(record.files, archives, strict=True):
                    say(f"unpacking {archive.name}")
                    unpack(archive, hidden, source.take)
                if (hidden / "sbd").is_dir():
                    add_train_aug(hidden)
                hidden.replace(target)
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
            for source, archive in zip(record.files, archives, strict=True):
                if not source.by_hand:
                    archive.unlink()
    except OSError as error:
        remedy = f"free space there, or choose another --root; the next call goes on from what {store} holds"
        raise DataError(f"cannot write to {root}: {error}", remedy) from error
    say(f"{target} is there")
    return target


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _part(store: Path, source: Source) -> Path:
    return store / f"{source.file}.part"


def _space(source: Source, store: Path) -> float:
    """Return the bytes that a source will take beyond what is there of it, as far as its size is known."""
    size, there = source.size or 0, _size(store / source.file) or _size(_part(store, source))
    return max(0, size - there) + UNPACKED * size


def require_space(folder: Path, size: float, what: str) -> None:
    """Raise DataError when the disk of `folder` has less than `size` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        problem = f"{what} needs {in_words(size)}, and {in_words(free)} are free in {folder}"
        raise DataError(problem, "free space there, or choose another --root")


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Keep a second process out of a folder of downloads; the lock goes with the process, however it ends."""
    store.mkdir(parents=True, exist_ok=True)
    with (store / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process downloads to {store}", "wait for it, or stop it") from error
        yield


def _ask_for(record: Record, name: str, store: Path) -> None:
    """Raise DataError that says where to ask for the files that only the user can get, when they are not there."""
    lacking = [source for source in record.files if source.by_hand and not (store / source.file).exists()]
    if lacking:
        files = " and ".join(source.file for source in lacking)
        remedy = (
            f"ask for access at {lacking[0].url}, put the files into {store} and run the command again: it checks and "
            f"unpacks them, and fetches the rest; `wsolnb data check {name} FOLDER` looks at a copy that you have"
        )
        raise DataError(f"{files} of {record.title} cannot be fetched freely", remedy)


def _by_hand(source: Source, store: Path) -> str:
    return f"run the command again later, or fetch the file with a browser and save it as {store / source.file}"


def fetch(source: Source, store: Path, say: Callable[[str], None] = print) -> Path:
    """Return the file of a source in the folder `store`, fetched unless it is there, with the published hash.

    A file whose hash is wrong is deleted and fetched once more. Raises DataError as `download`.
    """
    path, part = store / source.file, _part(store, source)
    if source.hash is None:
        part.unlink(missing_ok=True)  # halves of two versions would go unnoticed
    for _ in range(2):
        if not path.exists():
            say(f"fetching {source.file}" + (f" from {in_words(_size(part))} on" if _size(part) else ""))
            _transfer(source, store, part, say)
            part.replace(path)
        algorithm, _, digest = (source.hash or "").partition(":")
        if not digest or pooch.file_hash(str(path), alg=algorithm) == digest:
            return path
        if source.by_hand:
            raise DataError(f"{path} has not the published {algorithm} {digest}", f"fetch it again from {source.url}")
        path.unlink()
        say(f"{source.file} has not the published hash, and was deleted")
    problem = f"{source.file} came twice with another {algorithm} than the published {digest}, from {source.url}"
    raise DataError(problem, "try another network; if that does not help, the publisher has changed the file")


def _transfer(source: Source, store: Path, part: Path, say: Callable[[str], None]) -> None:
    """Fetch a file into `part`, from where it ends; attempts that fail are repeated."""
    best = failures = 0
    while True:
        try:
            with _named(part), part.open("ab") as file:
                _request(source, store, file)
            return
        except requests.RequestException as error:
            failures = 0 if _size(part) > best else failures + 1
            best = max(best, _size(part))
            if failures >= FAILURES:
                problem = f"{source.file} cannot be fetched from {source.url}: {error}"
                raise DataError(problem, _by_hand(source, store)) from error
            say(f"{source.file} broke off ({type(error).__name__}): trying again")
            time.sleep(min(WAIT * 2**failures, 60))


def _request(source: Source, store: Path, file: IO[bytes]) -> None:
    """Append what a server has of a file beyond what `file` holds; RequestException for what may go better again."""
    have = file.tell()
    if have and have == source.size:
        return

    def examine(response: requests.Response, **_: Any) -> None:
        """Look at an answer before its body is read."""
        status, length = response.status_code, int(response.headers.get("Content-Length", 0))
        link = response.headers.get("Location") if response.is_redirect else source.url
        if not source.http and not urljoin(response.url, link).startswith("https://"):
            raise DataError(f"{source.url} leads to {link}, which is not https", _by_hand(source, store))
        if response.is_redirect:
            return
        if 400 <= status < 500 and status not in (408, 416, 429):
            raise DataError(f"{source.url} answers {status} {response.reason}", _by_hand(source, store))
        if status != 416:
            response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise DataError(f"{source.url} sends a web page instead of {source.file}", _by_hand(source, store))
        if have and (status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-")):
            file.truncate(0)  # this server does not resume, or has another file than the one that was begun
            if status != 200:
                raise requests.ConnectionError("the file cannot be resumed")
        require_space(store, length, source.file)

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    get = pooch.HTTPDownloader(
        sys.stderr.isatty(), chunk_size=1 << 16, timeout=TIMEOUT, headers=headers, hooks={"response": examine}
    )
    get(source.url, file, None)


# ------------------------------------------------------------------------------------------------------------ unpack


def unpack(archive: Path, folder: Path, take: Mapping[str, str]) -> None:
    """Unpack the parts `take` (as in `Source`) of a zip or tar archive into a folder, which is made.

    Tar files in a tar file are unpacked into a folder of their name.
    Raises DataError for a damaged archive, which is deleted, for one that lacks a part, and for one with a member that
    is a link or device or lies outside of it.
    """
    remedy = f"delete {archive} and run the command again; if it comes the same again, it is not what was published"
    members = _zip_members(archive, folder) if archive.suffix == ".zip" else _tar_members(archive)
    lacking = set(take)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, stream in tqdm(members, desc=archive.name, unit=" files", leave=False, disable=None):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise DataError(f"{archive} has the member {name!r}, which lies outside of its folder", remedy)
            part = next((part for part in take if path.is_relative_to(part)), None)
            if part is None:
                continue
            if stream is None:
                raise DataError(f"{archive} has the member {name!r}, which is a link or a device", remedy)
            lacking.discard(part)
            below = path.relative_to(part).as_posix()  # `.` where the part is a file
            place = folder / take[part] if below == "." else inside(folder / take[part], below, links=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as file, _named(place):
                shutil.copyfileobj(stream, file)
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        archive.unlink()
        problem = f"{archive} was damaged, and is deleted: {error}"
        raise DataError(problem, "run the command again: it fetches the file anew") from error
    if lacking:
        raise DataError(f"{archive} lacks {', '.join(map(repr, sorted(lacking)))}", remedy)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error of the system name the file, which it does not where a write fails."""
    try:
        yield
    except OSError as error:
        if error.errno:  # none has what the network says
            error.filename = error.filename or str(path)
        raise


_Members = Iterator[tuple[str, IO[bytes] | None]]
"""Names and contents; None for what is neither file nor folder."""


def _zip_members(archive: Path, folder: Path) -> _Members:
    with zipfile.ZipFile(archive) as file:
        infos = [info for info in file.infolist() if not info.is_dir()]
        whole = sum(info.file_size + 4096 for info in infos)  # small files take a block of the disk each
        require_space(folder, whole, f"the content of {archive.name}")
        for info in infos:
            regular = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
            with file.open(info) as stream:
                yield info.filename, stream if regular else None


def _tar_members(archive: Path | IO[bytes], within: str = "") -> _Members:
    source = {"name": archive} if isinstance(archive, Path) else {"fileobj": archive}
    with tarfile.open(**source) as file:
        for info in file:
            stream = file.extractfile(info) if info.isfile() else None
            if stream and info.name.endswith(".tar"):
                yield from _tar_members(stream, f"{within}{info.name.removesuffix('.tar')}/")
            elif not info.isdir():
                yield within + info.name, stream


def add_train_aug(folder: Path) -> None:
    """Make VOC's enlarged training list and its masks from SBD, which lies in `sbd/` of the folder VOC2012.

    The list ImageSets/Segmentation/train_aug.txt has the images of VOC's train list with VOC's masks, then the others
    of SBD that are not in VOC's val list, with SBD's masks as SegmentationClassAug/<image>.png. `sbd/` is removed.
    """
    sbd, lists, masks = folder / "sbd", folder / "ImageSets" / "Segmentation", folder / "SegmentationClassAug"
    train, val = ((lists / name).read_text().split() for name in ("train.txt", "val.txt"))
    listed = {image for name in ("train.txt", "val.txt") for image in (sbd / name).read_text().split()}
    added = sorted(listed.difference(train, val))
    masks.mkdir()
    for image in added:
        mask = loadmat(sbd / "cls" / f"{image}.mat")["GTcls"]["Segmentation"][0, 0]
        save_picture(Image.fromarray(mask.astype(np.uint8)), masks / f"{image}.png")
    lines = [f"/JPEGImages/{image}.jpg /SegmentationClass/{image}.png" for image in train]
    lines += [f"/JPEGImages/{image}.jpg /SegmentationClassAug/{image}.png" for image in added]
    (lists / "train_aug.txt").write_text("\n".join(lines) + "\n")
    shutil.rmtree(sbd)
