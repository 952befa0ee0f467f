from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wsolnb.backbones import create_backbone
from wsolnb.errors import ParameterError
from wsolnb.methods import create_method, ppd
from wsolnb.methods.ppd import PPD, LinearProbe, ProxyProbingDecoder, logistic
from wsolnb.train.loop import TrainingConfig, train


def count(module):
    return sum(p.numel() for p in module.parameters())


def mini(seed=0):
    torch.manual_seed(seed)
    return create_backbone("vit_mini_dino", image_size=64)


def whole():
    return PPD(mini(), 5, ProxyProbingDecoder(96, 16, 8), LinearProbe(96, 5)).eval()


def test_parameters_of_the_published_sizes():
    """Written out; the paper's 16.76 M are the decoder's divided by 2^20, its 0.30 M the probe's without patches."""
    decoder = 9 * 384 * 2048 + 2 * 2048 + 16 * 256 * (2048 + 256 + 256) + 3 * 2 * 256 + 257
    assert count(ProxyProbingDecoder(384)) == decoder == 17_569_537
    assert decoder / 2**20 == pytest.approx(16.756, abs=5e-4)
    assert count(LinearProbe(384, 200)) == (5 * 384 + 1) * 200 == 384_200
    assert count(LinearProbe(384, 200, pool=False)) == (4 * 384 + 1) * 200 == 307_400


@pytest.mark.parametrize(("side", "out"), [(14, 56), (16, 64), (28, 112), (7, 32)])
def test_the_map_has_four_times_the_grid(side, out):
    decoder = ProxyProbingDecoder(12, 8, 4).eval()
    assert decoder(torch.randn(2, 12, side, side)).shape == (2, out, out)


def test_the_decoder_follows_the_written_out_layers():
    torch.manual_seed(0)
    decoder = ProxyProbingDecoder(6, 5, 4).double().eval()
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    first, norm, _, _, up, last = decoder.layers
    y = (F.conv2d(x, first.weight, padding=1) / (1 + norm.eps) ** 0.5).clamp(min=0)
    padded = F.pad(y, (1, 1, 1, 1), value=-np.inf)
    y = torch.zeros(2, 5, 4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            y[:, :, i, j] = padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax((2, 3))
    for layer in range(3):
        weight, side = up[3 * layer].weight, y.shape[2]
        spread = torch.zeros(2, weight.shape[1], 2 * side + 2, 2 * side + 2, dtype=torch.float64)
        for i in range(side):
            for j in range(side):
                spread[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += torch.einsum(
                    "bc,cohw->bohw", y[:, :, i, j], weight
                )
        y = (spread[:, :, 1:-1, 1:-1] / (1 + up[3 * layer + 1].eps) ** 0.5).clamp(min=0)
    expected = torch.einsum("bchw,c->bhw", y, last.weight[0, :, 0, 0]) + last.bias
    assert torch.allclose(decoder(x), expected, atol=1e-10)


def test_the_probe_reads_class_tokens_of_four_blocks_and_the_mean_patch():
    model = whole()
    images = torch.randn(2, 3, 64, 64)
    vit, backbone = model.frozen.backbone.vit, model.frozen.backbone
    with torch.no_grad():
        x = vit._pos_embed(vit.patch_embed(images))
        features = []
        for block, mask in zip(vit.blocks, backbone.masks, strict=True):
            x = block(x, attn_mask=mask)
            features.append(vit.norm(x)[:, 0])
        features.append(vit.norm(x)[:, 1:].sum(dim=1) / 64)
        expected = torch.cat(features, dim=1) @ model.probe.linear.weight.T + model.probe.linear.bias
        assert torch.allclose(model(images).logits, expected, atol=1e-5)


def test_class_and_map_are_separate_passes_over_separate_images():
    model, runs = whole(), []
    model.frozen.backbone.vit.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    images, class_images = torch.randn(2, 2, 3, 64, 64).unbind(0)
    with torch.inference_mode():
        output = model(images, class_images)
        assert len(runs) == 2
        assert torch.equal(output.logits, model.classify(class_images))
        assert torch.equal(output.proxy, model.draw(images))
        assert not torch.allclose(output.logits, model(images).logits)
    found = model.localize(output, torch.tensor([0, 3]))["proxy"]
    assert torch.equal(found, output.proxy)


def test_parts_can_be_missing():
    images = torch.randn(2, 3, 64, 64)
    only = PPD(mini(), 5, decoder=ProxyProbingDecoder(96, 16, 8)).eval()
    assert only(images).logits.tolist() == torch.zeros(2, 5).tolist()
    assert only.head is only.decoder
    only = PPD(mini(), 5, probe=LinearProbe(96, 5)).eval()
    output = only(images)
    assert output.proxy is None
    assert only.head is only.probe
    assert only.localize(output, torch.tensor([0, 1]))["proxy"].abs().sum() == 0
    with pytest.raises(ParameterError, match="neither"):
        PPD(mini(), 5)


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_the_loss_is_half_the_squared_error_to_the_attention(threshold):
    model = create_method("ppd", mini(), 5, part="decoder", hidden=16, channels=8, threshold=threshold).eval()
    images = torch.randn(2, 3, 64, 64)
    calls = []

    def wrapper(images):  # as several processes have it: a function, without the model's parts
        calls.append(images)
        return model(images)

    loss = model.loss(wrapper, {"image": images})
    assert len(calls) == 1
    with torch.no_grad():
        rows = model.frozen.backbone(images).attention[:, -1].mean(dim=1).view(2, 8, 8)
        drawn = model(images).proxy
    plain = 0.0
    for image in range(2):
        target = (rows[image] - rows[image].min()) / (rows[image].max() - rows[image].min())
        target = F.interpolate(target[None, None], size=(32, 32), mode="bilinear")[0, 0]
        for row in range(32):
            for column in range(32):
                wanted = float(target[row, column])
                wanted = wanted if threshold is None else float(wanted >= threshold)
                plain += (float(drawn[image, row, column]) - wanted) ** 2
    assert float(loss) == pytest.approx(0.5 * plain / (2 * 32 * 32), rel=1e-4)


def test_decoder_and_probe_learn_through_the_shared_loop(tmp_path):
    torch.manual_seed(3)
    images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 2
    images[labels == 1] += 2
    loader = [{"image": images[:8], "label": labels[:8]}, {"image": images[8:], "label": labels[8:]}]
    config = TrainingConfig(epochs=8, lr=0.01, device="cpu", precision="fp32")
    model = PPD(mini(), 2, decoder=ProxyProbingDecoder(96, 16, 8))
    before = {k: v.clone() for k, v in model.frozen.state_dict().items()}
    history = train(model, loader, config, tmp_path / "decoder", progress=False)
    assert history.loss.iloc[-1] < 0.5 * history.loss.iloc[0]
    model.probe = LinearProbe(96, 2)
    model.decoder = None
    history = train(model, loader, config, tmp_path / "probe", progress=False)
    assert history.loss.iloc[-1] < 0.5 * history.loss.iloc[0]
    assert all(torch.equal(v, before[k]) for k, v in model.frozen.state_dict().items())


def test_a_part_is_made_by_its_name():
    decoder = create_method("ppd", mini(), 5, part="decoder", hidden=16, channels=8)
    assert decoder.probe is None
    assert (decoder.decoder.layers[0].out_channels, decoder.decoder.layers[-1].in_channels) == (16, 8)
    probe = create_method("ppd", mini(), 5, part="probe").eval()
    assert probe.decoder is None
    assert not any(model.learns_from_masks for model in (decoder, probe))
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 4])
    expected = F.cross_entropy(probe(images).logits, labels)
    assert torch.allclose(probe.loss(probe, {"image": images, "label": labels}), expected)
    with pytest.raises(ParameterError, match="no part 'generator'"):
        create_method("ppd", mini(), 5, part="generator")
    with pytest.raises(ParameterError, match="each of them alone"):
        whole().loss(None, {"image": images})


# The probe at the minimum of its loss


def clouds(count, classes=5, seed=0):
    """Features (n, 12) of overlapping clouds, in dimensions of very different scale, and labels."""
    labels = np.arange(count) % classes
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, 12))
    return (centres[labels] + rng.normal(size=(count, 12))) * 10.0 ** np.linspace(-2, 2, 12) + 3, labels


def predicted(features, weight, bias):
    return (features @ weight.T + bias).argmax(axis=1)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_logistic_regression_is_scikit_learns(classes, c):
    (features, labels), (held, truth) = clouds(200, classes), clouds(300, classes, seed=1)
    weight, bias = logistic(features, labels, c)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8, max_iter=10_000))
    reference.fit(features, labels)
    assert weight.shape == (classes, 12)
    assert np.array_equal(predicted(held, weight, bias), reference.predict(held))
    probabilities = torch.from_numpy(held @ weight.T + bias).softmax(dim=1).numpy()
    assert np.allclose(probabilities, reference.predict_proba(held), atol=1e-3)
    assert (predicted(held, weight, bias) == truth).mean() > 0.7


def test_logistic_regression_is_at_the_minimum():
    features, labels = clouds(200)
    weight, bias = (torch.from_numpy(part) for part in logistic(features, labels, 0.1))
    mean, scale = features.mean(axis=0), features.std(axis=0)
    x, y = torch.from_numpy((features - mean) / scale), torch.from_numpy(labels)
    weight, bias = weight * torch.from_numpy(scale), bias + weight @ torch.from_numpy(mean)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    loss = F.cross_entropy(x @ weight.T + bias, y) + 0.5 * weight.square().sum() / (0.1 * len(y))
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 2e-5


def test_the_scale_of_the_features_does_not_matter():
    (features, labels), (held, _) = clouds(200), clouds(300, seed=1)
    plain = predicted(held, *logistic(features, labels, 0.1))
    for scale in (1000, 1e-3):
        assert np.array_equal(predicted(scale * held, *logistic(scale * features, labels, 0.1)), plain)


def test_permuted_labels_give_chance():
    (features, labels), (held, truth) = clouds(200), clouds(1000, seed=1)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert abs((predicted(held, *logistic(features, shuffled, 1.0)) == truth).mean() - 0.2) < 0.06


def test_a_fit_that_has_not_converged_is_an_error(monkeypatch):
    monkeypatch.setattr(ppd, "LogisticRegression", lambda **options: LogisticRegression(**{**options, "max_iter": 1}))
    with pytest.warns(match="converge"), pytest.raises(ParameterError, match="not converged"):
        logistic(*clouds(50), 1.0)


def test_c_is_chosen_on_validation_images(tmp_path, monkeypatch):
    """The maker is given no test images. Of validation labels that a fit of one C predicts, this C is chosen."""
    monkeypatch.setattr(ppd, "described", lambda model, data, transform: data.features)
    many = 5 * 96
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 5
    features = rng.normal(size=(60, many)).astype(np.float32)
    held = rng.normal(size=(400, many)).astype(np.float32)
    train = SimpleNamespace(features=(features, labels), class_names="abcde")
    for c in (1e-3, 1e-1):
        weight, bias = logistic(features, labels, c)
        val = SimpleNamespace(features=(held, predicted(held, weight, bias)))
        folder = tmp_path / str(c)
        folder.mkdir()
        ppd.probe_maker(mini(), train, val, None)(folder)
        choice = pd.read_csv(folder / "choice.csv")
        assert tuple(choice.C) == ppd.C_GRID
        assert choice.C[choice["validation top-1"].idxmax()] == c
        probe = ppd.read_probe(mini(), 5, folder).probe.linear
        assert np.allclose(probe.weight.detach().numpy(), weight, atol=1e-6)
        assert np.allclose(probe.bias.detach().numpy(), bias, atol=1e-6)
    train = SimpleNamespace(features=(features, labels), class_names="abcdef")
    with pytest.raises(ParameterError, match=r"\[5\] have no training image"):
        ppd.probe_maker(mini(), train, val, None)(tmp_path)


def test_the_probe_classifies_what_the_model_describes():
    model = whole()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        features = model.describe(images)
        assert features.shape == (3, 5 * 96)
        assert torch.allclose(model.probe.linear(features), model.classify(images))
