"""A member's low-rank perturbations as a LoRA adapter in the layout of the PEFT library."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["adapter"]


@torch.no_grad()
def adapter(model: nn.Module, weights: Any, member: int) -> dict[str, Tensor]:
    """The adapter's state dict; see `Population.lora`.

    LoRA adds ``lora_B @ lora_A`` to a weight; the perturbation is ``(scale * A) @ B.T``.
    """
    if not hasattr(weights, "member_factors"):
        raise TypeError("only low-rank perturbations make an adapter: use EGGROLLTrainer")
    state: dict[str, Tensor] = {}
    for name, (scaled_A, B) in weights.member_factors(member).items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf != "weight" or scaled_A.ndim != 2:
            raise ValueError(f"parameter {name!r} has no place in an adapter: PEFT adapts the weights of modules")
        rank = B.shape[1]
        key = f"base_model.model.{path}." if path else "base_model.model."
        if isinstance(module, nn.Embedding):
            # PEFT looks up columns of lora_embedding_A and multiplies with lora_embedding_B.
            state[f"{key}lora_embedding_A"] = scaled_A.mT.contiguous()
            state[f"{key}lora_embedding_B"] = B.contiguous()
        elif isinstance(module, nn.modules.conv._ConvNd):
            if module.transposed or module.groups > 1:
                raise ValueError(f"parameter {name!r} has no place in an adapter: PEFT adapts plain convolutions")
            kernel = tuple(module.weight.shape)
            state[f"{key}lora_A.weight"] = B.mT.reshape(rank, *kernel[1:]).contiguous()
            state[f"{key}lora_B.weight"] = scaled_A.reshape(kernel[0], rank, *(1,) * (len(kernel) - 2)).contiguous()
        elif type(module).__name__ == "Conv1D":
            # Hugging Face's Conv1D keeps its weight as (in, out): rows of A belong to the input.
            state[f"{key}lora_A.weight"] = scaled_A.mT.contiguous()
            state[f"{key}lora_B.weight"] = B.contiguous()
        else:
            state[f"{key}lora_A.weight"] = B.mT.contiguous()
            state[f"{key}lora_B.weight"] = scaled_A.contiguous()
    return state
