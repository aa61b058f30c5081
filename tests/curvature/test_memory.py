"""Sizes of memory: as they are asked for, and of graphs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from samlite.curvature.memory import free_in_group, graph_bytes, operations_behind, parse_bytes


@pytest.mark.parametrize(("text", "size"), [(7, 7), ("7", 7), ("2GB", 2**31), ("1.5 kb", 1536), ("3m", 3 * 2**20)])
def test_sizes_are_read_with_their_units(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


def test_a_graph_holds_what_its_operations_saved_and_no_constants() -> None:
    x, w = torch.randn(100, 50), torch.randn(50, 20, requires_grad=True)
    z = (x @ w).tanh()
    held = z.numel() * 4  # tanh saves its result, the product its input
    assert graph_bytes([z], [x, w]) == held
    assert graph_bytes([z], [w]) == held + x.numel() * 4
    assert graph_bytes([z, z, z[:10]], [x, w]) == held  # a storage counts once


def test_views_count_as_much_as_they_show() -> None:
    whole, w = torch.randn(1000, 8), torch.randn(8, 3, requires_grad=True)
    pieces = [piece @ w for piece in whole.split(100)]
    assert graph_bytes([pieces[0]], [w]) == 100 * 8 * 4 + 100 * 3 * 4


def test_an_autograd_function_counts_with_what_it_saved() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, 2 * x)
            return x * x

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return g * ctx.saved_tensors[1]

    x = torch.randn(100, requires_grad=True)
    assert graph_bytes([Square.apply(x)], [x]) == 2 * 400


def test_sparse_matrices_count_with_their_values() -> None:
    graph, x = torch.eye(50).to_sparse(), torch.randn(50, 4, requires_grad=True)
    assert graph_bytes([graph @ x], [x]) == 50 * 4 * 4 + 50 * 4


def test_operations_are_named() -> None:
    names = operations_behind(nn.Linear(2, 2)(torch.ones(1, 2)).tanh().sum())
    assert {"SumBackward0", "TanhBackward0", "torch::autograd::AccumulateGrad"} <= names


@pytest.mark.parametrize("version", [2, 1])
def test_a_limit_on_a_group_of_processes_is_known(tmp_path: Path, version: int) -> None:
    names = {2: ("memory.max", "memory.current", "inactive_file")}
    limit, used, cache = names.get(version, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    assert free_in_group(tmp_path) == 2**62  # no such group
    (tmp_path / used).write_text("700\n")
    (tmp_path / "memory.stat").write_text(f"anon 500\n{cache} 150\n")
    (tmp_path / limit).write_text("1000\n")
    assert free_in_group(tmp_path) == 1000 - (700 - 150)
    if version == 2:
        (tmp_path / limit).write_text("max\n")
        assert free_in_group(tmp_path) == 2**62


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_the_memory_of_eigenvalues_is_told_beforehand() -> None:
    """Of a network whose vectors take 20 MB, in a process of its own."""
    script = """
import threading, time
import torch
from torch import nn
from samlite import Hessian

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

model = nn.Sequential(nn.Linear(1000, 1700), nn.Tanh(), nn.Linear(1700, 1700), nn.Tanh(), nn.Linear(1700, 10))
data = torch.randn(64, 1000), torch.randint(0, 10, (64,))
before, peak = resident(), 0
hessian = Hessian(model, nn.CrossEntropyLoss(), data, memory="400MB")
told = hessian.footprint(1)

def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
hessian.eigenvalues(1, tol=0.1)
print(told.total, peak - before)
print(told)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers, line = done.stdout.splitlines()
    told, taken = map(int, numbers.split())
    assert 0.6 * told <= taken <= 1.1 * told  # what a product takes depends on what autograd frees when
    assert line.startswith("about ") and "basis" in line and "graphs" in line
