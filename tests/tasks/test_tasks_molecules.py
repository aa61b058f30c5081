import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contents
from oracles import dense_hessian
from torch import Tensor

from samlite import Hessian
from samlite.data.graphs import GraphData, canonical, graph, molecule, scaffold, scaffold_split, silent
from samlite.models import graph_network
from samlite.tasks import get
from samlite.tasks.metrics import Ranking
from samlite.tasks.molpcba import MaskedBinaryCrossEntropy
from samlite.training.config import Config
from samlite.training.loop import train
from samlite.training.runs import load_run

pytest.importorskip("rdkit")

CORES = ["c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccoc1", "c1ccsc1", "C1CCNCC1", "C1CC1", "C1CCC1", "C1CCCC1", "C1COC1"]
SMILES = [f"{'C' * (7 * k % 10)}{core}" for core in CORES for k in range(10)]  # 100 molecules of 3 to 15 atoms


def data_of(*smiles: str, labels: int = 3) -> GraphData:
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2, (len(smiles), labels), generator=draw).float()
    targets[torch.rand(targets.shape, generator=draw) < 0.3] = torch.nan
    return GraphData.of([graph(molecule(each)) for each in smiles], targets)


def batch_of(*smiles: str) -> tuple[Tensor, Tensor]:
    return data_of(*smiles).padded(torch.arange(len(smiles)))[0]


# Graphs


def test_atoms_and_bonds_are_those_of_the_molecule() -> None:
    found = graph(molecule("C=C[NH3+]"))
    assert found.bonds.tolist() == [[0, 1, 2], [1, 2, 1]]
    # atomic number, chirality, degree with hydrogens, charge + 5, hydrogens, radicals, hybridisation, aromatic, ring
    assert found.atoms.tolist() == [
        [6, 0, 3, 5, 2, 0, 3, 0, 0],
        [6, 0, 3, 5, 1, 0, 3, 0, 0],
        [7, 0, 4, 6, 3, 0, 4, 0, 0],
    ]
    benzene = graph(molecule("c1ccccc1"))
    assert (benzene.bonds[:, 2] == 4).all() and (benzene.atoms[:, 7:] == 1).all()
    assert graph(molecule("C#N")).bonds.tolist() == [[0, 1, 3]]
    assert graph(molecule("*")).atoms[0, 0] == 119 and graph(molecule("[Na+].[Cl-]")).bonds.shape == (0, 3)
    hands = [graph(molecule(f"N[C{hand}H](C)O")).atoms[1, 1] for hand in ("@", "@@")]
    assert sorted(hands) == [1, 2]


def test_values_beyond_a_vocabulary_count_as_its_last() -> None:
    assert graph(molecule("[Fe+9]")).atoms[0, 3] == 11 and graph(molecule("[Fe-9]")).atoms[0, 3] == 0


def test_valences_that_rdkit_does_not_allow_are_read_and_broken_smiles_are_not(capfd: Any) -> None:
    with silent():
        assert len(graph(molecule("CC(=O)O[AlH3](O)O")).atoms) == 7  # of Tox21
        assert [molecule(each) for each in ("C1CC", "C(", "c1cccc1", "hello", "")] == [None] * 5
    assert capfd.readouterr() == ("", "")


def test_a_batch_is_padded_to_its_largest_molecule() -> None:
    data = data_of("C", "C=CO", "CC")
    (atoms, bonds), targets = data.padded(torch.tensor([1, 0]))
    assert atoms[..., 0].tolist() == [[6, 6, 8], [6, 0, 0]] and not atoms[1, 1:].any()
    assert bonds.tolist() == [[[0, 2, 0], [2, 0, 1], [0, 1, 0]], [[0] * 3] * 3]
    torch.testing.assert_close(targets, data.targets[[1, 0]], equal_nan=True)


def test_chosen_rows_are_the_graphs_of_these_molecules() -> None:
    data, rows = data_of(*SMILES), torch.tensor([70, 3, 3, 99])
    chosen = data[rows]
    assert chosen.sizes.tolist() == data.sizes[rows].tolist() and len(data[5:8]) == 3
    (atoms, bonds), targets = chosen.padded(torch.arange(4))
    (expected, kinds), labels = data.padded(rows)
    assert torch.equal(atoms, expected) and torch.equal(bonds, kinds)
    torch.testing.assert_close(targets, labels, equal_nan=True)


def test_batches_hold_every_molecule_once_in_an_order_of_the_generator() -> None:
    data = replace(data_of(*SMILES), targets=torch.arange(100.0)[:, None])

    def order(seed: int | None) -> list[float]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        batches = list(data.batches(8, generator))
        assert [len(targets) for _, targets in batches] == [8] * 12 + [4]
        for (atoms, _), targets in batches:
            assert (atoms[..., 0] > 0).sum(1).tolist() == data.sizes[targets[:, 0].long()].tolist()
        return torch.cat([targets for _, targets in batches])[:, 0].tolist()

    assert order(None) == list(range(100))
    assert order(0) == order(0) != order(1) and sorted(order(0)) == list(range(100))


def test_batches_of_similar_size_need_less_padding_than_random_ones() -> None:
    data = data_of(*SMILES * 10)

    def padding(batches: Any) -> float:
        return sum(len(targets) * atoms.shape[1] for (atoms, _), targets in batches) / int(data.sizes.sum()) - 1

    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    assert padding(data.batches(10, torch.Generator().manual_seed(0))) < 0.3 * padding(data[order].batches(10))
    assert padding(data[data.sizes.argsort()].batches(10)) < 0.1


# The network


@pytest.mark.usefixtures("float64")
def test_padding_has_no_influence_on_the_outputs() -> None:
    network = graph_network(8, outputs=3).eval()
    together = network(batch_of("C", "CCO", "[Na+].[Cl-]", "CCCCCCCCc1ccccc1"))
    for i, smiles in enumerate(("C", "CCO", "[Na+].[Cl-]")):
        torch.testing.assert_close(network(batch_of(smiles))[0], together[i], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_the_order_of_the_atoms_does_not_matter_and_their_bonds_do() -> None:
    network = graph_network(8, outputs=3).eval()
    atoms, bonds = batch_of("CC(=O)Oc1ccccc1C(=O)O")
    order = torch.randperm(atoms.shape[1])
    moved = network((atoms[:, order], bonds[:, order][:, :, order]))
    torch.testing.assert_close(moved, network((atoms, bonds)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(network((atoms, bonds[:, order])), network((atoms, bonds)))
    assert not torch.allclose(network((atoms, bonds.clamp(max=1))), network((atoms, bonds)))  # all bonds single
    torch.testing.assert_close(network(batch_of("OCC")), network(batch_of("CCO")), rtol=1e-12, atol=1e-12)


def test_networks_span_the_parameters_of_the_paper() -> None:
    task = get("molpcba")
    counts = [task.parameters(width) / 1e6 for width in task.widths]
    assert f"{counts[0]:.1f} {counts[-1]:.1f}" == "0.2 2.7"


# The loss


def test_only_known_labels_count_for_the_loss() -> None:
    outputs, targets = torch.tensor([[0.5, -1.0], [2.0, 3.0]]), torch.tensor([[1.0, torch.nan], [0.0, 1.0]])
    terms = [np.log1p(np.exp(-0.5)), np.log1p(np.exp(2.0)), np.log1p(np.exp(-3.0))]
    criterion = MaskedBinaryCrossEntropy()
    assert criterion(outputs, targets).item() == pytest.approx(np.mean(terms), rel=1e-6)
    assert criterion.denominator(targets) == 3


def test_a_batch_without_known_labels_has_no_loss_no_weight_and_no_gradient() -> None:
    outputs = torch.tensor([[1e4, -1.0]], requires_grad=True)
    criterion, targets = MaskedBinaryCrossEntropy(), torch.full((1, 2), torch.nan)
    loss = criterion(outputs, targets)
    loss.backward()
    assert loss == 0 and criterion.denominator(targets) == 0 and outputs.grad.tolist() == [[0, 0]]


PARTS = ["features.1.*", "layers.*", "norm.*", "head.*"]  # of the tables of features one: the others are alike


def dense(network: torch.nn.Module, data: GraphData) -> Tensor:
    inputs, targets = data.padded(torch.arange(len(data)))
    names = [name for name, _ in network.named_parameters() if any(fnmatch(name, part) for part in PARTS)]
    return dense_hessian(network, lambda call: MaskedBinaryCrossEntropy()(call(inputs), targets), names)


@pytest.mark.usefixtures("float64")
def test_hessians_and_moments_are_those_of_dense_autograd_over_known_labels() -> None:
    task, network = get("molpcba"), graph_network(2, outputs=2).eval()
    data = data_of("CCO", "CCC=O", "c1ccoc1", "C", "CN", labels=2)
    data.targets[1] = torch.nan  # no label at all
    batches, _ = task.subsample(network, data, 8, 0)
    batches = replace(batches, size=2)  # 2, 2 and 1 molecules with unequal numbers of labels
    operator = Hessian(network, task.loss, batches, params=PARTS)
    v = torch.randn(operator.shape[0])
    hessian = dense(network, data)
    torch.testing.assert_close(operator @ v, hessian @ v, rtol=1e-9, atol=1e-12)

    counts = (~data.targets.isnan()).sum(1)
    parts = [dense(network, data[i : i + 1]) * 5 * counts[i] / counts.sum() for i in range(5)]  # mean: H
    second = sum(part @ part for part in parts) / 5
    expected = second @ v - hessian @ (hessian @ v)
    torch.testing.assert_close(operator.moment_operator(2) @ v, expected, rtol=1e-9, atol=1e-12)


# The metric


def test_scores_with_ties_and_gaps_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randint(0, 12, (200, 8), generator=draw) / 4  # many ties
    targets = (torch.rand(200, 8, generator=draw) < torch.linspace(0.02, 0.9, 8)).float()
    targets[torch.rand(200, 8, generator=draw) < 0.4] = torch.nan
    targets[:, 2] = targets[:, 2] * 0  # no positive: this label does not count
    targets[:, 5] = targets[:, 5] * 0 + 1  # no negative
    meter = Ranking()
    for rows in torch.arange(200).split(30):
        meter.update(outputs[rows], targets[rows])

    scores = []
    for label in (0, 1, 3, 4, 6, 7):
        known = ~targets[:, label].isnan()
        truth, score = targets[known, label].numpy(), outputs[known, label].numpy()
        scores.append((metrics.average_precision_score(truth, score), metrics.roc_auc_score(truth, score)))
    expected = np.mean(scores, 0)
    assert meter.compute() == pytest.approx({"average_precision": expected[0], "roc_auc": expected[1]}, abs=1e-12)


def test_a_perfect_ranking_scores_one_and_a_constant_one_the_share_of_positives() -> None:
    positive = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    assert ranked(positive, positive) == {"average_precision": 1, "roc_auc": 1}
    assert ranked(torch.zeros(4, 1), positive) == {"average_precision": 0.5, "roc_auc": 0.5}
    assert ranked(-positive, positive)["roc_auc"] == 0


def ranked(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    pytest.importorskip("sklearn")
    meter = Ranking()
    meter.update(outputs, targets)
    return meter.compute()


# Files

Row = tuple[str, ...]
LABELLED: list[Row] = [(smiles, str(i % 2), "") for i, smiles in enumerate(SMILES)]


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Write a csv file of rows (smiles, label, label)."""

    def write(rows: list[Row] = LABELLED, header: Row = ("smiles", "a", "b"), name: str = "file.csv.gz") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(",".join(row) for row in ([header, *rows] if header else rows))
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


@pytest.fixture
def benchmark(table: Callable[..., Path]) -> Callable[..., Path]:
    """Write the layout of OGB: molecules, and the rows of each split."""

    def write(**splits: list[int | str]) -> Path:
        path = table([(a, b, s, f"M{i}") for i, (s, a, b) in enumerate(LABELLED)], ("a", "b", "smiles", "mol_id"),
                     "pcba/mapping/mol.csv.gz")  # fmt: skip
        for name, rows in {"train": list(range(80)), "valid": [95, 80], "test": [99, 98, 97], **splits}.items():
            table([(str(row),) for row in rows], (), f"pcba/split/scaffold/{name}.csv.gz")
        return path.parent.parent

    return write


def load(path: Path) -> Any:
    return get("molpcba").load(str(path), 0)


@pytest.mark.parametrize("name", ["file.csv", "file.csv.gz"])
def test_a_table_is_split_by_scaffolds_80_10_10_the_same_for_every_seed(table: Callable[..., Path], name: str) -> None:
    path = table(name=name)
    splits = load(path)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [80, 10, 10]
    assert splits.sizes == {"outputs": 2} and splits.test.targets[:, 1].isnan().all()
    again = get("molpcba").load(str(path), 1)
    assert torch.equal(splits.test.atoms, again.test.atoms) and torch.equal(splits.train.bonds, again.train.bonds)
    sizes = splits.train.sizes
    assert torch.equal(sizes, sizes.sort().values)


def test_the_largest_scaffold_groups_are_for_training_and_none_is_divided() -> None:
    names = ["rare"] + ["common"] * 12 + ["b", "c"] + ["few"] * 2 + ["d", "e", "f"]
    train_rows, validation, test = scaffold_split(names)
    assert sorted(train_rows + validation + test) == list(range(20))
    assert train_rows == [*range(1, 13), 15, 16, 0, 13] and validation == [14, 17] and test == [18, 19]


def test_scaffolds_are_the_rings_and_what_links_them() -> None:
    assert scaffold(molecule("CCCc1ccccc1")) == "c1ccccc1" and scaffold(molecule("CCO")) == ""
    assert canonical(molecule("C1=CC=CC=C1CC")) == canonical(molecule("CCc1ccccc1"))


def test_the_same_molecule_twice_is_one_and_labels_that_contradict_are_missing(table: Callable[..., Path]) -> None:
    twice = [("OCC", "1", ""), ("CCO", "", "0"), ("CCCO", "1", "1"), ("OCCC", "0", "1"), ("CCCCO", "", "")]
    splits = load(table([*LABELLED, *twice]))
    parts = (splits.train, splits.validation, splits.test)
    assert sum(map(len, parts)) == 103
    found = {}
    for part in parts:
        for i in range(len(part)):
            (atoms, _), targets = part.padded(torch.tensor([i]))
            if 8 in atoms[..., 0] and not atoms[..., 8].any():  # the alcohols
                found[atoms.shape[1]] = [None if t.isnan() else t.item() for t in targets[0]]
    assert found == {3: [1, 0], 4: [None, 1], 5: [None, None]}


def test_the_benchmark_is_read_with_its_own_split(benchmark: Callable[..., Path]) -> None:
    splits = load(benchmark())
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [80, 2, 3]
    sizes = data_of(*(SMILES[i] for i in (99, 98, 97))).sizes
    assert splits.test.sizes.tolist() == sorted(sizes.tolist())


def changed(row: int, *values: str) -> list[Row]:
    return [*LABELLED[: row - 1], values, *LABELLED[row:]]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (changed(7, "C1CC", "0", "1"), ("smiles", "a", "b"), "file.csv.gz, row 7: not a valid SMILES: 'C1CC'"),
        (changed(7, "", "0", "1"), ("smiles", "a", "b"), "row 7: not a valid SMILES: ''"),
        (changed(7, "C" * 1001, "0", "1"), ("smiles", "a", "b"), "row 7: .* at most 1000 atoms, got 1001"),
        (changed(9, "C", "0", "2"), ("smiles", "a", "b"), "row 9, column 'b': a label must be 0, 1 or empty, got '2'"),
        (changed(9, "C", "0.5", "1"), ("smiles", "a", "b"), "row 9, column 'a': .* got '0.5'"),
        (changed(3, "C", "0"), ("smiles", "a", "b"), "row 3: must have 3 values, got 2"),
        (LABELLED, ("molecule", "a", "b"), "no column 'smiles', only 'molecule', 'a', 'b'"),
        (LABELLED, ("smiles", "mol_id", "name"), "no column of labels beside 'smiles', 'mol_id', 'name'"),
        ([], ("smiles", "a", "b"), "file.csv.gz: no rows"),
        ([], (), "file.csv.gz: no rows"),
        (LABELLED[:5], ("smiles", "a", "b"), "split must not be empty; use more data"),
        ([(s, "0", "") for s in SMILES], ("smiles", "a", "b"), "train split must hold a label with both 0 and 1"),
    ],
)
def test_a_malformed_table_is_refused_with_its_place(
    table: Callable[..., Path], rows: list[Row], header: Row, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(table(rows, header))


@pytest.mark.parametrize("cut", [0, 10, 200, -4])
def test_a_truncated_or_empty_file_is_named(table: Callable[..., Path], cut: int) -> None:
    path = table()
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="file.csv.gz(: no rows| is not a readable csv file)"):
        load(path)


def test_a_file_that_is_not_compressed_or_no_text_is_named(table: Callable[..., Path]) -> None:
    path = table()
    path.write_bytes(b"smiles,a\nC,0\n")
    with pytest.raises(ValueError, match="file.csv.gz is not a readable csv file: Not a gzipped file"):
        load(path)
    path = table(name="file.csv")
    path.write_bytes(b"smiles,a\n\xff\xfe,0\n")
    with pytest.raises(ValueError, match="file.csv is not a readable csv file"):
        load(path)


@pytest.mark.parametrize("value", [100, -1, "one", "1,2"])
def test_a_split_must_name_rows_of_the_benchmark(benchmark: Callable[..., Path], value: int | str) -> None:
    with pytest.raises(ValueError, match=rf"valid.csv.gz, row 2: must be one of 0 ... 99, got '{value}'"):
        load(benchmark(valid=[81, value]))


def test_a_missing_source_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load molecules from 'ogbg-molpcba': no such folder or file; give the"):
        get("molpcba").load("ogbg-molpcba", 0)
    with pytest.raises(ValueError, match="mapping/mol.csv.gz does not exist"):
        load(tmp_path)


def test_a_missing_rdkit_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ImportError, match=r"task molpcba needs rdkit: pip install 'rdkit>="):
        get("molpcba").load("ogbg-molpcba", 0)


# Runs


def config(path: Path, **choices: Any) -> Config:
    return Config.of("molpcba", **{"data": str(path), "width": 8, "epochs": 4, "device": "cpu", **choices})


def test_a_run_that_was_stopped_ends_like_one_in_one_go(table: Callable[..., Path], tmp_path: Path) -> None:
    path = table()
    list(train(config(path, dropout=0.3), tmp_path / "one"))
    records = train(config(path, dropout=0.3), tmp_path / "two")
    next(records), next(records)
    records.close()
    list(train(config(path, dropout=0.3), tmp_path / "two"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_sam_trains_and_its_minimum_has_moments(table: Callable[..., Path], tmp_path: Path) -> None:
    list(train(config(table(), optimizer="sam", rho=0.05, label_noise=0.1), tmp_path / "run"))
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["metric"] == "average_precision" and 0 < result["final"]["test_roc_auc"] <= 1
    run = load_run(tmp_path / "run")
    samples, count = run.task.subsample(run.model, run.data.train, 16, 0)
    assert count == 16
    moments = Hessian(run.model, run.task.loss, samples).moments(2)  # the fallback would warn
    assert moments.nonuniformity[2] > 0


def test_a_file_is_found_again_from_another_folder(
    table: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(name="file.csv")
    monkeypatch.chdir(tmp_path)
    assert config(Path("file.csv")).data == str(tmp_path / "file.csv")


def test_real_molecules_are_split_by_scaffold_and_learned(real_data: Path) -> None:
    splits = load(real_data / "molecules" / "tox21.csv.gz")
    parts = [splits.train, splits.validation, splits.test]
    assert sum(map(len, parts)) == 7831 and [len(part) for part in parts[1:]] == [783, 783]
    assert splits.sizes == {"outputs": 12} and all(0.05 < part.targets.nanmean() < 0.1 for part in parts)
    torch.manual_seed(0)
    network = graph_network(16, outputs=12)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for inputs, targets in splits.train[::2].batches(64, torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        MaskedBinaryCrossEntropy()(network(inputs), targets).backward()
        optimizer.step()
    assert get("molpcba").evaluate(network, splits.test).others["roc_auc"] > 0.55
