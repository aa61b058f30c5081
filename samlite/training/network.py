"""The network of a run: its first weights, and what its config makes of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from samlite import distributed
from samlite.errors import UsageError
from samlite.seeds import generator
from samlite.tasks import Splits, Task
from samlite.training.config import Config
from samlite.training.linearized import Linearized
from samlite.training.sparsity import choose, mask


def initial(task: Task, config: Config, data: Splits, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The network of a run at its first weights, masked and linearised as the config says, beside its data.

    Weights are drawn on the CPU, so that every device starts from the same. Masks are chosen unless they are given.
    """
    network = dense(task, config, data).to(data.train.targets.device)
    if config.sparsity:
        mask(network, _chosen(network, task, config, data) if masks is None else masks)
    return Linearized(network) if config.linearize else network


def dense(task: Task, config: Config, data: Splits) -> nn.Module:
    """The task's network at its first weights, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        try:
            return task.build(config.width, config.dropout, data.sizes)
        except (MemoryError, OverflowError, RuntimeError) as error:
            raise UsageError(f"width must leave a network that fits in memory, got {config.width}") from error


@contextmanager
def random_state(config: Config, epoch: int, device: torch.device) -> Iterator[None]:
    """Dropout and the like draw from a state that seed, epoch and rank decide, so a resumed run needs no other.

    Processes that share out gradients instead of batches must draw alike: both compute the first one of an epoch.
    """
    part = distributed.rank() if config.split == "batches" else 0
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed((config.seed * 1_000_003 + epoch + part * 2**40) % 2**63)
        yield


def _chosen(network: nn.Module, task: Task, config: Config, data: Splits) -> dict[str, Tensor]:
    def loss(model: nn.Module) -> Tensor:
        batches = task.batches(
            model, data.train, config.batch_size, generator("pruning batch", config.seed), config.augment
        )
        inputs, targets = next(batches)
        result: Tensor = task.loss(model.train()(inputs), targets)
        return result

    assert config.pruner is not None
    with random_state(config, 0, data.train.targets.device):
        return choose(deepcopy(network), config.sparsity, config.pruner, loss, config.seed)
