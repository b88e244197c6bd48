"""Time depthwise convolutions by shape and kernel, channels last beside contiguous memory, in turns.

python -m results.depthwise --out results    # on a GPU: twenty seconds
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from bench import Row, markdown_table, run_command, stopwatch, take_turns, timing_cells, write_results
from train import option, pick_device, run_script

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Options:
    """Time forward and backward passes of depthwise convolutions in bfloat16."""

    shapes: tuple[str, ...] = option(
        ("288x56", "576x28", "1152x14", "1536x14", "2304x7"),
        "channels x side of maps (default: TP's and T's)",
    )
    kernels: tuple[int, ...] = option((3, 5, 7, 9), "kernel sizes", least=1)
    batch: int = option(64, "images", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    repetitions: int = option(10, "timed turns of each", least=1)
    out: str = option("runs/bench", "folder of the results")


def compare(options: Options) -> None:
    device, rows = pick_device(options.device), []
    torch.backends.cudnn.benchmark = True
    for shape in options.shapes:
        channels, side = map(int, shape.split("x"))
        for kernel in options.kernels:
            label = f"{channels} × {side} × {side}, kernel {kernel}"
            for layout in (torch.contiguous_format, torch.channels_last):
                like = {"device": device, "dtype": torch.bfloat16}
                x = torch.randn(options.batch, channels, side, side, **like)
                x = x.to(memory_format=layout).requires_grad_()
                weight = torch.randn(channels, 1, kernel, kernel, **like, requires_grad=True)

                def passes(x=x, weight=weight, kernel=kernel) -> int:
                    for _ in range(10):
                        y = F.conv2d(x, weight, padding=kernel // 2, groups=len(weight))
                        torch.autograd.grad(y, (x, weight), y.detach())
                    return 10 * len(x)

                last = layout == torch.channels_last
                rows.append(Row(label + ", channels last" * last, passes, base=label * last))
    take_turns(rows, options.repetitions, stopwatch(device))
    header = ["", "maps/s", "median", "× contiguous"]
    text = markdown_table(header, [[row.label, *timing_cells(row)] for row in rows])
    print(text)
    write_results(f"depthwise-{device.type}", options, device, text, rows)


if __name__ == "__main__":
    run_script(partial(run_command, compare, Options, "results.depthwise"))
