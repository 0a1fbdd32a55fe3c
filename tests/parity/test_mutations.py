"""Each classical mistake, patched into a backend, makes the command fail, on the lines where it belongs."""

import json
import math
from types import SimpleNamespace

import pytest

from eggroll import perturbation, update
from eggroll.parity.cli import main

LINES = "keys,bits,philox,signs,factors,dense noise,population outputs: MLP,direction: MLP,10 generations"


def verdicts(tmp_path, backend, only=LINES):
    table = tmp_path / "table.json"
    status = main(["--quick", "--backends", backend, "--only", only, "--json", str(table)])
    rows = json.loads(table.read_text())["rows"]
    return status, {row["quantity"].partition(",")[0]: row["verdict"] for row in rows}


def flipped(members, config):
    draws, signs = perturbation.draws_and_signs(members, config)
    return draws, -signs


def without_root(config, *, low_rank, sigma=None, rank=None):
    scale = update.direction_scale(config, low_rank=low_rank, sigma=sigma, rank=rank)
    return scale * math.sqrt(rank or config.rank) if low_rank else scale


def with_changes(module, **changes):
    """What a module holds, some of it changed, without touching the module that others use."""
    return SimpleNamespace(**{**vars(module), **changes})


def torch_flip_sign(patch):
    import eggroll_torch.noise as noise

    patch.setattr(noise, "perturbation", with_changes(perturbation, draws_and_signs=flipped))


def torch_swap_factors(patch):
    import torch

    import eggroll_torch.noise as noise

    right = noise._RowLayout.draw

    def draw(self, keys):
        found = right(self, keys)
        for name, one in found.items():
            if isinstance(one, perturbation.LowRank):
                both = torch.cat([one.B, one.A], dim=-2)
                rows = one.A.shape[-2]
                found[name] = perturbation.LowRank(A=both[..., :rows, :], B=both[..., rows:, :])
        return found

    patch.setattr(noise._RowLayout, "draw", draw)


def torch_drop_root(patch):
    import eggroll_torch.parameters as parameters

    patch.setattr(parameters.ParameterNoise, "scale", property(lambda parameter: parameter.sigma))


def torch_drop_root_in_update(patch):
    import eggroll_torch.update

    patch.setattr(eggroll_torch.update, "direction_scale", without_root)


def torch_same_key(patch):
    import eggroll_torch.parameters
    import eggroll_torch.trainer

    right = eggroll_torch.parameters.model_keys

    def same(model, base_key):
        keys = right(model, base_key)
        first, second, *_ = [name for name in keys if name.endswith("weight")]
        return {**keys, second: keys[first]}

    patch.setattr(eggroll_torch.parameters, "model_keys", same)
    patch.setattr(eggroll_torch.trainer, "model_keys", same)


def torch_reuse_noise(patch):
    import eggroll_torch.noise as noise

    right = noise._generation_keys

    def first(parameters, keys, generation, config):
        return right(parameters, keys, 0, config)

    patch.setattr(noise, "_generation_keys", first)


def torch_philox_of_seven_rounds(patch):
    from eggroll_torch import philox, threefry

    patch.setattr(threefry, "compiled_for_cpu", lambda: None)
    patch.setattr(philox, "ROUNDS", 7)


def torch_philox_of_one_row(patch):
    import eggroll_torch.drawing as drawing

    right = drawing._runs

    def first_row(draws, shapes):
        runs, bounds = right(draws, shapes)
        runs[:, 1] = 0
        return runs, bounds

    patch.setattr(drawing, "_runs", first_row)


def torch_swap_streams(patch):
    import eggroll_torch.parameters as parameters

    def swapped(shape, rank, rng):
        draws = perturbation.low_rank_draws(shape, rank, rng)
        return tuple(draw._replace(stream=len(draws) - 1 - place) for place, draw in enumerate(draws))

    patch.setattr(parameters, "perturbation", with_changes(perturbation, low_rank_draws=swapped))


def jax_swap_key_words(patch):
    import eggroll_jax.philox as philox

    right = philox.bits
    patch.setattr(philox, "bits", lambda k0, k1, *counter: right(k1, k0, *counter))


def jax_flip_sign(patch):
    import eggroll_jax.population

    patch.setattr(eggroll_jax.population, "draws_and_signs", flipped)


def jax_swap_factors(patch):
    import eggroll_jax.draws as draws

    def swapped(drawn, in_features):
        (both,) = drawn
        out_features = both.shape[-2] - in_features
        return perturbation.LowRank(A=both[..., :out_features, :], B=both[..., out_features:, :])

    patch.setattr(draws, "factors_of", swapped)


def jax_drop_root(patch):
    import eggroll_jax.population

    patch.setattr(eggroll_jax.population, "math", with_changes(math, sqrt=lambda x: 1.0))


def jax_drop_root_in_update(patch):
    import eggroll_jax.direction

    patch.setattr(eggroll_jax.direction, "direction_scale", without_root)


def jax_same_key(patch):
    import eggroll_jax.draws as draws

    right = draws.split

    def same(key, n):
        keys = right(key, n)
        return keys.at[1].set(keys[0])

    patch.setattr(draws, "split", same)


def jax_reuse_noise(patch):
    import eggroll_jax.direction
    import eggroll_jax.draws as draws
    import eggroll_jax.population

    def same(chosen, key, generation, config):
        return draws.generation_keys(chosen, key, 0, config)

    patch.setattr(eggroll_jax.population, "generation_keys", same)
    patch.setattr(eggroll_jax.direction, "generation_keys", same)


OUTPUTS, DIRECTION, TRAINING = "population outputs: MLP", "direction: MLP", "10 generations of training: sgd"


@pytest.mark.parametrize(
    ("mutate", "red"),
    [
        (torch_flip_sign, {"signs", OUTPUTS, DIRECTION}),
        (torch_swap_factors, {"factors A", "factors B", OUTPUTS, DIRECTION, TRAINING}),
        (torch_drop_root, {OUTPUTS, TRAINING}),
        (torch_drop_root_in_update, {DIRECTION, TRAINING}),
        (torch_same_key, {"keys: parameters of the MLP", OUTPUTS, DIRECTION, TRAINING}),
        (torch_philox_of_seven_rounds, {"philox bits", "philox factors A", "philox dense noise"}),
        (torch_philox_of_one_row, {"philox bits", "philox factors A", "philox factors B"}),
        (torch_swap_streams, {"philox factors A", "philox factors B"}),
        (torch_reuse_noise, {"factors A", "factors B", "dense noise", OUTPUTS, DIRECTION, TRAINING}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_mistake_in_the_torch_backend_is_red(mutate, red, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    mutate(monkeypatch)
    status, found = verdicts(tmp_path, "torch-cpu")
    assert status == 1
    assert {line for line in red if found[line] != "FAIL"} == set()
    assert found["bits"] == "pass"


@pytest.mark.parametrize(
    ("mutate", "only", "red"),
    [
        (jax_swap_key_words, "philox bits", "philox bits"),
        (jax_flip_sign, OUTPUTS, OUTPUTS),
        (jax_swap_factors, DIRECTION, DIRECTION),
        (jax_drop_root, OUTPUTS, OUTPUTS),
        (jax_drop_root_in_update, DIRECTION, DIRECTION),
        (jax_same_key, DIRECTION, DIRECTION),
        (jax_reuse_noise, TRAINING, TRAINING),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.usefixtures("quick_compilation")
def test_a_mistake_in_the_jax_backend_is_red(mutate, only, red, monkeypatch, tmp_path):
    mutate(monkeypatch)
    status, found = verdicts(tmp_path, "jax-cpu", f"bits,{only}")
    assert status == 1
    assert (found["bits"], found[red]) == ("pass", "FAIL")


def test_without_a_mistake_all_of_these_lines_are_green(tmp_path):
    pytest.importorskip("torch")
    status, found = verdicts(tmp_path, "torch-cpu")
    assert status == 0
    assert set(found.values()) == {"pass"}
    assert {OUTPUTS, DIRECTION, TRAINING, "signs", "factors A", "dense noise", "philox factors A"} <= set(found)
