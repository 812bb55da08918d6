"""What was to be decided and how, written down before anything is measured."""

import json
from dataclasses import dataclass

from onsphere._utils.files import write_whole
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
        store: where; its folder can be written.

    Returns:
        The rules as they stand there.
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
    path = store.folder / "rules" / f"{claim.name}-{key}.json"
    try:
        written = json.loads(path.read_text())["records_before"]
    except (OSError, ValueError, KeyError, TypeError):
        written = None
    if not isinstance(written, int):
        written = sum(store.has(cell) for cell in claim.cells(plan))
        text = json.dumps({"rules": rules, "records_before": written}, indent=1) + "\n"
        write_whole(path, text.encode())
    return Protocol(key, written)
