"""`check` on small trees of the true layouts, whole and broken in each way."""
# ruff: noqa: F811 (fixtures of other modules)

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_coco import change, coco  # noqa: F401
from test_readers import block, boxed, cub, masked, pets, tiny, voc, write, write_image, write_mask  # noqa: F401

from wsolnb.data import check as checking
from wsolnb.data.check import check
from wsolnb.data.downloads import catalogue
from wsolnb.errors import DataError, ParameterError


def found(name: str, root: Path, deep: bool = False) -> list[str]:
    """All problems that `check` reports."""
    return [problem for kind in check(name, root, deep).problems.values() for problem in kind]


@pytest.fixture
def metadata(masked) -> Path:
    """A metadata folder beside its images, as wsolevaluation's data sets have it, with a val split."""
    folder = masked["root"]
    masked["metadata_root"].rename(folder / "metadata")
    for name in ("image_ids.txt", "class_labels.txt"):
        lines = (folder / "metadata" / "train" / name).read_text().splitlines()
        write(folder / "metadata" / "val" / name, *(line.replace("train/", "val/") for line in lines))
    (folder / "train").rename(folder / "val")
    for i in range(3):
        write_image(folder / "train" / f"{i}.jpg", seed=i)
    return folder


class TestWhole:
    @pytest.mark.parametrize("deep", [False, True])
    @pytest.mark.parametrize("name", ["cub", "pets", "tiny_imagenet", "coco", "openimages"])
    def test_a_part_of_a_data_set_is_no_problem(self, request, name, deep):
        root = request.getfixturevalue({"tiny_imagenet": "tiny", "openimages": "metadata"}.get(name, name))
        report = check(name, root, deep)
        assert report.problems == {}
        assert "a part of the data set: nothing is wrong with that" in report.notes
        assert ("images were opened, not decoded: --deep decodes them" in report.notes) != deep
        assert str(report).endswith("nothing is wrong")

    def test_counts_are_of_images_and_of_classes_that_occur(self, pets):
        report = check("pets", pets)
        assert report.splits == [
            "trainval   10 of 3,680 images, 2 of 37 classes",
            "test       2 of 3,669 images, 2 of 37 classes",
        ]

    def test_coco_s_images_without_objects_count(self, coco):
        assert "trainval   5 of 82,783" in check("coco", coco).splits[0]

    def test_the_common_folder_will_do(self, tiny):
        assert check("tiny_imagenet", tiny.parent).folder == tiny

    def test_voc_with_its_enlarged_list(self, voc):
        assert "missing: ImageSets/Segmentation/train_aug.txt" in found("voc", voc)
        write(voc / "ImageSets" / "Segmentation" / "train_aug.txt", "a", "d")
        report = check("voc", voc)
        assert report.problems == {}, "an image in the list and in its enlarged form is in one split"
        assert len(report.splits) == 3

    def test_no_folder_and_no_such_name(self, tmp_path):
        with pytest.raises(DataError, match="no such folder") as caught:
            check("pets", tmp_path / "nothing")
        assert "wsolnb data download pets" in caught.value.remedy
        with pytest.raises(ParameterError, match="did you mean 'pets'"):
            check("pet", tmp_path)

    def test_an_empty_folder(self, tmp_path):
        assert found("pets", tmp_path) == ["missing: annotations/list.txt"]
        report = check("pets", tmp_path)
        assert report.notes == []
        assert "Remedy: images.tar.gz and annotations.tar.gz are at https://" in str(report)


class TestBroken:
    def test_problems_are_grouped_and_only_some_are_shown(self, pets):
        for i in range(5):
            (pets / "images" / f"Siamese_x_{i}.jpg").unlink()
        (pets / "annotations" / "trimaps" / "american_bulldog_0.png").unlink()
        (pets / "images" / "american_bulldog_5.jpg").write_bytes(b"")
        report = check("pets", pets)
        assert sorted(map(len, report.problems.values())) == [1, 6]
        text = str(report)
        assert "6 x\n  missing: images/Siamese_x_0.jpg\n" in text
        assert text.count("missing") == checking.EXAMPLES
        assert "... and 3 more" in text
        assert "cannot decode images/american_bulldog_5.jpg" in text
        assert text.endswith("something is wrong")  # the layout is right: no remedy

    def test_a_truncated_image_is_found_when_it_is_decoded(self, pets):
        path = pets / "images" / "Siamese_x_5.jpg"
        path.write_bytes(path.read_bytes()[:-100])
        assert found("pets", pets) == []
        [problem] = found("pets", pets, deep=True)
        assert "cannot decode images/Siamese_x_5.jpg" in problem

    @pytest.mark.parametrize("deep", [False, True])
    def test_masks_of_another_size_and_of_no_meaning(self, pets, deep):
        write_mask(pets / "annotations" / "trimaps" / "Siamese_x_5.png", np.ones((5, 6)))
        write_mask(pets / "annotations" / "trimaps" / "Siamese_x_0.png", block(0, 1, 0, 1, 9))
        assert sorted(found("pets", pets, deep)) == [
            "annotations/trimaps/Siamese_x_0.png holds the value 9, which stands for nothing",
            "annotations/trimaps/Siamese_x_5.png is 6x5, its image 20x12",
        ]

    @pytest.mark.parametrize("deep", [False, True])
    def test_boxes_outside(self, cub, deep):
        write(cub / "bounding_boxes.txt", *(f"{i} {30 if i == 5 else 1} 3 5 5" for i in range(1, 13)))
        assert found("cub", cub, deep) == ["the box 30, 3, 35, 8 lies outside of images/001.Gull/Gull_0004.jpg (20x12)"]

    def test_a_truncated_table_and_an_unknown_class(self, cub, voc, tiny):
        write(cub / "bounding_boxes.txt", *(f"{i} 1 3 5 5" for i in range(1, 10)))
        [problem] = found("cub", cub)
        assert problem.startswith("bounding_boxes.txt lacks 10, which images.txt has (3 in all)")
        (voc / "Annotations" / "c.xml").write_text(
            (voc / "Annotations" / "c.xml").read_text().replace("tvmonitor", "owl")
        )
        assert "Annotations/c.xml has an object of the unknown class 'owl'" in found("voc", voc)
        write(tiny / "val" / "val_annotations.txt", "val_0.JPEG n77 1 2 3 4")
        assert any("the class 'n77', which is not in wnids.txt" in problem for problem in found("tiny_imagenet", tiny))

    def test_the_splits_that_can_be_opened_are_looked_at(self, pets):
        (pets / "annotations" / "test.txt").unlink()
        (pets / "images" / "Siamese_x_0.jpg").unlink()
        report = check("pets", pets)
        assert report.splits[1].split() == ["test", "cannot", "be", "opened"]
        assert found("pets", pets) == ["missing: images/Siamese_x_0.jpg", "missing: annotations/test.txt"]

    def test_duplicates(self, coco, pets, voc):
        write(voc / "ImageSets" / "Segmentation" / "val.txt", "c", "c")
        assert "ImageSets/Segmentation/val.txt lists 'c' more than once" in found("voc", voc)
        lines = (pets / "annotations" / "test.txt").read_text()
        (pets / "annotations" / "test.txt").write_text(lines + lines)
        assert found("pets", pets) == ["annotations/test.txt lists 'Siamese_x_5' more than once"]

        def twice(content):
            content["images"][1]["file_name"] = content["images"][0]["file_name"]

        change(coco, twice)
        file = "annotations/instances_train2014.json"
        assert f"{file} has 2 images with the file_name 'COCO_train2014_000000000100.jpg'" in found("coco", coco)

    def test_an_image_in_two_splits(self, pets):
        train = (pets / "annotations" / "trainval.txt").read_text().splitlines()
        write(pets / "annotations" / "test.txt", train[0])
        assert found("pets", pets) == ["'Siamese_x_0' is in trainval and in test"]

    def test_more_than_was_published(self, pets, monkeypatch):
        record = catalogue()["pets"]
        splits = {**record.splits, "test": record.splits["test"].model_copy(update={"images": 1})}
        monkeypatch.setattr(checking, "get_record", lambda _: record.model_copy(update={"splits": splits}))
        assert found("pets", pets) == ["test has 2 images, 1 were published"]

    def test_a_metadata_folder(self, metadata):
        (metadata / "val" / "1.jpg").unlink()
        (metadata / "test" / "0i.png").write_bytes(b"no image")
        problems = found("openimages", metadata)
        assert problems[0] == "missing: val/1.jpg"
        assert problems[1].startswith("cannot decode test/0i.png")
        (metadata / "metadata" / "train" / "image_ids.txt").unlink()
        assert "missing: metadata/train/image_ids.txt" in found("openimages", metadata)

    def test_truths_of_some_images_where_they_take_long(self, coco, monkeypatch):
        record = catalogue()["coco"]
        monkeypatch.setattr(checking, "get_record", lambda _: record.model_copy(update={"truths": 2}))

        def empty(content):
            for annotation in content["annotations"]:
                annotation["segmentation"] = [[0, 0]]

        change(coco, empty)
        report = check("coco", coco)
        assert "trainval: boxes and masks of one image in 3 were looked at: --deep looks at all" in report.notes
        [kind] = report.problems.values()
        assert len(kind) == 1, "of images 0 and 3 of five: the latter has no objects"
        assert len(found("coco", coco, deep=True)) == 4, "all that have objects"

    def test_a_truncated_annotation_file(self, coco):
        path = coco / "annotations" / "instances_val2014.json"
        path.write_text(json.dumps(json.loads(path.read_text()))[:-50])
        [problem] = found("coco", coco)
        assert problem.startswith("cannot read annotations/instances_val2014.json")
