"""What is trained and how: each parameter's name, key, kind of noise, rank and sigma scale.

Matrices, convolution kernels and stacks of matrices get low-rank noise, everything else dense noise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from eggroll import EggrollConfig, perturbation, prng

from .choices import OPTIONS, Choice
from .drawing import LONGEST

__all__ = [
    "ParameterNoise",
    "base_key_of",
    "circumstances",
    "describe_parameters",
    "fresh_seed",
    "model_keys",
    "named_trainable",
]

Kind = Literal["low_rank", "dense"]

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


@dataclass(frozen=True)
class ParameterNoise:
    """How one trained parameter is perturbed.

    Attributes:
        name: dotted, as in `named_parameters`.
        parameter: the parameter itself.
        kind: ``"low_rank"`` or ``"dense"``.
        stack: lengths of the leading axes that stack layers, each with its own key.
        layer: shape of one layer; for low rank ``(out_features, in_features)``, where a convolution kernel counts
            as the matrix ``(out_channels, in_channels / groups * kernel elements)``.
        rank: columns of the factors.
        sigma: scale of the perturbation.
        precision: the dtype in which the noise is drawn.
        rng: what it is drawn with.
    """

    name: str
    parameter: nn.Parameter
    kind: Kind
    stack: tuple[int, ...]
    layer: tuple[int, ...]
    rank: int
    sigma: float
    precision: prng.Precision
    rng: prng.Rng

    @property
    def kernel(self) -> tuple[int, ...] | None:
        """The shape of a convolution's kernel, whose matrix has another one; None for other parameters."""
        shape = tuple(self.parameter.shape)
        return None if self.kind == "dense" or shape == (*self.stack, *self.layer) else shape

    @property
    def scale(self) -> float:
        """What its noise, ``A @ B.T`` or ``Z``, is multiplied with, apart from the sign."""
        return self.sigma / math.sqrt(self.rank) if self.kind == "low_rank" else self.sigma

    @property
    def draws(self) -> tuple[perturbation.Draw, ...]:
        """What is drawn from the key of one layer: for low rank what the factors are made of, else one vector."""
        if self.kind == "low_rank":
            return perturbation.low_rank_draws(self.layer, self.rank, self.rng)
        return (perturbation.Draw((math.prod(self.layer),)),)

    @property
    def layers(self) -> int:
        """How many layers are stacked, 1 where none are."""
        return math.prod(self.stack)

    @property
    def draw_size(self) -> int:
        """Numbers drawn for one member."""
        return self.layers * sum(math.prod(draw.shape) for draw in self.draws)


def named_trainable(model: nn.Module, params: Sequence[Tensor]) -> dict[str, nn.Parameter]:
    """The trained parameters by name: those of `params` that require a gradient.

    Raises:
        TypeError: something that is no tensor.
        ValueError: no trainable parameter, or one that is not the model's, that is lazy, not floating point, or on
            another device than the rest.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable: dict[str, nn.Parameter] = {}
    for index, parameter in enumerate(params):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"`params` must be parameters of `model`, but number {index} is {parameter!r:.80}")
        name = names.get(id(parameter))
        if name is None:
            raise ValueError(
                f"`params` must be parameters of `model`, but number {index}, "
                f"of shape {tuple(parameter.shape)}, is not"
            )
        if not parameter.requires_grad:
            continue  # frozen, and of any dtype
        if is_lazy(parameter):
            raise ValueError(
                f"`params` must have shapes, but {name!r} is lazy: call the model on an example of its input first"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"`params` must be floating point, but {name!r} is {parameter.dtype}: "
                "leave it out and it stays as it is"
            )
        assert isinstance(parameter, nn.Parameter)
        trainable[name] = parameter
    if not trainable:
        raise ValueError(
            "`params` must hold at least one trainable parameter (one that requires a gradient), got none"
        )
    first, *rest = trainable.items()
    for name, parameter in rest:
        if parameter.device != first[1].device:
            raise ValueError(
                f"`params` must be on one device, but {first[0]!r} is on {first[1].device} "
                f"and {name!r} on {parameter.device}"
            )
    return trainable


def describe_parameters(
    model: nn.Module,
    trainable: dict[str, nn.Parameter],
    config: EggrollConfig,
    choices: Mapping[str, Choice],
) -> list[ParameterNoise]:
    """The noise of every perturbed parameter, in canonical order, from what was chosen by name.

    Those that were chosen to be frozen are left out, and with `freeze_nonlora` the dense ones.

    Raises:
        ValueError: one array of noise would have more elements than are counted.
    """
    convolutions = _convolution_kernels(model)
    described = []
    for name in perturbation.canonical_order(trainable):
        parameter, choice = trainable[name], choices.get(name, Choice())
        kind, stack, layer = _layout(name, parameter, id(parameter) in convolutions, choice.noise)
        if choice.noise == "frozen" or (kind == "dense" and config.freeze_nonlora):
            continue
        precision = perturbation.noise_precision(config, str(parameter.dtype).removeprefix("torch."))
        rank, sigma = choice.rank or config.rank, choice.sigma or config.sigma
        described.append(ParameterNoise(name, parameter, kind, stack, layer, rank, sigma, precision, config.rng))
        longest = max(math.prod(draw.shape) for draw in described[-1].draws)
        if longest > LONGEST:
            raise ValueError(
                f"`params` must draw at most {LONGEST} numbers from a key, but {name!r}, of shape "
                f"{tuple(parameter.shape)}, draws {longest} for its {kind} noise: choose another, or a lower rank"
            )
    return described


def circumstances(
    model: nn.Module, trainable: dict[str, nn.Parameter], param_groups: Iterable[dict[str, Any]]
) -> list[Any]:
    """What besides hyperparameters a description depends on; equal as long as the parameters' noise is the same."""
    convolutions = _convolution_kernels(model)
    parameters = [(name, id(p), p.shape, p.dtype, p.device, id(p) in convolutions) for name, p in trainable.items()]
    options = [[group.get(option) for option in OPTIONS] for group in param_groups]
    return [parameters, options, [list(map(id, group["params"])) for group in param_groups]]


def model_keys(model: nn.Module, base_key: Tensor) -> dict[str, Tensor]:
    """The key of every parameter of the model, frozen ones included, so that freezing one moves no other's noise."""
    return perturbation.parameter_keys(base_key, (name for name, _ in model.named_parameters()))


def _convolution_kernels(model: nn.Module) -> set[int]:
    found = (_kernels(module) for module in model.modules() if isinstance(module, _CONVOLUTIONS))
    return {id(kernel) for kernels in found for kernel in kernels}


def _kernels(convolution: nn.modules.conv._ConvNd) -> list[Tensor | None]:
    """The kernel, or what a parametrization, such as weight normalisation, computes it from."""
    # Not `module.weight`: a parametrization may compute it, and change its buffers.
    if not parametrize.is_parametrized(convolution, "weight"):
        return [convolution._parameters.get("weight")]
    channels = convolution.in_channels * convolution.out_channels // convolution.groups
    size = channels * math.prod(convolution.kernel_size)
    originals = convolution.get_submodule("parametrizations.weight")._parameters.values()
    return [parameter for parameter in originals if parameter is not None and parameter.numel() == size]


def _layout(
    name: str, parameter: Tensor, convolution: bool, chosen: str | None
) -> tuple[Kind, tuple[int, ...], tuple[int, ...]]:
    """Kind, stack and layer of a parameter, by its shape unless something was chosen."""
    shape = tuple(parameter.shape)
    if chosen == "dense":
        return "dense", (), shape
    if convolution:
        return "low_rank", (), (shape[0], math.prod(shape[1:]))
    # Three axes are a stack of matrices, such as the weights of experts, and not a vector or a matrix that was given
    # axes of length 1 to broadcast.
    if len(shape) == 2 or (len(shape) == 3 and min(shape) > 1) or chosen == "low_rank":
        if len(shape) < 2:
            raise ValueError(f"`noise` 'low_rank' needs a parameter with two axes or more, {name!r} has {len(shape)}")
        return "low_rank", shape[:-2], shape[-2:]
    return "dense", (), shape


def base_key_of(seed: int | Sequence[int] | Tensor) -> Tensor:
    """The key of a run from its seed: an int, or a key of two words. uint32, shape ``(2,)``, on the CPU."""
    import array_api_compat.torch as xp

    if getattr(seed, "ndim", None) == 0:  # a tensor or an array
        seed = seed.item()  # type: ignore[union-attr, assignment]
    if isinstance(seed, int | str | bytes) or not hasattr(seed, "__len__"):
        return prng.key(seed, xp=xp, device="cpu")  # type: ignore[arg-type]
    return prng.key_from_words(seed, xp=xp, device="cpu")


def fresh_seed() -> int:
    """A seed from PyTorch's global generator, so that `torch.manual_seed` decides it too."""
    return int(torch.randint(2**63 - 1, (), device="cpu").item())
