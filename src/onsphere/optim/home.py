"""Where tensors lie that are spread over processes, and how their sums are added.

``DTensor`` is what ``fully_shard`` and tensor parallelism make of parameters. The numbers that a
vector owns lie where it does: sharded beside vectors that are whole in a process, and in every
process for vectors that are cut. Their shapes are those of one process, so a checkpoint fits any
number of them.

Nothing here imports ``torch.distributed`` before a ``DTensor`` exists.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from onsphere.geometry import Sphere
from onsphere.optim import box, native
from onsphere.optim.box import Place
from onsphere.optim.motion import working_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Home(NamedTuple):
    """Where the tensors of a family lie.

    Attributes:
        mesh: the processes; ``None`` for tensors of this process alone.
        here: the coordinate of this process.
        places: how each tensor lies on the mesh.
        spread: the dimensions of the mesh over which the sums of a vector are spread.
    """

    mesh: "DeviceMesh | None"
    here: tuple[int, ...]
    places: tuple[Place, ...]
    spread: tuple[int, ...]

    @property
    def cut(self) -> tuple[int, ...]:
        """The dimensions of the mesh along which processes hold different entries."""
        return tuple(sorted({dim for place in self.places for dim in box.cut_dims(place)}))

    @property
    def counts_over(self) -> tuple[int, ...]:
        """The dimensions of the mesh along which processes hold different vectors."""
        return () if self.spread else self.cut

    def pieces(self, sphere: Sphere, device: torch.device) -> "tuple[Piece | None, ...]":
        """Describe what this process holds of each tensor; ``None`` for nothing."""
        return _pieces(self.places, self.here, self.spread, sphere, device)


class Piece(NamedTuple):
    """What this process holds of one tensor of a family.

    Attributes:
        sphere: as it is for the entries here: each of its vectors is whole, or part of one.
        owner: the number in the whole tensor of the vector that each belongs to.
        speaks: whether this process adds their sums; of several copies, one does.
    """

    sphere: Sphere
    owner: Tensor
    speaks: bool


def any_in(params: Iterable[Tensor]) -> bool:
    """Whether any of these tensors is spread over processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(p, module.DTensor) for p in params)


def check(params: Sequence[Tensor], sphere: Sphere) -> None:
    """Raise unless these tensors lie on their meshes in a way that a sphere can follow.

    Raises:
        ValueError: a tensor is a partial sum or lies in an unknown way, or the tensors of a joint
            sphere lie on different meshes.
    """
    for number, param in enumerate(params):
        for placement in getattr(param, "placements", ()):
            if not (placement.is_replicate() or isinstance(getattr(placement, "dim", None), int)):
                raise ValueError(
                    f"parameter {number} of the group is placed as {placement}; weights on a "
                    "sphere are sharded or replicated: call "
                    "param.redistribute(placements=[Replicate()]) first"
                )
        _check_size(param)
    if sphere.joint and len({getattr(param, "device_mesh", None) for param in params}) > 1:
        raise ValueError(
            "the parameters of a joint sphere lie on different meshes of processes; shard them "
            "together (one fully_shard for the module that holds them)"
        )


@torch.no_grad()
def _check_size(param: Tensor) -> None:
    home = home_of((param,), Sphere())
    wanted, held = box.box_at(home.places[0], home.here).size, tuple(local(param).shape)
    if wanted != held:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has {held} entries in this process where "
            f"its placement {getattr(param, 'placements', ())} says {wanted}; onsphere knows "
            "Shard and Replicate, and what fully_shard makes of them"
        )


def home_of(params: Sequence[Tensor], sphere: Sphere) -> Home:
    """Return where the tensors of a family lie."""
    mesh: DeviceMesh | None = getattr(params[0], "device_mesh", None)
    places = tuple(_place(param) for param in params)
    if mesh is None:
        return Home(None, (), places, ())
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError("this process is not part of the mesh that its parameters lie on")
    return Home(mesh, tuple(coordinate), places, box.spread_over(places, sphere.axes))


def _place(param: Tensor) -> Place:
    placements = getattr(param, "placements", ())
    if not placements:
        return Place(tuple(param.shape))
    cuts = tuple(None if p.is_replicate() else p.dim % param.ndim for p in placements)
    # What fully_shard cuts was cut by tensor parallelism before, though its dimension of the
    # mesh comes first: such a placement has a split factor.
    late = [dim for dim, p in enumerate(placements) if getattr(p, "split_factor", 1) > 1]
    order = (*(dim for dim in range(len(cuts)) if dim not in late), *late)
    mesh: DeviceMesh = param.device_mesh  # type: ignore[attr-defined]
    return Place(tuple(param.shape), tuple(mesh.shape), cuts, order)


def local(x: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    if not any_in((x,)):
        return x
    held = x.to_local()  # type: ignore[attr-defined]
    return held.wait() if hasattr(held, "wait") else held


def local_gradient(param: Tensor) -> Tensor | None:
    """Return what belongs to this process of a gradient, placed as its parameter is."""
    grad = param.grad
    if grad is None or not any_in((param,)):
        return grad
    if any_in((grad,)) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(  # type: ignore[attr-defined]
            param.device_mesh,  # type: ignore[attr-defined]
            param.placements,  # type: ignore[attr-defined]
        )
    return local(grad)


def beside(param: Tensor, held: Tensor) -> Tensor:
    """Make a tensor that lies as a parameter does from what this process holds of it."""
    if not any_in((param,)):
        return held
    return _from_local(held, param, param.shape)


def _from_local(held: Tensor, like: Any, shape: Sequence[int], cuts: Any = None) -> Tensor:
    from torch.distributed.tensor import DTensor

    strides = torch.empty(tuple(shape), device="meta").stride()
    placements = like.placements if cuts is None else cuts
    return DTensor.from_local(
        held,
        like.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )


def numbers(params: Sequence[Tensor], sphere: Sphere) -> Tensor:
    """Return a zero for each vector of a family, where the vectors lie."""
    first: Any = params[0]
    home, dtype = home_of(params, sphere), working_dtype(first)
    place = box.numbers_place(home.places[0], sphere.axes)
    if home.mesh is None or home.spread:
        return torch.zeros(place.shape, dtype=dtype, device=first.device)
    size = box.box_at(place, home.here).size
    held = torch.zeros(size, dtype=dtype, device=first.device)
    placements = [
        p if cut is None else _moved(p, cut)
        for p, cut in zip(first.placements, place.cuts, strict=True)
    ]
    return _from_local(held, first, place.shape, placements)


def _moved(placement: Any, axis: int) -> Any:
    """Return the same placement along another axis."""
    if hasattr(placement, "split_factor"):
        return type(placement)(axis, split_factor=placement.split_factor)
    return type(placement)(axis)


@functools.lru_cache(maxsize=4096)
def _pieces(
    places: tuple[Place, ...],
    here: tuple[int, ...],
    spread_over: tuple[int, ...],
    sphere: Sphere,
    device: torch.device,
) -> tuple[Piece | None, ...]:
    found: list[Piece | None] = []
    for place in places:
        mine = box.box_at(place, here)
        if 0 in mine.size:
            found.append(None)
            continue
        axes, owner = box.slices_of(mine, place.shape, sphere.axes)
        if not spread_over:
            axes = box.axes_in(mine, place.shape, sphere.axes)
        cuts = box.cut_dims(place)
        speaks = all(here[dim] == 0 or dim in cuts for dim in spread_over)
        found.append(Piece(replace(sphere, axes=axes), owner.to(device), speaks))
    return tuple(found)


def add_up(jobs: Sequence[tuple[Home, tuple[int, ...], Tensor]]) -> list[Tensor]:
    """Add tensors over dimensions of their mesh: one all-reduce for all that share these.

    Args:
        jobs: where a tensor's parts are, over which dimensions of that mesh, and the part here.
    """
    import torch.distributed as dist

    packs: dict[Any, list[int]] = {}
    for number, (home, over, part) in enumerate(jobs):
        packs.setdefault((home.mesh, over, part.device, part.dtype), []).append(number)
    results = [part for _, _, part in jobs]
    for (mesh, over, *_), members in packs.items():
        if mesh is None or not over:
            continue
        pack = torch.cat([results[number].flatten() for number in members])
        for dim in over:
            dist.all_reduce(pack, group=mesh.get_group(dim))
        sizes = [results[number].numel() for number in members]
        for number, piece in zip(members, torch.split(pack, sizes), strict=True):
            results[number] = piece.view_as(results[number])
    return results


def unfinite(families: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Whether a gradient in each family is not finite, in any process: one small all-reduce."""
    grads = [[local_gradient(p) for p in params if p.grad is not None] for params in families]
    flat = [grad for mine in grads for grad in mine if grad is not None and grad.numel()]
    fine = not flat or native.finite(flat)
    flags = []
    for mine in grads:
        norms = [] if fine else [grad.float().norm() for grad in mine if grad is not None]
        bad = bool(norms) and not bool(torch.stack(norms).isfinite().all())
        flags.append(torch.tensor([bad], dtype=torch.int64))
    homes = [home_of(params, Sphere()) for params in families]
    places = [params[0].device for params in families]
    jobs = [
        (home, home.cut, flag.to(device))
        for home, flag, device in zip(homes, flags, places, strict=True)
    ]
    return [bool(flag) for flag in add_up(jobs)]


def added_counts(counts: Sequence[tuple[Sequence[Tensor], Sphere, Tensor]]) -> list[Tensor]:
    """Add what processes have counted of the vectors they hold, for families on their spheres."""
    homes = [home_of(params, sphere) for params, sphere, _ in counts]
    jobs = [
        (home, home.counts_over, count.reshape(1))
        for home, (_, _, count) in zip(homes, counts, strict=True)
    ]
    return [count.reshape(()) for count in add_up(jobs)]


def counts_for_all(params: Sequence[Tensor], sphere: Sphere) -> bool:
    """Whether this process is the one to keep a count that was added over all of them."""
    home = home_of(params, sphere)
    return all(home.here[dim] == 0 for dim in home.counts_over)
