"""What was to be decided and how, written down before anything is measured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onsphere._utils.files import write_whole
from onsphere.errors import OnsphereError
from onsphere.studies.claims.base import Claim
from onsphere.studies.claims.plan import Plan
from onsphere.studies.engine.job import digest
from onsphere.studies.engine.store import Store


@dataclass(frozen=True)
class Protocol:
    """The rules of one claim as they stand in a folder of records.

    Attributes:
        digest: hash of their text.
        records_before: how many of the claim's records the folder held when they were written.
    """

    digest: str
    records_before: int

    def __str__(self) -> str:
        when = (
            "before anything was measured"
            if self.records_before == 0
            else f"when {self.records_before:,} of the claim's records were there already"
        )
        return f"rules {self.digest}, written {when}"


def register(claim: Claim, plan: Plan, store: Store) -> Protocol:
    """Write the rules of a claim into ``rules/CLAIM-HASH.json`` unless they are there.

    The file says how many of the claim's records were in the folder, so that a rule which was
    changed after its measurement can be told from one that was not.

    Args:
        claim: its statements' texts are hashed.
        plan: which records count.
        store: where.

    Returns:
        The rules as they stand there.

    Raises:
        OnsphereError: they cannot be written.
    """
    rules = [
        {
            "statement": one.name,
            "hypothesis": one.hypothesis,
            "quantity": one.quantity,
            "rule": one.rule,
        }
        for one in claim.statements
    ]
    key = digest(rules)
    name = f"{claim.name}-{key}.json"
    try:
        written = json.loads((store.folder / _FOLDER / name).read_text())["records_before"]
    except (OSError, ValueError, KeyError, TypeError):
        written = None
    if not isinstance(written, int):
        written = sum(store.has(cell) for cell in claim.cells(plan))
        _write(store, name, {"rules": rules, "records_before": written})
    return Protocol(key, written)


_FOLDER = "rules"
_CLOSED = "closed.json"
"""Claim -> the fewest seeds at which a run of it was ended by the clock."""


def close(claims: Sequence[Claim], seeds: int, store: Store) -> None:
    """Write down that the time was up and the look at so many seeds took all of the level.

    Args:
        claims: of the run.
        seeds: at which it ended.
        store: where.

    Raises:
        OnsphereError: it cannot be written.
    """
    before = _closed(store)
    now = {one.name: min(seeds, before.get(one.name, seeds)) for one in claims}
    _write(store, _CLOSED, {**before, **now})


def spent_before(claims: Sequence[Claim], seeds: int, store: Store) -> str:
    """Say which claims have spent their level at fewer seeds before; nothing where none has.

    Args:
        claims: of this run.
        seeds: that it has reached.
        store: where runs before it were ended.
    """
    closed = _closed(store)
    found = [one.name for one in claims if closed.get(one.name, seeds) < seeds]
    if not found:
        return ""
    return (
        f"The time of an earlier run was up after {min(closed[name] for name in found)} seeds, and "
        "it took all of the 5 % there. With this run the chance of a wrong outcome in a claim is "
        f"up to twice as large ({', '.join(found)})."
    )


def _write(store: Store, name: str, content: dict[str, Any]) -> None:
    path = store.folder / _FOLDER / name
    try:
        write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise OnsphereError(
            f"cannot write the rules {str(path)!r} ({error.strerror}); choose another folder with "
            "--out"
        ) from None


def _closed(store: Store) -> dict[str, int]:
    try:
        written = json.loads((store.folder / _FOLDER / _CLOSED).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(written, dict):
        return {}
    return {name: count for name, count in written.items() if isinstance(count, int)}
