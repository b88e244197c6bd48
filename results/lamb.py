"""Time a step of LAMB beside timm's LAMB and PyTorch's fused AdamW, in turns.

python -m results.lamb --out results    # T's 24.5M parameters on two CPU cores: half a minute
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import Row, markdown_table, run_command, stopwatch, take_turns, timing_cells, write_results
from model import create_model
from train import Lamb, option, parameter_groups, pick_device, run_script

import timm.optim
import torch


@dataclass(frozen=True)
class Options:
    """Time a step of LAMB beside timm's LAMB and PyTorch's fused AdamW, in turns."""

    model: str = option("nexception_t", "one of MODELS or a JSON config, whose parameters are updated")
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    repetitions: int = option(20, "timed turns of each", least=1)
    out: str = option("runs/bench", "folder of the results")


OPTIMIZERS = {
    "LAMB": Lamb,
    "LAMB, timm's": timm.optim.Lamb,
    "AdamW, PyTorch's fused": partial(torch.optim.AdamW, fused=True),
}


def compare(options: Options) -> None:
    """Let each optimizer update a network of its own with the same random gradients."""
    device, rows, networks = pick_device(options.device), [], []
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(0)
        network = create_model(options.model).to(device, memory_format=torch.channels_last)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        step = make(parameter_groups(network, 0.02), lr=2e-3).step
        rows.append(Row(name, lambda step=step: step() or 1, before=step, base="LAMB"))
        networks.append(network)
    take_turns(rows, options.repetitions, stopwatch(device))
    header = ["", "steps/s", "median", "× as fast as LAMB"]
    pairs = zip(networks[0].parameters(), networks[1].parameters(), strict=True)
    apart = max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs if theirs.any())
    text = markdown_table(header, [[row.label, *timing_cells(row)] for row in rows])
    text += f"\nAfter these steps, no tensor differs from timm's by more than {apart:.0e} of its norm.\n"
    print(text)
    name = f"lamb-{Path(options.model).stem}-{device.type}"
    write_results(name, options, device, text, rows, difference_from_timm=apart)


if __name__ == "__main__":
    run_script(partial(run_command, compare, Options, "results.lamb"))
