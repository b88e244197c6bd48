"""train.py against timm, formulas worked out by hand, and itself: killed, resumed, split over processes."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm.data.mixup
import timm.loss
import timm.optim.lamb
import timm.scheduler
import torch
from torch import nn

import train
from data import open_data
from model import MODELS, ModelConfig, create_model, load_checkpoint
from train import Lamb, Mixup, Options, Training, evaluate, lr_at, resolve, train_one_epoch

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(
    stem_width=8, widths=(8,), depths=(1,), exit_widths=(16, 16, 16), kernel=3, drop_path=0.2, input_size=16
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The path of a JSON config that trains a digits epoch in a fraction of a second."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    TINY.to_json(path)
    return str(path)


def arguments(tiny: str, out: Path, *more: str) -> list[str]:
    return ["--model", tiny, "--out", str(out), "--size", "16", "--epochs", "3", "--device", "cpu", *more]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread gains tiny networks nothing, and runs are compared with other processes bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def assert_same(a, b, where: str = "") -> None:
    """Equal to the last bit, however deeply nested."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def learnt(out: Path) -> dict:
    """What a run has learnt, without clock readings and paths."""
    last = torch.load(out / "last.pt", weights_only=True)
    clock = ("images_per_second", "data_wait", "seconds")
    metrics = [{k: v for k, v in line.items() if k not in clock} for line in last["metrics"]]
    return {k: last[k] for k in ("model", "ema", "optimizer", "epoch", "best")} | {"metrics": metrics}


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    assert train.main(arguments(tiny, out, "--ema", "0.9")) == 0
    return out


# --------------------------------------------------------------------------------------------------
# Optimizer, schedule, mixing, loss


def lamb_problem(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (6, 3, 2, 2), (4, 1, 5, 5), (3, 3), (9,), (1,), (2, 2)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    tensors[3].zero_()  # a weight of zero
    return [nn.Parameter(tensor) for tensor in tensors]


def lamb_groups(parameters: list[nn.Parameter], decay: float) -> list[dict]:
    model = nn.Module()
    model.values = nn.ParameterList(parameters)
    return train.parameter_groups(model, decay)


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])  # gradients below, about and above the clipping norm
def test_lamb_follows_timm_for_50_steps(decay, scale):
    ours, theirs = lamb_problem(), lamb_problem()
    mine = Lamb(lamb_groups(ours, decay), lr=2e-3)
    other = timm.optim.lamb.Lamb(lamb_groups(theirs, decay), lr=2e-3, eps=1e-6, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(50):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=generator) * scale
            if (i == 4 and step < 20) or i == 5:
                gradient.zero_()  # an update of zero, at first or for good
            a.grad = None if i == 6 else gradient.clone()
            b.grad = None if i == 6 else gradient
        for optimizer in (mine, other):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - step / 60)
        mine.step()
        other.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours[0], lamb_problem()[0])


def test_lamb_first_step_by_hand():
    # Bias-corrected first moments make Adam's first update g / (|g| + eps), here 1 a value.
    weight, bias = nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.zeros(1))
    optimizer = Lamb(
        [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}], lr=0.5
    )
    weight.grad, bias.grad = torch.full((2, 2), 0.1), torch.full((1,), 0.1)
    optimizer.step()
    # Update 1 + 0.1 * 3 = 1.3 a value, norm 2.6; the weight's norm is 6: a value moves by lr * 1.3 * 6 / 2.6.
    torch.testing.assert_close(weight.data, torch.full((2, 2), 3.0 - 0.5 * 3.0), rtol=0, atol=2e-5)
    torch.testing.assert_close(bias.data, torch.full((1,), -0.5), rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lamb_resumes_from_its_state_dict(layout):
    def run(stop_at: int | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, bias=False)).to(memory_format=layout)
        optimizer = Lamb(train.parameter_groups(model, 0.02), lr=0.01)
        for step in range(10):
            if step == stop_at:
                # As from a run in the other layout: the values must count, not their order in memory.
                state = optimizer.state_dict()
                for values in state["state"].values():
                    for name in ("exp_avg", "exp_avg_sq"):
                        values[name] = values[name].clone(memory_format=torch.contiguous_format)
                optimizer = Lamb(train.parameter_groups(model, 0.02), lr=0.5)
                optimizer.load_state_dict(state)
            model.zero_grad()
            model(
                torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            ).square().sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert_same(run(None), run(4))


def test_decay_goes_by_dimensions():
    model = create_model(TINY)
    decayed, rest = train.parameter_groups(model, 0.02)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    biases = {id(p) for name, p in model.named_parameters() if name.endswith(".bias")}
    assert {id(p) for p in rest["params"]} == norms | biases
    assert rest["weight_decay"] == 0 and decayed["weight_decay"] == 0.02
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_schedule_has_the_recipe_s_values():
    options = resolve(Options(data="/somewhere", model="nexception_t"))
    values = [lr_at(epoch, options) for epoch in range(310)]
    assert values[:5] == pytest.approx([1e-4, 4.8e-4, 8.6e-4, 1.24e-3, 1.62e-3], rel=1e-12)
    assert values[5] == pytest.approx(1.99863e-3, abs=5e-9)
    assert values[150] == pytest.approx((2e-3 + 1e-6) / 2)
    assert values[300:] == [1e-6] * 10
    parameter = nn.Parameter(torch.zeros(1))
    schedule = timm.scheduler.CosineLRScheduler(
        torch.optim.SGD([parameter], lr=2e-3), t_initial=300, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-4
    )
    assert values == pytest.approx([schedule._get_lr(epoch)[0] for epoch in range(310)], rel=1e-12)


@pytest.mark.parametrize("alphas", [(0.1, 1.0), (0.4, 0.0), (0.0, 1.0)])
def test_mixup_is_timm_s_with_the_same_draws(alphas, monkeypatch):
    rng = np.random.default_rng(0)
    for name, draw in (("rand", rng.random), ("beta", rng.beta), ("randint", rng.integers)):
        monkeypatch.setattr(np.random, name, draw)
    theirs = timm.data.mixup.Mixup(
        mixup_alpha=alphas[0], cutmix_alpha=alphas[1], label_smoothing=0.0, num_classes=10
    )
    ours, boxes = Mixup(*alphas), 0
    for _ in range(60):
        images, labels = torch.randn(8, 3, 20, 24), torch.randint(10, (8,))
        state = rng.bit_generator.state
        expected = theirs(images.clone(), labels)
        rng.bit_generator.state = state
        boxes += ours.draw(20, 24, rng)[1] is not None
        rng.bit_generator.state = state
        mixed = ours(images.clone(), labels, 10, rng)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)
    assert {(0.1, 1.0): 10 < boxes < 50, (0.4, 0.0): boxes == 0, (0.0, 1.0): boxes == 60}[alphas]


def test_no_mixing_leaves_images_and_classes():
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([2, 0, 1, 1])
    mixed, targets = Mixup(0.0, 0.0)(images.clone(), labels, 3, np.random.default_rng(0))
    assert torch.equal(mixed, images)
    assert torch.equal(targets, torch.eye(3)[labels])


def test_loss_is_timm_s_thresholded_bce():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(16, 10, generator=generator), torch.rand(16, 10, generator=generator)
    targets[0, 0] = 0.2  # the threshold itself does not count
    theirs = timm.loss.BinaryCrossEntropy(smoothing=0.0, target_threshold=0.2)(logits, targets)
    torch.testing.assert_close(train.bce_loss(logits, targets, 0.2), theirs)
    one = train.bce_loss(torch.zeros(1, 4), torch.tensor([[0.9, 0.1, 0.0, 0.0]]), 0.2)
    assert one.item() == pytest.approx(math.log(2))


# --------------------------------------------------------------------------------------------------
# Options


def test_paper_recipe_is_the_default_of_the_paper_s_models():
    for name, batch, lr, seed in (
        ("nexception_t", 64, 2e-3, 1), ("nexception_tp", 64, 2e-3, 1), ("nexception_s", 32, 1.4e-3, 2),
    ):  # fmt: skip
        for world in (1, 2, 4):
            options = resolve(Options(data="/imagenet", model=name), world)
            assert (options.batch, options.lr, options.seed) == (batch, lr, seed)
            assert options.accumulate * world == 4
        expected = {
            "epochs": 300, "cooldown_epochs": 10, "warmup_epochs": 5, "warmup_lr": 1e-4, "min_lr": 1e-6,
            "weight_decay": 0.02, "mixup": 0.1, "cutmix": 1.0, "loss_threshold": 0.2, "rand_augment": 7.0,
            "repeats": 3, "flip": 0.5, "min_scale": 0.08, "drop_path": 0.05, "size": 224, "ema": 0.0,
            "max_grad_norm": 1.0,
        }  # fmt: skip
        for option, value in expected.items():
            assert getattr(options, option) == value, option
    assert resolve(Options(data="/imagenet", model="xception")).size == 299


def test_command_line_overrides_the_recipe():
    given = "--data /imagenet --model nexception_t --lr 0.001 --batch 32 --no-channels-last --rand-augment 0"
    options = resolve(train.parse(Options, given.split(), "train.py"))
    assert (options.lr, options.batch, options.channels_last, options.seed) == (0.001, 32, False, 1)
    assert train.augmentation(options).layers == 0
    assert options.out == "runs/imagenet-nexception_t"
    assert len(train.fields(Options)) <= 40


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--lr -1", "--lr -1.0: must be above 0"),
        ("--ema 1", "--ema 1.0: must be at least 0 and below 1"),
        ("--batch 0", "--batch 0: must be at least 1"),
        ("--min-lr 1", "--min-lr 1.0 is above --lr"),
        ("--compile --grad-checkpointing", "leave out one of them"),
        ("--amp int8", "invalid choice: 'int8'"),
        ("--model resnet50", "model: 'resnet50' is none of nexception_t"),
        ("--data /nowhere", "there is no folder '/nowhere'"),
        ("--batch 5000", "take a smaller batch"),
        ("--device abacus", "--device abacus: no such device"),
        ("--eval /nowhere.pt", "/nowhere.pt: no such file"),
        ("--eval /nowhere.pt --lr 1", "--lr has no effect beside --eval"),
        ("--init-weights /nowhere.pt", "/nowhere.pt: no such file"),
    ],
)
def test_user_errors_are_one_sentence(given, said, tmp_path, capsys):
    out = [] if "--eval" in given else ["--out", str(tmp_path / "run")]
    assert train.main([*given.split(), *out]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("train.py: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "module"), [("--tensorboard", "torch.utils.tensorboard"), ("--wandb", "wandb")]
)
def test_missing_loggers_are_named(flag, module, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert train.main(arguments(tiny, tmp_path / "run", flag)) == 2
    assert f"{flag} needs a package: pip install {flag[2:]}" in capsys.readouterr().err


def test_micro_batches_that_cannot_be_shared():
    with pytest.raises(train.UsageError, match="3 processes cannot share the recipe's 4 micro-batches"):
        resolve(Options(data="/imagenet", model="nexception_t"), world=3)
    assert resolve(Options(data="/imagenet", model="nexception_t", accumulate=1), world=3).accumulate == 1
    assert resolve(Options(), world=3).accumulate == 1


# --------------------------------------------------------------------------------------------------
# Training and evaluation


def make_training(**changes) -> tuple[Training, object]:
    options = resolve(Options(**({"epochs": 3, "size": 16} | changes)))
    shared = {name: getattr(options, name) for name in ("size", "batch", "accumulate", "seed")}
    data = open_data("digits", augment=train.augmentation(options), **shared)
    torch.manual_seed(options.seed)
    return Training(create_model(TINY, num_classes=10, drop_path=options.drop_path), options), data


def test_an_epoch_interrupted_anywhere_goes_on_bit_for_bit():
    whole, data = make_training(ema=0.9, lr=0.02)
    losses = train_one_epoch(whole, data, 1)
    parts, data = make_training(ema=0.9, lr=0.02)
    done = train_one_epoch(parts, data, 1, after_step=lambda step, _: step == 6)
    assert len(done) == 7
    resumed, data = make_training(ema=0.9, lr=0.02)
    resumed.load_state(parts.state())
    assert torch.equal(train_one_epoch(resumed, data, 1, done), losses)
    assert_same(resumed.state(), whole.state())


def test_accumulated_gradients_are_the_mean_over_micro_batches():
    training, data = make_training(batch=32, accumulate=3, mixup=0.0, cutmix=0.0, drop_path=0.0)
    batches = data.train_batches(0)
    expected = None
    for _ in range(3):
        images, labels = next(batches)
        logits = training.model.train()(train.normalize(images, data.mean, data.std))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(10)[labels])
        gradients = torch.autograd.grad(loss / 3, list(training.model.parameters()))
        expected = (
            gradients if expected is None else [a + b for a, b in zip(expected, gradients, strict=True)]
        )
    other, data = make_training(batch=32, accumulate=3, mixup=0.0, cutmix=0.0, drop_path=0.0)
    found = []
    other.optimizer.step = lambda: found.extend(p.grad.clone() for p in other.model.parameters())
    train_one_epoch(other, data, 0, after_step=lambda step, losses: True)
    torch.testing.assert_close(found, list(expected), rtol=1e-5, atol=1e-7)


def test_checkpointed_gradients_are_the_same():
    losses = []
    for checkpointing in (False, True):
        training, data = make_training(grad_checkpointing=checkpointing)
        losses.append(train_one_epoch(training, data, 0))
    torch.testing.assert_close(losses[0], losses[1])


def test_averaged_weights_follow_the_formula():
    training, data = make_training(ema=0.75)
    start = {k: v.clone() for k, v in training.model.state_dict().items()}
    train_one_epoch(training, data, 0, after_step=lambda step, losses: True)
    for name, value in training.ema.state_dict().items():
        now = training.model.state_dict()[name]
        expected = 0.75 * start[name] + 0.25 * now if value.is_floating_point() else now
        torch.testing.assert_close(value, expected)


class Answers(nn.Module):
    """Puts image i's class in place `ranks[i]` of its answer; the first pixel tells which image it is."""

    def __init__(self, labels, ranks):
        super().__init__()
        self.labels, self.ranks, self.one = labels, ranks, nn.Parameter(torch.ones(1))

    def forward(self, images):
        number = (images[:, 0, 0, 0]).round().long()
        logits = -torch.arange(10.0).repeat(len(images), 1)
        for row, n in enumerate(number):
            rank, label = self.ranks[n], self.labels[n]
            logits[row, [rank, label]] = logits[row, [label, rank]]
        return logits


class FewImages:
    mean, std, bad_files = (0.0,) * 3, (1 / 255,) * 3, ()

    def __init__(self, labels, count=None):
        self.labels, self.said = labels, count or len(labels)

    def count(self, split):
        return self.said

    def eval_batches(self, split):
        images = torch.arange(len(self.labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
        yield from zip(images.split(4), self.labels.split(4), strict=True)


def test_evaluation_counts_by_hand():
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
    ranks = [0, 0, 1, 4, 5, 9, 0, 2, 3]
    result = evaluate(Answers(labels, ranks), FewImages(labels))
    assert result["count"] == 9
    assert result["top1"] == pytest.approx(100 * 3 / 9)
    assert result["top5"] == pytest.approx(100 * 7 / 9)
    total = sum(math.exp(-i) for i in range(10))
    assert result["loss"] == pytest.approx(sum(rank + math.log(total) for rank in ranks) / 9)


@pytest.mark.parametrize("said", [8, 10])
def test_evaluation_fails_on_a_wrong_count(said):
    labels = torch.zeros(9, dtype=torch.int64)
    with pytest.raises(train.RunError, match=f"counted 9 of the {said} images"):
        evaluate(Answers(labels, [0] * 9), FewImages(labels, said))


def test_waiting_for_data_is_said_once(capsys):
    class Slow(FewImages):
        name, steps, wait_seconds = "/photos", 10, 0.0

    data = Slow(torch.zeros(1))
    progress = train.Progress(train.Process(), data, epochs=3, images_a_step=4)
    for epoch in range(3):
        progress.begin(epoch, 0)
        time.sleep(0.02)
        data.wait_seconds += 0.01 * epoch  # nothing in the first epoch
        progress.end()
    assert capsys.readouterr().out.count("raise --workers") == 1


def test_digits_are_learnt_and_recorded(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(["--out", str(out), "--epochs", "5", "--device", "cpu"]) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics[:-1]] == [1, 2, 3, 4, 5]
    assert metrics[-1]["test_top1"] > 85 and metrics[-1]["test_count"] == 266
    assert json.loads((out / "config.json").read_text())["options"]["epochs"] == 5
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "lr=0.01" in printed and "epoch 5/5" in printed
    best = load_checkpoint(out / "best.pt")
    assert best.config.to_dict() == MODELS["nexception_nano"].to_dict() | {"num_classes": 10}
    assert train.main(["--eval", str(out / "best.pt"), "--device", "cpu"]) == 0
    assert f"top-1 {metrics[-1]['test_top1']:.2f}%" in capsys.readouterr().out


def test_fine_tuning_starts_from_the_weights(tiny, reference, tmp_path):
    out = tmp_path / "run"
    more = (
        "--init-weights",
        str(reference / "best.pt"),
        "--lr",
        "1e-9",
        "--min-lr",
        "0",
        "--warmup-epochs",
        "0",
    )
    assert train.main(arguments(tiny, out, *more)) == 0
    tuned, start = (torch.load(p / "best.pt", weights_only=True) for p in (out, reference))
    torch.testing.assert_close(tuned["model"]["head.fc.weight"], start["model"]["head.fc.weight"])


def test_bfloat16_and_compile_train(tiny, tmp_path, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    out = tmp_path / "run"
    assert train.main(arguments(tiny, out, "--amp", "bf16", "--compile")) == 0
    state = learnt(out)
    assert not any("_orig_mod" in name for name in state["model"])
    assert state["metrics"][2]["train_loss"] < state["metrics"][0]["train_loss"]


# --------------------------------------------------------------------------------------------------
# Stopping and going on


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_in_mid_epoch_and_the_same_command_goes_on(
    kind, tiny, reference, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    step, before = Training.step, signal.getsignal(kind)
    taken = []

    def step_and_signal(self):
        step(self)
        taken.append(1)
        if len(taken) == 25:
            os.kill(os.getpid(), kind)

    monkeypatch.setattr(Training, "step", step_and_signal)
    assert train.main(arguments(tiny, out, "--ema", "0.9")) == 128 + kind
    assert f"{kind.name}: saved in epoch 2 after step 6; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(kind) is before
    assert train.main(arguments(tiny, out, "--ema", "0.9")) == 0
    assert "going on at epoch 2/3, step 7" in capsys.readouterr().out
    assert_same(learnt(out), learnt(reference))


def test_a_signal_during_evaluation_keeps_the_epoch(tiny, reference, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    agreed = train.StopSignal.agreed
    taken = []

    def after_the_last_step(self):
        answer = agreed(self)
        taken.append(1)
        if len(taken) == 38:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    monkeypatch.setattr(train.StopSignal, "agreed", after_the_last_step)
    assert train.main(arguments(tiny, out, "--ema", "0.9")) == 143
    assert "saved in epoch 2 after step 19" in capsys.readouterr().out
    assert train.main(arguments(tiny, out, "--ema", "0.9")) == 0
    assert_same(learnt(out), learnt(reference))


def test_killed_at_any_moment_it_ends_the_same(tiny, reference, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *arguments(tiny, out, "--ema", "0.9")]
    rng = np.random.default_rng(int(time.time()))
    for _ in range(2):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for line in process.stdout:
            if line.startswith("epoch"):
                time.sleep(rng.uniform(0, 0.3))
                break
        process.kill()
        process.wait()
        process.stdout.close()
    last = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert re.search("going on at epoch [23]|finished", last.stdout), last.stdout
    assert_same(learnt(out), learnt(reference))
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_broken_checkpoint_falls_back_to_the_previous(damage, tiny, reference, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(arguments(tiny, out, "--ema", "0.9"))
    if damage == "truncated":
        content = (out / "last.pt").read_bytes()
        (out / "last.pt").write_bytes(content[: len(content) // 2])
    else:
        (out / "last.pt").unlink()
    capsys.readouterr()
    assert train.main(arguments(tiny, out, "--ema", "0.9")) == 0
    captured = capsys.readouterr()
    assert ("last.pt is broken" in captured.err) == (damage == "truncated")
    assert_same(learnt(out), learnt(reference))
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(b"")
    assert train.main(arguments(tiny, out, "--ema", "0.9")) == 2
    assert "can be read: move it away" in capsys.readouterr().err


def test_a_finished_run_tests_no_more(tiny, reference, monkeypatch, capsys):
    def no_evaluation(*_):
        raise AssertionError("evaluated again")

    before = (reference / "last.pt").read_bytes()
    monkeypatch.setattr(train, "evaluate", no_evaluation)
    assert (
        train.main(arguments(tiny, reference, "--ema", "0.9", "--log-every", "7", "--eval-batch", "8")) == 0
    )
    printed = capsys.readouterr().out
    assert "finished" in printed and "test top-1" in printed
    assert (reference / "last.pt").read_bytes() == before


def test_other_options_on_a_run_are_refused(tiny, reference, capsys):
    before = learnt(reference)
    assert train.main(arguments(tiny, reference, "--lr", "0.5", "--epochs", "4", "--ema", "0.9")) == 2
    error = capsys.readouterr().err
    assert "epochs 3 there, 4 now" in error and "lr 0.01 there, 0.5 now" in error and "another --out" in error
    assert train.main(arguments(tiny, reference, "--ema", "0.9", "--accumulate", "2")) == 2
    assert "micro-batches a step 1 there, 2 now" in capsys.readouterr().err
    assert_same(learnt(reference), before)


def test_a_folder_in_use_is_refused(tiny, tmp_path, capsys):
    folder = train.Folder(str(tmp_path))
    assert folder.open({}) is None
    assert train.main(arguments(tiny, tmp_path)) == 2
    assert "in use by another run" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_at_its_step(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    loss, calls = train.bce_loss, []

    def sometimes_infinite(*args):
        calls.append(1)
        return loss(*args) * (math.inf if len(calls) == 19 + 12 else 1)

    monkeypatch.setattr(train, "bce_loss", sometimes_infinite)
    assert train.main(arguments(tiny, out, "--log-every", "5")) == 1
    assert "the loss is inf at epoch 2, step 12" in capsys.readouterr().err
    last = learnt(out)
    assert last["epoch"] == 1 and all(v.isfinite().all() for v in last["model"].values())
    assert len(calls) == 19 + 15  # no step beyond the look that found it


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    step, taken = Training.step, []

    def last_step_breaks(self):
        step(self)
        taken.append(1)
        if len(taken) == 38:
            next(self.model.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(Training, "step", last_step_breaks)
    assert train.main(arguments(tiny, out)) == 1
    assert "the weights' norm is nan at epoch 2, step 19" in capsys.readouterr().err
    assert learnt(out)["epoch"] == 1


def test_a_full_disk_is_one_line_and_loses_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(arguments(tiny, out)) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10_000, hard)
    )  # bytes; what a full disk does, but for the reason
    try:
        with pytest.raises(train.RunError, match=r"cannot write .*last\.pt: File too large"):
            train.save_checkpoint(out / "last.pt", {"x": torch.zeros(10_000)}, out / "previous.pt")
        assert train.main(arguments(tiny, tmp_path / "other")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "best.pt: File too large" in error and "make room" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob("*/.*.tmp"))


# --------------------------------------------------------------------------------------------------
# Several processes


def torchrun(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *more]
    return subprocess.Popen(
        command, cwd=folder, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


DDP_GOES_FIRST = f"""  # train.py, and a check that ends a run which could hang at its end
import gc, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, {str(ROOT)!r})
import train

def destroy(destroy=dist.destroy_process_group):
    assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects()), "DDP is still there"
    destroy()

def close(run, close=train.Run.close):
    run.cycle = run  # torch.compile makes such cycles too
    close(run)

dist.destroy_process_group, train.Run.close = destroy, close
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_processes_learn_what_one_does(tiny, tmp_path):
    settings = ("--batch", "32", "--mixup", "0.2", "--cutmix", "1.0")
    script = tmp_path / "script.py"
    script.write_text(DDP_GOES_FIRST)
    process = torchrun(tmp_path, str(script), *arguments(tiny, tmp_path / "two", *settings, "--epochs", "1"))
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert output.count("epoch 1/1") == 1 and "on 266 images" in output
    one = arguments(tiny, tmp_path / "one", *settings, "--epochs", "1", "--accumulate", "2")
    assert train.main(one) == 0
    two, one = (learnt(tmp_path / name) for name in ("two", "one"))
    for name, value in one["model"].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(two["model"][name], value, rtol=1e-3, atol=1e-4)
    assert two["metrics"][0]["train_loss"] == pytest.approx(one["metrics"][0]["train_loss"], rel=1e-5)


def test_torchrun_restarts_after_a_killed_rank(tiny, tmp_path):
    out = tmp_path / "run"
    process = torchrun(
        tmp_path, "--max-restarts=1", str(ROOT / "train.py"), *arguments(tiny, out, "--epochs", "30")
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch 2/30"):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
    output, error = process.communicate(timeout=300)
    output = "".join(lines) + output
    assert process.returncode == 0, error
    assert re.search(r"going on at epoch \d+/30", output), output
    assert learnt(out)["epoch"] == 30
    assert "test top-1" in output


@pytest.mark.gpu
def test_an_epoch_does_not_wait_for_the_gpu():
    options = resolve(Options(epochs=1, amp="bf16"))
    device = torch.device("cuda")
    data = open_data("digits", augment=train.augmentation(options), batch=options.batch, device=device)
    training = Training(create_model(TINY, num_classes=10), options, train.Process(device=device))
    train_one_epoch(training, data, 0)  # warms up what may wait the first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = train_one_epoch(training, data, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()
