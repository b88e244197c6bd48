"""Tests of data.py against Pillow and timm."""

from __future__ import annotations

import errno
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import data
from data import OPERATIONS, Augmentation, EvalTransform, FileList, Plan, UsageError, open_data

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

auto_augment = pytest.importorskip("timm.data.auto_augment")
FILL = data.ImageDataset({}, EvalTransform(), Augmentation(), "cpu").fill
PLAIN = Augmentation(policy="none", flip=0, repeats=1)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), {"train": 12, "val": 7})


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """Make an image folder of red and blue images, each in a shade of its own, labelled by colour."""
    for split, count in counts.items():
        for name, shades in (("red", (1, 0, 0)), ("blue", (0, 0, 1))):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                image = Image.new("RGB", (24 + n % 3, 24), tuple((100 + n) * shade for shade in shades))
                image.save(root / split / name / f"{n}.jpg", quality=95)
    return root


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def nearly_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    difference = (left.int() - right.int()).abs()
    return bool(difference.max() <= 2 and difference.float().mean() < 0.1)


def batches_equal(left, right) -> bool:
    return len(left) == len(right) and all(map(torch.equal, itertools.chain(*left), itertools.chain(*right)))


def assert_refused(message, *arguments, **options):
    with pytest.raises(UsageError, match=message):
        open_data(*arguments, **options)


def epoch_of(source, epoch=1, first_step=0, plan=None, **options):
    opened = open_data(source, replace(Plan(batch=4, seed=3), **(plan or {})), size=16, **options)
    batches = list(opened.train_batches(epoch, first_step))
    opened.close()
    return batches


# ----------------------------------------------------------------------------------------------------------
# Augmentation

CASES = [(name, False) for name in OPERATIONS]
CASES += [(name, True) for name in data.GEOMETRIC]
each_case = pytest.mark.parametrize("choice, bicubic", CASES)


@each_case
def test_operations_equal_timm_within_a_grey_level(monkeypatch, photograph, choice, bicubic):
    function, argument = OPERATIONS[choice]
    name = auto_augment._RAND_INCREASING_TRANSFORMS[data.RAND_AUGMENT.index(choice)]
    pils, level = auto_augment.NAME_TO_OP[name], auto_augment.LEVEL_TO_ARG[name] or (lambda *_: ())
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: value * sign)
    images = [photograph.resize(size, Image.Resampling.BICUBIC) for size in ((224, 224), (32, 32), (57, 40))]
    if function is not data.rotate:  # a uniform image, and one with few, extreme values
        few = np.array([[[0, 7, 255], [0, 9, 255]]] * 2, dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        images += [Image.new("RGB", (16, 16), (3, 200, 90)), Image.fromarray(few)]
    # At magnitude 10, timm asks for 0 bits, which Pillow rejects; ours keeps one.
    magnitudes = (0, 0.3, 2.5, 4.9, 6.4, 7, 9.1, 9.9 if function is data.posterize else 10)
    options = {"fillcolor": tuple(FILL.flatten().tolist())}
    options["resample"] = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    for image in images:
        for sign in (-1, 1):
            arguments = [argument(magnitude, sign) for magnitude in magnitudes]
            batch = as_tensor(image)[None].repeat(len(magnitudes), 1, 1, 1)
            ours = function(batch, arguments, FILL, bicubic)
            theirs = torch.stack([as_tensor(pils(image, *level(m, {}), **options)) for m in magnitudes])
            difference = (ours.int() - theirs.int()).abs()
            if function is data.rotate and bicubic:  # torch's cubic kernel has a = -0.75, Pillow's a = -1
                assert difference.max() <= 40 and difference.float().mean((1, 2, 3)).max() < 1.5
            else:
                assert difference.max() <= 1


@each_case
def test_operations_are_independent_of_batch_and_memory_format(photograph, choice, bicubic):
    for size in ((1, 1), (1, 5), (5, 1), (4, 3), (40, 30)):
        image = as_tensor(photograph.resize(size))[None].contiguous()
        for magnitude in (0, 3, 10):
            function, argument = OPERATIONS[choice][0], OPERATIONS[choice][1](magnitude, -1)
            alone = function(image, [argument], FILL, bicubic)
            two = image.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
            assert torch.equal(function(two, [argument] * 2, FILL, bicubic), alone.repeat(2, 1, 1, 1)), size


def test_operations_at_their_limits():
    assert FILL.flatten().tolist() == [124, 116, 104]  # round(255 * ImageNet's mean)
    pixels, bits = torch.tensor([[[[100, 200]]]]).byte(), OPERATIONS["posterize"][1](10, 1)
    assert data.posterize(pixels, [bits]).tolist() == [[[[0, 128]]]]
    image = torch.arange(36, dtype=torch.uint8).view(1, 3, 4, 3) * 4
    for translate in (data.translate_x, data.translate_y):
        for bicubic in (False, True):
            assert all((translate(image, [share], FILL, bicubic) == FILL).all() for share in (-2, -1, 1, 2))
            assert torch.equal(translate(image, [0], FILL, bicubic), image)
    turned = data.rotate(torch.full((1, 3, 3, 100), 200, dtype=torch.uint8), [30.0], FILL, False)
    assert ((turned == 200) | (turned == FILL)).all() and (turned[..., 0] == FILL[..., 0]).all()


def draw(policy: str, count: int, seed: int) -> data.Draws:
    """Return what a policy draws for `count` images."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "apply_draws", lambda images, draws, fill: draws)
        return data.POLICIES[policy](torch.empty(count, 0), Augmentation(), np.random.default_rng(seed), FILL)


@pytest.mark.parametrize("policy, layers", [("rand_augment", 2), ("trivial_augment", 1)])
def test_policies_apply_the_drawn_operations(photograph, policy, layers):
    images = as_tensor(photograph.resize((40, 40)))[None].repeat(30, 1, 1, 1)
    draws = draw(policy, 30, 3)
    assert draws.operation.shape == (layers, 30)
    together = data.POLICIES[policy](images.clone(), Augmentation(), np.random.default_rng(3), FILL)
    for n in range(30):
        expected = images[n : n + 1]
        for layer in range(layers):
            if draws.operation[layer, n]:
                function, argument = OPERATIONS[draws.operation[layer, n]]
                argument = argument(draws.magnitude[layer, n], draws.sign[layer, n])
                expected = function(expected, [argument], FILL, draws.bicubic[layer, n])
        assert torch.equal(together[n], expected[0])


def test_draws_have_timms_statistics():
    hparams = {"img_mean": (124, 116, 104), "translate_const": 100}
    recipe = auto_augment.rand_augment_transform("rand-m7-mstd0.5-inc1", hparams)
    seen = []
    for op in recipe.ops:
        op.aug_fn = lambda image, *arguments, name=op.name, **_: seen.append((name, arguments)) or image
    random.seed(0)
    np.random.seed(0)
    count = 20000
    for _ in range(count):
        recipe(None)
    draws = draw("rand_augment", count, 0)
    error = math.sqrt(2 * count * 0.5 / 15)  # one standard deviation of an operation's count
    for choice, name in zip(data.RAND_AUGMENT, (op.name for op in recipe.ops), strict=True):
        mine = draws.operation == choice
        theirs = [arguments for n, arguments in seen if n == name]
        assert abs(mine.sum() - len(theirs)) < 5 * error * math.sqrt(2), name
        if name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"):
            pairs = zip(draws.magnitude[mine], draws.sign[mine], strict=True)
            ours = np.array([OPERATIONS[choice][1](magnitude, sign) for magnitude, sign in pairs])
            theirs = np.array(theirs)[:, 0]
            assert abs((ours > 0).mean() - (theirs > 0).mean()) < 0.1
            assert np.abs(ours).mean() == pytest.approx(np.abs(theirs).mean(), rel=0.02)
            assert np.abs(ours).std() == pytest.approx(np.abs(theirs).std(), rel=0.15)
    assert abs(draws.bicubic.mean() - 0.5) < 0.01
    assert draws.magnitude.min() >= 0 and draws.magnitude.max() <= 10


def test_trivial_augment_draws_one_operation_uniformly():
    draws = draw("trivial_augment", 20000, 0)
    names, counts = np.unique(draws.operation, return_counts=True)
    assert sorted(names) == sorted(data.RAND_AUGMENT)
    assert abs(counts - 20000 / 15).max() < 5 * math.sqrt(20000 / 15)
    assert np.histogram(draws.magnitude, 10, (0, 10))[0].min() > 0.9 * 2000


def test_a_new_operation_or_policy_leaves_the_draws_of_others_alone(monkeypatch, photograph):
    before = epoch_of("digits", augment=Augmentation(repeats=1))
    monkeypatch.setitem(OPERATIONS, "mirror", (lambda images, *_: images.flip(-1), lambda *_: 0))
    assert batches_equal(epoch_of("digits", augment=Augmentation(repeats=1)), before)
    monkeypatch.setitem(data.POLICIES, "mine", lambda images, augment, rng, fill: images // 2)
    mine, none = (epoch_of("digits", augment=replace(PLAIN, policy=name)) for name in ("mine", "none"))
    assert batches_equal([(images // 2, labels) for images, labels in none], mine)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (40, 400), (1, 7)])
def test_random_crops_have_timms_distribution(size):
    from timm.data.transforms import RandomResizedCropAndInterpolation as Theirs

    random.seed(0)
    image, count = Image.new("L", size[::-1]), 8000
    theirs = [Theirs.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(count)]
    rng = np.random.default_rng(0)
    ours = [data.crop_box(*size, Augmentation(), rng.random(22).tolist()) for _ in range(count)]
    ours, theirs = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    error = np.maximum(theirs.std(0) / math.sqrt(count), 1e-3)
    assert (abs(ours.mean(0) - theirs.mean(0)) < 6 * error).all()
    assert (abs(ours.std(0) - theirs.std(0)) < 6 * error).all()


def test_random_crops_are_resized_as_in_pil(photograph):
    dataset = data.ImageDataset({}, EvalTransform(size=96), Augmentation(), "cpu")
    for seed in range(20):
        draws = np.random.default_rng(seed).random(data.CROP_DRAWS).tolist()
        top, left, height, width = data.crop_box(photograph.height, photograph.width, Augmentation(), draws)
        image = photograph.crop((left, top, left + width, top + height))
        image = image.resize((96, 96), Image.Resampling["BICUBIC" if draws[22] < 0.5 else "BILINEAR"])
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[23] < 0.5 else image
        assert nearly_equal(dataset.random_crop(as_tensor(photograph), draws), as_tensor(image))


SIZES = [(500, 375), (375, 500), (300, 300), (40, 500), (60, 50), (236, 235)]
THIN = [(1, 90), (90, 1), (3, 270), (290, 3)]  # cropped between the two passes of the resizing


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES + THIN)
def test_evaluation_transform_equals_timm(photograph, size, interpolation):
    from timm.data import create_transform

    image = photograph.resize(size)
    theirs = create_transform((3, 224, 224), crop_pct=0.95, interpolation=interpolation)
    ours = EvalTransform(interpolation=interpolation)
    assert torch.allclose(ours(image), theirs(image), atol=1e-5)
    assert EvalTransform(**json.loads(json.dumps(asdict(ours)))) == ours
    fast, (width, height) = ours.crop(as_tensor(image)), size
    assert nearly_equal(fast, ours.crop(image))
    short, long = 235, int(235 * max(size) / min(size))
    shape = (short, long) if height <= width else (long, short)
    top, left = (round((side - 224) / 2) for side in shape)
    whole = data.resize(as_tensor(image), shape, interpolation)
    assert torch.equal(fast, whole[:, top : top + 224, left : left + 224])


def test_small_crops_are_windows_of_the_padded_image():
    images = torch.randint(1, 256, (64, 3, 8, 10), dtype=torch.uint8)
    cropped = data.crop_and_flip(images, Augmentation(padding=2, flip=0.5), np.random.default_rng(0))
    windows = torch.nn.functional.pad(images, (2, 2, 2, 2)).unfold(2, 8, 1).unfold(3, 10, 1)
    windows = torch.stack([windows, windows.flip(-1)], 4)  # (64, 3, 5, 5, 2, 8, 10)
    fits = (windows == cropped[:, :, None, None, None]).flatten(5).all(5).all(1)  # (64, 5, 5, 2)
    assert (fits.sum((1, 2, 3)) == 1).all()
    assert fits.any(0).sum() > 25  # of 50
    for flip, expected in ((0, images), (1, images.flip(-1))):
        augment = Augmentation(padding=0, flip=flip)
        assert torch.equal(data.crop_and_flip(images, augment, np.random.default_rng(0)), expected)


# ----------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("count", [100, 256, 1000, 1797])
@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_repeated_augmentation_streams_equal_timm(count, world):
    from timm.data.distributed_sampler import RepeatAugSampler

    for rank in range(world):
        sampler = RepeatAugSampler(range(count), num_replicas=world, rank=rank)
        for epoch in (0, 5):
            sampler.set_epoch(epoch)
            assert data.train_stream(count, 3, 17, epoch, rank, world).tolist() == list(sampler)


def test_plain_streams_share_a_permutation():
    streams = [data.train_stream(103, 1, 0, 2, rank, 4) for rank in range(4)]
    assert {len(stream) for stream in streams} == {25}
    assert len(set(np.concatenate(streams).tolist())) == 100
    assert not np.array_equal(streams[0], data.train_stream(103, 1, 0, 3, 0, 4))
    assert not np.array_equal(streams[0], data.train_stream(103, 1, 1, 2, 0, 4))
    order = np.random.default_rng([0, 0]).permutation(24)  # the same in all versions: old runs can be resumed
    assert np.array_equal(data.train_stream(24, 1, 0, 0, 1, 2), order[1::2])


def test_random_streams_are_distinct(monkeypatch, folder):
    keys, make = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: keys.append(tuple(key)) or make(key))
    for rank in (0, 1):
        opened = open_data(folder, Plan(batch=4, rank=rank, world=2), size=16, workers=0, augment=PLAIN)
        keys += [(0, epoch, step, rank, 1) for epoch in (0, 1, 2) for step in (0, 1, 2)]  # train.py's mixup
        for epoch in (0, 1, 2):
            list(opened.train_batches(epoch))
    keys += [(0, epoch, 0, 0, data.COMPOSITION) for epoch in (0, 1, 2)]
    assert (0, 1, 0, 1, data.AUGMENTATION) in keys
    states = {tuple(np.random.SeedSequence(key).generate_state(4)) for key in set(keys)}
    assert len(states) == len(set(keys))


def test_batches_are_independent_of_workers_and_first_step(folder):
    expected = epoch_of(folder, workers=0)
    assert len(expected) == 6
    assert expected[0][0].shape == (4, 3, 16, 16)
    assert (expected[0][0].dtype, expected[0][1].dtype) == (torch.uint8, torch.int64)
    assert batches_equal(epoch_of(folder, workers=1), expected)
    assert batches_equal(epoch_of(folder, workers=2, first_step=4), expected[4:])
    assert not batches_equal(epoch_of(folder, workers=0, epoch=2), expected)
    expected = epoch_of("digits", plan={"accumulate": 2})
    assert batches_equal(epoch_of("digits", first_step=7, plan={"accumulate": 2}), expected[14:])


@pytest.mark.parametrize("source", ["digits", "folder"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_processes_and_accumulation_share_the_virtual_ranks(folder, source, repeats):
    source, images = (folder, 4) if source == "folder" else (source, 32)
    augment = replace(data.default_augmentation(str(source)), repeats=repeats, policy="rand_augment")
    options = {"augment": augment, "workers": 0}
    alone = epoch_of(source, plan={"batch": images, "accumulate": 4}, **options)
    for world in (2, 4):
        place = {"batch": images, "accumulate": 4 // world, "world": world}
        ranks = [epoch_of(source, plan={**place, "rank": rank}, **options) for rank in range(world)]
        assert sum(map(len, ranks)) == len(alone) > 0
        for k, batch in enumerate(alone):
            step, micro = divmod(k, 4)
            assert batches_equal([ranks[micro % world][step * 4 // world + micro // world]], [batch])


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_evaluation_sees_every_image_once(folder, source):
    source, found = (folder if source == "folder" else source), []
    for world in (1, 2, 3):
        images = []
        for rank in range(world):
            plan = Plan(batch=5, rank=rank, world=world)
            opened = open_data(source, plan, train=world == 1, size=16, workers=rank % 2)
            for batch, labels in opened.eval_batches("val"):
                assert 1 <= len(batch) <= (20 if source == "digits" else 5)
                images += zip((image.numpy().tobytes() for image in batch), labels.tolist(), strict=True)
            opened.close()
        assert len(images) == opened.count("val")
        found.append(sorted(images))
    assert found[0] == found[1] == found[2]


def test_abandoned_iterations_are_harmless_and_concurrent_ones_refused(folder):
    opened = open_data(folder, Plan(batch=4, seed=3), size=16, workers=2)
    first = opened.train_batches(1)
    next(first)
    assert sum(len(labels) for _, labels in opened.eval_batches()) == 14
    with pytest.raises(RuntimeError, match="another iteration, such as an evaluation"):
        next(first)
    assert batches_equal(list(opened.train_batches(1)), epoch_of(folder, workers=0))
    assert opened.wait_seconds > 0
    opened.close()


# ----------------------------------------------------------------------------------------------------------
# Small sets


def test_digits_have_fixed_splits():
    first, second = open_data("digits", Plan(batch=32)), open_data("digits", Plan(batch=8, seed=5))
    assert first.splits == ("train", "val", "test")
    assert first.steps == first.count("train") // 32
    assert sum(first.count(split) for split in first.splits) == 1797
    assert first.classes == tuple("0123456789")
    rows = []
    for split in first.splits:
        images, labels = first.dataset.splits[split]
        assert torch.equal(images, second.dataset.splits[split][0])
        assert images.shape[1:] == (3, 32, 32)
        fractions = torch.bincount(labels, minlength=10) / len(labels)
        assert (fractions - 0.1).abs().max() < 0.01  # stratified
        rows += [image.numpy().tobytes() for image in images]
    assert len(set(rows)) > 1750  # no image is in two splits (a few digits are identical)
    images = first.transform.normalize(first.dataset.splits["train"][0])
    assert float(images.mean()) == pytest.approx(0, abs=0.006)
    assert float(images.std()) == pytest.approx(1, abs=0.006)
    evaluated = open_data("digits", train=False)
    assert (evaluated.splits, evaluated.steps) == (("val", "test"), 0)


def made_cifar(root, train, download=False):
    """Stand-in for torchvision's CIFAR: 6,000 training and 100 test images."""
    count = 6000 if train else 100
    images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Mock(data=images, targets=[n % 10 for n in range(count)], classes=list("abcdefghij"))


def test_cifar_validates_on_its_last_training_images(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", made_cifar)
    opened = open_data("cifar10", Plan(batch=100), root=str(tmp_path))
    assert [opened.count(split) for split in opened.splits] == [1000, 5000, 100]
    expected = Image.fromarray(made_cifar(None, True).data[1000])
    assert torch.equal(opened.dataset.splits["val"][0][0], as_tensor(expected))
    assert opened.classes == tuple("abcdefghij")
    assert len(list(opened.train_batches(0))) == opened.steps == 10
    resized = open_data("cifar10", train=False, size=16, root=str(tmp_path))
    assert resized.dataset.splits["test"][0].shape == (100, 3, 16, 16)
    assert not list(tmp_path.iterdir())  # existing files are read without writing anything
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Mock(side_effect=RuntimeError("no network")))
    assert_refused(r"cifar100 is not in .*no network.*--root", "cifar100", root=str(tmp_path))


def test_clutter_is_balanced_and_splits_share_no_digits():
    opened = open_data("clutter", Plan(batch=64))
    assert opened.classes == tuple("0123456789")
    for split in ("val", "test"):
        images, labels = opened.dataset.splits[split]
        assert images.shape == (2000, 3, 24, 24) and images.dtype == torch.uint8
        assert labels.bincount().tolist() == [200] * 10
        assert len({image.numpy().tobytes() for image in images}) == 2000
    labels = torch.cat([labels for _, labels in opened.train_batches(0)])
    assert labels.bincount().tolist() == [data.CLUTTER_EPOCH // 10] * 10
    digits = {split: {x.tobytes() for x in images} for split, (images, _) in data.digits_by_split().items()}
    assert not digits["train"] & digits["val"] and not (digits["train"] | digits["val"]) & digits["test"]
    (clutter,) = opened.dataset.splits["train"]
    assert {(16 * x.double().numpy()).tobytes() for x in clutter.digits[:, 0]} <= digits["train"]


def test_pictures_of_clutter_depend_only_on_seed_epoch_and_index(monkeypatch):
    images, labels = data.digits_by_split()["train"]
    clutter = data.Clutter(images, labels, 16, 200)
    whole, _ = clutter.compose((0, 1), np.arange(200))
    some = np.array([150, 7, 199])
    pictures, found = clutter.compose((0, 1), some)
    assert torch.equal(pictures, whole[some]) and found.tolist() == [0, 7, 9]
    for seed_epoch in ((0, 2), (1, 1)):
        others, _ = clutter.compose(seed_epoch, np.arange(200))
        assert (others != whole).flatten(1).any(1).all()
    monkeypatch.setattr(data, "CLUTTER_EPOCH", 200)
    monkeypatch.setattr(data, "CLUTTER_HELD_OUT", 100)
    halves = [epoch_of("clutter", plan={"batch": 50, "rank": rank, "world": 2}) for rank in (0, 1)]
    alone = epoch_of("clutter", plan={"batch": 50, "accumulate": 2})
    assert batches_equal([batch for pair in zip(*halves, strict=True) for batch in pair], alone)


def test_pictures_without_clutter_show_their_digit(monkeypatch):
    """Without clutter, the middle of a picture correlates most with the mean image of its digit."""
    monkeypatch.setattr(data, "CLUTTER_OPACITY", 0.0)
    images, labels = data.digits_by_split()["train"]
    clutter = data.Clutter(images, labels, 32, 400)
    pictures, found = clutter.compose((0, 0), np.arange(400))
    shape = torch.stack([clutter.digits[np.sort(labels) == digit].mean(0) for digit in range(10)])
    shape = torch.nn.functional.interpolate(shape, (20, 20), mode="bilinear")[:, 0].flatten(1)
    part = pictures[:, :, 6:26, 6:26].float()
    ink = (part - part[:, :, :1, :1]).abs().sum(1).flatten(1)
    score = torch.corrcoef(torch.cat([ink, shape]))[:400, 400:]
    assert (score.argmax(1) == found).sum() > 120  # of 400; chance is 40


# ----------------------------------------------------------------------------------------------------------
# Image folders


def test_files_decode_as_in_pil(photograph):
    image = photograph.resize((250, 190))
    files = [encode(image, subsampling=subsampling) for subsampling in (0, 1, 2)]
    files += [encode(image.convert(mode)) for mode in ("L", "CMYK")]
    files += [encode(image, progressive=True), encode(image, restart_marker_blocks=5)]
    files += [encode(image) + b"trailing bytes", *(encode(image.resize(s)) for s in ((1, 1), (33, 417)))]
    files += [encode(image.convert(mode), "PNG") for mode in ("RGB", "RGBA", "P", "1")]
    files += [encode(image, "WEBP"), encode(image.convert("L"), "BMP")]
    for content in files:
        expected = as_tensor(Image.open(io.BytesIO(content)).convert("RGB"))
        assert torch.equal(data.decode(content), expected)
        assert torch.equal(data.decode(content, exif=True), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_on_request(photograph, tmp_path, kind):
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x112] = orientation
        content = encode(photograph.resize((40, 25)), kind, exif=exif)
        file = Image.open(io.BytesIO(content))
        upright = as_tensor(ImageOps.exif_transpose(file).convert("RGB"))
        assert torch.equal(data.decode(content, exif=True), upright), orientation
        assert torch.equal(data.decode(content), as_tensor(file.convert("RGB")))
        assert torch.equal(as_tensor(data.to_rgb(file, exif=True)), upright)
    broken = encode(photograph.resize((40, 25)), kind, exif=b"Exif\0\0not a TIFF header")
    assert torch.equal(data.decode(broken, exif=True), data.decode(broken))
    (tmp_path / "class").mkdir()
    (tmp_path / "class/sideways.png").write_bytes(content)
    for exif in (False, True):
        opened = open_data(tmp_path, train=False, size=16, workers=0, exif=exif)
        images, _ = next(opened.eval_batches())
        assert torch.equal(images[0], opened.transform.crop(data.decode(content, exif)))
        assert nearly_equal(images[0], opened.transform.crop(Image.open(io.BytesIO(content))))


def test_16_bit_images_are_scaled_not_clipped():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1)
    for content in (encode(Image.fromarray(ramp), kind) for kind in ("PNG", "PPM", "TIFF")):
        assert torch.equal(data.decode(content, exif=True), expected)
        assert torch.equal(data.decode(content), expected)
        crop = EvalTransform(size=256, crop_pct=1.0).crop(Image.open(io.BytesIO(content)))
        assert torch.equal(crop, expected)
    for dtype in (np.float32, np.int32):
        with pytest.raises(OSError, match="32-bit pixels"):
            data.decode(encode(Image.fromarray(ramp.astype(dtype)), "TIFF"))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_logged_replaced_and_counted(tmp_path, caplog, photograph, workers):
    make_folder(tmp_path, {"train": 10, "val": 5})
    content = encode(photograph.resize((200, 150)), quality=90)
    bad = {
        "train/red/3.jpg": content[: len(content) // 2],
        "train/blue/0.jpg": b"",
        "train/blue/5.jpg": b"not an image",
        "val/red/2.jpg": content[:-1],
        "val/blue/1.jpg": b"\xff\xd8\xff\xd9",
    }
    for name, broken in bad.items():
        (tmp_path / name).write_bytes(broken)
    opened = open_data(tmp_path, Plan(batch=5), size=16, workers=workers, augment=PLAIN, max_bad_files=0.17)
    batches = [batch for epoch in range(2) for batch in opened.train_batches(epoch)]
    evaluated = list(opened.eval_batches("val"))
    opened.close()
    for images, labels in batches + evaluated:
        blue = images[:, 2].flatten(1).float().mean(1) > images[:, 0].flatten(1).float().mean(1)
        assert blue.tolist() == [opened.classes[n] == "blue" for n in labels]  # the substitute's label
    assert [len(images) for images, _ in batches] == [5] * 8
    assert sum(len(images) for images, _ in evaluated) == 8
    assert opened.bad_files.keys() == {str(tmp_path / name) for name in bad}
    assert all(caplog.text.count(name) == 1 for name in bad)
    again = open_data(tmp_path, Plan(batch=5), size=16, workers=workers, augment=PLAIN, max_bad_files=0.07)
    with pytest.raises(UsageError, match=r"^3 images cannot be read, too many to go on: .*red/3\.jpg"):
        list(again.train_batches(0))
    again.close()


def test_errors_of_ones_own_code_are_not_unreadable_files(monkeypatch, folder):
    def mine(*_):
        raise KeyError("my own mistake")

    for source, place, name in ((folder, data, "crop_box"), (pictures(), Source, "__getitem__")):
        opened = open_data(source, Plan(batch=4), size=16, workers=1)
        monkeypatch.setattr(place, name, mine)
        with pytest.raises(KeyError, match=r"(?s)in mine.*my own mistake"):  # with the worker's traceback
            list(opened.train_batches(0))
        assert not opened.bad_files
        opened.close()


def test_file_order_equals_timm(tmp_path):
    from timm.data.readers.reader_image_folder import find_images_and_targets
    from timm.utils.misc import natural_key as timms_key

    rng = random.Random(0)
    names = ["".join(rng.choices("aB-_. 019é", k=rng.randint(1, 8))) for _ in range(3000)]
    in_order = sorted(names, key=data.natural_key)
    assert [timms_key(name) for name in in_order] == sorted(map(timms_key, names))
    ties = ["Cat", "cat", "1", "01", "①", "10²"]
    rng.shuffle(ties)
    assert sorted(ties, key=data.natural_key) == ["01", "1", "10²", "Cat", "cat", "①"]
    for name in ("n10", "n2"):
        (tmp_path / name).mkdir()
        for file in ("10.jpg", "9.JPEG", "notes.txt", "a1.png"):
            (tmp_path / name / file).touch()
    files = FileList(tmp_path)
    assert files.classes == ("n2", "n10")
    theirs, _ = find_images_and_targets(str(tmp_path))
    assert [(files.path(n), files.labels[n]) for n in range(len(files))] == theirs


def test_hidden_files_are_ignored_and_links_followed(tmp_path, caplog):
    make_folder(tmp_path, {"train": 2, "linked": 1})
    root = tmp_path / "train"
    (root / "blue/é.webp").touch()
    for other in (".thumbnails/0.jpg", "red/.thumbnails/0.jpg", "red/._0.jpg", "blue/a.txt", "blue/b.TXT"):
        (root / other).parent.mkdir(exist_ok=True)
        (root / other).touch()
    (root / "blue/more").symlink_to(tmp_path / "linked/blue")
    (root / "green").symlink_to(root / "red")
    files = FileList(root)
    assert files.classes == ("blue", "green", "red")
    expected = ["blue/0.jpg", "blue/1.jpg", "blue/more/0.jpg", "blue/é.webp"]
    expected += [f"{name}/{n}.jpg" for name in ("green", "red") for n in range(2)]
    assert [files.path(n) for n in range(len(files))] == [str(root / name) for name in expected]
    assert files.labels.tolist() == [0] * 4 + [1] * 2 + [2] * 2
    assert "skipped 2 non-image files" in caplog.text and "such as blue/" in caplog.text


def test_links_that_lead_back_are_refused(tmp_path):
    make_folder(tmp_path, {"train": 2, "val": 1})
    for place, target in (("blue", "."), ("blue", ".."), ("blue", "../.."), ("red", "../blue")):
        link = tmp_path / "train" / place / "link"
        link.symlink_to(target)
        if target == "../blue":  # a link to another class is meant, unless that leads back
            (tmp_path / "train/blue/link").symlink_to("../red")
        assert_refused("train/(blue|red)/link.* again: remove this link", tmp_path)
        link.unlink()


def test_classes_are_those_of_training(tmp_path, caplog):
    make_folder(tmp_path, {"train": 2, "val": 2})
    for split, form in (("train", "NFC"), ("val", "NFD")):  # a Mac's file system
        (tmp_path / split / "red").rename(tmp_path / split / unicodedata.normalize(form, "rosé"))
    for rare in ("café".encode("latin1"), b"rare"):
        (tmp_path / "train" / os.fsdecode(rare)).mkdir()
        (tmp_path / "train" / os.fsdecode(rare) / "0.png").write_bytes(encode(Image.new("RGB", (9, 9))))
    (tmp_path / "val/rare").mkdir()
    opened = open_data(tmp_path, Plan(batch=2), size=16, workers=0)
    assert opened.classes == ("blue", "caf\\xe9", "rare", "rosé")
    assert opened.dataset.labels["train"].tolist() == [0, 0, 1, 2, 3, 3]
    assert opened.dataset.labels["val"].tolist() == [0, 0, 3, 3]
    assert "no images of 2 classes, such as caf" in caplog.text
    assert sum(len(labels) for _, labels in opened.eval_batches()) == 4 and not opened.bad_files
    lines = "\ufeffblue\n".encode() + "café\n".encode("latin1") + "rare\nrose\u0301\n".encode()
    (tmp_path / "names.txt").write_bytes(lines)
    for source in ("train", "names.txt"):
        assert data.read_classes(str(tmp_path / source)) == list(opened.classes)
    (tmp_path / "val" / "rosé").mkdir()
    assert_refused("two folders 'rosé'", tmp_path)


def test_a_folder_named_like_a_set_is_pointed_out(tmp_path, monkeypatch, caplog):
    make_folder(tmp_path / "digits", {"val": 1})
    monkeypatch.chdir(tmp_path)
    assert len(open_data("digits", train=False).classes) == 10
    assert "for the folder of that name, give ./digits" in caplog.text
    for folder in ("./digits", Path("digits")):
        assert open_data(folder, train=False, workers=0).classes == ("blue", "red")


def test_evaluation_folders_have_one_of_three_names(tmp_path):
    for names in (("val",), ("validation",), ("test",), ("val", "test"), ("validation", "test")):
        root = make_folder(tmp_path / "-".join(names), {"train": 6, **dict.fromkeys(names, 3)})
        opened = open_data(root, Plan(batch=4), workers=0)
        assert opened.splits == ("train", "val", "test")[: 1 + len(names)]
        assert (opened.count("val"), opened.transform) == (6, EvalTransform(224))
        for split, name in zip(opened.splits, ("train", *names), strict=True):
            assert Path(opened.dataset.splits[split].path(0)).parent.parent.name == name
    for place in (root, root / "validation"):  # evaluation does not need train/
        opened = open_data(place, train=False, workers=0)
        assert opened.splits == (("val", "test") if place == root else ("val",))
        assert (opened.steps, opened.classes) == (0, ("blue", "red"))
        assert opened.dataset.splits["val"].path(5) == str(root / "validation/red/2.jpg")
        assert sum(len(labels) for _, labels in opened.eval_batches()) == 6
    for name in ("blue", "red"):  # as in ImageNet: test images without classes
        shutil.rmtree(root / "test" / name)
    (root / "test/1.jpg").touch()
    assert open_data(root, Plan(batch=4), workers=0).splits == ("train", "val")


class Source:
    """Images in memory: red ones of class 0, blue ones of class 1, each in a shade of its own."""

    classes = ("red", "blue")

    def __init__(self, kind: str, count: int):
        self.kind, self.labels = kind, [n % 2 for n in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        if index == 5:
            raise OSError("damaged")
        image = Image.new("RGB", (20, 24), (0, 0, 100 + index) if index % 2 else (100 + index, 0, 0))
        tensor = as_tensor(image)
        return {"pil": image, "tensor": tensor, "bytes": encode(image, "PNG"), "float": tensor / 255,
                "rows": tensor.permute(1, 2, 0), "array": np.array(image)}[self.kind]  # fmt: skip


def pictures() -> dict[str, Source]:
    return {"val": Source("pil", 8), "train": Source("pil", 12)}


@pytest.mark.parametrize("workers", [0, 1])
def test_sources_of_ones_own(monkeypatch, tmp_path, workers):
    (tmp_path / "shades.py").write_text(f"import sys\npictures = sys.modules[{__name__!r}].pictures\n")
    monkeypatch.chdir(tmp_path)
    sources = [{"train": Source(kind, 12), "val": Source(kind, 8)} for kind in ("pil", "tensor", "bytes")]
    found = []
    for source in (*sources, "shades:pictures"):
        opened = open_data(source, Plan(batch=4), size=16, workers=workers, max_bad_files=0.1)
        assert (opened.splits, opened.classes, opened.steps) == (("train", "val"), ("red", "blue"), 3)
        found.append([*opened.train_batches(0), *opened.eval_batches()])
        opened.close()
        for images, labels in found[-1]:
            assert len(images) == len(labels)
        assert sum(len(labels) for _, labels in found[-1][3:]) == 7  # the damaged one is left out
        assert opened.bad_files == {f"{split}[5]": "damaged" for split in opened.splits}
        evaluated = open_data(source, train=False, size=16, workers=0)
        assert evaluated.splits == ("val",) and not evaluated.steps
    for images, labels in found[0][3:]:
        assert (images[:, 2].amax((1, 2)) > 0).long().tolist() == labels.tolist()
    assert all(batches_equal(batches, found[0]) for batches in found[1:])


def test_sources_of_the_wrong_kind_are_refused(monkeypatch, tmp_path):
    right = pictures()
    assert_refused("train, val and perhaps test, not val, train, valid", right | {"valid": right["val"]})
    assert_refused("splits train, val and perhaps test, not val$", {"val": right["val"]})
    for kind, what in (("float", r"torch.float32 \(3, 24, 20\)"), ("rows", r"torch.uint8 \(24, 20, 3\)")):
        assert_refused(f"images of val must be PIL images, .*, not {what}", right | {"val": Source(kind, 8)})
    assert_refused(
        r"images of train must be .*, not uint8 \(24, 20, 3\)", right | {"train": Source("array", 8)}
    )
    for labels in ([0, 1], [2] * 8, ["red"] * 8, []):
        monkeypatch.setattr(right["val"], "labels", labels)
        monkeypatch.setattr(Source, "__len__", lambda source: 0 if source.labels == [] else 8)
        assert_refused("images of val need a label each, from 0 to 1", right, train=False)
    monkeypatch.undo()
    torchvisions = torchvision.datasets.FakeData(8, (3, 9, 9))
    assert_refused("the images of train have no labels, classes", right | {"train": torchvisions})
    right["val"].classes = ("blue", "red")
    assert_refused("train has other classes than val, or in another order", right)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_source.py").write_text("import absent_package")
    assert_refused("there is no module 'no_such_module'", "no_such_module:pictures")
    assert_refused("module random has no 'pictures'", "random:pictures")
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        open_data("broken_source:pictures")


def test_workers_ignore_signals_and_a_killed_one_is_an_error(folder):
    opened = open_data(folder, Plan(batch=2), size=16, workers=2, augment=PLAIN)
    batches = opened.train_batches(0)
    found = [next(batches)]
    workers = [child.pid for child in multiprocessing.active_children()]
    for number in (signal.SIGTERM, signal.SIGINT):
        for worker in workers:
            os.kill(worker, number)
    found += list(batches)
    again = open_data(folder, Plan(batch=2), size=16, workers=0, augment=PLAIN)
    assert batches_equal(found, list(again.train_batches(0)))
    assert batches_equal(list(opened.train_batches(1)), list(again.train_batches(1)))
    assert workers == [child.pid for child in multiprocessing.active_children()]
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        os.kill(workers[1], signal.SIGKILL)
        list(opened.train_batches(2))
    opened.close()
    assert not multiprocessing.active_children()


def test_workers_stop_with_their_data(folder):
    opened = open_data(folder, Plan(batch=2), size=16, workers=2)  # never closed; finalizers also run at exit
    assert len(next(opened.train_batches(0))[0]) == 2
    assert len(multiprocessing.active_children()) == 2
    del opened
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_a_cpu(folder):
    on_cpu = epoch_of(folder, workers=2)
    on_gpu = epoch_of(folder, workers=2, device="cuda")
    assert all(images.is_cuda for images, _ in on_gpu)
    assert batches_equal([(images.cpu(), labels.cpu()) for images, labels in on_gpu], on_cpu)
    augment = Augmentation(padding=2, repeats=1)
    on_cpu, on_gpu = (epoch_of("digits", augment=augment, device=device) for device in ("cpu", "cuda"))
    for (left, _), (right, _) in zip(on_cpu, on_gpu, strict=True):  # float32 rounding differs
        assert (left.int() - right.cpu().int()).abs().float().mean() < 0.05


# ----------------------------------------------------------------------------------------------------------
# Shared helpers and user errors


def test_user_errors(tmp_path):
    assert_refused(r"there is no folder .*nowhere.* sets are digits, ", tmp_path / "nowhere")
    for split in ("train", "val"):
        root = make_folder(tmp_path / f"only-{split}", {split: 1})
        assert_refused("needs train/ and one of val/, validation/ and test/", root)
    assert_refused("no policy 'mine': choose from none, ", "digits", augment=replace(PLAIN, policy="mine"))
    root = make_folder(tmp_path / "nested", {"train/images": 1, "val/images": 1})  # an archive's extra level
    assert_refused("only one class, 'images': are the class folders one level further down", root)
    root = make_folder(tmp_path / "images", {"train": 4, "val": 4})
    assert_refused("8 training images are too few for one step of 1 x 64 x 2", root, Plan(accumulate=2))
    (root / "train/green").mkdir()
    assert_refused(r"class folder '.*green' has no image", root)
    (root / "train/green").rmdir()
    (root / "val/red").rename(root / "val/green")
    assert_refused(r"only '.*val' has the classes \['green'\]", root)
    assert_refused("has no class folders", root / "val/green", train=False)
    evaluated = open_data("digits", train=False)
    with pytest.raises(UsageError, match="there is no split 'vall', only val, test"):
        next(evaluated.eval_batches("vall"))
    with pytest.raises(UsageError, match="uint8 images, from 0 to 255, not torch"):
        evaluated.transform.normalize(torch.rand(1, 3, 2, 2))


def test_insufficient_shared_memory_is_a_user_error(monkeypatch, folder):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: Mock(free=2**20))
    monkeypatch.setattr(data.os.path, "isdir", lambda _: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # of 16 processes on two machines
    message = r"16 workers need 441 MiB in /dev/shm.*--workers.*--shm-size"
    assert_refused(message, folder, Plan(batch=64, world=16), workers=2)
    open_data(folder, Plan(batch=4), workers=0)


def test_files_are_written_atomically(monkeypatch, tmp_path):
    path = tmp_path / "file"
    data.write_whole(path, "first")
    data.write_whole(path, memoryview(b"second"), tmp_path / "previous")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(data.RunError, match=r"cannot write .*file: No space left on device.*repeat"):
        data.write_whole(path, b"third")
    assert sorted(os.listdir(tmp_path)) == ["file", "previous"]
    assert [(tmp_path / name).read_text() for name in ("file", "previous")] == ["second", "first"]


def test_locks_hold_until_the_file_is_closed(monkeypatch, tmp_path, caplog):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert data.lock_file(first)
        assert not data.lock_file(second)
        first.close()
        assert data.lock_file(second)
        refused = OSError(errno.ENOLCK, "no locks available")  # as on Lustre and some NFS mounts
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=refused))
        assert data.lock_file(second) and "no locks available" in caplog.text
