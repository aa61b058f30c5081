"""A bidirectional LSTM that classifies sequences (Hochreiter, Schmidhuber 1997; Graves, Schmidhuber 2005)."""

import torch
from torch import Tensor, nn

SCALE = 0.3  # standard deviation of the first embeddings


class SequenceClassifier(nn.Module):
    """Word numbers (n, T), 0 behind a sequence's end, to scores (n, outputs), whatever the padding.

    The backward direction reads each sequence from its own end, so it is an LSTM of its own on reversed sequences, not
    the one of `nn.LSTM(bidirectional=True)`, which would start in the padding. Each feature of the states is
    summed up by its maximum over the sequence.
    """

    def __init__(self, width: int, words: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.onward = nn.LSTM(width, width, batch_first=True)
        self.against = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, outputs)
        nn.init.normal_(self.embedding.weight, std=SCALE)
        with torch.no_grad():
            self.embedding.weight[0].zero_()

    def forward(self, words: Tensor) -> Tensor:
        present = words > 0
        onward, _ = self.onward(self.dropout(self.embedding(words)))
        back, _ = self.against(self.dropout(self.embedding(reversed_within(words, present.sum(1)))))
        states = torch.cat([onward, back], -1).masked_fill(~present[..., None], -torch.inf)
        scores: Tensor = self.head(self.dropout(states.amax(1)))
        return scores


def reversed_within(words: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence (n, T) back to front, its padding left behind its end."""
    places = torch.arange(words.shape[1], device=words.device)
    return words.gather(1, (lengths[:, None] - 1 - places) % words.shape[1])


def lstm(width: int, words: int, outputs: int, dropout: float = 0.0) -> SequenceClassifier:
    """The bidirectional LSTM with `width` numbers a word and in each direction's state."""
    return SequenceClassifier(width, words, outputs, dropout)
