import pytest
import torch
from torch import nn

from wsolnb.backbones import create_backbone
from wsolnb.errors import ParameterError
from wsolnb.methods import mctformer
from wsolnb.methods.mctformer import MCTformer, refine


def plain_forward(model, images):
    """The transformer with its class tokens, from timm's own blocks where there is no mask."""
    vit = model.backbone.vit
    patches = vit.patch_embed(images)
    x = torch.cat([model.class_tokens.expand(len(images), -1, -1), patches + vit.pos_embed[:, 1:]], dim=1)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


@pytest.mark.parametrize(("name", "size"), [("vit_mini_plain", 64), ("deit_tiny", 64)])
def test_tokens_are_those_of_the_plain_transformer(name, size):
    torch.manual_seed(0)
    model = MCTformer(create_backbone(name, image_size=size), 4).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        output, x = model(images), plain_forward(model, images)
        side = size // model.backbone.patch_size
        torch.testing.assert_close(output.token_logits, x[:, :4].mean(dim=2), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.features.flatten(2).mT, x[:, 4:], atol=1e-4, rtol=1e-4)
    assert output.attention.shape == (2, 3, 4, side, side)
    assert output.affinity.shape == (2, side**2, side**2)
    maps = model.localize(output, torch.tensor([3, 1]))
    expected = output.attention[0, :, 3].mean(dim=0) * output.semantic_map[0, 3].relu()
    torch.testing.assert_close(maps["mctformer"][0], expected)


def test_attention_by_loops():
    torch.manual_seed(0)
    model = MCTformer(create_backbone("vit_mini_plain", image_size=32), 2, layers=1).eval().double()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    seen = []
    handle = model.backbone.vit.blocks[-1].norm1.register_forward_hook(lambda _m, _i, value: seen.append(value))
    with torch.no_grad():
        output = model(images)
    handle.remove()
    attention, x = model.backbone.vit.blocks[-1].attn, seen[0][0]
    heads, dim = attention.num_heads, x.shape[1] // attention.num_heads
    with torch.no_grad():
        q, k, _ = attention.qkv(x).chunk(3, dim=1)
    for label in range(2):
        row = torch.zeros(16, dtype=torch.float64)
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            scores = torch.stack([q[label, part] @ k[token, part] / dim**0.5 for token in range(18)])
            row += scores.softmax(dim=0)[2:] / heads
        torch.testing.assert_close(output.attention[0, 0, label].flatten().double(), row, atol=1e-5, rtol=1e-4)


def test_masks_keep_patches_local_with_many_class_tokens():
    model = MCTformer(create_backbone("vit_mini", image_size=64, pretrained=True), 3).eval()
    one, many = model.backbone.mixing.masks(8, 8, 4), model._masks(8, 8, 3, torch.device("cpu"))
    for old, new in zip(one, many, strict=True):
        if old is None:
            assert new is None
            continue
        assert new.shape == (67, 67)
        assert torch.equal(new[3:, 3:], old[1:, 1:])
        assert new[:3].all()
        assert all(torch.equal(new[3:, k], old[1:, 0]) for k in range(3))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images).features
        model.class_tokens += 1  # patches do not see class tokens, whatever these are
        torch.testing.assert_close(model(images).features, before)


def test_other_sizes_and_starts():
    backbone = create_backbone("vit_mini", image_size=64, pretrained=True)
    model = MCTformer(backbone, 5).eval()
    start = backbone.vit.cls_token + backbone.vit.pos_embed[:, :1]
    assert (model.class_tokens - start).abs().max() < 0.1
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 64)).semantic_map.shape == (1, 5, 12, 8)
    assert mctformer.PatchTokens(model)(torch.randn(1, 3, 50, 64)).shape == (1, 96, 6, 8)
    with pytest.raises(ParameterError, match="multiples of 8"):
        model(torch.randn(1, 3, 60, 64))
    with pytest.raises(ParameterError, match="ConvBackbone"):
        MCTformer(create_backbone("resnet_mini"), 5)


def test_refinement_and_loss_by_loops():
    torch.manual_seed(0)
    maps, affinity = torch.rand(1, 2, 2, 3), torch.rand(1, 6, 6)
    found = refine(maps, affinity)
    for k in range(2):
        for n in range(6):
            expected = sum(affinity[0, n, m] * maps[0, k].flatten()[m] for m in range(6))
            assert float(found[0, k].flatten()[n]) == pytest.approx(float(expected), rel=1e-5)
    model = MCTformer(create_backbone("vit_mini_plain", image_size=32), 3)
    batch = {"image": torch.randn(2, 3, 32, 32), "label": torch.tensor([[1.0, 0, 1], [0, 1, 0]])}
    model.eval()
    loss, output = model.loss(model, batch), model(batch["image"])
    expected = 0.0
    for logits in (output.token_logits, output.patch_logits):
        p, y = logits.sigmoid(), batch["label"]
        expected += float(-(y * p.log() + (1 - y) * (1 - p).log()).mean())
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "backbone.vit.cls_token")
    assert isinstance(model.head, nn.Conv2d)
    for labels in ([2, 0], [1, 1, 2]):  # of single-label data sets; also as many images as there are classes
        images = torch.randn(len(labels), 3, 32, 32)
        rows = torch.tensor([[float(c == label) for c in range(3)] for label in labels])
        by_index = model.loss(model, {"image": images, "label": torch.tensor(labels)})
        assert float(by_index) == float(model.loss(model, {"image": images, "label": rows}))


def test_without_final_norm_and_without_patch_classifier():
    backbone = create_backbone("vit_mini_plain", image_size=32)
    backbone.vit.norm.weight.data.mul_(3)
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([2, 0])
    with_norm = MCTformer(backbone, 3).eval()
    without = MCTformer(backbone, 3, final_norm=False).eval()
    without.load_state_dict(with_norm.state_dict())
    features = without(images).features.flatten(2).mT
    torch.testing.assert_close(backbone.vit.norm(features), with_norm(images).features.flatten(2).mT)

    first = MCTformer(backbone, 3, version=1).eval()
    first.load_state_dict({k: v for k, v in with_norm.state_dict().items() if not k.startswith("semantic.")})
    output, labels = first(images), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    assert output.semantic_map is None
    assert output.patch_logits is None
    torch.testing.assert_close(output.logits, with_norm(images).token_logits)
    maps = first.localize(output, classes)
    assert first.maps == tuple(maps) == ("attention",)
    torch.testing.assert_close(maps["attention"], with_norm.localize(with_norm(images), classes)["attention"])
    p = output.logits.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(first.loss(first, {"image": images, "label": labels}), expected)
    assert [*first.head.parameters()] == []
    with pytest.raises(ParameterError, match="MCTformer-V1 does not classify its patches"):
        mctformer.PatchTokens(first)
    with pytest.raises(ParameterError, match="version 3"):
        MCTformer(backbone, 3, version=3)
