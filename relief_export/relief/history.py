"""What the relief loop leaves on the disk, so that it goes on where it was stopped.

::

    relief.json                                the key: what the rounds depend on
    history.jsonl                              one line per finished round
    rounds/NN/masks.safetensors                before retraining, kept for every round
    rounds/NN/retraining.pt                    the retraining's own checkpoint, until it is finished
    rounds/NN/weights.safetensors              after retraining, kept too: another accuracy_drop only chooses again

A folder is this loop's own where its relief.json says so. One that has such files without it is somebody else's, and
is refused; one of other settings is refused too, unless the caller says that what is there may go.

Only the main process touches files; the others receive what it read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from torch import distributed as dist

from relief_export import records
from relief_export.errors import InputError, IntegrityError
from relief_export.printing import counted
from relief_export.recipe import ReliefConfig
from relief_export.relief.masks import Masks
from relief_export.state import restore
from relief_export.training import distributed
from relief_export.training.checkpoints import load_weights, save_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import nn

T = TypeVar("T")

_FILES = ("masks.safetensors", "weights.safetensors", "retraining.pt")
"""What the folder of one round may hold."""


@dataclass(frozen=True)
class Round:
    """One row of history; round 0 is the dense network. Accuracies are fractions of the validation set.

    Attributes:
        round: Its number.
        accuracy_before: Under the new masks, before retraining; None for the dense network.
        accuracy: After retraining.
        test_accuracy: After retraining, on the test set: reported, never used for a choice.
        peak_test_accuracy: The highest of any epoch of the retraining, where it was watched: likewise.
        dense, kept: Connections, by the paper's count.
        eligible: Whether it loses no more accuracy than is allowed, so that it may be the result.
        layers: Layer name -> dense and kept connections, and neurons that have any left, of how many.
        unknown: Operators that the search for disconnected neurons does not know -> how often; it kept all they touch.
        seconds: Wall time of scoring (with selection), disconnection, retraining, and all.
    """

    round: int
    accuracy_before: float | None
    accuracy: float
    test_accuracy: float | None
    dense: int
    kept: int
    eligible: bool
    layers: dict[str, dict[str, int]]
    unknown: dict[str, int]
    seconds: dict[str, float]
    peak_test_accuracy: float | None = None


class History:
    """The files of one relief loop; without a folder it keeps nothing and remembers nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def open(self, key: Mapping[str, Any], *, force: bool = False) -> list[Round]:
        """Return the finished rounds of a loop with this very key.

        Args:
            key: What the rounds depend on.
            force: Remove the rounds of another key.

        Raises:
            InputError: The folder is somebody else's, or holds rounds of another key and ``force`` is not given.
            IntegrityError: Its files are damaged.
        """
        folder = self._folder
        return from_main(lambda: _open(folder, dict(key), force=force)) if folder else []

    def masks(self, number: int) -> Masks | None:
        """Return the masks of a round that was begun, or None."""
        path = self._path(number, "masks.safetensors")
        return from_main(lambda: Masks.load(path) if path.exists() else None) if path else None

    def begin(self, number: int, masks: Masks) -> None:
        """Keep the masks of a round before its retraining."""
        if (path := self._path(number, "masks.safetensors")) and distributed.is_main():
            masks.save(path)

    def checkpoint(self, number: int) -> Path | None:
        """Return where the retraining of a round may keep its state."""
        return self._path(number, "retraining.pt")

    def finish(self, rows: Sequence[Round], model: nn.Module) -> None:
        """Keep the weights of the network that the last of ``rows`` tells of, then all rows."""
        last = rows[-1].round
        if last and (path := self._path(last, "weights.safetensors")) and distributed.is_main():
            # The weights come before the row: a row without its weights would be a round that cannot be loaded.
            save_weights(model, path)  # the dense network is the caller's
        self.record(rows)
        if (done := self._path(last, "retraining.pt")) and distributed.is_main():
            done.unlink(missing_ok=True)

    def record(self, rows: Sequence[Round]) -> None:
        """Keep the rows of the finished rounds."""
        if self._folder and distributed.is_main():
            lines = [json.dumps(asdict(row)) + "\n" for row in rows]
            records.write_bytes(self._folder / "history.jsonl", "".join(lines).encode())

    def load(self, number: int, model: nn.Module) -> None:
        """Load the weights after a round's retraining.

        Raises:
            IntegrityError: They are damaged.
        """
        if path := self._path(number, "weights.safetensors"):
            restore(model, from_main(lambda: load_weights(model, path)))

    def _path(self, number: int, name: str) -> Path | None:
        return self._folder / _name(number) / name if self._folder else None


def _name(number: int) -> str:
    return f"rounds/{number:02d}"


def _open(folder: Path, key: dict[str, Any], *, force: bool) -> list[Round]:
    where, history = folder / "relief.json", folder / "history.jsonl"
    if not where.exists():
        if foreign := next((path for path in (history, folder / "rounds") if path.exists()), None):
            raise InputError(
                f"{foreign} is there and no relief.json beside it: it is not of a relief; name another folder"
            )
        records.write_json(where, key)
        return []
    old = records.read_json(where)
    if "config" not in old or "start" not in old:
        raise InputError(f"{where} is not of a relief: name another folder")
    rows = _rows(history)
    if not (difference := _difference(old, key)):
        return rows
    # Round 0 is the dense network alone, measured in moments: nothing of worth is lost with it.
    if rows[1:] and not force:
        raise InputError(
            f"{folder} holds {counted(len(rows) - 1, 'finished round')} of other settings ({difference}): "
            "name another folder, or give force=True to lose them"
        )
    _clear(folder)
    records.write_json(where, key)
    return []


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the first thing in which two keys differ, in words; nothing where they are the same."""
    # A setting that is younger than the file was, then, what is now its default.
    defaults = {item.name: item.default for item in fields(ReliefConfig)}
    before, now = old["config"], new["config"]
    for name in sorted({*before, *now}):
        was, is_now = before.get(name, defaults.get(name)), now.get(name, defaults.get(name))
        if was != is_now:
            return f"{name} was {was} and is {is_now}"
    told = {"start": "the network's weights", "masks": "the masks from the start", "init": "the initial weights"}
    others = sorted({*old, *new} - {"config"})
    return next((f"{told.get(name, name)} changed" for name in others if old.get(name) != new.get(name)), "")


def _clear(folder: Path) -> None:
    """Remove what a relief wrote, file by file: what else lies there is not ours."""
    (folder / "history.jsonl").unlink(missing_ok=True)
    for one in sorted((folder / "rounds").glob("[0-9][0-9]*")):
        for name in _FILES:
            (one / name).unlink(missing_ok=True)
        # A folder that holds a stranger's file stays.
        if one.is_dir() and not any(one.iterdir()):
            one.rmdir()


def _rows(history: Path) -> list[Round]:
    try:
        rows = [Round(**json.loads(line)) for line in history.read_text().splitlines()] if history.exists() else []
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{history} is damaged ({error}): remove it to start relief afresh") from None
    for number, row in enumerate(rows):
        # A row is chosen by its position, so a missing line would silently shift all that follow.
        if row.round != number or not isinstance(row.accuracy, (int, float)) or not isinstance(row.kept, int):
            raise IntegrityError(f"{history} is damaged (its line {number + 1}): remove it to start relief afresh")
    return rows


def from_main(make: Callable[[], T]) -> T:
    """Call ``make`` in the main process and return its result, or raise its error, in every process."""
    if distributed.world() == 1:
        return make()
    answer: list[Any] = [None, None]
    if distributed.is_main():
        try:
            answer[0] = make()
        except Exception as error:  # noqa: BLE001  raised below, in every process, or the others would wait for ever
            answer[1] = error
    # The error travels like a result, so that every process ends with the same sentence.
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result
