"""Memory of every pass over a data set: it does not grow with the number of images (`benchmarks/streaming.py`)."""

import tracemalloc
from pathlib import Path

import pytest
import torch

BATCH, FEW, MANY = 4, 12, 60
"""Images: of a batch or chunk of any stage, which are smaller here; of both runs."""


@pytest.fixture(scope="module")
def streaming():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from benchmarks import streaming

        loader = streaming.evaluation.make_loader
        for module in (streaming.evaluation, streaming.locloc):
            patch.setattr(module, "make_loader", lambda data, how, _, **options: loader(data, how, BATCH, **options))
        patch.setattr(streaming.segmentation.predict, "__defaults__", (BATCH,))
        patch.setattr(streaming.LiveFeatures.__init__, "__defaults__", (None, BATCH))
        patch.setattr(streaming.locloc.guided, "__defaults__", (BATCH,))
        patch.setattr(streaming.locloc, "CHUNK", BATCH)
        patch.setattr(streaming.grabcut.maker, "__defaults__", (1, False, BATCH))
        # Of tensors' memory nothing is told: what becomes an array is made one with memory of its own.
        plain = torch.Tensor.numpy
        patch.setattr(torch.Tensor, "numpy", lambda own, **options: plain(own, **options).copy())
        yield streaming


@pytest.fixture(scope="module")
def works(streaming, tmp_path_factory):
    """The work on few and on many images; all that is loaded or compiled once is there."""
    found = [streaming.Work(count, tmp_path_factory.mktemp(str(count))) for count in (4, FEW, MANY)]
    for stage in streaming.STAGES.values():
        stage(found[0])
    return found[1:]


def growth(streaming, works, stage):
    """How much more Python and NumPy hold at the peak of a stage with many images, in maps of every image more."""
    peaks = []
    for work in works:
        tracemalloc.start()
        try:
            stage(work)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return (peaks[1] - peaks[0]) / (4 * streaming.SIDE**2 * (MANY - FEW))


def test_memory_does_not_grow_with_the_number_of_images(streaming, works):
    found = {name: growth(streaming, works, stage) for name, stage in streaming.STAGES.items()}
    assert {name: round(more, 2) for name, more in found.items() if more > 0.3} == {}


def test_the_measure_sees_what_a_list_keeps(streaming, works):
    def keep(work):
        return list(streaming.seeds.variant_maps(work.source, work.by_name, streaming.SETTINGS))

    assert growth(streaming, works, keep) == pytest.approx(4, abs=1)  # two kinds of two classes
    assert growth(streaming, works, lambda work: [work.single[index].image for index in range(len(work.single))]) > 0.7
