"""Write benchmarks/RESULTS.md, and the tables in guides, from the JSON files under benchmarks/results/.

python -m benchmarks.table            # write the pages
python -m benchmarks.table --check    # exit code 1 if a page does not match the JSON files
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench_fsdp import fsdp_table
from benchmarks.bench_model import model_table
from benchmarks.bench_parallel import parallel_table
from benchmarks.bench_parallel_model import parallel_model_table
from benchmarks.bench_pool import pool_table
from benchmarks.bench_reliability import corruptions_table, decode_table, saves_table
from benchmarks.bench_serve import serve_table
from benchmarks.common import RESULTS
from benchmarks.parallel_pages import models_table, sharded_models_table, shared_sequences_table
from experiments.evidence.table import markdown_table

Result = dict[str, Any]
PAGE = RESULTS.parent / "RESULTS.md"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def ops(result: Result) -> str:
    """Tables of the op: growth with T, comparison with other ops, memory, and the paper's width."""
    rows: dict[str, list[Result]] = {}
    for row in result["rows"]:
        rows.setdefault(row["part"], []).append(row)
    parts = []
    if "growth" in rows:
        first = rows["growth"][0]
        table = [
            [str(row["T"]), row["what"], f"{row['seconds']['median']:.3f}", _ratio(row["ratio to half T"])]
            for row in rows["growth"]
        ]
        shape = f"B 1, H {first['H']}, D = V = {first['D']}, {first['dtype']}, steps {tuple(first['steps'])}"
        header = ["T", "what", "median seconds", "ratio to half T"]
        parts.append(f"Growth with T ({shape})\n\n{markdown_table(header, table)}")
    if "peer" in rows:
        first = rows["peer"][0]
        table = [
            [row["dtype"], row["what"], row["op"], f"{row['seconds']['median']:.3f}", _ratio(row["ratio"])]
            for row in rows["peer"]
        ]
        shape = f"B 1, T {first['T']}, H {first['H']}, D = V = {first['D']}"
        header = ["dtype", "what", "op", "median seconds", "ratio to the gated delta rule"]
        parts.append(f"Compared with the gated delta rule ({shape})\n\n{markdown_table(header, table)}")
    if "memory" in rows:
        table = [
            [
                str(row["T"]),
                row["dtype"],
                mebibytes(row["peak bytes"]),
                mebibytes(sum(row["held bytes"].values())),
                _ratio(row["ratio"]),
            ]
            for row in rows["memory"]
        ]
        first = rows["memory"][0]
        shape = f"B 1, H {first['H']}, D = V = {first['D']}"
        header = ["T", "dtype", "peak", "inputs, output, gradients, all chunk states", "ratio"]
        parts.append(f"Peak memory of forward + backward ({shape})\n\n{markdown_table(header, table)}")
    if "wide" in rows:
        table, notes = [], {}
        for row in rows["wide"]:
            same = [peer for peer in rows["wide"] if all(peer[key] == row[key] for key in ("what", "B", "T"))]
            base = next((peer["seconds"]["median"] for peer in same if peer["op"] == "Gated DeltaNet"), None)
            seconds = row["seconds"]["median"]
            shape = f"B {row['B']}, T {row['T']}, H {row['H']}"
            ratio = _ratio(seconds / base if base else None)
            gigabytes = "" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e9:.2f}"
            table.append([shape, row["what"], row["op"], f"{seconds * 1e3:.2f}", ratio, gigabytes])
            if "note" in row:
                notes[row["op"]] = row["note"]
        header = ["shape", "what", "op", "median ms", "ratio to Gated DeltaNet", "peak GB above the inputs"]
        parts.append(f"At the paper's width (D = V = 128, bfloat16)\n\n{markdown_table(header, table)}")
        parts += [f"{op}: {note}." for op, note in notes.items()]
        if any(row.get("kernels") for row in rows["wide"]):
            picture = Path(result["file"]).with_suffix(".png").name
            parts.append(f"![time and floor of every kernel](results/{picture})")
    return "\n\n".join(parts)


def decode(result: Result) -> str:
    """Time of one decode step compared with its floor, one row per batch size and dtype of the states."""
    rows = result["rows"]
    columns = list(dict.fromkeys((row["what"], tuple(row["steps"] or ())) for row in rows))
    first = rows[0]
    table = []
    for B, states in dict.fromkeys((row["B"], row["states"]) for row in rows):
        found = {
            (row["what"], tuple(row["steps"] or ())): row["seconds"]["median"]
            for row in rows
            if (row["B"], row["states"]) == (B, states)
        }
        cells = [f"{found[column] * 1e3:.3f}" if column in found else "" for column in columns]
        table.append([str(B), states, *cells])
    header = ["B", "states", *(f"{what} {steps}" if steps else what for what, steps in columns)]
    shape = f"H {first['H']}, D = V = {first['D']}, median ms"
    notes = "floor: a copy of both states; graph: the kernel replayed from a CUDA graph"
    return f"One decode step for every sequence ({shape}; {notes})\n\n{markdown_table(header, table)}"


def generation(result: Result) -> str:
    """Tokens per second of decoding with a model, one row per model and batch size."""
    rows = result["rows"]
    ways, first, table = list(dict.fromkeys(row["way"] for row in rows)), rows[0], []
    for model, B in dict.fromkeys((row["model"], row["B"]) for row in rows):
        found = {row["way"]: row for row in rows if (row["model"], row["B"]) == (model, B)}
        rates = [f"{found[way]['tokens per second']:,.0f}" for way in ways]
        same = [f"{found[way]['equal']:.1%}" for way in ways if way != "eager"]
        table.append([model, str(B), *rates, *same])
    dtype = first.get("dtype", "bfloat16")
    hybrid = "; hybrid: softmax attention in every fourth layer" * any(row["model"] == "hybrid" for row in rows)
    header = ["model", "B", *(f"{way}, tokens/s" for way in ways), *(["same tokens"] * (len(ways) - 1))]
    return (
        f"Decoding through `generate` ({first['recipe']}, {first['parameters'] / 1e6:.0f} M parameters, {dtype}, "
        f"{first['tokens']} new tokens{hybrid})\n\n"
        f"{markdown_table(header, table)}"
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def layer(result: Result) -> str:
    """The layer compared with other layers, and its time by part."""
    rows, table, where, notes = result["rows"], [], [], {}
    first = rows[0]
    for row in rows:
        same = [peer for peer in rows if all(peer[key] == row[key] for key in ("what", "B", "T"))]
        base = next((peer["seconds"]["median"] for peer in same if peer["layer"] == "Gated DeltaNet"), None)
        seconds, shape = row["seconds"]["median"], f"B {row['B']}, T {row['T']}"
        gigabytes = "" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e9:.2f}"
        cells = [f"{seconds * 1e3:.2f}", _ratio(seconds / base if base else None), gigabytes]
        host = [f"{row['host seconds'] * 1e3:.2f}"] if "host seconds" in first else []
        table.append([shape, row["what"], row["layer"], *cells, f"{row['first call']:.1f}", *host])
        if "shares" in row:
            where.append([shape, row["what"], row["layer"], *(f"{s * 1e3:.2f}" for s in row["shares"].values())])
        if "note" in row:
            notes[row["layer"]] = row["note"]
    size = f"hidden {first['hidden']}, {first['H']} heads of {first['D']}, {first['dtype']}"
    header = ["shape", "what", "layer", "median ms", "ratio to Gated DeltaNet", "peak GB", "first call, s"]
    if "host seconds" in first:
        header.append("host ms")
    parts = [
        f"The layer compared with others ({size}); peak memory above parameters and input\n\n"
        f"{markdown_table(header, table)}"
    ]
    if where:
        header = ["shape", "what", "layer", *next(row["shares"] for row in rows if "shares" in row)]
        parts.append(f"Milliseconds on the GPU by part, one profiled call\n\n{markdown_table(header, where)}")
    return "\n\n".join(parts + [f"{name}: {note}." for name, note in notes.items()])


def norm(result: Result) -> str:
    """The gated norm compared with other implementations."""
    table = []
    for row in result["rows"]:
        cells = ["not run", "", ""]
        if row["seconds"] is not None:
            cells = [f"{row['seconds']['median'] * 1e6:.1f}", _ratio(row["ratio"])]
            cells.append(f"{row['bytes per second'] / 1e12:.2f}")
        table.append([f"{row['N']} x {row['V']}", row["dtype"], row["what"], row["norm"], *cells])
    notes = {row["norm"]: row["note"] for row in result["rows"] if "note" in row}
    header = ["rows x V", "dtype", "what", "norm", "median us", "ratio to FusedRMSNormGated", "TB/s"]
    return "\n\n".join([markdown_table(header, table), *(f"{name}: {note}." for name, note in notes.items())])


GRADIENTS = ("dq", "dk", "dv", "dg", "dalpha", "dbeta")


def _thousandths(value: float) -> str:
    return f"{value * 1e3:.1f}"


def family_errors(result: Result) -> str:
    """Errors by family of inputs, for a loss through o only and for a loss through the final states only."""
    table = []
    for row in result["rows"]:
        if row["table"] == "families" and row["steps"] == [16, 16]:
            names = ("o", *GRADIENTS, "states dk", "states dv", "states dg", "states dbeta")
            table.append(
                [row["backend"], row["family"], row["gates"], *(_thousandths(row[name]) for name in names)]
            )
    header = [
        "backend",
        "family",
        "alpha, beta",
        "o",
        *GRADIENTS,
        *(f"states: {n}" for n in ("dk", "dv", "dg", "dbeta")),
    ]
    text = markdown_table(header, table)
    return f"Relative errors ||out - ref|| / ||ref|| in units of 1e-3, steps (16, 16):\n\n{text}"


def place_errors(result: Result) -> str:
    """Errors of the low-rank start by the position of the token; dg of the first token is zero and left out."""
    table, places = [], [key for key in result["rows"][-1] if " to " in key]
    for row in result["rows"]:
        if row["table"] == "first tokens" and row["steps"] == [16, 16] and row["family"] == "low-rank start":
            errors = [_thousandths(row[place]) for place in places]
            if row["of"] == "dg":
                errors[0] = ""
            table.append([row["backend"], row["of"], *errors])
    header = ["backend", "of", *(f"tokens {place}" for place in places)]
    text = markdown_table(header, table)
    return f"The same errors on the low-rank start by the position of the token, for a loss through o:\n\n{text}"


def solver_errors(result: Result) -> str:
    """Errors of both solvers, with alpha and beta random, on the families and on trained inputs of 16 bits."""
    table = []
    for row in result["rows"]:
        trained = row["table"] == "trained" and row["bits"] == 16
        if trained or (row["table"] == "families" and row["gates"] == "random"):
            inputs = f"trained, layer {row['layer']}" if trained else row["family"]
            steps = f"tolerance {row['tolerance']}" if row["steps"] is None else str(tuple(row["steps"]))
            errors = [_thousandths(row[name]) for name in ("o", *GRADIENTS)]
            table.append([row["backend"], inputs, row["solver"], steps, f"{row['products']:.1f}", *errors])
    header = ["backend", "inputs", "solver", "steps", "products", "o", *GRADIENTS]
    return f"Both solvers, in the same units, for a loss through o:\n\n{markdown_table(header, table)}"


def accuracy(result: Result) -> str:
    """All tables of errors; results from before there were two solvers have no table of both."""
    both = [solver_errors(result)] if "solver" in result["rows"][0] else []
    return "\n\n".join([family_errors(result), place_errors(result), *both])


def length(result: Result) -> str:
    """Tables of time against T."""
    rows, notes, parts = result["rows"], {}, []
    first = rows[0]
    for what in dict.fromkeys(row["what"] for row in rows):
        of_what = [row for row in rows if row["what"] == what]
        ops = list(dict.fromkeys(row["op"] for row in of_what))
        table = []
        for T in dict.fromkeys(row["T"] for row in of_what):
            times = {row["op"]: row["seconds"] for row in of_what if row["T"] == T}
            table.append([str(T), *(f"{times[op]['median'] * 1e3:.2f}" if times[op] else "not run" for op in ops)])
        parts.append(f"{what}, milliseconds\n\n{markdown_table(['T', *ops], table)}")
    for row in rows:
        if "note" in row:
            of_note = f"{row['op']}, {row['what']}, from T {row['T']}: {row['note']}."
            notes.setdefault((row["op"], row["what"], row["note"]), of_note)
    shape = f"B {first['B']}, H {first['H']}, D = V = {first['D']}, {first['dtype']}"
    picture = Path(result["file"]).with_suffix(".png").name
    parts = [f"Time against the number of tokens ({shape})", *parts, *notes.values()]
    return "\n\n".join([*parts, f"![time against tokens](results/{picture})"])


def steps(result: Result) -> str:
    """Accuracy and time with fewer solver steps, one row per choice of steps."""
    costs = [row for row in result["rows"] if row["part"] == "accuracy"]
    times = {tuple(row["steps"]): row for row in result["rows"] if row["part"] == "time"}
    most, first = times[tuple(costs[0]["steps"])], costs[0]
    table = []
    for row in costs:
        time, cells = times[tuple(row["steps"])], []
        for name in ("prefill seconds", "decode seconds"):
            seconds = time[name]["median"]
            cells.append(f"{seconds * 1e3:.3g} ({seconds / most[name]['median']:.2f})")
        table.append(
            [
                ",".join(map(str, row["steps"])),
                f"{row['error of o, float32']:.1e}",
                f"{row['error of o, bfloat16']:.1e}",
                f"{row['bits per byte']:.3f}",
                *cells,
            ]
        )
    header = ["steps", "error of o, float32", "error of o, bfloat16 inputs", "bits per byte"]
    header += [f"prompt of {most['T']} tokens, ms", "token, ms"]
    trained = "the default" if first["trained with"] is None else str(first["trained with"])
    return (
        f"{markdown_table(header, table)}\n\n"
        f"Error: ||o - o\\*|| / ||o\\*|| on {first['tokens of o']:,} tokens of held-out text; o\\* uses the exact "
        f"solve in float64. Error and bits per byte ({first['bytes']:,} bytes) are measured with a model of "
        f"{first['layers']} GKA layers, {first['heads']} heads of {first['D']} dims, trained with {trained}. "
        f"Times are median processor milliseconds of one thread in {most['dtype']}, with the ratio to the first "
        f"row in brackets. They are measured with random weights, {most['num_hidden_layers']} layers, hidden size "
        f"{most['hidden_size']}, {most['num_attention_heads']} heads of {most['D']} dims."
    )


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "accuracy": ("Errors with 16-bit inputs", accuracy),
    "ops": ("The op", ops),
    "decode": ("Decoding", decode),
    "generation": ("Decoding with a model", generation),
    "length": ("The op against the number of tokens", length),
    "layer": ("The layer", layer),
    "model": ("Whole models", model_table),
    "norm": ("The gated norm", norm),
    "pool": ("Decoding from a pool of states", pool_table),
    "parallel": ("Sequences that several GPUs share", parallel_table),
    "parallel_model": ("Models whose sequences several GPUs share", parallel_model_table),
    "fsdp": ("Models that FSDP shards", fsdp_table),
    "steps": ("Steps of the solve", steps),
    "serve": ("Servers", serve_table),
}
DOCS = RESULTS.parent.parent / "docs"
# Tables in guides, each between two comments: the page, the benchmark with the newest result, the writer.
# The writer gets all results of the benchmark, from old to new.
GUIDES: dict[str, tuple[Path, str, Callable[[list[Result]], str]]] = {
    "errors": (DOCS / "kernels.md", "accuracy", lambda found: f"{accuracy(found[-1])}\n\n{_source(found[-1])}"),
    "steps": (DOCS / "tools.md", "steps", lambda found: f"{steps(found[-1])} {_source(found[-1])}"),
    "decode": (DOCS / "reliability.md", "long_decode", lambda found: decode_table(found[-1])),
    "saves": (DOCS / "reliability.md", "reliability", lambda found: saves_table(found[-1])),
    "corruptions": (DOCS / "reliability.md", "reliability", lambda found: corruptions_table(found[-1])),
    "shared sequences": (DOCS / "parallel.md", "parallel", shared_sequences_table),
    "models with shared sequences": (DOCS / "parallel.md", "parallel_model", models_table),
    "servers": (DOCS / "serve.md", "serve", lambda found: f"{serve_table(found[-1])}\n\n{_source(found[-1])}"),
    "sharded models": (DOCS / "parallel.md", "fsdp", sharded_models_table),
}
Key = tuple[str, str, frozenset[tuple[str, ...]]]


def found() -> list[Result]:
    """All results, from old to new."""
    files = sorted(RESULTS.glob("*.json"))
    results = [json.loads(path.read_text()) | {"file": path.name} for path in files]
    return sorted(results, key=lambda result: str(result.get("date")))


def newest() -> dict[Key, Result]:
    """The newest result of each benchmark per machine and parts (for the parts of `TOLD_APART` also more)."""
    results: dict[Key, Result] = {}
    for result in found():
        if result.get("benchmark") not in SECTIONS:
            continue
        machine = result["machine"]
        results[result["benchmark"], machine["gpu"] or machine["processor"], _what_was_run(result)] = result
    return results


# Results of these parts are kept apart if they differ in one of these fields.
TOLD_APART = {
    "wide": ("part", "B", "T", "H", "what", "op"),
    "model": ("part", "B", "T", "layers", "loss chunk", "mode", "mixer"),
}
# The same for all rows of a benchmark.
TOLD_APART_IN = {
    "parallel": ("part", "ranks"),
    "parallel_model": ("mixer", "T", "ranks", "checkpointing"),
    "fsdp": ("recipe", "mixer", "B", "T", "ranks", "checkpointing", "compiled"),
}


def _what_was_run(result: Result) -> frozenset[tuple[str, ...]]:
    of_all = TOLD_APART_IN.get(result.get("benchmark", ""))
    parts = (of_all or TOLD_APART.get(row.get("part", ""), ("part",)) for row in result["rows"])
    return frozenset(
        tuple(str(row.get(key, "")) for key in keys) for keys, row in zip(parts, result["rows"], strict=True)
    )


def page() -> str:
    """The text of RESULTS.md."""
    results = newest()
    text = [
        "# Results\n\nThis page has the measured speed, memory and accuracy of the op and the layer. "
        "`python -m benchmarks.table` writes it from the files under `benchmarks/results/`."
    ]
    for name, (title, write) in SECTIONS.items():
        for (benchmark, machine, _), result in results.items():
            if benchmark != name:
                continue
            versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
            text.append(
                f"## {title}: {machine}, {result['machine']['cores']} cores\n\n"
                f"`{result['command']}`, {result['date']}, commit {result['commit']}, {versions}. "
                f"[JSON](results/{result['file']})\n\n{write(result)}"
            )
    return "\n\n".join(text) + "\n"


def _source(result: Result) -> str:
    machine = (
        f"{result['machine']['gpu'] or result['machine']['processor']}, {result['date']}, `{result['command']}`"
    )
    return f"{machine} ([JSON](../benchmarks/results/{result['file']}))."


def guides() -> dict[Path, str]:
    """The pages of GUIDES with new tables."""
    results_of: dict[str, list[Result]] = {}
    for result in found():
        results_of.setdefault(result.get("benchmark", ""), []).append(result)
    pages: dict[Path, str] = {}
    for name, (path, benchmark, make) in GUIDES.items():
        text = pages.get(path) or path.read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: made by python -m benchmarks.table -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        pages[path] = f"{before}{begin}\n{make(results_of[benchmark])}\n\n{end}{rest.split(end)[1]}"
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    check = parser.parse_args().check
    for path, text in {PAGE: page(), **guides()}.items():
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"written: {path}")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} does not match the JSON files; run python -m benchmarks.table")


if __name__ == "__main__":
    main()
