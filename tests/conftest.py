"""Fixtures and hooks that all tests share."""

from __future__ import annotations

import os

if "OMP_WAIT_POLICY" not in os.environ:  # before PyTorch is loaded; subprocesses inherit it
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch

torch.set_num_threads(2)


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
