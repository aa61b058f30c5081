"""Symmetric label noise: a fraction of the labels moves to another class, each other class as likely."""

import torch
from torch import Tensor

from samlite.seeds import generator


def noisy(labels: Tensor, classes: int, rate: float, seed: int) -> Tensor:
    """The labels with exactly round(rate n) of the n valid ones moved, none to its own class.

    Args:
        labels: class numbers of any shape, on the CPU; negative or nan where there is none, which stays as it is.
        classes: how many there are.
        rate: fraction of the valid labels.
        seed: decides which, and where to.
    """
    draw = generator("label noise", seed)
    flat = labels.flatten().clone()
    valid = (flat >= 0).nonzero().flatten()
    chosen = valid[torch.randperm(len(valid), generator=draw)[: round(rate * len(valid))]]
    steps = torch.randint(1, classes, (len(chosen),), generator=draw).to(flat.dtype)
    flat[chosen] = (flat[chosen] + steps) % classes
    return flat.reshape(labels.shape)
