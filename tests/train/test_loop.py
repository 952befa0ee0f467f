import contextlib
import math
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wsolnb.data.loading import EpochLoader, EpochSampler
from wsolnb.errors import ParameterError, TrainingError
from wsolnb.files import MACHINE
from wsolnb.methods.base import LocalizationModel, classification_loss
from wsolnb.methods.cam import CAMOutput
from wsolnb.train import loop
from wsolnb.train.loop import TrainingConfig


class Small(LocalizationModel):
    """A two-layer classifier of 8x8 images: learns in milliseconds, has a head and dropout (so RNG state counts)."""

    maps = ("none",)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(0.2))
        self.out = nn.Linear(16, 3)

    @property
    def head(self):
        return self.out

    def forward(self, images):
        return CAMOutput(self.out(self.body(images)), images)

    def localize(self, output, classes):
        return {}


class Batches:
    """Twelve batches whose order depends on the epoch."""

    def __init__(self, poison=None):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 3, (96,), generator=generator)
        means = torch.randn(3, 3, 8, 8, generator=generator)
        self.images = means[self.labels] + 0.5 * torch.randn(96, 3, 8, 8, generator=generator)
        self.epoch, self.poison = 0, poison

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 12

    def __iter__(self):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(self.epoch))
        for step in range(12):
            rows = order[step * 8 : step * 8 + 8]
            images = self.images[rows]
            if self.poison == (self.epoch, step):
                images = images * float("nan")
            yield {"image": images, "label": self.labels[rows]}


def accuracy(model):
    batches = Batches()
    return {"top1": float((model(batches.images).logits.argmax(1) == batches.labels).float().mean())}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def config(**changes):
    values = {"epochs": 3, "lr": 1e-2, "head_lr": 2e-2, "device": "cpu", "precision": "fp32", **changes}
    return TrainingConfig(**values)


def fit(folder, loader=None, evaluate=accuracy, **changes):
    loop.set_seed(0)
    model = Small()
    history = loop.train(model, loader or Batches(), config(**changes), folder, evaluate, progress=False)
    return model, history


def test_learns_and_writes_what_it_promises(tmp_path):
    model, history = fit(tmp_path)
    assert history["top1"].iloc[-1] > 0.9
    assert list(history["epoch"]) == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", "history.csv", "last.safetensors"]
    assert len(pd.read_csv(tmp_path / "history.csv")) == 3
    again = loop.load_checkpoint(Small(), tmp_path, "last")
    images = Batches().images
    assert torch.equal(again(images).logits, model(images).logits)


def test_evaluation_is_in_full_precision_after_and_during_bf16_training(tmp_path):
    kinds = []

    def evaluate(model):
        kinds.append(model(Batches().images).logits.dtype)
        return accuracy(model)

    model, _ = fit(tmp_path, evaluate=evaluate, precision="bf16")
    images = Batches().images
    trained = model(images).logits
    read_back = loop.load_checkpoint(Small(), tmp_path, "last")(images).logits
    assert set(kinds) == {torch.float32}
    assert torch.equal(trained, read_back)
    # Another precision in the same process is no contradiction.
    fit(tmp_path / "again", precision="fp32")


def test_bf16_is_what_the_forward_pass_runs_in(tmp_path):
    seen = []
    model = Small()
    model.out.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    loop.train(model, Batches(), config(epochs=1, precision="bf16"), tmp_path, None, progress=False)
    assert set(seen) == {torch.bfloat16}


def test_same_seed_same_numbers_bit_for_bit(tmp_path):
    (first, one), (second, two) = (fit(tmp_path / name) for name in "ab")
    assert list(one["loss"]) == list(two["loss"])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_best_is_the_earliest_best_epoch(tmp_path):
    scores = iter([0.5, 0.9, 0.9])
    kept = []

    def evaluate(model):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"top1": next(scores)}

    fit(tmp_path, evaluate=evaluate)
    best = loop.load_checkpoint(Small(), tmp_path, "best").state_dict()
    assert all(torch.equal(best[name], kept[1][name]) for name in best)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([NAN, 0.5, 0.7], 3),
        ([NAN, 0.7, 0.5], 2),
        ([0.5, NAN, 0.7], 3),
        ([0.7, NAN, 0.5], 1),
        ([0.5, 0.7, NAN], 2),
        ([NAN, NAN, 0.0], 3),
        ([NAN, -0.5, NAN], 2),
        ([INF, 0.5, 0.7], 3),
        ([0.5, INF, -INF], 1),
        ([-INF, 0.5, NAN], 2),
    ],
)
def test_best_is_the_best_finite_epoch(tmp_path, scores, best):
    kept = []

    def evaluate(model):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"top1": scores[len(kept) - 1]}

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(tmp_path, evaluate=evaluate)
    found = loop.load_checkpoint(Small(), tmp_path, "best").state_dict()
    assert all(torch.equal(found[name], kept[best - 1][name]) for name in found)
    assert loop.history(tmp_path)["top1"].fillna(-1).tolist() == [-1 if math.isnan(s) else s for s in scores]


@pytest.mark.parametrize("score", [NAN, INF, -INF])
def test_without_a_finite_epoch_the_best_is_the_last_and_a_warning_says_so(tmp_path, score):
    with pytest.warns(UserWarning, match="top1 is finite in no epoch"):
        fit(tmp_path, evaluate=lambda _model: {"top1": score})
    best, last = (loop.load_checkpoint(Small(), tmp_path, which).state_dict() for which in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in best)


def test_the_loss_is_the_models_own(tmp_path):
    class Own(Small):
        def loss(self, forward, batch, label_smoothing=0.0):
            seen.append((forward is self, label_smoothing, torch.is_autocast_enabled("cpu")))
            return 2 * super().loss(forward, batch, label_smoothing)

    def learn(name, model_class):
        loop.set_seed(0)
        settings = config(epochs=1, label_smoothing=0.1, precision="bf16")
        history = loop.train(model_class(), Batches(), settings, tmp_path / name, progress=False)
        return history["loss"][0]

    seen = []
    # AdamW takes the same steps whatever the loss's scale, after clipping at a norm that both exceed or none does.
    assert learn("own", Own) == pytest.approx(2 * learn("default", Small), rel=0.05)
    assert set(seen) == {(True, 0.1, True)}


def interrupt(folder, after=1, **changes):
    """Leave the training in `folder` as it is after so many epochs."""
    calls = []

    def interrupting(model):
        calls.append(1)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return accuracy(model)

    with pytest.raises(KeyboardInterrupt):
        fit(folder, evaluate=interrupting, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 1e-5}, ["lr 0.01, now 1e-05"]),
        ({"epochs": 1}, ["epochs 3, now 1"]),
        ({"epochs": 9, "clip": 0.0}, ["epochs 3, now 9", "clip 1.0, now 0.0"]),
        ({"optimizer": "sgd"}, ["optimizer adamw, now sgd"]),
        ({"head_lr": None}, ["head_lr 0.02, now None"]),
        ({"betas": (0.9, 0.999)}, ["betas (0.9, 0.98), now (0.9, 0.999)"]),
        ({"precision": "bf16"}, ["precision fp32, now bf16"]),
        ({"select": "loss"}, ["select top1, now loss"]),
        ({"seed": 1}, ["seed 0, now 1"]),
    ],
)
def test_resuming_with_another_configuration_names_what_differs(tmp_path, changes, words):
    interrupt(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TrainingError) as caught:
        fit(tmp_path, **changes)
    assert all(word in str(caught.value) for word in [*words, "delete", "state.pt"])
    assert str(caught.value).count(", now ") == len(words)
    # Nothing is lost: the training can still go on as it was.
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.warns(UserWarning, match="resuming after epoch 1"):
        assert len(fit(tmp_path)[1]) == 3


def test_resuming_with_fewer_images_names_the_steps(tmp_path):
    class Fewer(Batches):
        def __len__(self):
            return 6

    interrupt(tmp_path)
    with pytest.raises(TrainingError, match="steps of an epoch 12, now 6"):
        fit(tmp_path, loader=Fewer())


def test_how_device_and_precision_are_asked_for_is_no_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "pick_device", lambda _name: torch.device("cpu"))
    monkeypatch.setattr(loop, "pick_precision", lambda *_: "fp32")
    interrupt(tmp_path, device="auto", precision="auto")
    with pytest.warns(UserWarning, match="resuming after epoch 1"):
        fit(tmp_path, device="cpu", precision="fp32")


def test_a_state_of_an_older_version_is_named(tmp_path):
    torch.save({"model": {}, "history": []}, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match=r"state\.pt cannot be resumed") as caught:
        fit(tmp_path)
    assert "delete" in str(caught.value)


@pytest.mark.parametrize("stop", [1, 2])
def test_interrupted_training_resumes_to_the_same_weights(tmp_path, stop):
    interrupt(tmp_path / "broken", stop)
    with pytest.warns(UserWarning, match=f"resuming after epoch {stop}"):
        resumed, history = fit(tmp_path / "broken")
    whole, expected = fit(tmp_path / "whole")
    assert list(history["loss"]) == list(expected["loss"])
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


class Tracked(torch.utils.data.Dataset):
    """The images of `Batches` by (epoch, index), as an `EpochLoader` asks for them; counts what is read."""

    def __init__(self):
        self.batches, self.read = Batches(), []

    def __len__(self):
        return 96

    def __getitem__(self, key):
        self.read.append(key)
        return {"image": self.batches.images[key[1]], "label": self.batches.labels[key[1]]}


def tracked():
    return EpochLoader(Tracked(), batch_size=8, sampler=EpochSampler(96, True, 0), drop_last=True)


def interrupted_at(step, folder, monkeypatch, **changes):
    """Leave the training in `folder` as it is when step `step`, counted from 0 over the epochs, is about to be taken.

    Its loss draws from all random states that a method could draw from.
    """
    calls = []

    def stopping(self, forward, batch, label_smoothing=0.0):
        if len(calls) == step:
            raise KeyboardInterrupt
        calls.append(1)
        drawn = random.random() + np.random.random()  # noqa: NPY002
        return LocalizationModel.loss(self, forward, batch, label_smoothing) * (1 + drawn)

    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(Small, "loss", stopping)
    with contextlib.suppress(KeyboardInterrupt):
        return fit(folder, loader=tracked() if changes.pop("tracked", True) else Batches(), **changes)
    calls[:] = [None] * (step + 1)  # what is called from here on goes through
    return None


@pytest.mark.parametrize(
    ("step", "done", "changes"),
    [
        (11, "epoch 0 and 11 steps", {"ema": 0.9}),
        (23, "epoch 1 and 11 steps", {"optimizer": "sgd"}),
        (14, "epoch 1 and 1 steps", {"accumulate": 2}),
        (17, "epoch 1 and 1 steps", {"tracked": False}),
        (12, "epoch 1 of", {}),
    ],
)
def test_inside_an_epoch_training_resumes_bit_for_bit(tmp_path, monkeypatch, step, done, changes):
    """Looked at in steps 1 and 11 of the 12 of an epoch. A batch of two parts calls the loss twice."""
    calls = step * changes.get("accumulate", 1)
    whole, expected = interrupted_at(10**6, tmp_path / "whole", monkeypatch, **changes)
    interrupted_at(calls, tmp_path / "broken", monkeypatch, **changes)
    loader = tracked() if changes.pop("tracked", True) else Batches()
    with pytest.warns(UserWarning, match=f"resuming after {done}"):
        resumed, history = fit(tmp_path / "broken", loader=loader, **changes)
    assert equal(resumed.state_dict(), whole.state_dict())
    columns = ["epoch", "loss", "top1"]
    assert history[columns].equals(expected[columns])
    for name in ("last", "best"):
        one, other = (loop.load_checkpoint(Small(), tmp_path / folder, name) for folder in ("whole", "broken"))
        assert equal(one.state_dict(), other.state_dict())
    if isinstance(loader, EpochLoader):  # no image of a batch that was trained on is read again
        assert len(loader.dataset.read) == 8 * (36 - (step - step % 12 + {11: 11, 2: 1, 0: 0}[step % 12]))


def test_nan_stops_early_and_keeps_the_epochs_before(tmp_path):
    with pytest.raises(TrainingError, match="loss is nan in epoch 2") as caught:
        fit(tmp_path, loader=Batches(poison=(1, 0)))
    assert "lower lr" in str(caught.value)
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1


@pytest.mark.parametrize("images", [1, 12, 31])
def test_a_loader_without_a_batch_is_named_before_anything_is_written(tmp_path, images):
    few = [{"image": torch.zeros(3, 8, 8), "label": 0}] * images
    loader = torch.utils.data.DataLoader(few, batch_size=32, drop_last=True)
    message = f"{images} training images make no batch of 32.*lower batch_size"
    with pytest.raises(ParameterError, match=f"(?s){message}"):
        loop.train(Small(), loader, config(), tmp_path / "new", progress=False)
    with pytest.raises(ParameterError, match=r"(?s)the loader has no batch.*lower batch_size"):
        loop.train(Small(), [], config(), tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for name in ("last.safetensors", "best.safetensors", "history.csv", "state.pt"):
        (tmp_path / f".{name}-{ended.stdout.strip()}-{MACHINE}{'0' * 20}").write_bytes(b"half")
    (tmp_path / ".lock").write_text("somebody else's")
    fit(tmp_path, evaluate=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "history.csv", "last.safetensors"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    fit(folder)
    return folder


@pytest.mark.parametrize("which", ["best", "last"])
def test_damaged_weights_are_named(trained, tmp_path, which):
    """Cut anywhere or with any bit changed, a file gives the same weights or an error that names it."""
    content = (trained / f"{which}.safetensors").read_bytes()
    expected = loop.load_checkpoint(Small(), trained, which).state_dict()
    header = 8 + int.from_bytes(content[:8], "little")
    damaged = [content[:length] for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1)]
    damaged += [content + b"more", b"\0" * len(content), b"not weights"]
    for place in [*range(0, header, 3), *range(header, len(content), 997), len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        damaged.append(bytes(changed))
    path = tmp_path / f"{which}.safetensors"
    messages = []
    for piece in damaged:
        path.write_bytes(piece)
        try:
            found = loop.load_checkpoint(Small(), tmp_path, which).state_dict()
        except TrainingError as error:
            messages.append(str(error))
        else:
            assert equal(found, expected)
    assert len(messages) > 0.9 * len(damaged)
    assert all(path.name in message and "train again" in message for message in messages)


def test_weights_without_a_checksum_are_read(trained, tmp_path):
    model = loop.load_checkpoint(Small(), trained, "last")
    save_file(model.state_dict(), tmp_path / "last.safetensors")
    found = loop.load_checkpoint(Small(), tmp_path, "last").state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "\n",
        lambda text: text.splitlines()[0] + "\n",
        lambda text: text[: len(text) // 2],
        lambda text: text[:-1],
        lambda text: text.replace("\n2,", "\n7,"),
        lambda text: text.replace("\n2,", "\n2,1,"),
        lambda text: text.replace("\n2,", "\nx,"),
        lambda text: text.replace("loss", "mass"),
        lambda text: text.replace(".", "\0"),
        lambda text: text.replace(".", "\udcff"),
    ],
)
def test_a_damaged_history_is_named(trained, tmp_path, damage):
    text = (trained / "history.csv").read_text()
    (tmp_path / "history.csv").write_bytes(damage(text).encode("utf-8", "surrogateescape"))
    with pytest.raises(TrainingError, match=r"history\.csv") as caught:
        loop.history(tmp_path)
    assert "train again" in str(caught.value)


def test_a_missing_history_is_named_and_a_whole_one_read(trained, tmp_path):
    with pytest.raises(TrainingError, match=r"history\.csv"):
        loop.history(tmp_path)
    assert list(loop.history(str(trained))["epoch"]) == [1, 2, 3]


def test_damaged_state_and_missing_checkpoint_are_named(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match=r"state\.pt"):
        fit(tmp_path)
    with pytest.raises(TrainingError, match=r"best\.safetensors"):
        loop.load_checkpoint(Small(), tmp_path, "best")


def test_out_of_memory_names_the_remedy(tmp_path, monkeypatch):
    def out_of_memory(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Small, "loss", out_of_memory)
    with pytest.raises(TrainingError, match="batch_size"):
        fit(tmp_path)


def test_where_memory_runs_out_the_same_batches_go_on_in_parts(tmp_path, monkeypatch):
    """The numbers are those of a training that had the parts from the start: 8 images as 2, 2, 2, 2."""
    sizes, plain = [], Small.forward

    def little_memory(self, images):
        if len(images) > 3 and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(images))
        return plain(self, images)

    expected, table = fit(tmp_path / "expected", accumulate=4)
    monkeypatch.setattr(Small, "forward", little_memory)
    with pytest.warns(UserWarning, match="out of memory on cpu with") as caught:
        model, found = fit(tmp_path / "found")
    told = [str(one.message) for one in caught]
    assert "with 8 images at once: batches of 8 go on in 2 parts" in told[0]
    assert "with 4 images at once: batches of 8 go on in 4 parts" in told[1]
    assert len(told) == 2
    assert equal(model.state_dict(), expected.state_dict())
    assert list(found["loss"]) == list(table["loss"])
    assert {size for size in sizes if size < 96} == {2}
    assert not (tmp_path / "found" / loop.PARTS).exists()


def test_a_training_that_is_started_again_knows_that_memory_ran_out(tmp_path):
    (tmp_path / loop.PARTS).write_text("4\n")
    again, _ = fit(tmp_path)
    expected, _ = fit(tmp_path / "expected", accumulate=4)
    assert equal(again.state_dict(), expected.state_dict())


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_a_batch_add_up_to_its_gradient(tmp_path, parts):
    """8 images in 3 parts are 3, 3 and 2: each counts by its images."""

    class Still(Small):
        def __init__(self):
            super().__init__()
            self.body[-1].p = 0.0

    def learn(name, **changes):
        loop.set_seed(0)
        model = Still()
        history = loop.train(model, Batches(), config(epochs=1, **changes), tmp_path / name, progress=False)
        return model, history["loss"][0]

    (whole, loss), (added, same) = learn("whole"), learn("added", accumulate=parts)
    assert same == pytest.approx(loss, rel=1e-5)
    for one, other in zip(whole.parameters(), added.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_mean_of_the_weights_is_what_is_scored_and_kept(tmp_path, monkeypatch):
    steps, scored = [], []
    plain_update = loop.update

    def update(accelerator, model, *rest):
        plain_update(accelerator, model, *rest)
        steps.append({name: value.clone() for name, value in model.state_dict().items()})

    def evaluate(model):
        scored.append({name: value.clone() for name, value in model.state_dict().items()})
        return accuracy(model)

    monkeypatch.setattr(loop, "update", update)
    model, _ = fit(tmp_path, evaluate=evaluate, ema=0.9)
    mean = dict(steps[0])
    for index, weights in enumerate(steps[1:], start=1):
        mean = {name: 0.9 * value + 0.1 * weights[name] for name, value in mean.items()}
        if index == 11:
            torch.testing.assert_close(scored[0], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), mean, rtol=1e-5, atol=1e-6)
    assert equal(loop.load_checkpoint(Small(), tmp_path, "last").state_dict(), model.state_dict())
    assert not torch.allclose(mean["out.weight"], steps[-1]["out.weight"], atol=1e-3)


def test_a_compiled_forward_is_the_one_that_is_trained(tmp_path, monkeypatch):
    compiled, plain_compile = [], torch.compile

    def compile_eagerly(model):
        compiled.append(plain_compile(model, backend="eager"))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    used = []
    monkeypatch.setattr(Small, "loss", lambda self, forward, batch, s: used.append(forward) or
                        LocalizationModel.loss(self, forward, batch, s))  # fmt: skip
    expected, _ = fit(tmp_path / "plain", epochs=1)
    assert not compiled
    model, _ = fit(tmp_path / "compiled", epochs=1, compile=True)
    assert used[-1] is compiled[0]
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_select_must_be_a_column(tmp_path):
    with pytest.raises(ParameterError, match="gt_known"):
        fit(tmp_path, select="gt_known")


def test_rates_and_decay_of_the_groups():
    model = Small()
    rates = {}
    for group in loop.parameter_groups(model, config()):
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            rates[name] = (group["lr"], group["weight_decay"])
    assert rates == {
        "body.1.weight": (1e-2, 0.05),
        "body.1.bias": (1e-2, 0.0),
        "out.weight": (2e-2, 0.05),
        "out.bias": (2e-2, 0.0),
    }


def test_schedule_warms_up_then_falls_like_a_cosine():
    factors = [loop.rate_factor(step, 100, config(warmup=0.1)) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert factors[99] < 0.001
    assert loop.rate_factor(50, 100, config(schedule="constant")) == 1
    poly = [loop.rate_factor(step, 100, config(schedule="poly", warmup=0.0, power=0.9)) for step in range(100)]
    assert poly == pytest.approx([(1 - step / 100) ** 0.9 for step in range(100)])


def test_sgd_takes_the_steps_of_its_definition(tmp_path):
    """One step with momentum, decay and the head's own rate, by hand."""

    class Sum(Small):
        def loss(self, forward, batch, label_smoothing=0.0):
            return self.out.weight.sum()

    torch.manual_seed(0)
    model = Sum()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = config(
        optimizer="sgd", epochs=1, lr=0.1, head_lr=0.2, momentum=0.0, weight_decay=0.01, warmup=0, schedule="constant",
        clip=0.0,
    )  # fmt: skip
    batch = next(iter(Batches()))
    loop.train(model, [batch], settings, tmp_path, progress=False)
    out = before["out.weight"]
    torch.testing.assert_close(model.out.weight.detach(), out - 0.2 * (1 + 0.01 * out))
    body = before["body.1.weight"]
    torch.testing.assert_close(model.body[1].weight.detach(), body)  # no gradient, no decay


def test_multi_hot_labels_take_the_soft_margin_loss():
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 0]])
    expected = -(math.log(1 / (1 + math.exp(-2))) + math.log(1 / (1 + math.exp(-1)))) / 2
    assert classification_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_unknown_device_is_named():
    with pytest.raises(ParameterError, match="'tpu9'"):
        loop.pick_device("tpu9")


# -------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory):
    """What the trainings of `processes.py` give in one process, and in each of two."""
    import processes  # not above: it imports this module

    folder = tmp_path_factory.mktemp("together")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, processes.__file__, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    together = tuple(torch.load(folder / f"rank{rank}.pt") for rank in range(2))
    return processes.main(tmp_path_factory.mktemp("alone")), together, folder


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(alone_and_together):
    """As many images a step: the same rates down to zero, losses, and weights."""
    alone, together, folder = alone_and_together
    for found in together:
        assert found["rates"] == alone["rates"]
        assert found["rates"][-1] < 0.05 * max(found["rates"])
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        for name, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-3, atol=1e-4)
    assert together[0]["loss"] == together[1]["loss"]
    assert together[0]["top1"] == together[1]["top1"] == [1, 2, 3]
    assert list(loop.history(folder / "plain")["loss"]) == pytest.approx(alone["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_end_with_the_same_model_and_its_file(alone_and_together):
    _, (first, second), folder = alone_and_together
    assert equal(first["weights"], second["weights"])
    assert equal(first["norm"], second["norm"])  # running means too
    saved = loop.load_checkpoint(Small(), folder / "plain", "last").state_dict()
    assert equal(saved, second["weights"])
    names = ["best.safetensors", "history.csv", "last.safetensors"]
    assert sorted(path.name for path in (folder / "plain").iterdir()) == names


@pytest.mark.slow
def test_two_processes_draw_their_own_dropout_and_resume_it(alone_and_together):
    _, (first, second), _ = alone_and_together
    assert not torch.equal(first["mask"], second["mask"])
    assert equal(first["whole"], first["resumed"])
    assert equal(second["whole"], second["resumed"])
    assert [len(found["resumed warnings"]) for found in (first, second)] == [1, 0]


@pytest.mark.slow
def test_what_stops_one_process_stops_both(alone_and_together):
    _, together, folder = alone_and_together
    for found in together:
        kind, message = found["nan"]
        assert kind == "TrainingError"
        assert "loss is nan in epoch 1, step 1" in message
        kind, message = found["few"]
        assert kind == "ParameterError"
        assert "80 training images make no batch of 48 for each of 2 processes" in message
    assert not (folder / "few").exists()
