"""Where records live: one JSON file per finished cell, written whole or not at all."""

import contextlib
import hashlib
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from onsphere._utils.files import write_whole
from onsphere.errors import OnsphereError
from onsphere.studies.engine.job import Cell, Outcome, digest, pack, unpack
from onsphere.studies.engine.machine import Machine, this_machine

FORMAT = 1
"""Version of the records' layout; raised when old records can no longer be read."""


class Store:
    """A folder of records.

    ``records/KEY.json`` holds a result with its configuration, a checksum, and the machine that
    computed it. The machine is no part of the key: records that were begun on one machine are
    gone on with on another.
    ``networks/KEY.safetensors`` holds the tensors of cells that others build on; the record vouches
    for them with their SHA-256. A record that cannot be read is renamed to ``KEY.json.corrupt``;
    it, and a cell whose tensors are missing or damaged, is computed again.

    Args:
        folder: made when missing.

    Raises:
        OnsphereError: the folder cannot be written, or holds records of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = folder / "records"
        self.networks = folder / "networks"
        try:
            self.records.mkdir(parents=True, exist_ok=True)
            self.networks.mkdir(exist_ok=True)
            self._check_format()
        except OSError as error:
            raise OnsphereError(
                f"cannot write to the output folder {str(folder)!r} ({error.strerror}); "
                "choose another with --out"
            ) from None

    def _check_format(self) -> None:
        marker = self.records / "format"
        try:
            found = marker.read_text(errors="replace").strip()
        except FileNotFoundError:
            write_whole(marker, f"{FORMAT}\n".encode())
            return
        if found != str(FORMAT):
            raise OnsphereError(
                f"the records in {str(self.folder)!r} have format {found[:20]!r}, this version of "
                f"onsphere writes format {FORMAT}; choose another folder with --out"
            )

    def sweep(self) -> None:
        """Remove what killed runs left half written more than an hour ago."""
        horizon = time.time() - 3600
        for leftover in (*self.records.glob(".*.part"), *self.networks.glob(".*.part")):
            with contextlib.suppress(FileNotFoundError):
                if leftover.stat().st_mtime < horizon:
                    leftover.unlink()

    def has(self, cell: Cell) -> bool:
        """Tell whether the cell's record is there and sound (and its tensors, if it has any)."""
        return self.read(cell) is not None

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """Return the cell's result, or ``None`` when it has to be computed."""
        path = self._record(cell)
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            self._set_aside(path, f"it cannot be read ({type(error).__name__})")
            return None
        if not isinstance(record, dict) or record.get("cell") != cell.identity:
            self._set_aside(path, "it describes another cell")
            return None
        result = record.get("result")
        if not isinstance(result, dict) or not _vouched(record, result):
            self._set_aside(path, "its checksum does not match")
            return None
        if record.get("tensors") != self._fingerprint(cell):
            return None
        return result

    def machine(self, cell: Cell) -> Machine | None:
        """Return what computed a cell that has a record; ``None`` where the record is too old."""
        return Machine.read(json.loads(self._record(cell).read_text()).get("machine"))

    def tensors(self, cell: Cell) -> dict[str, Tensor]:
        """Return the tensors that the cell saved (none, if it saved none).

        The file is sound where :meth:`read` found the record sound.
        """
        return unpack(self.packed(cell))

    def packed(self, cell: Cell) -> bytes:
        """Return the file of the tensors that the cell saved; no bytes, if it saved none."""
        try:
            return self._network(cell).read_bytes()
        except FileNotFoundError:
            return b""

    def write(self, cell: Cell, outcome: Outcome, machine: Machine | None = None) -> None:
        """Keep an outcome: tensors first, then the record that vouches for them.

        Args:
            cell: what was computed.
            outcome: what came out.
            machine: where; this one unless given.
        """
        if outcome.tensors:
            write_whole(self._network(cell), pack(outcome.tensors))
        record = {
            "cell": cell.identity,
            "checksum": digest(outcome.result),
            "machine": asdict(machine or this_machine()),
            "tensors": self._fingerprint(cell) if outcome.tensors else None,
            "result": outcome.result,
        }
        text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_whole(self._record(cell), text.encode())

    def _record(self, cell: Cell) -> Path:
        return self.records / f"{cell.key}.json"

    def _network(self, cell: Cell) -> Path:
        return self.networks / f"{cell.key}.safetensors"

    def _fingerprint(self, cell: Cell) -> str | None:
        """SHA-256 of the saved tensors; ``None`` where there are none."""
        packed = self.packed(cell)
        return hashlib.sha256(packed).hexdigest() if packed else None

    def _set_aside(self, path: Path, why: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # another run has done it
            path.replace(path.with_name(path.name + ".corrupt"))
        warnings.warn(
            f"record {path.name} was set aside as {path.name}.corrupt: {why}; it is computed again",
            stacklevel=3,
        )


def _vouched(record: dict[str, Any], result: dict[str, Any]) -> bool:
    try:
        return bool(record.get("checksum") == digest(result))
    except ValueError:  # JSON readers take NaN and 1e999 for numbers
        return False
