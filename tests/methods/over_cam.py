"""What the tests of all methods over CAM share: a tiny backbone, and what every one of them must hold."""

import torch
from torch import nn

from wsolnb.methods import create_method
from wsolnb.methods.cam import CAMClassifier


class Tiny(nn.Module):
    """A backbone of two layers; (B, 6, H / 2, W / 2)."""

    dim, stride = 6, 2

    def __init__(self):
        super().__init__()
        self.inner, self.conv = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, stride=2, padding=1)
        self.unused = nn.Conv2d(5, 6, 1)

    def forward(self, images):
        return self.conv(self.inner(images).relu()).relu()


def assert_cam_in_evaluation(method):
    """In evaluation mode the method's loss, logits and maps are CAM's, to the bit."""
    model = method(Tiny(), 3).eval()
    plain = CAMClassifier(model.backbone, 3).eval()
    plain.load_state_dict(model.state_dict())
    images, classes = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 1])
    batch = {"image": images, "label": classes}
    assert torch.equal(model.loss(model, batch), plain.loss(plain, batch))
    assert torch.equal(model(images).logits, plain(images).logits)
    found, expected = model.localize(model(images), classes), plain.localize(plain(images), classes)
    assert model.maps == plain.maps == tuple(found)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def assert_learns_and_repeats(name, multi, share=0.6, steps=30, **options):
    """On an easy problem the loss falls below a share of what it was, and a second run with the seed is the same."""
    labels = torch.arange(16) % 3
    images = torch.randn(16, 3, 16, 16) * 0.2
    images[torch.arange(16), labels, 4:12, 4:12] += 1.5
    batch = {"image": images, "label": nn.functional.one_hot(labels, 3) if multi else labels}

    def run():
        torch.manual_seed(3)
        model = create_method(name, Tiny(), 3, **options)
        with torch.no_grad():
            before = float(model.eval().loss(model, batch))
        optimizer = torch.optim.Adam(model.train().parameters(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            model.loss(model, batch).backward()
            optimizer.step()
        with torch.no_grad():
            return model, before, float(model.eval().loss(model, batch))

    (first, before, after), (second, _, again) = run(), run()
    assert after < share * before
    assert after == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
