"""What must hold of weights that are spread over processes; run in several of them at once.

The oracle is the same optimizer on whole tensors, run in every process beside the other.
"""

import contextlib
import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, on_sphere

ROWS = Sphere(VectorAxes((0,)))
AXES = VectorAxes
# name -> shapes that share one sphere, the sphere
FAMILIES = {
    "rows": ([(7, 5)], ROWS),
    "filters": ([(6, 3, 2, 2)], Sphere(AXES((0,)), radius=2.0)),
    "fewer rows than processes": ([(1, 9)], ROWS),
    "whole": ([(7, 5)], Sphere()),
    "one row, whole": ([(1, 9)], Sphere()),
    "heads": ([(8, 6)], Sphere(AXES(pieces=((0, 4),)))),
    "heads cut": ([(12, 5)], Sphere(AXES(pieces=((0, 3),)))),
    "heads cut unevenly": ([(25, 5)], Sphere(AXES((1,), ((0, 5),)))),
    "pairs of rows": ([(8, 6)], Sphere(AXES(strided=((0, 4, 1),)))),
    "pairs in heads": ([(8, 3)], Sphere(AXES(strided=((0, 2, 2),)))),
    "pairs in heads, cut": ([(12, 5)], Sphere(AXES(strided=((0, 1, 3),)))),
    "columns": ([(7, 5)], Sphere(AXES((1,)))),
    "columns of groups": ([(7, 8)], Sphere(AXES(strided=((1, 2, 2),)))),
    "heads of columns": ([(5, 12)], Sphere(AXES((0,), ((1, 3),)))),
    "joint rows": ([(7, 5), (7,)], Sphere(AXES((0,)), joint=True)),
    "joint whole": ([(7, 5), (3,)], Sphere(joint=True)),
    "a given radius, cut": ([(7, 5)], Sphere(AXES((1,)), radius=2.0)),
    "centred rows": ([(7, 5)], Sphere(AXES((0,)), centered=True)),
    "centred whole": ([(7, 5)], Sphere(centered=True)),
    "every entry": ([(4, 3)], Sphere(AXES((0, 1)))),
    "ordinary": ([(7, 5), (1, 9)], None),
}
ADAMW = partial(torch.optim.AdamW, weight_decay=0.0)
# name -> optimizer for groups with spheres
OPTIMIZERS = {
    "SGD": partial(SphereSGD, lr=0.05, momentum=0.9, lr_mode="rate"),
    "SGD, Nesterov, exponential": partial(
        partial(SphereSGD, lr=0.05, lr_mode="rate", momentum=0.9, nesterov=True),
        retraction="exponential",
        maximize=True,
    ),
    "SGD, relative": partial(SphereSGD, lr=1e-3, momentum=0.9),
    "AdamW": partial(SphereAdamW, lr=0.02, weight_decay=0.0),
    "AdamW, rotation": partial(SphereAdamW, lr=0.01, lr_mode="angle", weight_decay=0.0),
    "AdamW, per vector": partial(SphereAdamW, lr=0.02, second_moment="vector", weight_decay=0.0),
}
WRAPPED = {
    "hard AdamW": (partial(ADAMW, lr=0.02, foreach=False), "hard"),
    "brake SGD": (partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=False), "brake"),
    "rotate SGD": (partial(torch.optim.SGD, lr=0.02, foreach=False), "rotate"),
}


def wrapped(name):
    def build(groups, **settings):
        kind, mode = WRAPPED[name]
        groups = list(groups)
        base = kind([p for group in groups for p in group["params"]])
        return on_sphere(base, groups, mode, **settings)

    return build


BUILDERS = {**OPTIMIZERS, **{name: wrapped(name) for name in WRAPPED}}


def families(names=FAMILIES):
    return {name: FAMILIES[name] for name in names}


def tensors(shapes, step=0):
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def placed(x, mesh, placements):
    placements = [p if not isinstance(p, Shard) or p.dim < x.ndim else Shard(0) for p in placements]
    # Of a clone: in torch 2.9 a shard is a view of the tensor it is cut from.
    return distribute_tensor(x.clone(), mesh, placements, src_data_rank=None)


def apart(p, q):
    """The largest difference, as a share of the largest entry where that is above 1."""
    return ((p - q).abs().max() / p.abs().max().clamp_min(1)).item()


class Pair:
    """An optimizer on shards, and the oracle on whole tensors."""

    def __init__(self, build, mesh, placements, chosen, **settings):
        self.mesh, self.placements = mesh, placements
        self.shapes = [shape for shapes, _ in chosen.values() for shape in shapes]
        self.oracle = [nn.Parameter(x) for x in tensors(self.shapes)]
        self.shards = [nn.Parameter(placed(p.data, mesh, placements)) for p in self.oracle]
        self.optimizers = [
            build(self._groups(params, chosen), **settings) for params in (self.oracle, self.shards)
        ]

    @staticmethod
    def _groups(params, chosen):
        left = iter(params)
        return [
            {"params": list(itertools.islice(left, len(shapes))), "sphere": sphere}
            for shapes, sphere in chosen.values()
        ]

    def step(self, number, spoil=None, within=None):
        """One step of both."""
        noise = tensors(self.shapes, number)
        if spoil is not None:
            spoil(noise)
        for p, q, g in zip(self.oracle, self.shards, noise, strict=True):
            p.grad = g + 0.3 * p.detach()
            q.grad = placed(g, self.mesh, self.placements) + 0.3 * q.detach()
        self.optimizers[0].step()
        with within or contextlib.nullcontext():
            self.optimizers[1].step()

    def counted(self, number):
        """One step of both; returns how many collectives the shards' optimizer ran."""
        mode = CommDebugMode()
        self.step(number, within=mode)
        return mode.get_total_counts()

    def error(self):
        pairs = zip(self.oracle, self.shards, strict=True)
        return max(apart(p.detach(), q.detach().full_tensor()) for p, q in pairs)


def meshes():
    """name -> mesh and placements of it."""
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    found = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found["HSDP"] = square, [Replicate(), Shard(0)]
        found["both axes"] = square, [Shard(0), Shard(1)]
        found["the same axis twice"] = square, [Shard(0), Shard(0)]
        # What fully_shard makes of a weight that tensor parallelism has cut.
        found["twice, right to left"] = square, [_StridedShard(0, split_factor=2), Shard(0)]
    return found


LONG = ("SGD", "AdamW", "hard AdamW")


def same_weights(name, folder):
    for where, (mesh, placements) in meshes().items():
        pair = Pair(BUILDERS[name], mesh, placements, families())
        for step in range(1, 51 if where == "rows" and name in LONG else 6):
            pair.step(step)
        assert pair.error() < 1e-6, (where, pair.error())


SILENT = ("rows", "filters", "fewer rows than processes", "heads", "joint rows", "every entry")


def collectives(folder):
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    ordinary = (*SILENT, "centred rows", "one row, whole", "ordinary")
    cut = ("whole", "heads cut", "columns", "joint whole")
    for name, build in BUILDERS.items():
        own = {} if name in OPTIMIZERS else {"nonfinite": "ignore"}
        for chosen, wanted in ((ordinary, 0), ((*ordinary, *cut), 1)):
            pair = Pair(build, line, [Shard(0)], families(chosen), **own)
            counts = [pair.counted(step) for step in (1, 2, 3)]
            assert counts[1:] == [wanted, wanted], (name, chosen, counts)
    # Centred vectors that are cut need their means first; agreeing on what to hide is one more.
    pair = Pair(BUILDERS["AdamW"], line, [Shard(0)], families(("centred whole", "whole")))
    assert pair.counted(1) == 2
    pair = Pair(BUILDERS["hard AdamW"], line, [Shard(0)], families(("rows",)))
    assert [pair.counted(1), pair.counted(2)] == [1, 1]
    # Looking at the gradients first is one, however many groups there are.
    pair = Pair(BUILDERS["SGD"], line, [Shard(0)], families(("rows", "filters")), nonfinite="raise")
    assert [pair.counted(1), pair.counted(2)] == [1, 1]


def what_is_not_finite(folder):
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    chosen = families(("rows", "whole", "heads cut", "joint whole"))

    def spoil(noise):  # in the last process, for whole tensors; one head; one row
        noise[0][6, 0] = noise[1][6, 0] = torch.inf
        noise[2][0, 0] = noise[3][6, 4] = torch.nan

    for name, build in BUILDERS.items():
        pair = Pair(build, line, [Shard(0)], chosen)
        pair.step(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair.step(2, spoil)
        pair.step(3)
        assert pair.error() < 1e-6, (name, pair.error())
        whole, shards = (o.state_dict()["state"] for o in pair.optimizers)
        counts = [
            [int(s["skipped"]) for s in d.values() if "skipped" in s] for d in (whole, shards)
        ]
        assert counts[0] == counts[1], name
        assert sum(counts[0]) >= 4, (name, counts)
        strict = Pair(build, line, [Shard(0)], chosen, nonfinite="raise")
        before = [q.detach().clone() for q in strict.shards]
        strict.oracle = []  # one process alone is tested elsewhere
        noise = tensors(strict.shapes, 1)
        spoil(noise)
        for q, g in zip(strict.shards, noise, strict=True):
            q.grad = placed(g, line, [Shard(0)])
        with pytest.raises(FloatingPointError):
            strict.optimizers[1].step()
        for p, q in zip(before, strict.shards, strict=True):
            assert torch.equal(p.to_local(), q.detach().to_local())


def refusals(folder):
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    sums = nn.Parameter(DTensor.from_local(torch.ones(3, 4), line, [Partial()]))
    weight = nn.Parameter(placed(torch.randn(4, 3), line, [Shard(0)]))
    alone = nn.Parameter(torch.randn(4))
    for params, sphere, words in (
        ([sums], ROWS, "sharded or replicated"),
        ([weight, alone], Sphere(AXES((0,)), joint=True), "different meshes"),
    ):
        for build in (BUILDERS["SGD"], BUILDERS["hard AdamW"]):
            with pytest.raises(ValueError, match=words):
                build([{"params": params, "sphere": sphere}])


def gradients_elsewhere(folder):
    """A gradient that is a partial sum, or lies otherwise than its parameter, is brought there."""
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    for build in (BUILDERS["AdamW"], BUILDERS["SGD"]):
        pair = Pair(build, line, [Shard(0)], families(("rows", "whole", "ordinary")))
        for step in (1, 2):
            noise = tensors(pair.shapes, step)
            for p, q, g in zip(pair.oracle, pair.shards, noise, strict=True):
                p.grad = g
                part = g / dist.get_world_size()
                q.grad = DTensor.from_local(part, line, [Partial()])
            for optimizer in pair.optimizers:
                optimizer.step()
        assert pair.error() < 1e-6, pair.error()


class Model(nn.Module):
    """A norm between two linear layers, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 9, bias=False), nn.LayerNorm(9)
        self.second, self.head = nn.Linear(9, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.head(nn.functional.normalize(self.second(x), dim=0))


def model(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model()


def groups_of(net):
    return [
        {"params": [net.first.weight], "sphere": Sphere()},
        {"params": [net.second.weight], "sphere": ROWS},
        {"params": [*net.norm.parameters(), *net.head.parameters()], "sphere": None},
    ]


def fit(net, optimizer, steps, rank=0, world=1):
    for group in optimizer.param_groups:
        group["maximize"] = False  # what grows without bound, rounding drives apart
    for step in steps:
        x, y = tensors([(8, 6), (8, 3)], 100 + step)
        optimizer.zero_grad()
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        # Normalizing columns needs the whole batch, so every process takes all of it forward.
        (net(x)[mine] - y[mine]).square().mean().backward()
        optimizer.step()


def training(folder):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank, world = dist.get_rank(), dist.get_world_size()
    for name, build in BUILDERS.items():
        alone = model()
        fit(alone, build(groups_of(alone)), range(50))
        copies = model()
        wrapped_net = DistributedDataParallel(copies)
        fit(wrapped_net, build(groups_of(copies)), range(50), rank, world)
        shards = model()
        fully_shard(shards.first)
        fully_shard(shards)
        fit(shards, build(groups_of(shards)), range(50), rank, world)
        for p, q, s in zip(*(net.parameters() for net in (alone, copies, shards)), strict=True):
            for other in (q, s.full_tensor()):
                assert apart(p, other) < 1e-6, (name, type(other), apart(p, other))


RESUMED = ("rows", "whole", "heads", "heads cut", "joint rows", "joint whole", "ordinary")
STORED = {**OPTIMIZERS, "hard AdamW": BUILDERS["hard AdamW"]}


class Bag(nn.Module):
    """Parameters under names, as a checkpoint wants them."""

    def __init__(self, params):
        super().__init__()
        self.params = nn.ParameterList(params)


def save(pair, path, group):
    bag = Bag(pair.shards)
    state = {"model": bag.state_dict(), "optim": get_optimizer_state_dict(bag, pair.optimizers[1])}
    dcp.save(state, checkpoint_id=path, process_group=group)


def load(params, optimizer, path, **how):
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    bag = Bag(params)
    state = {"model": bag.state_dict(), "optim": get_optimizer_state_dict(bag, optimizer)}
    dcp.load(state, checkpoint_id=path, **how)
    bag.load_state_dict(state["model"])
    set_optimizer_state_dict(bag, optimizer, state["optim"])


def resuming(folder):
    """Save on n processes, load on m, go on: the same bits for n = m."""
    world, rank = dist.get_world_size(), dist.get_rank()
    lines = {world: init_device_mesh("cpu", (world,))}
    if world == 4:
        lines[2] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
    for (name, build), size in itertools.product(STORED.items(), lines):
        pairs = {n: Pair(build, line, [Shard(0)], families(RESUMED)) for n, line in lines.items()}
        path = str(folder / f"{name}{size}of{rank // size}")
        saved = pairs[size]
        for step in (1, 2, 3):
            saved.step(step)
        save(saved, path, lines[size].get_group())
        saved.step(4)
        saved.step(5)
        for other, line in lines.items():
            pair = Pair(build, line, [Shard(0)], families(RESUMED))
            with torch.no_grad():
                for q in pair.shards:
                    q.mul_(0.5)  # everything must come from the file
            load(pair.shards, pair.optimizers[1], path, process_group=line.get_group())
            pair.oracle = saved.oracle
            for step in (4, 5):
                for q, g in zip(pair.shards, tensors(pair.shapes, step), strict=True):
                    q.grad = placed(g, line, [Shard(0)]) + 0.3 * q.detach()
                pair.optimizers[1].step()
            for p, q in zip(saved.shards, pair.shards, strict=True):
                if other == size:
                    assert torch.equal(p.to_local(), q.to_local()), (name, size, other)
            assert pair.error() < 1e-6, (name, size, other, pair.error())
        pair = Pair(build, lines[size], [Shard(0)], families(RESUMED))
        load(pair.oracle, pair.optimizers[0], path, no_dist=True)
        for step in (4, 5):
            pair.step(step)
        for p, q in zip(saved.oracle, pair.oracle, strict=True):
            assert apart(p, q) < 1e-6, (name, size, "one process")


def full_state_dicts(folder):
    """A state gathered to one process, and given back from there."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_optimizer_state_dict,
    )

    line = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, build in BUILDERS.items():
        # Where some parameters have a state and others none, torch wants strict=False.
        chosen = families(RESUMED if name != "rotate SGD" else RESUMED[:4])
        saved, other = (Pair(build, line, [Shard(0)], chosen) for _ in range(2))
        for step in (1, 2):
            saved.step(step)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(Bag(saved.shards), saved.optimizers[1], options=whole)
        assert bool(state) == (dist.get_rank() == 0), name
        with torch.no_grad():
            for p, q in zip(saved.shards, other.shards, strict=True):
                q.copy_(p)
        given = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(Bag(other.shards), other.optimizers[1], state, options=given)
        other.oracle = saved.oracle
        saved.step(3)
        for q, g in zip(other.shards, tensors(other.shapes, 3), strict=True):
            q.grad = placed(g, line, [Shard(0)]) + 0.3 * q.detach()
        other.optimizers[1].step()
        assert other.error() < 1e-6, (name, other.error())


def steps_that_differ_are_seen(folder):
    """The comparison of this file is one that fails."""
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    pair = Pair(BUILDERS["SGD"], line, [Shard(0)], families(("rows",)))
    for group in pair.optimizers[1].param_groups:
        group["lr"] *= 1.001
    pair.step(1)
    assert pair.error() > 1e-6


def weights_of(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def move_alike(shapes, first, second, rounding=0.0):
    """Whether two ways to build an optimizer move weights alike."""
    ours, theirs = weights_of(*shapes), weights_of(*shapes)
    pairs = ((ours, first(*ours)), (theirs, second(*theirs)))
    for seed in range(3):
        for weights, optimizer in pairs:
            generator = torch.Generator().manual_seed(seed)
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rounding)


def zero_class():
    """Import it without what torch says of its own modules meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer


def zero_redundancy(_):
    """Each process moves some tensors; spheres of several cannot be dealt out so."""
    zero = zero_class()

    def groups(a, b, c):
        return [{"params": [a], "sphere": ROWS}, {"params": [b], "sphere": Sphere()}, {"params": c}]

    for kind in (SphereAdamW, SphereSGD):
        usual = {"lr": 0.1, "weight_decay": 0.0}
        move_alike(
            [(7, 5), (6, 4), (3, 3)],
            lambda *ws, k=kind, s=usual: zero(groups(*ws[:2], list(ws[2:])), k, **s),
            lambda *ws, k=kind, s=usual: k(groups(*ws[:2], list(ws[2:])), **s),
        )
        joint = {"params": weights_of((7, 5), (7,)), "sphere": Sphere(AXES((0,)), joint=True)}
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer gives the parameters"):
            zero([joint], kind, lr=0.1)
        alone = {"params": weights_of((7, 5)), "sphere": Sphere(joint=True)}
        zero([alone], kind, lr=0.1)
        added = zero(weights_of((7, 5), (3, 2)), kind, lr=0.1)
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer gives the parameters"):
            added.add_param_group(joint)


def around_zero_redundancy(_):
    """What the refusal advises."""
    zero = zero_class()

    for mode in ("hard", "rotate"):

        def wrapped(a, b, *, base, mode=mode):
            return on_sphere(base, {(a, b): Sphere(AXES((0,)), joint=True)}, mode)

        move_alike(
            [(7, 5), (7,)],
            lambda a, b, w=wrapped: w(a, b, base=zero([a, b], torch.optim.SGD, lr=0.1)),
            lambda a, b, w=wrapped: w(a, b, base=torch.optim.SGD([a, b], lr=0.1)),
            rounding=1e-6,  # the way in which an update is known differs
        )


CHECKS = {
    **{f"same weights: {name}": partial(same_weights, name) for name in BUILDERS},
    "collectives": collectives,
    "what is not finite": what_is_not_finite,
    "refusals": refusals,
    "gradients elsewhere": gradients_elsewhere,
    "training": training,
    "resuming": resuming,
    "full state dicts": full_state_dicts,
    "steps that differ are seen": steps_that_differ_are_seen,
    "ZeroRedundancyOptimizer": zero_redundancy,
    "around ZeroRedundancyOptimizer": around_zero_redundancy,
}
