import torch

from samlite.seeds import generator


def draw(purpose: str, seed: int) -> torch.Tensor:
    return torch.randn(1000, generator=generator(purpose, seed))


def test_a_purpose_and_a_seed_give_the_same_numbers_every_time() -> None:
    assert torch.equal(draw("masks", 3), draw("masks", 3))


def test_streams_of_other_purposes_and_seeds_are_independent() -> None:
    streams = torch.stack([draw(purpose, seed) for purpose in ("masks", "noise", "order") for seed in range(3)])
    correlations = torch.corrcoef(streams) - torch.eye(9)
    assert correlations.abs().max() < 4 / 1000**0.5  # four standard errors of an uncorrelated pair


def test_no_stream_is_that_of_the_bare_seed() -> None:
    bare = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(draw("masks", 3), bare)
