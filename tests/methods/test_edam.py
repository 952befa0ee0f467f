import math

import numpy as np
import pytest
import torch
from over_cam import Tiny, assert_learns_and_repeats

from wsolnb.errors import ParameterError
from wsolnb.methods import create_method
from wsolnb.methods.edam import EDAM, partners, positions
from wsolnb.methods.features import ConvExtractor, OwnMaps


def small(classes=3, **options):
    """EDAM on the tiny backbone, in float64."""
    torch.manual_seed(0)
    return EDAM(Tiny(), classes, **options).double().eval()


def plain_block(block, tokens, heads):
    """A transformer block with the norm first, of (T, D) tokens: a head and a token at a time."""
    dim = tokens.shape[1]
    normed = torch.stack([block.norm1(token) for token in tokens])
    wide = dim // heads
    inside = block.self_attn.in_proj_weight, block.self_attn.in_proj_bias
    q, k, v = (normed @ w.T + b for w, b in zip(*(part.chunk(3) for part in inside), strict=True))
    mixed = torch.zeros_like(tokens)
    for head in range(heads):
        own = slice(head * wide, (head + 1) * wide)
        for t in range(len(tokens)):
            scores = [float(q[t, own] @ k[other, own]) / math.sqrt(wide) for other in range(len(tokens))]
            shares = [math.exp(score) for score in scores]
            for other, share in enumerate(shares):
                mixed[t, own] += share / sum(shares) * v[other, own]
    out = tokens + block.self_attn.out_proj(mixed)
    return out + block.linear2(torch.nn.functional.gelu(block.linear1(block.norm2(out))))


def plain_logit(model, images, k):
    """The logits of class k of some images that attend to each other, and the responses n (B, C + 1, h, w)."""
    features = model.backbone(images)
    raw = model.masks(features)
    n = raw / raw.pow(2).sum(dim=1, keepdim=True).sqrt()
    tokens = []
    for b in range(len(images)):
        for cell in range(n[0, 0].numel()):
            y, x = divmod(cell, n.shape[3])
            token = model.embed.weight[:, :, 0, 0] @ features[b, :, y, x] * abs(float(n[b, k, y, x]))
            tokens.append(token + positions(cell + 1, len(token))[-1] + model.image.weight[b])
    mixed = plain_block(model.blocks[k], torch.stack(tokens), model.blocks[k].self_attn.num_heads)
    means = mixed.unflatten(0, (len(images), -1)).mean(dim=1)
    return model.judges[k](means)[:, 0], n


def test_alone_at_test_and_in_pairs_in_training_as_by_hand():
    model, images = small(dropout=0.0), torch.randn(5, 3, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        alone, paired = model(images), model.train()(images)
        for k in range(3):
            for b in range(5):
                logit, n = plain_logit(model, images[b : b + 1], k)
                assert float(alone.logits[b, k]) == pytest.approx(float(logit), rel=1e-5, abs=1e-6)
                torch.testing.assert_close(alone.responses[b], n[0])
            for first in (0, 2):
                logits, _ = plain_logit(model, images[first : first + 2], k)
                torch.testing.assert_close(paired.logits[first : first + 2, k], logits, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(paired.logits[4], alone.logits[4])  # the odd one has no partner
    assert not torch.allclose(paired.logits[:4], alone.logits[:4])


def test_masks_are_unit_vectors_that_know_no_scale_and_no_neighbour():
    model, images = small(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        output = model(images)
        torch.testing.assert_close(output.responses.pow(2).sum(dim=1), torch.ones(3, 4, 4, dtype=torch.float64))
        maps = model.localize(output, torch.tensor([2, 0, 1]))
        assert tuple(maps) == model.maps == ("edam",)
        torch.testing.assert_close(maps["edam"][0], output.responses[0, 2].abs().float())
        single = torch.cat([model(images[i : i + 1]).logits for i in range(3)])
        torch.testing.assert_close(output.logits, single)
        model.masks.weight.mul_(7)
        torch.testing.assert_close(model(images).responses, output.responses)
        torch.testing.assert_close(OwnMaps(model)(images, None)[1, :3].double(), output.responses[1, :3].abs(),
                                   rtol=1e-6, atol=1e-6)  # fmt: skip
    with pytest.raises(ParameterError, match="class 3 asked of a model with 3"):
        model.localize(output, torch.tensor([0, 1, 3]))


def test_gradients_are_those_of_the_logits():
    model = small(classes=2, dropout=0.0)

    def logits(images):
        return model(images).logits

    assert torch.autograd.gradcheck(logits, torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True))


def test_the_loss_is_binary_cross_entropy_of_the_paired_images():
    model, images = small(dropout=0.0).train(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1]])
    order = [0, 2, 1, 3]
    with torch.no_grad():
        z = model(images[order]).logits
    t = labels[order]
    by_hand = [
        math.log1p(math.exp(-float(z[i, k]))) if t[i, k] else math.log1p(math.exp(float(z[i, k])))
        for i in range(4) for k in range(3)
    ]  # fmt: skip
    found = model.loss(model, {"image": images, "label": labels}).item()
    assert found == pytest.approx(np.mean(by_hand), rel=1e-5)
    held = {"image": images, "label": torch.tensor([0, 1, 0, 2])}
    one_hot = held | {"label": torch.nn.functional.one_hot(held["label"], 3)}
    torch.testing.assert_close(model.loss(model, held), model.loss(model, one_hot))


@pytest.mark.parametrize("share", [0.15, 0.4, 0.9])
def test_partners_share_a_class_and_none_is_left_who_could(share):
    labels = (torch.rand(17, 6, generator=torch.Generator().manual_seed(1)) < share).long()
    order = partners(labels).tolist()
    assert sorted(order) == list(range(17))
    common = [[bool((a & b).any()) for b in labels] for a in labels]
    paired = 0
    while paired + 1 < 17 and common[order[paired]][order[paired + 1]]:
        paired += 2
    alone = order[paired:]
    assert not any(common[a][b] for i, a in enumerate(alone) for b in alone[i + 1 :])
    assert alone == sorted(alone)


def test_positions_equal_loops():
    found = positions(7, 5)
    for n in range(7):
        for d in range(5):
            rate = 10000 ** (-(d - d % 2) / 5)
            assert float(found[n, d]) == pytest.approx((math.cos if d % 2 else math.sin)(n * rate), abs=1e-6)


def test_a_mask_of_the_other_sign_gives_the_same_weights():
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    batch = {"image": images, "label": torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]])}
    one, other = small(dropout=0.0).train(), small(dropout=0.0).train()
    with torch.no_grad():
        other.masks.weight[1].neg_()
        torch.testing.assert_close(one.loss(one, batch), other.loss(other, batch))
    assert not torch.equal(one.polarity, torch.zeros(3))
    torch.testing.assert_close(one.weight, other.weight)
    rows = one.masks.weight.detach().float().sum(dim=(2, 3))[:3]
    for k in range(3):
        n = one.train()(images).responses[batch["label"][:, k] > 0, k]
        torch.testing.assert_close(one.weight[k], rows[k] * float(torch.sign((n * n.abs()).sum())))
    extractor = ConvExtractor(one, one.weight)
    assert torch.equal(extractor(images), one.backbone(images))
    assert "polarity" in one.state_dict()


@pytest.mark.parametrize("multi", [False, True])
def test_training_reduces_the_loss_and_is_reproducible(multi):
    assert_learns_and_repeats("edam", multi, share=0.8, steps=15)


@pytest.mark.parametrize("options", [{"hidden": 7}, {"heads": 0}, {"hidden": 0}, {"width": 8}])
def test_bad_options_are_refused(options):
    with pytest.raises(ParameterError):
        create_method("edam", Tiny(), 3, **options)
