"""Measures what the paper claims, on the machine at hand: one subcommand a question.

    python bench.py speed      # Table 1's throughput: NEXcepTion and every peer take turns in one run
    python bench.py accuracy CHECKPOINT imagenet=/data/imagenet/val imagenet-a=/data/imagenet-a
    python bench.py figures    # the paper's figures 2 and 3; with measured speed: results/speed-*.json
    python bench.py export CHECKPOINT

`python bench.py COMMAND --help` lists a command's options. What was measured goes to `results/` as JSON
(every sample, versions, hardware, command line) with a Markdown table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import typing
from dataclasses import MISSING, field, fields
from pathlib import Path

import torch

# --------------------------------------------------------------------------------------------------
# Command line, results: shared by all subcommands


class UserError(ValueError):
    """A mistake in what the user asked for: shown as one sentence, exit status 2."""


def option(default, help: str, **argparse_arguments):
    """A dataclass field that becomes `--name` (its help line, choices, metavar ... go to argparse)."""
    return field(default=default, metadata={"help": help, **argparse_arguments})


def argument(help: str, default=MISSING, **argparse_arguments):
    """A dataclass field that becomes a positional argument; one with a default may be left out."""
    return field(default=default, metadata={"help": help, "positional": True, **argparse_arguments})


def comma_separated(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse(options: type, argv: list[str], prog: str):
    """The dataclass `options` filled from a command line; its fields declare every option (see `option`)."""
    parser = argparse.ArgumentParser(prog=prog, description=options.__doc__, allow_abbrev=False)
    types = typing.get_type_hints(options)
    for entry in fields(options):
        settings = dict(entry.metadata)
        positional = settings.pop("positional", False)
        kind = types[entry.name]
        many = typing.get_origin(kind) is tuple
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif many and not positional:
            settings["type"] = comma_separated
        elif not many:
            settings["type"] = kind
        if positional and entry.default is not MISSING:
            settings.setdefault("nargs", "*" if many else "?")
        elif positional and many:
            settings.setdefault("nargs", "+")
        if entry.default is not MISSING:
            settings["default"] = entry.default
            shown = ",".join(entry.default) if many else entry.default
            settings["help"] += f" (default: {shown})" if shown not in ("", 0, None, False) else ""
        parser.add_argument(entry.name if positional else "--" + entry.name.replace("_", "-"), **settings)
    values = vars(parser.parse_args(argv))
    return options(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, flushed to disk, takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: dict) -> None:
    write_whole(path, json.dumps(record, indent=1) + "\n")


def markdown_table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table, its first `left` columns flush left, the others right; padded to read as text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        padded = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def machine(device: torch.device) -> dict:
    """What a timing depends on: processor, accelerator, threads, versions, and the command that was run."""
    record = {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": "python bench.py " + " ".join(sys.argv[1:]),
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
        record["cudnn"] = torch.backends.cudnn.version()
    return record


def processor_name() -> str:
    """The processor's model name, and the vector extensions that decide how fast it multiplies."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    info = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    telling = [
        flag
        for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        if flag in info.get("flags", "").split()
    ]
    return " ".join([info.get("model name", platform.machine()), *telling])


# --------------------------------------------------------------------------------------------------
# data: the input pipeline


# --------------------------------------------------------------------------------------------------
# lamb: the optimizer's step


# --------------------------------------------------------------------------------------------------
# trial: one trial of the search


# --------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[typing.Callable, type]] = {}  # name -> (function of its options, options dataclass)


def main(argv: list[str]) -> int:
    """Run one subcommand; a mistake of the user's is one sentence on stderr and exit status 2."""
    if not argv or argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        if argv and argv[0] in ("-h", "--help"):
            print(f"{__doc__}\ncommands: {known}")
            return 0
        print(f"bench.py: give a command, one of {known}", file=sys.stderr)
        return 2
    command, options = COMMANDS[argv[0]]
    try:
        command(parse(options, argv[1:], prog=f"bench.py {argv[0]}"))
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"bench.py {argv[0]}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
