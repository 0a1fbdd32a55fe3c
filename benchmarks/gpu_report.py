"""What the GPU benchmark writes: its figures as JSON, as a Markdown table, and as plots."""

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path

from gpu_cases import FORWARDS, MLP_MEMBERS, MLP_ROWS, MLP_WIDTH, POPULATIONS, RANKS, WIDTHS, Case

FILES = "gpu_generation"
"""The name of the files, before their endings."""


def write(report: dict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f"{FILES}.json.part"
    draft.write_text(json.dumps(report, indent=2) + "\n")
    draft.replace(out / f"{FILES}.json")
    (out / f"{FILES}.md").write_text(table(report))
    if importlib.util.find_spec("matplotlib") is None:
        print("Matplotlib is not installed: no plots were drawn.", file=sys.stderr)
    else:
        plots(report, out)


def summary(case: dict) -> str:
    return ", ".join(f"{name} {time:.3f} ms" for name, time in case["milliseconds"].items())


def table(report: dict) -> str:
    """The report as Markdown."""
    info, best = report["machine"], report["ceilings"]
    lines = [
        f"Device: {info['device']}, torch {info['torch']}, Triton {info['triton']}, Python {info['python']}. "
        f"Ceilings, measured: {best['TFLOP/s']:.0f} TFLOP/s (bfloat16 product of 8192 x 8192) and "
        f"{best['GB/s']:.0f} GB/s (copy, read and written). One bfloat16 layer of d x d, a row for each member, "
        "antithetic pairs. Milliseconds, medians. A ratio is the time of pure batched inference (of a generation: of "
        "the products alone, inference and update) over that of the method; more is better. In brackets: the share "
        "of the nearer ceiling, of products or of bytes. GPU busy is the time in which the GPU works; "
        "in the rest it waits for the host. A generation takes SGD's step where the direction is summed and keeps "
        "no snapshots; CUDA graph is the same with a forward pass that is compiled so. Its memory is what it takes "
        "beyond model and inputs, in brackets what of it is no output, relative to weights and activations.",
        "",
        "| d | members | rank | input | inference | "
        + "".join(f"{name} | ratio | " for name in FORWARDS)
        + "generation | ratio | CUDA graph | ratio | GPU busy | ratio | generation, MB | full-rank ES * |",
        "|" + "---|" * (13 + 2 * len(FORWARDS)),
    ]
    layers = [case for name, case in report["cases"].items() if name != "mlp"]
    for case in sorted(layers, key=lambda c: (-c["width"], c["rank"], c["shared"], c["members"])):
        t = case["milliseconds"]
        size = Case(case["width"], case["members"], case["rank"], case["shared"])

        def cell(name: str, t: dict = t, size: Case = size) -> str:
            if name not in t:
                return "-"
            share = max(
                1e-9 * size.operations[name] / t[name] / best["TFLOP/s"],
                1e-6 * size.bytes[name] / t[name] / best["GB/s"],
            )
            return f"{t[name]:.3f} ({100 * share:.0f} %)"

        def ratio(name: str, reference: str, t: dict = t) -> str:
            return f"{t[reference] / t[name]:.2f}" if {name, reference} <= t.keys() else "-"

        full, taken = case["full-rank ES"], case["bytes"].get("generation", math.nan)
        cells = [
            case["width"],
            case["members"],
            case["rank"],
            "shared" if case["shared"] else "own",
            cell("pure inference"),
            *(text for n in FORWARDS for text in (cell(n), ratio(n, "pure inference"))),
            cell("generation"),
            ratio("generation", "two products"),
            f"{t['generation, CUDA graph']:.3f}" if "generation, CUDA graph" in t else "-",
            ratio("generation, CUDA graph", "two products"),
            f"{t['generation, GPU busy']:.3f}" if "generation, GPU busy" in t else "-",
            ratio("generation, GPU busy", "two products"),
            f"{taken / 1e6:.0f} ({100 * size.beyond(taken):.0f} %)",
            f"{full['milliseconds of all']:.1f} ({full['members']})" if full else "-",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "\\* timed on the members in brackets, the most that fit, and scaled up."]
    lines += ways_of_the_product(layers)
    if "mlp" in report["cases"]:
        t = report["cases"]["mlp"]["milliseconds"]
        both = {"EvoX", "generation"} <= t.keys()
        lines += [
            "",
            f"MLP 3 x {MLP_WIDTH}, {MLP_MEMBERS} members, {MLP_ROWS} shared rows, float32 with TF32: "
            + ", ".join(f"{name} {time:.1f} ms" for name, time in t.items())
            + (f" ({t['EvoX'] / t['generation']:.1f} times a generation here)" if both else "")
            + ".",
        ]
    return "\n".join(lines) + "\n"


def ways_of_the_product(layers: list[dict]) -> list[str]:
    """By width, with an input for each member: one kernel against the library's product and a kernel besides."""
    lines = []
    for what in ("forward", "update"):
        ways = {f"{what}, library", f"{what}, one kernel"}
        found = []
        for width in sorted({case["width"] for case in layers}):
            times = [
                case["milliseconds"][f"{what}, library"] / case["milliseconds"][f"{what}, one kernel"]
                for case in layers
                if case["width"] == width and ways <= case["milliseconds"].keys()
            ]
            if times:
                found.append(f"{statistics.median(times):.2f} at d = {width}")
        if found:
            lines += [
                "",
                f"Time of the {what} with the library's product over that of one kernel, medians of cases: ",
            ]
            lines[-1] += f"{', '.join(found)}."
    return lines


def plots(report: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(WIDTHS), figsize=(11, 6), sharex=True, sharey="row", layout="constrained")
    references = dict.fromkeys(FORWARDS, "pure inference") | {"generation": "two products"}
    for column, width in enumerate(sorted(WIDTHS)):
        for axes, shared in zip(grid[:, column], (False, True), strict=True):
            for rank, style in zip(RANKS, ("-", "--", ":"), strict=True):
                cases = [
                    case
                    for name, case in report["cases"].items()
                    if name != "mlp" and (case["width"], case["rank"], case["shared"]) == (width, rank, shared)
                ]
                cases.sort(key=lambda case: case["members"])
                for color, (name, reference) in enumerate(references.items()):
                    there = [case for case in cases if {name, reference} <= case["milliseconds"].keys()]
                    ratios = [case["milliseconds"][reference] / case["milliseconds"][name] for case in there]
                    members = [case["members"] for case in there]
                    label = f"{name}, rank {rank}"
                    axes.plot(members, ratios, style, marker="o", markersize=3, color=f"C{color}", label=label)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_xlim(min(POPULATIONS) / 2, 2 * max(POPULATIONS))  # also while nothing is measured there
            axes.grid(alpha=0.3)
            axes.set_title(f"d = {width}, {'shared input' if shared else 'an input each'}", fontsize=9)
    figure.supylabel("speed relative to the products alone", fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylim(bottom=0)
    for axes in grid[-1]:
        axes.set_xlabel("members")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(
        f"EGGROLL on {report['machine']['device']}: forward against inference, generation against both products"
    )
    figure.savefig(out / f"{FILES}.png", dpi=150)
    plt.close(figure)
