"""The noise is as random, and the direction as right, as a stated number of draws can tell.

Every statistic here is a mean of independent terms, compared with its expectation in units of its standard error
(SE). The limit is 5 SE. Seeds are fixed, so a test passes always or never; for a seed drawn afresh a correct
implementation would exceed the limit once in 1.7 million statistics, and an error of 6.3 SE would be found with a
probability of 0.9 (of 7.3 SE: 0.99). Each test says how large its SE is.
"""

import math

import numpy as np
import pytest

from eggroll import EggrollConfig, prng
from eggroll.fitness import shape_fitness
from eggroll.perturbation import (
    dense_noise,
    draw_keys,
    draws_and_signs,
    low_rank_noise,
    parameter_keys,
    stacked_keys,
)
from eggroll.update import direction

pytestmark = pytest.mark.filterwarnings("error")

LIMIT = 5.0
RNGS = pytest.mark.parametrize("rng", ["threefry", "philox"])


def in_standard_errors(terms, expected=0.0):
    """The mean of independent terms along axis 0, less its expectation, in standard errors."""
    error = terms.std(axis=0, ddof=1) / math.sqrt(len(terms))
    return np.abs((terms.mean(axis=0) - expected) / error)


def draws_of(n):
    return np.arange(n, dtype=np.int32)


@RNGS
def test_moments_of_the_normals(rng):
    """2**20 draws. SE: mean 0.001, variance 0.0014, skewness 0.0024, fourth moment 0.0096."""
    z = np.float64(prng.normal(prng.key(1), (2**20,), rng=rng))
    for power, expected in [(1, 0), (2, 1), (3, 0), (4, 3), (6, 15)]:
        assert in_standard_errors(z**power, expected) < LIMIT, power


@RNGS
def test_distribution_of_the_normals(rng):
    """Kolmogorov-Smirnov, 2**18 draws: a distance of 2.73 / sqrt(n) = 0.0053 has a false-alarm rate of 7e-7.

    A distribution function that is off by 0.008 anywhere is found with a probability above 0.99.
    """
    n = 2**18
    z = np.sort(prng.normal(prng.key(2), (n,), rng=rng))
    cdf = np.asarray([0.5 * math.erfc(-x / math.sqrt(2)) for x in z.tolist()])
    places = np.arange(n + 1) / n
    distance = max(np.abs(cdf - places[:-1]).max(), np.abs(cdf - places[1:]).max())
    assert distance < 2.73 / math.sqrt(n)


@RNGS
def test_the_tails_of_the_normals(rng):
    """2**22 draws: P(|z| > 4) = 6.33e-5, 266 expected, SE 16; beyond 2.52, where bfloat16 ends, 1.17 %."""
    z = np.abs(prng.normal(prng.key(3), (2**22,), rng=rng))
    for edge in (2.52, 4.0):
        expected = z.size * math.erfc(edge / math.sqrt(2))
        assert abs((z > edge).sum() - expected) < LIMIT * math.sqrt(expected), edge


@RNGS
def test_bits_are_fair_and_independent(rng):
    """2**18 words: each bit is set, and each pair agrees, half the time; SE 0.002, 528 statistics."""
    words = prng.bits(prng.key(4), (2**18,), rng=rng)
    signs = 2 * ((words[:, None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float32) - 1
    products = signs.T @ signs / len(signs)
    error = 1 / math.sqrt(len(signs))
    assert np.abs(signs.mean(axis=0)).max() < LIMIT * error
    assert np.abs(products - np.eye(32)).max() < LIMIT * error


@RNGS
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_covariance_of_the_low_rank_noise_is_the_identity(rank, rng):
    """E = A @ B.T / sqrt(rank), 3 x 2, 2**17 draws: mean 0, covariance of its six entries the identity.

    SE: means 0.003, variances sqrt(2 + 6 / rank) / 362 = 0.0078 at rank 1, covariances at most 0.0048. Without the
    sqrt(rank) the variances would be off by 1 or more at rank 2, with B in place of A the covariances by 1.
    """
    keys = draw_keys(prng.key(5), 0, draws_of(2**17), EggrollConfig(rank=rank))
    A, B = (np.float64(factor) for factor in low_rank_noise(keys, (3, 2), rank, rng=rng))
    entries = (A @ B.swapaxes(1, 2) / math.sqrt(rank)).reshape(-1, 6)
    assert in_standard_errors(entries).max() < LIMIT
    products = entries[:, :, None] * entries[:, None, :]
    assert in_standard_errors(products, np.eye(6)).max() < LIMIT


def test_neighbours_rows_streams_and_keys_of_philox_are_uncorrelated():
    """Two keys, two streams, three rows of five elements, which lie in two blocks: 60 entries, 1770 correlations.

    Over 2**15 pairs of keys, SE 0.0055 each; of the numbers and of their squares.
    """
    keys = prng.split(prng.key(12), 2**16)
    entries = np.concatenate(
        [prng.normal(keys, (3, 5), rng="philox", stream=stream).reshape(2**15, 30) for stream in (0, 1)], axis=1
    )
    upper = np.triu_indices(60, 1)
    for power, limit in [(1, LIMIT), (2, 1.5 * LIMIT)]:
        correlations = np.corrcoef(np.float64(entries) ** power, rowvar=False)[upper]
        assert len(correlations) == 1770
        assert np.abs(correlations).max() < limit / math.sqrt(2**15)


def test_consecutive_blocks_rows_and_streams_of_philox_are_uncorrelated():
    """One key. Lags 1 to 8 along a row of 2**18 elements, one row with the next, one stream with the next.

    SE 0.002 each; a counter that does not enter a block would give a correlation of 1.
    """
    n, key = 2**18, prng.key(13)
    first, second = (np.float64(row) for row in prng.normal(key, (2, n), rng="philox"))
    other = np.float64(prng.normal(key, (n,), rng="philox", stream=1))
    products = [first[lag:] * first[:-lag] for lag in range(1, 9)] + [first * second, first * other]
    for product in products:
        assert in_standard_errors(product) < LIMIT


N = 2**15


def streams(rng):
    """The noise of 2**15 draws of a (4, 2) matrix at rank 1 and of a vector of 6, in situations that must differ."""
    config = EggrollConfig(population_size=2**20)
    keys = parameter_keys(prng.key(6), ["first.weight", "second.weight"])
    first, second = keys.values()
    layers = stacked_keys(first, (2,))

    def factors(key, generation=0, start=0):
        drawn = low_rank_noise(draw_keys(key, generation, draws_of(N) + start, config), (4, 2), 1, rng=rng)
        return np.concatenate([drawn.A, drawn.B], axis=1)[..., 0]

    return {
        "a parameter": factors(first),
        "another of the same shape": factors(second),
        "the next member": factors(first, start=1),
        "the next generation": factors(first, generation=1),
        "its first layer, if stacked": factors(layers[0]),
        "its second layer": factors(layers[1]),
        "another seed": factors(prng.split(prng.key(7), 2)[0]),
        "its dense noise, of a longer shape": dense_noise(draw_keys(second, 1, draws_of(N), config), (6,), rng=rng),
    }


@RNGS
def test_parameters_members_generations_layers_and_seeds_are_uncorrelated(rng):
    """Entries of eight streams: all 1128 correlations over 2**15 draws, SE 0.0055 each.

    Two streams that share their draws correlate by 1; a leak of one member into another of 3.5 % of its amplitude
    is found with a probability of 0.9.
    """
    entries = np.concatenate(list(streams(rng).values()), axis=1)
    z = (entries - entries.mean(axis=0)) / entries.std(axis=0)
    correlations = z.T @ z / N
    upper = np.triu_indices(entries.shape[1], 1)
    assert len(upper[0]) == 1128
    assert np.abs(correlations[upper]).max() < LIMIT / math.sqrt(N)


@RNGS
def test_uncorrelated_noise_is_not_the_same_noise_with_another_sign(rng):
    """Magnitudes and squares too: 2**15 draws, correlations of z**2 with an SE of 0.0055."""
    entries = np.concatenate(list(streams(rng).values()), axis=1) ** 2
    z = (entries - entries.mean(axis=0)) / entries.std(axis=0)
    correlations = z.T @ z / N
    # Squares of normals have heavy tails: the largest of 1128 reaches further than that of normals would.
    assert np.abs(np.triu(correlations, 1)).max() < 1.5 * LIMIT / math.sqrt(N)


def collisions(words):
    """How many of `words` were there before."""
    ordered = np.sort(words)
    return int((ordered[1:] == ordered[:-1]).sum())


def test_keys_of_a_large_run_collide_no_more_often_than_chance():
    """100 parameters, 2**16 antithetic members, 2 generations: n = 6.6 million keys of 64 bits.

    By chance n**2 / 2**65 = 1.2e-6 pairs collide: one would be a fault. Each 32-bit half by itself should collide
    n**2 / 2**33 = 5000 times, SE 71, which tells a generator of fewer bits, or of too few collisions, apart.
    """
    config = EggrollConfig(population_size=2**16)
    parameters = parameter_keys(prng.key(8), [f"layer{i}.weight" for i in range(100)])
    n = 100 * 2 * config.draws
    keys = np.concatenate(
        [
            draw_keys(key, generation, draws_of(config.draws), config)
            for key in parameters.values()
            for generation in (0, 1)
        ]
    )
    assert collisions(keys.view(np.uint64)[:, 0]) == 0
    expected = n**2 / 2**33
    for half in (0, 1):
        assert abs(collisions(keys[:, half]) - expected) < LIMIT * math.sqrt(expected)


GENERATIONS = 64
MEMBERS = 2**11


def quadratic_directions(low_rank, rank, antithetic, shaping="raw"):
    """The true gradient of a quadratic loss at a point, and the directions of many generations there.

    Fitness is ``-0.5 * ||C @ (W - T)||**2`` of every member, from its own formula, not from the code under test.
    """
    config = EggrollConfig(
        population_size=MEMBERS,
        sigma=0.2,
        rank=rank,
        antithetic=antithetic,
        fitness_shaping=shaping,
        gradient_scale="unbiased",
    )
    rng = np.random.default_rng(9)
    offset, C = rng.normal(size=(4, 3)), rng.normal(size=(5, 4))
    key, directions = prng.key(10), []
    for generation in range(GENERATIONS):
        draws, signs = draws_and_signs(draws_of(MEMBERS), config)
        keys = draw_keys(key, generation, draws, config)
        if low_rank:
            A, B = low_rank_noise(keys, (4, 3), rank)
            noise = np.einsum("nir,njr->nij", A, B) / math.sqrt(rank)
        else:
            noise = dense_noise(keys, (4, 3))
        residual = C @ (offset + config.sigma * signs[:, None, None] * np.float64(noise))
        fitness = -0.5 * (residual**2).sum(axis=(1, 2))
        weights = shape_fitness(fitness, config)
        directions.append(direction(key, (4, 3), generation, weights, config, low_rank=low_rank))
    return C.T @ C @ offset, np.stack(directions)


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize(("low_rank", "rank"), [(True, 1), (True, 3), (False, 1)])
def test_the_mean_direction_is_the_gradient_of_a_quadratic(low_rank, rank, antithetic):
    """64 generations of 2048 members; the gradient's twelve entries, and its length along itself.

    The SE is taken from the spread between generations (t with 63 degrees of freedom: a false alarm in 2e5). Along
    the gradient it is 0.005 to 0.021 of its length: a scale that is off by 13 % is found with a probability of
    0.9 or more, a lost factor 2, sigma or sqrt(rank), or a flipped sign, with near certainty.
    """
    gradient, directions = quadratic_directions(low_rank, rank, antithetic)
    assert in_standard_errors(directions, gradient).max() < LIMIT
    along = (directions * gradient).sum(axis=(1, 2)) / (gradient**2).sum()
    assert in_standard_errors(along, 1.0) < LIMIT
    assert along.std(ddof=1) / math.sqrt(GENERATIONS) < 0.025


@pytest.mark.parametrize("shaping", ["zscore", "group_zscore", "centered_rank", "sign"])
def test_every_shaping_points_along_the_gradient(shaping):
    """Shaping changes the length of the mean direction. Its cosine with the gradient stays near 1.

    Rank 3, 64 x 2048 members. A direction that is turned by more than 8 degrees is found; sampling turns it by less
    than 2.
    """
    gradient, directions = quadratic_directions(True, 3, True, shaping)
    mean = directions.mean(axis=0)
    assert (mean * gradient).sum() / math.sqrt((mean**2).sum() * (gradient**2).sum()) > 0.99
