"""Images for training and evaluation: `digits`, `cifar10`, `cifar100` or a folder laid out as ImageNet's.

    data = open_data("digits", batch=64)                    # or open_data("/path/imagenet", accumulate=4)
    for images, labels in data.train_batches(epoch=0): ...  # uint8 (B, 3, H, W), int64 (B,)
    for images, labels in data.eval_batches("val"): ...

Small sets live as uint8 tensors on the training device and are augmented there a batch at a time. Image
folders go through DataLoader workers, from JPEG to uint8 crops. Both look the same to the training loop,
which normalises on the device with `normalize`. A training batch depends on (seed, epoch, virtual rank, step)
alone: never on the number of workers or processes, nor on the step at which an epoch was resumed.
`python bench.py data` measures the folder pipeline.
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
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode

log = logging.getLogger("data")
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # uint8 (B, 3, H, W), int64 (B,)

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
CROP_DRAWS = 24  # uniform numbers behind a random crop: `crop_box`'s 22, one for the filter, one for the flip
RESIZE = {  # what F.interpolate calls; that takes a size or a factor, never both
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
}
MAX_SUBSTITUTES = 20  # files tried for one place in a batch
WORKERS_AHEAD = 2  # batches that each worker prepares in advance


class DataError(ValueError):
    """Something about the data that the user can mend, said in one sentence."""


# ----------------------------------------------------------------------------------------------------------
# Evaluation transform and normalisation


@dataclass(frozen=True)
class EvalTransform:
    """timm's evaluation transform: shorter side to floor(size / crop_pct), centre crop, normalisation.

    Called with a PIL image it returns float32 (3, size, size), normalised; `crop` stops at uint8.
    """

    size: int = 224  # pixels
    crop_pct: float = 0.95  # share of the resized shorter side that the crop keeps
    interpolation: str = "bicubic"  # "bicubic" | "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN  # per channel, of values in 0..1
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self):
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"a crop_pct of {self.crop_pct}: it is a share, above 0 and at most 1")

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


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to the device; a GPU goes on with its work meanwhile, which takes pinned memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def normalize(images: torch.Tensor, mean, std, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Turn uint8 (B, 3, H, W) into (images / 255 - mean) / std of `dtype`, on the images' own device.

    mean and std are three floats each, of values in 0..1. The arithmetic is float32 whatever the dtype.
    """
    constants = on_device(torch.tensor([mean, std], dtype=torch.float32), images.device)
    mean, std = constants.mul_(255).view(2, 3, 1, 1)
    return images.float().sub_(mean).div_(std).to(dtype)


# ----------------------------------------------------------------------------------------------------------
# Training augmentation


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
    """Return a source's own augmentation: the paper's recipe for folders, crop and flip for small sets."""
    if source == "digits":
        return Augmentation(padding=3, flip=0.0, layers=0, repeats=1)
    if source in ("cifar10", "cifar100"):
        return Augmentation(padding=4, flip=0.5, layers=0, repeats=1)
    return Augmentation()


def crop_box(height: int, width: int, augment: Augmentation, draws: list[float]) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random resized crop: ten tries, then the centre.

    draws: 22 uniform numbers in 0..1 (area and ratio of ten tries, then position).
    """
    (small, large), log_ratio = augment.scale, [math.log(ratio) for ratio in augment.ratio]
    for area, ratio in zip(draws[:20:2], draws[1:20:2], strict=True):
        area = (small + (large - small) * area) * height * width
        ratio = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    w = max(1, min(width, round(height * augment.ratio[1])))
    h = max(1, min(height, round(width / augment.ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_and_flip(
    padded: torch.Tensor, indices: np.ndarray, augment: Augmentation, rng: np.random.Generator
) -> torch.Tensor:
    """Return the images `indices` (B,) of a padded set, each cropped at random and flipped at random.

    padded: uint8 (N, 3, H + 2p, W + 2p) with the margin p = augment.padding. The result is (B, 3, H, W).
    """
    corners = rng.integers(0, 2 * augment.padding + 1, (len(indices), 2))
    flips = rng.random(len(indices)) < augment.flip
    size = tuple(side - 2 * augment.padding for side in padded.shape[2:])
    # On a CPU, copying window by window takes a third of the time of a gather.
    if padded.device.type == "cpu" and (augment.padding or flips.any()):
        return copy_windows(padded, indices, (corners, flips), size)
    chosen = padded.index_select(0, on_device(torch.from_numpy(indices), padded.device))
    return gather_windows(chosen, (corners, flips), size) if augment.padding or flips.any() else chosen


def copy_windows(padded: torch.Tensor, indices: np.ndarray, places: tuple, size: tuple) -> torch.Tensor:
    """Return windows of `size` of images in main memory; places: corners (B, 2), whether to flip (B,)."""
    pixels, (height, width) = padded.numpy(), size
    result = np.empty((len(indices), padded.shape[1], height, width), dtype=np.uint8)
    chosen = zip(indices.tolist(), *(place.tolist() for place in places), strict=True)
    for n, (index, (y, x), flip) in enumerate(chosen):
        window = pixels[index, :, y : y + height, x : x + width]
        result[n] = window[:, :, ::-1] if flip else window
    return torch.from_numpy(result)


def gather_windows(padded: torch.Tensor, places: tuple, size: tuple) -> torch.Tensor:
    """Return what `copy_windows` returns of all images in `padded`, on any device."""
    (corners, flips), (height, width) = places, size
    rows = (corners[:, :1] + np.arange(height)) * padded.shape[3]
    columns = corners[:, 1:] + np.where(flips[:, None], np.arange(width)[::-1], np.arange(width))
    rows, columns = (on_device(torch.from_numpy(i), padded.device) for i in (rows, columns))
    pixels = (rows[:, None, :, None] + columns[:, None, None, :]).flatten(2)  # (B, 1, H * W)
    return padded.flatten(2).gather(2, pixels.expand(-1, 3, -1)).unflatten(2, (height, width))


# ----------------------------------------------------------------------------------------------------------
# RandAugment: timm's 15 "increasing" operations, on uint8 batches
#
# Each takes images, uint8 (N, 3, H, W), and one argument per image, and returns new uint8 images. Pillow's
# arithmetic is followed, down to its cutting off of fractions where one would expect rounding. The ways round
# torch.where, comparisons and direct conversions are there because these take 5 to 20 times longer on a CPU.

CACHE = 2**17  # bytes of images that go through an operation at once on a CPU
ALMOST = 1e-3  # added before fractions are cut off, so that float32's 253.99999 is 254 as in Pillow's doubles


def per_image(
    arguments: list[float], images: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor | float:
    """Return one number per image as (N, 1, ...) of the images' rank and device; a single one as it is.

    Making a tensor of one number takes as long as a pass over an image.
    """
    if len(arguments) == 1:
        return arguments[0]
    numbers = on_device(torch.tensor(arguments, dtype=dtype), images.device)
    return numbers.view(-1, *[1] * (images.dim() - 1))


def cut(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values as uint8: fractions cut off, limited to 0..255. Overwrites its argument."""
    return values.add_(ALMOST).short().clamp_(0, 255).byte()


def choose(mask: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return uint8 `first` where the uint8 mask is 255, `second` where it is 0."""
    return (first ^ second) & mask ^ second


def beyond(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Return a uint8 mask: 255 where an int16 position is outside 0..size-1, as a sign bit tells, else 0."""
    return ((positions | (size - 1 - positions)) >> 15).byte()


def blend(degenerate: torch.Tensor, images: torch.Tensor, factors: list[float]) -> torch.Tensor:
    """Return degenerate + factor * (images - degenerate) as uint8, of float32 images."""
    return cut(torch.lerp(degenerate, images, per_image(factors, images)))


def auto_contrast(images: torch.Tensor, _: list[float]) -> torch.Tensor:
    pixels = images.flatten(2)
    low, high = pixels.amin(2)[..., None, None].float(), pixels.amax(2)[..., None, None].float()
    flat = (low == high).float()  # a channel of one value stays as it is
    scale = (1 - flat) * 255 / (high - low + flat) + flat
    return cut(images.float().sub_(low * (1 - flat)).mul_(scale))


def equalize(images: torch.Tensor, _: list[float]) -> torch.Tensor:
    channels, device = images.shape[0] * 3, images.device
    values = torch.arange(256, device=device)
    offsets = torch.arange(channels, dtype=torch.int32, device=device)[:, None] * 256
    cells = (images.reshape(channels, -1) + offsets).view(-1)
    counts = torch.bincount(cells, minlength=channels * 256).view(channels, 256)
    last = torch.where(counts > 0, values, 0).amax(1, keepdim=True)
    step = (counts.sum(1, keepdim=True) - counts.gather(1, last)) // 255
    table = (step // 2 + counts.cumsum(1) - counts) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp(max=255), values).byte()  # too few values: unchanged
    return table.view(-1).index_select(0, cells).view_as(images)


def invert(images: torch.Tensor, _: list[float]) -> torch.Tensor:
    return ~images


def posterize(images: torch.Tensor, bits: list[float]) -> torch.Tensor:
    return images & per_image([256 - 2 ** (8 - kept) for kept in bits], images, torch.uint8)


def solarize(images: torch.Tensor, thresholds: list[float]) -> torch.Tensor:
    below = beyond(images.short() - per_image(thresholds, images, torch.int16), 256)
    return images ^ ~below  # x ^ 255 is 255 - x


def solarize_add(images: torch.Tensor, addends: list[float]) -> torch.Tensor:
    below = 1 - (images >> 7)  # 1 below 128: at most 127 + 110, no overflow
    return images + below * per_image(addends, images, torch.uint8)


def color(images: torch.Tensor, factors: list[float]) -> torch.Tensor:
    exact = images.float()
    red, green, blue = exact.split(1, dim=1)
    luma = (red * 19595 + 32768).add_(green, alpha=38470).add_(blue, alpha=7471).div_(65536).floor_()
    return blend(luma, exact, factors)


def contrast(images: torch.Tensor, factors: list[float]) -> torch.Tensor:
    exact = images.float()
    # Pillow rounds every pixel's luma before it takes the mean; on average that is nothing.
    luma = (exact.flatten(2).mean(2) * exact.new_tensor([0.299, 0.587, 0.114])).sum(1)
    return blend(torch.floor(luma + 0.5).view(-1, 1, 1, 1), exact, factors)


def brightness(images: torch.Tensor, factors: list[float]) -> torch.Tensor:
    return cut(images.float().mul_(per_image(factors, images)))


def sharpness(images: torch.Tensor, factors: list[float]) -> torch.Tensor:
    width = images.shape[3]
    planes = images.flatten(2)  # rows in one line: what the sums mix at the border is not used
    wide = planes.short()
    sums = (wide[..., :-2] + wide[..., 1:-1]).add_(wide[..., 2:])
    sums = (sums[..., : -2 * width] + sums[..., width:-width]).add_(sums[..., 2 * width :])
    sums.add_(wide[..., width + 1 : -width - 1], alpha=4)
    smooth = sums.float().mul_(1 / 13).add_(0.5).floor_()
    exact = planes[..., width + 1 : -width - 1].float()
    result = images.clone(memory_format=torch.contiguous_format)
    result.view(planes.shape)[..., width + 1 : -width - 1] = blend(smooth, exact, factors)
    result[..., 0], result[..., -1] = images[..., 0], images[..., -1]  # Pillow's filter leaves the border
    return result


def rotate(images: torch.Tensor, degrees: list[float], fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    """Rotate about the centre. Bicubic is torch's kernel (a = -0.75), a bit softer than Pillow's (a = -1)."""
    count, _, height, width = images.shape
    angle = np.radians(degrees)[:, None]
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = ((2 * np.arange(side) + 1 - side) / 2 for side in (width, height))
    shares = [cos * x / width, sin * x / height, -sin * y / width, cos * y / height]
    shares = torch.from_numpy(np.concatenate(shares, axis=1, dtype=np.float32) * 2)
    by_column, by_row = on_device(shares, images.device).split([2 * width, 2 * height], dim=1)
    # x and y, -1..1: each is the sum of what a pixel's column and its row give
    source = by_column.view(count, 2, 1, width) + by_row.view(count, 2, height, 1)
    mode, grid = "bicubic" if bicubic else "bilinear", source.permute(0, 2, 3, 1)
    rotated = F.grid_sample(images.float(), grid, mode, padding_mode="border", align_corners=False)
    x, y = source.abs_().split(1, dim=1)
    outside = torch.maximum(x, y).clamp_(max=1).short().neg_().byte()  # 255 from 1 on, 0 below
    return choose(outside, fill, cut(rotated))


def cubic(d):
    """Return Pillow's cubic filter (a = -1): the weights of the pixels -1, 0, 1, 2 at 0 <= d < 1."""
    return [-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2]


def slide(images: torch.Tensor, offsets: np.ndarray, fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    """Take row y of image n from `offsets[n, y]` pixels further right, offsets (N, H) or (N, 1).

    One gather brings a row's neighbours along; the filter's taps are then slices. Taps beyond the edge repeat
    it. Bilinear, whole numbers with weights of 1/128 are as good: less than a grey level off.
    """
    width, device = images.shape[3], images.device
    whole = np.floor(offsets)
    columns = torch.arange(width + (3 if bicubic else 1), dtype=torch.int16, device=device)
    first = on_device(torch.from_numpy(whole.astype(np.int16) - np.int16(bicubic)), device)[:, None, :, None]
    source = (columns + first).clamp_(0, width - 1).long()  # (N, 1, H, W + taps - 1)
    taps = images.gather(3, source.expand(len(images), 3, images.shape[2], -1))
    weights = cubic(offsets - whole) if bicubic else [np.round(128 * (offsets - whole))]
    weights = np.array(weights, dtype=np.float32 if bicubic else np.int16)
    weights = on_device(torch.from_numpy(weights), device)[:, :, None, :, None]  # (N, 1, H, 1) each
    if bicubic:
        taps = taps.float()
        moved = taps[..., :width] * weights[0]
        for tap in (1, 2, 3):
            moved.addcmul_(taps[..., tap : tap + width], weights[tap])
        moved = cut(moved)
    else:
        near = taps.short()
        step = torch.empty_like(near)  # to the next pixel; beyond a row's end what it holds is not used
        torch.sub(near.view(-1)[1:], near.view(-1)[:-1], out=step.view(-1)[:-1])
        moved = (step.mul_(weights[0]) >> 7).add_(near).byte()[..., :width]
    nearest = np.floor(offsets + 0.5).astype(np.int16)[..., None] + np.arange(width, dtype=np.int16)
    # (N, 1, H, W), below 0 is far beyond. From NumPy, ten times as fast; a GPU is sent small images only.
    outside = (nearest.view(np.uint16) >= width)[:, None]
    return choose(-on_device(torch.from_numpy(outside), device).view(torch.uint8), fill, moved)


def shift(images: torch.Tensor, offset: float, fill: torch.Tensor, bicubic: bool, axis: int) -> torch.Tensor:
    """Take all of an image from `offset` pixels further along `axis`: `slide` without its gather.

    The filter's taps are slices of the rows in one line; what they mix beyond a row's end is cut off.
    """
    size, whole, nearest = images.shape[axis], math.floor(offset), math.floor(offset + 0.5)
    result = torch.empty_like(images, memory_format=torch.contiguous_format).copy_(fill)
    begin, end = max(0, -nearest), min(size, size - nearest)  # elsewhere all is fill
    if begin >= end:
        return result
    positions = np.arange(begin + whole - bicubic, end + whole + bicubic + 1)
    inside = positions[(positions >= 0) & (positions < size)]
    edges = int((positions < 0).sum()), int((positions >= size).sum())
    taps = torch.cat(
        [images.narrow(axis, 0, 1)] * edges[0]
        + [images.narrow(axis, int(inside[0]), len(inside))]
        + [images.narrow(axis, size - 1, 1)] * edges[1],
        dim=axis,
    )
    step = taps.stride(axis)
    if bicubic:
        line = taps.flatten().float()
        length = len(line) - 3 * step
        weights = cubic(offset - whole)
        moved = line[:length] * weights[0]
        for tap in (1, 2, 3):
            moved.add_(line[tap * step : tap * step + length], alpha=weights[tap])
        moved = cut(moved)
    else:
        line = taps.flatten().short()
        near, far = line[:-step], line[step:]
        moved = ((far - near).mul_(round(128 * (offset - whole))) >> 7).add_(near).byte()
    part = result.narrow(axis, begin, end - begin)
    part.copy_(moved.as_strided(part.shape, taps.stride()))
    return result


def shear_x(images: torch.Tensor, factors: list[float], fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    return slide(images, np.array(factors)[:, None] * (np.arange(images.shape[2]) + 0.5), fill, bicubic)


def shear_y(images: torch.Tensor, factors: list[float], fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    return shear_x(images.transpose(2, 3), factors, fill, bicubic).transpose(2, 3)


def translate_x(images: torch.Tensor, shares: list[float], fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    if len(shares) == 1:
        return shift(images, shares[0] * images.shape[3], fill, bicubic, axis=3)
    return slide(images, np.array(shares)[:, None] * images.shape[3], fill, bicubic)


def translate_y(images: torch.Tensor, shares: list[float], fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    if len(shares) == 1:
        return shift(images, shares[0] * images.shape[2], fill, bicubic, axis=2)
    return translate_x(images.transpose(2, 3), shares, fill, bicubic).transpose(2, 3)


def enhancement(magnitude: float, sign: int) -> float:
    return max(0.1, 1 + sign * magnitude / 10 * 0.9)


# Each with its argument as a function of the magnitude, 0..10, and of a random sign: timm's scales.
OPERATIONS = (
    (auto_contrast, lambda magnitude, sign: 0),
    (equalize, lambda magnitude, sign: 0),
    (invert, lambda magnitude, sign: 0),
    (rotate, lambda magnitude, sign: sign * magnitude / 10 * 30),  # degrees
    (posterize, lambda magnitude, sign: 4 - int(magnitude / 10 * 4)),  # bits kept
    (solarize, lambda magnitude, sign: 256 - int(magnitude / 10 * 256)),  # threshold
    (solarize_add, lambda magnitude, sign: int(magnitude / 10 * 110)),  # added below 128
    (color, enhancement),
    (contrast, enhancement),
    (brightness, enhancement),
    (sharpness, enhancement),
    (shear_x, lambda magnitude, sign: sign * magnitude / 10 * 0.3),
    (shear_y, lambda magnitude, sign: sign * magnitude / 10 * 0.3),
    (translate_x, lambda magnitude, sign: sign * magnitude / 10 * 0.45),  # share of the width
    (translate_y, lambda magnitude, sign: sign * magnitude / 10 * 0.45),  # share of the height
)
GEOMETRIC = (rotate, shear_x, shear_y, translate_x, translate_y)  # these also take a fill colour and a filter


class Draws(NamedTuple):
    """RandAugment's random choices for a batch, each (layers, N)."""

    operation: np.ndarray  # index into OPERATIONS, -1 where none is applied
    magnitude: np.ndarray  # 0..10
    sign: np.ndarray  # -1 | 1
    bicubic: np.ndarray  # bool


def draw_operations(count: int, augment: Augmentation, rng: np.random.Generator) -> Draws:
    """Draw RandAugment's choices for `count` images: operations with replacement, each applied or not."""
    shape = (augment.layers, count)
    operation = rng.integers(len(OPERATIONS), size=shape)
    applied = rng.random(shape) < augment.probability
    magnitude = rng.normal(augment.magnitude, augment.magnitude_std, shape).clip(0, 10)
    sign = rng.integers(2, size=shape) * 2 - 1
    bicubic = rng.random(shape) < {"bilinear": 0, "random": 0.5, "bicubic": 1}[augment.interpolation]
    return Draws(np.where(applied, operation, -1), magnitude, sign, bicubic)


def apply_operation(images: torch.Tensor, choice: int, arguments: list, fill: torch.Tensor, bicubic: bool):
    """Return uint8 (N, 3, H, W) after OPERATIONS[choice], one argument per image; fill is uint8 (3, 1, 1)."""
    operation = OPERATIONS[choice][0]
    return operation(images, arguments, *([fill, bicubic] if operation in GEOMETRIC else []))


def rand_augment(images: torch.Tensor, draws: Draws, fill: torch.Tensor) -> torch.Tensor:
    """Apply the drawn operations to uint8 (B, 3, H, W), in place, and return it.

    Images that share an operation (and its filter) go through it together, as many at once as a processor's
    cache holds. fill: uint8 (3, 1, 1), the colour of what a rotation, shear or translation uncovers.
    """
    on_cpu = images.device.type == "cpu"
    at_once = max(1, CACHE // images[0].numel()) if on_cpu else len(images)
    pixels = images.numpy() if on_cpu else images  # NumPy's indexing is eight times as fast
    for operation, magnitude, sign, bicubic in zip(*(choice.tolist() for choice in draws), strict=True):
        groups: dict[tuple[int, bool], list[int]] = {}
        for n, choice in enumerate(operation):
            if choice >= 0:
                groups.setdefault((choice, bicubic[n] and OPERATIONS[choice][0] in GEOMETRIC), []).append(n)
        for (choice, smooth), group in groups.items():
            for members in (group[start : start + at_once] for start in range(0, len(group), at_once)):
                arguments = [OPERATIONS[choice][1](magnitude[n], sign[n]) for n in members]
                where = members if len(members) > 1 else slice(members[0], members[0] + 1)
                chosen = torch.as_tensor(pixels[where])
                pixels[where] = apply_operation(chosen, choice, arguments, fill, smooth)
    return images


def fill_colour(mean: tuple[float, float, float]) -> torch.Tensor:
    """Return a data set's mean colour as uint8 (3, 1, 1)."""
    return torch.tensor([min(255, round(255 * m)) for m in mean], dtype=torch.uint8).view(3, 1, 1)


# ----------------------------------------------------------------------------------------------------------
# Which images make a batch


class Job(NamedTuple):
    """One batch to make: images `indices` of a split, and the key of a training batch's random stream."""

    split: str
    indices: np.ndarray  # int64 (B,)
    key: tuple[int, ...] | None  # (seed, epoch, virtual rank, step); None for evaluation


def train_stream(count: int, repeats: int, seed_epoch: tuple[int, int], place: tuple[int, int]) -> np.ndarray:
    """Return the indices of the images that virtual rank `place` = (rank, world) sees in an epoch, int64.

    With repeats, the stream of timm's RepeatAugSampler: shuffled by the epoch alone, each index repeated in
    place, padded, strided over the ranks (so that an image's copies land on different ranks), cut to about an
    epoch. Without, the rank's stride of one permutation by (seed, epoch), the uneven end dropped.
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


class TensorSource:
    """A small set held as uint8 tensors on the device, augmented there a whole batch at a time."""

    def __init__(self, splits: dict, device: torch.device, augment: Augmentation, mean: tuple):
        self.splits = {split: (x.to(device), y.to(device)) for split, (x, y) in splits.items()}
        images, labels = self.splits["train"]
        margin, (height, width) = augment.padding, images.shape[2:]
        self.padded = F.pad(images, (margin,) * 4)  # with black, once for all
        images = self.padded[:, :, margin : margin + height, margin : margin + width]
        self.splits["train"] = images, labels  # a view: the images lie in memory once
        self.counts = {split: len(y) for split, (_, y) in splits.items()}
        self.device = device
        self.augment = augment
        self.fill = fill_colour(mean).to(device)
        self.bad: dict[str, str] = {}

    def batches(self, jobs: Iterator[Job]) -> Batches:
        for job in jobs:
            images, labels = self.splits[job.split]
            indices = on_device(torch.from_numpy(job.indices), self.device)
            labels = labels.index_select(0, indices)
            if job.key is None:
                images = images.index_select(0, indices)
            else:
                rng = np.random.default_rng(job.key)
                images = crop_and_flip(self.padded, job.indices, self.augment, rng)
                images = rand_augment(images, draw_operations(len(images), self.augment, rng), self.fill)
            yield images, labels

    def close(self) -> None:
        """Nothing to end: there are no workers."""


def resize_all(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 (N, 3, H, W) to (N, 3, size, size), bilinear and antialiased, part by part."""
    if images.shape[-1] == size:
        return images
    parts = images.split(4096)
    return torch.cat([F.interpolate(part, (size, size), mode="bilinear", antialias=True) for part in parts])


def load_digits(size: int) -> tuple[dict, tuple[str, ...]]:
    """Return scikit-learn's 8 x 8 digits at (size, size) in three fixed, stratified splits; and classes."""
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
    """Return CIFAR at (size, size) in three splits, val being the last 5,000 training images; and classes.

    Read from `root`, or downloaded there by whichever process comes first. DataError where neither works.
    """
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with open(Path(root, ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            train, test = (dataset(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name} is not in {root!r} and could not be downloaded ({error}): "
            "put torchvision's files there, or name the folder that has them with --root"
        ) from error
    images, tested = (
        resize_all(torch.from_numpy(part.data.transpose(0, 3, 1, 2).copy()), size) for part in (train, test)
    )
    labels = torch.tensor(train.targets)
    splits = {"train": (images[:-5000], labels[:-5000]), "val": (images[-5000:], labels[-5000:])}
    splits["test"] = tested, torch.tensor(test.targets)
    return splits, tuple(train.classes)


# ----------------------------------------------------------------------------------------------------------
# Image folders: files, decoding, workers


def natural_key(name: str) -> list:
    """Sort key that puts `n2` before `n10`, as timm orders classes and files."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


class FileList:
    """The images below a folder of class folders, held without one Python object per file.

    A list of strings would be copied into every worker, page by page, as reference counts change: here the
    names are one array of bytes that workers share for good.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(
                f"there is no folder {str(folder)!r}: name one that holds a sub-folder for each class"
            )
        self.folder = os.fsencode(folder)
        self.classes = tuple(sorted((e.name for e in os.scandir(folder) if e.is_dir()), key=natural_key))
        if not self.classes:
            raise DataError(f"{str(folder)!r} has no class folders: it needs a sub-folder for each class")
        names, labels = [], []
        for label, name in enumerate(self.classes):
            files = find_images(folder, name)
            if not files:
                known = ", ".join(EXTENSIONS)
                raise DataError(
                    f"class folder {str(folder / name)!r} holds no image ({known}): fill or remove it"
                )
            names += files
            labels += [label] * len(files)
        encoded = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([len(name) for name in encoded])
        self.names = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.folder + b"/" + self.names[start : self.ends[index]].tobytes())


def find_images(folder: Path, name: str) -> list[str]:
    """Return the image files below folder/name as paths relative to folder, in natural order."""
    found = []
    for parent, _, files in os.walk(folder / name, followlinks=True):
        relative = os.path.relpath(parent, folder)
        found += [os.path.join(relative, file) for file in files if file.lower().endswith(EXTENSIONS)]
    return sorted(found, key=natural_key)


def baseline_frame(data: bytearray | memoryview) -> tuple[int, int, int] | None:
    """Return (height, width, where the height stands) of a baseline JPEG with a single scan.

    In such a file the rows follow each other. None for any other, such as a progressive one.
    """
    at, frame, channels = 2, None, 0
    while at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xC0, 0xC1):
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            frame, channels = (height, width, at + 5), data[at + 9]
        elif marker == 0xDA:
            return frame if data[at + 4] == channels else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def decode(data: bytearray | memoryview) -> torch.Tensor:
    """Return a file's image as uint8 (3, H, W), as PIL decodes it; raises what PIL raises where it cannot.

    torchvision's JPEG decoder gives PIL's very pixels, for gray, CMYK and progressive files too. What it
    refuses (other formats, whatever their name; truncated files) is PIL's to read or to refuse.
    """
    if data[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(RuntimeError):
            # The operator itself: torchvision's function around it warns at every call since version 0.29.
            return torch.ops.image.decode_jpeg(
                torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB.value, False
            )
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextlib.contextmanager
def silent_decoder(stderr: int, null: int) -> Iterator[None]:
    """Send file descriptor 2, on which libjpeg prints its warnings, to `null` for the time of a call.

    For worker processes alone: they have one thread, so that nobody else's output can be lost meanwhile.
    """
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)


def resize(
    image: torch.Tensor, size: tuple[int, int], interpolation: str, factors: tuple = (None, None)
) -> torch.Tensor:
    """Resize uint8 (3, H, W) to (3, *size) with antialiasing, as PIL does to within a grey level or so.

    factors: output pixels per input pixel, down and across, where the output is only the upper left part.
    """
    # On dense pixels in RGBRGB order torch's kernel takes half the time that it takes on a view of them.
    image = image[None].contiguous(memory_format=torch.channels_last)
    return RESIZE[interpolation](image, size, False, *factors)[0]


class FolderDataset(Dataset):
    """Makes whole batches in DataLoader workers: the sampler hands over `Job`s.

    RandAugment runs here too. It is a fifth of the work on a batch (`python bench.py data`); on the device it
    would be some 300 small kernels a batch in the way of the model's: workers scale, the device does not.
    """

    def __init__(self, files: dict[str, FileList], transform: EvalTransform, augment: Augmentation):
        self.files = files
        self.transform = transform
        self.augment = augment
        self.fill = fill_colour(transform.mean)
        self.buffer = bytearray(2**20)
        self.silence = contextlib.nullcontext

    def own_process(self, _worker: int = 0) -> None:
        """Say that this process only makes batches: then a crop's file is decoded no further than it reaches.

        That saves an eighth of the decoding, but libjpeg wonders aloud about the rows that nobody asked for.
        """
        descriptors = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        self.silence = lambda: silent_decoder(*descriptors)

    def __getitem__(self, job: Job) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, str]]]:
        """Return images uint8 (B, 3, S, S), labels int64 (B,) and the (path, reason) of bad files."""
        images = torch.empty(len(job.indices), 3, self.transform.size, self.transform.size, dtype=torch.uint8)
        bad: list[tuple[str, str]] = []
        with torch.inference_mode():  # fifty short operations an image: autograd's bookkeeping is 2% of them
            taken = self.make_batch(job, images, bad)
        return images[: len(taken)], torch.from_numpy(self.files[job.split].labels[taken]), bad

    def make_batch(self, job: Job, images: torch.Tensor, bad: list) -> np.ndarray:
        """Put a job's images into `images`, note unreadable files in `bad`; return which images these are."""
        files = self.files[job.split]
        if job.key is None:
            taken = []
            for index in job.indices:
                if self.make(files.path(index), None, images[len(taken)], bad):
                    taken.append(index)
            return np.array(taken, dtype=np.int64)
        rng = np.random.default_rng(job.key)
        draws = rng.random((len(images), CROP_DRAWS)).tolist()
        taken = job.indices.copy()
        for position, image in enumerate(images):
            substitutes = self.substitutes(job, position)
            while not self.make(files.path(taken[position]), draws[position], image, bad):
                taken[position] = next(substitutes)
        rand_augment(images, draw_operations(len(images), self.augment, rng), self.fill)
        return taken

    def make(self, path: str, draws: list[float] | None, place: torch.Tensor, bad: list) -> bool:
        """Put the crop of a file's image into `place`; note a file that cannot be read in `bad`: False."""
        try:
            data = self.read(path)
            place.copy_(self.centre_crop(data) if draws is None else self.random_crop(data, draws))
        except Exception as error:  # there is hardly a type that PIL's decoders do not raise on broken files
            bad.append((path, f"{type(error).__name__}: {error}"))
            return False
        return True

    def read(self, path: str) -> memoryview:
        """Return a file's content, valid until the next call (fresh memory costs more than reading)."""
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > len(self.buffer):
                self.buffer = bytearray(size)
            content, filled = memoryview(self.buffer)[:size], 0
            while filled < size and (count := file.readinto(content[filled:])):
                filled += count
            return content[:filled]

    def substitutes(self, job: Job, position: int) -> Iterator[int]:
        """Yield training images to take a bad one's place, drawn by the batch's key and the position."""
        files = self.files[job.split]
        yield from np.random.default_rng([*job.key, position]).integers(len(files), size=MAX_SUBSTITUTES)
        folder = os.fsdecode(files.folder)
        raise DataError(f"{MAX_SUBSTITUTES} files in a row of {folder!r} cannot be read: are they images?")

    def decode_down_to(self, data: bytearray | memoryview, plan: Callable) -> tuple[torch.Tensor, tuple]:
        """Return an image, decoded at least down to a row, and what is to be done with it.

        plan: from the whole image's (height, width) to that row and what is to be done.
        """
        alone = self.silence is not contextlib.nullcontext
        frame = baseline_frame(data) if alone and data[-2:] == b"\xff\xd9" else None  # whole, not truncated
        if frame:
            height, width, place = frame
            row, todo = plan(height, width)
            rows = row + 4  # chroma is smoothed with the next row's, up to 4 pixels below
            if rows < height:
                data[place : place + 2] = rows.to_bytes(2, "big")
        with self.silence():
            image = decode(data)
        return image, todo if frame else plan(*image.shape[1:])[1]

    def random_crop(self, data: bytearray | memoryview, draws: list[float]) -> torch.Tensor:
        """Return the random resized crop of a file's image, flipped at random, uint8 (3, S, S)."""

        def plan(height: int, width: int):
            box = crop_box(height, width, self.augment, draws)
            return box[0] + box[2], box

        image, (top, left, height, width) = self.decode_down_to(data, plan)
        interpolation = self.augment.interpolation
        if interpolation == "random":
            interpolation = "bicubic" if draws[22] < 0.5 else "bilinear"
        image = image[:, top : top + height, left : left + width]
        image = resize(image, (self.transform.size, self.transform.size), interpolation)
        return image.flip(-1) if draws[23] < self.augment.flip else image

    def centre_crop(self, data: bytearray | memoryview) -> torch.Tensor:
        """Return the resized centre crop of a file's image, uint8 (3, S, S).

        What lies below and to the right of the crop is neither decoded (below) nor resized.
        """
        size = self.transform.size

        def plan(height: int, width: int):
            resized = self.transform.resized(height, width)
            top, left = self.transform.corner(*resized)
            reach = 2 * max(1, height / resized[0])  # of the bicubic filter, in rows
            row = math.ceil((top + size) * height / resized[0] + reach) + 1
            return row, ((top, left), (resized[0] / height, resized[1] / width))

        image, ((top, left), factors) = self.decode_down_to(data, plan)
        # The kernel leaves an axis as it is where input and output are equally long: then ask for one more.
        lengths = zip((top + size, left + size), image.shape[1:], factors, strict=True)
        asked = tuple(out + (out == given and factor != 1) for out, given, factor in lengths)
        part = resize(image, asked, self.transform.interpolation, factors)
        return part[:, top : top + size, left : left + size]


def unchanged(batch):
    """What the DataLoader does to a batch that is one already."""
    return batch


class FolderSource:
    """Image folders, read by DataLoader workers that are started once, for training and evaluation alike."""

    def __init__(self, dataset: FolderDataset, workers: int, device: torch.device, max_bad_files: int):
        self.splits = dataset.files
        self.counts = {split: len(files) for split, files in dataset.files.items()}
        self.augment = dataset.augment
        self.device = device
        self.max_bad_files = max_bad_files
        self.bad: dict[str, str] = {}  # path -> reason
        self.iteration = 0
        self.jobs: list[Job] = []  # what the loader iterates: replaced without starting workers anew
        context = "fork" if workers and sys.platform == "linux" else None  # a worker need not import anything
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.jobs,
            num_workers=workers,
            collate_fn=unchanged,
            worker_init_fn=dataset.own_process,
            persistent_workers=workers > 0,
            prefetch_factor=WORKERS_AHEAD if workers else None,
            pin_memory=device.type == "cuda",
            multiprocessing_context=context,
        )

    def batches(self, jobs: Iterator[Job]) -> Batches:
        return ahead_on_device(self.checked(jobs), self.device)

    def checked(self, jobs: Iterator[Job]) -> Batches:
        """Yield the jobs' batches in order; name bad files in the log, and stop at the limit."""
        self.jobs[:] = jobs
        self.iteration += 1
        mine = self.iteration
        for images, labels, bad in self.loader:
            for path, reason in bad:
                if path not in self.bad:
                    log.warning("cannot read %s (%s)", path, reason)
                self.bad[path] = reason
            if len(self.bad) > self.max_bad_files:
                raise DataError(
                    f"{len(self.bad)} files cannot be read and {self.max_bad_files} are allowed: mend or "
                    f"remove them, or allow more: {', '.join(self.bad)}"
                )
            yield images, labels
            if mine != self.iteration:
                raise RuntimeError("another iteration over this data began before this one had ended")

    def close(self) -> None:
        iterator, self.loader._iterator = self.loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


def check_shared_memory(workers: int, batch: int, size: int) -> None:
    """Raise DataError where the batches of the workers do not fit into a container's shared memory."""
    needed = workers * (WORKERS_AHEAD + 1) * batch * 3 * size**2
    if workers and os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < needed:
        raise DataError(
            f"{workers} workers need {needed / 2**20:.0f} MiB in /dev/shm, more than is free: use fewer with "
            "--workers, or start the container with a larger --shm-size"
        )


def ahead_on_device(batches: Batches, device: torch.device) -> Batches:
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


def arrived(copies: tuple[torch.Tensor, ...], done: torch.cuda.Event) -> tuple[torch.Tensor, ...]:
    """Make the current stream wait for the copies, and tell the allocator that they are used there."""
    current = torch.cuda.current_stream(copies[0].device)
    current.wait_event(done)
    for tensor in copies:
        tensor.record_stream(current)
    return copies


# ----------------------------------------------------------------------------------------------------------
# What the scripts use


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
                f"{name} has {self.count('train')} training images, too few for one step of {plan.world} x "
                f"{plan.batch} x {plan.accumulate} (processes x batch x accumulation): take a smaller batch"
            )

    def count(self, split: str) -> int:
        """Return the number of images in a split, over all ranks."""
        return self.source.counts[split]

    def tensors(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a small set's images, uint8 (N, 3, H, W), and labels, int64 (N,), on the device."""
        return self.source.splits[split]

    @property
    def bad_files(self) -> list[tuple[str, str]]:
        """The (path, reason) of every unreadable file that this process has met."""
        return list(self.source.bad.items())

    def train_batches(self, epoch: int, first_step: int = 0) -> Batches:
        """Yield an epoch's augmented micro-batches, uint8 (B, 3, H, W) and int64 (B,), on the device.

        `accumulate` of them make an optimizer step, each from a virtual rank of its own: micro-batch k of
        process r is virtual rank r + world * k. An epoch begun at `first_step` goes on as if it had run from
        its start. An unreadable file is replaced by another training image.
        """
        yield from self._timed(self.source.batches(self._train_jobs(epoch, first_step)))

    def eval_batches(self, split: str = "val") -> Batches:
        """Yield a rank's share of a split, uint8 (B, 3, H, W), int64 (B,): every image once over all ranks.

        Batches may be short, and ranks may get different numbers of them. Unreadable files are left out.
        """
        yield from self._timed(self.source.batches(eval_jobs(split, self.count(split), self.plan)))

    def close(self) -> None:
        """End the workers, if there are any."""
        self.source.close()

    def _stream(self, epoch: int, virtual_rank: int) -> np.ndarray:
        place = virtual_rank, self.plan.world * self.plan.accumulate
        return train_stream(self.count("train"), self.augment.repeats, (self.plan.seed, epoch), place)

    def _train_jobs(self, epoch: int, first_step: int) -> Iterator[Job]:
        plan = self.plan
        ranks = [plan.rank + plan.world * k for k in range(plan.accumulate)]
        streams = {rank: self._stream(epoch, rank) for rank in ranks}
        for step in range(first_step, self.steps):
            for rank in ranks:
                indices = streams[rank][step * plan.batch : (step + 1) * plan.batch]
                yield Job("train", indices, (plan.seed, epoch, rank, step))

    def _timed(self, batches: Batches) -> Batches:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def eval_jobs(split: str, count: int, plan: Plan) -> Iterator[Job]:
    """Yield the batches of one rank's share of a split."""
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

    size: of the images, pixels (32 for the small sets, 224 for folders). batch: images in a micro-batch;
    world x batch x accumulate make an optimizer step. workers: of each process, for folders (None: one a CPU
    core that the process may use, shared among the machine's processes; 0: none). root: folder of CIFAR's
    files. DataError for everything a user did wrong.
    """
    device = torch.device(device)
    augment = augment or default_augmentation(source)
    plan = Plan(batch, accumulate, eval_batch or batch, seed, rank, world)
    if source in SMALL_SETS:
        size = size or 32
        splits, classes = load_digits(size) if source == "digits" else load_cifar(source, size, root)
        mean, std = SMALL_SETS[source]
        transform = EvalTransform(size, 1.0, "bilinear", mean, std)
        return Data(source, TensorSource(splits, device, augment, mean), classes, transform, plan)
    files = find_splits(Path(source))
    transform = EvalTransform(size or 224)
    workers = default_workers(world) if workers is None else workers
    check_shared_memory(workers, max(batch, plan.eval_batch), transform.size)
    opened = FolderSource(FolderDataset(files, transform, augment), workers, device, max_bad_files)
    return Data(source, opened, files["train"].classes, transform, plan)


def find_splits(folder: Path) -> dict[str, FileList]:
    """Return the files of train/ and of val/, validation/ or test/ below a folder, classes checked."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}, and it is none of {', '.join(SMALL_SETS)}")
    found = {split: folder / name for split, name in SPLIT_FOLDERS if (folder / name).is_dir()}
    if "val" not in found and "test" in found:
        found["val"] = found.pop("test")
    if set(found) < {"train", "val"}:
        raise DataError(
            f"{str(folder)!r} lacks a folder to {'learn from' if 'train' not in found else 'evaluate on'}: "
            "it needs train/ and one of val/, validation/ and test/, each with a sub-folder for each class"
        )
    files = {split: FileList(path) for split, path in found.items()}
    classes = files["train"].classes
    if len(classes) == 1:
        raise DataError(
            f"{str(found['train'])!r} has one class only ({classes[0]!r}): there is nothing to learn"
        )
    for split, listed in files.items():
        if listed.classes != classes:
            lacking, unknown = (
                sorted(set(a) - set(b))[:5] for a, b in ((classes, listed.classes), (listed.classes, classes))
            )
            raise DataError(
                f"{str(found[split])!r} has other classes than train/: it lacks {lacking} and has {unknown}, "
                "which train/ lacks (the first five of each)"
            )
    return files


def default_workers(world: int) -> int:
    """Return a process's number of workers: the cores it may use, shared among the machine's processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world)))


class EvalFolder:
    """One folder of class folders to evaluate on: iterate for uint8 (B, 3, S, S), int64 (B,).

    Attributes: classes (names of the sub-folders), count (images over all ranks).
    """

    def __init__(self, source: FolderSource, plan: Plan):
        self.source = source
        self.plan = plan
        self.files = source.splits["val"]
        self.classes = self.files.classes
        self.count = len(self.files)

    def __iter__(self) -> Batches:
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
    """Open a folder of class folders to evaluate on: over all ranks every image once, bad files left out."""
    files = {"val": FileList(Path(path))}
    workers = default_workers(world) if workers is None else workers
    check_shared_memory(workers, batch, transform.size)
    dataset = FolderDataset(files, transform, Augmentation())
    return EvalFolder(
        FolderSource(dataset, workers, torch.device(device), max_bad_files),
        Plan(batch, 1, batch, 0, rank, world),
    )
