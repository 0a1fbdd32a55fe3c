"""Handwritten digits learned without gradients, beside full-rank evolution strategies and gradients.

    python examples/digits.py                  (what `make demo` runs: about a minute)
    python examples/digits.py --seeds 0 1 2    (the mean over three seeds)

Three methods train the same network (64-64-10, ReLU) from the same initial weights on scikit-learn's bundled digits,
real 8x8 scans of handwriting, on the same batches, with Adam on a cosine learning-rate schedule:

- EGGROLL: Adam on the direction found by low-rank perturbations, scored by cross-entropy;
- full-rank ES: the same with dense perturbations, as many members and generations;
- gradients: Adam on the gradient of the same cross-entropy.

Each runs in a process of its own, on one thread, so that its peak memory is its own. The clock runs while it trains;
it stands still while the curve's points are measured. Peak memory is how far the process's resident memory rose above
what it was with everything imported and the data loaded.

The test images (a fifth of the data, always the same) measure and decide nothing: the last weights count, and the
settings below were chosen on a validation part of the training images, from six candidates for each method, with
seeds that are not reported.
"""

import argparse
import functools
import itertools
import multiprocessing
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from eggroll.torch import EGGROLLTrainer, Population, VanillaESTrainer

BATCH_SIZE = 128
POINTS = 60  # of a learning curve

METHODS = {"eggroll": "EGGROLL", "vanilla": "full-rank ES", "gradient": "Adam on gradients"}
COLOURS = {"eggroll": "#d1495b", "vanilla": "#3d5a80", "gradient": "#8a8d91"}

LEARNING_RATE = {"eggroll": 0.04, "vanilla": 0.04, "gradient": 0.01}
SIGMA = {"eggroll": 0.1, "vanilla": 0.1}


@dataclass(frozen=True)
class Job:
    method: str
    seed: int
    generations: int
    population: int
    batch_size: int = BATCH_SIZE


@dataclass(frozen=True)
class Result:
    """What one training run was like. The three lists are the learning curve."""

    job: Job
    generations: list[int]
    seconds: list[float]
    accuracy: list[float]
    evaluations: int
    peak_bytes: int


# --- the task ------------------------------------------------------------------------------------------------------


def load_data() -> list[np.ndarray]:
    """Training images, test images, training labels, test labels; always the same split."""
    from sklearn.datasets import load_digits  # here, because the training processes do without scikit-learn
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def batches(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever: each pass over the data is in a new order, and leaves out what does not fill a batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(size):
            if len(chosen) == min(size, len(x)):
                yield x[chosen], y[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    return 100 * (model(x).argmax(1) == y).float().mean().item()


# --- the three methods ---------------------------------------------------------------------------------------------


def evolution(job: Job, model: nn.Module, data: Iterator[tuple[Tensor, Tensor]]):
    """The optimizer and the function that takes one step of it, by evolution strategies."""

    def fitness(population: Population) -> Tensor:
        x, y = next(data)
        logits = population(x)  # (members, images, classes)
        right = logits[:, torch.arange(len(y)), y]
        return (right - logits.logsumexp(-1)).mean(1)  # minus the cross-entropy of each member

    trainer_class = VanillaESTrainer
    if job.method == "eggroll":
        trainer_class = functools.partial(EGGROLLTrainer, antithetic=True)
    trainer = trainer_class(
        model.parameters(),
        model=model,
        population_fitness_fn=fitness,
        population_size=job.population,
        learning_rate=LEARNING_RATE[job.method],
        sigma=SIGMA[job.method],
        optimizer=torch.optim.Adam,
        seed=job.seed,
    )
    return trainer, trainer.step


def gradients(job: Job, model: nn.Module, data: Iterator[tuple[Tensor, Tensor]]):
    """The optimizer and the function that takes one step of it, by gradients."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE[job.method])

    def step() -> None:
        x, y = next(data)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return optimizer, step


def train(job: Job, data: list[np.ndarray], progress: bool = True) -> Result:
    train_x, test_x, train_y, test_y = map(torch.from_numpy, data)
    memory_before = peak_memory()
    model = make_model(job.seed)
    method = gradients if job.method == "gradient" else evolution
    optimizer, step = method(job, model, batches(train_x, train_y, job.batch_size, job.seed))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.generations)

    every = max(1, job.generations // POINTS)
    curve = [(0, 0.0, accuracy(model, test_x, test_y))]
    seconds = 0.0
    label = f"{METHODS[job.method]:<17} seed {job.seed}"
    bar_format = "{desc} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
    with tqdm(total=job.generations, desc=label, bar_format=bar_format, disable=not progress) as bar:
        for generation in range(1, job.generations + 1):
            start = time.perf_counter()
            step()
            scheduler.step()
            seconds += time.perf_counter() - start
            if generation % every == 0 or generation == job.generations:
                curve.append((generation, seconds, accuracy(model, test_x, test_y)))
                bar.set_postfix_str(f"test accuracy {curve[-1][2]:.1f} %", refresh=False)
            bar.update()
    evaluations = job.generations * (1 if job.method == "gradient" else job.population)
    return Result(job, *map(list, zip(*curve, strict=True)), evaluations, peak_memory() - memory_before)


# --- a process for each run ----------------------------------------------------------------------------------------


def peak_memory() -> int:
    """The most resident memory this process has ever had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def worker(job: Job, data: list[np.ndarray], connection) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which Python calls leaked after Ctrl-C
    # One small step first: what PyTorch imports on first use counts neither as time nor as memory.
    train(Job(job.method, seed=0, generations=1, population=2, batch_size=2), data, progress=False)
    connection.send(train(job, data))


def run_apart(job: Job, data: list[np.ndarray]) -> Result:
    """Trains in a new process. Ctrl-C reaches this one only, which ends the other."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(job, data, sender), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the new process inherits that
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{METHODS[job.method]}: the training process ended with code {process.exitcode}") from None
    except KeyboardInterrupt:
        process.terminate()
        raise
    process.join()
    return result


# --- what comes out ------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """A row for each method: means over the seeds."""
    seeds = sorted({result.job.seed for result in results})
    header = f"{'':<18} {'test accuracy':>14} {'seconds':>9} {'evaluations':>12} {'peak memory':>12}"
    lines = [header, "-" * len(header)]
    for method, runs in by_method(results).items():
        lines.append(
            f"{METHODS[method]:<18} {mean(run.accuracy[-1] for run in runs):>12.2f} % "
            f"{mean(run.seconds[-1] for run in runs):>9.1f} {runs[0].evaluations:>12,} "
            f"{mean(run.peak_bytes for run in runs) / 2**20:>8.1f} MiB"
        )
        if len(runs) > 1:
            each = ", ".join(f"{run.accuracy[-1]:.2f}" for run in runs)
            lines.append(f"{'':<18} {each} % for seeds {', '.join(str(run.job.seed) for run in runs)}")
    lines += [
        "-" * len(header),
        f"{'Means over' if len(seeds) > 1 else 'Seed'} {', '.join(map(str, seeds))}; {results[0].job.generations} "
        f"generations, batches of {BATCH_SIZE} images, one thread.",
        "evaluations: members times generations, one forward pass each; for gradients forward and backward.",
        "peak memory: how far training raised the resident memory of its own process.",
    ]
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Test accuracy against generations and against seconds: the mean over seeds, each seed thin behind it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method, runs in by_method(results).items():
        style = {"color": COLOURS[method], "zorder": 2 + (method == "eggroll")}
        accuracies = [mean(point) for point in zip(*(run.accuracy for run in runs), strict=True)]
        seconds = [mean(point) for point in zip(*(run.seconds for run in runs), strict=True)]
        label = f"{METHODS[method]}: {accuracies[-1]:.1f} %, {seconds[-1]:.1f} s"
        for axes, x, values in (
            (left, runs[0].generations, [run.generations for run in runs]),
            (right, seconds[1:], [run.seconds[1:] for run in runs]),
        ):
            if len(runs) > 1:
                for run, own in zip(runs, values, strict=True):
                    axes.plot(own, run.accuracy[-len(own) :], linewidth=0.7, alpha=0.4, **style)
            axes.plot(x, accuracies[-len(x) :], linewidth=2, label=label, **style)
    # Spread the last per cents out: what is left of the error, on a logarithmic scale.
    left.set_yscale("function", functions=(lambda y: -np.log10(101 - y), lambda v: 101 - 10**-v))
    left.set_yticks([0, 50, 75, 90, 95, 97, 98, 99])
    left.set_ylim(0, 99.5)
    left.set(xlabel="generations (steps, for gradients)", ylabel="test accuracy (%)", xlim=(0, None))
    right.set(xlabel="seconds of training, one thread (logarithmic)", xscale="log")
    right.xaxis.set_major_formatter("{x:g}")
    left.legend(loc="lower right", frameon=False)
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    seeds = sorted({result.job.seed for result in results})
    job = results[0].job
    figure.suptitle(
        f"Handwritten digits, MLP 64-64-10, {job.population} members a generation, "
        + (f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}")
    )
    figure.savefig(path, dpi=150)


def by_method(results: list[Result]) -> dict[str, list[Result]]:
    return {method: runs for method in METHODS if (runs := [run for run in results if run.job.method == method])}


# --- the command ---------------------------------------------------------------------------------------------------


def whole_number(minimum: int, multiple: int = 1) -> Callable[[str], int]:
    """A type for argparse."""

    def parse(text: str) -> int:
        kind = "an even number" if multiple == 2 else "a whole number"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {kind}, got {text!r}") from None
        if value < minimum or value % multiple:
            raise argparse.ArgumentTypeError(f"must be {kind} of at least {minimum}, got {value}")
        return value

    return parse


def png_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file name that ends in .png, got {text!r}")
    return path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Handwritten digits: EGGROLL, full-rank ES and gradients.")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=whole_number(0), default=0, help="of weights, batches and noise (default: 0)")
    seeds.add_argument("--seeds", type=whole_number(0), nargs="+", metavar="SEED", help="several, for their mean")
    parser.add_argument("--generations", type=whole_number(1), default=300, help="default: %(default)s")
    parser.add_argument("--population", type=whole_number(2, 2), default=512, help="members (default: %(default)s)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"any of {', '.join(METHODS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--out", type=png_path, default=Path("out/digits.png"), help="picture (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.seeds = list(dict.fromkeys(arguments.seeds or [arguments.seed]))
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {arguments.out.parent}: {error.strerror}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    data = load_data()
    results = [
        run_apart(Job(method, seed, arguments.generations, arguments.population), data)
        for seed, method in itertools.product(arguments.seeds, arguments.methods)
    ]
    print(f"\n{table(results)}\n")
    plot(results, arguments.out)
    trained = sum(result.seconds[-1] for result in results)
    print(f"{trained:.0f} s of training, {time.perf_counter() - start:.0f} s in all.")
    print(f"Learning curves: {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
