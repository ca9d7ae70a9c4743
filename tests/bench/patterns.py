"""How time and memory of every primitive and preset grow with the number of tokens n.

    python tests/bench/patterns.py
    python tests/bench/patterns.py --render           # only writes what has been measured
    python tests/bench/patterns.py --render --check   # 1 when the page says something else

Measures, on one CPU thread, what compiling a causal prompt's lists takes and holds, lengths in
turn, and fits exponents by least squares on logarithms: of the pairs of a query and a key (what
attention computes), of the time, and of the lists' bytes. Parameters that the class counts as
sqrt n (strides, blocks of `fixed`, grids) grow as sqrt n; all others stay. A million tokens are
compiled, too, or refused. Prints the table, writes it into docs/patterns.md and the figures into
`tests/bench/results/patterns-cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels.patterns.pattern import Pattern  # noqa: E402
from kernels.patterns.published import SPECS  # noqa: E402
from service.envelope import as_json, current_commit, envelope  # noqa: E402

PAGE = ROOT / "docs/patterns.md"
RESULTS = ROOT / "tests/bench/results/patterns-cpu.json"
BEGIN, END = "<!-- patterns: written by tests/bench/patterns.py -->", "<!-- end of patterns -->"
LENGTHS = (1 << 14, 1 << 16, 1 << 18)
MILLION = 1 << 20
CASES = {
    "full": "full",
    "window": "window:512",
    "dilated": "dilated:64,8",
    "global": "global:64",
    "strided": "strided:{root}",
    "fixed": "fixed:{root},8",
    "block_local": "block_local:256",
    "axial": "axial:{root},{root}",
    "random": "random:3,0",
    "sinks": "sinks:16",
    "longformer": SPECS["longformer"].removesuffix("@bidirectional"),
    "bigbird": SPECS["bigbird"].removesuffix("@bidirectional"),
    "sparse-transformer-strided": "window:128+strided:{root}",
    "sparse-transformer-fixed": "fixed:{root},32",
    "mistral": SPECS["mistral"],
    "streaming": SPECS["streaming"],
}


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one pattern."""

    name: str
    spec: str  # of a million tokens
    complexity: str  # what the algebra says
    pairs_exponent: float
    time_exponent: float
    bytes_exponent: float
    million_count_seconds: float  # CPU time
    million_compile_seconds: float
    million_mib: float
    million_sparsity: float


def spelled(spec: str, tokens: int) -> str:
    """A case's pattern for so many tokens, a power of four: roots are whole."""
    return spec.format(root=math.isqrt(tokens))


def compiled(pattern: Pattern, tokens: int) -> tuple[float, int]:
    """CPU seconds that a prompt's lists take, and their bytes."""
    begun = time.process_time()
    tiles = pattern.tiles(0, tokens, tokens, "cpu")
    seconds = time.process_time() - begun
    held = (tiles.starts, tiles.counts, tiles.whole, tiles.pages, tiles.masks, tiles.bits)
    return seconds, sum(part.untyped_storage().nbytes() for part in held)


def exponent(lengths: list[int], values: list[float]) -> float:
    """The slope of log value over log length."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def measure(name: str, spec: str, repeats: int) -> Row:
    """One pattern, lengths interleaved."""
    seconds: dict[int, list[float]] = {n: [] for n in LENGTHS}
    held: dict[int, int] = {}
    for _ in range(repeats):
        for n in LENGTHS:
            taken, held[n] = compiled(Pattern.parse(spelled(spec, n)), n)
            seconds[n].append(taken)
    pairs = [float(Pattern.parse(spelled(spec, n)).selected_keys(n)) for n in LENGTHS]
    lengths = list(LENGTHS)
    long = Pattern.parse(spelled(spec, MILLION))
    begun = time.process_time()
    million = long.selected_keys(MILLION)
    counted = time.process_time() - begun
    taken, size = compiled(long, MILLION)
    return Row(
        name=name,
        spec=str(long),
        complexity=long.complexity,
        pairs_exponent=round(exponent(lengths, pairs), 2),
        time_exponent=round(exponent(lengths, [statistics.median(seconds[n]) for n in lengths]), 2),
        bytes_exponent=round(exponent(lengths, [float(held[n]) for n in lengths]), 2),
        million_count_seconds=round(counted, 3),
        million_compile_seconds=round(taken, 3),
        million_mib=round(size / 2**20, 1),
        million_sparsity=round(1 - 2 * million / (MILLION * (MILLION + 1)), 6),
    )


def table(rows: list[Row], head: dict[str, object]) -> str:
    """The rows in Markdown."""
    lines = [
        "| pattern | spelled, at a million tokens | class | pairs | time | memory | "
        "a million: counted | compiled | lists | left out |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | `{r.spec}` | {r.complexity} | n^{r.pairs_exponent:.2f} | "
        f"n^{r.time_exponent:.2f} | n^{r.bytes_exponent:.2f} | {r.million_count_seconds:.2f} s | "
        f"{r.million_compile_seconds:.2f} s | {r.million_mib:,.0f} MiB | "
        f"{r.million_sparsity:.2%} |"
        for r in rows
    ]
    lines += [
        "",
        f"(`{head['command']}`, one thread of {head['machine']}, commit {head['commit']}, "
        "[patterns-cpu.json](../tests/bench/results/patterns-cpu.json). Exponents are fitted from "
        f"{LENGTHS[0]:,} to {LENGTHS[-1]:,} tokens, of pairs as counted, of CPU time and bytes of "
        "the lists of pages; where these repeat, compiling grows more slowly than the pairs.)",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure all, or render what has been measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--render", action="store_true", help="only write the page's table")
    parser.add_argument("--check", action="store_true", help="do not write the page")
    parser.add_argument("--machine", default="an Intel Xeon")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.render:
        rows = [measure(name, spec, options.repeats) for name, spec in CASES.items()]
        head = envelope(
            "python tests/bench/patterns.py",
            current_commit(),
            options.machine,
            {"lengths": list(LENGTHS), "repeats": options.repeats},
        )
        RESULTS.write_text(as_json(head, rows))
    told = json.loads(RESULTS.read_text())
    rows = [Row(**record) for record in told["records"]]
    text = table(rows, told)
    print(text)
    before = PAGE.read_text(encoding="utf-8")
    head, _, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        sys.exit(f"{PAGE.name} must hold the lines {BEGIN} and {END}")
    wanted = f"{head}{BEGIN}\n{text}\n{END}{tail}"
    if options.check and wanted != before:
        print("docs/patterns.md says something else: python tests/bench/patterns.py --render")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    slow = [asdict(r) for r in rows if r.million_count_seconds > 1]
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
