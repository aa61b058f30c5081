import pytest
from sweeps import Sweep

from samlite.report.groups import Group, described, groups, method, place, place_columns


def test_runs_that_differ_by_their_seed_alone_form_a_group(sweep: Sweep) -> None:
    for width in (32, 8):
        for seed in range(2):
            sweep.add(0.9, optimizer="sgd", width=width, seed=seed)
            sweep.add(0.9, optimizer="sam", width=width, seed=seed)
    sweep.add(None, optimizer="sgd", width=8, seed=2)  # not finished
    found = groups(sweep.folder)
    assert [(group.width, group.method, len(cells)) for group, cells in found.items()] == [
        (8, "sgd", 2), (8, "sam ρ=0.2", 2), (32, "sgd", 2), (32, "sam ρ=0.2", 2)
    ]  # fmt: skip


def test_a_condition_that_the_sweep_varies_is_part_of_a_group(sweep: Sweep) -> None:
    for noise in (0.5, 0.0):
        sweep.add(0.9, optimizer="sgd", label_noise=noise)
    assert [group.label for group in groups(sweep.folder)] == ["sgd, label noise 0", "sgd, label noise 0.5"]


def test_a_sweep_without_a_finished_run_has_no_groups(sweep: Sweep) -> None:
    sweep.add(None, optimizer="sgd")
    with pytest.raises(ValueError, match="must hold a finished run; repeat its sweep"):
        groups(sweep.folder)


def test_the_place_of_a_result_fills_its_columns() -> None:
    class Result:
        group = Group((("label_noise", 0.25),), 8, "sam", 0.1)
        parameters = 1234

    assert place_columns([Result]) == [">label noise", ">width", ">params", "optimizer"]
    assert place(Result) == ["0.25", "8", "1,234", "sam ρ=0.1"]
    assert method("sgd", None) == "sgd" and described([("sparsity", 0.9)]) == "sparsity 0.9"
