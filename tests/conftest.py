"""Fixtures and hooks that all tests share."""

from __future__ import annotations

import os

import blocks  # noqa: F401, ahead of PyTorch: it sets how long OpenMP threads spin

import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
