"""Small networks and data that several tests measure."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm


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


class FirstOutput(nn.Module):
    """The output of a module that returns a tuple, at the last time."""

    def __init__(self, inner: nn.Module, features: int) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0][:, -1])


class Attention(nn.Module):
    """Keys and values of other sizes than queries, with a learned one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x[..., :4], x[..., :3], x[..., :2], need_weights=False)[0].mean(1))


class Contractions(nn.Module):
    """einsum, products of batches of matrices, and bilinear layers with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.Parameter(torch.randn(4, 2, 3) / 2), nn.Parameter(torch.randn(2, 3, 3) / 2)
        self.experts, self.both = nn.Parameter(torch.randn(2, 3, 3) / 2), nn.Bilinear(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.tanh(torch.einsum("ni,ihd->nhd", x, self.heads))
        z = torch.einsum("nhd,hdc->nc", heads, self.out)
        chosen = torch.bmm(z.expand(2, -1, -1), self.experts).mean(0)
        return self.both(z, torch.tanh(chosen) + (z @ self.experts).sum(0))


class OfParameters(nn.Module):
    """Weights that are computed from parameters: by indices, slices, exp, and in functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.decay = nn.Parameter(torch.randn(7, 2)), nn.Parameter(torch.randn(4))
        self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.randn(()))
        self.tables = nn.Embedding(3, 2)
        self.register_buffer("places", torch.arange(4).view(-1, 1) - torch.arange(4) + 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[self.places].permute(2, 0, 1) + self.tables(torch.arange(2)).mean()
        scores = x.unsqueeze(1).transpose(2, 3) @ x.unsqueeze(1) + bias  # (samples, heads, 4, 4)
        h = scores.softmax(-1).mean((1, 2)) * torch.exp(-self.decay.exp())
        weights = {"weight": self.inner.weight * self.scale, "bias": self.inner.bias[:3].flip(0)}
        return torch.func.functional_call(self.inner, weights, (h,))


def parametrized(parametrize: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(parametrize(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


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
    "GRU": lambda: (FirstOutput(nn.GRU(3, 2, 2, batch_first=True, bidirectional=True), 4), images(4, 3)),
    "RNN": lambda: (FirstOutput(nn.RNN(3, 2, bias=False, batch_first=True), 2), images(4, 3)),
    "RNN with ReLU": lambda: (FirstOutput(nn.RNN(3, 2, nonlinearity="relu", batch_first=True), 2), images(4, 3)),
    "transposed convolutions and instance norm": lambda: (
        flat(
            nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.InstanceNorm2d(4, affine=True),
            nn.Softplus(),
            nn.ConvTranspose2d(4, 2, 2, dilation=2),
            features=72,
        ),
        images(2, 2, 2),
    ),
    "attention with kdim and bias_kv": lambda: (Attention(), images(3, 4)),
    "contractions": lambda: (Contractions(), images(4)),
    "functions of parameters": lambda: (OfParameters(), images(4, 4)),
    "weight norm": lambda: (parametrized(weight_norm), images(4)),
    "weight norm of a convolution": lambda: (
        flat(weight_norm(nn.Conv2d(2, 3, 2)), nn.Tanh(), features=12),
        images(2, 3, 3),
    ),
    "spectral norm": lambda: (parametrized(spectral_norm), images(4)),
    "orthogonal": lambda: (parametrized(orthogonal), images(4)),
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
