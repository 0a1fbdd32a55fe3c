"""What is random in the model is each member's own, follows from the seed, and does not depend on the chunks."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_backend.support import make_trainer, run_one_by_one, scores

from eggroll.torch import EGGROLLTrainer

MEMBERS = 12
WIDTH = 64


class Random(nn.Module):
    """A model whose output is random alone: its weights are perturbed by next to nothing."""

    def __init__(self, draw: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))
        self._draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self._draw(x + 0 * self.weight)


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, dropout=0.5, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[None], x[None], x[None], need_weights=self.need_weights)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.layers = kind(WIDTH, 8, 2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[0]


def draws(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Random(function)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout": draws(lambda x: F.dropout(x, 0.3)),
    "nn.Dropout in place": lambda: nn.Sequential(nn.Linear(WIDTH, 32), nn.Dropout(0.5, inplace=True)),
    "alpha dropout": draws(lambda x: F.alpha_dropout(x, 0.3, True)),
    "feature alpha dropout": draws(lambda x: F.feature_alpha_dropout(x.view(4, -1, 4), 0.3, True)),
    "rand": draws(lambda x: x + torch.rand(WIDTH)),
    "rand of a size": draws(lambda x: x + torch.rand(size=(WIDTH,), dtype=torch.float64)),
    "randn": draws(lambda x: x + torch.randn(*x.shape)),
    "rand_like": draws(lambda x: torch.rand_like(x)),
    "randn_like": draws(lambda x: torch.randn_like(x, dtype=torch.float64)),
    "bernoulli": draws(lambda x: torch.bernoulli(torch.sigmoid(x))),
    "bernoulli method": draws(lambda x: x.bernoulli(0.4)),
    "normal": draws(lambda x: torch.distributions.Normal(x, 1.0).sample()),
    "categorical": draws(lambda x: torch.distributions.Categorical(logits=x).sample((5,)).float()),
    "multinomial": draws(lambda x: torch.multinomial(torch.softmax(x, -1), 9).float()),
    "randperm": draws(lambda x: x + torch.randperm(WIDTH)),
    "randint": draws(lambda x: x + torch.randint(5, 10**6, (WIDTH,))),
    "randint_like": draws(lambda x: torch.randint_like(x, 10**6)),
    "uniform_": draws(lambda x: torch.empty_like(x).uniform_(-1, 3)),
    "normal_": draws(lambda x: torch.empty_like(x).normal_()),
    "random_": draws(lambda x: torch.empty_like(x).random_(1000)),
    "random_, between": draws(lambda x: torch.empty_like(x).random_(5, to=1000)),
    "torch.dropout_": draws(lambda x: torch.dropout_(x * 1, 0.5, True)),
    "bernoulli_": draws(lambda x: torch.empty_like(x).bernoulli_(0.3)),
    "exponential_": draws(lambda x: torch.empty_like(x).exponential_(2.0)),
    "gumbel": draws(lambda x: torch.distributions.Gumbel(x, 1.0).sample()),
    "gumbel softmax": draws(lambda x: F.gumbel_softmax(x)),
    "relaxed categorical": draws(lambda x: torch.distributions.RelaxedOneHotCategorical(1.0, logits=x).rsample()),
    "attention": draws(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5, is_causal=True, scale=0.1)),
    "multi-head attention": lambda: SelfAttention(False),
    "multi-head attention with weights": lambda: SelfAttention(True),
    "transformer layer": lambda: nn.TransformerEncoderLayer(WIDTH, 4, 16, dropout=0.5),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
}
X = torch.linspace(-2, 2, 5 * WIDTH).view(5, WIDTH)


def trainer_of(model: nn.Module, **options: Any) -> EGGROLLTrainer:
    defaults = {"population_size": MEMBERS, "sigma": 1e-6, "noise_reuse": 2, "seed": 4}
    return EGGROLLTrainer(model.parameters(), model=model, **{**defaults, **options})


def model_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]().train()


def outputs_of(name: str, one_by_one: bool = False, **options: Any) -> Tensor:
    trainer = trainer_of(model_of(name), **options)
    if one_by_one:
        run_one_by_one(trainer)
    return trainer.ask()(X)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def differing(outputs: Tensor) -> int:
    """How many members are unlike the first by more than their weights are."""
    return sum(float((member - outputs[0]).abs().max()) > 1e-2 for member in outputs[1:])


@pytest.mark.parametrize("name", MODELS)
def test_members_differ_and_chunks_do_not_matter(name: str) -> None:
    whole = outputs_of(name)
    assert differing(whole) == MEMBERS - 1
    for chunk_size in (2, 8):
        assert_same(outputs_of(name, chunk_size=chunk_size), whole)
    assert_same(outputs_of(name, one_by_one=True), whole)


@pytest.mark.parametrize("name", MODELS)
def test_randomness_follows_from_the_seed_and_the_generation(name: str) -> None:
    trainer = trainer_of(model_of(name))
    state = torch.get_rng_state()
    first = trainer.ask()(X)
    torch.manual_seed(1234)
    assert torch.equal(first, outputs_of(name))
    torch.set_rng_state(state)
    assert differing(torch.stack([first[3], outputs_of(name, seed=5)[3]])) == 1
    trainer.tell(scores(MEMBERS))
    with torch.no_grad():
        for parameter, original in zip(trainer.model.parameters(), model_of(name).parameters(), strict=True):
            parameter.copy_(original)
    assert differing(torch.stack([first[3], trainer.ask()(X)[3]])) == 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["vectorised", "one by one"])
def test_the_same_randomness_for_all_members(name: str, chunk_size: int | None, one_by_one: bool) -> None:
    outputs = outputs_of(name, randomness="same", chunk_size=chunk_size, one_by_one=one_by_one)
    assert differing(outputs) == 0
    assert differing(torch.stack([outputs[0], outputs_of(name, randomness="same", seed=5)[0]])) == 1


# torch.poisson has no answer of its own: it draws from the generator, which is seeded for each chunk.
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_what_draws_from_the_generator_is_reproducible(randomness: str) -> None:
    def run() -> Tensor:
        model = Random(lambda x: torch.poisson(x + 9))
        return trainer_of(model, randomness=randomness, chunk_size=4).ask()(X)

    first = run()
    torch.rand(7)
    assert torch.equal(run(), first)
    assert (differing(first) == 0) == (randomness == "same")


@pytest.mark.parametrize("name", ["dropout", "randn", "LSTM", "attention"])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["vectorised", "one by one"])
def test_the_global_generator_is_left_alone(name: str, one_by_one: bool) -> None:
    trainer = trainer_of(model_of(name), chunk_size=4)
    if one_by_one:
        run_one_by_one(trainer)
    before = torch.get_rng_state()
    trainer.ask()(X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_keeps_at_its_rate_and_scales(rate: float) -> None:
    model = Random(lambda x: F.dropout(x, rate))
    outputs = trainer_of(model).ask()(torch.ones(100, WIDTH))
    kept = outputs != 0
    assert abs(float(kept.float().mean()) - (1 - rate)) < 0.01
    if rate < 1:
        torch.testing.assert_close(outputs[kept], torch.full_like(outputs[kept], 1 / (1 - rate)))
    shares = kept.float().mean((1, 2))
    assert float((shares - (1 - rate)).abs().max()) < 0.03


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_scales_in_the_dtype_of_its_input(dtype: torch.dtype, default: torch.dtype) -> None:
    population = trainer_of(Random(lambda x: F.dropout(x.to(dtype), 0.1))).ask()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        outputs = population(torch.ones(10, WIDTH, dtype=torch.float32))
    finally:
        torch.set_default_dtype(before)
    kept = outputs[outputs != 0]
    assert torch.equal(kept, torch.full_like(kept, 1 / 0.9))


def test_dropout_of_members_is_independent_and_layers_differ() -> None:
    model = Random(lambda x: torch.stack([F.dropout(x, 0.5), F.dropout(x, 0.5)]))
    kept = (trainer_of(model).ask()(torch.ones(100, WIDTH)) != 0).flatten(2).float()
    masks = kept.flatten(0, 1)  # of every member and layer
    correlation = torch.corrcoef(masks) - torch.eye(len(masks))
    assert float(correlation.abs().max()) < 0.07  # 5.5 standard deviations of 6400 independent coins


def test_eval_mode_drops_nothing() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.5)).eval()
    assert float((trainer_of(model).ask()(torch.ones(3, WIDTH)) == 0).sum()) == 0


@pytest.mark.parametrize(
    ("function", "shape"), [(F.dropout1d, (6, 8, 9)), (F.dropout2d, (6, 8, 3, 3)), (F.dropout3d, (6, 8, 2, 2, 2))]
)
def test_channel_dropout_drops_whole_channels(function: Any, shape: tuple[int, ...]) -> None:
    model = Random(lambda x: function(torch.ones(shape) + 0 * x.sum(), 0.5))
    outputs = trainer_of(model).ask()(X)
    kept = (outputs.flatten(3) != 0).float().mean(-1)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(float(kept.mean()) - 0.5) < 0.1
    assert differing(outputs) == MEMBERS - 1


MOMENTS = [
    ("rand", lambda x: torch.rand(5000), 0.5, 12**-0.5),
    ("randn", lambda x: torch.randn(5000), 0.0, 1.0),
    ("normal", lambda x: torch.normal(torch.full((5000,), 3.0), 2.0), 3.0, 2.0),
    ("bernoulli", lambda x: torch.bernoulli(torch.full((5000,), 0.2)), 0.2, 0.4),
    ("uniform_", lambda x: torch.empty(5000).uniform_(-1, 3), 1.0, 4 * 12**-0.5),
    ("normal_", lambda x: torch.empty(5000).normal_(mean=2.0), 2.0, 1.0),
    ("bernoulli_", lambda x: torch.empty(5000).bernoulli_(torch.full((5000,), 0.2)), 0.2, 0.4),
    ("exponential_", lambda x: torch.empty(5000).exponential_(0.5), 2.0, 2.0),
    ("randint", lambda x: torch.randint(-2, 3, size=(5000,)).float(), 0.0, 2**0.5),
    ("randint to a bound", lambda x: torch.randint(high=5, size=[5000]).float(), 2.0, 2**0.5),
    ("randint_like", lambda x: torch.randint_like(torch.empty(5000), low=1, high=6), 3.0, 2**0.5),
    ("randperm", lambda x: torch.randperm(5000).float(), 2499.5, 5000 * 12**-0.5),
    ("alpha dropout", lambda x: F.alpha_dropout(torch.arange(5000.0) % 2 * 2 - 1, 0.3, True), 0.0, 1.0),
]


@pytest.mark.parametrize(("draw", "mean", "std"), [row[1:] for row in MOMENTS], ids=[row[0] for row in MOMENTS])
def test_moments(draw: Callable[[Tensor], Tensor], mean: float, std: float) -> None:
    outputs = trainer_of(Random(lambda x: draw(x) + 0 * x.sum())).ask()(X)
    assert torch.isfinite(outputs).all()
    assert abs(float(outputs.mean()) - mean) < 5 * std / (MEMBERS * 5000) ** 0.5
    assert abs(float(outputs.std()) - std) < 0.02 * std


SHAPE = (4, 50)
CALLS: dict[str, Callable[[], Tensor]] = {
    "randint high": lambda: torch.randint(7, SHAPE),
    "randint low high": lambda: torch.randint(5, 10, SHAPE),
    "randint low, high named": lambda: torch.randint(5, high=10, size=SHAPE),
    "randint named": lambda: torch.randint(low=5, high=10, size=SHAPE),
    "randint high, low named": lambda: torch.randint(high=10, low=5, size=list(SHAPE), dtype=torch.int8),
    "randint far up": lambda: torch.randint(2**60, 2**60 + 10, SHAPE) - 2**60,
    "randint of no dtype": lambda: torch.randint(10, SHAPE, dtype=None),
    "randint_like": lambda: torch.randint_like(torch.zeros(SHAPE), 5, high=10),
    "randperm": lambda: torch.randperm(200, dtype=torch.int16),
    "rand half": lambda: torch.rand(SHAPE, dtype=torch.float16),
    "rand_like": lambda: torch.rand_like(torch.zeros(SHAPE), dtype=torch.bfloat16),
    "uniform_": lambda: torch.zeros(SHAPE).uniform_(2, to=3),
    "normal": lambda: torch.normal(3.0, 1.0, SHAPE, dtype=torch.float64),
    "normal of tensors": lambda: torch.normal(torch.full(SHAPE, 3.0), torch.tensor(1.0)),
    "normal_": lambda: torch.zeros(SHAPE).normal_(3, std=1),
    "bernoulli_": lambda: torch.zeros(SHAPE, dtype=torch.int64).bernoulli_(0.5),
    "exponential_": lambda: torch.zeros(SHAPE, dtype=torch.float64).exponential_(lambd=4),
    "gumbel softmax": lambda: F.gumbel_softmax(torch.zeros(SHAPE, dtype=torch.float64), 0.5, True, dim=0),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_call_it_means_what_it_means_in_pytorch(name: str) -> None:
    expected = CALLS[name]()
    drawn = trainer_of(Random(lambda x: CALLS[name]() + 0 * x.sum().to(expected.dtype))).ask()(X)
    assert drawn.dtype == expected.dtype
    assert drawn.shape == (MEMBERS, *expected.shape)
    assert differing(drawn.double()) == MEMBERS - 1
    # Of 200 numbers the middle, and the spread, of 12 times as many others.
    middle, spread = expected.double().mean(), expected.double().std()
    assert abs(float(drawn.double().mean() - middle)) < 0.5 * float(spread)
    assert 0.6 < float(drawn.double().std() / spread) < 1.6


WRONG: list[Callable[[], Tensor]] = [
    lambda: torch.zeros(3).bernoulli_(2.0),
    lambda: torch.zeros(3).exponential_(-1),
    lambda: torch.zeros(3).normal_(0, -1),
    lambda: torch.zeros(3).uniform_(3, 1),
    lambda: torch.zeros(3, dtype=torch.int64).uniform_(),
    lambda: torch.normal(0.0, -1.0, (3,)),
    lambda: torch.rand(3, dtype=torch.int64),
    lambda: torch.randint(0, 300, (3,), dtype=torch.uint8),
    lambda: torch.randint(5, 5, (3,)),
    lambda: torch.randperm(300, dtype=torch.int8),
]


@pytest.mark.parametrize("draw", WRONG)
def test_what_pytorch_refuses_is_refused_in_its_words(draw: Callable[[], Tensor]) -> None:
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        draw()
    with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value).splitlines()[0])):
        trainer_of(Random(lambda x: draw() + 0 * x.sum())).ask()(X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_numbers_of_a_narrow_dtype_stay_below_1(dtype: torch.dtype) -> None:
    for draw in (lambda: torch.rand(20_000, dtype=dtype), lambda: torch.rand_like(torch.zeros(20_000, dtype=dtype))):
        drawn = trainer_of(Random(lambda x, draw=draw: draw() + 0 * x.sum().to(dtype))).ask()(X)
        assert drawn.dtype == dtype
        assert 0.99 < float(drawn.max()) < 1
        assert abs(float(drawn.double().mean()) - 0.5) < 0.01


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), lambda: torch.empty(()).uniform_()])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_single_number(draw: Callable[[], Tensor], one_by_one: bool) -> None:
    trainer = trainer_of(Random(lambda x: x + draw()))
    if one_by_one:
        run_one_by_one(trainer)
    assert differing(trainer.ask()(X)) == MEMBERS - 1


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), lambda: torch.randint(10**6, ())])
def test_a_vmap_in_the_model_has_its_own_draws(draw: Callable[[], Tensor]) -> None:
    def entries(x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row.sum() * 0 + draw(), randomness="different")(x)

    drawn = trainer_of(Random(entries)).ask()(X)
    assert drawn.unique().numel() == MEMBERS * len(X)


def test_permutations_are_permutations() -> None:
    drawn = trainer_of(Random(lambda x: torch.randperm(50) + 0 * x.sum().long())).ask()(X)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn.sort(-1).values, torch.arange(50).expand(MEMBERS, 50))


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_draws_by_the_logits(hard: bool) -> None:
    shares = torch.tensor([0.1, 0.3, 0.6])
    model = Random(lambda x: F.gumbel_softmax(shares.log().expand(5000, 3), 0.5, hard) + 0 * x.sum())
    drawn = trainer_of(model).ask()(X)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(MEMBERS, 5000))
    if hard:
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
    first = torch.bincount(drawn.argmax(-1).flatten(), minlength=3) / (MEMBERS * 5000)
    torch.testing.assert_close(first, shares, atol=0.012, rtol=0)


@pytest.mark.parametrize("replacement", [False, True])
def test_multinomial_draws_by_weight(replacement: bool) -> None:
    weights = torch.tensor([0.0, 1.0, 3.0, 4.0])
    model = Random(lambda x: torch.multinomial(weights.expand(3000, 4), 2, replacement) + 0 * x.sum().long())
    drawn = trainer_of(model).ask()(X)
    assert int(drawn.min()) > 0
    first = torch.bincount(drawn[..., 0].flatten(), minlength=4) / drawn[..., 0].numel()
    torch.testing.assert_close(first, weights / 8, atol=0.015, rtol=0)
    assert bool((drawn[..., 0] == drawn[..., 1]).any()) == replacement


def test_a_generator_of_the_users_own_is_used() -> None:
    def draw(x: Tensor) -> Tensor:
        return x + torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))

    outputs = trainer_of(Random(draw), randomness="same").ask()(X)
    assert_same(outputs[2], draw(X))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_fitness_fn_draws_by_the_seed(randomness: str) -> None:
    seen: list[list[float]] = []

    def fitness_fn(model: nn.Module) -> float:
        seen[-1].append(float(F.dropout(torch.ones(50)).sum() + torch.rand(())))
        return float(model(X).sum())

    for _ in range(2):
        seen.append([])
        trainer = make_trainer(nn.Linear(WIDTH, 2), fitness_fn=fitness_fn, randomness=randomness, seed=0)
        before = torch.get_rng_state()
        trainer.train(2, verbose=False)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == (2 if randomness == "same" else 16)


def test_the_generator_of_the_noise_leaves_the_randomness_of_the_model_alone() -> None:
    """Dropout of a model whose weight is not perturbed: Threefry's, whatever draws the noise of the rest."""
    outputs = []
    for rng in ("threefry", "philox"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        trainer = make_trainer(model, noise={"0.*": "frozen"}, sigma=1e-6, rng=rng)
        outputs.append(trainer.ask()(torch.ones(4, 3)))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=0)
    assert not torch.equal(outputs[0], outputs[1])
