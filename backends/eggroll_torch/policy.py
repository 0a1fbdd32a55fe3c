"""What to do where a population has no rule, and what was seen of the model's calls and of its parameters."""

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree

__all__ = ["METADATA", "MaterialisedWarning", "Policy", "UnsupportedOperationError", "Way"]

_ATTRIBUTES = """
    shape dtype device layout ndim requires_grad is_leaf grad grad_fn itemsize nbytes output_nr _version
    is_cuda is_cpu is_meta is_mps is_xpu is_mkldnn is_sparse is_sparse_csr is_quantized is_nested
"""
_METHODS = """
    size dim ndimension numel nelement __len__ stride storage_offset element_size get_device data_ptr untyped_storage
    is_floating_point is_complex is_contiguous is_signed is_inference
"""
METADATA: set[Any] = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(torch.Tensor, name) for name in _METHODS.split()),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
"""What asks about a tensor, not about its values."""


class MaterialisedWarning(UserWarning):
    """Slower or larger than it could be: a weight was formed for every member, or members ran one by one."""


class UnsupportedOperationError(NotImplementedError):
    """The operation cannot be done for a population, or `strict` forbids the way in which it could be."""


@dataclass
class Way:
    """How calls of one kind have turned out to run.

    Attributes:
        writes_to_inputs: whether the model changes its inputs in place, once it has run.
        fills_tensors: whether the model puts what members compute into tensors that it makes, such as zeros, or
            into its buffers.
        own_buffers: the names of those buffers, and of tensors that are plain attributes.
        own_inputs: whether the model puts what members compute into its inputs, or into what it makes of them alone.
        one_by_one: the model cannot be vectorised over members.
        captured: the model has operators that have to be captured as a whole, such as `torch.cond`, in which the use
            of weights is not seen.
    """

    writes_to_inputs: bool | None = None
    fills_tensors: bool = False
    own_buffers: frozenset[str] = frozenset()
    own_inputs: bool = False
    one_by_one: bool = False
    captured: bool = False


@dataclass
class Policy:
    """What to do about operations without a rule, and what was seen of the model and its parameters.

    Attributes:
        strict: raise instead of materialising or running members one by one.
        warned: what was warned about.
        ways: by kind of call.
        used: names of the parameters that took part in a computation of the generation.
        forward_passes: how many of the generation were seen whose use of parameters could be followed.
    """

    strict: bool = False
    warned: set[str] = field(default_factory=set)
    ways: defaultdict[Hashable, Way] = field(default_factory=lambda: defaultdict(Way))
    used: set[str] = field(default_factory=set)
    forward_passes: int = 0

    def of_generation(self) -> "Policy":
        """The same for another generation, of which nothing was seen yet."""
        return replace(self, used=set(), forward_passes=0)

    def unused(self, names: Iterable[str]) -> list[str]:
        """The parameters that took no part in any forward pass so far; none where no pass could be followed."""
        return [name for name in names if name not in self.used] if self.forward_passes else []

    @contextlib.contextmanager
    def noting(self) -> Iterator[set[str]]:
        """A context with a set, which afterwards holds the names of the parameters that were used inside."""
        before, found = frozenset(self.used), set[str]()
        self.used.clear()
        try:
            yield found
        finally:
            found |= self.used
            self.used |= before

    @contextlib.contextmanager
    def watching(self, model: nn.Module, names: Iterable[str]) -> Iterator[None]:
        """Notes which parameters of the model itself are used inside, of those that none of the members before used.

        Nothing is concluded for modules that are `_opaque`, nor where no parameter is used at all, as by a score that
        is computed elsewhere.
        """
        missing = {*names} - self.used
        if not missing or _opaque(model):
            yield
            return
        watched = {id(parameter): name for name, parameter in model.named_parameters() if name in missing}
        with _Watch(watched, self.used):
            yield
        self.forward_passes += bool(self.used)

    @contextlib.contextmanager
    def watching_member(self, model: nn.Module, parameters: Mapping[str, Tensor], way: Way) -> Iterator[None]:
        """Notes which parameters of a member that runs alone are used inside; all where that cannot be seen."""
        if way.captured or _opaque(model):
            self.used.update(parameters)
            yield
            return
        with _Watch({id(parameter): name for name, parameter in parameters.items()}, self.used):
            yield

    def run(
        self,
        way: Way,
        vectorised: Callable[[], Any],
        written_to: Callable[[], frozenset[str]],
        one_by_one: Callable[[], Any],
    ) -> Any:
        """Runs a call for all members at once or, where the model cannot be vectorised, one by one, with one warning.

        If it fails at once, it is tried whether it is enough that members have tensors of their own to write to.

        Args:
            way: how the call runs, which is noted there.
            vectorised: runs all members at once, and returns what they return.
            written_to: runs one member alone, and returns the names of the buffers that it has written to.
            one_by_one: runs members one by one, and returns the same as `vectorised`.
        """
        if way.one_by_one:
            return one_by_one()
        try:
            return vectorised()
        except (UnsupportedOperationError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            problem = error
        way.captured = isinstance(problem, torch._dynamo.exc.UncapturedHigherOrderOpError)
        if not way.fills_tensors:
            # Not every error means that vmap is at fault: if members fail alone too, theirs is the true one.
            way.own_buffers = written_to()
            way.fills_tensors = True
            for way.own_inputs in (False, True):
                with contextlib.suppress(Exception):
                    return vectorised()
            way.fills_tensors, way.own_buffers, way.own_inputs = False, frozenset(), False
        result = one_by_one()
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        self.fall_back(
            f"the model cannot be vectorised over members ({reason})",
            "members run one by one",
        )
        way.one_by_one = True
        return result

    def fall_back(self, problem: str, remedy: str, kind: str | None = None) -> None:
        """Warns once that `remedy` is taken because of `problem`, or of its `kind`, or raises in strict mode."""
        if self.strict:
            raise UnsupportedOperationError(f"{problem}; strict=True forbids the way around: {remedy}")
        if (kind or problem) not in self.warned:
            self.warned.add(kind or problem)
            warnings.warn(f"{problem}: {remedy}", MaterialisedWarning, stacklevel=2)


def _opaque(model: nn.Module) -> bool:
    """Whether there are compiled or scripted modules, which compute where `_Watch` cannot see."""
    opaque = (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)
    return any(isinstance(module, opaque) for module in model.modules())


class _Watch(TorchFunctionMode):
    """Notes the names of parameters that are handed to PyTorch's functions for more than their metadata."""

    def __init__(self, names: dict[int, str], used: set[str]):
        super().__init__()
        self._names = names
        self._used = used

    def __exit__(self, *error: Any) -> None:
        # PyTorch takes it away while it answers a function: Ctrl-C may have come there.
        if self in _get_current_function_mode_stack():
            super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in METADATA:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (name := self._names.get(id(leaf))) is not None:
                    self._used.add(name)
        return func(*args, **(kwargs or {}))
