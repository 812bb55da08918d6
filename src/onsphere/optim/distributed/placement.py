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
from onsphere.optim import kernels
from onsphere.optim.distributed import partition
from onsphere.optim.distributed.partition import TensorPlacement
from onsphere.optim.updates.geodesic import working_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Placement(NamedTuple):
    """Where the tensors of a family lie.

    Attributes:
        mesh: the processes; ``None`` for tensors of this process alone.
        here: the coordinate of this process.
        places: how each tensor lies on the mesh.
        spread: the dimensions of the mesh over which the sums of a vector are spread.
    """

    mesh: "DeviceMesh | None"
    here: tuple[int, ...]
    places: tuple[TensorPlacement, ...]
    spread: tuple[int, ...]

    @property
    def cut(self) -> tuple[int, ...]:
        """The dimensions of the mesh along which processes hold different entries."""
        return tuple(sorted({dim for place in self.places for dim in partition.cut_dims(place)}))

    @property
    def counts_over(self) -> tuple[int, ...]:
        """The dimensions of the mesh along which processes hold different vectors."""
        return () if self.spread else self.cut

    def shards(self, sphere: Sphere, device: torch.device) -> "tuple[LocalShard | None, ...]":
        """Describe what this process holds of each tensor; ``None`` for nothing."""
        return _shards(self.places, self.here, self.spread, sphere, device)


class LocalShard(NamedTuple):
    """What this process holds of one tensor of a family.

    Attributes:
        sphere: as it is for the entries here: each of its vectors is whole, or part of one.
        owner: the number in the whole tensor of the vector that each belongs to.
        is_primary: whether this process adds their sums; of several copies, one does.
    """

    sphere: Sphere
    owner: Tensor
    is_primary: bool


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
        for how in getattr(param, "placements", ()):
            if not (how.is_replicate() or isinstance(getattr(how, "dim", None), int)):
                raise ValueError(
                    f"parameter {number} of the group is placed as {how}; weights on a "
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
    placement = placement_of((param,), Sphere())
    wanted, held = (
        partition.block_at(placement.places[0], placement.here).size,
        tuple(local(param).shape),
    )
    if wanted != held:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has {held} entries in this process where "
            f"its placement {getattr(param, 'placements', ())} says {wanted}; onsphere knows "
            "Shard and Replicate, and what fully_shard makes of them"
        )


def placement_of(params: Sequence[Tensor], sphere: Sphere) -> Placement:
    """Return where the tensors of a family lie."""
    mesh: DeviceMesh | None = getattr(params[0], "device_mesh", None)
    places = tuple(_place(param) for param in params)
    if mesh is None:
        return Placement(None, (), places, ())
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError("this process is not part of the mesh that its parameters lie on")
    return Placement(mesh, tuple(coordinate), places, partition.spread_over(places, sphere.axes))


def _place(param: Tensor) -> TensorPlacement:
    placements = getattr(param, "placements", ())
    if not placements:
        return TensorPlacement(tuple(param.shape))
    cuts = tuple(None if p.is_replicate() else p.dim % param.ndim for p in placements)
    # What fully_shard cuts was cut by tensor parallelism before, though its dimension of the
    # mesh comes first: such a placement has a split factor.
    late = [dim for dim, p in enumerate(placements) if getattr(p, "split_factor", 1) > 1]
    order = (*(dim for dim in range(len(cuts)) if dim not in late), *late)
    mesh: DeviceMesh = param.device_mesh  # type: ignore[attr-defined]
    return TensorPlacement(tuple(param.shape), tuple(mesh.shape), cuts, order)


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
    placement, dtype = placement_of(params, sphere), working_dtype(first)
    place = partition.numbers_place(placement.places[0], sphere.axes)
    if placement.mesh is None or placement.spread:
        return torch.zeros(place.shape, dtype=dtype, device=first.device)
    size = partition.block_at(place, placement.here).size
    held = torch.zeros(size, dtype=dtype, device=first.device)
    placements = [
        p if cut is None else _moved(p, cut)
        for p, cut in zip(first.placements, place.cuts, strict=True)
    ]
    return _from_local(held, first, place.shape, placements)


def _moved(how: Any, axis: int) -> Any:
    """Return the same placement along another axis."""
    if hasattr(how, "split_factor"):
        return type(how)(axis, split_factor=how.split_factor)
    return type(how)(axis)


@functools.lru_cache(maxsize=4096)
def _shards(
    places: tuple[TensorPlacement, ...],
    here: tuple[int, ...],
    spread_over: tuple[int, ...],
    sphere: Sphere,
    device: torch.device,
) -> tuple[LocalShard | None, ...]:
    found: list[LocalShard | None] = []
    for place in places:
        mine = partition.block_at(place, here)
        if 0 in mine.size:
            found.append(None)
            continue
        axes, owner = partition.slices_of(mine, place.shape, sphere.axes)
        if not spread_over:
            axes = partition.axes_in(mine, place.shape, sphere.axes)
        cuts = partition.cut_dims(place)
        is_primary = all(here[dim] == 0 or dim in cuts for dim in spread_over)
        found.append(LocalShard(replace(sphere, axes=axes), owner.to(device), is_primary))
    return tuple(found)


def add_up(jobs: Sequence[tuple[Placement, tuple[int, ...], Tensor]]) -> list[Tensor]:
    """Add tensors over dimensions of their mesh: one all-reduce for all that share these.

    Args:
        jobs: where a tensor's parts are, over which dimensions of that mesh, and the part here.
    """
    import torch.distributed as dist

    packs: dict[Any, list[int]] = {}
    for number, (placement, over, part) in enumerate(jobs):
        packs.setdefault((placement.mesh, over, part.device, part.dtype), []).append(number)
    results = [part for _, _, part in jobs]
    for (mesh, over, *_), members in packs.items():
        if mesh is None or not over:
            continue
        pack = torch.cat([results[number].flatten() for number in members])
        for dim in over:
            dist.all_reduce(pack, group=mesh.get_group(dim))
        sizes = [results[number].numel() for number in members]
        for number, shard in zip(members, torch.split(pack, sizes), strict=True):
            results[number] = shard.view_as(results[number])
    return results


def unfinite(families: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Whether a gradient in each family is not finite, in any process: one small all-reduce."""
    grads = [[local_gradient(p) for p in params if p.grad is not None] for params in families]
    flat = [grad for mine in grads for grad in mine if grad is not None and grad.numel()]
    fine = not flat or kernels.finite(flat)
    flags = []
    for mine in grads:
        norms = [] if fine else [grad.float().norm() for grad in mine if grad is not None]
        bad = bool(norms) and not bool(torch.stack(norms).isfinite().all())
        flags.append(torch.tensor([bad], dtype=torch.int64))
    placements = [placement_of(params, Sphere()) for params in families]
    places = [params[0].device for params in families]
    jobs = [
        (placement, placement.cut, flag.to(device))
        for placement, flag, device in zip(placements, flags, places, strict=True)
    ]
    return [bool(flag) for flag in add_up(jobs)]


def added_counts(counts: Sequence[tuple[Sequence[Tensor], Sphere, Tensor]]) -> list[Tensor]:
    """Add what processes have counted of the vectors they hold, for families on their spheres."""
    placements = [placement_of(params, sphere) for params, sphere, _ in counts]
    jobs = [
        (placement, placement.counts_over, count.reshape(1))
        for placement, (_, _, count) in zip(placements, counts, strict=True)
    ]
    return [count.reshape(()) for count in add_up(jobs)]


def counts_for_all(params: Sequence[Tensor], sphere: Sphere) -> bool:
    """Whether this process is the one to keep a count that was added over all of them."""
    placement = placement_of(params, sphere)
    return all(placement.here[dim] == 0 for dim in placement.counts_over)
