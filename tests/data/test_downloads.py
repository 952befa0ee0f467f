"""Downloads from a server on this machine that does all that a server should not; archives that want to get out."""

from __future__ import annotations

import fcntl
import hashlib
import io
import shutil
import stat
import tarfile
import threading
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.io import savemat

from wsolnb.data import downloads
from wsolnb.data.downloads import Record, Source, catalogue, download, fetch, unpack
from wsolnb.data.readers import DATASETS
from wsolnb.data.voc import VOC
from wsolnb.errors import DataError, ParameterError

ROOT = Path(__file__).parents[2]
BODY = np.random.default_rng(0).bytes(300_000)
HASH = f"md5:{hashlib.md5(BODY).hexdigest()}"


class Handler(BaseHTTPRequestHandler):
    """Serves the server's `files`, each request in the way that the path's `ways` have next; after them `ranges`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, ways = self.server, self.server.ways[self.path]
        asked = self.headers.get("Range")
        server.asked.append((self.path, asked))
        way = ways.pop(0) if ways else "ranges"
        if way.isdigit() or way == "html":
            return self.answer(int(way) if way.isdigit() else 200, b"<html>quota</html>", {"Content-Type": "text/html"})
        if way.startswith(("/", "http")):
            return self.answer(302, b"", {"Location": way})
        whole = server.files[self.path]
        body, status, headers = whole, 200, {}
        if asked and "no ranges" not in way:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            status = 206 if start < len(whole) else 416
            given = f"{start}-{len(whole) - 1}" if status == 206 else "*"
            body, headers = whole[start:], {"Content-Range": f"bytes {given}/{len(whole)}"}
        if way == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        sent = len(body) // 2 if way in ("cut", "cut, no ranges", "stall") else len(body)
        self.answer(status, body[:sent], headers, len(body))
        if way == "stall":
            self.wfile.flush()
            server.done.wait(60)

    def answer(self, status: int, body: bytes, headers: dict, length: int | None = None) -> None:
        self.send_response(status)
        size = str(len(body) if length is None else length)
        for name, value in {"Content-Length": size, "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(downloads, "WAIT", 0.0)
    monkeypatch.setattr(downloads, "TIMEOUT", 20)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.ways, server.asked, server.done = {"/a.zip": BODY}, defaultdict(list), [], threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.done.set()
    server.shutdown()
    server.server_close()


def source(server, path="/a.zip", **fields) -> Source:
    return Source(**{"url": server.address + path, "take": {}, "http": True, "hash": HASH, **fields})


class TestFetch:
    def test_a_file_is_fetched_once(self, server, tmp_path):
        for _ in range(2):
            assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert server.asked == [("/a.zip", None)]
        assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]

    @pytest.mark.parametrize("way", ["cut", "stall"])
    def test_what_breaks_off_is_resumed_where_it_ended(self, server, tmp_path, monkeypatch, way):
        if way == "stall":
            monkeypatch.setattr(downloads, "TIMEOUT", 1)
        server.ways["/a.zip"] = [way, way]
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        starts = [0 if asked is None else int(asked.strip("bytes=-")) for _, asked in server.asked]
        assert 0 == starts[0] < starts[1] < starts[2] < len(BODY)

    def test_a_server_that_does_not_resume_starts_anew(self, server, tmp_path):
        server.ways["/a.zip"] = ["cut", "no ranges"]
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert server.asked[1][1] is not None

    def test_an_interrupted_file_goes_on_in_the_next_call(self, server, tmp_path):
        (tmp_path / "a.zip.part").write_bytes(BODY[:1000])
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert server.asked == [("/a.zip", "bytes=1000-")]

    @pytest.mark.parametrize(("size", "requests"), [(len(BODY), 0), (None, 2)])
    def test_a_part_that_is_whole_is_not_fetched_again_if_its_size_is_known(self, server, tmp_path, size, requests):
        (tmp_path / "a.zip.part").write_bytes(BODY)
        assert fetch(source(server, size=size), tmp_path).read_bytes() == BODY
        assert len(server.asked) == requests

    def test_a_passing_failure_does_not_lose_what_has_come(self, server, tmp_path):
        server.ways["/a.zip"] = ["cut", "503"]
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        assert server.asked[1] == server.asked[2]
        assert server.asked[1][1] is not None

    def test_a_part_that_is_longer_than_the_file_is_dropped(self, server, tmp_path):
        (tmp_path / "a.zip.part").write_bytes(BODY + b"more")
        assert fetch(source(server), tmp_path).read_bytes() == BODY

    def test_a_part_of_a_file_without_a_hash_is_not_trusted(self, server, tmp_path):
        (tmp_path / "a.zip.part").write_bytes(b"of an older version")
        assert fetch(source(server, hash=None), tmp_path).read_bytes() == BODY

    def test_a_wrong_hash_is_fetched_once_more(self, server, tmp_path):
        server.ways["/a.zip"] = ["corrupt"]
        said = []
        assert fetch(source(server), tmp_path, said.append).read_bytes() == BODY
        assert "a.zip has not the published hash, and was deleted" in said

    def test_a_wrong_hash_twice_is_an_error_and_leaves_nothing(self, server, tmp_path):
        server.ways["/a.zip"] = ["corrupt"] * 3
        with pytest.raises(DataError, match=r"a\.zip came twice with another md5") as caught:
            fetch(source(server), tmp_path)
        assert "Remedy: " in str(caught.value)
        assert len(server.asked) == 2
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("way", "message"),
        [
            ("404", r"a\.zip answers 404 Not Found"),
            ("403", r"a\.zip answers 403 Forbidden"),
            ("html", r"sends a web page instead of a\.zip"),
        ],
    )
    def test_what_cannot_go_better_is_not_tried_again(self, server, tmp_path, way, message):
        server.ways["/a.zip"] = [way]
        with pytest.raises(DataError, match=message) as caught:
            fetch(source(server), tmp_path)
        assert f"save it as {tmp_path / 'a.zip'}" in caught.value.remedy
        assert len(server.asked) == 1

    @pytest.mark.parametrize("way", ["503", "429", "cut, no ranges"])
    def test_what_may_go_better_is_tried_again_but_not_for_ever(self, server, tmp_path, way):
        server.ways["/a.zip"] = [way, way]
        assert fetch(source(server), tmp_path).read_bytes() == BODY
        (tmp_path / "a.zip").unlink()
        server.asked.clear()
        server.ways["/a.zip"] = ["503"] * 50
        with pytest.raises(DataError, match=r"a\.zip cannot be fetched from http.* 503"):
            fetch(source(server), tmp_path)
        assert len(server.asked) == downloads.FAILURES

    def test_a_server_that_cuts_and_does_not_resume_is_given_up(self, server, tmp_path):
        server.ways["/a.zip"] = ["cut, no ranges"] * 50
        with pytest.raises(DataError, match=r"a\.zip cannot be fetched"):
            fetch(source(server), tmp_path)
        assert len(server.asked) == downloads.FAILURES + 1  # the first attempt brought something

    def test_an_unreachable_server(self, tmp_path, server):
        server.shutdown()
        server.server_close()
        with pytest.raises(DataError, match=r"a\.zip cannot be fetched from http://127"):
            fetch(source(server), tmp_path)

    def test_redirects_are_followed_and_resumed(self, server, tmp_path):
        (tmp_path / "a.zip.part").write_bytes(BODY[:1000])
        server.ways["/old"] = ["/a.zip"]
        assert fetch(source(server, "/old", name="a.zip"), tmp_path).read_bytes() == BODY
        assert server.asked == [("/old", "bytes=1000-"), ("/a.zip", "bytes=1000-")]

    def test_only_https_unless_the_record_says_otherwise(self, server, tmp_path):
        with pytest.raises(DataError, match="which is not https"):
            fetch(source(server, http=False), tmp_path)
        assert not (tmp_path / "a.zip").exists()


# ------------------------------------------------------------------------------------------------------------ archives


def tar(path: Path, *members: tuple[tarfile.TarInfo | str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as file:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def special(kind: bytes, name: str = "data/x", target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(path: Path, *members: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for member, content in members:
            file.writestr(member, content)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


GOOD = [("./data/a/1", b"one"), ("data/list.txt", b"two"), ("other/3", b"three")]


class TestUnpack:
    @pytest.mark.parametrize(("name", "write"), [("x.zip", zipped), ("x.tgz", tar), ("x.tar", tar)])
    def test_parts_go_to_their_places(self, tmp_path, name, write):
        unpack(write(tmp_path / name, *GOOD), tmp_path / "out", {"data/a": "b/c", "data/list.txt": "list.txt"})
        assert tree(tmp_path / "out") == {"b/c/1": b"one", "list.txt": b"two"}
        unpack(tmp_path / name, tmp_path / "all", {"": ""})
        assert tree(tmp_path / "all") == {"data/a/1": b"one", "data/list.txt": b"two", "other/3": b"three"}

    def test_tars_in_a_tar_get_a_folder_each(self, tmp_path):
        inner = tar(tmp_path / "inner.tar", ("n01_1.JPEG", b"one"))
        unpack(tar(tmp_path / "x.tar", ("n01.tar", inner.read_bytes())), tmp_path / "out", {"": "train"})
        assert tree(tmp_path / "out") == {"train/n01/n01_1.JPEG": b"one"}

    @pytest.mark.parametrize("name", ["../x", "data/../../x", "/tmp/x", "other/../../x"])
    @pytest.mark.parametrize(("file", "write"), [("x.zip", zipped), ("x.tar", tar)])
    def test_members_that_leave_the_folder_are_refused(self, tmp_path, name, file, write):
        archive = write(tmp_path / file, ("data/1", b"good"), (name, b"evil"))
        with pytest.raises(DataError, match="lies outside of its folder"):
            unpack(archive, tmp_path / "deep" / "out", {"data": ""})
        assert tree(tmp_path / "deep") == {"out/1": b"good"}

    @pytest.mark.parametrize(
        "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    )
    def test_links_and_devices_are_refused(self, tmp_path, kind):
        archive = tar(tmp_path / "x.tar", (special(kind), b""))
        with pytest.raises(DataError, match="'data/x', which is a link or a device"):
            unpack(archive, tmp_path / "out", {"data": ""})
        assert not list((tmp_path / "out").iterdir())

    def test_a_link_in_a_zip_is_refused(self, tmp_path):
        link = zipfile.ZipInfo("data/x")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        with pytest.raises(DataError, match="link or a device"):
            unpack(zipped(tmp_path / "x.zip", (link, b"/etc/passwd")), tmp_path / "out", {"data": ""})

    @pytest.mark.parametrize("name", ["x.zip", "x.tgz", "x.tar"])
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
    def test_a_damaged_archive_is_deleted(self, tmp_path, name, share):
        members = [(f"data/{i}", np.random.default_rng(i).bytes(20_000)) for i in range(5)]
        archive = (zipped if name == "x.zip" else tar)(tmp_path / name, *members)
        archive.write_bytes(archive.read_bytes()[: int(share * archive.stat().st_size)])
        with pytest.raises(DataError, match=r"was damaged, and is deleted"):
            unpack(archive, tmp_path / "out", {"data": ""})
        assert not archive.exists()

    def test_a_flipped_bit_in_a_zip_is_found(self, tmp_path):
        archive = zipped(tmp_path / "x.zip", ("data/1", b"a" * 1000))
        archive.write_bytes(archive.read_bytes().replace(b"aaaa", b"aaba", 1))
        with pytest.raises(DataError, match="CRC"):
            unpack(archive, tmp_path / "out", {"data": ""})

    def test_an_archive_of_another_layout(self, tmp_path):
        with pytest.raises(DataError, match="lacks 'images'"):
            unpack(tar(tmp_path / "x.tar", *GOOD), tmp_path / "out", {"data": "", "images": "images"})


# ------------------------------------------------------------------------------------------------------------ download


@pytest.fixture
def record(server, monkeypatch) -> Record:
    """A data set of two archives."""
    one, two = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=one, mode="w:gz") as file:
        info = tarfile.TarInfo("top/images/1.jpg")
        info.size = 100_000
        file.addfile(info, io.BytesIO(BODY))
    with zipfile.ZipFile(two, "w") as file:
        file.writestr("lists/list.txt", "1.jpg")
    server.files = {"/one.tgz": one.getvalue(), "/two.zip": two.getvalue()}
    take = ({"top": ""}, {"lists": "annotations"})
    files = [
        source(server, path, take=part, size=len(content), hash=f"sha256:{hashlib.sha256(content).hexdigest()}")
        for part, (path, content) in zip(take, server.files.items(), strict=True)
    ]
    record = Record(
        title="Toys", page="https://example.org", reader="pets", folder="sets/toys", licence="CC0", terms="Be kind.",
        classes=2, splits={"test": {"images": 1}}, files=files,
    )  # fmt: skip
    monkeypatch.setattr(downloads, "catalogue", lambda: {"toys": record})
    return record


WHOLE = {"images/1.jpg": BODY[:100_000], "annotations/list.txt": b"1.jpg"}


class TestDownload:
    def test_a_whole_data_set_and_a_second_call_that_does_nothing(self, record, server, tmp_path):
        said = []
        assert download("toys", tmp_path, said.append) == tmp_path / "sets" / "toys"
        assert tree(tmp_path / "sets" / "toys") == WHOLE
        assert "Licence: CC0. Be kind." in said[0]
        assert [path.name for path in (tmp_path / "sets").iterdir()] == ["toys"]
        assert tree(tmp_path / ".downloads") == {".lock": b""}, "archives are not kept"
        server.asked.clear()
        download("toys", tmp_path, said.append)
        assert "nothing done" in said[-1]
        assert server.asked == []

    def test_an_unknown_name(self, record, tmp_path):
        with pytest.raises(ParameterError, match="did you mean 'toys'"):
            download("toyz", tmp_path)

    def test_an_interrupted_download_goes_on(self, record, server, tmp_path, monkeypatch):
        """The first file is there, the second one in part; neither is fetched from the start again."""
        original = downloads._transfer

        def interrupted(source, store, part, say):
            if source.file == "two.zip":
                part.write_bytes(server.files["/two.zip"][:10])
                raise KeyboardInterrupt
            original(source, store, part, say)

        with monkeypatch.context() as patch:
            patch.setattr(downloads, "_transfer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                download("toys", tmp_path, str)
        assert not (tmp_path / "sets").exists()
        server.asked.clear()
        assert tree(download("toys", tmp_path, str)) == WHOLE
        assert server.asked == [("/two.zip", "bytes=10-")]

    @pytest.mark.parametrize("when", ["unpacking", "renaming"])
    def test_an_interrupted_unpacking_is_not_taken_for_whole(self, record, server, tmp_path, monkeypatch, when):
        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if when == "unpacking":
                patch.setattr(shutil, "copyfileobj", interrupted)
            else:
                patch.setattr(
                    Path, "replace", lambda self, target: self.rename(target) if self.is_file() else interrupted()
                )
            with pytest.raises(KeyboardInterrupt):
                download("toys", tmp_path, str)
        assert not (tmp_path / "sets" / "toys").exists()
        server.asked.clear()
        assert tree(download("toys", tmp_path, str)) == WHOLE
        assert server.asked == [], "nothing is fetched twice"

    def test_what_a_killed_process_left_is_removed(self, record, tmp_path):
        left = tmp_path / "sets" / ".toys.unpacking" / "images" / "half.jpg"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"half")
        assert tree(download("toys", tmp_path, str)) == WHOLE

    def test_too_little_space_is_told_before_anything_is_fetched(self, record, server, tmp_path, monkeypatch):
        size = sum(source.size for source in record.files)
        enough = size + int(downloads.UNPACKED * size) + 1
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, enough - 2))
        with pytest.raises(DataError, match=r"Toys needs 0\.\d MB, and 0\.\d MB are free in"):
            download("toys", tmp_path, str)
        assert server.asked == []
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, enough))
        download("toys", tmp_path, str)

    def test_a_file_of_unknown_size_is_measured_when_the_server_tells_it(self, server, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, len(BODY) - 1))
        with pytest.raises(DataError, match=r"a\.zip needs 0\.3 MB"):
            fetch(source(server), tmp_path)

    def test_a_disk_that_fills_up_all_the_same(self, record, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(DataError, match=r"cannot write to .* No space left on device"):
            download("toys", tmp_path, str)
        assert list((tmp_path / "sets").iterdir()) == [], "what was unpacked is removed"

    def test_a_second_process_waits_outside(self, record, tmp_path):
        (tmp_path / ".downloads").mkdir()
        with (tmp_path / ".downloads" / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(DataError, match="another process"):
                download("toys", tmp_path, str)
        download("toys", tmp_path, str)

    def test_files_that_only_the_user_can_get(self, record, server, tmp_path, monkeypatch):
        one = record.files[0].model_copy(update={"by_hand": True, "url": "https://example.org/ask"})
        asked = record.model_copy(update={"files": (one, record.files[1])})
        monkeypatch.setattr(downloads, "catalogue", lambda: {"toys": asked})
        with pytest.raises(DataError, match=r"one\.tgz|ask of Toys cannot be fetched freely") as caught:
            download("toys", tmp_path, str)
        assert "ask for access at https://example.org/ask" in caught.value.remedy
        assert server.asked == []
        mine = tmp_path / ".downloads" / one.file
        mine.write_bytes(b"not what was published")
        with pytest.raises(DataError, match="has not the published sha256"):
            download("toys", tmp_path, str)
        assert mine.exists(), "the user's own file is not deleted"
        mine.write_bytes(server.files["/one.tgz"])
        assert tree(download("toys", tmp_path, str)) == WHOLE
        assert mine.exists()


def test_the_enlarged_list_of_voc(tmp_path):
    """a: VOC train, b: VOC val; of SBD's images c is new, a and b are not."""
    lists, sbd = tmp_path / "ImageSets" / "Segmentation", tmp_path / "sbd"
    for folder in (lists, sbd / "cls", tmp_path / "JPEGImages", tmp_path / "Annotations"):
        folder.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    (sbd / "train.txt").write_text("a\nc\n")
    (sbd / "val.txt").write_text("b\n")
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    kind = [("Boundaries", object), ("Segmentation", object), ("CategoriesPresent", object)]
    savemat(sbd / "cls" / "c.mat", {"GTcls": np.array([(0, mask, 0)], dtype=kind)})
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / "JPEGImages" / "c.jpg")
    for name in "ac":
        (tmp_path / "Annotations" / f"{name}.xml").write_text("<annotation></annotation>")
    downloads.add_train_aug(tmp_path)
    dataset = VOC(tmp_path, "train", sbd_list=lists / "train_aug.txt")
    assert dataset.image_ids == ("a", "c")
    np.testing.assert_array_equal(dataset[1].mask, mask)
    assert [path.name for path in (tmp_path / "SegmentationClassAug").iterdir()] == ["c.png"]
    assert not sbd.exists()


# ----------------------------------------------------------------------------------------------------------- catalogue


@pytest.mark.parametrize("name", catalogue())
def test_records(name):
    record = catalogue()[name]
    assert record.reader in DATASETS
    assert record.page.startswith("http")
    for file in record.files:
        assert file.url.startswith("https://")
        assert not file.http
        if file.hash:
            algorithm, digest = file.hash.split(":")
            assert len(digest) == {"md5": 32, "sha256": 64}[algorithm]
            assert int(digest, 16)
    if record.profile:
        values = [yaml.safe_load(path.read_text()) for path in (ROOT / "params" / record.profile).glob("[0-9]*.yaml")]
        roots = {value["data_root"] for value in values if "data_root" in value}
        assert roots == {f"data/{record.folder}"}, "what is downloaded to data/ is where the profile looks"
        assert {value["dataset"] for value in values if "dataset" in value} == {record.reader}


def test_files_of_one_name_are_the_same_file():
    known = {}
    for record in catalogue().values():
        for file in record.files:
            assert known.setdefault(file.file, (file.url, file.hash)) == (file.url, file.hash)
