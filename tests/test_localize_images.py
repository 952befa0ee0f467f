"""`wsolnb.localize`: any model, any image, results in pixels of the image."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import wsolnb
from wsolnb.backbones import create_backbone
from wsolnb.errors import DataError, MapError, ParameterError
from wsolnb.localization import find_classes, lpcam_config
from wsolnb.methods import create_method
from wsolnb.methods.cam import CAMClassifier
from wsolnb.methods.grad_cam import GradCAM
from wsolnb.metrics import boxes_from_score_map

NAMES = ("cat, tom", "dog", "crane, bird", "crane, machine")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    found = CAMClassifier(create_backbone("resnet_mini", pretrained=True), len(NAMES))
    found.class_names = NAMES
    return found.eval()


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    return np.array(blobs.resize((171, 93), Image.Resampling.BICUBIC))


def one(*arguments, **options):
    (found,) = wsolnb.localize(*arguments, **options)
    return found


def test_importing_the_package_is_cheap_and_has_the_function():
    code = "import sys, wsolnb; print(*(m for m in ('torch', 'numpy', 'PIL') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert wsolnb.Localized._fields[0] == "name"
    with pytest.raises(AttributeError, match="localise"):
        wsolnb.localise  # noqa: B018


@pytest.mark.parametrize("method", [None, "layercam", "lpcam"])
def test_maps_boxes_and_mask_are_of_the_images_own_size(model, photo, method):
    found = one(photo, model, method=method, threshold=0.4)
    assert found.image.shape == (93, 171, 3)
    assert found.maps.shape == (1, 93, 171)
    assert found.maps.dtype == np.float32
    assert found.maps.min() >= 0
    assert 0.9 < found.maps.max() <= 1
    assert found.mask.shape == (93, 171)
    assert found.mask.dtype == np.uint8
    # The published protocol that does not clip a box's end to the last pixel is the package's half-open convention.
    assert np.array_equal(found.boxes[0], boxes_from_score_map(found.maps[0], [0.4], protocol="tscam")[0])
    grey = (found.maps[0] * 255).astype(np.uint8)
    assert np.array_equal(found.mask, grey > int(0.4 * grey.max()))
    x0, y0, x1, y1 = found.boxes[0][0]
    assert 0 <= x0 < x1 <= 171
    assert 0 <= y0 < y1 <= 93
    assert found.mask[y0:y1, x0].any()
    assert found.mask[y0:y1, x1 - 1].any()
    assert found.mask[y0, x0:x1].any()
    assert found.mask[y1 - 1, x0:x1].any()


def test_a_bright_corner_is_found_where_it_is():
    """A network that sees brightness alone: the map must not be moved, mirrored or turned."""
    backbone = create_backbone("resnet_mini")
    model = CAMClassifier(backbone, 1).eval()
    nn.init.ones_(model.classifier.weight)

    def brightness(images):
        seen = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16)
        return (seen - seen.min()).expand(-1, backbone.dim, -1, -1)

    backbone.forward = brightness
    image = np.zeros((96, 320, 3), np.uint8)
    image[16:48, 192:288] = 255
    x0, y0, x1, y1 = one(image, model, threshold=0.5).boxes[0][0]
    assert abs(np.array([x0, y0, x1, y1]) - [192, 16, 288, 48]).max() <= 4


def test_classes_are_ranked_and_the_first_is_looked_for(model, photo):
    found = one(photo, model)
    assert sum(p for _, p in found.ranking) == pytest.approx(1)
    assert [p for _, p in found.ranking] == sorted((p for _, p in found.ranking), reverse=True)
    assert (found.names[0], found.probabilities[0]) == found.ranking[0]
    assert NAMES[found.classes[0]] == found.names[0]


def test_several_classes_share_the_mask(model, photo):
    found = one(photo, model, classes=["dog", "Tom", 0], threshold=0.3)
    assert found.classes == (1, 0)
    assert found.names == ("dog", "cat, tom")
    assert found.maps.shape == (2, 93, 171)
    grey = (found.maps * 255).astype(np.uint8)
    above = np.stack([g > int(0.3 * g.max()) for g in grey])
    for row, column in [(0, 0), (40, 80), (92, 170), (10, 150)]:
        claims = [(found.maps[k, row, column], -k) for k in range(2) if above[k, row, column]]
        assert found.mask[row, column] == (1 - max(claims)[1] if claims else 0)


def test_a_multi_label_model_is_read_class_by_class(model, photo):
    soft = dict(one(photo, model).ranking)
    model.multi_label = True
    try:
        found = dict(one(photo, model).ranking)
    finally:
        model.multi_label = False
    logits = {name: np.log(p / (1 - p)) for name, p in found.items()}
    total = sum(np.exp(value) for value in logits.values())
    assert {name: np.exp(value) / total for name, value in logits.items()} == pytest.approx(soft, rel=1e-3)


def test_a_map_without_a_pixel_above_the_threshold_has_no_box(model, photo):
    found = one(photo, model, threshold=1.0)
    assert found.boxes[0].shape == (0, 4)
    assert not found.mask.any()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 900), (1500, 40)])
def test_small_long_and_large_images(model, size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    for method in ("cam", "lpcam"):
        assert one(image, model, method=method).maps.shape == (1, *size)


def test_prototypes_come_from_the_images_of_a_class(model, photo):
    """Alone, an image clusters its own features; beside another one of its class, both."""
    other = np.ascontiguousarray(photo[::-1, ::-1] // 2)
    alone = one(photo, model, method="lpcam", classes=["dog"])
    both = list(wsolnb.localize([photo, other], model, method="lpcam", classes=["dog"]))
    assert len(both) == 2
    assert not np.allclose(alone.maps, both[0].maps, atol=1e-3)
    assert lpcam_config(1000).mu_f == 0.1
    assert lpcam_config(20).mu_f == 0.9


def test_grad_cam_of_the_last_layer_is_cam(model, photo):
    last = one(photo, GradCAM.over(model))
    assert np.allclose(last.maps, one(photo, model).maps, atol=1e-4)
    inner = one(photo, GradCAM.over(model, "cnn.layer2"))
    assert inner.maps.shape == last.maps.shape
    assert not np.allclose(inner.maps, last.maps, atol=0.05)
    with pytest.raises(ParameterError, match=r"did you mean 'cnn\.layer4'"):
        GradCAM.over(model, "cnn.layer9")


def test_a_transformer_sees_a_square_and_its_map_has_the_images_size(photo):
    model = create_method("tscam", create_backbone("vit_mini"), 3)
    found = one(photo, model)
    assert found.maps.shape == (1, 93, 171)
    assert found.ranking[0][0].startswith("class ")
    with pytest.raises(ParameterError, match="LPCAM of a TSCAM"):
        one(photo, model, method="lpcam")


def test_a_decoder_that_names_nothing_says_so(photo):
    model = create_method("locloc", create_backbone("vit_mini_dino"), 3, part="generator")
    found = one(photo, model)
    assert found.ranking == ()
    assert found.names == ("object",)
    assert one(photo, model, classes=[2]).names == ("class 2",)
    probe = create_method("ppd", create_backbone("vit_mini_dino"), 3, part="probe")
    with pytest.raises(ParameterError, match="probe alone draws no map"):
        one(photo, probe)


def test_an_image_that_cannot_be_read_is_told_or_raised(model, photo, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    with pytest.raises(DataError, match=r"cannot decode .*broken\.jpg"):
        list(wsolnb.localize([photo, broken], model))
    for method in ("cam", "lpcam"):
        told = []
        found = list(wsolnb.localize([broken, photo, broken], model, method=method, skipped=told.append))
        assert [one.name for one in found] == ["image 2"]
        assert len(told) == 2
        assert list(wsolnb.localize([broken], model, method=method, skipped=told.append)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["dgo"]}, r"no class is called 'dgo' \(did you mean 'dog'\?\)"),
        ({"classes": ["crane"]}, r"several classes are called 'crane' \(2: crane, bird; 3: crane, machine\)"),
        ({"classes": [4]}, "no class has the index 4"),
        ({"classes": [-1]}, "no class has the index -1"),
        ({"classes": []}, "0 classes were asked for"),
        ({"threshold": float("nan")}, "a threshold is outside of"),
        ({"threshold": float("inf")}, "a threshold is outside of"),
        ({"threshold": -0.1}, "a threshold is outside of"),
        ({"method": "layer_cam"}, r"CAMClassifier has no map 'layer_cam' \(did you mean 'layercam'\?\)"),
    ],
)
def test_wrong_arguments_are_told_before_an_image_is_read(model, options, message):
    with pytest.raises(ParameterError, match=message):
        wsolnb.localize(["missing.jpg"], model, **options)


def test_no_image_and_an_index_beyond_a_nameless_model(model, photo):
    with pytest.raises(ParameterError, match="no image was given"):
        wsolnb.localize([], model)
    nameless = CAMClassifier(create_backbone("resnet_mini"), 2).eval()
    for method in ("cam", "lpcam"):
        with pytest.raises(ParameterError, match="class 2 asked of a model with 2 classes"):
            one(photo, nameless, classes=[2], method=method)
    assert find_classes(["1", "1"], ()) == (1,)


def test_a_network_of_nan_is_told(photo):
    model = CAMClassifier(create_backbone("resnet_mini"), 2)
    nn.init.constant_(model.classifier.weight, torch.nan)
    with pytest.raises(MapError, match="image 1: the network's scores are not finite"):
        one(photo, model)
