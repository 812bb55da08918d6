"""What a sphere optimizer's state looks like in a file, and how it comes back.

A file may hold the state of another precision, of a plain optimizer, or of other spheres. What
belongs to a vector must have one number per vector, or the kernels would read what is not there.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onsphere._utils.warning import warn
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim.distributed import placement
from onsphere.optim.families import sets_of
from onsphere.optim.master_weights import state_dtype
from onsphere.optim.updates.types import Group

_OF_THE_PARAMS = ("params", "param_names")
# Numbers per vector that must come back as they were saved. Optimizer.load_state_dict casts every
# state tensor to the parameter's dtype, which in bfloat16 would move every radius.
_PER_VECTOR = ("radius", "vector_moment")
# Moments that have an entry for each of the parameter's.
_PER_ENTRY = ("exp_avg", "exp_avg_sq", "momentum_buffer")
# What options of a group were called in earlier versions, and their values.
_EARLIER_KEYS = {"lr_is": "lr_mode", "step": "retraction"}
_EARLIER_VALUES = (("lr_mode", "rotation", "angle"), ("retraction", "retraction", "projection"))


def encode(sphere: Sphere | None) -> Group | None:
    """Write a sphere as plain data, so that a file loads with ``weights_only=True``.

    Example:
        >>> decode(encode(Sphere(VectorAxes((0,)), radius=2.0)))
        Sphere(axes=VectorAxes(index=(0,), pieces=()), radius=2.0, joint=False, centered=False)
    """
    if sphere is None:
        return None
    strided = [list(one) for one in sphere.axes.strided]
    return {
        "index": list(sphere.axes.index),
        "pieces": [list(piece) for piece in sphere.axes.pieces],
        "radius": sphere.radius,
        "joint": sphere.joint,
        "centered": sphere.centered,
        **({"strided": strided} if strided else {}),
    }


def decode(data: Mapping[str, Any] | Sphere | None) -> Sphere | None:
    """Read a sphere; flattened checkpoints drop lists that are empty."""
    if data is None or isinstance(data, Sphere):
        return data
    pieces: Iterable[Iterable[int]] = data.get("pieces", ())
    cut = tuple((axis, count) for axis, count in pieces)
    steps: Iterable[Iterable[int]] = data.get("strided", ())
    strided = tuple((axis, count, step) for axis, count, step in steps)
    return Sphere(
        VectorAxes(tuple(data.get("index", ())), cut, strided),
        data.get("radius"),
        data.get("joint", False),
        data.get("centered", False),
    )


def numbers_of(groups: list[Group], packed: Mapping[str, Any]) -> dict[Tensor, int]:
    """Map parameters to their numbers in a state dict."""
    return {
        param: number
        for group, saved in zip(groups, packed["param_groups"], strict=False)
        for param, number in zip(group["params"], saved["params"], strict=False)
    }


def merged(mine: Group, theirs: Mapping[str, Any], number: int) -> Group:
    """Return a saved group with the options it lacks, and its sphere read."""
    kept = {key: value for key, value in mine.items() if key not in _OF_THE_PARAMS}
    sphere = decode(theirs["sphere"]) if "sphere" in theirs else mine["sphere"]
    if sphere == mine["sphere"]:
        sphere = mine["sphere"]  # which also says whether it is invariant
    else:
        warn(
            f"the state of param group {number} was saved on {sphere}, and the code here says "
            f"{mine['sphere']}; the saved one is used. Make the optimizer with the saved sphere, "
            "or remove 'sphere' from the saved param groups to keep the one here"
        )
    given = {_renamed(key): value for key, value in theirs.items()}
    for key, was, name in _EARLIER_VALUES:
        if given.get(key) == was:
            given[key] = name
    if given.get("lr_mode") == "angle":
        given = of_a_recipe(mine, given, number)
    return {**kept, **given, "sphere": sphere}


def of_a_recipe(mine: Group, theirs: Mapping[str, Any], number: int) -> Group:
    r"""Return a saved group whose rate is the rotation, as one of a recipe has it now.

    Groups of a recipe once had the rotation itself as their ``lr``, and schedules multiplied it by
    :math:`\sqrt{f_t}`. Now they multiply ``lr`` by :math:`f_t`, of which ``rotation_scale`` makes
    the rotation. Saved schedulers multiply the saved ``initial_lr`` :math:`\theta_0`; at a scale of
    :math:`\sqrt{\theta_0}` and a rate of :math:`\theta^2/\theta_0` they go on as they did. Without
    a scheduler the rate becomes that of the recipe in code.

    Args:
        mine: the group in code.
        theirs: the saved group, on a sphere, turning by its rate.
        number: of the group.
    """
    scale, rotation = mine.get("rotation_scale"), theirs.get("lr")
    if scale is None or rotation is None or "rotation_scale" in theirs:
        return dict(theirs)
    first = theirs.get("initial_lr")
    if first is not None and float(first) > 0:
        scale = float(first) ** 0.5
    warn(
        f"the state of param group {number} was saved by an earlier version, in which the lr of a "
        "recipe's group was the rotation. It turns as it did; load the state of its scheduler as "
        "well, for one that starts anew does not know the saved rate"
    )
    return {**theirs, "lr": (rotation / scale) ** 2, "rotation_scale": scale}


def _renamed(key: str) -> str:
    """Return what an option is called now."""
    return _EARLIER_KEYS.get(key, key)


def with_all_counts(
    packed: Group, groups: list[Group], state: MutableMapping[Tensor, Group]
) -> Group:
    """Return a packed state dict whose counts of skipped vectors are those of all processes."""
    packed_state, number_of = dict(packed["state"]), numbers_of(groups, packed)
    counts = list(_counts(groups, state))
    added = placement.added_counts(counts)
    for (members, _, _), count in zip(counts, added, strict=True):
        number = number_of[members[0]]
        packed_state[number] = {**packed_state[number], "skipped": count}
    return {**packed, "state": packed_state}


def _counts(
    groups: list[Group], state: MutableMapping[Tensor, Group]
) -> Iterator[tuple[list[Tensor], Sphere, Tensor]]:
    """Give each family of which vectors were counted, its sphere, and the count."""
    for group in groups:
        for members in sets_of(group) if group["sphere"] is not None else ():
            if "skipped" in state[members[0]]:
                yield members, group["sphere"], state[members[0]]["skipped"]


def take_over(
    groups: list[Group],
    state: MutableMapping[Tensor, Group],
    saved: Mapping[Any, Any],
    numbers: Sequence[Any],
) -> None:
    """Bring what was loaded to the shapes and precisions of this run.

    Args:
        groups: the param groups.
        state: what ``torch.optim.Optimizer`` has made of the saved state, changed in place.
        saved: the state as it was saved.
        numbers: of the parameters in it, in their order.

    Raises:
        ValueError: what is saved for a parameter has another size than its vectors here.
    """
    params = [param for group in groups for param in group["params"]]
    number_of = dict(zip(params, numbers, strict=True))
    for group in groups:
        for members in sets_of(group) if group["sphere"] is not None else ():
            for key in _PER_VECTOR:
                entries = saved.get(number_of[members[0]], {})
                if key in entries:
                    wanted = placement.numbers(members, group["sphere"])
                    given = _per_vector(key, entries[key], wanted, group["sphere"])
                    state[members[0]][key] = given
    for group in groups:
        for param in group["params"]:
            entries = state.get(param)
            if entries:
                dtype = state_dtype(param, group)
                if dtype != param.dtype:  # which PyTorch has cast it to
                    _take_uncast(entries, saved.get(number_of[param], {}), dtype)
                mend(entries, param, dtype)
    for members, sphere, count in _counts(groups, state):
        if not placement.counts_for_all(members, sphere):
            count.zero_()


def _per_vector(key: str, saved: Tensor, wanted: Tensor, sphere: Sphere) -> Tensor:
    """Return saved numbers, one per vector, in the precision and place that is wanted.

    Raises:
        ValueError: there are more or fewer than vectors.
    """
    if saved.shape != wanted.shape:
        raise ValueError(
            f"the saved {key} has shape {tuple(saved.shape)}, and the vectors of {sphere} want "
            f"{tuple(wanted.shape)}; resume with the sphere the state was saved with"
        )
    return saved.detach().to(device=wanted.device, dtype=wanted.dtype, copy=True)


def _take_uncast(entries: Group, saved: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Take moments and the copy of a weight over in another precision than the parameter's."""
    for key in (*_PER_ENTRY, "master"):
        held, given = entries.get(key), saved.get(key)
        if isinstance(held, Tensor) and isinstance(given, Tensor):
            entries[key] = given.detach().to(device=held.device, dtype=dtype, copy=True)


def mend(entries: Group, param: Tensor, dtype: torch.dtype) -> None:
    """Bring moments to a precision, and counters to the kind that is counted in.

    Raises:
        ValueError: a moment has another shape than its parameter.
    """
    for key in (*_PER_ENTRY, "master"):
        moment = entries.get(key)
        if not isinstance(moment, Tensor):
            continue
        if moment.shape != param.shape:
            raise ValueError(
                f"the saved {key} has shape {tuple(moment.shape)}, and its parameter "
                f"{tuple(param.shape)}; load the state of the same parameters, in the same order"
            )
        if moment.dtype != dtype:
            entries[key] = moment.to(dtype)
    if "step" in entries:
        steps = entries["step"]
        entries["step"] = torch.as_tensor(steps, dtype=torch.float32).to("cpu", copy=True)
    if "skipped" in entries:
        count = torch.as_tensor(entries["skipped"])
        entries["skipped"] = count.detach().to(param.device, torch.int64, copy=True)
