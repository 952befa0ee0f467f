import pytest
import torch
from over_cam import Tiny, assert_cam_in_evaluation, assert_learns_and_repeats

from wsolnb.errors import ParameterError
from wsolnb.methods import create_method
from wsolnb.methods.base import classification_loss
from wsolnb.methods.has import HideAndSeek, hide


@pytest.mark.parametrize(("height", "width", "grid"), [(8, 8, 4), (7, 10, 3), (5, 6, 5), (4, 4, 1)])
def test_hidden_cells_equal_loops(height, width, grid):
    images = torch.rand(6, 3, height, width, dtype=torch.float64) + 1
    torch.manual_seed(11)
    found = hide(images, grid, 0.5)
    torch.manual_seed(11)
    drawn = torch.rand(6, 1, grid, grid)
    for image in range(6):
        for y in range(height):
            for x in range(width):
                gone = float(drawn[image, 0, y * grid // height, x * grid // width]) < 0.5
                for k in range(3):
                    assert found[image, k, y, x] == (0 if gone else images[image, k, y, x])
    assert found.dtype == torch.float64
    assert images.min() >= 1  # the batch itself is left alone


def test_the_share_of_hidden_pixels_is_the_probability():
    images = torch.ones(500, 1, 8, 8)
    for probability in (0.0, 0.25, 0.5, 1.0):
        share = float((hide(images, 4, probability) == 0).float().mean())
        # 8000 cells: five standard deviations of a binomial share
        assert abs(share - probability) <= 5 * (probability * (1 - probability) / 8000) ** 0.5


def test_every_image_has_its_own_cells_and_all_channels_share_them():
    found = hide(torch.ones(8, 3, 8, 8), 4, 0.5)
    assert torch.equal(found[:, :1].expand(-1, 3, -1, -1), found)
    assert len({tuple(each.flatten().tolist()) for each in found[:, 0]}) > 1


def test_hidden_pixels_are_zero_even_where_the_image_is_not_finite_and_get_no_gradient():
    images = torch.full((1, 3, 4, 4), torch.inf)
    assert torch.equal(hide(images, 2, 1.0), torch.zeros_like(images))
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64).requires_grad_()

    def seeded(values):
        torch.manual_seed(5)
        return hide(values, 2, 0.5)

    assert torch.autograd.gradcheck(seeded, images)


def test_the_loss_is_that_of_the_hidden_images():
    model = HideAndSeek(Tiny(), 3).train()
    batch = {"image": torch.randn(4, 3, 8, 8), "label": torch.tensor([0, 2, 1, 1])}
    torch.manual_seed(7)
    found = model.loss(model, batch, 0.1)
    torch.manual_seed(7)
    expected = classification_loss(model(hide(batch["image"], 4, 0.5)).logits, batch["label"], 0.1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, classification_loss(model(batch["image"]).logits, batch["label"], 0.1))


def test_in_evaluation_it_is_cam():
    assert_cam_in_evaluation(HideAndSeek)


@pytest.mark.parametrize("multi", [False, True])
def test_training_reduces_the_loss_and_is_reproducible(multi):
    assert_learns_and_repeats("has", multi)


@pytest.mark.parametrize("options", [{"grid": 0}, {"grid": 2.5}, {"probability": 1.5}, {"probability": -0.1}, {"p": 1}])
def test_bad_options_are_refused(options):
    with pytest.raises(ParameterError):
        create_method("has", Tiny(), 3, **options)


def test_more_cells_than_pixels_are_refused():
    with pytest.raises(ParameterError, match="9 cells on 8 x 12"):
        hide(torch.zeros(1, 3, 8, 12), 9, 0.5)
