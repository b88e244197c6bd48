"""Fixtures and hooks that all tests share."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; read when blocks.py is imported


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where no CUDA device is to be had."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
