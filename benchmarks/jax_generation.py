"""A whole generation in JAX: this library against the same generation written in the reference's way.

    python benchmarks/jax_generation.py [--repeats 15] [--out docs/benchmarks]

The baseline draws a member's noise inside its forward pass, for every thread anew, and again for the whole
population at once in the update, with `jax.random`. Full-rank ES in the same way is timed on W1: three runs of half a
minute on 2 cores, which take 5 GiB; `--no-full-rank` leaves them out. Writes ``jax_generation.json``, ``.md`` and
``.png``.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
from processor import processor

from eggroll import EggrollConfig
from eggroll.jax import es_value_and_grad

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIGMA, RATE = 0.05, 0.1
KEY = jax.random.key(0)
OURS, WHOLE, BASELINE = "eggroll.jax", "all at once", "reference's way"
FULL_RANK = "full-rank ES, reference's way"


# The models, as functions of a parameter tree and of how a matrix multiplies


def mlp(mm, vector, params, x):
    layers = sorted(params)
    for layer in layers:
        x = mm(x, params[layer]["weight"], (layer, "weight")) + vector(params[layer]["bias"], (layer, "bias"))
        x = jax.nn.relu(x) if layer != layers[-1] else x
    return x


def transformer(mm, vector, params, x):
    for layer in sorted(params):
        own = params[layer]

        def norm(name, x, own=own, layer=layer):
            centered = x - jnp.mean(x, -1, keepdims=True)
            scaled = centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5)
            return scaled * vector(own[name], (layer, name))

        def linear(name, x, own=own, layer=layer):
            return mm(x, own[name], (layer, name))

        h = norm("norm1", x)
        q, k, v = (linear(name, h).reshape(*h.shape[:-1], 8, -1) for name in ("q", "k", "v"))
        x = x + linear("o", jax.nn.dot_product_attention(q, k, v).reshape(h.shape))
        x = x + linear("down", jax.nn.gelu(linear("up", norm("norm2", x))))
    return x


def mlp_params(sizes):
    return {
        str(place): {
            "bias": jnp.zeros(after),
            "weight": jax.random.normal(jax.random.key(place), (after, before)) / math.sqrt(before),
        }
        for place, (before, after) in enumerate(itertools.pairwise(sizes))
    }


def transformer_params(layers, d):
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}
    return {
        str(layer): {
            "norm1": jnp.ones(d),
            "norm2": jnp.ones(d),
            **{
                name: jax.random.normal(jax.random.fold_in(KEY, 10 * layer + place), shape) / math.sqrt(shape[1])
                for place, (name, shape) in enumerate(shapes.items())
            },
        }
        for layer in range(layers)
    }


def fitness_of(model):
    def fitness(mm, vector, params, x):
        return -jnp.mean((model(mm, vector, params, x) - 0.5) ** 2)

    return fitness


# What, the model, its parameters, the shape of the inputs, members
WORKLOADS = {
    "W1": ("MLP 784-256-256-10, 1024 members x 32 shared inputs, rank 1", mlp,
           lambda: mlp_params([784, 256, 256, 10]), (32, 784), 1024),
    "W5": ("Transformer of 4 layers, d=256, 64 members x 4 x 64 tokens, rank 1", transformer,
           lambda: transformer_params(4, 256), (4, 64, 256), 64),
}  # fmt: skip


# The generations


def inference(model, members):
    """Pure batched inference of the unperturbed model, on rows of its own for each member."""

    def forward(params, generation, x):
        rows = jnp.broadcast_to(x, (members, *x.shape)) + jnp.arange(members).reshape(-1, *[1] * x.ndim)
        scores = jax.vmap(lambda x: fitness_of(model)(lambda x, w, _: x @ w.T, lambda v, _: v, params, x))(rows)
        return params, scores + generation

    return forward


def ours(model, members, batch_size="auto"):
    config = EggrollConfig(population_size=members, sigma=SIGMA)

    def fitness(params, x):
        return fitness_of(model)(lambda x, w, _: x @ w.T, lambda v, _: v, params, x)

    step = es_value_and_grad(fitness, config, maximize=True, batch_size=batch_size, strict=True)

    def generation(params, number, x):
        value, gradient = step(params, KEY, number, x)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradient), value

    return generation


def reference_way(model, members, full_rank=False):
    """Every thread draws its own noise where it is used; the update draws that of all threads again."""

    def dense(shape):
        return full_rank or len(shape) == 1

    def factors(key, shape, number, thread):
        key = jax.random.fold_in(jax.random.fold_in(key, number), thread // 2)
        sign = jnp.where(thread % 2 == 0, 1.0, -1.0)
        if dense(shape):
            return sign * SIGMA * jax.random.normal(key, shape)
        both = jax.random.normal(key, (sum(shape), 1))
        return sign * SIGMA * both[shape[1] :], both[: shape[1]]

    def generation(params, number, x):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.tree.unflatten(treedef, list(jax.random.split(KEY, len(leaves))))

        def score(thread):
            def mm(x, w, path):
                if dense(w.shape):
                    return x @ vector(w, path).T
                a, b = factors(keys[path[0]][path[1]], w.shape, number, thread)
                return x @ w.T + (x @ b) @ a.T

            def vector(v, path):
                return v + factors(keys[path[0]][path[1]], v.shape, number, thread)

            return fitness_of(model)(mm, vector, params, x)

        threads = jnp.arange(members)
        scores = jax.vmap(score)(threads)
        weights = (scores - scores.mean()) / jnp.sqrt(scores.var() + 1e-5)

        def update(p, key):
            noise = jax.vmap(lambda thread: factors(key, p.shape, number, thread))(threads)
            if dense(p.shape):
                mean = jnp.tensordot(weights, noise, axes=1) / members
            else:
                mean = jnp.einsum("nir,njr->ij", weights[:, None, None] * noise[0], noise[1]) / members
            return p + RATE * math.sqrt(members) * mean

        return jax.tree.map(update, params, keys), scores.mean()

    return generation


def measure(functions, arguments, repeats):
    """Median milliseconds of each, of the clock and of all cores together, taken in turns.

    On a machine that others use the clock runs on while the cores do not: the second figure is then the truer one.
    """
    compiled = {name: jax.jit(function).lower(*arguments).compile() for name, function in functions.items()}
    times = {name: ([], []) for name in compiled}
    for repeat in range(repeats + 2):
        for name, run in compiled.items():
            clock, cores = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(*arguments))
            if repeat >= 2:
                times[name][0].append(1e3 * (time.perf_counter() - clock))
                times[name][1].append(1e3 * (time.process_time() - cores))
    return [{name: statistics.median(both[which]) for name, both in times.items()} for which in (0, 1)]


def agreement(functions, arguments):
    """The largest difference of the parameters after one generation, relative to the largest step."""
    params = arguments[0]
    after = [jax.jit(functions[name])(*arguments)[0] for name in (OURS, WHOLE, BASELINE)]
    *steps, expected = [jax.tree.leaves(jax.tree.map(jnp.subtract, tree, params)) for tree in after]
    gap = max(float(jnp.abs(a - b).max()) for step in steps for a, b in zip(step, expected, strict=True))
    return gap / max(float(jnp.abs(leaf).max()) for leaf in expected)


def rounded(values):
    return {name: round(value, 2) for name, value in values.items()}


def memory(populations):
    """Peak bytes of temporaries of a compiled generation of a small MLP, by the compiler's own account."""
    params, x = mlp_params([64, 64, 8]), jnp.ones((8, 64))
    result = {}
    for members in populations:
        for name, chunk in ((OURS, "auto"), ("128 at a time", 128), (WHOLE, None)):
            compiled = jax.jit(ours(mlp, members, chunk)).lower(params, 0, x).compile()
            result.setdefault(name, {})[members] = compiled.memory_analysis().temp_size_in_bytes
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "benchmarks")
    parser.add_argument("--full-rank", action=argparse.BooleanOptionalAction, default=True, help="time full-rank ES")
    options = parser.parse_args()
    report = {
        "device": processor() if jax.default_backend() == "cpu" else str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load_average": os.getloadavg()[0],
        "repeats": options.repeats,
        "workloads": {},
    }
    for name, (text, model, make, shape, members) in WORKLOADS.items():
        arguments = (make(), 0, jax.random.normal(KEY, shape))
        functions = {
            "inference": inference(model, members),
            OURS: ours(model, members),
            WHOLE: ours(model, members, None),
            BASELINE: reference_way(model, members),
        }
        times, cpu = measure(functions, arguments, options.repeats)
        ratios, cpu_ratios = (
            {key: values[key] / values[BASELINE] for key in (OURS, WHOLE)} for values in (times, cpu)
        )
        gap = agreement(functions, arguments)
        report["workloads"][name] = {
            "text": text,
            "ms": times,
            "ratios": ratios,
            "cpu_ms": cpu,
            "cpu_ratios": cpu_ratios,
            "relative_gap": gap,
        }
        if name == "W1" and options.full_rank:
            (full_rank, _) = measure({FULL_RANK: reference_way(model, members, full_rank=True)}, arguments, 1)
            report["full_rank"] = {"ms": full_rank[FULL_RANK], "generations": full_rank[FULL_RANK] / times[OURS]}
            print(FULL_RANK, rounded(report["full_rank"]))
        print(name, rounded(times), "ratios", rounded(ratios), "of CPU time", rounded(cpu_ratios), f"gap {gap:.1e}")
    populations = [2**power for power in range(8, 15, 2)]
    report["memory"] = memory(populations)
    print("memory", report["memory"])
    write(report, options.out)


def write(report, out):
    out.mkdir(parents=True, exist_ok=True)
    (out / "jax_generation.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        "# One generation in JAX",
        "",
        f"{report['device']}, {report['cores']} cores, jax {report['jax']}; medians of {report['repeats']} runs "
        f"taken in turns, load average {report['load_average']:.1f} at the start. "
        "`python benchmarks/jax_generation.py`.",
        "",
        "| | inference, ms | eggroll.jax, ms | all at once, ms | reference's way, ms | ratio to it | of CPU time | "
        "all at once |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["workloads"].items():
        ms = row["ms"]
        lines.append(
            f"| {name}: {row['text']} | {ms['inference']:.1f} | {ms[OURS]:.1f} | {ms[WHOLE]:.1f} | "
            f"{ms[BASELINE]:.1f} | {row['ratios'][OURS]:.2f} | {row['cpu_ratios'][OURS]:.2f} | "
            f"{row['ratios'][WHOLE]:.2f} |"
        )
    lines += [
        "",
        "Inference runs the unperturbed model on rows of its own for each member; in W1 the members share their "
        "inputs, which saves the first layer's product. By default members are evaluated in batches that stay in the "
        "caches; `batch_size=None` evaluates all at once.",
        "",
    ]
    if full := report.get("full_rank"):
        lines += [
            f"Full-rank ES in the reference's way on W1: {full['ms']:.0f} ms, {full['generations']:.0f} times a "
            "generation of eggroll.jax.",
            "",
        ]
    lines += [
        "Temporaries of a compiled generation of an MLP 64-64-8, in MiB:",
        "",
        f"| members | {' | '.join(report['memory'])} |",
        "|" + "---|" * (1 + len(report["memory"])),
    ]
    sizes = report["memory"]
    for n in sizes[WHOLE]:
        lines.append(f"| {n} | {' | '.join(f'{values[n] / 2**20:.2f}' for values in sizes.values())} |")
    (out / "jax_generation.md").write_text("\n".join(lines) + "\n")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for place, row in enumerate(report["workloads"].values()):
        for shift, (kind, value) in enumerate(row["ms"].items()):
            at = place + 0.21 * (shift - 1.5)
            left.bar(at, value / row["ms"][BASELINE], 0.19, color=f"C{shift}", label=None if place else kind)
    left.set_xticks(range(len(report["workloads"])), list(report["workloads"]))
    left.set(ylabel=f"time of a generation, {BASELINE} = 1")
    left.legend(frameon=False)
    for name, values in sizes.items():
        right.loglog(list(values), [value / 2**20 for value in values.values()], "o-", label=name)
    right.set(xlabel="members", ylabel="MiB of temporaries")
    right.legend(frameon=False)
    figure.savefig(out / "jax_generation.png", dpi=120)


if __name__ == "__main__":
    main()
