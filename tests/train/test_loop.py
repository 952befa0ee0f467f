import math

import pandas as pd
import pytest
import torch
from torch import nn

from wsolnb.errors import ParameterError, TrainingError
from wsolnb.methods.base import LocalizationModel
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


@pytest.mark.parametrize("stop", [1, 2])
def test_interrupted_training_resumes_to_the_same_weights(tmp_path, stop):
    calls = []

    def interrupting(model):
        calls.append(1)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        return accuracy(model)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", evaluate=interrupting)
    with pytest.warns(UserWarning, match=f"resuming after epoch {stop}"):
        resumed, history = fit(tmp_path / "broken")
    whole, expected = fit(tmp_path / "whole")
    assert list(history["loss"]) == list(expected["loss"])
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_nan_stops_early_and_keeps_the_epochs_before(tmp_path):
    with pytest.raises(TrainingError, match="loss is nan in epoch 2") as caught:
        fit(tmp_path, loader=Batches(poison=(1, 0)))
    assert "lower lr" in str(caught.value)
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1


def test_damaged_state_and_missing_checkpoint_are_named(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match=r"state\.pt"):
        fit(tmp_path)
    with pytest.raises(TrainingError, match=r"best\.safetensors"):
        loop.load_checkpoint(Small(), tmp_path, "best")


def test_out_of_memory_names_the_remedy(tmp_path, monkeypatch):
    def out_of_memory(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "classification_loss", out_of_memory)
    with pytest.raises(TrainingError, match="batch_size"):
        fit(tmp_path)


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
    torch.manual_seed(0)
    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = config(
        optimizer="sgd", epochs=1, lr=0.1, head_lr=0.2, momentum=0.0, weight_decay=0.01, warmup=0, schedule="constant",
        clip=0.0,
    )  # fmt: skip
    batch = next(iter(Batches()))
    loop.train(model, [batch], settings, tmp_path, progress=False, objective=lambda m, b, c: m.out.weight.sum())
    out = before["out.weight"]
    torch.testing.assert_close(model.out.weight.detach(), out - 0.2 * (1 + 0.01 * out))
    body = before["body.1.weight"]
    torch.testing.assert_close(model.body[1].weight.detach(), body)  # no gradient, no decay


def test_multi_hot_labels_take_the_soft_margin_loss():
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 0]])
    expected = -(math.log(1 / (1 + math.exp(-2))) + math.log(1 / (1 + math.exp(-1)))) / 2
    assert loop.classification_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_unknown_device_is_named():
    with pytest.raises(ParameterError, match="'tpu9'"):
        loop.pick_device("tpu9")
