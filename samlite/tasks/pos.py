"""Part-of-speech tags of Universal Dependencies (Nivre et al. 2020), from the CoNLL-U files of a treebank."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from samlite.data.sequences import LONGEST, Sequences, hide, pad
from samlite.data.tensors import Splits, hold_out
from samlite.errors import UsageError, missing
from samlite.files import regular
from samlite.models import tagger
from samlite.tasks.metrics import Accuracy
from samlite.tasks.task import Recipe, Task

# fmt: off
TAGS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
)
# fmt: on
NO_TAG = -100  # behind a sentence's end: not trained on and not counted

KINDS = 4  # features of a word; row 0 of the table is padding, rows 1 ... 4 are the unknown ones of each kind
FEATURES = 20_000  # rows of the table at most, the most frequent first
RARE = 1  # times in the training sentences: such a feature is unknown, so that the unknown ones are trained too
HIDDEN = 0.1  # of a training batch's words are unknown: the suffixes, the shape and the context must do

COLUMNS = 10  # of a line of CoNLL-U

Sentence = list[tuple[str, int]]  # words, each with the number of its tag


def load(source: str | None, seed: int) -> Splits:
    """Sentences as features (n, T, 4) with the tag of each word (n, T); the same splits for every seed.

    source is a folder that holds *-ud-train.conllu, *-ud-test.conllu and, for validation, *-ud-dev.conllu, else a
    tenth of the training sentences is held out. Raises UsageError that names the file and the line of bad data.
    """
    folder = Path(str(source))
    if not folder.is_dir():
        raise UsageError(
            f"data must be the folder of a Universal Dependencies treebank, got {source!r}; "
            "get one from github.com/UniversalDependencies"
        )
    train, test = _read(_file(folder, "train")), _read(_file(folder, "test"))
    if any(folder.glob("*-ud-dev.conllu")):
        validation = _read(_file(folder, "dev"))
    else:
        kept, held = hold_out(torch.arange(len(train)))
        train, validation = [train[i] for i in kept], [train[i] for i in held]
    table = vocabulary(train)
    sizes = {"features": KINDS + 1 + len(table)}
    return Splits(encode(train, table), encode(validation, table), encode(test, table), sizes)


# --- Files


def _file(folder: Path, split: str) -> Path:
    files = list(folder.glob(f"*-ud-{split}.conllu"))
    if len(files) != 1:
        raise UsageError(f"{folder} must hold one file *-ud-{split}.conllu, got {len(files)}")
    return files[0]


def _read(path: Path) -> list[Sentence]:
    """The sentences of a file: its words, without multiword tokens (1-2) and empty nodes (1.1)."""
    try:
        lines = regular(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path.name} must be UTF-8 text, which byte {error.start} is not") from error
    sentences: list[Sentence] = []
    sentence: Sentence = []
    started = False  # a sentence may start with comments
    for number, line in enumerate([*lines, ""], 1):
        place = f"{path.name}, line {number}"
        if line.startswith("#"):
            started = True
        elif line.strip():
            started = True
            word = _word(line, len(sentence) + 1, place)
            sentence += [word] if word else []
        elif started:
            if not sentence:
                raise UsageError(f"{place}: a sentence must have words before it ends, got none")
            if len(sentence) > LONGEST:
                raise UsageError(f"{place}: a sentence must have at most {LONGEST} words, got {len(sentence)}")
            sentences.append(sentence)
            sentence, started = [], False
    if not sentences:
        raise UsageError(f"{path.name} must hold sentences, got none")
    return sentences


def _word(line: str, expected: int, place: str) -> tuple[str, int] | None:
    try:
        from conllu.exceptions import ParseException
        from conllu.parser import parse_line
    except ImportError as error:
        raise missing("task pos", "conllu", "text") from error
    columns = line.count("\t") + 1
    if columns != COLUMNS:
        raise UsageError(f"{place}: a word must have {COLUMNS} columns with tabs between them, got {columns}")
    try:
        token = parse_line(line, ("id", "form", "lemma", "upos"))
    except ParseException as error:
        raise UsageError(f"{place}: {error}") from error
    if isinstance(token["id"], tuple):
        return None
    if token["id"] != expected:
        raise UsageError(f"{place}: the id of a word must count up from 1, here {expected}, got {token['id']}")
    if not token["form"]:
        raise UsageError(f"{place}: the form of a word must not be empty")
    if token["upos"] not in TAGS:
        raise UsageError(f"{place}: the tag of a word must be one of {', '.join(TAGS)}, got {token['upos']!r}")
    return token["form"], TAGS.index(token["upos"])


# --- Features


def features(word: str, first: bool) -> tuple[str, str, str, str]:
    """The word in lower case, its last 2 and 3 letters, and its shape; digits are alike. `first` of its sentence."""
    lower = re.sub(r"\d", "0", word.lower())
    case = "X" if word.isupper() else "Xx" if word[0].isupper() else "x"
    marks = "".join(mark for mark in ("0", "-", ".") if mark in lower)
    return f"word {lower}", f"2 {lower[-2:]}", f"3 {lower[-3:]}", f"shape {case}{marks}{'^' if first else ''}"


def vocabulary(sentences: Iterable[Sentence]) -> dict[str, int]:
    """Rows of the table by feature, the most frequent first."""
    counts = Counter(
        f for sentence in sentences for i, (word, _) in enumerate(sentence) for f in features(word, i == 0)
    )
    common = [feature for feature, count in counts.most_common(FEATURES - KINDS - 1) if count > RARE]
    return {feature: row for row, feature in enumerate(common, KINDS + 1)}


def encode(sentences: Iterable[Sentence], table: Mapping[str, int]) -> Sequences:
    """Sentences as numbers; a feature that the table lacks is the unknown one of its kind."""
    inputs, targets = [], []
    for sentence in sentences:
        words = [features(word, i == 0) for i, (word, _) in enumerate(sentence)]
        inputs.append(torch.tensor([[table.get(f, kind) for kind, f in enumerate(word, 1)] for word in words]))
        targets.append(torch.tensor([tag for _, tag in sentence]))
    return Sequences(pad(inputs), pad(targets, NO_TAG))


def hide_words(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Some words of a batch (n, T, 4) become the unknown one; their other features stay."""
    return torch.cat([hide(inputs[..., :1], HIDDEN, generator), inputs[..., 1:]], -1)


class TokenLoss(nn.CrossEntropyLoss):
    """The mean cross-entropy over the words that have a tag: outputs (n, T, classes), targets (n, T)."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1), target.flatten())


TASK = Task(
    name="pos",
    summary="the part of speech of words",
    network="Transformer encoder, 4 layers of w",
    data="CoNLL-U files of a treebank; UD English EWT: 12,544 training, 2,001 validation, 2,077 test sentences",
    model=partial(tagger, features=FEATURES, outputs=len(TAGS)),
    load=load,
    loss=TokenLoss(ignore_index=NO_TAG),
    metric="accuracy",
    meter=Accuracy,
    classes=len(TAGS),
    recipe=Recipe(
        lr={"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3},
        batch_size=32,
        epochs=15,
        weight_decay=0.01,
        dropout=0.3,
        schedule="cosine",
    ),
    width=192,
    widths=(192, 256, 384, 512, 848),
    extra="text",
    source="UD_English-EWT",
    base="adamw",
    augment=hide_words,
    chunk=256,
)
