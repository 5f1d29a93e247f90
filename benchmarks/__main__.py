"""Run the benchmarks: ``python -m benchmarks [NAME ...]`` from the root of the project."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.common import RESULTS, Benchmark


def benchmarks() -> dict[str, Benchmark]:
    """Return every benchmark of this folder by name: a module is one when it defines ``BENCHMARK``."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__main__")
    modules = (importlib.import_module(f"benchmarks.{stem}") for stem in stems)
    found = (getattr(module, "BENCHMARK", None) for module in modules)
    return {benchmark.name: benchmark for benchmark in found if isinstance(benchmark, Benchmark)}


def main() -> None:
    """Run the named benchmarks, or all of them, and say where each result went."""
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks, write their JSON.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(known)}; all when absent")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"no benchmark is named {unknown[0]!r}; there are: {', '.join(known)}")
    for name in options.names or known:
        print(f"{name}: {known[name].question}", file=sys.stderr)
        print(known[name].write(options.out))


if __name__ == "__main__":
    main()
