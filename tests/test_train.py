"""Compare train.py with timm, with hand calculations, and with itself when killed, resumed or distributed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import data
import train
from data import Plan, RunError, UsageError, open_data
from model import MODELS, ModelConfig, create_model, load_checkpoint
from train import Lamb, Options, Process, Stopped, Training, evaluate, fit, option, parse, resolve

import examples
import numpy as np
import pytest
import timm.data.mixup
import timm.loss
import timm.optim.lamb
import timm.scheduler
import timm.utils
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(
    stem_width=8, widths=(8,), depths=(1,), exit_widths=(16, 16, 16), kernel=3, drop_path=0.2, input_size=16
)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: runs are compared bit for bit across processes, and tiny networks need no second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """JSON config of a network that trains an epoch of digits in a fraction of a second."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    TINY.to_json(path)
    return str(path)


def arguments(tiny: str, out: Path, more: str = "") -> list[str]:
    return f"--model {tiny} --out {out} --size 16 --epochs 3 --device cpu --ema 0.9 {more}".split()


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory) -> Path:
    """Folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    assert train.main(arguments(tiny, out)) == 0
    return out


@pytest.fixture
def finished(reference, tmp_path) -> Path:
    """Copy of that folder, free to change."""
    return Path(shutil.copytree(reference, tmp_path / "run"))


def assert_same(a, b) -> None:
    """Assert that numbers and tensors in nested containers are identical."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def results(state: dict) -> dict:
    """Return the content of a checkpoint, without clock readings and paths."""
    clock = ("images_per_second", "data_wait", "seconds")
    metrics = [{k: v for k, v in line.items() if k not in clock} for line in state["metrics"]]
    return {k: state[k] for k in ("model", "ema", "optimizers", "epoch", "best")} | {"metrics": metrics}


def learned(out: Path) -> dict:
    return results(torch.load(out / "last.pt", weights_only=True))


# --------------------------------------------------------------------------------------------------
# Optimizers, schedule, mixing, losses


def lamb_problem(dtype: torch.dtype) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (6, 3, 2, 2), (4, 1, 5, 5), (3, 3), (9,), (1,), (2, 2)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors[3].zero_()  # a weight of zero
    return nn.ParameterList(tensors)


@pytest.mark.parametrize(
    ("decay", "scale", "dtype", "tolerance"),
    [
        (0.0, 1.0, torch.float32, 1e-6),
        (0.02, 0.01, torch.float32, 1e-6),  # gradients below, near and above the clipping norm
        (0.02, 1.0, torch.float32, 1e-6),
        (0.02, 100.0, torch.float32, 1e-6),
        (0.02, 1.0, torch.float64, 1e-12),
    ],
)
def test_lamb_equals_timm_for_50_steps(decay, scale, dtype, tolerance):
    ours, theirs = lamb_problem(dtype), lamb_problem(dtype)
    mine = Lamb(train.parameter_groups(ours, decay), lr=2e-3)
    groups = train.parameter_groups(theirs, decay)
    other = timm.optim.lamb.Lamb(groups, lr=2e-3, eps=1e-6, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(50):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = (torch.randn(a.shape, generator=generator) * scale).to(dtype)
            if (i == 4 and step < 20) or i == 5:
                gradient.zero_()  # zero updates, at first or always
            a.grad, b.grad = (None, None) if i == 6 else (gradient.clone(), gradient)
        for optimizer in (mine, other):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - step / 60)
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert not torch.equal(ours[0], lamb_problem(dtype)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_first_step_of_lamb_by_hand(dtype):
    # Adam's first update is 1 per value. With decay it is 1.02; 1 - 0.1 * 1.02 * trust ratio 4 / (4 * 1.02)
    # = 0.9. A group without decay steps by lr.
    p, q = nn.Parameter(torch.ones(4, 4, dtype=dtype)), nn.Parameter(torch.ones(4, dtype=dtype))
    groups = [{"params": [p], "weight_decay": 0.02}, {"params": [q], "weight_decay": 0.0}]
    p.grad, q.grad = torch.full_like(p, 100.0), torch.full_like(q, 100.0)  # squared norms overflow float16
    Lamb(groups, lr=0.1).step()
    for value in (p, q):
        torch.testing.assert_close(value.data, torch.full_like(value, 0.9), rtol=0, atol=4e-3)


SHARDED = """  # LAMB on the shards of two processes, beside LAMB on whole tensors
import copy
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from train import Lamb, parameter_groups

dist.init_process_group("gloo")
torch.manual_seed(0)
whole = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)).double()  # the last layer has an empty shard
sharded = copy.deepcopy(whole)
fully_shard(sharded)
optimizers = [Lamb(parameter_groups(model, 0.02), lr=0.1) for model in (whole, sharded)]
for scale in (1e-3, 1.0, 1e3, 1e3):  # gradients below and above the clipping norm
    images = torch.randn(4, 5, dtype=torch.float64)  # the same in both processes
    for model, optimizer in zip((whole, sharded), optimizers):
        optimizer.zero_grad()
        (scale * model(images)).square().mean().backward()
        optimizer.step()
    for p, q in zip(whole.parameters(), sharded.parameters()):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-12, atol=1e-12)
dist.destroy_process_group()
"""


def test_lamb_on_shards_equals_lamb_on_whole_tensors(tmp_path):
    (tmp_path / "script.py").write_text(SHARDED)
    settings = {"cwd": tmp_path, "env": ONE_THREAD, "capture_output": True, "text": True}
    done = subprocess.run([*TWO_PROCESSES, "script.py"], **settings)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("decay", [0.02, 0.0])
def test_lamb_does_not_depend_on_memory_layout(decay):
    """Also change the layout of the moments, as when a run is resumed in another layout."""

    def channels_last(tensor):
        return tensor.to(memory_format=torch.channels_last)

    def with_gaps(tensor):
        return torch.cat([tensor, tensor], 1)[:, :4]

    found = []
    for change, moments in (
        (torch.clone, torch.clone), (channels_last, torch.clone), (channels_last, torch.Tensor.contiguous),
        (with_gaps, torch.clone),
    ):  # fmt: skip
        torch.manual_seed(0)
        p = nn.Parameter(change(torch.randn(8, 4, 3, 3)))
        optimizer = Lamb([p], lr=1e-2, weight_decay=decay)
        for _ in range(4):
            state = optimizer.state[p]
            state.update({name: moments(value) for name, value in state.items()})
            p.grad = torch.randn(8, 4, 3, 3)
            optimizer.step()
        found.append(p.detach())
        torch.testing.assert_close(found[-1], found[0], rtol=1e-6, atol=1e-7)


def test_biases_and_norms_have_no_weight_decay():
    model = create_model(TINY)
    decayed, rest = train.parameter_groups(model, 0.02)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    biases = {id(p) for name, p in model.named_parameters() if name.endswith(".bias")}
    assert {id(p) for p in rest["params"]} == norms | biases
    assert rest["weight_decay"] == 0 and decayed["weight_decay"] == 0.02
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_schedule_equals_timm():
    options = resolve(Options(data="/somewhere", model="nexception_t"))
    values = [train.lr_at(epoch, options) for epoch in range(310)]
    assert values[:5] == pytest.approx([1e-4, 4.8e-4, 8.6e-4, 1.24e-3, 1.62e-3], rel=1e-12)
    assert values[300:] == [1e-6] * 10
    parameter = nn.Parameter(torch.zeros(1))
    schedule = timm.scheduler.CosineLRScheduler(
        torch.optim.SGD([parameter], lr=2e-3), t_initial=300, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-4
    )
    assert values == pytest.approx([schedule._get_lr(epoch)[0] for epoch in range(310)], rel=1e-12)
    lowest = resolve(Options(data="/photos", model="nexception_t", lr=1e-7, epochs=6))
    assert max(train.lr_at(epoch, lowest) for epoch in range(16)) <= 1e-7  # no epoch has a rate above --lr
    said = []
    short = resolve(Options(data="/photos", model="nexception_t", epochs=4), say=said.append)
    assert "warm-up shortened to 1 of 4 epochs" in said and short.cooldown_epochs == 0
    assert resolve(Options(data="/photos", model="nexception_t", epochs=90)).cooldown_epochs == 3
    cosine = [1e-6 + (2e-3 - 1e-6) / 2 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [train.lr_at(epoch, short) for epoch in range(4)] == pytest.approx([1e-4, *cosine[1:]])


@pytest.mark.parametrize("alphas", [(0.1, 1.0), (0.4, 0.0), (0.0, 1.0)])
def test_mixup_equals_timm(alphas, monkeypatch):
    rng = np.random.default_rng(0)
    for name, draw in (("rand", rng.random), ("beta", rng.beta), ("randint", rng.integers)):
        monkeypatch.setattr(np.random, name, draw)
    theirs = timm.data.mixup.Mixup(
        mixup_alpha=alphas[0], cutmix_alpha=alphas[1], label_smoothing=0.0, num_classes=10
    )
    boxes = 0
    for _ in range(60):
        images, labels = torch.randn(8, 3, 20, 24), torch.randint(10, (8,))
        state = rng.bit_generator.state
        expected = theirs(images.clone(), labels)
        rng.bit_generator.state = state
        mixed = train.mix(images.clone(), labels, 10, *alphas, rng)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)
        same, other = mixed[0] == images, mixed[0] == images.flip(0)
        boxes += bool((same | other).all() and not same.all() and not other.all())
    assert {(0.1, 1.0): 10 < boxes < 50, (0.4, 0.0): boxes == 0, (0.0, 1.0): boxes > 50}[alphas]
    mixed, targets = train.mix(images.clone(), torch.arange(8) % 3, 3, 0.0, 0.0, rng)
    assert torch.equal(mixed, images) and torch.equal(targets, torch.eye(3)[torch.arange(8) % 3])


def test_losses_equal_timm():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(16, 10, generator=generator), torch.rand(16, 10, generator=generator)
    targets[0, 0] = 0.2  # a target at the threshold counts as 0
    options = Options(loss_threshold=0.2)
    theirs = timm.loss.BinaryCrossEntropy(smoothing=0.0, target_threshold=0.2)(logits, targets)
    torch.testing.assert_close(train.LOSSES["bce"](logits, targets, None, options), theirs)
    theirs = timm.loss.SoftTargetCrossEntropy()(logits, targets)
    torch.testing.assert_close(train.LOSSES["soft_ce"](logits, targets, None, options), theirs)


# --------------------------------------------------------------------------------------------------
# Options and recipes


@dataclasses.dataclass
class Sample:
    """One option of each kind."""

    path: str = option("here", "a path", positional=True)
    count: int | None = option(None, "a number", least=1, most=9)
    names: tuple[str, ...] = option(("a",), "names")
    rates: tuple[float, ...] = option((), "rates", above=0)
    fast: bool = option(False, "speed")


def test_parser_reads_all_kinds_of_options():
    assert parse(Sample, [], "x") == Sample("here", None, ("a",), (), False)
    given = ["there", "--count", "9", "--names", "a,b", "--rates", "1e-3,2", "--fast"]
    assert parse(Sample, given, "x") == Sample("there", 9, ("a", "b"), (1e-3, 2.0), True)
    for bad, said in (
        ("--count 10", "--count must be at least 1 and at most 9, not 10"),
        ("--count ten", "--count: 'ten' is not of type int"),
        ("--rates 1,0", "--rates must be above 0, not 1,0"),
    ):
        with pytest.raises(UsageError, match=said):
            parse(Sample, bad.split(), "x")


def test_paper_recipe_is_the_default_of_the_paper_s_models(tmp_path):
    grown = tmp_path / "found.json"  # an S with another kernel: its recipe is chosen by shape, not by name
    dataclasses.replace(MODELS["nexception_s"], kernel=7).to_json(grown)
    for name, batch, lr, seed in (
        ("nexception_t", 64, 2e-3, 1), ("nexception_tp", 64, 2e-3, 1), ("nexception_s", 32, 1.4e-3, 2),
        (str(grown), 32, 1.4e-3, 2),
    ):  # fmt: skip
        for world in (1, 2, 4):
            options = resolve(Options(data="/imagenet", model=name), world, images=1_281_167)
            assert (options.batch, options.lr, options.seed) == (batch, lr, seed)
            assert options.accumulate * world == 4
        expected = {
            "epochs": 300, "cooldown_epochs": 10, "warmup_epochs": 5, "weight_decay": 0.02, "mixup": 0.1,
            "cutmix": 1.0, "loss": "bce", "loss_threshold": 0.2, "policy": "rand_augment", "magnitude": 7.0,
            "repeats": 3, "flip": 0.5, "min_scale": 0.08, "drop_path": 0.05, "size": 224, "ema": 0.0,
        }  # fmt: skip
        assert expected.items() <= dataclasses.asdict(options).items()
    assert resolve(Options(data="/imagenet", model="xception")).size == 299


def test_recipes_are_chosen_by_data_and_initial_weights(reference):
    said = []
    small = resolve(Options(data="/photos", model="nexception_s"), images=3800, say=said.append)
    assert (small.repeats, small.cooldown_epochs, small.policy, small.epochs) == (1, 0, "none", 263)
    why = "the image count, 3,800 (--recipe paper for ImageNet's)"
    assert f"recipe small-folder, chosen by {why}" in said[-2] and "--init-weights" in said[-1]
    paper = resolve(Options(data="/photos", model="nexception_s", recipe="paper"), images=3800)
    assert (paper.epochs, paper.repeats, paper.lr) == (300, 3, 1.4e-3)
    weights = str(reference / "best.pt")  # network and size come from the checkpoint
    tuned = resolve(Options(data="/photos", init_weights=weights), images=3800, say=said.append)
    assert (tuned.epochs, tuned.repeats, tuned.size, tuned.model) == (30, 1, 16, None)
    assert tuned.lr <= 2e-4 and tuned.optimizer == "adamw" and tuned.out == "runs/photos-from-reference"
    assert "recipe fine-tune, chosen by --init-weights" in said[-1]


def test_command_line_overrides_the_recipe():
    given = "--data /imagenet --model nexception_t --lr 0.001 --batch 32 --no-compile --policy none"
    options = resolve(parse(Options, given.split(), "train.py"))
    assert (options.lr, options.batch, options.compile, options.seed) == (0.001, 32, False, 1)
    assert train.augmentation(options).policy == "none"
    assert options.out == "runs/imagenet-nexception_t"
    on_gpu = torch.cuda.is_available()
    assert (options.amp, options.device) == (("bf16", "cuda") if on_gpu else ("off", "cpu"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--lr inf", "--lr must be above 0, not inf"),
        ("--batch 1", "--batch 1: batch norm needs at least 2 images"),
        ("--freeze", "give --init-weights"),
        ("--tracker wandb", "--tracker wandb needs a package: pip install wandb"),
        ("--min-scale 0.5", "--min-scale has no effect with digits: leave it out"),
        ("--no-exif", "--exif has no effect with digits"),
        ("--loss soft_ce --loss-threshold 0.3", "--loss-threshold has no effect with --loss soft_ce"),
        ("--model resnet50", "'resnet50'"),
        ("--model nexception_tp --size 16", "at least 32 pixels per side (--size)"),
        ("--data /nowhere", "/nowhere"),
        ("--out {weights}", "grey.pt: File exists"),
        ("--batch 5000", "too few for one step"),
        ("--device abacus", "--device abacus: no such device"),
        ("--eval /nowhere.pt", "/nowhere.pt: no such file"),
        ("--eval /nowhere.pt --lr 1", "--lr has no effect with --eval"),
        ("--eval {weights}", "has in_channels=1, but images have 3 channels"),
        ("--init-weights {weights}", "has in_channels=1, but images have 3 channels"),
    ],
)
def test_user_errors_are_one_sentence_and_leave_no_folder(given, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    if "{weights}" in given:
        config, path = dataclasses.replace(TINY, in_channels=1), tmp_path / "grey.pt"
        torch.save({"config": dataclasses.asdict(config), "model": create_model(config).state_dict()}, path)
        given = given.format(weights=path)
    out = [] if "--eval" in given else ["--out", str(tmp_path / "runs" / "run")]
    assert train.main([*out, *given.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("train.py: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_micro_batches_are_split_among_processes():
    refused = "4 micro-batches of 64 .* 8 processes: the closest is --accumulate 1 --batch 32"
    with pytest.raises(UsageError, match=refused):
        resolve(Options(data="/imagenet", model="nexception_t"), world=8)
    assert resolve(Options(data="/imagenet", model="nexception_t", accumulate=1), world=3).accumulate == 1
    assert resolve(Options(), world=3).accumulate == 1


# --------------------------------------------------------------------------------------------------
# Training and evaluation


def make_training(**changes) -> tuple[Training, data.Data]:
    options = resolve(Options(**({"epochs": 1, "warmup_epochs": 0, "size": 16, "device": "cpu"} | changes)))
    plan, device = Plan(options.batch, options.accumulate, seed=options.seed), torch.device(options.device)
    data = open_data("digits", plan, size=16, augment=train.augmentation(options), device=device)
    torch.manual_seed(options.seed)
    network = create_model(TINY, num_classes=10, drop_path=options.drop_path)
    return Training(network, options, Process(device=device)), data


class StopAfter:
    """Stop signal that arrives after `steps` steps; `action` is called after each step."""

    signal = 0

    def __init__(self, steps: int = -1, action=lambda: None):
        self.steps, self.action = steps, action

    def agreed(self) -> bool:
        self.steps -= 1
        self.action()
        return self.steps == 0


@pytest.fixture
def muon(monkeypatch) -> None:
    """Add the example of an optimizer: Muon for matrices, AdamW for the rest."""
    monkeypatch.setitem(train.OPTIMIZERS, "muon", examples.muon)


def test_several_optimizers_share_the_schedule(muon):
    training, data = make_training(optimizer="muon", lr=1e-3)
    before = copy.deepcopy(training.model)
    with pytest.raises(Stopped):
        fit(training, data, stop=StopAfter(1))
    rate = train.lr_at(0, training.options)
    rates = [group["lr"] for optimizer in training.optimizers for group in optimizer.param_groups]
    assert rates == [10 * rate, rate]  # the matrices' group has a scale of ten
    for p, q in zip(before.parameters(), training.model.parameters(), strict=True):
        assert not torch.equal(p, q)


@pytest.mark.parametrize("optimizer", ["lamb", "muon"])
def test_resuming_in_mid_epoch_is_exact(optimizer, muon):
    settings = {"ema": 0.9, "lr": 0.02, "accumulate": 2, "batch": 32, "optimizer": optimizer}
    whole, data = make_training(**settings)
    fit(whole, data)
    parts, data = make_training(**settings)
    with pytest.raises(Stopped):
        fit(parts, data, stop=StopAfter(7))
    assert len(parts.losses) == 7
    resumed, data = make_training(**settings)
    resumed.load_state(copy.deepcopy(parts.state()))
    fit(resumed, data)
    assert_same(results(resumed.state()), results(whole.state()))


def test_accumulated_gradients_are_the_mean_over_micro_batches():
    plain = {"batch": 32, "accumulate": 3, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
    training, data = make_training(**plain)
    batches, total = data.train_batches(0), 0.0
    for _ in range(3):
        images, labels = next(batches)
        logits = training.model.train()(data.transform.normalize(images))
        total += nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(10)[labels]) / 3
    expected = torch.autograd.grad(total, list(training.model.parameters()))
    other, data = make_training(**plain)
    found = []
    other.optimizers[0].step = lambda: found.append([p.grad.clone() for p in other.model.parameters()])
    with pytest.raises(Stopped):
        fit(other, data, stop=StopAfter(1))
    torch.testing.assert_close(found[0], list(expected), rtol=1e-5, atol=1e-7)


def test_running_statistics_equal_those_of_a_process_per_micro_batch():
    """Simulate four processes: each step starts from rank 0's statistics; an epoch ends with their mean."""
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "lr": 1e-30}  # weights do not change
    training, data = make_training(batch=64, accumulate=4, **plain)
    ranks = [copy.deepcopy(training.model).train() for _ in range(4)]
    batches = data.train_batches(0)
    for _ in range(data.steps):
        for rank in ranks[1:]:
            rank.load_state_dict(ranks[0].state_dict())
        for rank in ranks:
            rank(data.transform.normalize(next(batches)[0]))
    fit(training, data)
    expected = torch.stack([train.RunningStatistics(rank).read() for rank in ranks]).mean(0)
    assert data.steps > 2
    found = train.RunningStatistics(training.model).read()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_averaged_weights_equal_timm():
    training, data = make_training(ema=0.75)
    average = timm.utils.ModelEmaV3(training.model, decay=0.75, use_warmup=True)
    updates = iter(range(1, 100))
    fit(training, data, stop=StopAfter(action=lambda: average.update(training.model, step=next(updates))))
    for name, value in training.ema.state_dict().items():
        torch.testing.assert_close(value, average.module.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_gradients_of_other_optimizers_are_clipped(monkeypatch):
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e-3)
    training, data = make_training(optimizer="adamw")
    seen, parameters = [], list(training.model.parameters())
    training.optimizers[0].register_step_pre_hook(
        lambda *_: seen.append(nn.utils.get_total_norm([p.grad for p in parameters]).item())
    )
    fit(training, data)
    assert seen == pytest.approx([1e-3] * data.steps, rel=1e-2)


def test_freezing_trains_the_classifier_only():
    training, data = make_training(freeze=True, init_weights="given", model="nexception_nano")
    before = copy.deepcopy(training.model.state_dict())
    fit(training, data)
    after = training.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"head.fc.weight", "head.fc.bias"}


def test_evaluation_by_hand():
    """Use logits as images, and a network that returns its input."""
    identity = nn.PReLU(init=1.0)

    def images(logits, labels):
        return SimpleNamespace(
            transform=SimpleNamespace(normalize=lambda images: images),
            count=lambda split: len(labels) + 1,  # including an unreadable file
            eval_batches=lambda split: zip(logits.split(4), labels.split(4), strict=True),
        )

    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
    ranks = [0, 0, 1, 4, 5, 9, 0, 2, 3]  # of the correct class
    logits = -torch.arange(10.0).repeat(9, 1)
    for n, (rank, label) in enumerate(zip(ranks, labels, strict=True)):
        logits[n, [rank, label]] = logits[n, [label, rank]]
    result = evaluate(identity, images(logits, labels))
    assert (result["count"], result["unreadable"]) == (9, 1)
    assert result["top1"] == pytest.approx(100 * 3 / 9)
    assert result["top5"] == pytest.approx(100 * 7 / 9)
    total = sum(math.exp(-i) for i in range(10))
    assert result["loss"] == pytest.approx(sum(rank + math.log(total) for rank in ranks) / 9)
    right = images(torch.eye(10)[labels], labels - 1)
    assert evaluate(identity, right, columns=torch.arange(1, 10))["top1"] == 100
    logits[7, 0], logits[8, 0] = math.nan, math.inf
    with pytest.raises(RunError, match="the outputs for 2 of 9 images of val are not finite"):
        evaluate(identity, images(logits, labels))


def test_contradictions_are_refused():
    with pytest.raises(UsageError, match=r"call resolve\(options\)"):
        Training(create_model(TINY), Options())
    training, data = make_training(batch=32)
    data.plan = Plan(64, seed=data.plan.seed)
    with pytest.raises(UsageError, match=r"the data have .*batch=64.*the options ask for .*batch=32"):
        fit(training, data)


def test_epochs_without_an_evaluation_have_no_scores():
    training, data = make_training(epochs=2)
    said, logged = [], []
    fit(training, data, say=said.append, log=lambda *line: logged.append(line), score_after=[2])
    assert ["val_top1" in row for row in training.metrics] == [False, True] and "top-1" not in said[0]
    for (row, losses), line in zip(logged, training.metrics, strict=True):
        assert row == line and len(losses) == data.steps
        assert row["train_loss"] == pytest.approx(sum(losses) / data.steps)


def test_digits_are_learned_and_recorded(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(f"--out {out} --epochs 5 --size 16 --device cpu".split()) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics[:-1]] == [1, 2, 3, 4, 5]
    assert metrics[-1]["test_top1"] > 85 and metrics[-1]["test_count"] == 266
    record = json.loads((out / "config.json").read_text())
    assert (record["options"]["epochs"], record["options"]["amp"]) == (5, "off")
    assert record["machine"]["device"] == "cpu"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "lr=0.01" in printed and "epoch 5/5" in printed and "recipe digits" in printed
    best = load_checkpoint(out / "best.pt")
    changed = {"num_classes": 10, "input_size": 16}
    assert best.config == dataclasses.replace(MODELS["nexception_nano"], **changed)
    evaluation = ["--eval", str(out / "best.pt"), "--device", "cpu"]
    assert train.main(evaluation) == 0
    assert f"top-1 {metrics[-1]['test_top1']:.2f}%" in capsys.readouterr().out
    content = torch.load(out / "best.pt", weights_only=True)
    content["model"]["stem.norm.running_var"][0] = math.nan
    torch.save(content, out / "best.pt")
    assert train.main(evaluation) == 1
    assert f"{out / 'best.pt'}: the outputs for 266 of 266 images of test" in capsys.readouterr().err


def test_fine_tuning_starts_from_the_weights(reference, tmp_path):
    out, start = tmp_path / "run", load_checkpoint(reference / "best.pt")
    weights = shutil.copy(reference / "best.pt", tmp_path / "start.pt")
    given = f"--init-weights {weights} --size 16 --epochs 1 --lr 1e-9 --device cpu --out {out}"
    assert train.main(given.split()) == 0
    os.remove(weights)
    assert train.main(given.split()) == 0  # everything is in the run's folder
    tuned = load_checkpoint(out / "best.pt")
    torch.testing.assert_close(tuned.head.fc.weight, start.head.fc.weight)
    assert tuned.config == start.config


def test_bfloat16_and_compile_train(tiny, tmp_path, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    out = tmp_path / "run"
    assert train.main(arguments(tiny, out, "--amp bf16 --compile")) == 0
    state = learned(out)
    assert not any("_orig_mod" in name for name in state["model"])
    assert state["metrics"][2]["train_loss"] < state["metrics"][0]["train_loss"]


# --------------------------------------------------------------------------------------------------
# Stopping and resuming


@pytest.mark.parametrize(
    ("kind", "after", "place"),
    [(signal.SIGTERM, 24, 6), (signal.SIGINT, 24, 6), (signal.SIGUSR1, 38, 19)],  # 38: during evaluation
)
def test_signals_save_in_mid_epoch_and_the_same_command_resumes(
    kind, after, place, tiny, reference, tmp_path, monkeypatch, capsys
):
    out, taken = tmp_path / "run", []
    agreed, before = train.StopSignal.agreed, signal.getsignal(kind)

    def signalled(self):
        answer = agreed(self)
        taken.append(1)
        if len(taken) == after:
            os.kill(os.getpid(), kind)
        return answer

    monkeypatch.setattr(train.StopSignal, "agreed", signalled)
    assert train.main(arguments(tiny, out)) == 128 + kind
    printed = capsys.readouterr().out
    assert f"{kind.name}: saved in epoch 2 after step {place}; repeat the command" in printed
    assert signal.getsignal(kind) is before
    assert train.main(arguments(tiny, out)) == 0
    assert f"continuing at epoch 2/3, step {place + 1}" in capsys.readouterr().out
    assert_same(learned(out), learned(reference))
    rows = torch.load(out / "last.pt", weights_only=True)["metrics"][:3]
    assert all(0 < row["images_per_second"] < 1e5 for row in rows)  # the clock includes time before the stop


def test_killed_runs_end_with_the_same_result(tiny, reference, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *arguments(tiny, out)]
    settings = {"cwd": tmp_path, "env": ONE_THREAD, "text": True}
    rng = np.random.default_rng(int(time.time()))
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=1, **settings) as process:
            any(line.startswith("epoch ") for line in process.stdout)  # wait for the first epoch
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
    last = subprocess.run(command, capture_output=True, **settings)
    assert last.returncode == 0, last.stderr
    assert re.search("continuing at epoch [23]|finished", last.stdout), last.stdout
    assert_same(learned(out), learned(reference))
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 1000), Path.unlink])
def test_the_previous_checkpoint_replaces_a_broken_one(damage, tiny, reference, finished, capsys):
    damage(finished / "last.pt")
    assert train.main(arguments(tiny, finished)) == 0
    assert ("last.pt is not a readable checkpoint" in capsys.readouterr().err) == (damage is not Path.unlink)
    assert_same(learned(finished), learned(reference))


def test_lost_best_weights_are_replaced_or_reported(tiny, finished, capsys):
    (finished / "best.pt").write_bytes(b"PK")
    last = torch.load(finished / "last.pt", weights_only=True)
    last["metrics"].pop()  # the result on the test images
    torch.save(last, finished / "last.pt")
    assert train.main(arguments(tiny, finished)) == 0
    assert "best.pt is not a readable checkpoint" in capsys.readouterr().err
    last |= {"epoch": 2, "metrics": last["metrics"][:2], "best": 101.0}  # better than any epoch to come
    torch.save(last, finished / "last.pt")
    assert train.main(arguments(tiny, finished)) == 0
    assert load_checkpoint(finished / "best.pt") and "test top-1" in capsys.readouterr().out


def test_finished_runs_are_not_evaluated_again(tiny, finished, monkeypatch, capsys):
    before = (finished / "last.pt").read_bytes()
    (finished / "best.pt").write_bytes(b"lost")  # no longer needed
    monkeypatch.setattr(train, "evaluate", None)
    assert train.main(arguments(tiny, finished, "--workers 1 --root elsewhere")) == 0
    printed = capsys.readouterr().out
    assert "finished" in printed and "test top-1" in printed
    assert (finished / "last.pt").read_bytes() == before


def test_folders_of_other_runs_are_refused(tiny, finished, capsys):
    def refused(given: str = "") -> str:
        assert train.main(arguments(tiny, finished, given)) == 2
        return capsys.readouterr().err

    before = learned(finished)
    error = refused("--lr 0.5 --epochs 4 --accumulate 2 --amp bf16 --optimizer adamw")
    for change in (
        "lr was 0.01, now 0.5", "epochs was 3, now 4", "micro-batches a step was 1, now 2",
        "amp was off, now bf16", "optimizer was lamb, now adamw",
    ):  # fmt: skip
        assert change in error
    assert_same(learned(finished), before)
    folder = train.Folder(str(finished.parent / "other"), {})
    assert folder.open() is None
    assert "in use by another run" in refused(f"--out {folder.path}")
    folder.close()
    shutil.copy(finished / "best.pt", finished / "last.pt")
    assert "holds no checkpoint of this train.py" in refused()
    for name in ("last.pt", "previous.pt"):
        (finished / name).write_bytes(b"")
    assert "can be read: move it away" in refused()


def test_runs_on_a_folder_refuse_other_data(tiny, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "run"
    rng = np.random.default_rng(0)
    for number in range(40):
        path = photos / ("train" if number < 32 else "val") / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(path)
    given = arguments(tiny, out, f"--data {photos} --epochs 1 --batch 8 --workers 0")
    assert train.main(given) == 0
    assert "recipe small-folder" in capsys.readouterr().out
    extra = photos / "train" / "cat" / "extra.png"
    extra.write_bytes(path.read_bytes())
    assert train.main(given) == 2
    assert "'train': 32" in (error := capsys.readouterr().err) and "'train': 33" in error
    extra.unlink()
    for part in ("train", "val"):
        (photos / part / "cat").rename(photos / part / "zebra")
    assert train.main(given) == 2
    error = capsys.readouterr().err
    assert "class 1 was cat, now dog; class 2 was dog, now zebra" in error and error.count("\n") == 1
    assert train.main(f"--eval {out / 'best.pt'} --data {photos} --device cpu".split()) == 2


@pytest.mark.parametrize(("broken", "found", "taken"), [("the loss", 12, 15), ("the weights' norm", 19, 19)])
def test_values_that_are_not_finite_are_not_saved(broken, found, taken, tiny, tmp_path, monkeypatch, capsys):
    out, loss, step, calls = tmp_path / "run", train.bce_loss, Lamb.step, []

    def infinite_loss(*args):
        calls.append(1)
        return loss(*args) * (math.inf if (broken, len(calls)) == ("the loss", 19 + found) else 1)

    def infinite_weight(self):
        step(self)
        if (broken, len(calls)) == ("the weights' norm", 19 + found):
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(train, "bce_loss", infinite_loss)
    monkeypatch.setattr(Lamb, "step", infinite_weight)
    monkeypatch.setattr(train, "LOG_EVERY", 5)
    assert train.main(arguments(tiny, out)) == 1
    error = capsys.readouterr().err  # the first check of the value ends the run
    assert f"{broken} is inf at epoch 2, step {found}" in error and len(calls) == 19 + taken
    assert f"last checkpoint: {out / 'last.pt'}" in error
    last = learned(out)
    assert last["epoch"] == 1 and all(v.isfinite().all() for v in last["model"].values())


def test_only_many_consecutive_overflows_of_float16_stop_a_run(tiny, tmp_path, monkeypatch, capsys):
    mix, calls, overflow = train.mix, [], range(3, 5)

    def overflowing(*given):
        calls.append(given)
        images, targets = mix(*given)
        return images * (math.inf if len(calls) in overflow else 1), targets

    monkeypatch.setattr(train, "mix", overflowing)
    monkeypatch.setattr(train, "MAX_SKIPPED", 2)
    assert train.main(arguments(tiny, tmp_path / "run", "--amp fp16 --epochs 1")) == 0
    state = learned(tmp_path / "run")
    assert all(v.isfinite().all() for v in state["model"].values())  # running statistics too
    assert math.isfinite(state["metrics"][0]["val_loss"])
    overflow = range(len(calls) + 3, len(calls) + 6)
    assert train.main(arguments(tiny, tmp_path / "other", "--amp fp16 --epochs 1")) == 1
    assert "the loss is nan at epoch 1, step 5: try a lower --lr" in capsys.readouterr().err


def test_a_full_disk_is_reported_in_one_line_and_loses_nothing(tiny, finished, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # writing more bytes fails as on a full disk
    try:
        with pytest.raises(RunError, match=r"cannot write .*last\.pt: File too large"):
            train.save_checkpoint(finished / "last.pt", {"x": torch.zeros(10_000)}, finished / "previous.pt")
        assert train.main(arguments(tiny, tmp_path / "other")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "best.pt: File too large" in error
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    assert not list(tmp_path.glob("*/.*.tmp"))


def test_errors_of_pytorch_keep_their_traceback(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(train.LOSSES, "bce", lambda logits, *_: logits @ logits)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train.main(arguments(tiny, tmp_path / "run"))


def test_a_refusal_of_wandb_is_one_sentence(tiny, tmp_path, monkeypatch, capsys):
    def refuse(**_):
        raise wandb.Error("api_key not configured\n(no-tty)")

    wandb = SimpleNamespace(Error=type("Error", (Exception,), {}), init=refuse, __spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train.main(arguments(tiny, tmp_path / "run", "--tracker wandb")) == 2
    error = capsys.readouterr().err
    assert "--tracker wandb: api_key not configured (no-tty)" in error and error.count("\n") == 1


def test_training_runs_outside_the_main_thread(tiny, finished):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train.main, arguments(tiny, finished)).result() == 0


@pytest.mark.parametrize("destination", ["| head -1", "> /dev/full"])
def test_lost_output_is_no_error(destination):
    command = f"set -o pipefail; {sys.executable} {ROOT / 'train.py'} --help {destination}"
    done = subprocess.run(["bash", "-c", command], env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: train.py") is (destination != "> /dev/full")


# --------------------------------------------------------------------------------------------------
# Several processes


SCRIPT = """  # train.py, with a check at its end, in a folder that the other process does not see
import gc, os, sys
import torch.distributed as dist
import train
from torch.nn.parallel import DistributedDataParallel

def destroy(destroy=dist.destroy_process_group):
    assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects()), "DDP is still there"
    destroy()  # a run whose DDP is still there may hang at its end

def fit(training, *rest, fit=train.fit):
    training.cycle = training  # torch.compile makes such cycles too
    return fit(training, *rest)

dist.destroy_process_group, train.fit = destroy, fit
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_processes_equal_one_even_if_one_is_killed(tiny, tmp_path):
    settings = "--batch 16 --mixup 0.2 --cutmix 1.0 --lr 1e-3 --accumulate"
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [*TWO_PROCESSES, "--max-restarts=1", "script.py"]
    command += arguments(tiny, Path("run"), f"{settings} 2")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, **pipes)
    if any(line.startswith("epoch 1/3") for line in process.stdout):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    rest, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert re.search(r"continuing at epoch [23]/3", rest), rest
    assert rest.count("epoch 3/3  loss") == 1 and "on 266 images" in rest
    assert train.main(arguments(tiny, tmp_path / "one", f"{settings} 4")) == 0
    two, one = learned(tmp_path / "0" / "run"), learned(tmp_path / "one")
    assert not any((tmp_path / "1").iterdir())
    for part in ("model", "ema"):  # running statistics too
        for name, value in one[part].items():
            if "num_batches" not in name:
                torch.testing.assert_close(two[part][name], value, rtol=1e-3, atol=1e-4)
    losses = [[line["train_loss"] for line in run["metrics"][:3]] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.gpu
def test_training_does_not_synchronize_with_the_gpu():
    training, data = make_training(epochs=2, amp="bf16", device="cuda")
    steps = itertools.count(1)

    def forbid_synchronizing():  # from the first to the last step of the second epoch; the first warms up
        inside = data.steps < next(steps) < 2 * data.steps
        torch.cuda.set_sync_debug_mode("error" if inside else "default")

    assert len(fit(training, data, stop=StopAfter(action=forbid_synchronizing))) == 2


def test_distillation_is_the_divergence_from_the_teacher(monkeypatch):
    teacher = create_model(TINY, num_classes=10).eval()
    monkeypatch.setattr(examples, "teacher", lambda device: teacher)
    images, logits = torch.randn(4, 3, 16, 16), torch.randn(4, 10)
    wanted = teacher(images).softmax(1).detach()
    byhand = (wanted * (wanted.log() - logits.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(examples.distillation(logits, None, images, None), byhand)


def test_a_data_set_an_optimizer_and_a_loss_are_one_entry_each(tiny, tmp_path, monkeypatch, capsys):
    """Learn whether the left or the right half is white with plain SGD and a squared error."""

    def load_halves(size, _root):
        images = torch.zeros(64, 3, size, size, dtype=torch.uint8)
        images[::2, ..., : size // 2], images[1::2, ..., size // 2 :] = 255, 255
        return dict.fromkeys(("train", "val"), (images, torch.arange(64) % 2)), ("left", "right")

    halves = data.SmallSet(load_halves, (0.5,) * 3, (0.5,) * 3, padding=0, flip=0.0)
    monkeypatch.setitem(data.SMALL_SETS, "halves", halves)
    monkeypatch.setitem(train.OPTIMIZERS, "sgd", lambda model, o: torch.optim.SGD(model.parameters()))
    monkeypatch.setitem(
        train.LOSSES, "squared", lambda logits, targets, *_: (logits.float() - targets).square().mean()
    )
    asked = {"optimizer": "sgd", "loss": "squared", "epochs": 12, "warmup_epochs": 0, "lr": 0.3, "mixup": 0.0}
    options = resolve(Options(data="halves", model=tiny, size=16, batch=16, device="cpu", **asked))
    source = open_data("halves", Plan(16, seed=1), size=16, augment=train.augmentation(options))
    torch.manual_seed(0)
    network = create_model(tiny, num_classes=2, drop_path=0.0)
    assert fit(Training(network, options), source)[-1]["val_top1"] == 100
    content = {"model": network.state_dict(), "config": dataclasses.asdict(network.config)}
    content |= {"classes": ["left", "right"], "transform": dataclasses.asdict(source.transform)}
    torch.save(content, tmp_path / "halves.pt")
    assert train.main(["--data", "halves", "--eval", str(tmp_path / "halves.pt"), "--device", "cpu"]) == 0
    assert "halves (val)\ntop-1 100.00%" in capsys.readouterr().out
