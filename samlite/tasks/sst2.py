"""SST-2 (Socher et al. 2013, as in GLUE): whether a phrase from a film review is positive."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from samlite.models import lstm
from samlite.tasks.sequences import Sequences, padded
from samlite.tasks.task import Accuracy, Recipe, Splits, Task, hold_out

LABELS = ("negative", "positive")
WORDS = 15_000  # rows of the table at most: padding, the unknown word, and the most frequent words, of 14,816


def load(source: str | None, seed: int) -> Splits:
    """Phrases as numbers of words (n, T), labelled 0 or 1; the same splits for every seed."""
    import datasets
    splits = datasets.load_dataset(source)
    train, test = splits["train"], splits["validation"]
    kept, held = hold_out(torch.arange(len(train)))
    phrases = [s.split() for s in train["sentence"][:]]
    labels = torch.tensor(train["label"][:])
    table = vocabulary([phrases[i] for i in kept])
    whole = encode(phrases, labels, table)
    t = encode([s.split() for s in test["sentence"][:]], torch.tensor(test["label"][:]), table)
    return Splits(whole[kept], whole[held], t, sizes={"words": len(table) + 2})


def vocabulary(phrases: Sequence[Sequence[str]]) -> dict[str, int]:
    counts = Counter(word for phrase in phrases for word in phrase)
    return {word: row for row, (word, _) in enumerate(counts.most_common(WORDS - 2), 2)}


def encode(phrases: Sequence[Sequence[str]], labels: Tensor, table: Mapping[str, int]) -> Sequences:
    rows = [torch.tensor([table.get(word, 1) for word in phrase]) for phrase in phrases]
    return Sequences(padded(rows), labels)


TASK = Task(
    name="sst2",
    summary="the sentiment of phrases",
    network="bidirectional LSTM of w over word embeddings of w",
    data="SST-2",
    model=partial(lstm, words=WORDS, outputs=2),
    load=load,
    loss=nn.CrossEntropyLoss(),
    metric="accuracy",
    meter=Accuracy,
    classes=2,
    recipe=Recipe(lr={"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3}, batch_size=64, epochs=10, dropout=0.3, schedule="cosine"),
    width=64,
    widths=(32, 64, 128, 256, 600),
    source="stanfordnlp/sst2",
    chunk=512,
)
