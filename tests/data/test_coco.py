"""The COCO reader on a tiny tree of the true layout, whole and broken; decoders against loops."""

import json

import numpy as np
import pytest
from PIL import Image

from wsolnb.data import open_dataset
from wsolnb.data.coco import COCO, decode_segmentation, polygon_mask, run_lengths
from wsolnb.errors import DataError, ParameterError

HEIGHT, WIDTH = 12, 20


def square(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def entry(key, image, category, segmentation, box, area, crowd=0):
    return {"id": key, "image_id": image, "category_id": category, "segmentation": segmentation, "bbox": box,
            "area": area, "iscrowd": crowd}  # fmt: skip


def runs_of(mask):
    """Run lengths down the columns, the first of zeros."""
    counts, value, run = [], 0, 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return [*counts, run]


@pytest.fixture
def coco(tmp_path):
    """Categories 1, 18, 90. Train: 5 images, one empty; val: 2."""
    root = tmp_path / "coco"
    crowd = np.zeros((HEIGHT, WIDTH), int)
    crowd[:, 10:] = 1
    objects = {
        "train": [
            entry(1, 100, 18, square(2, 2, 10, 8), [2, 2, 8, 6], 48.0),
            entry(2, 100, 90, square(4, 4, 6, 6), [4, 4, 2, 2], 4.0),  # small, on top of the large one
            entry(3, 7, 1, {"counts": runs_of(crowd), "size": [HEIGHT, WIDTH]}, [10, 0, 10, 12], 120, crowd=1),
            entry(4, 7, 18, square(12.4, 0, 14, 3.6) + square(0, 0, 2, 2), [0, 0, 14, 3.6], 10.5),
            entry(5, 8, 1, square(0, 0, 3, 3), [0, 0, 3, 3], 9.0),
            entry(6, 9, 90, square(0, 0, 3, 3), [0, 0, 3, 3], 9.0),
        ],
        "val": [entry(7, 20, 90, square(1, 1, 5, 5), [1, 1, 4, 4], 16.0)],
    }
    numbers = {"train": (100, 7, 8, 9, 50), "val": (20, 21)}
    (root / "annotations").mkdir(parents=True)
    for part, keys in numbers.items():
        files = {key: f"COCO_{part}2014_{key:012d}.jpg" for key in keys}
        (root / f"{part}2014").mkdir()
        for key, file in files.items():
            pixels = np.random.default_rng(key).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{part}2014" / file)
        content = {
            "info": {},
            "images": [{"id": k, "file_name": f, "height": HEIGHT, "width": WIDTH} for k, f in files.items()],
            "annotations": objects[part],
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        }
        (root / "annotations" / f"instances_{part}2014.json").write_text(json.dumps(content))
    return root


def change(root, edit, part="train"):
    path = root / "annotations" / f"instances_{part}2014.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_labels_boxes_and_masks(coco):
    dataset = open_dataset("coco", coco, "trainval")
    assert dataset.multi_label
    assert dataset.class_names == ("person", "dog", "toothbrush")  # by ascending id
    assert dataset.image_ids == tuple(f"COCO_train2014_{k:012d}" for k in (7, 8, 9, 100))  # the empty image is left out
    assert dataset.labels == ((0, 1), (0,), (2,), (1, 2))
    sample = dataset[3]
    np.testing.assert_array_equal(sample.boxes, [[2, 2, 10, 8], [4, 4, 6, 6]])
    np.testing.assert_array_equal(sample.box_labels, [1, 2])
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[2:8, 2:10] = 2
    expected[4:6, 4:6] = 3
    np.testing.assert_array_equal(sample.mask, expected)
    assert dataset.read(3, truth=False).mask is None
    assert COCO(coco.parent, "trainval").root == coco


def test_crowds(coco):
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:, 10:] = 255
    expected[0:4, 12:14] = 2  # centres 12.5 and 13.5; rows up to 3.5
    expected[0:2, 0:2] = 2
    sample = COCO(coco, "trainval")[0]
    np.testing.assert_array_equal(sample.mask, expected)
    np.testing.assert_array_equal(sample.boxes, [[0, 0, 14, 3.6]])  # a crowd has no box
    expected[expected == 255] = 1
    np.testing.assert_array_equal(COCO(coco, "trainval", crowd="class")[0].mask, expected)
    with pytest.raises(ParameterError, match="did you mean 'ignore'"):
        COCO(coco, "trainval", crowd="ignored")


def test_a_box_without_a_segmentation_is_not_counted(coco):
    def edit(content):
        content["annotations"][0]["segmentation"] = []  # the large box, behind the small object

    change(coco, edit)
    sample = open_dataset("coco", coco, "trainval")[3]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[2:8, 2:10] = 255
    expected[4:6, 4:6] = 3
    np.testing.assert_array_equal(sample.mask, expected)
    np.testing.assert_array_equal(sample.boxes, [[2, 2, 10, 8], [4, 4, 6, 6]])
    change(coco, lambda c: c["annotations"][0].update(bbox=[-3, 2.5, 30, 1], area=30))
    expected[2:8, 2:10] = 0
    expected[2:4] = 255
    expected[4:6, 4:6] = 3
    np.testing.assert_array_equal(open_dataset("coco", coco, "trainval").read(3).mask, expected)


def test_images_of_one_name_in_two_folders(coco):
    def edit(content):
        for image, name in zip(content["images"], ("a/0001.jpg", "b/0001.jpg"), strict=False):
            image["file_name"] = name

    for folder in "ab":
        (coco / "train2014" / folder).mkdir()
        pixels = np.full((HEIGHT, WIDTH, 3), ord(folder), np.uint8)
        Image.fromarray(pixels).save(coco / "train2014" / folder / "0001.jpg")
    change(coco, edit)
    dataset = open_dataset("coco", coco, "trainval")
    assert {"a/0001", "b/0001"} <= set(dataset.image_ids)
    for name in ("a/0001", "b/0001"):
        image = dataset.read(dataset.image_ids.index(name), truth=False).image
        assert abs(int(image.mean()) - ord(name[0])) < 2
    change(coco, lambda content: content["images"][1].update(file_name="a/0001.png"))
    with pytest.raises(DataError, match="coco trainval has two images of the id 'a/0001'"):
        open_dataset("coco", coco, "trainval")


def test_the_size_that_the_annotations_state(coco):
    change(coco, lambda content: [image.update(height=2 * HEIGHT, width=2 * WIDTH) for image in content["images"]])
    dataset = open_dataset("coco", coco, "trainval")
    with pytest.raises(DataError, match=r"is 20x12, .*instances_train2014.json says 40x24") as error:
        dataset[0]
    assert "not resized copies" in error.value.remedy
    assert dataset.read(0, truth=False).size == (HEIGHT, WIDTH)


def test_splits(coco):
    assert COCO(coco, "test").image_ids == ("COCO_val2014_000000000020",)
    both = COCO(coco, "test", empty=True)
    assert both.labels == ((2,), ())
    assert not both[1].mask.any()
    train, val = (COCO(coco, split, val_fraction=0.5) for split in ("train", "val"))
    assert sorted(train.image_ids + val.image_ids) == sorted(COCO(coco, "trainval").image_ids)
    assert len(val) == 1  # of two images of the first class one, of the others none: each class keeps one
    with pytest.raises(ParameterError, match="did you mean 'trainval'"):
        COCO(coco, "trainvall")
    with pytest.raises(DataError, match=r"missing: .*instances_train2017\.json"):
        COCO(coco, "train", year=2017)


def test_images_may_lie_one_folder_deeper(coco):
    (coco / "images").mkdir()
    (coco / "train2014").rename(coco / "images" / "train2014")
    assert COCO(coco, "trainval")[0].image.shape == (HEIGHT, WIDTH, 3)
    (coco / "images" / "train2014").rename(coco / "elsewhere")
    with pytest.raises(DataError, match=r"missing: .*images.train2014"):
        COCO(coco, "trainval")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c["images"].append({"file_name": "x.jpg"}), "an entry without 'id'"),
        (lambda c: c["images"][0].update(file_name=3), "an entry whose 'file_name' is 3, not text"),
        (lambda c: c["annotations"][0].update(image_id=5), "of image 5, which it does not list"),
        (lambda c: c["annotations"][0].update(category_id=2), "of category 2, which it does not list"),
        (lambda c: c["annotations"].append(3), "an entry without 'image_id'"),
        (lambda c: c["annotations"].clear(), "has no image"),
    ],
)
def test_broken_files(coco, edit, message):
    change(coco, edit)
    with pytest.raises(DataError, match=message) as caught:
        COCO(coco, "train")
    assert "Remedy" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bbox", [1, 2, 3], "without a proper bbox"),
        ("bbox", [1, 2, 3, "nan"], "without a proper bbox"),
        ("bbox", None, "without a proper bbox"),
        ("area", None, "without a proper bbox and area"),
        ("segmentation", [[1, 1, 2, 2]], "a polygon of 4 coordinates"),
        ("segmentation", [[1, 1, 2, 2, 3, 3, 4]], "a polygon of 7 coordinates"),
        ("segmentation", [[1, 1, 2, 2, 3, "x"]], "no numbers"),
        ("segmentation", {"size": [HEIGHT, WIDTH]}, "neither a list of polygons nor run lengths"),
        ("segmentation", {"size": [WIDTH, HEIGHT], "counts": [240]}, r"of size \[20, 12\], its image \[12, 20\]"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [3, 4]}, "run lengths of 7 pixels instead of 240"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": "0\x7f"}, "which is no run length"),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": "0P"}, "ends inside of a run length"),
    ],
)
def test_broken_objects_name_the_image(coco, field, value, message):
    change(coco, lambda c: c["annotations"][0].update({field: value}))
    dataset = COCO(coco, "trainval")
    with pytest.raises(DataError, match=rf"COCO_train2014_000000000100 has .*{message}"):
        dataset[3]
    assert dataset[0].mask is not None


def test_damaged_json_and_images(coco):
    dataset = COCO(coco, "trainval")
    dataset.image_path(1).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot decode .*000000000008\.jpg"):
        dataset[1]
    path = coco / "annotations" / "instances_train2014.json"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cannot read .*instances_train2014\.json"):
        COCO(coco, "train")


# ------------------------------------------------------------------------------------------------------------ decoders


def inside(x, y, points):
    """Even-odd rule for one point, edge by edge."""
    odd = False
    for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
        if (ay <= y) != (by <= y) and x < ax + (y - ay) / (by - ay) * (bx - ax):
            odd = not odd
    return odd


def test_polygons_equal_the_rule_pixel_by_pixel():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = rng.uniform(-4, 24, (int(rng.integers(3, 9)), 2))  # crossing themselves, leaving the image
        got = polygon_mask(points.ravel().tolist(), (15, 18))
        expected = [[inside(x + 0.5, y + 0.5, points.tolist()) for x in range(18)] for y in range(15)]
        np.testing.assert_array_equal(got, expected)


def test_a_polygon_along_pixel_edges_is_exact():
    mask = polygon_mask([2, 3, 7, 3, 7, 6, 2, 6], (10, 10))
    assert mask.sum() == 15
    assert mask[3:6, 2:7].all()


# Recorded from COCO's own encoder: run lengths, and the text that it writes for them.
TEXTS = {
    "83300010O000": [8, 3, 3, 3, 3, 3, 4, 3, 3, 3, 3, 3],
    ";36000Z93cF000": [11, 3, 6, 3, 6, 3, 304, 6, 3, 6, 3, 6],
    ">39000m46mJ000": [14, 3, 9, 3, 9, 3, 166, 9, 3, 9, 3, 9],
}


def text_of(counts):
    """COCO's writing of run lengths."""
    text = ""
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            group, value = value & 31, value >> 5
            more = value != -1 if group & 16 else value != 0
            text += chr(48 + group + (32 if more else 0))
            if not more:
                break
    return text


def test_texts_of_the_original_encoder():
    for text, counts in TEXTS.items():
        assert run_lengths(text) == counts
        assert text_of(counts) == text


def test_run_lengths_as_text_and_as_list():
    rng = np.random.default_rng(1)
    for _ in range(30):
        mask = (rng.random((9, 40)) < rng.uniform(0.02, 0.6)).astype(int)
        mask[:, 10:30] = rng.integers(2)
        counts = runs_of(mask)
        assert run_lengths(text_of(counts)) == counts
        for given in (counts, text_of(counts)):
            np.testing.assert_array_equal(decode_segmentation({"counts": given, "size": [9, 40]}, (9, 40)), mask)
