"""Complete examples for README's section "Change it"; the tests run all but the first."""

import functools

import blocks
import model

import torch
import torch.nn.functional as F
from torch import nn


class HuggingFaceImages:
    """A split of a data set of Hugging Face's `datasets`."""

    def __init__(self, found):
        self.found, self.labels, self.classes = found, found["label"], found.features["label"].names

    def __len__(self):
        return len(self.found)

    def __getitem__(self, i):
        return self.found[i]["image"]


def flowers():
    """Return a data set, for `--data tests.examples:flowers`."""
    from datasets import load_dataset

    found = load_dataset("nelorth/oxford-flowers")
    return {"train": HuggingFaceImages(found["train"]), "val": HuggingFaceImages(found["validation"])}


class ConvNeXtBlock(nn.Module):
    """A block of the middle flow, for `blocks.BLOCKS`; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, expansion, design, drop_path):
        super().__init__()
        self.conv = blocks.DepthwiseConv2d(channels, 7)
        self.norm = blocks.NORMS[design.norm](channels)
        self.expand = nn.Conv2d(channels, 4 * channels, 1)
        self.act = blocks.ACTIVATIONS[design.activation]()
        self.project = nn.Conv2d(4 * channels, channels, 1)
        self.drop_path = blocks.StochasticDepth(drop_path)

    def forward(self, x):
        return x + self.drop_path(self.project(self.act(self.expand(self.norm(self.conv(x))))))


@functools.cache
def teacher(device):
    return model.load_checkpoint("runs/digits-nexception_nano/best.pt").to(device)


def distillation(logits, targets, images, options):
    """Return the divergence from a teacher's probabilities, for `train.LOSSES`."""
    with torch.no_grad():
        wanted = teacher(images.device)(images).log_softmax(dim=1)
    return F.kl_div(logits.log_softmax(dim=1), wanted, reduction="batchmean", log_target=True)


def muon(network, options):
    """Return Muon for matrices (1 x 1 convolutions too) and AdamW for the rest, for `train.OPTIMIZERS`."""
    wide = [p for p in network.parameters() if p.ndim > 1 and p.shape[2:].numel() == 1]
    matrices = [nn.Parameter(p.detach().flatten(1)) for p in wide]  # the same memory
    first = torch.optim.Muon([{"params": matrices, "scale": 10}], weight_decay=options.weight_decay)

    @first.register_step_pre_hook
    def share_gradients(*_):
        for matrix, p in zip(matrices, wide, strict=True):
            matrix.grad = p.grad.flatten(1)

    return [
        first,
        torch.optim.AdamW(p for p in network.parameters() if p.ndim == 1 or p.shape[2:].numel() > 1),
    ]
