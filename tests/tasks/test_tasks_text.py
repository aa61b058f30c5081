from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import contents
from torch import Tensor, nn

from samlite import Hessian
from samlite.data.sequences import Sequences, pad
from samlite.tasks import get, sst2
from samlite.tasks.metrics import Accuracy
from samlite.tasks.pos import KINDS, TAGS, TokenLoss, encode, features, hide_words, vocabulary
from samlite.tasks.sst2 import by_sentence
from samlite.training import session as training
from samlite.training.config import Config
from samlite.training.loop import train
from samlite.training.runs import load_run

# Sequences


def ramps(*lengths: int) -> Sequences:
    """A sequence 1, 2, ... of each length; its target is its place in the data."""
    return Sequences(pad([torch.arange(1, length + 1) for length in lengths]), torch.arange(len(lengths)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_batches_of_sequences_hold_each_once_uncut_and_no_column_of_padding_alone() -> None:
    data = ramps(*torch.randint(1, 40, (104,), generator=generator()).tolist())
    for order, size in ((None, 10), (generator(), 10), (None, 13), (generator(), 13), (generator(), 200)):
        found = []
        for inputs, targets in data.batches(size, order):
            assert inputs[:, -1].any()
            assert torch.equal((inputs > 0).sum(1), data.lengths[targets])
            found += targets.tolist()
        assert sorted(found) == list(range(104))


def test_shuffled_batches_hold_sequences_of_similar_length_and_the_last_is_the_small_one() -> None:
    data = ramps(*torch.randint(1, 40, (1005,), generator=generator()).tolist())
    batches = list(data.batches(10, generator()))
    assert [len(targets) for _, targets in batches] == [10] * 100 + [5]
    padding = sum((inputs == 0).sum().item() for inputs, _ in batches[:-1])
    assert padding < 0.2 * sum(inputs.numel() for inputs, _ in batches)
    longest = torch.tensor([inputs.shape[1] for inputs, _ in batches]).double()
    assert not torch.equal(longest, longest.sort().values)


def test_the_order_of_sequences_is_that_of_the_generator_and_without_one_fixed() -> None:
    data = ramps(*torch.randint(1, 9, (60,), generator=generator()).tolist())

    def order(source: torch.Generator | None) -> list[int]:
        return torch.cat([targets for _, targets in data.batches(7, source)]).tolist()

    assert order(None) == order(None) == data.lengths.sort(stable=True).indices.tolist()
    source = generator(1)
    first, second = order(source), order(source)
    assert first != second and first == order(generator(1))


def test_a_target_at_every_position_is_cut_with_the_inputs() -> None:
    data = Sequences(pad([torch.ones(k, 2, dtype=torch.long) for k in (3, 1, 2)]), torch.arange(9).view(3, 3))
    (inputs, targets), (rest, last) = data.batches(2)
    assert inputs.shape == (2, 2, 2) and targets.tolist() == [[3, 4], [6, 7]]
    assert rest.shape == (1, 3, 2) and last.tolist() == [[0, 1, 2]]
    assert replace(data, targets=-data.targets)[1:].targets.tolist() == [[-3, -4, -5], [-6, -7, -8]]


# The networks


def phrases(*lengths: int, words: int = 50) -> Tensor:
    return pad([torch.randint(1, words, (length,), generator=generator(length)) for length in lengths])


def sentences(*lengths: int, rows: int = 50) -> Tensor:
    return pad([torch.randint(1, rows, (length, KINDS), generator=generator(length)) for length in lengths])


@pytest.mark.usefixtures("float64")
def test_the_tags_of_a_sentence_do_not_depend_on_the_padding_beside_it() -> None:
    model = get("pos").model(40, features=50).eval()
    batch = sentences(2, 9, 5)
    outputs = model(batch)
    for row, length in zip(range(3), (2, 9, 5), strict=True):
        torch.testing.assert_close(outputs[row, :length], model(batch[row : row + 1, :length])[0])


@pytest.mark.usefixtures("float64")
def test_the_class_of_a_phrase_does_not_depend_on_the_padding_behind_it() -> None:
    model = get("sst2").model(8, words=50).eval()
    batch = phrases(1, 9, 5)
    outputs = model(batch)
    for row, length in zip(range(3), (1, 9, 5), strict=True):
        torch.testing.assert_close(outputs[row], model(batch[row : row + 1, :length])[0])


@pytest.mark.usefixtures("float64")
def test_the_lstm_is_that_of_torch_on_packed_sequences() -> None:
    model = get("sst2").model(6, words=50).eval()
    both = nn.LSTM(6, 6, batch_first=True, bidirectional=True)
    state = {name: value for name, value in model.onward.state_dict().items()}
    state |= {f"{name}_reverse": value for name, value in model.against.state_dict().items()}
    both.load_state_dict(state)
    batch = phrases(3, 7, 1)
    packed = nn.utils.rnn.pack_padded_sequence(
        model.embedding(batch), torch.tensor([3, 7, 1]), batch_first=True, enforce_sorted=False
    )
    states, _ = nn.utils.rnn.pad_packed_sequence(both(packed)[0], batch_first=True, padding_value=-torch.inf)
    torch.testing.assert_close(model(batch), model.head(states.amax(1)))


@pytest.mark.usefixtures("float64")
def test_attention_knows_how_far_apart_words_are_and_in_which_direction_but_not_where_they_stand() -> None:
    from samlite.models.tagger import rotate

    query, key = torch.randn(2, 1, 32)
    scores = rotate(query.expand(9, 32)) @ rotate(key.expand(9, 32)).T
    for offset in range(-8, 9):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(len(diagonal)))
    assert (scores[4, 3] - scores[4, 5]).abs() > 1e-3
    torch.testing.assert_close(rotate(query.expand(9, 32)).norm(dim=-1), query.norm().expand(9))


@pytest.mark.parametrize(("task", "least", "most"), [("pos", 5.5, 51), ("sst2", 0.5, 15)])
def test_text_networks_span_the_parameters_of_the_paper(task: str, least: float, most: float) -> None:
    counts = [get(task).parameters(width) / 1e6 for width in get(task).widths]
    assert counts == sorted(counts)
    assert counts[0] == pytest.approx(least, rel=0.05) and counts[-1] == pytest.approx(most, rel=0.05)


# The loss and the metric of pad targets


def test_the_loss_and_the_accuracy_of_tags_are_means_over_words() -> None:
    outputs, targets = torch.randn(3, 4, 5, generator=generator()), torch.tensor([[0, 1, 2, 3], [4, -100, -100, -100]])
    outputs = outputs[:2]
    words = [(outputs[i, j], targets[i, j]) for i, j in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0))]
    expected = sum(-scores.log_softmax(0)[tag] for scores, tag in words) / 5
    torch.testing.assert_close(TokenLoss(ignore_index=-100)(outputs, targets), expected)
    meter = Accuracy()
    meter.update(outputs, targets)
    assert meter.compute()["accuracy"] == sum(bool(scores.argmax() == tag) for scores, tag in words) / 5


@pytest.mark.usefixtures("float64")
def test_the_hessian_of_tags_weights_batches_by_their_words() -> None:
    task = get("pos")
    model = task.model(2, features=8)
    data = Sequences(sentences(1, 2, 6, rows=8), pad([torch.arange(k) for k in (1, 2, 6)], -100))
    batches = list(data.batches(1))
    whole = [(data.inputs, data.targets)]
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    torch.testing.assert_close(Hessian(model, task.loss, batches) @ v, Hessian(model, task.loss, whole) @ v)


# Tags, from files


def conllu(*sentences: str) -> str:
    """CoNLL-U of sentences such as "The/DET cat/NOUN"."""
    blocks = []
    for sentence in sentences:
        words = [word.rsplit("/", 1) for word in sentence.split()]
        lines = [f"{i}\t{word}\t_\t{tag}" + "\t_" * 6 for i, (word, tag) in enumerate(words, 1)]
        blocks.append("\n".join(["# text = ...", *lines]) + "\n\n")
    return "".join(blocks)


ANIMALS = conllu("The/DET cat/NOUN sleeps/VERB", "A/DET dog/NOUN barks/VERB ./PUNCT") * 5


@pytest.fixture
def treebank(tmp_path: Path) -> Callable[..., str]:
    """Write the splits of a treebank."""
    pytest.importorskip("conllu")

    def write(**splits: str | bytes) -> str:
        for name, text in splits.items():
            path = tmp_path / f"xx_animals-ud-{name}.conllu"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path)

    return write


def test_words_and_tags_are_read_without_multiword_tokens_and_empty_nodes(treebank: Callable[..., str]) -> None:
    line = "\t_" * 6
    odd = f"# text = I don't.\n1\tI\ti\tPRON{line}\n2-3\tdon't\t_\t_{line}\n2\tdo\tdo\tAUX{line}\n"
    odd += f"3\tn't\tnot\tPART{line}\n3.1\tgo\tgo\tVERB{line}\n4\t.\t.\tPUNCT{line}"  # no empty line at the end
    data = get("pos").load(treebank(train=ANIMALS, test=odd, dev=conllu("Cat/NOUN")), 0)
    assert [[TAGS[i] for i in row] for row in data.test.targets] == [["PRON", "AUX", "PART", "PUNCT"]]
    assert [len(data.train), len(data.validation), len(data.test)] == [10, 1, 1]
    assert data.train.targets[0].tolist() == [TAGS.index(tag) for tag in ("DET", "NOUN", "VERB")] + [-100]
    assert data.train.lengths.tolist() == [3, 4] * 5


def test_without_validation_sentences_a_tenth_of_the_training_sentences_is_held_out(
    treebank: Callable[..., str],
) -> None:
    data = get("pos").load(treebank(train=ANIMALS, test=ANIMALS), 0)
    assert [len(data.train), len(data.validation), len(data.test)] == [9, 1, 10]


def test_the_vocabulary_is_of_the_training_sentences_alone(treebank: Callable[..., str]) -> None:
    data = get("pos").load(treebank(train=ANIMALS, test=conllu("the/DET zebras/NOUN") * 3, dev=ANIMALS), 0)
    the, zebras = data.test.inputs[0]
    assert the[0] > KINDS and zebras[:3].tolist() == [1, 2, 3]  # unknown word and suffixes
    assert data.sizes["features"] == data.train.inputs.max() + 1


def test_what_the_training_sentences_hold_once_is_unknown_so_that_the_unknown_is_trained() -> None:
    often, once = [("walks", 0), ("talks", 0)], [("zzz", 1)]
    table = vocabulary([often, often, once])
    walks, talks = encode([often], table).inputs[0]
    assert (walks > KINDS).all() and walks[1] == talks[1] and walks[2] != 0 and walks[0] != talks[0]
    assert encode([once], table).inputs[0, 0, :3].tolist() == [1, 2, 3]


def test_the_features_of_a_word_are_itself_its_suffixes_and_its_shape() -> None:
    assert features("Walking", False)[:3] == ("word walking", "2 ng", "3 ing")
    shapes = {features(word, False)[3] for word in ("walking", "Walking", "WALKING", "walk-in", "1984", "U.S.")}
    assert len(shapes) == 6 and features("Walking", True)[3] not in shapes
    assert features("1984", False) == features("2024", False)


def test_hidden_words_keep_their_other_features_and_padding_stays() -> None:
    inputs = sentences(*range(1, 100))
    hidden = hide_words(inputs, generator())
    changed = (hidden != inputs)[..., 0]
    assert torch.equal(hidden[..., 1:], inputs[..., 1:]) and hidden[..., 0][changed].unique().tolist() == [1]
    assert 0.05 < changed.sum() / (inputs[..., 0] > 0).sum() < 0.15
    assert not changed[inputs[..., 0] == 0].any()
    assert torch.equal(hidden, hide_words(inputs, generator()))


WORD = "1\tcat\t_\tNOUN" + "\t_" * 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WORD.replace("\t", " "), "line 1: a word must have 10 columns with tabs between them, got 1"),
        (f"# text = cat\n{WORD[:-2]}\n", "line 2: a word must have 10 columns .*, got 9"),
        (f"{WORD}\n\n{WORD.replace('1', 'one', 1)}\n", "line 3: .* 'one' is not a valid ID"),
        (f"{WORD}\n{WORD}\n", "line 2: the id of a word must count up from 1, here 2, got 1"),
        (WORD.replace("1", "_", 1), "line 1: the id of a word must count up from 1, here 1, got None"),
        (WORD.replace("NOUN", "NN"), "line 1: the tag of a word must be one of ADJ, ADP, .*, X, got 'NN'"),
        (WORD.replace("NOUN", "_"), "line 1: the tag of a word must be one of .*, got '_'"),
        (WORD.replace("cat", ""), "line 1: the form of a word must not be empty"),
        (f"{WORD}\n\n# text =\n\n{WORD}", "line 4: a sentence must have words before it ends, got none"),
        ("", "xx_animals-ud-test.conllu must hold sentences, got none"),
        ("\n\n", "xx_animals-ud-test.conllu must hold sentences, got none"),
        (b"1\t\xff", "xx_animals-ud-test.conllu must be UTF-8 text, which byte 2 is not"),
    ],
)
def test_malformed_tags_are_refused_with_their_file_and_line(
    treebank: Callable[..., str], text: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        get("pos").load(treebank(train=ANIMALS, test=text), 0)
    assert "xx_animals-ud-test.conllu" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_folder_without_a_treebank_is_refused(treebank: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold one file \*-ud-test.conllu, got 0"):
        get("pos").load(treebank(train=ANIMALS), 0)
    with pytest.raises(ValueError, match="data must be the folder of a Universal Dependencies treebank, got 'nothing'"):
        get("pos").load("nothing", 0)
    (tmp_path / "yy_animals-ud-train.conllu").write_text(ANIMALS)
    with pytest.raises(ValueError, match=r"must hold one file \*-ud-train.conllu, got 2"):
        get("pos").load(treebank(test=ANIMALS), 0)


# Sentiment, from files


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., str]:
    """Write the splits of a data set as parquet files, each a list of sentences and one of labels."""
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    def write(columns: tuple[str, str] = ("sentence", "label"), **splits: tuple[Sequence[Any], Sequence[Any]]) -> str:
        for name, values in splits.items():
            table = pyarrow.table(dict(zip(columns, values, strict=True)))
            pyarrow.parquet.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
        return str(tmp_path)

    return write


FILMS = ([f"{word} film number {i}" for i in range(20) for word in ("good", "bad")], [1, 0] * 20)
COLUMNS = ("sentence", "label")


def test_phrases_are_numbers_of_training_words_and_the_test_data_are_the_validation_split(
    parquet: Callable[..., str],
) -> None:
    data = get("sst2").load(parquet(train=FILMS, validation=(["good  film ", "unheard film film"], [1, 0])), 0)
    assert len(data.train) + len(data.validation) == 40 and len(data.validation) > 0
    film = data.test.inputs[0, 1]
    assert data.test.inputs[1].tolist() == [1, film, film]
    assert data.test.targets.tolist() == [1, 0] and data.test.lengths.tolist() == [2, 3]
    assert data.sizes["words"] == data.train.inputs.max() + 1


def test_a_sentence_is_held_out_with_all_its_phrases_that_no_other_sentence_has() -> None:
    text = [f"{a} {b} {c}" for a in "abcdefg" for b in "hijklmn" for c in "opqrst"]
    parts = [line[:3] for line in text] + [line[2:] for line in text] + list("ahabco")
    rows = [(line.split(), 0) for line in dict.fromkeys(text + parts)]
    train, validation = by_sentence(rows)
    assert sorted(train + validation) == sorted(rows)
    assert 0.05 < len([words for words, _ in validation if len(words) == 3]) / len(text) < 0.15
    trained = [" ".join(words) for words, _ in train]
    held = [" ".join(words) for words, _ in validation]
    whole = [line for line in trained if len(line) == 5]
    assert all(any(part in line for line in whole) for part in trained)
    assert not any(part in line for line in whole for part in held)
    assert by_sentence(rows) == (train, validation)


@pytest.mark.parametrize(
    ("splits", "columns", "message"),
    [
        ({"train": FILMS}, COLUMNS, "has no split 'validation', only 'train'"),
        ({"train": FILMS, "validation": FILMS}, ("text", "label"), "split 'train': no column 'sentence', only 'text'"),
        ({"train": FILMS, "validation": FILMS}, ("sentence", "stars"), "split 'train': no column 'label'"),
        ({"train": FILMS, "validation": (["a"], [2])}, COLUMNS, "split 'validation', column 'label', row 0: .* got 2"),
        ({"train": FILMS, "validation": (["a"] * 2, [1, -1])}, COLUMNS, "column 'label', row 1: .* got -1"),
        ({"train": FILMS, "validation": (["a"], [None])}, COLUMNS, "column 'label', row 0: .* got None"),
        ({"train": (["a"], [1.0]), "validation": (["a"], [1.0])}, COLUMNS, "column 'label', row 0: .* got 1.0"),
        ({"train": FILMS, "validation": (["a", " "], [1, 1])}, COLUMNS, "row 1: a sentence must have words, got ' '"),
        ({"train": FILMS, "validation": ([None], [1])}, COLUMNS, "row 0: a sentence must have words, got None"),
        ({"train": ([3], [1]), "validation": ([3], [1])}, COLUMNS, "row 0: a sentence must have words, got 3"),
    ],
)
def test_malformed_phrases_are_refused_with_their_place(
    parquet: Callable[..., str], splits: dict[str, Any], columns: tuple[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        get("sst2").load(parquet(columns, **splits), 0)
    assert "\n" not in str(refusal.value)


def test_phrases_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"sentence": "a\xff film", "label": 1}\n')
    with pytest.raises(ValueError, match="split 'train', column 'sentence': text must be UTF-8, got the byte 0xff"):
        get("sst2").load(str(tmp_path), 0)


def test_an_empty_split_of_phrases_is_refused(parquet: Callable[..., str]) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = parquet(train=FILMS)
    nothing = pyarrow.table({"sentence": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], "int64")})
    pyarrow.parquet.write_table(nothing, f"{folder}/validation-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="split 'validation': no rows|cannot load sst2"):
        get("sst2").load(folder, 0)


def test_a_truncated_file_of_phrases_is_named(parquet: Callable[..., str]) -> None:
    folder = Path(parquet(train=FILMS, validation=FILMS))
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot load sst2 .* train-00000-of-00001.parquet is truncated"):
        get("sst2").load(str(folder), 0)


# Training


@pytest.fixture(params=["pos", "sst2"])
def small(request: Any, tmp_path: Path) -> Config:
    """A run of seconds on a few sentences."""
    fixture = "treebank" if request.param == "pos" else "parquet"
    write = request.getfixturevalue(fixture)
    data = write(train=ANIMALS, test=ANIMALS) if request.param == "pos" else write(train=FILMS, validation=FILMS)
    return Config.of(request.param, width=8, epochs=4, batch_size=4, data=data, device="cpu", optimizer="sam")


def test_a_run_on_text_that_was_stopped_ends_as_one_that_was_not(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    losses = [record.train_loss for record in train(small, whole)]
    assert losses[-1] < losses[0]
    unfinished = train(small, parts)
    next(unfinished), next(unfinished)
    unfinished.close()
    assert len(list(train(small, parts))) == 2
    assert contents(whole) == contents(parts)


def test_the_curvature_of_a_run_on_text_is_measured(small: Config, tmp_path: Path) -> None:
    list(train(small, tmp_path / "run"))
    run = load_run(tmp_path / "run")
    data, count = run.task.subsample(run.model, run.data.train, 8, 0)
    assert count == 8
    assert Hessian(run.model, run.task.loss, data).eigenvalues(tol=0.05).converged


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("task", ["pos", "sst2"])
def test_moments_of_sequences_of_unequal_length_are_the_means_over_each_by_itself(task: str) -> None:
    lengths = (1, 2, 2, 2, 6, 6, 7)
    if task == "pos":
        model = get(task).model(4, features=12)
        data = Sequences(sentences(*lengths, rows=12), pad([torch.arange(k) for k in lengths], -100))
    else:
        model = get(task).model(3, words=12)
        data = Sequences(phrases(*lengths, words=12), torch.arange(7) % 2)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    found = Hessian(model, get(task).loss, list(data.batches(2))).moment_operator(2) @ v

    words = (data.targets >= 0).flatten(1).sum(1) if task == "pos" else torch.ones(7)
    each = [Hessian(model, get(task).loss, list(data[i : i + 1].batches(1))) for i in range(7)]
    share = words * 7 / words.sum()  # the mean over samples of share * hessian is the hessian
    squares = sum(k**2 * (h @ (h @ v)) for k, h in zip(share, each, strict=True)) / 7
    mean = Hessian(model, get(task).loss, list(data.batches(2)))
    torch.testing.assert_close(found, squares - mean @ (mean @ v))


# Real data


def test_real_tags_are_beyond_what_the_most_frequent_tag_of_each_word_would_be(real_data: Path) -> None:
    pytest.importorskip("conllu")
    data = get("pos").load(str(real_data / "pos"), 0)
    assert [len(data.train), len(data.validation), len(data.test)] == [1801, 200, 2077]
    assert (data.test.targets >= 0).sum() == 25_094  # the words of this test file
    known = (data.test.inputs[..., 0] > 1).sum() / (data.test.targets >= 0).sum()
    assert 0.7 < known < 0.95
    assert TAGS[int(data.train.targets[data.train.targets >= 0].mode().values)] == "NOUN"


def test_real_phrases_are_whole_and_the_held_out_ones_of_other_sentences(real_data: Path) -> None:
    pytest.importorskip("datasets")
    data = get("sst2").load(str(real_data / "sst2"), 0)
    assert len(data.train) + len(data.validation) == 67_349 and len(data.test) == 872
    assert 0.08 < len(data.validation) / 67_349 < 0.12
    assert data.test.targets.float().mean() == pytest.approx(444 / 872)
    assert (data.test.inputs == 1).sum() < 0.1 * (data.test.inputs > 0).sum()


def test_a_sentence_too_long_for_memory_is_refused_by_line_and_length(treebank: Callable[..., str]) -> None:
    words = "".join(f"{i}\tword\t_\tNOUN\t_\t_\t_\t_\t_\t_\n" for i in range(1, 100_001))
    with pytest.raises(ValueError, match=r"ud-train.conllu, line 100001: a sentence must have at most 1000 words"):
        get("pos").load(treebank(train=words, test=ANIMALS), 0)


def test_a_phrase_too_long_is_refused_by_row_and_a_long_one_is_split_in_time() -> None:
    rows = {"sentence": ["good", "bad " * 100_000], "label": [1, 0]}
    with pytest.raises(ValueError, match="here, column 'sentence', row 1: a sentence must have at most 1000 words"):
        sst2._phrases(rows, "here")
    long = [f"w{i}" for i in range(1000)]
    phrases = [(long, 1), (long[10:15], 0), (long[500:520], 1), (["other"], 0)]
    train, validation = by_sentence(phrases)
    assert sorted(train + validation) == sorted(phrases)
    held = {len(words) for words, _ in validation} & {1000, 5, 20}
    assert held in (set(), {1000, 5, 20})  # a sentence with its parts
