"""Images for training and evaluation: `digits`, `cifar10`, `cifar100` or a folder laid out as ImageNet's.

    data = open_data("digits", batch=64)                      # or open_data("/path/imagenet", batch=64, accumulate=4)
    for images, labels in data.train_batches(epoch=0): ...    # uint8 (B, 3, H, W), int64 (B,)
    for images, labels in data.eval_batches("val"): ...

Small sets live as uint8 tensors on the training device and are augmented there a batch at a time. Image folders go
through DataLoader workers, from JPEG to uint8 crops. Both look the same to the training loop, which normalises on
the device with `normalize`. A training batch depends on (seed, epoch, virtual rank, step) alone: never on the
number of workers or processes, nor on the step at which an epoch was resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg

log = logging.getLogger("data")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SPLIT_FOLDERS = (("train", "train"), ("val", "validation"), ("val", "val"), ("test", "test"))
SMALL_SETS = {  # mean and standard deviation of each channel's values, 0..1
    "digits": ((0.306,) * 3, (0.324,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
WORKERS_AHEAD = 2  # batches that each worker prepares in advance


class DataError(ValueError):
    """Something about the data that the user can mend, said in one sentence."""


# ----------------------------------------------------------------------------------------------------------
# Evaluation transform and normalisation
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to floor(size / crop_pct), crop the centre, normalise: timm's evaluation transform.

    Called with a PIL image it returns float32 (3, size, size), normalised; `crop` stops at uint8.
    """

    size: int = 224  # pixels
    crop_pct: float = 0.95  # share of the resized shorter side that the crop keeps
    interpolation: str = "bicubic"  # "bicubic" | "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN  # per channel, of values in 0..1
    std: tuple[float, float, float] = IMAGENET_STD

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image of this size is resized to, before the crop."""
        short = math.floor(self.size / self.crop_pct)
        if height <= width:
            return short, int(short * width / height)
        return int(short * height / width), short

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Return the (top, left) of the centre crop in a resized image of (height, width)."""
        return round((height - self.size) / 2), round((width - self.size) / 2)

    def crop(self, image: Image.Image) -> torch.Tensor:
        """Return the resized centre crop of a PIL image, uint8 (3, size, size)."""
        height, width = self.resized(image.height, image.width)
        image = image.convert("RGB").resize((width, height), PIL_FILTERS[self.interpolation])
        top, left = self.corner(height, width)
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return normalize(self.crop(image)[None], self.mean, self.std)[0]

    def to_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> EvalTransform:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def normalize(images: torch.Tensor, mean, std, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Turn uint8 (B, 3, H, W) into (images / 255 - mean) / std of `dtype`, on the images' own device.

    mean and std are three floats each, of values in 0..1. The arithmetic is float32 whatever the dtype.
    """
    mean = torch.tensor(mean, dtype=torch.float32, device=images.device).mul_(255).view(3, 1, 1)
    std = torch.tensor(std, dtype=torch.float32, device=images.device).mul_(255).view(3, 1, 1)
    return images.float().sub_(mean).div_(std).to(dtype)


# ----------------------------------------------------------------------------------------------------------
# Training augmentation
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """What training images go through. The defaults are the paper's recipe, for image folders."""

    scale: tuple[float, float] = (0.08, 1.0)  # folders: share of the image's area that a crop takes
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # folders: width over height of a crop, log-uniform
    interpolation: str = "random"  # "bilinear" | "bicubic" | "random" (drawn for each image and operation)
    padding: int = 0  # small sets: black pixels around an image before its random crop; 0 = no crop
    flip: float = 0.5  # probability of a horizontal flip
    layers: int = 2  # RandAugment operations drawn for each image; 0 = no RandAugment
    probability: float = 0.5  # that a drawn operation is applied
    magnitude: float = 7.0  # RandAugment's mean magnitude, 0..10
    magnitude_std: float = 0.5  # standard deviation of the magnitude
    repeats: int = 3  # repeated augmentation: copies of an image in an epoch; 1 = every image once


def default_augmentation(source: str) -> Augmentation:
    """Return the augmentation of a source of `open_data`: the paper's recipe for folders, crop and flip for small sets."""
    if source == "digits":
        return Augmentation(padding=3, flip=0.0, layers=0, repeats=1)
    if source in ("cifar10", "cifar100"):
        return Augmentation(padding=4, flip=0.5, layers=0, repeats=1)
    return Augmentation()


def crop_box(height: int, width: int, augment: Augmentation, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random resized crop: ten tries, then the centre.

    draws: 22 uniform numbers in 0..1 (area and ratio of ten tries, then position).
    """
    log_ratio = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for area, ratio in draws[:20].reshape(10, 2):
        area = (augment.scale[0] + (augment.scale[1] - augment.scale[0]) * area) * height * width
        ratio = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    w = min(width, round(height * augment.ratio[1]))
    h = min(height, round(width / augment.ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_and_flip(images: torch.Tensor, augment: Augmentation, rng: np.random.Generator) -> torch.Tensor:
    """Pad uint8 (B, 3, H, W) with black, crop each image at random to (H, W) and flip it at random."""
    count, _, height, width = images.shape
    top, left = rng.integers(0, 2 * augment.padding + 1, (2, count))
    flip = rng.random(count) < augment.flip
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.where(flip[:, None], np.arange(width)[::-1], np.arange(width))
    rows, columns = (torch.from_numpy(i).to(images.device) for i in (rows, columns))
    if augment.padding:
        images = F.pad(images, (augment.padding,) * 4)
    n = torch.arange(count, device=images.device)
    images = images.permute(0, 2, 3, 1)[n[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images.permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------------
# Which images make a batch
# ----------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One batch to make: images `indices` of a split; a training batch also carries the key of its random stream."""

    split: str
    indices: np.ndarray  # int64 (B,)
    key: tuple[int, ...] | None  # (seed, epoch, virtual rank, step); None for evaluation


def train_stream(count: int, repeats: int, seed_epoch: tuple[int, int], place: tuple[int, int]) -> np.ndarray:
    """Return the indices of the images that virtual rank `place` = (rank, world) sees in an epoch, int64.

    With repeats, the stream of timm's RepeatAugSampler: shuffled by the epoch alone, each index repeated in place,
    padded, strided over the ranks (so that copies of an image land on different ranks), cut to about an epoch.
    Without, every rank's stride of one permutation by (seed, epoch), the uneven end dropped.
    """
    seed, epoch = seed_epoch
    rank, world = place
    if repeats == 1:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        return order[rank : count // world * world : world]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).numpy()
    selected = (count // 256 * 256) // world if count >= 256 else math.ceil(count / world)
    selected = min(selected, math.ceil(count * repeats / world))
    positions = np.arange(selected) * world + rank
    return order[positions % (count * repeats) // repeats]


# ----------------------------------------------------------------------------------------------------------
# Small sets: uint8 tensors on the device
# ----------------------------------------------------------------------------------------------------------


class TensorSource:
    """A small set held as uint8 tensors on the device, augmented there a whole batch at a time."""

    def __init__(self, splits: dict, device: torch.device, augment: Augmentation):
        self.splits = {k: (x.to(device), y.to(device)) for k, (x, y) in splits.items()}
        self.device = device
        self.augment = augment
        self.bad: dict[str, str] = {}

    def count(self, split: str) -> int:
        return len(self.splits[split][1])

    def batches(self, jobs: Iterator[Job]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for job in jobs:
            images, labels = self.splits[job.split]
            indices = torch.from_numpy(job.indices).to(self.device)
            images, labels = images[indices], labels[indices]
            if job.key is not None:
                images = crop_and_flip(images, self.augment, np.random.default_rng(job.key))
            yield images, labels

    def close(self) -> None:
        """Nothing to end: there are no workers."""


def resize_all(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 (N, 3, H, W) to (N, 3, size, size), bilinear and antialiased, in parts that fit in memory."""
    if images.shape[-1] == size:
        return images
    parts = [
        F.interpolate(part, (size, size), mode="bilinear", antialias=True) for part in images.split(4096)
    ]
    return torch.cat(parts)


def load_digits(size: int) -> tuple[dict, tuple[str, ...]]:
    """Return scikit-learn's 8 x 8 digits at (size, size) in three fixed, stratified splits, and the class names."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn") from error
    digits = sklearn_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().byte()[:, None].repeat(1, 3, 1, 1)
    images = resize_all(images, size)
    labels = torch.from_numpy(digits.target).long()
    rng = np.random.default_rng(0)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(digits.target == digit))
        tenth = len(members) * 15 // 100
        for split, part in zip(parts, np.split(members, [-2 * tenth, -tenth]), strict=True):
            parts[split].append(part)
    order = {split: torch.from_numpy(np.sort(np.concatenate(part))) for split, part in parts.items()}
    return {split: (images[i], labels[i]) for split, i in order.items()}, tuple(str(d) for d in range(10))


def load_cifar(name: str, size: int, root: str) -> tuple[dict, tuple[str, ...]]:
    """Return CIFAR at (size, size): train (45,000), val (the last 5,000 of the training set), test; and the class names.

    Read from `root`, or downloaded there by whichever process comes first. DataError where neither works.
    """
    import torchvision

    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    Path(root).mkdir(parents=True, exist_ok=True)
    with open(Path(root, ".download.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            train, test = (dataset(root, train=part, download=True) for part in (True, False))
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{name} is not in {root!r} and could not be downloaded ({error}): "
                f"put torchvision's {name} files there or name their folder with --root"
            ) from error
    images, labels = {}, {}
    for split, part in (("train", train), ("test", test)):
        images[split] = resize_all(
            torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))), size
        )
        labels[split] = torch.tensor(part.targets)
    cut = len(labels["train"]) - 5000
    splits = {
        "train": (images["train"][:cut], labels["train"][:cut]),
        "val": (images["train"][cut:], labels["train"][cut:]),
        "test": (images["test"], labels["test"]),
    }
    return splits, tuple(train.classes)


# ----------------------------------------------------------------------------------------------------------
# Image folders: files, decoding, workers
# ----------------------------------------------------------------------------------------------------------


def natural_key(name: str) -> list:
    """Sort key that puts `n2` before `n10`, as timm orders classes and files."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


class FileList:
    """The images below a folder of class folders, held without one Python object per file.

    A list of strings would be copied into every worker, page by page, as reference counts change: here the names
    are one array of bytes that workers share for good.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(
                f"there is no folder {str(folder)!r}: give a folder that holds one sub-folder a class"
            )
        self.folder = os.fsencode(folder)
        self.classes = tuple(sorted((e.name for e in os.scandir(folder) if e.is_dir()), key=natural_key))
        if not self.classes:
            raise DataError(f"{str(folder)!r} has no class folders: it needs one sub-folder a class")
        names, labels = [], []
        for label, name in enumerate(self.classes):
            files = find_images(folder, name)
            if not files:
                raise DataError(
                    f"class folder {str(folder / name)!r} holds no image ({', '.join(EXTENSIONS)}): fill or remove it"
                )
            names += files
            labels += [label] * len(files)
        encoded = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([len(name) for name in encoded])
        self.names = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.labels = np.array(labels, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(os.path.join(self.folder, self.names[start : self.ends[index]].tobytes()))


def find_images(folder: Path, name: str) -> list[str]:
    """Return the image files below folder/name as paths relative to folder, in natural order."""
    found = []
    for parent, _, files in os.walk(folder / name, followlinks=True):
        relative = os.path.relpath(parent, folder)
        found += [os.path.join(relative, file) for file in files if file.lower().endswith(EXTENSIONS)]
    return sorted(found, key=natural_key)


def decode(path: str) -> torch.Tensor:
    """Return the file's image as uint8 (3, H, W). OSError or ValueError where PIL cannot read it either."""
    data = np.fromfile(path, dtype=np.uint8)
    if data[:3].tobytes() == b"\xff\xd8\xff" and data[-2:].tobytes() == b"\xff\xd9":
        with contextlib.suppress(RuntimeError):
            return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
    image = Image.open(io.BytesIO(data.tobytes())).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resize uint8 (3, H, W) to (3, *size) with antialiasing, as PIL does to within rounding."""
    return F.interpolate(image[None], size, mode=interpolation, antialias=True)[0]


class FolderDataset(Dataset):
    """Makes whole batches in DataLoader workers: the sampler hands over `Job`s."""

    def __init__(self, files: dict[str, FileList], transform: EvalTransform, augment: Augmentation):
        self.files = files
        self.transform = transform
        self.augment = augment

    def __getitem__(self, job: Job):
        """Return (images uint8 (B, 3, S, S), labels int64 (B,), [(path, reason) of bad files])."""
        make = self.evaluation_image if job.key is None else self.training_image
        files = self.files[job.split]
        rng = np.random.default_rng(job.key)
        draws = rng.random((len(job.indices), 24))
        images, labels, bad = [], [], []
        for position, index in enumerate(job.indices):
            tries = [index] if job.key is None else [index, *rng.permutation(job.indices)]
            for candidate in tries:
                try:
                    images.append(make(files.path(candidate), draws[position]))
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    bad.append((files.path(candidate), f"{type(error).__name__}: {error}"))
                else:
                    labels.append(int(files.labels[candidate]))
                    break
        size = self.transform.size
        stacked = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return stacked, torch.tensor(labels, dtype=torch.int64), bad

    def training_image(self, path: str, draws: np.ndarray) -> torch.Tensor:
        image = decode(path)
        top, left, height, width = crop_box(*image.shape[1:], self.augment, draws[:22])
        interpolation = self.augment.interpolation
        if interpolation == "random":
            interpolation = "bicubic" if draws[22] < 0.5 else "bilinear"
        image = image[:, top : top + height, left : left + width]
        image = resize(image, (self.transform.size,) * 2, interpolation)
        return image.flip(-1) if draws[23] < self.augment.flip else image

    def evaluation_image(self, path: str, _draws: np.ndarray) -> torch.Tensor:
        image = decode(path)
        height, width = self.transform.resized(*image.shape[1:])
        image = resize(image, (height, width), self.transform.interpolation)
        top, left = self.transform.corner(height, width)
        return image[:, top : top + self.transform.size, left : left + self.transform.size]


class JobSampler:
    """What the DataLoader iterates: the jobs of the current epoch, replaced without starting workers anew."""

    def __init__(self):
        self.jobs: Iterator[Job] = iter(())

    def __iter__(self):
        return self.jobs


class FolderSource:
    """Image folders, read by DataLoader workers that are started once and serve training and evaluation alike."""

    def __init__(self, dataset: FolderDataset, workers: int, device: torch.device, max_bad_files: int):
        self.splits = dataset.files
        self.augment = dataset.augment
        self.device = device
        self.max_bad_files = max_bad_files
        self.bad: dict[str, str] = {}
        self.sampler = JobSampler()
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.sampler,
            num_workers=workers,
            collate_fn=lambda batch: batch,
            persistent_workers=workers > 0,
            prefetch_factor=WORKERS_AHEAD if workers else None,
            pin_memory=device.type == "cuda",
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )

    def count(self, split: str) -> int:
        return len(self.splits[split])

    def batches(self, jobs: Iterator[Job]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.sampler.jobs = jobs
        yield from ahead_on_device(self.checked(self.loader), self.device)

    def checked(self, batches) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Name new bad files in the log and stop at the limit."""
        for images, labels, bad in batches:
            for path, reason in bad:
                if path not in self.bad:
                    self.bad[path] = reason
                    log.warning("cannot read %s (%s)", path, reason)
            if len(self.bad) > self.max_bad_files:
                listed = ", ".join(self.bad)
                raise DataError(
                    f"{len(self.bad)} files cannot be read, more than {self.max_bad_files}: {listed}"
                )
            yield images, labels

    def close(self) -> None:
        iterator, self.loader._iterator = self.loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


def ahead_on_device(batches, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Copy batches to a GPU one ahead of use, on a stream of its own; elsewhere pass them on."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    waiting = None
    for images, labels in batches:
        with torch.cuda.stream(stream):
            copies = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            done = stream.record_event()
        if waiting is not None:
            yield arrived(*waiting)
        waiting = copies, done
    if waiting is not None:
        yield arrived(*waiting)


def arrived(
    copies: tuple[torch.Tensor, torch.Tensor], done: torch.cuda.Event
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the current stream wait for a copy, and the allocator know that it is used there."""
    current = torch.cuda.current_stream(copies[0].device)
    current.wait_event(done)
    for tensor in copies:
        tensor.record_stream(current)
    return copies


# ----------------------------------------------------------------------------------------------------------
# What the scripts use
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Who gets which batch: `world * accumulate` virtual ranks of `batch` images make one optimizer step."""

    batch: int  # images in a micro-batch
    accumulate: int  # micro-batches of each process in an optimizer step
    eval_batch: int
    seed: int
    rank: int
    world: int  # processes


class Data:
    """One source, opened: made by `open_data`.

    Attributes: name; classes (tuple of str); splits (such as ("train", "val", "test")); transform
    (EvalTransform); size (pixels), mean, std (three floats) of that transform; augment (Augmentation); steps
    (optimizer steps an epoch); wait_seconds (how long the consumer of batches has waited for them so far).
    """

    def __init__(self, name: str, source, classes: tuple[str, ...], transform: EvalTransform, plan: Plan):
        self.name = name
        self.source = source
        self.classes = classes
        self.splits = tuple(source.splits)
        self.transform = transform
        self.size, self.mean, self.std = transform.size, transform.mean, transform.std
        self.augment = source.augment
        self.plan = plan
        self.wait_seconds = 0.0
        self.steps = len(self._stream(0, plan.rank)) // plan.batch
        if not self.steps:
            raise DataError(
                f"{name} has {self.count('train')} training images, too few for one step of "
                f"{plan.world} x {plan.batch} x {plan.accumulate} images: take a smaller batch"
            )

    def count(self, split: str) -> int:
        """Return the number of images in a split, over all ranks."""
        return self.source.count(split)

    def tensors(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a small set's images, uint8 (N, 3, H, W), and labels, int64 (N,), on the device."""
        return self.source.splits[split]

    @property
    def bad_files(self) -> list[tuple[str, str]]:
        """The (path, reason) of every unreadable file that this process has met."""
        return list(self.source.bad.items())

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield an epoch's augmented micro-batches, uint8 (B, 3, H, W) and int64 (B,), on the device.

        `accumulate` of them make an optimizer step, each from a virtual rank of its own: micro-batch k of process r
        is virtual rank r + world * k. An epoch begun at `first_step` goes on as if it had run from its start.
        """
        yield from self._timed(self.source.batches(self._train_jobs(epoch, first_step)))

    def eval_batches(self, split: str = "val") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this rank's share of a split, uint8 (B, 3, H, W) and int64 (B,): over all ranks, every image once.

        Batches may be short, and ranks may get different numbers of them. Unreadable files are left out.
        """
        yield from self._timed(self.source.batches(eval_jobs(split, self.count(split), self.plan)))

    def close(self) -> None:
        """End the workers, if there are any."""
        self.source.close()

    def _stream(self, epoch: int, virtual_rank: int) -> np.ndarray:
        virtual_world = self.plan.world * self.plan.accumulate
        return train_stream(
            self.count("train"), self.augment.repeats, (self.plan.seed, epoch), (virtual_rank, virtual_world)
        )

    def _train_jobs(self, epoch: int, first_step: int) -> Iterator[Job]:
        plan = self.plan
        ranks = [plan.rank + plan.world * k for k in range(plan.accumulate)]
        streams = {rank: self._stream(epoch, rank) for rank in ranks}
        for step in range(first_step, self.steps):
            for rank in ranks:
                indices = streams[rank][step * plan.batch : (step + 1) * plan.batch]
                yield Job("train", indices, (plan.seed, epoch, rank, step))

    def _timed(self, batches: Iterator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def eval_jobs(split: str, count: int, plan: Plan) -> Iterator[Job]:
    indices = np.arange(plan.rank, count, plan.world)
    for start in range(0, len(indices), plan.eval_batch):
        yield Job(split, indices[start : start + plan.eval_batch], None)


def open_data(
    source: str,
    *,
    size: int | None = None,
    batch: int = 64,
    accumulate: int = 1,
    eval_batch: int | None = None,
    augment: Augmentation | None = None,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    root: str = "data",
    max_bad_files: int = 50,
) -> Data:
    """Open `digits`, `cifar10`, `cifar100` or the path of an image folder (train/ and val|validation|test/).

    size: of the images, pixels (32 for the small sets, 224 for folders). batch: images in a micro-batch; world x
    batch x accumulate make an optimizer step. workers: of each process, for folders (None: one a CPU core that this
    process may use, shared among the machine's processes). root: folder of CIFAR's files. DataError for everything
    a user did wrong.
    """
    device = torch.device(device)
    augment = augment or default_augmentation(source)
    plan = Plan(batch, accumulate, eval_batch or batch, seed, rank, world)
    if source in SMALL_SETS:
        splits, classes = (
            load_digits(size or 32) if source == "digits" else load_cifar(source, size or 32, root)
        )
        mean, std = SMALL_SETS[source]
        transform = EvalTransform(size or 32, 1.0, "bilinear", mean, std)
        return Data(source, TensorSource(splits, device, augment), classes, transform, plan)
    files = find_splits(Path(source))
    transform = EvalTransform(size or 224)
    if workers is None:
        workers = default_workers(world)
    dataset = FolderDataset(files, transform, augment)
    opened = FolderSource(dataset, workers, device, max_bad_files)
    return Data(source, opened, files["train"].classes, transform, plan)


def find_splits(folder: Path) -> dict[str, FileList]:
    """Return the files of train/ and of val/, validation/ or test/ below a folder, classes checked."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {str(folder)!r}, and the sets with a name are {', '.join(SMALL_SETS)}"
        )
    if not (folder / "train").is_dir():
        raise DataError(
            f"{str(folder)!r} has no folder train/: it needs train/ and val/ with a sub-folder a class"
        )
    found = {split: folder / name for split, name in SPLIT_FOLDERS if (folder / name).is_dir()}
    if len(found) == 1:
        raise DataError(f"{str(folder)!r} has train/ but none of val/, validation/ and test/ to evaluate on")
    if "val" not in found:
        found["val"] = found["test"]
    files = {split: FileList(path) for split, path in found.items()}
    classes = files["train"].classes
    if len(classes) == 1:
        raise DataError(
            f"{str(folder / 'train')!r} has one class only ({classes[0]!r}): nothing can be learnt"
        )
    for split, listed in files.items():
        if listed.classes != classes:
            missing, extra = set(classes) - set(listed.classes), set(listed.classes) - set(classes)
            raise DataError(
                f"the classes of {str(found[split])!r} differ from those of train/: "
                f"missing {sorted(missing)[:5]}, unknown {sorted(extra)[:5]}"
            )
    return files


def default_workers(world: int) -> int:
    """Return the number of workers a process gets by itself: the cores it may use, shared among local processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world)))


class EvalFolder:
    """One folder of class folders to evaluate on: iterate for uint8 (B, 3, S, S), int64 (B,). See `eval_folder`.

    Attributes: classes (names of the sub-folders), count (images over all ranks).
    """

    def __init__(self, source: FolderSource, plan: Plan):
        self.source = source
        self.plan = plan
        self.files = source.splits["val"]
        self.classes = self.files.classes
        self.count = len(self.files)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.source.batches(eval_jobs("val", self.count, self.plan))

    def paths(self, index: int) -> str:
        """Return the path of image `index`; rank r of w gets images r, r + w, r + 2w, ... in that order."""
        return self.files.path(index)

    @property
    def bad_files(self) -> list[tuple[str, str]]:
        """The (path, reason) of every unreadable file that this process has met."""
        return list(self.source.bad.items())

    def close(self) -> None:
        """End the workers."""
        self.source.close()


def eval_folder(
    path: str,
    transform: EvalTransform,
    *,
    batch: int = 64,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world: int = 1,
    max_bad_files: int = 50,
) -> EvalFolder:
    """Open one folder of class folders for evaluation: every image once over all ranks, unreadable ones left out."""
    files = {"val": FileList(Path(path))}
    dataset = FolderDataset(files, transform, Augmentation())
    workers = default_workers(world) if workers is None else workers
    source = FolderSource(dataset, workers, torch.device(device), max_bad_files)
    return EvalFolder(source, Plan(batch, 1, batch, 0, rank, world))
