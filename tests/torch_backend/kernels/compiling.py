"""Compiles the kernels for GPUs that are not there. `test_compilation.py` runs it in a process without interpreter.

Calls the operations, catches the launches, and hands each kernel and the types of its arguments to Triton's compiler.
Prints a JSON list of what came out: registers, bytes of the stack (spilled registers live there), of shared memory,
and which instructions.

    python tests/torch_backend/kernels/compiling.py 90                   # what the test compiles for capability 9.0
    python tests/torch_backend/kernels/compiling.py 90 --every --table   # all dtypes and configurations, readable
    python tests/torch_backend/kernels/compiling.py 90 --numbers         # instructions that a number takes to draw
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eggroll_torch.kernels import dense, launch, linear, noise, update
from eggroll_torch.kernels.drawing import bits, blocks_of, normals
from eggroll_torch.kernels.threefry import key_at

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
WIDE, NARROW = torch.float32, (torch.bfloat16, torch.float16)
Case = tuple[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int)
    parser.add_argument("--only", default="", help="kernels of cases with this in their name")
    parser.add_argument("--every", action="store_true", help="all cases, and all configurations of a kernel")
    parser.add_argument("--table", action="store_true", help="a line for each kernel instead of JSON")
    parser.add_argument("--numbers", action="store_true", help="count the instructions that a number takes instead")
    options = parser.parse_args()
    if options.numbers:
        for rng, alone in itertools.product(("threefry", "philox"), (True, False)):
            what = "32 bits" if alone else "a normal"
            print(f"{rng:8s} {what:8s} {instructions_of_a_number(rng, alone, options.capability):6.1f}")
        return
    found = []
    for name, run in cases(options.every):
        # On Ampere, to save time, what is the same code as for bfloat16 is left out, and sizes of 1.
        left_out = options.capability == 80 and not options.every and re.search(r"\bfloat16|\bof ones\b", name)
        if options.only in name and not left_out:
            for kernel, arguments, how in launches(run, options.every):
                found.append({"case": name, **compiled(kernel, arguments, how, options.capability)})
    print("\n".join(map(line, found)) if options.table else json.dumps(found))


def launches(run: Callable[[], object], every: bool) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """The kernels that `run` launches, with their arguments by name and the compiler's options, not executed."""
    caught = []

    def catch(kernel: Any, grid: Any, *arguments: Any, device: torch.device, **constants: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants | {"enable_fp_fusion": False}
        configurations: list[dict[str, Any]] = [{}]
        if hasattr(kernel, "configs"):
            fitting = [config.all_kwargs() for config in linear._fitting(kernel.configs, named)]
            configurations = fitting if every else fitting[:1]
            kernel = kernel.fn
        for configuration in configurations:
            everything = named | {name: value for name, value in configuration.items() if value is not None}
            how = {name: everything.pop(name) for name in OPTIONS if name in everything}
            caught.append((kernel, {name: everything[name] for name in kernel.arg_names}, how))

    for module in (dense, linear, noise, update):
        module.launch = catch
    launch._processors = lambda device: 132
    run()
    return caught


def compiled(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], capability: int) -> dict[str, Any]:
    """What one kernel needs on a GPU of this capability."""
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(arguments.items()):
        if kernel.params[place].is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    blocks = {name: value for name, value in constants.items() if name.startswith("BLOCK") or name == "STEP"}
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "options": options | blocks,
        "shared": result.metadata.shared,
        # Those that the assembler may fuse: LLVM writes `mul.rn.f32` where it may not.
        "fusible": len(re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32", result.asm["ptx"])),
        **resources(result.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack, and how many of some instructions there are."""

    def dumped(what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(cubin)
            command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    usage = dict(re.findall(r"(REG|STACK):(\d+)", dumped("-res-usage")))
    places = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)([^;]*);", dumped("-sass"))
    code = {int(place, 16): (name, rest) for place, name, rest in places}
    names = [name for name, _ in code.values()]
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "instructions": len(names),
        # Twenty for each number that a thread draws with Threefry, and few others.
        "rotations": names.count("SHF"),
        # Products of 64 bits or their upper halves: twenty for four numbers with Philox, and few others.
        "wide_products": sum(name == "IMAD" and rest.startswith((".HI", ".WIDE")) for name, rest in code.values()),
        "tensor_cores": names.count("HMMA") + names.count("HGMMA"),
        "warp_groups": names.count("HGMMA"),
        "spills_in_loops": sum(code[place][0] in {"LDL", "STL"} for place in looped(code)),
    }


@triton.jit
def _numbers_kernel(keys, out, RNG: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    k0, k1 = key_at(keys, 0, True)
    start = tl.program_id(0) * BLOCK
    place = start + tl.arange(0, BLOCK)
    if BITS:
        drawn = bits(k0, k1, place, blocks_of(start, BLOCK), 0, 0, RNG).to(tl.int32, bitcast=True)
    else:
        drawn = normals(k0, k1, place, blocks_of(start, BLOCK), 0, 0, out, "float32", RNG)
    tl.store(out + place, drawn)


def instructions_of_a_number(rng: str, alone: bool, capability: int) -> float:
    """What each further number of a thread, or its bits alone, adds to a kernel that draws and writes."""
    counts = []
    for block in (2048, 4096):
        out = torch.zeros(1, dtype=torch.int32 if alone else torch.float32)
        keys = torch.zeros(1, 2, dtype=torch.int32)
        arguments = {"keys": keys, "out": out, "RNG": rng, "BITS": alone, "BLOCK": block}
        how = {"num_warps": 4, "enable_fp_fusion": False}
        counts.append(compiled(_numbers_kernel, arguments, how, capability)["instructions"])
    return (counts[1] - counts[0]) / (2048 / 128)


def looped(code: dict[int, tuple[str, str]]) -> set[int]:
    """The places of the instructions between a branch that goes back and where it goes."""
    inside: set[int] = set()
    for place, (name, rest) in code.items():
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name == "BRA" and target and int(target[1], 16) < place:
            inside |= {at for at in code if int(target[1], 16) <= at <= place}
    return inside


def line(found: dict[str, Any]) -> str:
    options = dict(found["options"])
    warps, stages, step = (options.get(name, "") for name in ("num_warps", "num_stages", "STEP"))
    blocks = "x".join(str(value) for name, value in options.items() if name.startswith("BLOCK"))
    columns = (
        "registers",
        "stack",
        "spills_in_loops",
        "rotations",
        "wide_products",
        "instructions",
        "tensor_cores",
        "fusible",
    )
    numbers = " ".join(f"{name} {found[name]:4d}" for name in columns)
    return (
        f"{found['case']:64s} {found['kernel']:16s} {blocks:12s} warps {warps or 4} stages {stages:1} step {step:2} "
        f"shared {found['shared'] / 1024:4.0f} KiB {numbers}"
    )


def cases(every: bool) -> Iterator[Case]:
    """Calls that between them launch every kernel in every dtype, by name."""
    keys = torch.zeros(64, 2, dtype=torch.int32)
    places = torch.zeros(4096, dtype=torch.int32)
    yield "fold_in", partial(noise.fold_in, keys, places)
    # An argument of 1 is a constant to the compiler, with fewer methods than a number that it does not know.
    yield "fold_in of one draw", partial(noise.fold_in, keys, places[:1])
    yield "fold_in into one key", partial(noise.fold_in, keys[:1], places[:1])
    yield from cases_of_ones()
    for precision, dtype in (("float32", torch.bfloat16), ("bfloat16", WIDE), ("float16", torch.float16)):
        yield (
            f"draw_rows {precision} to {name_of(dtype)}",
            partial(noise.draw_rows, keys.view(2, 32, 2), places, places, precision, dtype),
        )
    signs = torch.ones(64)
    for dtype in (WIDE, *NARROW):
        vector = torch.zeros(512, dtype=dtype)
        yield f"dense_of_members {name_of(dtype)}", partial(dense.dense_of_members, vector, keys, signs)
    yield "add_dense_sum_drawn_", partial(dense.add_dense_sum_drawn_, torch.zeros(512), signs, keys)
    philox = {"rng": "philox"}
    blocks = torch.zeros(3, 1024, dtype=torch.int32)
    yield "draw_rows philox", partial(noise.draw_rows, keys.view(2, 32, 2), blocks[0], blocks, **philox)
    vector = torch.zeros(512)
    yield "dense_of_members philox", partial(dense.dense_of_members, vector, keys, signs, **philox)
    yield "add_dense_sum_drawn_ philox", partial(dense.add_dense_sum_drawn_, vector, signs, keys, **philox)
    sizes = 2, 2048, 2048  # rank, features in and out
    yield "draw_both_factors", partial(noise.draw_both_factors, keys, None, *sizes, "float32", "threefry", NARROW[0])
    yield from linear_cases(every)
    yield from update_cases(every, keys, signs)


def cases_of_ones() -> Iterator[Case]:
    """Every size that can be 1, is."""
    key, place, sign = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.ones(1)
    yield "draw_rows of ones", partial(noise.draw_rows, key.view(1, 1, 2), place, place)
    yield (
        "draw_both_factors of ones",
        partial(noise.draw_both_factors, key, None, 1, 1, 1, "float32", "threefry", torch.float32),
    )
    yield "dense_of_members of ones", partial(dense.dense_of_members, torch.zeros(1), key, sign)
    yield "add_dense_sum_drawn_ of ones", partial(dense.add_dense_sum_drawn_, torch.zeros(1), sign, key)
    yield "update drawn of ones", partial(update.add_low_rank_sum_drawn_, torch.zeros(1, 1), sign, key, 1)
    for dtype in (WIDE, NARROW[0]):
        x, weight = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
        arguments = x, weight, weight[0], key, 1, sign, 0.1, key, sign
        yield f"linear {name_of(dtype)} of ones", partial(linear.linear_of_members_drawn, *arguments)


def linear_cases(every: bool) -> Iterator[Case]:
    """Members, draws, rows, rank, whether the input is shared; stored noise, or noise drawn by Threefry or Philox."""
    populations = {
        "one row a member": (128, 64, 1, 1, False),
        "one row a member, rank 16": (128, 64, 1, 16, False),
        "32 rows, rank 4": (64, 64, 32, 4, False),
        "64 rows": (128, 64, 64, 1, False),
        "shared row": (128, 64, 1, 1, True),
        "32 shared rows, rank 64": (128, 64, 32, 64, True),
    }
    some = [
        ("one row a member", torch.bfloat16, "drawn"),
        ("one row a member, rank 16", torch.float16, "stored"),
        ("64 rows", torch.float16, "drawn"),
        ("32 shared rows, rank 64", torch.bfloat16, "drawn"),
        ("one row a member", WIDE, "stored"),
        ("32 rows, rank 4", "tf32", "drawn"),
        ("one row a member", torch.bfloat16, "drawn by philox"),
        ("one row a member, rank 16", torch.float16, "drawn by philox"),
        ("32 shared rows, rank 64", torch.bfloat16, "drawn by philox"),
        ("32 rows, rank 4", "tf32", "drawn by philox"),
    ]
    all_of_them = itertools.product(populations, (*NARROW[:1], WIDE, "tf32"), ("drawn", "drawn by philox", "stored"))
    for population, dtype, way in all_of_them if every else some:
        name = f"linear {dtype if dtype == 'tf32' else name_of(dtype)}, {population}, {way}"
        yield name, partial(run_linear, *populations[population], dtype, way)


def run_linear(members: int, draws: int, rows: int, rank: int, shared: bool, dtype: Any, way: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    dtype = WIDE if dtype == "tf32" else dtype
    x = torch.zeros(*(() if shared else (members,)), rows, 1024, dtype=dtype)
    weight, bias, signs = torch.zeros(512, 1024, dtype=dtype), torch.zeros(512, dtype=dtype), torch.ones(members)
    keys = torch.zeros(draws, 2, dtype=torch.int32)
    rng = "philox" if way == "drawn by philox" else "threefry"
    noisy = {"bias_keys": keys, "bias_scales": signs, "rng": rng, "activation": "silu"}
    if way != "stored":
        linear.linear_of_members_drawn(x, weight, bias, keys, rank, signs, 0.1, **noisy)
    else:
        A, B = torch.zeros(draws, 512, rank, dtype=dtype), torch.zeros(draws, 1024, rank, dtype=dtype)
        linear.linear_of_members(x, weight, bias, A, B, signs, 0.1, **noisy)
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def update_cases(every: bool, keys: Tensor, coefficients: Tensor) -> Iterator[Case]:
    some = [(torch.bfloat16, 1, (128, 2048)), (torch.float16, 16, (2048,)), (WIDE, 1, (128,))]
    all_of_them = itertools.product((*NARROW, WIDE), (1, 16), [(128, 256, 2048)])
    for dtype, rank, sizes in all_of_them if every else some:
        what = f"{name_of(dtype)} rank {rank}"
        A, B = (torch.zeros(64, 512, rank, dtype=dtype) for _ in range(2))
        yield f"update stored, {what}", partial(update.add_low_rank_sum_, torch.zeros(512, 512), coefficients, A, B)
        for size, rng in itertools.product(sizes, ("threefry", "philox")):
            way = "drawn" if rng == "threefry" else "drawn by philox"
            total = torch.zeros(size, size)
            yield (
                f"update {way}, {what}, {size} features",
                partial(update.add_low_rank_sum_drawn_, total, coefficients, keys, rank, dtype, rng=rng),
            )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
