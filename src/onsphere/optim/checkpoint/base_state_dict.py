"""Radii of vectors beside the state dict of the optimizer that :func:`on_sphere` wraps.

In a state dict like PyTorch's they are entries of the first parameter of each family; in another
they have a key of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from onsphere.optim.checkpoint.state_dict import numbers_of, of_a_recipe
from onsphere.optim.distributed import placement
from onsphere.optim.steps.project import ConstrainedParameters
from onsphere.optim.updates.types import Group

_BESIDE = "on_sphere"
_OWN = {"radius", "skipped"}


def with_radii(
    packed: dict[str, Any],
    groups: list[Group],
    constrained: Sequence[ConstrainedParameters],
    *,
    sharded: bool,
) -> dict[str, Any]:
    """Return the base's state dict with radii and counts added.

    Args:
        packed: what the base optimizer saves.
        groups: its param groups.
        constrained: what is on spheres.
        sharded: whether counts are spread over processes, and are to be added up.
    """
    skips = [held.skipped for held in constrained]
    if sharded:
        counts = [(held.params, held.sphere, held.skipped) for held in constrained]
        skips = placement.added_counts(counts)
    own = [
        {"radius": held.radius, "skipped": skipped}
        for held, skipped in zip(constrained, skips, strict=True)
    ]
    if not _is_of_pytorch(packed):
        return {**packed, _BESIDE: own}
    numbers, state = numbers_of(groups, packed), dict(packed["state"])
    for held, entries in zip(constrained, own, strict=True):
        number = numbers[held.params[0]]
        state[number] = {**state.get(number, {}), **entries}
    return {**packed, "state": state}


def take_radii(
    packed: dict[str, Any],
    groups: list[Group],
    constrained: Sequence[ConstrainedParameters],
    *,
    sharded: bool,
) -> dict[str, Any]:
    """Load radii and counts, where there are any; return what is left for the base optimizer.

    Args:
        packed: what was saved.
        groups: param groups of the base optimizer.
        constrained: what is on spheres.
        sharded: whether counts are spread over processes.

    Raises:
        ValueError: there are more or fewer radii than vectors.
    """
    rest = dict(packed)
    if _BESIDE in rest:
        for held, entries in zip(constrained, rest.pop(_BESIDE), strict=True):
            _load(held, entries["radius"], entries["skipped"], sharded=sharded)
    if not _is_of_pytorch(rest):
        return rest
    # PyTorch takes step counts over without a copy: two runs would count on one tensor.
    state = {
        number: {key: _own_scalar(value) for key, value in entries.items()}
        for number, entries in rest["state"].items()
    }
    numbers = numbers_of(groups, rest)
    for held in constrained:
        entries = state.get(numbers.get(held.params[0], -1), {})
        if not entries.keys() >= _OWN:
            continue  # an entry of the base optimizer's own may have one of these names
        _load(held, entries.pop("radius"), entries.pop("skipped"), sharded=sharded)
    # What held nothing but radii was never seen by the base optimizer.
    return {**rest, "state": {number: entries for number, entries in state.items() if entries}}


def rates_of(packed: dict[str, Any], groups: list[Group]) -> dict[str, Any]:
    """Return a saved state dict whose groups turn as a recipe in code has them.

    One saved on spheres by an earlier version has the rotation as its rate; one of the base
    optimizer's own has the tuned rate, of which the recipe in code makes the rotation.

    Args:
        packed: what was saved.
        groups: param groups of the base optimizer.
    """
    theirs = packed.get("param_groups", ())
    if not _is_of_pytorch(packed) or len(theirs) != len(groups):
        return packed
    state = packed["state"].values()
    on_spheres = _BESIDE in packed or any(entries.keys() >= _OWN for entries in state)
    taken = []
    for number, (mine, its) in enumerate(zip(groups, theirs, strict=True)):
        if on_spheres:
            taken.append(of_a_recipe(mine, its, number))
        else:
            scale = {k: v for k, v in mine.items() if k == "rotation_scale"}
            taken.append({**scale, **its})
    return {**packed, "param_groups": taken}


def _load(held: ConstrainedParameters, radius: Tensor, skipped: Tensor, *, sharded: bool) -> None:
    if radius.shape != held.radius.shape:
        raise ValueError(
            f"the saved radii have shape {tuple(radius.shape)}, the spheres given here "
            f"want {tuple(held.radius.shape)}; resume with the same spheres"
        )
    held.radius.copy_(radius)
    held.skipped.copy_(skipped)
    if sharded and not placement.counts_for_all(held.params, held.sphere):
        held.skipped.zero_()


def _is_of_pytorch(packed: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of PyTorch's, with a state by number that radii can be put in."""
    groups = packed.get("param_groups", ())
    return isinstance(packed.get("state"), Mapping) and all("params" in g for g in groups)


def _own_scalar(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and not value.ndim else value
