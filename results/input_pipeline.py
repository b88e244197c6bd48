"""Time the input pipeline beside timm's on the same files, in turns, by CPU time of one core.

python -m results.input_pipeline --out results    # on made pictures: two minutes
python -m results.input_pipeline FOLDER           # on the files of an image folder
"""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bench
from data import cpu_count
from model import keep_large_buffers
from train import option, run_script

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.loader import fast_collate


@dataclass(frozen=True)
class Options:
    """Time the input pipeline beside timm's on the same files."""

    path: str = option("", "image folder, with or without train/ (default: made pictures)", positional=True)
    repetitions: int = option(20, "timed turns of each", least=1)
    out: str = option("runs/bench", "folder of the results")


# timm's arguments for the paper's training recipe and for evaluation, as our defaults.
TIMM = {
    "training": {
        "is_training": True,
        "auto_augment": "rand-m7-mstd0.5-inc1",
        "interpolation": "random",
    },
    "evaluation": {"interpolation": "bicubic", "crop_pct": 0.95},
}


def make_pictures(folder: Path, count: int = 400) -> None:
    """Write JPEG files that are to a decoder what photographs are: the most common sizes of ImageNet, random
    waves whose amplitude falls with frequency as in nature, some 90 KB."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = ((375, 500), (500, 375), (333, 500))[i % 3]
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = np.inf
        waves = rng.normal(size=(2, 3, *frequency.shape)) / frequency**1.2
        waves = waves[0] + 1j * waves[1]
        pixels = np.fft.irfft2(waves[:1] + 0.35 * waves, (height, width))  # colours are alike
        pixels = (128 + 55 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)
        path = folder / f"class {i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path, quality=90)


def compare(options: Options) -> None:
    """Compare both pipelines on the folder given, or on made pictures."""
    with tempfile.TemporaryDirectory() as folder:
        if not options.path:
            make_pictures(Path(folder))
        time_both(options, options.path or folder)


def time_both(options: Options, path: str) -> None:
    """Let both pipelines make batches of the same files with the same recipe."""
    keep_large_buffers()  # as training on a CPU does
    torch.set_num_threads(1)
    data, scored = bench.open_pipeline(path), bench.open_pipeline(path)
    batches = {"training": data.train_batches, "evaluation": lambda _: scored.eval_batches()}
    files, rng = data.dataset.splits["train"], np.random.default_rng(0)
    rows = []
    for use, arguments in TIMM.items():
        transform = create_transform((3, 224, 224), use_prefetcher=True, **arguments)
        theirs = create_dataset("", root=os.fsdecode(files.folder), transform=transform)
        if len(theirs) != len(files):
            raise bench.UsageError(f"{path}: timm finds {len(theirs)} images, we {len(files)}")

        def collate(theirs=theirs) -> int:
            drawn = rng.permutation(len(theirs))[: data.plan.batch].tolist()
            return len(fast_collate([theirs[n] for n in drawn])[0])

        rows.append(bench.Row(use, bench.take_from(batches[use]), base=f"{use}, timm"))
        rows.append(bench.Row(f"{use}, timm", collate))
    bench.take_turns(rows, options.repetitions, bench.stopwatch(None))
    header = ["", "images per CPU second", "median", "× timm"]
    text = bench.markdown_table(header, [[row.label, *bench.timing_cells(row)] for row in rows])
    size = statistics.fmean(os.path.getsize(files.path(n)) for n in range(min(2000, len(files))))
    text += f"\n{len(files):,} files of {size / 1024:.0f} KB on average.\n"
    print(text)
    name = f"input-pipeline-{cpu_count()}-core"
    bench.write_results(name, options, torch.device("cpu"), text, rows, mean_file_bytes=size)


if __name__ == "__main__":
    run_script(partial(bench.run_command, compare, Options, "results.input_pipeline"))
