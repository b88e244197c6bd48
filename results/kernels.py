"""Profile a pass of NEXcepTion and its peers by kind of kernel: where does the time go?

python -m results.kernels --out results    # a minute of two CPU cores
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from functools import partial

from bench import find_model, markdown_table, precision_of, random_images, run_command, write_results
from model import count_macs, keep_large_buffers
from train import AMP, amp_dtype, option, pick_device, run_script

import torch
from torch.profiler import profile


@dataclass(frozen=True)
class Options:
    """Profile a pass of eager models in evaluation mode, channels last, in turns."""

    models: tuple[str, ...] = option(
        ("nexception_tp", "convnext_tiny", "nexception_t", "xception"), "NAME or NAME@SIZE,..., as of `speed`"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    amp: str = option("auto", "mixed precision; auto: bf16 or fp16 on GPUs, off on CPUs", choices=AMP)
    batch: int = option(16, "images", least=1)
    repetitions: int = option(10, "profiled passes of each model", least=1)
    out: str = option("runs/bench", "folder of the results")


KINDS = {  # part of a PyTorch operator's name -> kind
    "mm": "linear layers",
    "linear": "linear layers",
    "norm": "norms",
    "elu": "activations",
    "pool": "pooling, means",
    "mean": "pooling, means",
    "sigmoid": "squeeze-and-excitation",
    "copy": "copies",
    "mul": "scaling",
    "add": "residual sums",
}


def kind_of(operator: str, shapes: list) -> str:
    """Return the kind of an operator's kernel; shapes: of its arguments."""
    if "conv" in operator and len(shapes[1]) == 4:
        x, (_, fan_in, kernel, _) = shapes[:2]
        if x[-1] == 1:
            return "squeeze-and-excitation"
        if kernel == 1:
            return "convolutions, 1 × 1"
        depthwise = fan_in == 1 and x[1] > 1
        return f"depthwise, {kernel} × {kernel}" if depthwise else "convolutions, stem and skips"
    return next((kind for part, kind in KINDS.items() if part in operator), "other")


def pass_times(network, images: torch.Tensor, amp: torch.dtype | None) -> Counter:
    """Return the milliseconds of each kind of kernel in one pass."""
    device, times = images.device.type, Counter()
    with torch.inference_mode(), torch.autocast(device, amp, enabled=amp is not None):
        network(images)  # refills the caches
        with profile(record_shapes=True) as profiler:
            network(images)
    for event in profiler.key_averages(group_by_input_shape=True):
        spent = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total  # microseconds
        if event.key.startswith("aten::"):
            times[kind_of(event.key, event.input_shapes)] += spent / 1000
    return times


def compare(options: Options) -> None:
    """Profile the models in turns; write a table of medians, a column for each model."""
    device, networks, samples = pick_device(options.device), {}, {}
    amp, heads = amp_dtype(options.amp, device), []
    if device.type == "cpu":
        keep_large_buffers()
    for spec in options.models:
        name, size, make = find_model(spec)
        torch.manual_seed(0)
        network = make().eval()
        heads.append(f"{name}, {count_macs(network, size) / 1e9:.2f} G")
        network.to(device, memory_format=torch.channels_last)
        networks[spec], samples[spec] = (network, random_images(options.batch, size, device), amp), []
    for _ in range(options.repetitions):
        for spec, passed in networks.items():
            samples[spec].append(pass_times(*passed))
    kinds = sorted(set().union(*(sample for times in samples.values() for sample in times)))
    medians = {
        spec: {kind: statistics.median(sample[kind] for sample in times) for kind in kinds}
        for spec, times in samples.items()
    }
    kinds.sort(key=lambda kind: -sum(found[kind] for found in medians.values()))
    cells = [[kind, *(f"{found[kind]:.1f}" for found in medians.values())] for kind in kinds]
    cells.append(["sum", *(f"{sum(found.values()):.0f}" for found in medians.values())])
    text = markdown_table(["ms", *heads], cells)
    print(text)
    name = f"kernels-{device.type}-{precision_of(options.amp, device)}"
    write_results(name, options, device, text, [{"label": spec, **found} for spec, found in medians.items()])


if __name__ == "__main__":
    run_script(partial(run_command, compare, Options, "results.kernels"))
