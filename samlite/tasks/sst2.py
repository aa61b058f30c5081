"""SST-2 (Socher et al. 2013, as in GLUE): whether a sentence from a film review, or a phrase of it, is positive."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from samlite.data.hub import open_splits
from samlite.data.sequences import LONGEST, Sequences, hide, pad
from samlite.data.tensors import Splits
from samlite.errors import UsageError
from samlite.models import lstm
from samlite.tasks.metrics import Accuracy
from samlite.tasks.task import Recipe, Task

WORDS = 15_000  # rows of the table at most: padding, the unknown word and the most frequent ones; the data have 14,816
HIDDEN = 0.1  # of a training batch's words are unknown, as 7 % of those of the test data are
HELD_OUT = 0.1  # of the training sentences, with their phrases

Phrases = list[tuple[list[str], int]]  # words, each list with its label


def load(source: str | None, seed: int) -> Splits:
    """Phrases as numbers of words (n, T), labelled 0 or 1; the same splits for every seed.

    source is a hub id or a folder that `datasets.load_dataset` reads, with the columns sentence and label in the splits
    train and validation. The labels of GLUE's test split are not public, so its validation split is the test data here,
    and a part of train that shares no sentence with the rest is the validation data. Raises UsageError that names the
    column and row of bad data.
    """
    train_rows, test_rows = open_splits(source, "sst2", "text", ("train", "validation"), ("sentence", "label"))
    train, validation = by_sentence(_phrases(train_rows, f"{source}, split 'train'"))
    test = _phrases(test_rows, f"{source}, split 'validation'")
    table = vocabulary([words for words, _ in train])
    sizes = {"words": 2 + len(table)}
    return Splits(encode(train, table), encode(validation, table), encode(test, table), sizes)


def _phrases(table: Any, place: str) -> Phrases:
    try:
        rows = list(zip(table["sentence"][:], table["label"][:], strict=True))
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#x}"
        raise UsageError(f"{place}, column 'sentence': text must be UTF-8, got the byte {byte}") from None
    for row, (text, label) in enumerate(rows):
        if not isinstance(text, str) or not text.split():
            raise UsageError(f"{place}, column 'sentence', row {row}: a sentence must have words, got {text!r}")
        if (count := len(text.split())) > LONGEST:
            raise UsageError(
                f"{place}, column 'sentence', row {row}: a sentence must have at most {LONGEST} words, got {count}"
            )
        if type(label) is not int or label not in (0, 1):
            raise UsageError(f"{place}, column 'label', row {row}: a label must be 0 or 1, got {label!r}")
    return [(text.split(), label) for text, label in rows]


def by_sentence(phrases: Phrases) -> tuple[Phrases, Phrases]:
    """Training and validation phrases; always the same.

    Most phrases are parts of sentences that are there too. A model that knows the parts knows the sentence, so
    sentences, the phrases that are part of no other, are held out with all their parts that no other sentence has.
    """
    texts = [" ".join(words) for words, _ in phrases]
    known, lengths = set(texts), {len(words) for words, _ in phrases}
    generator = torch.Generator().manual_seed(0)
    seen: set[str] = set()
    trained: set[str] = set()
    for words, _ in sorted(phrases, key=lambda phrase: -len(phrase[0])):
        if " ".join(words) in seen:
            continue
        parts = {" ".join(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1)} & known
        seen |= parts
        if torch.rand((), generator=generator) >= HELD_OUT:
            trained |= parts
    train = [phrase for phrase, text in zip(phrases, texts, strict=True) if text in trained]
    return train, [phrase for phrase, text in zip(phrases, texts, strict=True) if text not in trained]


def vocabulary(phrases: Sequence[Sequence[str]]) -> dict[str, int]:
    """Rows of the table by word, the most frequent first; row 0 is padding, row 1 the unknown word."""
    counts = Counter(word for phrase in phrases for word in phrase)
    return {word: row for row, (word, _) in enumerate(counts.most_common(WORDS - 2), 2)}


def encode(phrases: Phrases, table: Mapping[str, int]) -> Sequences:
    """Phrases as numbers of words."""
    numbers = torch.tensor([table.get(word, 1) for words, _ in phrases for word in words])
    rows = torch.split(numbers, [len(words) for words, _ in phrases])
    return Sequences(pad(rows), torch.tensor([label for _, label in phrases]))


def hide_words(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Some words of a batch (n, T) become the unknown one, which no training phrase has."""
    return hide(inputs, HIDDEN, generator)


TASK = Task(
    name="sst2",
    summary="the sentiment of sentences from film reviews",
    network="bidirectional LSTM [w]",
    data="SST-2 from the hub or a folder of parquet files: 67,349 phrases for training and validation, 872 test",
    model=partial(lstm, words=WORDS, outputs=2),
    load=load,
    loss=nn.CrossEntropyLoss(),
    metric="accuracy",
    meter=Accuracy,
    classes=2,
    recipe=Recipe(
        lr={"sgd": 0.5, "adam": 1e-3, "adamw": 1e-3},
        batch_size=64,
        epochs=10,
        dropout=0.3,
        schedule="cosine",
    ),
    width=64,
    widths=(32, 64, 128, 256, 600),
    extra="text",
    source="stanfordnlp/sst2",
    augment=hide_words,
    chunk=512,
)
