"""However a model is wrapped, run or cast: the audit says the same as of the bare one."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from onsphere.geometry import VectorAxes
from onsphere.symmetry import Audit, CanonicalizeError, ModelError, audit, canonicalize

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def bare() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
            nn.ReLU(), nn.Linear(10, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 5),
        )  # fmt: skip


@cache
def expected() -> dict[str, Any]:
    return said(audit(bare(), X))


def said(found: Audit) -> dict[str, Any]:
    """Return what an audit says, under the names of the bare network."""

    def own(names: Any) -> Any:
        if isinstance(names, dict):
            return {n.removeprefix("inner."): e for n, e in names.items()}
        return [n.removeprefix("inner.") for n in names]

    return {
        "symmetries": [own(v) for v in found.scale_symmetries],
        "inert": own(found.inert),
        "spheres": [(own(s.names), s.axes) for s in found.spheres],
        "unknown": found.unknown_ops,
        "parameters": own(found.parameters),
    }


class Around(nn.Module):
    """Runs the bare network through a function of it and the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.function = bare(), function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.inner, *args, **kwargs)


@dataclass
class Result:
    logits: Tensor
    count: int = 0


def autocast(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net(x)


def compiled_in_place() -> nn.Module:
    net = bare()
    net.compile(backend="eager")
    return net


def compiled_inside() -> nn.Module:
    net = bare()
    net[4] = torch.compile(net[4], backend="eager")
    return net


def frozen() -> nn.Module:
    return bare().requires_grad_(False)


def flattened() -> nn.Module:
    """All weights are views of one long vector."""
    net = bare()
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    start = 0
    for p in net.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    return net


def sharded() -> nn.Module:
    net = bare()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def flat_sharded(*, originals: bool, nested: bool = False) -> nn.Module:
    def wrapped(module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            module, device_id=torch.device("cpu"), use_orig_params=originals
        )

    net = bare()
    if nested:
        net[4], net[6] = wrapped(net[4]), wrapped(net[6])
    return wrapped(net)


def parallel() -> nn.Module:
    return nn.parallel.DistributedDataParallel(bare())


@dataclass(frozen=True)
class Case:
    """A way to wrap, to call and to read the network."""

    name: str
    build: Callable[[], nn.Module]
    args: tuple[Any, ...] = (X,)
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Callable[[Any], Any] | None = None


def around(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Around(function)


LOCAL = (
    Case("compiled", lambda: torch.compile(bare(), backend="eager")),
    Case("compiled in place", compiled_in_place),
    Case("compiled inside", compiled_inside),
    Case("DataParallel", lambda: nn.DataParallel(bare())),
    Case("frozen", frozen),
    Case("flattened", flattened),
    Case("half", lambda: bare().half(), (X.half(),)),
    Case("bfloat16", lambda: bare().bfloat16(), (X.bfloat16(),)),
    Case("float64", lambda: bare().double(), (X.double(),)),
    Case("channels last", lambda: bare().to(memory_format=torch.channels_last)),
    Case("autocast", around(autocast)),
    Case("checkpoint, reentrant", around(lambda m, x: checkpoint(m, x, use_reentrant=True))),
    Case("checkpoint", around(lambda m, x: checkpoint(m, x, use_reentrant=False))),
    Case("checkpoint in pieces", around(lambda m, x: checkpoint_sequential(
        m, 3, x, use_reentrant=False))),
    Case("checkpoint wrapper", lambda: nn.Sequential(*map(checkpoint_wrapper, bare()))),
    Case("a tensor, not a tuple", bare, X),
    Case("keywords", around(lambda m, *, images, flag: m(images)), (),
         {"images": X, "flag": False}),
    Case("a tuple", around(lambda m, x: (m(x), x.shape, None))),
    Case("a dict", around(lambda m, x: {"deep": [{"logits": m(x)}], "count": 3})),
    Case("a dataclass", around(lambda m, x: Result(m(x)))),
    Case("picked", around(lambda m, x: {"logits": m(x), "norm": m[0].weight.norm()}),
         output=lambda result: result["logits"]),
    Case("a question about the input", around(lambda m, x: m(x if x.sum() > -1e9 else -x))),
    Case("a question about the output", around(lambda m, x: (lambda y: y if y[0, 0] > 0 else
                                                             y + 0 * y)(m(x)))),
)  # fmt: skip

DISTRIBUTED = (
    Case("DDP", parallel),
    Case("DDP, compiled", lambda: torch.compile(parallel(), backend="eager")),
    Case("fully_shard", sharded),
    Case("FSDP", lambda: flat_sharded(originals=False)),
    Case("FSDP, original parameters", lambda: flat_sharded(originals=True)),
    Case("FSDP, nested", lambda: flat_sharded(originals=False, nested=True)),
    Case("FSDP, compiled", lambda: torch.compile(flat_sharded(originals=True), backend="eager")),
)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("case", LOCAL, ids=lambda c: c.name)
def test_the_audit_is_that_of_the_bare_network(case: Case) -> None:
    found = audit(case.build(), case.args, case.kwargs, output=case.output)
    assert found.certified
    assert said(found) == expected()


def weights_of(model: nn.Module) -> list[Tensor]:
    """Copies of the weights that this process holds, whatever they look like."""
    held = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return [p.detach().clone() for p in held]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("case", DISTRIBUTED, ids=lambda c: c.name)
def test_a_distributed_model_is_audited_and_left_as_it_was(case: Case) -> None:
    model = case.build()
    names, before = [n for n, _ in model.named_parameters()], weights_of(model)
    assert said(audit(model, X)) == expected()
    assert [n for n, _ in model.named_parameters()] == names
    assert all(map(torch.equal, weights_of(model), before))
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("case", DISTRIBUTED, ids=lambda c: c.name)
def test_a_distributed_model_is_made_canonical_in_place(case: Case) -> None:
    net, model = bare(), case.build()
    once = canonicalize(net, audit(net, X))
    found = audit(model, X)
    assert canonicalize(model, found, inplace=True) is model
    with torch.no_grad():
        torch.testing.assert_close(model(X), once(X), rtol=0, atol=0)


@pytest.mark.usefixtures("process_group")
def test_wrappers_are_copied_where_they_can_be() -> None:
    found = audit(bare(), X)
    for model in (torch.compile(bare(), backend="eager"), parallel()):
        before = weights_of(model)
        once = canonicalize(model, found)
        assert type(once) is type(model)
        assert all(map(torch.equal, weights_of(model), before))
        assert not all(map(torch.equal, weights_of(once), before))
    with pytest.raises(CanonicalizeError, match="give inplace=True"):
        canonicalize(sharded(), found)


def meta() -> nn.Module:
    return bare().to("meta")


def fake() -> nn.Module:
    with FakeTensorMode():
        return bare()


def fake_input() -> Tensor:
    return FakeTensorMode().from_tensor(X)


WITHOUT_MEMORY = (
    Case("meta", meta, (X.to("meta"),)),
    Case("meta, inputs with values", meta),
    Case("fake", fake, (fake_input(),)),
    Case("fake, inputs with values", fake),
    Case("fake parameters, meta inputs", fake, (X.to("meta"),)),
    Case("a question about the input", lambda: Around(lambda m, x: m(x if x.sum() > -1e9 else -x))
         .to("meta")),
    Case("a selection by the input", lambda: Around(lambda m, x: m(x)[x.sum((1, 2, 3)) > -1e9])
         .to("meta")),
)  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_MEMORY, ids=lambda c: c.name)
def test_without_memory_the_units_are_the_same(case: Case) -> None:
    found = audit(case.build(), case.args)
    assert not found.certified
    assert {**said(found), "spheres": None} == {**expected(), "spheres": None}


def test_inside_a_fake_mode_as_well() -> None:
    with FakeTensorMode() as mode:
        net = bare()
        assert not audit(net, mode.from_tensor(X)).certified


DECIDED_BY_VALUES = (
    ("a question about weights", lambda m, x: (lambda y: y if y.sum() > 0 else -y)(m(x))),
    ("a selection by weights", lambda m, x: (lambda y: y[y[:, 0] > 0])(m(x))),
)


@pytest.mark.parametrize(("name", "function"), DECIDED_BY_VALUES, ids=lambda c: str(c)[:24])
def test_values_that_are_needed_and_missing_are_said_so(name: str, function: Any) -> None:
    audit(Around(function), X)
    with pytest.raises(ModelError, match="depends on the values of a tensor"):
        audit(Around(function).to("meta"), X)


# --- parametrizations ---------------------------------------------------------------------------


def with_weight_norm() -> nn.Module:
    net = bare()
    parametrizations.weight_norm(net[4])
    return net


def test_parametrized_weights_have_their_own_symmetries() -> None:
    found = audit(with_weight_norm(), X)
    original = "4.parametrizations.weight.original"
    sphere = found.own_spheres()[f"{original}1"]
    assert sphere.axes == VectorAxes(index=(0,))
    assert not found.unknown_ops
    # The length takes the place of the weight; everything else is as in the bare network.
    assert {frozenset(v) for v in found.scale_symmetries} == {
        frozenset(n.replace("4.weight", f"{original}0") for n in v)
        for v in expected()["symmetries"]
    } | {frozenset({f"{original}1"})}


# --- gradient checkpointing as models do it themselves --------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).train()
    inputs = {"input_ids": torch.arange(6)[None], "use_cache": False}
    plain = audit(model, (), inputs)
    other = copy.deepcopy(model)
    enable = getattr(other, "activation_checkpointing_enable", None)
    (enable or other.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    assert audit(other, (), inputs).scale_symmetries == plain.scale_symmetries
    assert len(plain.scale_symmetries) == 7


# --- two processes ------------------------------------------------------------------------------


def work(rank: int, store: str) -> None:
    """What each of two processes does with its shards."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    once = canonicalize(bare(), audit(bare(), X))
    builds = (parallel, sharded, lambda: flat_sharded(originals=False, nested=True))
    for build in builds:
        model = build()
        found = audit(model, X)
        assert said(found) == expected(), build
        canonicalize(model, found, inplace=True)
        with torch.no_grad():
            torch.testing.assert_close(model(X), once(X), rtol=0, atol=0)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", __file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [p.communicate(timeout=300)[1].decode() for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], errors


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
