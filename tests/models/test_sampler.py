"""The sampler against `transformers`' logits warpers, by counting, and its randomness."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from streaming.config import Sampling
from streaming.models import sampler
from streaming.models.sampler import Drawing, SamplerState, sample, uniform

CPU = torch.device("cpu")
DRAWS = 20_000
VOCABULARY = 65


def state_for(*rows: Sampling) -> SamplerState:
    state = SamplerState.allocate(len(rows), CPU)
    for slot, sampling in enumerate(rows):
        state.set(slot, sampling)
    return state


def many(sampling: Sampling, count: int) -> SamplerState:
    """The same options in every row."""
    one = state_for(sampling)
    return SamplerState(*(getattr(one, name).expand(count) for name in ("temperature", "top_k", "top_p", "seed")))


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_temperature_zero_is_argmax_whatever_else_is_set() -> None:
    """Pins a division by zero, and a greedy draw that depends on the seed."""
    logits = random_logits(50, VOCABULARY)
    state = many(Sampling(temperature=0.0, top_k=3, top_p=0.5, seed=7), 50)
    assert torch.equal(sample(logits, state, torch.arange(50)), logits.argmax(dim=-1))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=0),
        Sampling(temperature=0.8, top_k=30),
        Sampling(temperature=2.5, top_k=10),
        Sampling(temperature=1.0, top_k=0, top_p=0.7),
        Sampling(temperature=0.7, top_k=12, top_p=0.9),
        Sampling(temperature=1.3, top_k=1),
        Sampling(temperature=1.0, top_k=1000, top_p=1e-6),
    ],
    ids=str,
)
def test_frequencies_are_the_chances_of_the_published_warpers(sampling: Sampling) -> None:
    """Pins top-p over what top-k already cut, or before the temperature; a token too many or too few in either."""
    logits = random_logits(1, VOCABULARY)
    logits[0, 9] = -torch.inf
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    chance = warpers(torch.zeros(1, 0, dtype=torch.int64), logits.clone()).softmax(dim=-1)[0].double()
    drawn = sample(logits.expand(DRAWS, -1), many(sampling, DRAWS), torch.arange(DRAWS))
    counts = drawn.bincount(minlength=VOCABULARY).double()
    possible = chance > 0
    assert not counts[~possible].any()
    expected = DRAWS * chance[possible]
    chi_square = float(((counts[possible] - expected).square() / expected).sum())
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 1e-9, (chi_square, freedom)


def test_top_p_that_is_met_exactly_keeps_no_token_more() -> None:
    """Pins an edge where `transformers` is exact too: of four equal chances, 0.5 keeps two."""
    logits = torch.zeros(1, 4)
    kept = TopPLogitsWarper(0.5)(torch.zeros(1, 0, dtype=torch.int64), logits.clone()).isfinite().sum()
    drawn = sample(logits.expand(200, -1), many(Sampling(1.0, 0, 0.5), 200), torch.arange(200))
    assert len(drawn.unique()) == kept == 2


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 0.01, 1.0, 10.0])
@pytest.mark.parametrize("top_k", [0, 1, 64, 65])
def test_a_forbidden_token_is_never_drawn(temperature: float, top_k: int) -> None:
    """Pins `</audio>` drawn in the middle of a frame: NaN or a flat distribution at extreme temperatures, top-k wider
    than what is allowed.
    """
    logits = 1000 * random_logits(2000, VOCABULARY)
    logits[:, -1] = -torch.inf
    logits[::2, 3:] = -torch.inf
    drawn = sample(logits, many(Sampling(temperature, top_k), 2000), torch.arange(2000))
    assert logits.gather(1, drawn[:, None]).isfinite().all()
    if temperature <= 1e-4:
        assert (drawn == logits.argmax(dim=-1)).float().mean() > 0.999


def test_a_draw_depends_on_its_own_seed_and_number_alone() -> None:
    """Pins a session whose continuation changes with its slot or its neighbours."""
    logits = random_logits(3, VOCABULARY) / 4
    mine, other = Sampling(seed=11), Sampling(temperature=2.0, top_k=5, top_p=0.3, seed=12)
    alone = [int(sample(logits[:1], state_for(mine), torch.tensor([n]))) for n in range(40)]
    last = [
        int(sample(logits[[2, 1, 0]], state_for(other, other, mine), torch.tensor([5, 9, n]))[2]) for n in range(40)
    ]
    assert alone == last
    assert alone != [int(sample(logits[:1], state_for(Sampling(seed=12)), torch.tensor([n]))) for n in range(40)]
    assert len(set(alone)) > 5


@pytest.mark.parametrize("rounded", [0.0, 0.5, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_edges_of_chance_stay_inside_what_may_be_drawn(
    monkeypatch: pytest.MonkeyPatch, rounded: float, top_p: float
) -> None:
    """Pins a threshold that reaches the total, by rounding in u or in the sums: the draw fell off the end, or on a
    token of chance zero.
    """
    monkeypatch.setattr(sampler, "uniform", lambda seed, number: torch.full(seed.shape, rounded))
    logits = random_logits(5000, VOCABULARY, seed=3)
    logits[:, 40:] = -torch.inf
    ranked = logits.argsort(dim=-1, descending=True)
    rank = (ranked == sample(logits, many(Sampling(1.0, 20, top_p), 5000), torch.arange(5000))[:, None]).int().argmax(1)
    assert int(rank.max()) < 20
    if rounded == 0.0:
        assert not rank.any()
    if rounded > 0.9 and top_p == 1.0:
        assert (rank >= 18).all()  # the last, or beside it where the last one's chance is below a rounding


def test_the_rarest_uniform_never_reaches_one() -> None:
    """Pins u = 1.0 by rounding, which no threshold may be."""
    values = uniform(torch.arange(1_000_000), torch.zeros(1_000_000, dtype=torch.int64))
    assert values.dtype == torch.float32
    assert 0 <= float(values.min()) < 1e-5
    assert 1 - 1e-5 < float(values.max()) < 1


def seeds_near(edge: int, count: int) -> Tensor:
    return edge + torch.arange(count)


@pytest.mark.parametrize("seed", [0, 2**31, 2**62, 2**63 - 300])
def test_neighbouring_seeds_and_numbers_are_uniform_and_independent(seed: int) -> None:
    """Pins the classic mistake of seed + number: session 2 would repeat session 1, one token late."""
    count = 300
    seeds, numbers = torch.meshgrid(seeds_near(seed, count), torch.arange(count), indexing="ij")
    grid = uniform(seeds.flatten(), numbers.flatten()).view(count, count).double()
    counts = torch.histc(grid, 100, 0, 1)
    expected = count * count / 100
    assert float(((counts - expected).square() / expected).sum()) < 99 + 5 * math.sqrt(2 * 99)
    for rows, columns in itertools.product((-1, 0, 1, 2), repeat=2):
        if (rows, columns) != (0, 0):
            shifted = grid.roll((rows, columns), (0, 1))
            correlation = float(np.corrcoef(grid.flatten().numpy(), shifted.flatten().numpy())[0, 1])
            assert abs(correlation) < 5 / count, (rows, columns)
            pairs = torch.histc(((grid * 10).floor() * 10 + (shifted * 10).floor()) / 100 + 0.005, 100, 0, 1)
            assert float(((pairs - expected).square() / expected).sum()) < 99 + 6 * math.sqrt(2 * 99), (rows, columns)
    assert len(grid.unique()) > 0.99 * count * count


def test_every_token_of_a_stream_has_a_random_number_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that come again, in the codebooks of one frame or in the next frame, tie the codes to each other: speech
    that hums, with every test of the frequencies passed.
    """
    numbers: list[Tensor] = []
    real = sampler.sample

    def noted(logits: Tensor, state: SamplerState, number: Tensor, few: bool = False) -> Tensor:
        numbers.append(number.clone())
        return real(logits, state, number, few)

    monkeypatch.setattr(sampler, "sample", noted)
    books, frames = 4, 10
    state = many(Sampling(), 2)
    for frame in range(frames):
        flags = torch.zeros(4, 2, dtype=torch.bool)
        position = torch.tensor([frame, frames + frame])
        codes = torch.zeros(2, books, dtype=torch.int64)
        drawing = Drawing(torch.tensor([1, 0]), position, flags[0], ~flags[1], codes, flags[2], ~flags[3])
        for book in range(books):
            sampler.draw(random_logits(2, VOCABULARY), book, state, drawing, few=False)
    assert torch.cat(numbers).unique().tolist() == list(range(2 * frames * books))


def test_the_end_is_drawn_by_who_speaks_and_no_one_else() -> None:
    """A session that listened stood still for a frame whenever its draw, which nobody wanted, came out as the end."""
    logits = torch.full((2, VOCABULARY), -10.0)
    logits[:, -1] = 10.0
    flags = torch.zeros(2, 2, dtype=torch.bool)
    codes = torch.full((2, 4), 3)
    listening = torch.tensor([True, False])
    drawing = Drawing(
        torch.arange(2), torch.zeros(2, dtype=torch.int64), listening, ~listening, codes, flags[0], ~flags[1]
    )
    fed = sampler.draw(logits, 0, many(Sampling(), 2), drawing, few=True)
    assert drawing.ended.tolist() == [False, True]
    assert codes[0].tolist() == [3, 3, 3, 3] and int(fed[0]) == 3


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_ranking_a_few_tokens_draws_the_same_bits_as_ranking_all(top_p: float) -> None:
    """A session's draws changed when a neighbour's options asked for a full sort."""
    logits = random_logits(400, 2049)
    rows = [Sampling(temperature=0.9, top_k=1 + number % 64, top_p=top_p, seed=number) for number in range(400)]
    number = torch.arange(400)
    few = sample(logits, state_for(*rows), number, few=True)
    assert torch.equal(few, sample(logits, state_for(*rows), number, few=False))
    neighbours = [row if index % 2 else Sampling(top_k=0, seed=index) for index, row in enumerate(rows)]
    mixed = sample(logits, state_for(*neighbours), number, few=False)
    assert torch.equal(mixed[1::2], few[1::2])


def test_equal_logits_are_ranked_by_their_index_and_minus_zero_is_zero() -> None:
    """bfloat16 logits often are equal; which of them made it into the top k was left to the sort."""
    logits = torch.tensor([[-1.0, 0.0, -0.0, 2.0, -torch.inf, 2.0, 0.0, -1.0]]).repeat(1, 20)
    wanted = torch.argsort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(sampler._rank(logits, 160), wanted)
    assert torch.equal(sampler._rank(logits, 30), wanted[:, :30])


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=60))
def test_ranks_are_those_of_a_stable_sort(values: list[float]) -> None:
    logits = torch.tensor([values])
    wanted = torch.argsort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(sampler._rank(logits, len(values)), wanted)
    assert torch.equal(sampler._rank(logits, len(values) // 2), wanted[:, : len(values) // 2])
