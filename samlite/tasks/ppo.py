"""Proximal policy optimisation: its objective (Schulman et al. 2017, arXiv 1707.06347) and its advantages."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClippedObjective(nn.Module):
    """The objective of PPO, to be minimised.

    Criterion of outputs (n, actions + 1), logits and value, and targets (n, 4): the action, its log-probability when it
    was taken, its advantage and its return. The mean over samples of

        -min(r A, clip(r, 1 - c, 1 + c) A) + w (value - return)^2 - h entropy,   r = probability / probability then.
    """

    def __init__(self, clip: float, value: float, entropy: float) -> None:
        super().__init__()
        self.clip, self.value, self.entropy = clip, value, entropy

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, values = outputs[:, :-1], outputs[:, -1]
        actions, before, advantages, returns = targets.unbind(1)
        logs = logits.log_softmax(1)
        # what looks for the samples in a batch, before moments, scales numbers: an action too high is the last one
        chosen = actions.long().clamp(max=logits.shape[1] - 1)
        ratios = (logs.gather(1, chosen[:, None])[:, 0] - before).exp()
        clipped = ratios.clamp(1 - self.clip, 1 + self.clip)
        gains = torch.minimum(ratios * advantages, clipped * advantages)
        entropies = -(logs.exp() * logs).sum(1)
        return (-gains + self.value * (values - returns) ** 2 - self.entropy * entropies).mean()

    def denominator(self, targets: Tensor) -> int:
        return len(targets)


def advantages(rewards: Tensor, values: Tensor, final: Tensor, cut: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Generalised advantages (steps, n): sums of (gamma lambda)^k times the errors of the values k steps ahead.

    Args:
        rewards: (steps, n).
        values: (steps + 1, n) of the observations before each step, and after the last.
        final: (steps, n), whether nothing follows the step, so that its successor has no value.
        cut: (steps, n), whether the next row is not its sequel: where it is final, and where an episode was truncated.
    """
    errors = rewards + gamma * values[1:] * ~final - values[:-1]
    result = torch.empty_like(rewards)
    ahead = torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        ahead = errors[step] + gamma * lambda_ * ahead * ~cut[step]
        result[step] = ahead
    return result
