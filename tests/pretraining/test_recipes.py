import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from wsolnb import backbones, weights
from wsolnb.backbones import create_backbone
from wsolnb.data import aviary, open_dataset
from wsolnb.errors import ParameterError, WeightsError
from wsolnb.notebook import runs
from wsolnb.pretraining import recipes as pretraining
from wsolnb.pretraining import scenes as creatures
from wsolnb.pretraining.recipes import RECIPES, SceneLoader, SelfDistillation, SelfDistilled, SupervisedPretext
from wsolnb.pretraining.scenes import CreatureConfig
from wsolnb.train.loop import TrainingConfig

TINY = CreatureConfig(scenes=8, frames=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return creatures.load(TINY, tmp_path_factory.mktemp("cache"), workers=1)


def nearest_colour(lab):
    distances = [sum((a - b) ** 2 for a, b in zip(lab, anchor, strict=True)) for anchor in pretraining.PALETTE.tolist()]
    return distances.index(min(distances))


def test_token_targets_equal_counts_of_pixels(scenes):
    batch = next(iter(SceneLoader(scenes, 4, seed=1, truth=True)))
    target = pretraining.token_targets(batch, (14, 14))
    for image in range(4):
        for token in range(196):
            row, column = divmod(token, 14)
            window = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
            owner, parts = batch["owner"][image][window].flatten(), batch["parts"][image][window].flatten()
            textures, part_share = [0.0] * 9, [0.0] * 4
            for pixel in range(64):
                who = int(owner[pixel])
                textures[0 if who == 0 else 1 + int(batch["textures"][image, who - 1])] += 1 / 64
                part_share[int(parts[pixel])] += 1 / 64
            np.testing.assert_allclose(target["textures"][image, token], textures, atol=1e-6)
            np.testing.assert_allclose(target["parts"][image, token], part_share, atol=1e-6)
            assert target["object"][image, token] == pytest.approx(float((owner > 0).float().mean()), abs=1e-6)
            if (owner > 0).any():
                most = max(range(1, 4), key=lambda who: int((owner == who).sum())) - 1
                worn = [likeness(c.tolist()) for c in batch["colours"][image, most]]
                np.testing.assert_allclose(target["worn"][image, token], np.max(worn, axis=0), atol=1e-5)
                np.testing.assert_allclose(target["sash"][image, token], worn[2:], atol=1e-5)


def likeness(lab):
    """Of one colour to each of the palette's: a Gaussian of the distance, divided by their sum."""
    if math.isnan(lab[0]):
        return [0.0] * 15
    weights = [
        math.exp(-sum((a - b) ** 2 for a, b in zip(lab, c, strict=True)) / 450) for c in pretraining.PALETTE.tolist()
    ]
    return [weight / sum(weights) for weight in weights]


def test_scene_labels_are_the_union_of_its_creatures(scenes):
    batch = next(iter(SceneLoader(scenes, 8, seed=1, truth=True)))
    labels = pretraining.scene_target(batch)
    for image in range(8):
        expected = {int(t) for t in batch["textures"][image] if t >= 0}
        expected |= {
            8 + nearest_colour(c.tolist()) for c in batch["colours"][image].flatten(0, 1) if not c.isnan().any()
        }
        assert set(labels[image].nonzero().flatten().tolist()) == expected


def test_composition_counts_area(scenes):
    images = torch.full((1, 3, 16, 16), -2.0)
    images[:, 0, :8, 8:] = 2.0  # the second of four tokens is red
    shares = pretraining.composition(images, torch.tensor([[0.5, 1.0, 0.0, 0.0]]), (2, 2))
    assert shares.sum() == pytest.approx(1)
    assert shares[0, 0] == pytest.approx(1 / 3)
    assert shares[0, 18] == pytest.approx(2 / 3)
    assert pretraining.composition(images, torch.zeros(1, 4), (2, 2)).sum() == 0


def test_places_count_area(scenes):
    batch = next(iter(SceneLoader(scenes, 4, seed=1, truth=True)))
    share = pretraining.token_targets(batch, (14, 14))["object"]
    places = pretraining.places(share, (14, 14))
    for image in range(4):
        area = [[0.0] * 7 for _ in range(7)]
        for row in range(112):
            for column in range(112):
                area[row // 16][column // 16] += float(batch["owner"][image, row, column] > 0)
        total = sum(map(sum, area))
        np.testing.assert_allclose(places[image].unflatten(0, (7, 7)), np.array(area) / total, atol=1e-6)
    assert pretraining.places(torch.zeros(1, 196), (14, 14)).sum() == 0


def test_colours_are_asked_of_all_of_a_creature_and_denied_on_the_background(scenes):
    torch.manual_seed(0)
    model = SupervisedPretext(create_backbone("vit_mini"), RECIPES["vit_mini"].weights).eval()
    batch = next(iter(SceneLoader(scenes, 2, seed=0, truth=True)))
    target = pretraining.token_targets(batch, (14, 14))
    with torch.no_grad():
        loss = float(model.losses(batch)["colour"])
        patches = model.backbone(batch["image"][:, 0]).patches
        worn, sash = (model.projection[name](patches).double() for name in ("worn", "sash"))
    asked, bands, counted = [], 0.0, 0.0
    for image in range(2):
        for token in range(196):
            share = float(target["object"][image, token])
            for colour in range(15):
                p = 1 / (1 + math.exp(-float(worn[image, token, colour])))
                wears = share * float(target["worn"][image, token, colour])
                asked.append(-wears * math.log(p) - (1 - wears) * math.log(1 - p))
            for band in range(2):
                scores = sash[image, token, 15 * band : 15 * band + 15].tolist()
                for colour in range(15):
                    wears = share * float(target["sash"][image, token, band, colour])
                    bands += wears * (math.log(sum(map(math.exp, scores))) - scores[colour])
                    counted += wears
    assert loss == pytest.approx(np.mean(asked) + bands / counted, rel=1e-5)


def test_codes_are_the_colours_on_objects_and_zero_on_the_background():
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(1, 4, 45, generator=generator)
    share = torch.tensor([[0.0, 1.0, 0.25, 0.0]])
    target = {
        "object": share,
        "worn": torch.rand(1, 4, 15, generator=generator),
        "sash": torch.rand(1, 4, 2, 15, generator=generator),
    }
    wrong, mean = [], [0.0] * 45
    colours = [[*target["worn"][0, n].tolist(), *target["sash"][0, n].flatten().tolist()] for n in range(4)]
    for k in range(45):
        mean[k] = (colours[1][k] + 0.25 * colours[2][k]) / 1.25
    for n in range(4):
        s = float(share[0, n])
        wrong.append(sum((float(found[0, n, k]) - s * (colours[n][k] - mean[k])) ** 2 for k in range(45)))
    expected = (wrong[1] + 0.25 * wrong[2]) / 1.25 + (wrong[0] + 0.75 * wrong[2] + wrong[3]) / 2.75
    assert float(pretraining.code_loss(found, target)) == pytest.approx(expected, rel=1e-5)
    exact = share[..., None] * (torch.tensor([colours]) - torch.tensor(mean))
    assert float(pretraining.code_loss(exact, target)) == pytest.approx(0, abs=1e-9)


def test_attention_is_asked_for_all_of_the_creatures_area(scenes):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(3, 5, generator=generator).softmax(dim=1)
    share = torch.tensor([[0.0, 1.0, 0.5, 0.0, 0.0], [0.0] * 5, [1.0, 1.0, 1.0, 1.0, 0.25]])
    terms = []
    for image in (0, 2):  # the second scene has no creature
        told = sum(float(share[image, n]) * math.log(float(weights[image, n])) for n in range(5))
        terms.append(-told / float(share[image].sum()))
    assert float(pretraining.attend_loss(weights, share)) == pytest.approx(sum(terms) / 2, rel=1e-5)
    assert float(pretraining.attend_loss(weights[:1], torch.zeros(1, 5))) == 0
    even = share[:1] / share[:1].sum()  # nothing is better than attention shared out evenly
    assert pretraining.attend_loss(even, share[:1]) < pretraining.attend_loss(weights[:1], share[:1])


def test_varied_layers_and_heads_mix_what_each_looks_at():
    torch.manual_seed(0)
    patches, attention = torch.randn(2, 5, 3), torch.rand(2, 2, 2, 5)
    tokens = backbones.Tokens(patches, torch.zeros(2, 3), attention)
    plain, varied = pretraining.looked_at(tokens), pretraining.looked_at(tokens, vary=True)
    assert not torch.allclose(plain, varied)
    rows = attention.flatten(1, 2)
    each = (rows / rows.sum(dim=2, keepdim=True)) @ patches  # (B, 4, D): what every single one looks at
    # Four points in three dimensions: the only weights that sum to one and give the mixture must not be negative.
    one = torch.ones(2, 4, 1)
    share = torch.linalg.solve(torch.cat([each, one], dim=2).mT, torch.cat([varied, one[:, 0]], dim=1))
    assert (share > 0).all()
    same = backbones.Tokens(patches, torch.zeros(2, 3), attention[:, :1, :1].expand(-1, 2, 2, -1))
    torch.testing.assert_close(pretraining.looked_at(same, vary=True), pretraining.looked_at(same))


def test_batches_repeat_by_seed_and_epoch_and_mirror_truth_with_the_image(scenes):
    loader = SceneLoader(scenes, 4, seed=3, truth=True)
    first, second = list(loader), list(loader)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)
    loader.set_epoch(1)
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, loader, strict=True))
    plain = {row_sums(scenes["owner"][i, 0]): i for i in range(8)}
    mirrored = set()
    for seed in range(6):
        for batch in SceneLoader(scenes, 4, seed, truth=True):
            for owner in batch["owner"].numpy():
                original = scenes["owner"][plain[row_sums(owner)], 0]
                same, turned = np.array_equal(owner, original), np.array_equal(owner, original[:, ::-1])
                assert same or turned
                mirrored.add(turned and not same)
    assert mirrored == {True, False}


def row_sums(owner):
    """A fingerprint that mirroring does not change."""
    return tuple(np.asarray(owner).sum(axis=1).tolist())


@pytest.mark.parametrize("name", ["vit_mini", "resnet_mini"])
def test_supervised_recipe_learns_a_batch(scenes, name):
    torch.manual_seed(0)
    options = {"output_stride": 8} if name == "resnet_mini" else {}
    model = SupervisedPretext(create_backbone(name, **options), RECIPES["resnet_mini"].weights)
    batch = next(iter(SceneLoader(scenes, 8, seed=0, truth=True)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = {term: value.item() for term, value in model.losses(batch).items()}
    for _ in range(12):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    after = {term: value.item() for term, value in model.losses(batch).items()}
    assert all(after[term] < before[term] for term in before), (before, after)
    model.eval()  # in training, layers and heads count by random weights
    total = sum(RECIPES["resnet_mini"].weights[term] * value.item() for term, value in model.losses(batch).items())
    assert model(batch).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("loss", ["contrast", "prototypes"])
def test_self_distillation_sees_neither_labels_nor_masks(scenes, loss):
    torch.manual_seed(0)
    model = SelfDistilled(create_backbone("vit_mini"), SelfDistillation(loss=loss, prototypes=16), steps=10, seed=0)
    batch = next(iter(SceneLoader(scenes, 8, seed=0, truth=False)))
    assert set(batch) == {"image"}
    value = model(batch)
    value.backward()
    assert math.isfinite(value.item())
    assert all(p.grad is None for p in model.teacher.parameters())
    assert model.backbone.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert model.backbone.vit.pos_embed.grad.abs().sum() > 0


def seen(backbone, image):
    """What the class token looks at, token by token: (1, D)."""
    patches, _, attention = pretraining.forward_view(backbone, image[None])
    total, weight = torch.zeros(patches.shape[2]), 0.0
    for n in range(patches.shape[1]):
        share = float(attention[0, :, :, n].mean())
        total, weight = total + share * patches[0, n], weight + share
    return (total / weight)[None]


def test_the_contrast_equals_loops_over_pairs(scenes):
    torch.manual_seed(0)
    config = SelfDistillation(local_crops=1, momentum=1.0)
    model = SelfDistilled(create_backbone("vit_mini"), config, steps=10, seed=0).eval()
    images = next(iter(SceneLoader(scenes, 3, seed=0, truth=False)))["image"]
    wide, narrow = model.views(images)
    with torch.no_grad():
        student = [[model.projection(seen(model.backbone, v[i]))[0] for i in range(3)] for v in wide + narrow]
        teacher = [[model.teacher[1](seen(model.teacher[0], v[i]))[0] for i in range(3)] for v in wide]
        terms = []
        for i in range(2):
            for j in range(3):
                if i == j:
                    continue
                for scene in range(3):
                    scores = [float(student[j][scene] @ teacher[i][other]) / config.temperature for other in range(3)]
                    terms.append(math.log(sum(math.exp(s) for s in scores)) - scores[scene])
        assert float(model({"image": images})) == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def slow_co_attention(attention, patches, others, width, steepness):
    """What `co_attention` says, patch by patch, in float64."""
    attention, patches = attention.double().numpy(), patches.double().numpy()
    rows, count, _ = patches.shape
    batch = rows // 2

    def cosine(a, b):
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    def standardised(values):
        mean = sum(values) / len(values)
        return [(v - mean) / math.sqrt(sum((w - mean) ** 2 for w in values) / (len(values) - 1)) for v in values]

    mean = patches.reshape(-1, patches.shape[2]).mean(axis=0)
    result = []
    for row in range(rows):
        frame, scene = divmod(row, batch)
        common = []
        for patch in patches[row]:
            best = []
            for shift in range(others + 1):  # the scene's own other frame first, then those of scenes before it
                there = patches[(1 - frame) * batch + (scene - shift) % batch]
                best.append(max(cosine(patch, other) for other in there))
            common.append(best[0] - sum(best[1:]) / others)
        looked = standardised([math.log(a) for a in attention[row]])
        score = [a + b for a, b in zip(looked, standardised(common), strict=True)]
        handed = []
        for patch in patches[row]:
            likeness = [math.exp(cosine(patch - mean, other - mean) / width) for other in patches[row]]
            handed.append(sum(w * v for w, v in zip(likeness, score, strict=True)) / sum(likeness))
        score = standardised(handed)
        low, high = min(score), max(score)
        for _ in range(8):
            upper = [v for v in score if v > (low + high) / 2]
            lower = [v for v in score if v <= (low + high) / 2]
            low, high = sum(lower) / len(lower), sum(upper) / len(upper)
        member = [1 / (1 + math.exp(-steepness * (v - (low + high) / 2) / (high - low))) for v in score]
        result.append([m / sum(member) for m in member])
        assert len(result[-1]) == count
    return torch.tensor(result, dtype=torch.float64)


def test_co_attention_equals_loops_over_patches():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(8, 12, generator=generator).softmax(dim=1)
    patches = torch.randn(8, 12, 6, generator=generator)
    found = pretraining.co_attention(attention, patches, others=3, width=0.3, steepness=4.0)
    expected = slow_co_attention(attention, patches, 3, 0.3, 4.0)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_co_attention_is_even_over_what_both_frames_have():
    generator = torch.Generator().manual_seed(1)
    scenes, patches_each, dim = 12, 30, 32
    ground = torch.randn(2 * scenes, 1, dim, generator=generator).repeat(1, patches_each, 1)  # of each frame its own
    ground = ground + 0.3 * torch.randn(ground.shape, generator=generator)
    creature = torch.randn(scenes, 1, dim, generator=generator).repeat(2, 1, 1)
    truth = torch.zeros(2 * scenes, patches_each, dtype=torch.bool)
    for row in range(2 * scenes):
        truth[row, torch.randperm(patches_each, generator=generator)[:8]] = True
    noise = 0.3 * torch.randn(ground.shape, generator=generator)
    patches = torch.where(truth[..., None], creature + noise, ground)
    attention = (0.1 * torch.randn(truth.shape, generator=generator)).softmax(dim=1)  # it knows nothing
    told = pretraining.co_attention(attention, patches)
    assert (told * truth).sum(dim=1).min() > 0.95
    on = told[truth].view(2 * scenes, 8)
    assert (on.amax(dim=1) / on.amin(dim=1)).max() < 1.2
    # Without anything in common there is nothing to find: no more there than the share of its area.
    blind = pretraining.co_attention(attention, ground)
    assert abs(float((blind * truth).sum(dim=1).mean()) - 8 / patches_each) < 0.1


def test_co_attention_needs_pairs_and_other_scenes():
    patches = torch.randn(8, 12, 6)
    with pytest.raises(ParameterError, match="more than one scene"):
        pretraining.co_attention(torch.rand(2, 12), patches[:2])
    with pytest.raises(ParameterError, match="two frames"):
        pretraining.co_attention(torch.rand(7, 12), patches[:7])
    attention = torch.rand(8, 12)  # of four scenes: three others, whatever is asked for
    all_others = pretraining.co_attention(attention, patches, others=3)
    torch.testing.assert_close(pretraining.co_attention(attention, patches), all_others)
    with pytest.raises(ParameterError, match="4 layers"):
        pretraining.forward_halfway(create_backbone("vit_mini"), torch.rand(1, 3, 112, 112), 4)
    recipe = RECIPES["vit_mini_dino_co"].model_dump()
    for change in ({"scenes": {**recipe["scenes"], "frames": 1}}, {"photographs": "tiny_imagenet"}):
        with pytest.raises(ValueError, match="two frames"):
            pretraining.PretrainingConfig.model_validate(recipe | change)
    with pytest.raises(ValueError, match="resnet_mini has no position embedding"):
        pretraining.PretrainingConfig.model_validate(RECIPES["resnet_mini"].model_dump() | {"positions": 0.5})
    assert pretraining.on_photographs("vit_mini_dino_co", "tiny_imagenet").distillation.common == 0


def test_what_frames_have_in_common_tells_attention_where(tmp_path):
    scenes = creatures.load(TINY.model_copy(update={"scenes": 12}), tmp_path, workers=1)
    images = next(iter(SceneLoader(scenes, 12, seed=0, truth=False)))["image"]
    values, grads = {}, {}
    for common in (0.0, 2.0):
        torch.manual_seed(0)
        config = SelfDistillation(momentum=1.0, common=common)
        model = SelfDistilled(create_backbone("vit_mini"), config, steps=20, seed=0).eval()
        loss = model({"image": images})
        loss.backward()
        values[common] = float(loss.detach())
        grads[common] = model.backbone.vit.blocks[3].attn.qkv.weight.grad.clone()
        assert all(p.grad is None for p in model.teacher.parameters())
    model.step.zero_()
    wide = torch.cat(model.views(images)[0])
    with torch.no_grad():
        tokens, halfway = pretraining.forward_halfway(model.teacher[0], wide, 2)
        told = pretraining.co_attention(pretraining.look(tokens), halfway)
        missed = -(told * pretraining.look(pretraining.forward_view(model.backbone, wide)).log()).sum(dim=1).mean()
    assert halfway.shape == (24, (wide.shape[-1] // 8) ** 2, model.backbone.dim)
    # One step of two that lead to the full weight, which is 2.
    assert values[2.0] - values[0.0] == pytest.approx(2.0 * 0.5 * float(missed), rel=1e-4)
    assert (grads[2.0] - grads[0.0]).abs().sum() > 0


def test_halfway_patches_are_those_between_two_layers():
    backbone = create_backbone("vit_mini", pretrained=True).eval()
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, halfway = pretraining.forward_halfway(backbone, images, 3)
        x = torch.cat([torch.zeros(2, 1, backbone.dim), halfway], dim=1)
        # Patches do not read the class token, so the rest of the network can go on without it.
        x = backbones.run_block(backbone.vit.blocks[3], x, backbone.masks[3])[0]
        torch.testing.assert_close(backbone.vit.norm(x)[:, 1:], tokens.patches, atol=1e-4, rtol=1e-4)
    assert not backbone.vit.blocks[3].norm1._forward_pre_hooks


def test_the_teacher_is_the_moving_average_of_the_student(scenes):
    model = SelfDistilled(create_backbone("vit_mini"), SelfDistillation(momentum=0.9), steps=10, seed=0)
    with torch.no_grad():
        model.backbone.vit.cls_token.add_(1.0)
    before = model.teacher[0].vit.cls_token.clone()
    model._move_teacher()
    torch.testing.assert_close(model.teacher[0].vit.cls_token, 0.9 * before + 0.1 * model.backbone.vit.cls_token)
    model.step += 10  # at the end of the training the teacher stands still
    before = model.teacher[0].vit.cls_token.clone()
    model._move_teacher()
    torch.testing.assert_close(model.teacher[0].vit.cls_token, before)


def test_sinkhorn_balances_prototypes():
    logits = torch.randn(40, 8) + torch.arange(8.0)
    plan = pretraining.sinkhorn(logits, rounds=60)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(40), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(dim=0), torch.full((8,), 5.0), atol=1e-2, rtol=0)


def test_crops_show_what_they_say():
    ramp = torch.linspace(-1, 1, 64)[None, None, None, :].expand(50, 3, 64, 64).contiguous()
    generator = torch.Generator().manual_seed(0)
    crops = pretraining.random_crops(ramp, 32, (0.25, 0.25), generator)
    assert crops.shape == (50, 3, 32, 32)
    width = crops[:, 0, 0].amax(dim=1) - crops[:, 0, 0].amin(dim=1)
    torch.testing.assert_close(width, torch.full((50,), 62 / 63), atol=0.05, rtol=0)  # half of the ramp
    rising = crops[:, 0, 0, -1] > crops[:, 0, 0, 0]
    assert 10 < rising.sum() < 40
    whole = pretraining.random_crops(ramp, 64, (1.0, 1.0), generator)
    assert all(torch.allclose(c[0], ramp[0, 0]) or torch.allclose(c[0], ramp[0, 0].flip(1)) for c in whole)


def test_views_of_another_size_use_the_resized_position_embedding():
    backbone = create_backbone("vit_mini").eval()
    same = create_backbone("vit_mini", image_size=56).eval()
    state = backbone.vit.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (7, 7), num_prefix_tokens=1)
    same.vit.load_state_dict(state)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(pretraining.forward_view(backbone, images).patches, same(images).patches)
    assert backbone.vit.pos_embed.shape == (1, 197, 96)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_positions_shrink_towards_their_mean(share):
    backbone = create_backbone("vit_mini")
    before = backbone.vit.pos_embed.detach().double().clone()
    pretraining.shrink_positions(backbone, share)
    after = backbone.vit.pos_embed.detach().double()
    assert torch.equal(after[:, 0], before[:, 0]), "the class token has no place"
    for column in range(before.shape[2]):
        values = before[0, 1:, column].tolist()
        mean = sum(values) / len(values)
        expected = torch.tensor([mean + share * (value - mean) for value in values], dtype=torch.float64)
        torch.testing.assert_close(after[0, 1:, column], expected, atol=1e-7, rtol=0)


@torch.no_grad()
def test_without_positions_attention_does_not_know_the_place():
    backbone = create_backbone("vit_mini_dino_co", pretrained=True).eval()
    image = torch.full((1, 3, 112, 112), 0.3)

    def unevenness():
        inner = backbone(image).attention.mean(dim=(1, 2)).unflatten(1, (14, 14))[0, 5:9, 5:9]  # far from the border
        return float((inner.max() - inner.min()) / inner.mean())

    known = unevenness()
    pretraining.shrink_positions(backbone, 0.0)
    assert unevenness() < 0.05 * known


@pytest.mark.parametrize("name", ["vit_mini", "vit_mini_dino", "vit_mini_dino_co"])
def test_pretraining_is_kept_exported_and_loaded_again(tmp_path, monkeypatch, name):
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    run = runs.start("04_pretraining", {"run_folder": str(tmp_path / "run"), "seed": 0})
    config = RECIPES[name].model_copy(
        update={"scenes": TINY, "batch_size": 4, "training": TrainingConfig(epochs=1, lr=1e-3)}
    )
    backbone, folder = pretraining.pretrain(run, name, config, progress=False)
    again, same_folder = pretraining.pretrain(run, name, config, progress=False)
    assert folder == same_folder
    torch.testing.assert_close(again.vit.pos_embed, backbone.vit.pos_embed)
    whole, same_folder = pretraining.pretrain(run, name, config.model_copy(update={"positions": 1.0}), progress=False)
    assert folder == same_folder, "trained again, though the positions are shrunk afterwards"
    spread = whole.vit.pos_embed[0, 1:].std(dim=0)
    torch.testing.assert_close(backbone.vit.pos_embed[0, 1:].std(dim=0), config.positions * spread)

    card = pretraining.export(backbone, name, config, tmp_path, minutes=0.1)
    facts = weights.read_card(name, tmp_path)
    assert pretraining.PretrainingConfig.model_validate(facts["recipe"]) == config
    assert weights.verified(name, tmp_path).stat().st_size == facts["bytes"]
    card.write_text(card.read_text() + "\nLimits: kept.\n")
    pretraining.export(backbone, name, config, tmp_path, minutes=0.2)
    assert weights.read_card(name, tmp_path)["minutes"] == 0.2
    assert card.read_text().endswith("Limits: kept.\n")

    monkeypatch.setattr(weights, "verified", lambda name: tmp_path / f"{name}.safetensors")
    loaded = create_backbone(name, pretrained=True)
    for key, value in backbone.vit.state_dict().items():
        torch.testing.assert_close(loaded.vit.state_dict()[key], value, atol=1e-3, rtol=1e-3)


def test_a_start_of_another_seed_is_made_by_the_same_recipe_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WSOLNB_ROOT", str(tmp_path))
    few = {"scenes": TINY, "batch_size": 4, "training": TrainingConfig(epochs=1, lr=1e-3)}
    config = RECIPES["vit_mini_dino_co"].model_copy(update=few)
    monkeypatch.setitem(RECIPES, "vit_mini_dino_co", config)
    run = runs.start("12_scm_results", {"run_folder": str(tmp_path / "run"), "seed": 0})
    assert pretraining.start_of(run, "vit_mini_dino_co", 0) == {"pretrained": True, "checkpoint": ""}

    starts = {seed: pretraining.start_of(run, "vit_mini_dino_co", seed) for seed in (1, 2)}
    capsys.readouterr()
    assert pretraining.start_of(run, "vit_mini_dino_co", 1) == starts[1]
    assert "reusing" in capsys.readouterr().out
    found = {seed: create_backbone("vit_mini_dino_co", **start).vit.state_dict() for seed, start in starts.items()}
    assert not torch.equal(found[1]["cls_token"], found[2]["cls_token"])
    seeded = {part: getattr(config, part).model_copy(update={"seed": 1}) for part in ("scenes", "training")}
    by_hand, _ = pretraining.pretrain(run, "by-hand", config.model_copy(update=seeded), progress=False)
    for key, value in by_hand.vit.state_dict().items():
        torch.testing.assert_close(found[1][key], value, atol=1e-3, rtol=1e-3)  # the file holds half precision
    with pytest.raises(ParameterError, match="no recipe to pretrain 'deit_small' again"):
        pretraining.start_of(run, "deit_small", 1)


@pytest.fixture(scope="module")
def tiny_photographs(tmp_path_factory):
    """Tiny-ImageNet's layout with two classes of five images each: red ones and green ones."""
    root, rng = tmp_path_factory.mktemp("tiny-imagenet-200"), np.random.default_rng(0)
    (root / "wnids.txt").write_text("n01\nn02\n")
    (root / "words.txt").write_text("n01\tred\nn02\tgreen\n")
    for channel, wnid in enumerate(("n01", "n02")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        rows = []
        for index in range(5):
            image = rng.integers(0, 90, (64, 64, 3), np.uint8)
            image[..., channel] += 150
            name = f"{wnid}_{index}.JPEG"
            Image.fromarray(image).save(root / "train" / wnid / "images" / name, "JPEG")
            rows.append(f"{name}\t3\t4\t50\t60\n")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(rows))
    return root


def test_photographs_become_scenes_of_one_frame(tiny_photographs):
    dataset = open_dataset("tiny_imagenet", tiny_photographs, "train")
    scenes = pretraining.read_photographs(dataset, 112)
    assert scenes["image"].shape == (10, 1, 112, 112, 3)
    for index in range(10):
        assert scenes["label"][index].tolist() == list(dataset.labels[index])
        means = scenes["image"][index, 0].mean(axis=(0, 1)) - dataset[index].image.mean(axis=(0, 1))
        assert np.abs(means).max() < 1
    batch = next(iter(SceneLoader(scenes, 4, seed=0, truth=True)))
    assert batch["image"].shape == (4, 1, 3, 112, 112)
    assert batch["label"].shape == (4,)


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_same_recipes_run_on_photographs(tmp_path, tiny_photographs, name):
    run = runs.start("04_pretraining", {"run_folder": str(tmp_path / "run"), "seed": 0})
    config = pretraining.on_photographs(name, "tiny_imagenet")
    few = TrainingConfig(epochs=6, lr=3e-3)
    config = config.model_copy(update={"batch_size": 8, "training": few})
    backbone, folder = pretraining.pretrain(run, name, config, tiny_photographs, progress=False)
    assert backbone.name == name
    history = pd.read_csv(folder / "history.csv")
    assert len(history) == 6
    if config.recipe == "supervised":
        assert history.loss.iloc[-1] < 0.5 * history.loss.iloc[0]
    card = pretraining.export(backbone, name, config, tmp_path, minutes=0.1)
    assert weights.read_card(card.stem, tmp_path)["recipe"]["photographs"] == "tiny_imagenet"


def test_photographs_with_many_labels_are_refused(tmp_path):
    config = aviary.AviaryConfig(variant="scenes", train=4, val=1, test=1)
    with pytest.raises(ParameterError, match="several labels"):
        pretraining.read_photographs(aviary.load(config, "train", tmp_path), 64)


def test_ablations_change_one_thing_and_unknown_ones_are_named():
    for name, (base, changes) in pretraining.ABLATIONS.items():
        recipe, whole = pretraining.ablation(name, 2, 5), RECIPES[base]
        assert (recipe.training.epochs, recipe.training.seed) == (2, 5)
        differing = {f for f in type(recipe).model_fields if getattr(recipe, f) != getattr(whole, f)} - {"training"}
        assert differing == set(changes)
    assert pretraining.ablation("shares of colours", 1, 0).weights["texture"] == RECIPES["vit_mini"].weights["texture"]
    with pytest.raises(ParameterError, match="did you mean 'local crops'"):
        pretraining.ablation("local crop", 1, 0)


# ------------------------------------------------------------------------------------------------- shipped files

EMBEDDED = ("resnet_mini", "vit_mini", "vit_mini_dino", "vit_mini_dino_co")


@pytest.mark.parametrize("name", EMBEDDED)
def test_file_card_and_code_agree(name):
    card = weights.read_card(name)
    path = weights.verified(name)
    state = load_file(path)
    recipe = pretraining.PretrainingConfig.model_validate(card["recipe"])
    assert recipe == RECIPES[name], "the card tells of another recipe than the code"
    assert card["scenes_format"] == creatures.FORMAT, "the renderer has changed since the pretraining"
    assert name not in backbones.MIXING or recipe.mixing == backbones.MIXING[name], "loaded with another mixing"
    assert card["bytes"] == path.stat().st_size
    model = create_backbone(name, pretrained=True)
    own = (model.vit if name.startswith("vit") else model.resnet).state_dict()
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    for key, value in state.items():
        assert value.dtype == torch.float16 or not value.is_floating_point()
        torch.testing.assert_close(own[key], value.to(own[key].dtype), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["vit_mini", "vit_mini_dino", "vit_mini_dino_co"])
def test_the_cards_scores_are_the_recorded_ones(name):
    # The recorded table is what notebook 04 measures on the shipped files; tests/notebooks measure it again.
    reference = Path(__file__).parents[2] / "outputs" / "reference"
    table = pd.read_csv(reference / "04_pretraining.csv")
    table = table[(table.backbone == name) & ~table.tuned]
    rows = table[table["map"] == "attention"].set_index("split")
    photographs = pd.read_csv(reference / "04_photographs.csv").set_index(["map", "off-centre"]).auc
    expected = {f"attention_{key}_{split}": rows.loc[split, key] for split in rows.index for key in ("gt_known", "auc")}
    chosen = table[table.split == "val"].sort_values(["gt_known", "auc"])["map"].iloc[-1]
    rows = table[table["map"] == chosen].set_index("split")
    expected |= {
        f"{chosen.replace(' ', '_')}_{key}_{split}": rows.loc[split, key]
        for split in rows.index
        for key in ("gt_known", "auc")
    }
    expected |= {
        "attention_auc_photographs": photographs[name, False],
        "attention_auc_photographs_off_centre": photographs[name, True],
    }
    assert weights.read_card(name)["scores"] == pytest.approx(expected, abs=2e-3)


def test_the_scores_of_the_resnets_card_are_the_recorded_ones():
    reference = Path(__file__).parents[2] / "outputs" / "reference"
    table = pd.read_csv(reference / "04_seeds.csv")
    rows = table[(table.backbone == "resnet_mini") & (table["map"] == "cam") & (table.split == "test")]
    photographs = pd.read_csv(reference / "04_photographs.csv").set_index(["map", "off-centre"]).auc
    expected = {
        "tuned_top1_test": rows.top1.mean(),
        "tuned_cam_gt_known_test": rows.gt_known.mean(),
        "tuned_cam_auc_test": rows.auc.mean(),
        "activation_auc_photographs": photographs["resnet_mini", False],
        "activation_auc_photographs_off_centre": photographs["resnet_mini", True],
    }
    assert weights.read_card("resnet_mini")["scores"] == pytest.approx(expected, abs=2e-3)


def test_all_embedded_files_are_small_and_have_cards():
    assert weights.embedded() == sorted([*EMBEDDED, "vit_photo", "vit_photo_dino"])
    assert sum(path.stat().st_size for path in weights.FOLDER.glob("*.safetensors")) <= 15e6


def test_the_plain_transformer_has_no_embedded_weights():
    with pytest.raises(WeightsError, match="vit_mini_plain"):
        create_backbone("vit_mini_plain", pretrained=True)


def test_a_changed_or_missing_file_is_named(tmp_path):
    for suffix in ("md", "safetensors"):
        content = (weights.FOLDER / f"vit_mini.{suffix}").read_bytes()
        (tmp_path / f"vit_mini.{suffix}").write_bytes(content)
    path = tmp_path / "vit_mini.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match=r"vit_mini\.safetensors has SHA-256"):
        weights.verified("vit_mini", tmp_path)
    path.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.verified("vit_mini", tmp_path)
    (tmp_path / "vit_mini.md").write_text("no front matter")
    with pytest.raises(WeightsError, match=r"model card vit_mini\.md cannot be read"):
        weights.verified("vit_mini", tmp_path)
    with pytest.raises(WeightsError, match="did you mean 'vit_mini'"):
        weights.read_card("vit_min")
