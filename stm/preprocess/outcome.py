"""How a clip ended a stage: what was noticed, and what the config's policies make of it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stm.config import BadInput
from stm.manifest import Policy, Status


class Note(NamedTuple):
    """Something noticed about a clip."""

    status: Status
    detail: str


class Outcome(NamedTuple):
    """A clip's status in a stage's table."""

    status: Status
    policy: Policy
    detail: str

    @property
    def kept(self) -> bool:
        return self.policy == "keep"


_STRICTNESS: Mapping[str, int] = {"fail": 0, "drop": 1, "keep": 2}


def decide(notes: Sequence[Note], bad_input: BadInput, *, usable: bool) -> Outcome:
    """One status for everything that was noticed: the one with the strictest policy; among equals the first note.

    Args:
        notes: what was noticed, gravest first; none means `ok`.
        usable: whether the clip has any result; without one, `keep` becomes `drop`.
    """
    if not notes:
        return Outcome(Status.OK, "keep", "")
    note = min(notes, key=lambda n: _STRICTNESS[bad_input.action(n.status)])
    policy = bad_input.action(note.status)
    if policy == "keep" and not usable:
        policy = "drop"
    others = [f"{n.status}: {n.detail}" for n in notes if n is not note]
    return Outcome(note.status, policy, "; ".join([note.detail, *others]))


def as_columns(outcome: Outcome) -> dict[str, Any]:
    """The columns `status`, `policy` and `detail` of a stage's table."""
    return {"status": str(outcome.status), "policy": outcome.policy, "detail": outcome.detail}
