"""Data loading for training and evaluation: small sets (`SMALL_SETS`), image folders, sources of one's own.

    data = open_data("digits", Plan(batch=64))              # or open_data("/data/imagenet", Plan(...))
    for images, labels in data.train_batches(epoch=0): ...  # uint8 (B, 3, H, W), int64 (B,)
    for images, labels in data.eval_batches("val"): ...
    images = data.transform.normalize(images)               # float32 (B, 3, H, W)

Small sets are uint8 tensors on the training device and are augmented there. All other images are decoded,
cropped and augmented in DataLoader workers. Each micro-batch of each process has a "virtual rank" and samples
the data as a process of that rank would. A training batch depends only on (seed, epoch, virtual rank, step),
not on the number of workers or processes or the step from which an epoch was resumed. Sources are therefore
read by index: streams, such as WebDataset's, cannot be used. `python bench.py data` measures the throughput:
400 to 600 ImageNet-sized training crops per second and core.

This file also holds `lock_file`, `cpu_count` and `import_function`, which other scripts share.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blocks import RunError, UsageError, write_whole  # noqa: F401, for the scripts that import this file

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

log = logging.getLogger("data")
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # uint8 (B, 3, H, W), int64 (B,)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
CROP_DRAWS = 24  # uniform numbers per random crop: 22 for `crop_box`, then the filter and the flip


# ----------------------------------------------------------------------------------------------------------
# Shared by all scripts


def lock_file(file, wait: bool = False) -> bool:
    """Lock an open file until it is closed; return False if another process holds the lock.

    With `wait`, wait for the lock. Where locks are not supported, log a warning and return True.
    """
    import fcntl  # not available on Windows, where the models can still be used

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:  # such as ENOLCK or ENOSYS on Lustre and some NFS mounts
        log.warning("cannot lock files here (%s): do not start two runs in one folder", error.strerror)
    return True


def cpu_count() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_function(spec: str) -> Callable:
    """Return the function called `MODULE:FUNCTION`, also of a module in the current folder.

    Raises UsageError if there is no such module or function; errors inside the module pass through.
    """
    module, _, name = spec.partition(":")
    if not (module and name):
        raise UsageError(f"{spec}: write MODULE:FUNCTION")
    sys.path += [os.getcwd()] if os.getcwd() not in sys.path else []
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"{spec}: there is no module {error.name!r}, here or installed") from None
    if not hasattr(found, name):
        raise UsageError(f"{spec}: module {module} has no {name!r}")
    return getattr(found, name)


# ----------------------------------------------------------------------------------------------------------
# Transforms


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to the device; to a GPU asynchronously, through pinned memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def to_rgb(image: Image.Image, exif: bool = False) -> Image.Image:
    """Convert a PIL image to 8-bit RGB; with `exif`, rotate it as its EXIF orientation says.

    Keeps the upper byte of 16-bit pixels, which PIL would clip to 255, and the stored colour of transparent
    pixels, as PIL does.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("32-bit pixels have no defined range: convert the file to 8 or 16 bits")
    if image.mode[0] == "I":
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # TIFF's BitsPerSample
        pixels = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
        pixels.info, image = image.info, pixels
    rgb = image.convert("RGB")
    with contextlib.suppress(Exception):  # a damaged EXIF block costs the rotation, not the image
        rgb = ImageOps.exif_transpose(rgb) if exif else rgb
    return rgb


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str, pillow=False) -> torch.Tensor:
    """Resize uint8 (3, H, W) to (3, *size) with antialiasing, by Pillow or, within a grey level, by torch."""
    if pillow:
        whole = Image.fromarray(image.permute(1, 2, 0).numpy())
        resized = whole.resize(size[::-1], Image.Resampling[interpolation.upper()])
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    # torch's kernel is twice as fast on dense channels-last memory.
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size, mode=interpolation, antialias=True)[0]


@dataclass(frozen=True)
class EvalTransform:
    """timm's evaluation transform: resize shorter side to floor(size / crop_pct), centre crop, normalize."""

    size: int = 224  # pixels
    crop_pct: float = 0.95  # fraction of the resized shorter side that the crop keeps
    interpolation: str = "bicubic"  # "bicubic" | "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN  # per channel, for values in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    exif: bool = False  # rotate photographs as their EXIF orientation says (timm and torchvision do not)

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists

    def crop(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Return the resized centre crop of a PIL image or uint8 (3, H, W), as uint8 (3, size, size).

        A PIL image is resized by Pillow.
        """
        size, pillow = self.size, isinstance(image, Image.Image)
        if pillow:
            image = torch.from_numpy(np.array(to_rgb(image, self.exif))).permute(2, 0, 1)
        (_, rows, columns), short = image.shape, math.floor(size / self.crop_pct)
        height, width = max(short, int(short * rows / columns)), max(short, int(short * columns / rows))
        top, left = round((height - size) / 2), round((width - size) / 2)
        fit = functools.partial(resize, interpolation=self.interpolation, pillow=pillow)
        if height * width > 2**22:
            # A line of 4000 pixels would grow to 221 megapixels. The same in two passes, as the kernels do:
            # the columns of the crop, then its rows in strips.
            strips = fit(image, (rows, width))[:, :, left : left + size].split(max(1, 2**22 // height), 2)
            return torch.cat([fit(s, (height, s.shape[2]))[:, top : top + size] for s in strips], 2)
        return fit(image, (height, width))[:, top : top + size, left : left + size].contiguous()

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return (images / 255 - mean) / std of uint8 (B, 3, H, W), as float32 on the same device."""
        if images.dtype != torch.uint8:
            raise UsageError(f"data sets and policies give uint8 images, from 0 to 255, not {images.dtype}")
        constants = torch.tensor([self.mean, self.std], dtype=torch.float32) * 255
        mean, std = on_device(constants, images.device).view(2, 3, 1, 1)
        return images.float().sub_(mean).div_(std)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Convert a PIL image to a normalized float32 tensor (3, size, size)."""
        return self.normalize(self.crop(image)[None])[0]


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images. The defaults are the paper's recipe for image folders."""

    scale: tuple[float, float] = (0.08, 1.0)  # folders: fraction of the image's area that a crop takes
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # folders: width / height of a crop, log-uniform
    padding: int = 0  # small sets: zero padding in pixels before a random crop; 0: no crop
    flip: float = 0.5  # probability of a horizontal flip
    policy: str = "rand_augment"  # key of POLICIES
    layers: int = 2  # RandAugment: operations drawn per image
    probability: float = 0.5  # RandAugment: of applying each operation drawn
    magnitude: float = 7.0  # RandAugment: mean magnitude, in [0, 10]
    magnitude_std: float = 0.5  # RandAugment: standard deviation of the magnitude
    repeats: int = 3  # repeated augmentation: copies of an image per epoch; 1: each image once


def crop_box(height: int, width: int, augment: Augmentation, draws: list[float]) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random resized crop: ten attempts, then a centre crop.

    draws: 22 uniform numbers in [0, 1): area and ratio of ten attempts, then the position.
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


def crop_and_flip(images: torch.Tensor, augment: Augmentation, rng: np.random.Generator) -> torch.Tensor:
    """Zero-pad uint8 (B, 3, H, W), crop at random to the original size and flip at random."""
    (count, _, height, width), padding = images.shape, augment.padding
    corners = rng.integers(0, 2 * padding + 1, (count, 2))
    flips = rng.random(count) < augment.flip
    rows = (corners[:, :1] + np.arange(height)) * (width + 2 * padding)
    columns = corners[:, 1:] + np.where(flips[:, None], np.arange(width)[::-1], np.arange(width))
    rows, columns = (on_device(torch.from_numpy(i), images.device) for i in (rows, columns))
    pixels = (rows[:, None, :, None] + columns[:, None, None, :]).flatten(2)  # (B, 1, H * W)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, pixels.expand(-1, 3, -1)).view_as(images)


# ----------------------------------------------------------------------------------------------------------
# RandAugment: timm's 15 "increasing" operations on uint8 batches
#
# Each operation takes uint8 images (N, 3, H, W), one argument per image, a fill colour, uint8 (3, 1, 1), and
# whether to sample bicubically, and returns new uint8 images. Most need neither colour nor filter.
# The arithmetic is Pillow's, including truncation in place of rounding. Bit masks and int16 positions replace
# torch.where, comparisons and direct conversions, which are 5 to 20 times slower on a CPU.

CACHE = 2**17  # bytes of images processed together on a CPU
EPSILON = 1e-3  # added before truncation: float32's 253.99999 becomes 254, as in Pillow's doubles


def per_image(arguments: list[float], images: torch.Tensor, dtype=torch.float32) -> torch.Tensor | float:
    """Return one number per image, shaped to broadcast over `images`; a Python number for a single image,
    because creating a tensor of one number takes as long as a pass over an image.
    """
    if len(arguments) == 1:
        return arguments[0]
    numbers = on_device(torch.tensor(arguments, dtype=dtype), images.device)
    return numbers.view(-1, *[1] * (images.dim() - 1))


def truncate(values: torch.Tensor) -> torch.Tensor:
    """Truncate float32 values to uint8, clamped to [0, 255]. Overwrites its argument."""
    return values.add_(EPSILON).short().clamp_(0, 255).byte()


def select(mask: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return uint8 `first` where the uint8 mask is 255, `second` where it is 0."""
    return (first ^ second) & mask ^ second


def blend(degenerate: torch.Tensor, images: torch.Tensor, factors: list[float]) -> torch.Tensor:
    """Return degenerate + factor * (images - degenerate) as uint8; both images are float32."""
    return truncate(torch.lerp(degenerate, images, per_image(factors, images)))


def auto_contrast(images: torch.Tensor, *_) -> torch.Tensor:
    pixels = images.flatten(2)
    low, high = pixels.amin(2)[..., None, None].float(), pixels.amax(2)[..., None, None].float()
    flat = (low == high).float()  # a channel with a single value stays unchanged
    scale = (1 - flat) * 255 / (high - low + flat) + flat
    return truncate(images.float().sub_(low * (1 - flat)).mul_(scale))


def equalize(images: torch.Tensor, *_) -> torch.Tensor:
    channels, device = images.shape[0] * 3, images.device
    values = torch.arange(256, device=device)
    offsets = torch.arange(channels, dtype=torch.int32, device=device)[:, None] * 256
    cells = (images.reshape(channels, -1) + offsets).flatten()
    counts = torch.bincount(cells, minlength=channels * 256).view(channels, 256)
    last = torch.where(counts > 0, values, 0).amax(1, keepdim=True)
    step = (counts.sum(1, keepdim=True) - counts.gather(1, last)) // 255
    table = (step // 2 + counts.cumsum(1) - counts) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp(max=255), values).byte()  # step 0: too few values, unchanged
    return table.view(-1).index_select(0, cells).view(images.shape)


def invert(images: torch.Tensor, *_) -> torch.Tensor:
    return ~images


def posterize(images: torch.Tensor, bits: list[float], *_) -> torch.Tensor:
    return images & per_image([256 - 2 ** (8 - kept) for kept in bits], images, torch.uint8)


def solarize(images: torch.Tensor, thresholds: list[float], *_) -> torch.Tensor:
    above = images.short() - per_image(thresholds, images, torch.int16)
    return images ^ ~(above >> 15).byte()  # 0 below the threshold, 255 above; x ^ 255 = 255 - x


def solarize_add(images: torch.Tensor, addends: list[float], *_) -> torch.Tensor:
    below = 1 - (images >> 7)  # 1 below 128: at most 127 + 110, no overflow
    return images + below * per_image(addends, images, torch.uint8)


def color(images: torch.Tensor, factors: list[float], *_) -> torch.Tensor:
    exact = images.float()
    red, green, blue = exact.split(1, dim=1)
    luma = (red * 19595 + 32768).add_(green, alpha=38470).add_(blue, alpha=7471).div_(65536).floor_()
    return blend(luma, exact, factors)


def contrast(images: torch.Tensor, factors: list[float], *_) -> torch.Tensor:
    exact = images.float()
    # Pillow rounds each pixel's luma before averaging; the difference averages out.
    luma = (exact.flatten(2).mean(2) * exact.new_tensor([0.299, 0.587, 0.114])).sum(1)
    return blend(torch.floor(luma + 0.5).view(-1, 1, 1, 1), exact, factors)


def brightness(images: torch.Tensor, factors: list[float], *_) -> torch.Tensor:
    return truncate(images.float().mul_(per_image(factors, images)))


def sharpness(images: torch.Tensor, factors: list[float], *_) -> torch.Tensor:
    width = images.shape[3]
    planes = images.flatten(2)  # rows joined; sums across the end of a row are discarded
    wide = planes.short()
    sums = (wide[..., :-2] + wide[..., 1:-1]).add_(wide[..., 2:])
    sums = (sums[..., : -2 * width] + sums[..., width:-width]).add_(sums[..., 2 * width :])
    sums.add_(wide[..., width + 1 : -width - 1], alpha=4)
    smooth = sums.float().mul_(1 / 13).add_(0.5).floor_()
    exact = planes[..., width + 1 : -width - 1].float()
    result = images.clone(memory_format=torch.contiguous_format)
    result.view(planes.shape)[..., width + 1 : -width - 1] = blend(smooth, exact, factors)
    result[..., 0], result[..., -1] = images[..., 0], images[..., -1]  # Pillow's filter skips the border
    return result


def rotate(images: torch.Tensor, degrees: list[float], fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    """Rotate about the centre. torch's bicubic kernel (a = -0.75) is slightly softer than Pillow's."""
    count, _, height, width = images.shape
    angle = np.radians(degrees)[:, None]
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = ((2 * np.arange(side) + 1 - side) / 2 for side in (width, height))
    terms = [cos * x / width, sin * x / height, -sin * y / width, cos * y / height]
    terms = torch.from_numpy(np.concatenate(terms, axis=1, dtype=np.float32) * 2)
    by_column, by_row = on_device(terms, images.device).split([2 * width, 2 * height], dim=1)
    # Sampling positions (x, y) in [-1, 1] are the sum of a term per column and a term per row.
    source = by_column.view(count, 2, 1, width) + by_row.view(count, 2, height, 1)
    mode, grid = "bicubic" if bicubic else "bilinear", source.permute(0, 2, 3, 1)
    rotated = F.grid_sample(images.float(), grid, mode, padding_mode="border", align_corners=False)
    x, y = source.abs_().split(1, dim=1)
    outside = torch.maximum(x, y).clamp_(max=1).short().neg_().byte()  # 255 from 1 on, else 0
    return select(outside, fill, truncate(rotated))


def slide(images: torch.Tensor, offsets: np.ndarray, fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    """Sample row y of image n at x + offsets[n, y]; offsets: pixels, (N, H) or (N, 1).

    One gather fetches each row with its neighbours; the filter's taps are slices of it. Edges are replicated.
    """
    width, device = images.shape[3], images.device
    whole = np.floor(offsets)
    d = offsets - whole
    if bicubic:  # Pillow's cubic filter (a = -1): weights of the pixels -1, 0, 1, 2
        weights = [-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2]
    else:
        weights = [1 - d, d]
    weights = on_device(torch.from_numpy(np.array(weights, dtype=np.float32)), device)
    weights = weights[:, :, None, :, None]  # (taps, N, 1, H, 1)
    columns = torch.arange(width + len(weights) - 1, dtype=torch.int16, device=device)
    first = on_device(torch.from_numpy(whole.astype(np.int16) - np.int16(bicubic)), device)[:, None, :, None]
    source = (columns + first).clamp_(0, width - 1).long()  # (N, 1, H, W + taps - 1)
    taps = images.gather(3, source.expand(len(images), 3, images.shape[2], -1)).float()
    moved = taps[..., :width] * weights[0]
    for tap in range(1, len(weights)):
        moved.addcmul_(taps[..., tap : tap + width], weights[tap])
    nearest = np.floor(offsets + 0.5).astype(np.int16)[..., None] + np.arange(width, dtype=np.int16)
    # As unsigned numbers, negative positions are large. NumPy compares ten times as fast as torch.
    outside = (nearest.view(np.uint16) >= width)[:, None]  # (N, 1, H, W)
    return select(-on_device(torch.from_numpy(outside), device).view(torch.uint8), fill, truncate(moved))


def shear_x(images: torch.Tensor, factors: list[float], fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    return slide(images, np.array(factors)[:, None] * (np.arange(images.shape[2]) + 0.5), fill, bicubic)


def translate_x(images: torch.Tensor, shares: list[float], fill: torch.Tensor, bicubic: bool) -> torch.Tensor:
    return slide(images, np.array(shares)[:, None] * images.shape[3], fill, bicubic)


def transposed(operation: Callable) -> Callable:
    """Return an operation that does in columns what `operation` does in rows."""

    def turned(images: torch.Tensor, *arguments) -> torch.Tensor:
        return operation(images.transpose(2, 3), *arguments).transpose(2, 3)

    return turned


shear_y, translate_y = transposed(shear_x), transposed(translate_x)


def enhancement(magnitude: float, sign: int) -> float:
    return max(0.1, 1 + sign * magnitude / 10 * 0.9)


# Operations and their arguments as functions of magnitude (in [0, 10]) and random sign, on timm's scales.
OPERATIONS = {
    "auto_contrast": (auto_contrast, lambda magnitude, sign: 0),
    "equalize": (equalize, lambda magnitude, sign: 0),
    "invert": (invert, lambda magnitude, sign: 0),
    "rotate": (rotate, lambda magnitude, sign: sign * magnitude / 10 * 30),  # degrees
    "posterize": (posterize, lambda magnitude, sign: max(1, 4 - int(magnitude / 10 * 4))),  # bits kept
    "solarize": (solarize, lambda magnitude, sign: 256 - int(magnitude / 10 * 256)),  # threshold
    "solarize_add": (solarize_add, lambda magnitude, sign: int(magnitude / 10 * 110)),  # added below 128
    "color": (color, enhancement),
    "contrast": (contrast, enhancement),
    "brightness": (brightness, enhancement),
    "sharpness": (sharpness, enhancement),
    "shear_x": (shear_x, lambda magnitude, sign: sign * magnitude / 10 * 0.3),
    "shear_y": (shear_y, lambda magnitude, sign: sign * magnitude / 10 * 0.3),
    "translate_x": (translate_x, lambda magnitude, sign: sign * magnitude / 10 * 0.45),  # of the width
    "translate_y": (translate_y, lambda magnitude, sign: sign * magnitude / 10 * 0.45),  # of the height
}
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")  # use fill colour and filter
# The operations that RandAugment draws from, in the order of its draws: new operations do not change them.
RAND_AUGMENT = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color",
    "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip


class Draws(NamedTuple):
    """Random choices for a batch, each (layers, N)."""

    operation: np.ndarray  # key of OPERATIONS; "": none
    magnitude: np.ndarray  # in [0, 10]
    sign: np.ndarray  # -1 | 1
    bicubic: np.ndarray  # bool


def apply_draws(images: torch.Tensor, draws: Draws, fill: torch.Tensor) -> torch.Tensor:
    """Apply the drawn operations to uint8 (B, 3, H, W) in place and return it.

    Images with the same operation and filter are processed together, on a CPU as many as fit its cache.
    fill: uint8 (3, 1, 1), the colour of areas uncovered by a rotation, shear or translation.
    """
    on_cpu = images.device.type == "cpu"
    at_once = max(1, CACHE // images[0].numel()) if on_cpu else len(images)
    pixels = images.numpy() if on_cpu else images  # NumPy's indexing is eight times as fast
    for operation, magnitude, sign, bicubic in zip(*(choice.tolist() for choice in draws), strict=True):
        groups: dict[tuple[str, bool], list[int]] = {}
        for n, name in enumerate(operation):
            if name:
                groups.setdefault((name, bicubic[n] and name in GEOMETRIC), []).append(n)
        for (name, smooth), group in groups.items():
            apply, argument = OPERATIONS[name]
            for members in (group[start : start + at_once] for start in range(0, len(group), at_once)):
                arguments = [argument(magnitude[n], sign[n]) for n in members]
                where = members if len(members) > 1 else slice(members[0], members[0] + 1)
                pixels[where] = apply(torch.as_tensor(pixels[where]), arguments, fill, smooth)
    return images


def rand_augment(images: torch.Tensor, augment: Augmentation, rng, fill: torch.Tensor) -> torch.Tensor:
    """timm's RandAugment: operations drawn with replacement, each applied with `augment.probability`."""
    shape = (augment.layers, len(images))
    operation = np.array(RAND_AUGMENT)[rng.integers(len(RAND_AUGMENT), size=shape)]
    applied = rng.random(shape) < augment.probability
    magnitude = rng.normal(augment.magnitude, augment.magnitude_std, shape).clip(0, 10)
    sign = rng.integers(2, size=shape) * 2 - 1
    bicubic = rng.random(shape) < 0.5
    return apply_draws(images, Draws(np.where(applied, operation, ""), magnitude, sign, bicubic), fill)


def trivial_augment(images: torch.Tensor, _: Augmentation, rng, fill: torch.Tensor) -> torch.Tensor:
    """TrivialAugment (Müller and Hutter, 2021): one of RandAugment's operations, at a uniform magnitude."""
    shape = (1, len(images))
    operation = np.array(RAND_AUGMENT)[rng.integers(len(RAND_AUGMENT), size=shape)]
    magnitude, sign = rng.uniform(0, 10, shape), rng.integers(2, size=shape) * 2 - 1
    return apply_draws(images, Draws(operation, magnitude, sign, rng.random(shape) < 0.5), fill)


# A new policy is a function and an entry. It gets cropped and flipped images, uint8 (B, 3, H, W), which it
# may change, the Augmentation, the batch's np.random.Generator, from which all its draws must come, and the
# fill colour, uint8 (3, 1, 1). It returns uint8 (B, 3, H, W).
POLICIES = {
    "none": lambda images, augment, rng, fill: images,
    "rand_augment": rand_augment,
    "trivial_augment": trivial_augment,
}


# ----------------------------------------------------------------------------------------------------------
# Sampling


class Job(NamedTuple):
    """Request for a batch: indices of images in a split, and the random key of a training batch."""

    split: str
    indices: np.ndarray  # int64 (B,)
    key: tuple[int, ...] | None  # (seed, epoch, virtual rank, step); None: evaluation


# Last elements of random keys: a batch's mixup (train.py) and augmentation, an epoch of `clutter`. NumPy pads
# keys with zeros, so the permutation's key, (seed, epoch), equals (seed, epoch, 0, 0, 0).
MIXING, AUGMENTATION, COMPOSITION = 1, 2, 4


def train_stream(count: int, repeats: int, seed: int, epoch: int, rank: int, world: int) -> np.ndarray:
    """Return the image indices of virtual rank `rank` of `world` in an epoch, int64.

    With repeats, equals timm's RepeatAugSampler: shuffle (seeded by the epoch alone), repeat each index in
    place, stride over the ranks (so that copies of an image go to different ranks), cut to about an epoch.
    Without, a stride of one permutation seeded by (seed, epoch), with the uneven end dropped.
    """
    if repeats == 1:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        return order[rank : count // world * world : world]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).numpy()
    selected = (count // 256 * 256) // world if count >= 256 else math.ceil(count / world)
    selected = min(selected, math.ceil(count * repeats / world))
    positions = np.arange(selected) * world + rank
    return order[positions % (count * repeats) // repeats]


# ----------------------------------------------------------------------------------------------------------
# Small sets


def digits_by_split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return scikit-learn's digits, float64 (N, 8, 8) in 0..16, and labels in fixed, stratified splits."""
    from sklearn import datasets

    digits, rng = datasets.load_digits(), np.random.default_rng(0)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(digits.target == digit))
        held_out = len(members) * 15 // 100
        for split, part in zip(parts, np.split(members, [-2 * held_out, -held_out]), strict=True):
            parts[split].append(part)
    order = {split: np.sort(np.concatenate(part)) for split, part in parts.items()}
    return {split: (digits.images[i], digits.target[i]) for split, i in order.items()}


def load_digits(size: int, _root: str) -> tuple[dict, tuple[str, ...]]:
    """Load scikit-learn's 8 x 8 digits at (size, size); return fixed, stratified splits, and classes."""
    splits = {}
    for split, (images, labels) in digits_by_split().items():
        images = torch.from_numpy(images * (255 / 16)).round().byte()[:, None].repeat(1, 3, 1, 1)
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        splits[split] = images, torch.from_numpy(labels).long()
    return splits, tuple(str(d) for d in range(10))


CLUTTER = 4  # digits in the background of a picture of `clutter`
CLUTTER_OPACITY = 0.2
CLUTTER_EPOCH = 640  # training pictures per epoch of `clutter`
CLUTTER_HELD_OUT = 2000  # pictures in each of val and test


class Clutter:
    """Pictures of a handwritten digit near the middle, in front of `CLUTTER` translucent ones; 10 classes.

    The digit varies in position and slightly in size, aspect ratio, slant and angle; those behind it are
    anywhere, at any angle. All have random colours. The background is a gradient of two colours with noise.

    digits: (N, 8, 8) in 0..16; labels: (N,); size: side of a picture in pixels; count: pictures per split or
    epoch. Picture i shows the digit i modulo 10.
    """

    def __init__(self, digits: np.ndarray, labels: np.ndarray, size: int, count: int):
        self.size, self.count = size, count
        self.digits = torch.from_numpy(digits[np.argsort(labels, kind="stable")] / 16).float()[:, None]
        self.first = np.searchsorted(np.sort(labels), np.arange(11))  # index of each digit's first image
        noise = np.random.default_rng(0).normal(size=(3, 2 * size, 2 * size))
        self.noise = torch.from_numpy(noise).float()

    def __len__(self) -> int:
        return self.count

    def to(self, device: torch.device) -> Clutter:
        self.digits, self.noise = self.digits.to(device), self.noise.to(device)
        return self

    def compose(self, seed_epoch: tuple[int, int], indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 pictures (B, 3, size, size) and int64 labels (B,), deterministic in the arguments."""
        rng, size = np.random.default_rng((*seed_epoch, 0, 0, COMPOSITION)), self.size
        each, scene = rng.random((self.count, 1 + CLUTTER, 10)), rng.random((self.count, 11))
        each, scene, labels = each[indices], scene[indices], indices % 10
        which, *geometry = np.moveaxis(each[..., :7], -1, 0)  # each (B, digits); the first is in front
        x, y, scale, stretch, angle, slant = (2 * draws - 1 for draws in geometry)
        which = which * len(self.digits)  # clutter: any digit
        low, high = self.first[labels], self.first[labels + 1]
        which[:, 0] = low + each[:, 0, 0] * (high - low)
        for draws, most in ((x, 1 / 6), (y, 1 / 6), (angle, 0.05 / math.pi)):
            draws[:, 0] *= most
        # Half the height and width of a digit in `affine_grid` units, where 1 is half the picture.
        height, width = 0.65 * np.exp((scale - stretch / 2) / 20), 0.65 * np.exp((scale + stretch / 2) / 20)
        cos, sin, slant = np.cos(np.pi * angle), np.sin(np.pi * angle), slant / 20
        rows = [(cos - slant * sin) / width, (sin + slant * cos) / width, -sin / height, cos / height]
        inverse = np.stack(rows, -1).reshape(*x.shape, 2, 2)  # from picture to digit coordinates
        affine = np.concatenate([inverse, -inverse @ np.stack([x, y], -1)[..., None]], -1).astype(np.float32)

        device = self.digits.device
        affine, which, each, scene = (
            on_device(torch.from_numpy(v), device)
            for v in (affine, which.astype(int), each.astype(np.float32), scene.astype(np.float32))
        )
        grid = F.affine_grid(affine.flatten(0, 1), (affine[..., 0, 0].numel(), 1, size, size), False)
        ink = F.grid_sample(self.digits[which.flatten()], grid, align_corners=False)
        ink = (2.5 * ink - 0.75).clamp_(0, 1).unflatten(0, which.shape)  # sharper; (B, digits, 1, size, size)
        colours = each[..., 7:, None, None]
        start, end, direction = scene[:, :3, None, None], scene[:, 3:6, None, None], 2 * scene[:, 6:8] - 1
        ramp = torch.linspace(-0.25, 0.25, size, device=device)
        ramp = direction[:, :1, None] * ramp + direction[:, 1:, None] * ramp[:, None] + 0.5
        pictures = 0.5 * (start + (end - start) * ramp[:, None])  # dark; half of them are inverted below
        for i in range(CLUTTER, 0, -1):
            pictures = pictures + (0.8 * colours[:, i] - pictures) * (CLUTTER_OPACITY * ink[:, i])
        pictures = pictures + (0.5 + 0.5 * colours[:, 0] - pictures) * ink[:, 0]
        pictures = torch.where(scene[:, 8, None, None, None] < 0.5, pictures, 1 - pictures)
        line = torch.arange(size, device=device)
        rows, columns = ((scene[:, i, None] * size).long() + line for i in (9, 10))
        noise = self.noise[:, rows[:, :, None], columns[:, None]].transpose(0, 1)
        pictures = (255 * (pictures + 0.03 * noise)).clamp_(0, 255).byte()
        return pictures, on_device(torch.from_numpy(labels), device)


def load_clutter(size: int, _root: str) -> tuple[dict, tuple[str, ...]]:
    """Return `Clutter` for training, fixed pictures of other digits for val and test, and classes."""
    splits = digits_by_split()
    found: dict = {"train": (Clutter(*splits.pop("train"), size, CLUTTER_EPOCH),)}
    for split, digits in splits.items():
        clutter = Clutter(*digits, size, CLUTTER_HELD_OUT)
        found[split] = clutter.compose((0, 0), np.arange(len(clutter)))
    return found, tuple(str(digit) for digit in range(10))


def load_cifar(name: str, size: int, root: str) -> tuple[dict, tuple[str, ...]]:
    """Load CIFAR at (size, size); return splits, with the last 5,000 training images as val, and classes.

    Missing files are downloaded to `root` by the first process that gets the lock.
    """
    from torchvision import datasets

    make = functools.partial(getattr(datasets, name), root)
    try:
        try:
            train, test = make(train=True), make(train=False)  # needs neither lock nor write permission
        except RuntimeError:
            Path(root).mkdir(parents=True, exist_ok=True)
            with open(Path(root, ".lock"), "w") as file:
                lock_file(file, wait=True)
                train, test = make(train=True, download=True), make(train=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{name.lower()} is not in {root!r} and cannot be downloaded ({error}): put torchvision's files "
            "there, or name their folder with --root"
        ) from error
    found = []
    for part in (train, test):
        images = torch.from_numpy(part.data.transpose(0, 3, 1, 2).copy())
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        found.append((images, torch.tensor(part.targets)))
    (images, labels), tested = found
    splits = {"train": (images[:-5000], labels[:-5000]), "val": (images[-5000:], labels[-5000:])}
    return splits | {"test": tested}, tuple(train.classes)


@dataclass(frozen=True)
class SmallSet:
    """A small data set: loader, channel statistics and default augmentation."""

    # (size, root) -> splits (train, val, perhaps test: uint8 (N, 3, size, size) and labels), class names
    load: Callable[[int, str], tuple[dict, tuple[str, ...]]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int
    flip: float
    size: int = 32  # default input size in pixels


CIFAR10, CIFAR100 = (functools.partial(load_cifar, name) for name in ("CIFAR10", "CIFAR100"))
SMALL_SETS = {  # one line per data set
    "digits": SmallSet(load_digits, (0.306,) * 3, (0.324,) * 3, padding=3, flip=0.0),
    "clutter": SmallSet(load_clutter, (0.5,) * 3, (0.25,) * 3, padding=0, flip=0.0, size=24),
    "cifar10": SmallSet(CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), padding=4, flip=0.5),
    "cifar100": SmallSet(CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), padding=4, flip=0.5),
}


def default_augmentation(source: str | Path | dict) -> Augmentation:
    """Return the default augmentation: crops and flips for small sets, the paper's recipe for all others."""
    if not (isinstance(source, str) and source in SMALL_SETS):
        return Augmentation()
    small = SMALL_SETS[source]
    return Augmentation(padding=small.padding, flip=small.flip, policy="none", repeats=1)


# ----------------------------------------------------------------------------------------------------------
# Image folders and other sources


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that orders `n2` before `n10`, as timm does; ties are ordered by the name itself."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def class_name(folder: str) -> str:
    """Return a folder's name as text that compares and prints everywhere.

    In the Unicode form that keyboards enter (macOS decomposes é), with bytes that are no UTF-8 as \\xe9.
    """
    return unicodedata.normalize("NFC", os.fsencode(folder).decode(errors="backslashreplace"))


def class_folders(folder: str | Path) -> dict[str, str]:
    """Return the names of a folder's sub-folders by class, in natural order. Hidden ones are ignored."""
    found: dict[str, str] = {}
    for name in (entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."):
        if class_name(name) in found:
            raise UsageError(
                f"{str(folder)!r} has two folders {class_name(name)!r} in different Unicode forms"
            )
        found[class_name(name)] = name
    return {label: found[label] for label in sorted(found, key=natural_key)}


def read_classes(source: str) -> list[str]:
    """Read class names in output order: sub-folders in natural order, or the lines of a file."""
    path = Path(source).expanduser()
    if path.is_dir():
        return list(class_folders(path))
    if not path.is_file():
        raise UsageError(f"--classes {source}: neither a folder nor a file")
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    names = [class_name(line.strip()) for line in lines if line.strip()]
    if all(re.match(r"n\d{8}\b", name) for name in names):  # ImageNet's lists: `n01440764 tench, ...`
        names = [name.split()[0] for name in names]
    if len(set(names)) < len(names):
        raise UsageError(f"--classes {source}: a name appears twice")
    return names


class FileList:
    """The images in a folder of class folders, in natural order. Hidden files and folders are ignored.

    classes: names of the classes, some of which may then have no image (default: all class folders).

    The names are one array of bytes, which the workers share. A list of strings would be copied to each
    worker page by page, as reference counts change.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...] | None = None):
        def refuse(error: OSError) -> None:
            raise UsageError(f"cannot list {error.filename!r}: {error.strerror}")

        folders = class_folders(folder)
        if not folders:
            raise UsageError(f"{str(folder)!r} has no class folders: it needs a sub-folder for each class")
        self.classes = classes or tuple(folders)
        if unknown := sorted(folders.keys() - set(self.classes)):
            raise UsageError(f"only {str(folder)!r} has the classes {unknown[:5]}: remove or add them")
        root, found, counts, skipped = os.path.join(folder, ""), [], [], []
        for label in self.classes:
            files, seen, top = [], {os.path.realpath(folder)}, root + folders.get(label, "")
            for place, inner, names in os.walk(top, followlinks=True, onerror=refuse) if top != root else ():
                if (real := os.path.realpath(place)) in seen:
                    raise UsageError(f"{place!r} leads to {real!r} again: remove this link")
                seen.add(real)
                place = place.removeprefix(root)
                inner[:] = [name for name in inner if name[0] != "."]
                for name in (name for name in names if name[0] != "."):
                    listed = files if name.lower().endswith(EXTENSIONS) else skipped
                    listed.append(f"{place}/{name}")
            found += map(os.fsencode, sorted(files, key=natural_key))
            counts.append(len(files))
        empty = [label for label, count in zip(self.classes, counts, strict=True) if not count]
        if empty and (classes is None or not found):
            kinds = ", ".join(EXTENSIONS)
            raise UsageError(f"class folder {root + empty[0]!r} has no image ({kinds}): fill or remove it")
        if empty:
            log.warning("%s has no images of %d classes, such as %s", folder, len(empty), empty[0])
        if skipped:
            log.warning("skipped %d non-image files in %s, such as %s", len(skipped), folder, skipped[0])
        self.folder, self.names = os.fsencode(folder), np.array(found)
        self.labels = np.repeat(np.arange(len(counts)), counts)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> bytes:
        """Return the content of file `index`."""
        return Path(self.path(index)).read_bytes()

    def path(self, index: int) -> str:
        """Return the path of image `index`."""
        return os.fsdecode(os.path.join(self.folder, self.names[index]))


def list_images(path: str | Path, train: bool = True) -> dict[str, FileList]:
    """Return the images of a folder by split: "train", "val" and, if there is test/ beside val/, "test".

    "val" is the first of val/, validation/ and test/ that exists. With train=False, "train" is left out, and
    `path` may be a folder of class folders, which is then "val". Raises UsageError.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {str(folder)!r}; the built-in sets are {', '.join(SMALL_SETS)}")
    held_out = [folder / name for name in ("val", "validation", "test") if (folder / name).is_dir()]
    places = {"train": folder / "train"} if train else {}
    places["val"] = held_out[0] if held_out else folder
    if len(held_out) > 1 and held_out[-1].name == "test":  # ImageNet's has no classes
        places |= {"test": held_out[-1]} if class_folders(held_out[-1]) else {}
    if train and not (held_out and places["train"].is_dir()):
        raise UsageError(
            f"{str(folder)!r} needs train/ and one of val/, validation/ and test/, each with a "
            "sub-folder for each class"
        )
    files, classes = {}, None
    for split, place in places.items():
        files[split] = FileList(place, classes)
        classes = files[split].classes
    return files


def find_images(source: str | Path | dict, train: bool = True, share=lambda find: find()) -> dict:
    """Return the images of a source (see `open_data`; no small set) by split: "train", "val", perhaps "test".

    share: called with a function, returns its result; `Process.from_first` lets the first process alone list
    a folder. Raises UsageError.
    """
    if isinstance(source, dict):
        splits = source
    elif re.fullmatch(r"[\w.]+:\w+", str(source)):
        splits = import_function(str(source))()
    else:
        splits = share(lambda: list_images(source, train))
    wanted = ["train", "val"] if train else ["val"]
    if not set(wanted) <= set(splits) <= {"train", "val", "test"}:
        raise UsageError(f"a source has the splits train, val and perhaps test, not {', '.join(splits)}")
    splits = {split: splits[split] for split in (*wanted, "test") if split in splits}
    for split, images in splits.items():
        if missing := [n for n in ("__len__", "__getitem__", "labels", "classes") if not hasattr(images, n)]:
            raise UsageError(f"the images of {split} have no {', '.join(missing)}: see `open_data`")
        labels, classes = np.asarray(images.labels), tuple(splits["val"].classes)
        if tuple(images.classes) != classes:
            raise UsageError(f"{split} has other classes than val, or in another order")
        if train and len(classes) < 2:
            raise UsageError(f"only one class, {classes[0]!r}: are the class folders one level further down?")
        if not labels.shape == (len(images),) != (0,) or not np.isin(labels, np.arange(len(classes))).all():
            last = len(classes) - 1
            raise UsageError(f"the {len(images)} images of {split} need a label each, from 0 to {last}")
        first = b"" if isinstance(images, FileList) else images[0]
        kind, shape = getattr(first, "dtype", type(first).__name__), tuple(getattr(first, "shape", ()))
        if not (isinstance(first, (bytes, Image.Image)) or (kind, *shape[:-2]) == (torch.uint8, 3)):
            raise UsageError(
                f"images of {split} must be PIL images, uint8 tensors (3, height, width) or the bytes of "
                f"image files, not {kind} {shape or ''}"
            )
    return splits


def decode(image: bytes | Image.Image | torch.Tensor, exif: bool = False) -> torch.Tensor:
    """Return an image as uint8 (3, H, W), identical to Pillow. Raises OSError if it cannot be read.

    image: the content of a file, a PIL image, or a tensor, which is returned as it is. With `exif`, rotate it
    as its EXIF orientation says. JPEG files are decoded by torchvision, in two thirds of Pillow's time; other
    formats and truncated files by Pillow.
    """
    if isinstance(image, torch.Tensor):
        return image
    if not isinstance(image, Image.Image) and image[:3] == b"\xff\xd8\xff":
        from torchvision.io import ImageReadMode  # imported here because it takes a second

        with contextlib.suppress(RuntimeError):
            # Not torchvision's wrapper, which warns on every call since 0.29.
            content = torch.frombuffer(bytearray(image), dtype=torch.uint8)
            return torch.ops.image.decode_jpeg(content, ImageReadMode.RGB.value, exif)
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image))
        return torch.from_numpy(np.array(to_rgb(opened, exif))).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise almost any type for broken files
        raise OSError(f"{type(error).__name__}: {error}") from error


class ImageDataset(Dataset):
    """Makes the batches of a source: of a small set on the device, of all others in DataLoader workers.

    RandAugment runs in the workers, too: it is a fifth of the work per batch (`python bench.py data`), and on
    the device it would be some 300 small kernels per batch that delay the model's.

    splits: name -> map-style object (see `open_data`); of a small set (images, labels), or (Clutter,), which
    composes new images in each epoch.
    """

    def __init__(self, splits: dict, transform: EvalTransform, augment: Augmentation, device: torch.device):
        self.splits, self.transform, self.augment = splits, transform, augment
        self.counts = {split: len(s[-1] if isinstance(s, tuple) else s) for split, s in splits.items()}
        own = {split: source for split, source in splits.items() if not isinstance(source, tuple)}
        self.labels = {split: np.asarray(source.labels, np.int64) for split, source in own.items()}
        mean = [min(255, round(255 * value)) for value in transform.mean]
        self.fill = torch.tensor(mean, dtype=torch.uint8, device=device).view(3, 1, 1)  # the mean colour

    def __getitem__(self, job: Job) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, str]]]:
        """Return images uint8 (B, 3, S, S), labels int64 (B,) and the (path, reason) of unreadable images.

        Evaluation skips unreadable images; training replaces them by the next readable of the 20 that follow.
        """
        small = isinstance(self.splits[job.split], tuple)
        rng = None if job.key is None else np.random.default_rng((*job.key, AUGMENTATION))
        with torch.inference_mode(not small):  # 2% faster
            images, labels, bad = (self.stored if small else self.decoded)(job, rng)
            if rng is not None:
                images = POLICIES[self.augment.policy](images, self.augment, rng, self.fill)
        return images, torch.as_tensor(labels), bad

    def stored(self, job: Job, rng: np.random.Generator | None) -> tuple[torch.Tensor, torch.Tensor, list]:
        parts = self.splits[job.split]
        if isinstance(parts[0], Clutter):
            images, labels = parts[0].compose(job.key[:2], job.indices)
        else:
            indices = on_device(torch.from_numpy(job.indices), parts[0].device)
            images, labels = (part.index_select(0, indices) for part in parts)
        return images if rng is None else crop_and_flip(images, self.augment, rng), labels, []

    def decoded(self, job: Job, rng: np.random.Generator | None) -> tuple[torch.Tensor, np.ndarray, list]:
        source, size = self.splits[job.split], self.transform.size
        images = torch.empty(len(job.indices), 3, size, size, dtype=torch.uint8)
        draws = None if rng is None else rng.random((len(images), CROP_DRAWS)).tolist()
        taken, bad = [], []
        for n, first in enumerate(job.indices.tolist()):
            for index in range(first, first + (21 if draws else 1)):  # until one is readable
                index %= len(source)
                try:
                    image = decode(source[index], self.transform.exif)
                except OSError as error:
                    path = source.path(index) if isinstance(source, FileList) else f"{job.split}[{index}]"
                    bad.append((path, str(error)))
                    continue
                crop = self.random_crop(image, draws[n]) if draws else self.transform.crop(image)
                images[len(taken)] = crop
                taken.append(index)
                break
        return images[: len(taken)], self.labels[job.split][np.array(taken, np.int64)], bad

    def random_crop(self, image: torch.Tensor, draws: list[float]) -> torch.Tensor:
        """Return the randomly resized, cropped and flipped image (3, H, W) as uint8 (3, S, S)."""
        top, left, height, width = crop_box(*image.shape[1:], self.augment, draws)
        image, size = image[:, top : top + height, left : left + width], self.transform.size
        image = resize(image, (size, size), "bicubic" if draws[22] < 0.5 else "bilinear")
        return image.flip(-1) if draws[23] < self.augment.flip else image


def stop_workers(loader: DataLoader) -> None:
    """Stop a loader's workers; kill those that do not exit, since they block SIGTERM."""
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None:
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()


# ----------------------------------------------------------------------------------------------------------
# Interface


@dataclass(frozen=True)
class Plan:
    """Sharding: an optimizer step takes `batch` images of each of `world * accumulate` virtual ranks."""

    batch: int = 64  # images per micro-batch
    accumulate: int = 1  # micro-batches of each process per optimizer step
    seed: int = 0
    rank: int = 0
    world: int = 1  # processes


class Data:
    """An open data source, returned by `open_data`.

    Attributes: classes (tuple of str); splits (such as ("train", "val", "test")); transform
    (EvalTransform); plan (Plan); steps (optimizer steps per epoch; 0 without a train split); wait_seconds
    (total time spent waiting for batches); bad_files (path -> reason, for the unreadable files seen so far).
    """

    def __init__(self, dataset, classes: tuple[str, ...], plan: Plan, device, max_bad_files=0.0):
        self.dataset, self.classes, self.plan = dataset, tuple(classes), plan
        self.transform, self.device, self.splits = dataset.transform, device, tuple(dataset.counts)
        self.max_bad_files, self.bad_files = max_bad_files * sum(dataset.counts.values()), {}
        self.wait_seconds, self.iteration = 0.0, 0
        self.jobs: list[Job] = []  # iterated over by the loader; refilled without restarting the workers
        self.loader: DataLoader | None = None  # unless the set is small
        training = "train" in self.splits
        self.steps = len(self._stream(0, plan.rank)) // plan.batch if training else 0
        if training and not self.steps:
            raise UsageError(
                f"{self.count('train')} training images are too few for one step of {plan.world} x "
                f"{plan.batch} x {plan.accumulate} (processes x batch x accumulation): lower the batch"
            )

    def count(self, split: str) -> int:
        """Return the number of images in a split, across all ranks."""
        if split not in self.splits:
            raise UsageError(f"there is no split {split!r}, only {', '.join(self.splits)}")
        return self.dataset.counts[split]

    def train_batches(self, epoch: int, first_step: int = 0) -> Batches:
        """Yield the augmented micro-batches of an epoch, uint8 (B, 3, H, W) and int64 (B,), on the device.

        `accumulate` of them make an optimizer step; micro-batch k of process r has virtual rank
        r + world * k. Starting at `first_step` yields the same batches as a complete epoch from that step on.
        Unreadable files are replaced by other training images.
        """
        plan, jobs = self.plan, []
        ranks = [plan.rank + plan.world * k for k in range(plan.accumulate)]
        streams = {rank: self._stream(epoch, rank) for rank in ranks}
        for step in range(first_step, self.steps):
            for rank in ranks:
                indices = streams[rank][step * plan.batch : (step + 1) * plan.batch]
                jobs.append(Job("train", indices, (plan.seed, epoch, rank, step)))
        yield from self._batches(jobs)

    def eval_batches(self, split: str = "val") -> Batches:
        """Yield this rank's share of a split, uint8 (B, 3, H, W) and int64 (B,), without duplicates.

        Batches may be short, and their number may differ between ranks. Unreadable files are skipped.
        """
        # Without gradients, larger batches of a small set fit, and are faster on a CPU.
        batch = self.plan.batch * (4 if self.loader is None else 1)
        indices = np.arange(self.plan.rank, self.count(split), self.plan.world)
        starts = range(0, len(indices), batch)
        yield from self._batches([Job(split, indices[start : start + batch], None) for start in starts])

    def close(self) -> None:
        """Stop the workers."""
        if self.loader is not None:
            stop_workers(self.loader)

    def _stream(self, epoch: int, virtual_rank: int) -> np.ndarray:
        plan, repeats = self.plan, self.dataset.augment.repeats
        ranks = plan.world * plan.accumulate
        return train_stream(self.count("train"), repeats, plan.seed, epoch, virtual_rank, ranks)

    def _batches(self, jobs: list[Job]) -> Batches:
        """Yield the batches of `jobs` on the device, log unreadable files and raise if there are too many."""
        self.iteration += 1
        current = self.iteration
        if self.loader is None:
            made = (self.dataset[job] for job in jobs)
        else:
            self.jobs[:] = jobs
            # These signals often reach all processes of a job. Workers inherit this mask and leave them to
            # their parent, which stops them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
            try:
                made = iter(self.loader)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        started = time.perf_counter()
        for images, labels, bad in made:
            for path, reason in bad:
                if path not in self.bad_files:
                    log.warning("cannot read %s (%s)", path, reason)
                    self.bad_files[path] = reason
            if len(self.bad_files) > self.max_bad_files:
                names = ", ".join(list(self.bad_files)[:5])
                raise UsageError(f"{len(self.bad_files)} images cannot be read, too many to go on: {names}")
            images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
            self.wait_seconds += time.perf_counter() - started
            yield images, labels
            if self.loader is not None and current != self.iteration:
                what = "another iteration, such as an evaluation, has taken over the workers of this one"
                raise RuntimeError(f"{what}: finish one before the next, or call open_data twice")
            started = time.perf_counter()


def open_data(
    source: str | Path | dict,
    plan: Plan = Plan(),
    *,
    train: bool = True,
    size: int | None = None,
    exif: bool = False,
    transform: EvalTransform | None = None,
    augment: Augmentation | None = None,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    root: str = "data",
    max_bad_files: float = 0.01,
) -> Data:
    """Open a small set, an image folder or a source of one's own for training and evaluation.

    Args:
        source: name of a small set (see SMALL_SETS); path of an image folder (see `list_images`);
            "MODULE:FUNCTION", a function that returns the splits of a source; or those splits, a dictionary
            from "train", "val" and, if there is one, "test" to map-style objects: `len(images)`,
            `images.classes` (names), `images.labels` (integers, one per image), and `images[i]`, a PIL
            image, a uint8 tensor (3, H, W) or the bytes of an image file. An OSError means that image i
            cannot be read. `FileList` is one such class.
        plan: batch sizes, seed, and rank of this process.
        train: whether to open the train split.
        size: image size in pixels (default: the transform's, the small set's, or 224 for others).
        exif: rotate images as their EXIF orientation says, if no transform is given.
        transform: evaluation transform, such as a checkpoint's (default: the source's).
        augment: augmentation (default: `default_augmentation(source)`).
        workers: data-loading processes (default: one per core, split between processes; 0: none).
        root: folder of the CIFAR files.
        max_bad_files: fraction of unreadable images to tolerate.

    Raises UsageError.
    """
    device, augment = torch.device(device), augment or default_augmentation(source)
    if augment.policy not in POLICIES:
        raise UsageError(f"there is no policy {augment.policy!r}: choose from {', '.join(POLICIES)}")
    if isinstance(source, str) and source in SMALL_SETS:
        if os.path.isdir(source) and plan.rank == 0:
            log.warning("%s is the built-in set: for the folder of that name, give ./%s", source, source)
        small = SMALL_SETS[source]
        transform = transform or EvalTransform(size or small.size, 1.0, "bilinear", small.mean, small.std)
        splits, classes = small.load(transform.size, root)
        wanted = [split for split in splits if train or split != "train"]
        splits = {split: tuple(part.to(device) for part in splits[split]) for split in wanted}
        return Data(ImageDataset(splits, transform, augment, device), classes, plan, device)
    transform = transform or EvalTransform(size or 224, exif=exif)
    splits = find_images(source, train)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", plan.world))  # on this machine, set by torchrun
    workers = max(1, cpu_count() // processes) if workers is None else workers
    total = processes * workers
    needed = total * 3 * plan.batch * 3 * transform.size**2  # per worker, 2 batches ready and 1 in progress
    if workers and os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < needed:
        raise UsageError(
            f"{total} workers need {needed / 2**20:.0f} MiB in /dev/shm, more than is free: use fewer "
            "(--workers of train.py and bench.py), or start the container with a larger --shm-size"
        )
    dataset = ImageDataset(splits, transform, augment, torch.device("cpu"))
    data = Data(dataset, splits["val"].classes, plan, device, max_bad_files)
    import torchvision.io  # noqa: F401, once for all workers

    data.loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=data.jobs,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # fork: no imports
    )
    weakref.finalize(data, stop_workers, data.loader)  # runs at exit at the latest
    return data
