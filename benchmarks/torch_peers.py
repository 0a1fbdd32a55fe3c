"""One generation of W1 with other PyTorch libraries; run by `torch_generation.py --peers PYTHON`.

Prints a JSON list as its last line. A library that is not installed, or fails, is left out with a word on stderr.
"""

import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

MEMBERS, ROWS, SIGMA, REPEATS = 1024, 32, 0.1, 3
EVOTORCH_MEMBERS = 32


def main() -> None:
    results = []
    # evotorch runs members one after another, so a share of the population tells its time.
    for library, prepare, scale in (
        ("evox", evox_lora, 1),
        ("torcheggroll", torcheggroll, 1),
        ("evotorch", evotorch, MEMBERS // EVOTORCH_MEMBERS),
    ):
        torch.manual_seed(0)
        try:
            step = prepare(model(), torch.randn(ROWS, 784), torch.randint(10, (ROWS,)))
            seconds = measured(step)
        except Exception as error:
            print(f"{library}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        version = importlib.metadata.version(library)
        milliseconds = 1e3 * statistics.median(seconds) * scale
        results.append({"library": library, "version": version, "workload": "W1", "milliseconds": milliseconds})
    print(json.dumps(results))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def measured(step: Callable[[], object]) -> list[float]:
    step()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def evox_lora(net: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    from evox.algorithms.so.es_variants.virtual_lora_es import VirtualLoRAES
    from evox.problems.neuroevolution.virtual_lora_problem import VirtualLoRAProblem
    from evox.workflows import StdWorkflow

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=ROWS)
    problem = VirtualLoRAProblem(net, loader, nn.CrossEntropyLoss(), lora_rank=1)
    center = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    shapes = [tuple(parameter.shape) for parameter in net.parameters()]
    algorithm = VirtualLoRAES(
        param_shapes=shapes,
        pop_size=MEMBERS,
        lora_rank=1,
        center_init=center,
        learning_rate=1e-6,
        noise_stdev=SIGMA,
    )
    workflow = StdWorkflow(algorithm, problem)
    workflow.init_step()
    return workflow.step


def torcheggroll(net: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    from torcheggroll import TorchEggrollES

    trainer = TorchEggrollES(net, pop_size=MEMBERS, sigma=SIGMA, lr=1e-6, rank=1, antithetic=True)
    return lambda: trainer.step(x, nn.functional.cross_entropy, y)


def evotorch(net: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """Full-rank PGPE: what evotorch has for networks."""
    from evotorch.algorithms import PGPE
    from evotorch.neuroevolution import SupervisedNE

    problem = SupervisedNE(torch.utils.data.TensorDataset(x, y), net, nn.CrossEntropyLoss(), minibatch_size=ROWS)
    searcher = PGPE(
        problem, popsize=EVOTORCH_MEMBERS, center_learning_rate=1e-6, stdev_learning_rate=1e-6, stdev_init=SIGMA
    )

    return searcher.step


if __name__ == "__main__":
    main()
