"""Train, relieve and prove the systems of pipelines/evidence.txt one after the other, and keep what each run measured.

``python -m benchmarks.evidence`` goes through the list. It can be killed at any moment: the same command goes on from
the last whole epoch. Every finished run leaves its record in benchmarks/results/runs/, from which docs/results.md is
rendered; build/evidence.log has one line a run, rewritten every few seconds, and ``--status`` prints it.

A run may be a *baseline*: a score's name (magnitude, magnitude-global, random) behind a recipe runs it again with that
score in place of relief's, from the same dense network, to the same shares of connections in the same rounds with the
same retraining. What relief itself is worth is the difference.

``--minutes N`` fits the list into N minutes. A run that would go beyond them ends with the rounds of pruning that it
has (its record's command says how many), because an unfinished run proves nothing; one without a finished round waits
for the next call.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.common import ROOT
from benchmarks.runs import RUNS, summary
from relief_export import stages
from relief_export.errors import InputError, ReliefError
from relief_export.recipe import load_recipe, parse_overrides
from relief_export.records import RECORDS, read_json, write_bytes, write_json
from relief_export.report.numbers import format_percent, format_seconds
from relief_export.report.run import read_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from relief_export.recipe import Recipe

LIST = ROOT / "pipelines" / "evidence.txt"
LOG = "evidence.log"
BASELINES: tuple[Literal["magnitude", "magnitude-global", "random"], ...] = ("magnitude", "magnitude-global", "random")
_EVERY = 5.0
"""Seconds between two writings of the log."""
_CLOSING = 0.15
"""Share of the time that is kept for export, validation and the record when time is limited."""


class _TimeUpError(Exception):
    """Raised out of a training or a relief loop, which both go on later from what they have kept."""


@dataclass(frozen=True)
class Entry:
    """One run of the list: a resolved recipe and its build folder; of a baseline, relief's own folder, too."""

    recipe: Recipe
    folder: Path
    relief: Path | None = None

    @property
    def epochs(self) -> int:
        """Epochs of the whole run, all rounds of pruning included."""
        again = self.recipe.relief.retrain or self.recipe.train
        return self.recipe.train.epochs + self.recipe.relief.rounds * again.epochs

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The finished rounds of pruning, the dense network first."""
        return _rows(self.folder)

    def resolved(self) -> Recipe:
        """Return the recipe; of a baseline with the shares that relief kept, and its dense network in place.

        Raises:
            InputError: The run of relief that it is compared with is not finished.
        """
        if self.relief is None:
            return self.recipe
        if not (self.relief / RECORDS["relieve"]).exists():
            raise InputError(f"the run {self.relief.name}, whose shares are kept here, is not finished")
        shares = [row["kept"] / row["dense"] for row in _rows(self.relief)]
        falling = [share for before, share in itertools.pairwise(shares) if share < before]
        if not (self.folder / "dense").exists():
            shutil.copytree(self.relief / "dense", self.folder / "dense")
        relief = replace(self.recipe.relief, keep=tuple(falling), rounds=len(falling))
        return replace(self.recipe, relief=relief)


def _rows(folder: Path) -> list[dict[str, Any]]:
    history = folder / "relieved" / "history.jsonl"
    return [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []


def read_list(path: Path, build: Path, settings: dict[str, str]) -> list[Entry]:
    """Read lines of ``RECIPE[@VARIANT] [SEED] [SCORE]``; what follows a # is a comment.

    Raises:
        InputError: A line is malformed, or names no recipe; the sentence has its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"the list {path} cannot be read: {error.strerror}") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not (words := line.partition("#")[0].split()):
            continue
        recipe_name, *rest = words
        seed = rest.pop(0) if rest and rest[0].isdecimal() else "0"
        score = next((name for name in BASELINES if rest[:1] == [name]), None)
        rest = rest if score is None else rest[1:]
        if rest:
            raise InputError(
                f'{path}, line {number}: "{line}" is not RECIPE[@VARIANT] [SEED] [SCORE], a score being '
                f"{', '.join(BASELINES)}"
            )
        try:
            recipe = load_recipe(recipe_name, settings | {"seed": seed})
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        folder = build / (recipe_name + (f"-seed{recipe.seed}" if recipe.seed else ""))
        if score is None:
            entries.append(Entry(recipe, folder))
        else:
            # The shares are known once relief has run; until then one stands in for them.
            relief = replace(recipe.relief, score=score, keep=tuple(0.9**k for k in range(recipe.relief.rounds)))
            plain = replace(recipe, relief=relief, quantise=None)
            entries.append(Entry(plain, folder.with_name(f"{folder.name}-{score}"), folder))
    return entries


class Queue:
    """The list on its way: what each run says of itself, and when time is up."""

    def __init__(self, entries: list[Entry], log: Path, out: Path, minutes: float | None) -> None:
        self.entries, self.log, self.out = entries, log, out
        now = time.monotonic()
        self.deadline = None if minutes is None else now + 60 * minutes
        self.stop_at = None if minutes is None else now + 60 * minutes * (1 - _CLOSING)
        self.lines = {
            entry.folder: _line(entry, "waiting" if not entry.folder.exists() else "begun") for entry in entries
        }
        self._write()

    def run(self) -> bool:
        """Go through the list; return whether every run was finished, passed its validation and holds its budgets."""
        ok = True
        for entry in self.entries:
            if self.stop_at is not None and time.monotonic() > self.stop_at:
                ok = False
                break
            try:
                done = self._finish(entry)
            except _TimeUpError:
                self.say(entry, "stopped: time is up", force=True)
                ok = False
                break
            except ReliefError as error:
                self.say(entry, f"failed: {error}", force=True)
                ok = False
                continue
            ok &= done
        return ok

    def _finish(self, entry: Entry) -> bool:
        started = time.monotonic()
        entry = replace(entry, recipe=entry.resolved())
        try:
            passed = stages.run(entry.recipe, entry.folder, progress=self._watch(entry))
        except _TimeUpError:
            rounds = len(entry.rows) - 1
            if rounds < 1:
                raise
            # The loop's key does not hold the number of its rounds, so that those there are stay.
            relief = replace(entry.recipe.relief, rounds=rounds)
            passed = stages.run(replace(entry.recipe, relief=relief), entry.folder)
        found = summary(read_run(entry.folder))
        write_json(self.out / f"{found['name']}.json", found)
        spent = format_seconds(max(time.monotonic() - started, found["seconds"]["all"]))
        self.say(entry, f"{'finished' if passed else 'finished, but a check FAILED'} in {spent}", force=True)
        return passed

    def _watch(self, entry: Entry) -> Callable[[str, int, int, str], None]:
        """Return the progress callback of a run: it writes the log, and stops the training when time is up."""
        recipe = entry.recipe
        again = (recipe.relief.retrain or recipe.train).epochs
        first: list[tuple[float, float]] = []  # time and epochs done when this process began to train

        def watch(task: str, done: int, total: int, _: str) -> None:
            if task == "train":
                epochs = recipe.train.epochs * done / max(total, 1)
            elif task.startswith("retrain "):
                number = int(task.removeprefix("retrain ").partition("/")[0])
                epochs = recipe.train.epochs + again * (number - 1 + done / max(total, 1))
            else:
                self.say(entry, task)
                return
            now = time.monotonic()
            if self.stop_at is not None and now > self.stop_at:
                raise _TimeUpError
            if not first:
                first.append((now, epochs))
            state = f"{task}, {epochs:.1f} of {entry.epochs} epochs"
            if epochs > first[0][1]:
                left = (entry.epochs - epochs) * (now - first[0][0]) / (epochs - first[0][1])
                state += f", about {format_seconds(left)} left"
            self.say(entry, state)

        return watch

    def say(self, entry: Entry, state: str, *, force: bool = False) -> None:
        """Note the state of a run and write the log, if the last writing is not a moment ago."""
        if force or time.monotonic() - self.written > _EVERY:
            self.lines[entry.folder] = _line(entry, state)
            self._write()

    def _write(self) -> None:
        self.written = time.monotonic()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        write_bytes(self.log, "\n".join([f"as of {stamp}", *self.lines.values(), ""]).encode())


def _line(entry: Entry, state: str) -> str:
    """Describe a run by what its build folder holds: accuracies are validation's, the ones that choose."""
    parts = []
    rows = entry.rows
    dense, relieved = entry.folder / "dense" / "record.json", entry.folder / "relieved" / "record.json"
    if dense.exists():
        parts.append(f"dense {format_percent(read_json(dense)['outcome']['validation'])}")
    if relieved.exists():
        found = read_json(relieved)["outcome"]
        count = found["connections"]
        parts.append(
            f"chosen {format_percent(found['validation'])} at {format_percent(count['kept'] / count['dense'])}"
        )
    elif len(rows) > 1:
        last = rows[-1]
        share = format_percent(last["kept"] / last["dense"])
        parts.append(f"round {last['round']} {format_percent(last['accuracy'])} at {share}")
    return f"{entry.folder.name:<32} {'; '.join([*parts, state])}"


def _settings() -> dict[str, str]:
    """Return what suits this machine: on an accelerator small networks are bound by the launches of their kernels."""
    import torch  # noqa: PLC0415  it starts slowly, and --status has no use for it

    return {"train.cuda_graph": "true"} if torch.cuda.is_available() else {}


@contextmanager
def _alone(build: Path) -> Iterator[None]:
    """Hold the queue's lock: two queues would train the same run at once."""
    build.mkdir(parents=True, exist_ok=True)
    with (build / "evidence.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"a queue is running in {build} already: see it with --status") from None
        yield


def main(arguments: list[str] | None = None) -> None:
    """Run the list or tell how far it is; exit 1 where a run failed or is not finished, 2 on a caller's mistake."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="build folders' names of the list; all when absent")
    parser.add_argument("--list", type=Path, default=LIST, help="what is run (default: %(default)s)")
    parser.add_argument("--build", type=Path, default=Path("build"), help="where the build folders are")
    parser.add_argument("--out", type=Path, default=RUNS, help="where records of finished runs go")
    parser.add_argument("--minutes", type=float, help="end after so many minutes, with the rounds that fitted")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for every recipe")
    parser.add_argument("--status", action="store_true", help="print the log of the queue, and do nothing else")
    options = parser.parse_args(arguments)
    try:
        if options.status:
            log = options.build / LOG
            if not log.exists():
                raise InputError(f"{log} does not exist: no queue was started here")
            print(log.read_text(), end="")
            return
        entries = read_list(options.list, options.build, _settings() | parse_overrides(options.set))
        if unknown := sorted(set(options.names) - {entry.folder.name for entry in entries}):
            raise InputError(f'{options.list} has no run "{unknown[0]}"')
        # In the order of the names, where there are some: the caller knows what matters now.
        chosen = {entry.folder.name: entry for entry in entries}
        entries = [chosen[name] for name in options.names] or entries
        with _alone(options.build):
            queue = Queue(entries, options.build / LOG, options.out, options.minutes)
            ok = queue.run()
    except ReliefError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(queue.log.read_text(), end="")
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
