"""Print what bounds each kernel, by counts alone: needs Triton, and no GPU.

    python benchmarks/limits_table.py > benchmarks/results/limits.md

Bytes over the floor are those of benchmarks/results/meters.json, which `python -m genloss_kernels meters --json` writes.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genloss_kernels.meters import workers
from genloss_kernels.meters.hardware import H200
from genloss_kernels.meters.limits import LIMIT_TITLES, limit_cells

sys.path.insert(0, str(Path(__file__).resolve().parent))
from readme_tables import RESULTS, markdown_table

TEXT = f"""Counted, not measured: no line of this table was timed. Of the main loop of each kernel, compiled for sm_90 in the
calls that the benchmarks make (`python -m genloss_kernels meters --only limits`; `python benchmarks/limits_table.py` prints
this page): bytes, instructions and special-function instructions an element, and from them the least time that each takes
an {H200.name} with all else free. The longest is the **bound**. The last column is memory's time over the longest, at most
the share of memory's speed that the kernel can reach.

- An {H200.name} has {H200.multiprocessors} multiprocessors at {H200.clock / 1e9} GHz, which it keeps under load (1.98 GHz at
  best); in a cycle each issues {H200.lanes} instructions of threads and gives {H200.special} results of special functions;
  memory moves {H200.memory / 1e12} TB/s in a copy, read plus write, measured elsewhere. Pipes for integers and conversions
  are narrower than issue, so an instruction count near its limit is over it.
- **Bytes** are those of operands read and gradients written, each once in the loop; **over floor** is what the byte meter
  found that the kernel moves in all, over the floor of its direction, in bfloat16.
- **In flight** is what a turn of the loop loads in all resident threads. To keep memory busy takes
  {H200.bytes_in_flight() / 1e3:.0f} kB a multiprocessor ({H200.latency * 1e9:.0f} ns a load); less is marked "few".
- A kernel without a loop is counted whole, its start and its last reduction too. Of two passes over the same operands the
  shorter is counted.
- Kernels that gather, or add up a few numbers at the end, have no bytes an element and are left out."""


def over_floor(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The most of a direction's floor that each kernel moves, by loss and kernel."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        for stage in (row["forward"], row["backward"]):
            for kernel, traffic in stage["kernels"].items():
                place, ratio = (row["loss"], kernel), (traffic["loaded"] + traffic["stored"]) / stage["floor"]
                found[place] = max(found.get(place, 0.0), ratio)
    return found


def main() -> None:
    rows = [row for share in workers.run("limits") for row in share["rows"]]
    rows.sort(key=lambda row: (row["memory_share"], row["kernel"], row["formula"], row["label"], row["dtype"]))
    floors = over_floor(json.loads((RESULTS / "meters.json").read_text())["bytes"]["rows"])
    place = LIMIT_TITLES.index("bytes") + 1
    lines = []
    for row in rows:
        cells = list(limit_cells(row))
        ratio = floors.get((row["label"].partition(",")[0], row["kernel"]))
        cells.insert(place, "" if ratio is None else f"{ratio:.3f}")
        if 1e3 * row["kilobytes_in_flight"] < H200.bytes_in_flight():
            cells[LIMIT_TITLES.index("kB in flight") + 1] += " few"
        cells[0] = f"`{cells[0]}`"
        lines.append(cells)
    titles = [*LIMIT_TITLES[:place], "over floor", *LIMIT_TITLES[place:]]
    print(f"{TEXT}\n\n{markdown_table(titles, lines)}")


if __name__ == "__main__":
    main()
