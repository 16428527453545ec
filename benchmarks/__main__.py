"""Run the benchmarks: pairs in turn, medians, ratios (``python -m benchmarks [NAME …] [--quick]``)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks import large, ledger, off, start
from benchmarks.harness import Row, table

BENCHMARKS = {"large": large.run, "ledger": ledger.run, "off": off.run, "start": start.run}


def main(argv: list[str]) -> int:
    """Run the named benchmarks, or all; print the table and write ``results.json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"one of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, one pair: does it work at all")
    parser.add_argument("--pairs", type=int, default=5, help="how many pairs after the warm-up (default 5)")
    parser.add_argument("--only", default="", help="only the rows whose name contains this text")
    options = parser.parse_args(argv)
    unknown = set(options.name) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    for name in options.name or BENCHMARKS:
        rows += BENCHMARKS[name](
            quick=options.quick, pairs=1 if options.quick else options.pairs, only=options.only
        )
    print(table(rows))
    results = Path(__file__).parent / "results.json"
    if not options.quick:
        results.write_text(json.dumps([row.document() for row in rows], indent=2) + "\n")
        print(
            f"written: {results.relative_to(Path.cwd()) if results.is_relative_to(Path.cwd()) else results}"
        )
    return 0


if __name__ == "__main__":
    os.environ.pop("SCRAPY_SETTINGS_MODULE", None)
    sys.exit(main(sys.argv[1:]))
