from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsolnb.backbones import create_backbone
from wsolnb.data import IGNORE, Sample, aviary
from wsolnb.data.store import ClassMaps, Store, WithMasks
from wsolnb.methods import create_method, crf, irn
from wsolnb.methods.crf import CRFConfig
from wsolnb.metrics import seed_mask
from wsolnb.workers import results


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    config = aviary.AviaryConfig(variant="scenes", classes=3, size=64, train=6, val=2, test=4, seed=1)
    cache = tmp_path_factory.mktemp("cache")
    return {split: aviary.load(config, split, cache) for split in ("train", "test")}


def true_maps(dataset):
    """Maps that are 0.9 on the class and 0.1 elsewhere."""
    for i, name in enumerate(dataset.image_ids):
        mask, labels = dataset[i].mask, dataset.labels[i]
        maps = np.stack([np.where(mask == label + 1, 0.9, 0.1) for label in labels]).astype(np.float32)
        yield ClassMaps(name, labels, maps)


def walk(model, found, dataset, config, image_size=None):
    """The maps after `config.exp_times`."""
    for by_steps in irn.walk_steps(model, found, dataset, config, (config.exp_times,), image_size):
        yield by_steps[config.damping, config.exp_times]


def test_irn_learns_from_the_masks_at_stride_4():
    rng = np.random.default_rng(1)
    cells = rng.choice([0, 2, IGNORE], (2, 4, 5)).astype(np.uint8)
    masks = [np.repeat(np.repeat(mask, 4, axis=0), 4, axis=1) for mask in cells]
    generator = torch.Generator().manual_seed(2)
    output = irn.IRNOutput(torch.randn(2, 4, 5, generator=generator), torch.randn(2, 2, 4, 5, generator=generator))
    labels = irn.pair_labels(torch.from_numpy(cells), 3)
    expected = irn.pair_loss(output.boundary.sigmoid(), output.displacement, labels, 3)
    samples = [Sample(np.zeros((*mask.shape, 3), np.uint8), "", (0,), mask=mask) for mask in masks]
    model = create_method("irn", create_backbone("resnet_mini"), 3, width=8, label_radius=3)
    assert model.learns_from_masks
    got = model.loss(lambda images: output, {"image": torch.zeros(2, 3, 16, 20), "samples": samples})
    torch.testing.assert_close(got, expected)


def test_irn_labels_are_confident_on_both_sides(scenes, tmp_path):
    train = scenes["train"]

    def maps():
        for found in true_maps(train):
            found.maps[:, :8] = 0.3  # between both thresholds
            yield found

    config = irn.IRNConfig(foreground=0.45, background=0.25)
    for found in maps():
        Store(tmp_path / "seeds").write_maps(found)
    irn.write_irn_labels(Store(tmp_path / "seeds"), train, config, CRFConfig(backend="none"), tmp_path / "labels")
    for i, found in enumerate(maps()):
        label, mask = WithMasks(train, Store(tmp_path / "labels"))[i].mask, train[i].mask
        assert (label[:8] == IGNORE).all()
        assert (label[8:] == mask[8:]).all()
        high, low = (seed_mask(found.maps, found.classes, t) for t in (0.45, 0.25))
        assert (label == np.where(high > 0, high, np.where(low == 0, 0, IGNORE))).all()


def test_the_walk_is_propagation_on_the_boundary_grid(scenes):
    train = scenes["train"].subset([0, 1])
    torch.manual_seed(0)
    model = irn.IRN(create_backbone("resnet_mini", pretrained=True), width=8)
    config = irn.IRNConfig(radius=3, exp_times=3)
    walked = list(walk(model, true_maps(train), train, config, image_size=64))
    assert [found.image_id for found in walked] == list(train.image_ids)
    for i, (found, seed) in enumerate(zip(walked, true_maps(train), strict=True)):
        assert found.maps.shape == seed.maps.shape
        assert found.maps.max() == 1
        boundary = irn.boundary_of(model, train[i].image)
        small = F.interpolate(torch.from_numpy(seed.maps)[None], (16, 16), mode="bilinear", antialias=True)[0]
        small = small / small.amax(dim=(1, 2), keepdim=True)
        by_hand = irn.unit_scores(irn.propagate(small, boundary, 3, 10, 3), (64, 64))
        np.testing.assert_allclose(found.maps, by_hand, atol=1e-5)
    nothing = ClassMaps(train.image_ids[0], (), np.zeros((0, 64, 64), np.float32))
    assert next(walk(model, [nothing], train, config)).maps.shape == (0, 64, 64)


def test_a_cell_of_the_walk_comes_out_where_it_is(scenes):
    boundary = torch.zeros(94, 125)  # of an image of 375 x 500
    area = irn.seen(boundary, (375, 500))
    assert area == (376, 500)
    assert irn.seen(torch.zeros(28, 28), (375, 500), 112) == (375, 500)
    boundary = torch.zeros(15, 13)
    assert irn.seen(boundary, (57, 50)) == (60, 52)
    cell = torch.zeros(1, 15, 13)
    cell[0, 13, 11] = 1
    full = irn.unit_scores(cell, (57, 50), (60, 52))
    expected = F.interpolate(cell[None], scale_factor=4, mode="bilinear", align_corners=False)[..., :57, :50]
    torch.testing.assert_close(full, expected[0] / expected.max())  # as the released code writes it
    seeds = torch.zeros(1, 57, 50)
    seeds[0, 52:56, 44:48] = 1  # that cell
    on_grid = irn.on_grid(seeds.numpy(), boundary, (60, 52))
    assert on_grid[0].argmax() == 13 * 13 + 11
    index = torch.arange(15.0) + 0.5
    assert abs(float((on_grid[0].sum(dim=1) * index).sum() / on_grid.sum()) - 13.5) < 0.05


def test_pseudo_masks_are_those_of_the_walk_and_an_interrupted_stage_goes_on(scenes, tmp_path):
    train, store, made = scenes["train"], Store(tmp_path / "seeds"), Store(tmp_path / "pseudo")
    for found in true_maps(train):
        store.write_maps(found)
    model = irn.IRN(create_backbone("resnet_mini", pretrained=True), width=8)
    config = irn.IRNConfig(radius=3, exp_times=1, mask_background=0.5)
    irn.write_pseudo_masks(model, store, train, config, 64, made.folder)
    for found in walk(model, store.all_maps(train.image_ids), train, config, 64):
        np.testing.assert_array_equal(
            made.read_mask(found.image_id)[0], seed_mask(found.maps, found.classes, config.mask_background)
        )
        np.testing.assert_allclose(made.read_maps(found.image_id).maps, found.maps, atol=1e-3)
    lost, *others = train.image_ids
    before = {name: made.path(name, ".png").stat().st_mtime_ns for name in others}
    made.path(lost, ".png").unlink()
    irn.write_pseudo_masks(model, store, train, config, 64, made.folder)
    assert made.to_do(train.image_ids) == []
    assert {name: made.path(name, ".png").stat().st_mtime_ns for name in others} == before


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def label_and_walk(labels, pseudo, index):
    labels(index)
    pseudo(index)


def test_masks_do_not_depend_on_workers_or_threads(scenes, tmp_path):
    """Labels by the CRF and pseudo masks by the walk: the same bytes from this process and from two workers."""
    train, store = scenes["train"], Store(tmp_path / "seeds")
    for found in true_maps(train):
        store.write_maps(found)
    model = irn.IRN(create_backbone("resnet_mini", pretrained=True), width=8)
    config, refinement = irn.IRNConfig(radius=3, exp_times=2), CRFConfig(max_side=24, wide=10, colour=13)
    named, threads = [(name, index) for index, name in enumerate(train.image_ids)], torch.get_num_threads()
    for workers in (1, 2):
        made = Store(tmp_path / str(workers))
        labels = partial(irn._write_labels, store, Store(made.folder / "labels"), train, config, refinement)
        pseudo = partial(irn._write_pseudo, model, store, made, train, config, 64)
        torch.set_num_threads(2)
        try:  # one start of workers, which takes seconds, for both stages
            list(results(partial(label_and_walk, labels, pseudo), named, workers))
        finally:
            torch.set_num_threads(threads)
    one, two = (files(tmp_path / str(workers)) for workers in (1, 2))
    assert len(one) == 3 * len(train)
    assert one == two


def test_stages_ask_for_their_workers_and_do_what_is_left(scenes, tmp_path, monkeypatch):
    train, store = scenes["train"], Store(tmp_path / "seeds")
    for found in true_maps(train):
        store.write_maps(found)
    model = irn.IRN(create_backbone("resnet_mini", pretrained=True), width=8)
    config, asked = irn.IRNConfig(radius=3, exp_times=1), []

    def counted(task, named, workers):
        named = list(named)
        asked.append((workers, [name for name, _ in named]))
        return results(task, named)

    monkeypatch.setattr(irn, "results", counted)
    written = {
        "labels": partial(irn.write_irn_labels, store, train, config, CRFConfig(backend="none")),
        "pseudo": partial(irn.write_pseudo_masks, model, store, train, config, 64),
    }
    for name, write in written.items():
        write(tmp_path / name, workers=3)
        whole = files(tmp_path / name)
        (tmp_path / name / f"{train.image_ids[3]}.png").write_bytes(b"damaged")
        write(tmp_path / name, workers=3)
        assert files(tmp_path / name) == whole
    list(irn.walk_steps(model, true_maps(train), train, config, (1,), 64, workers=3))
    everything = list(train.image_ids)
    assert asked == [(3, everything), (3, everything[3:4])] * 2 + [(3, everything)]
    assert irn._workers_for(model.to("meta"), 3) == 1  # not on the CPU


def test_walks_share_the_boundary_and_the_transition(scenes, monkeypatch):
    train = scenes["train"].subset([0, 1])
    model = irn.IRN(create_backbone("resnet_mini", pretrained=True), width=8)
    config = irn.IRNConfig(radius=3)
    alone = {
        damping: list(irn.walk_steps(model, true_maps(train), train,
                                     config.model_copy(update={"damping": damping}), (0, 2), 64))
        for damping in (1.0, 0.0)
    }  # fmt: skip
    calls = {"boundary_of": 0, "transition": 0}
    for name in calls:
        plain = getattr(irn, name)

        def counted(*arguments, _name=name, _plain=plain):
            calls[_name] += 1
            return _plain(*arguments)

        monkeypatch.setattr(irn, name, counted)
    together = list(irn.walk_steps(model, true_maps(train), train, config, (0, 2), 64, dampings=(1.0, 0.0)))
    assert calls == {"boundary_of": 2, "transition": 2}
    for index, by_case in enumerate(together):
        assert list(by_case) == [(1.0, 0), (1.0, 2), (0.0, 0), (0.0, 2)]
        for (damping, steps), found in by_case.items():
            np.testing.assert_array_equal(found.maps, alone[damping][index][damping, steps].maps)


def test_a_mask_is_refined_once(scenes, monkeypatch):
    train = scenes["train"]
    found, image = next(true_maps(train)), train[0].image
    refined, kernels = [], []
    plain_labels, plain_kernel = crf.Refinement.labels, crf._kernel
    monkeypatch.setattr(crf.Refinement, "labels", lambda own, mask: refined.append(mask) or plain_labels(own, mask))
    monkeypatch.setattr(crf, "_kernel", lambda *given: kernels.append(1) or plain_kernel(*given))
    small = CRFConfig(max_side=16)
    irn.irn_labels(found, image, irn.IRNConfig(foreground=0.5, background=0.5), small)
    assert (len(refined), len(kernels)) == (1, 1)  # the matrix of all pairs of pixels is made once an image
    found.maps[:, :8] = 0.3
    irn.irn_labels(found, image, irn.IRNConfig(foreground=0.45, background=0.25), small)
    assert (len(refined), len(kernels)) == (3, 2)
