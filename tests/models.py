"""Small networks and data that several tests measure."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def samples(n: int = 20, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 4, generator=generator, dtype=torch.float64),
        torch.randint(0, classes, (n,), generator=generator),
    )


class Residual(nn.Module):
    """Convolutions, batch norm, in-place ReLU and an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.skip = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.Conv2d(4, 4, 1, 2)
        self.head, self.relu = nn.Linear(4, 3), nn.ReLU(inplace=True)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.first(x)))
        out = self.second(h)
        out += self.skip(h)
        return self.head(self.relu(out).mean((2, 3)))


class Transformer(nn.Module):
    """A class token, learned positions, and torch's encoder layer, which is time-first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.positions
        return self.head(self.encoder(h)[:, 0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """Output weights are the embedding's; positions are looked up once for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.inner = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return F.linear(torch.tanh(self.inner(h)), self.words.weight).mean(1)


def images(*shape: int) -> Tensor:
    return torch.randn(6, *shape)


def flat(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "MLP": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), images(4)),
    "CNN with batch norm and residuals": lambda: (Residual(), images(2, 6, 6)),
    "transformer": lambda: (Transformer(), images(4, 3)),
    "LSTM": lambda: (Recurrent(), images(4, 3)),
    "tied weights": lambda: (Tied(), torch.randint(0, 7, (6, 5))),
    "linear over positions": lambda: (flat(nn.Linear(3, 4), nn.Softplus(), features=20), images(5, 3)),
    "conv1d, dilated, padded the same": lambda: (
        flat(nn.Conv1d(2, 3, 3, dilation=2, padding="same"), nn.Softplus(), features=15),
        images(2, 5),
    ),
    "conv2d of one position": lambda: (
        flat(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 1), features=4),
        images(2, 3, 3),
    ),
    "conv3d and group norm": lambda: (
        flat(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.GroupNorm(2, 2), features=16),
        images(2, 3, 3, 3),
    ),
    "layer norm and PReLU": lambda: (
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 3)),
        images(4),
    ),
    "RMS norm": lambda: (nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 3)), images(4)),
    "no bias": lambda: (nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)), images(4)),
}


WHOLE = [
    "MLP",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
        if name in ("CNN with batch norm and residuals", "transformer", "LSTM", "tied weights")
    ),
]


def prepared(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = CASES[name]()
    return model.eval(), x, torch.randint(0, 3, (len(x),))
