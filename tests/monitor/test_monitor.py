"""The monitor beside real trainings: no waiting, no change, files, wrappers and schedulers."""

import copy
import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import onsphere as osp
from monitor.networks import ROWS, Weights, steps, tangent_noise, watched
from onsphere.geometry import Sphere, VectorAxes
from onsphere.monitor import Monitor, MonitorError, Run, RunError
from onsphere.optim import SphereAdamW, on_sphere

SGD = torch.optim.SGD


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.ReLU(),
            torch.nn.Linear(8, 3),
        )


def fit(net, optimizer, count, *, step=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 6, generator=generator)
        y = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        step(loss) if step else (loss.backward(), optimizer.step())


def audit(net):
    return osp.audit(net, torch.randn(16, 6, generator=torch.Generator().manual_seed(1)))


class Reads(TorchDispatchMode):
    """Counts what makes a device wait: numbers read, and copies that are not sent ahead."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "_local_scalar_dense" in name or "nonzero" in name or "is_nonzero" in name:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_hot_path_reads_no_number(generator):
    net = Weights(w=torch.randn(8, 6, generator=generator), v=torch.randn(8, generator=generator))
    optimizer = SGD(net.parameters(), lr=torch.tensor(0.1), foreach=False)
    monitor = Monitor(net, optimizer, {"w": ROWS, "v": VectorAxes()}, every=1)
    gradients = [torch.randn(8, 6, generator=generator), torch.randn(8, generator=generator)]
    with Reads() as reads:
        for _ in range(4):
            monitor._look_before(optimizer, (), {})
            net.w.grad, net.v.grad = gradients
            monitor._look_after(optimizer, (), {})
    monitor.close()
    assert monitor.run.steps.tolist() == [0, 1, 2, 3]
    assert monitor.run.lr("w")[0] == pytest.approx(0.1)
    assert reads.found == []
    with Reads() as reads:
        net.w.sum().item()
    assert reads.found, "a number that is read would be seen"


def test_the_training_is_the_same_with_and_without(generator):
    plain, seen = network(), network()
    make = lambda net: torch.optim.AdamW(net.parameters(), lr=0.01)  # noqa: E731
    first, second = make(plain), make(seen)
    given = audit(seen)
    fit(plain, first, 7)
    with Monitor(seen, second, given, every=2) as monitor:
        fit(seen, second, 7)
    for p, q in zip(plain.parameters(), seen.parameters(), strict=True):
        assert torch.equal(p, q)
    assert monitor.run.steps.tolist() == [0, 2, 4, 6]
    assert list(monitor.run.layers) == ["0.weight"]
    fit(seen, second, 3)
    assert monitor.run.steps.tolist() == [0, 2, 4, 6], "it goes on after the end"


def test_metrics_rows_and_frames(generator):
    monitor = watched(lambda p: SGD(p, lr=0.1), tangent_noise(generator), 3)
    latest = monitor.latest()
    assert list(latest) == [
        f"onsphere/{q}/w" for q in ("norm", "rotation", "effective_lr", "radial")
    ]
    last = monitor.rows[-1]
    assert (last["step"], last["layer"], last["lr"]) == (2, "w", 0.1)
    assert last["norm"] == latest["onsphere/norm/w"]
    assert last["norm_q10"] <= last["norm_q90"]
    pandas = pytest.importorskip("pandas")
    frame = monitor.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc[(2, "w"), "predicted_norm"] == last["predicted_norm"]
    assert "w" in str(monitor)
    assert "SGD, step 2" in str(monitor)


def test_nothing_sampled_yet(generator):
    net = network()
    with Monitor(net, SGD(net.parameters(), lr=0.1), audit(net)) as monitor:
        assert monitor.latest() == {}
        assert monitor.rows == []
        assert str(monitor) == "No step has been sampled yet."
        with monitor.live(refresh_per_second=50, transient=True):
            pass


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_a_writer_gets_every_metric(generator):
    writer = Writer()
    monitor = watched(lambda p: SGD(p, lr=0.1), tangent_noise(generator), 3, every=2, writer=writer)
    assert [s for *_, s in writer.scalars] == [0] * 4 + [2] * 4
    assert {tag: value for tag, value, step in writer.scalars if step == 2} == monitor.latest()


def test_a_file_holds_the_run(generator, tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    monitor = watched(lambda p: SGD(p, lr=0.1, weight_decay=0.01), lambda *_: None, 4, path=path)
    run = Run.read(path)
    np.testing.assert_allclose(run.series("w", "norm"), monitor.run.series("w", "norm"), rtol=1e-5)
    assert run.optimizer["name"] == "SGD"
    assert run.optimizer["weight_decay"] == 0.01
    assert [flag.kind for flag in run.flags] == ["dead"] == [f.kind for f in monitor.flags]
    kinds = [next(iter(json.loads(line))) for line in path.read_text().splitlines()]
    assert kinds == ["kind", "step", "step", "step", "flag", "step"]


def test_lines_are_out_before_the_end(generator, tmp_path):
    net = Weights(w=torch.randn(4, 3, generator=generator))
    optimizer = SGD(net.parameters(), lr=0.1)
    with Monitor(net, optimizer, {"w": ROWS}, every=1, path=tmp_path / "run.jsonl"):
        steps(optimizer, 3, lambda *_: torch.ones(4, 3))
        assert Run.read(tmp_path / "run.jsonl").steps.tolist() == [0, 1]


def test_a_run_is_resumed_after_a_crash(generator, tmp_path):
    path, noise = tmp_path / "run.jsonl", tangent_noise(generator)
    make = lambda p: SGD(p, lr=0.1)  # noqa: E731
    watched(make, noise, 6, path=path)
    text = path.read_text()
    path.write_text(text[: len(text) - 40])  # torn in the middle of a line
    watched(make, noise, 4, path=path, start=3)
    run = Run.read(path)
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert run.series("w", "norm")[3] == pytest.approx(1, abs=1e-5), "the new lines count"


def test_files_of_others_are_left_alone(generator, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    with pytest.raises(RunError, match="holds no watched run"):
        watched(lambda p: SGD(p, lr=0.1), tangent_noise(generator), 1, path=path)
    assert path.read_text() == "my notes"
    net = Weights(v=torch.randn(4, 3, generator=generator))
    watched(lambda p: SGD(p, lr=0.1), tangent_noise(generator), 1, path=tmp_path / "run.jsonl")
    with pytest.raises(RunError, match="other layers"):
        Monitor(net, SGD(net.parameters(), lr=1), {"v": ROWS}, path=tmp_path / "run.jsonl")


def test_closures_scalers_and_accumulation(generator):
    net = network()
    optimizer = SGD(net.parameters(), lr=0.1)

    def by_closure(loss):
        optimizer.step(lambda: (loss.backward(), loss)[1])

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled(loss):
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    with Monitor(net, optimizer, audit(net), every=1) as monitor:
        fit(net, optimizer, 2, step=by_closure)
        fit(net, optimizer, 2, step=scaled)
    gradients = monitor.run.series("0.weight", "gradient")
    assert len(gradients) == 4
    assert gradients.min() > 0
    assert gradients[2:].max() < 10 * gradients[:2].max(), "the scaler's factor is still there"


def test_the_wrapper_is_watched_with_its_restoration(generator):
    net = network()
    base = SGD(net.parameters(), lr=1.0)
    given = audit(net)
    optimizer = on_sphere(base, given.spheres_of(net))
    with Monitor(net, optimizer, given, every=1) as monitor:
        fit(net, optimizer, 3)
    assert np.ptp(monitor.run.series("0.weight", "norm")) < 1e-6
    assert monitor.run.series("0.weight", "rotation").min() > 1e-3
    assert monitor.run.optimizer["on_sphere"] == "hard"


def test_optimizers_that_know_their_spheres_need_no_audit():
    net = network()
    groups = [
        {"params": [net[0].weight], "sphere": Sphere(ROWS)},
        {"params": [net[3].weight]},
    ]
    with Monitor(net, SphereAdamW(groups, lr=0.1)) as monitor:
        assert list(monitor.run.layers) == ["0.weight"]
    wrapped = on_sphere(SGD([net[0].weight], lr=0.1), {net[0].weight: Sphere(ROWS)})
    with Monitor(net, wrapped) as monitor:
        assert list(monitor.run.layers) == ["0.weight"]


class Outer(torch.optim.Optimizer):
    """As Accelerate and Lightning wrap an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_wrapped_models_and_optimizers_keep_their_names():
    net = network()
    compiled = torch.compile(net, backend="eager")
    optimizer = SGD(net.parameters(), lr=0.1)
    with Monitor(compiled, Outer(optimizer), audit(net), every=1) as monitor:
        fit(compiled, optimizer, 2)
    assert list(monitor.run.layers) == ["0.weight"]
    assert len(monitor.run.samples) == 2


def test_an_optimizer_that_is_copied_takes_no_hooks_along(generator):
    net = Weights(w=torch.randn(4, 3, generator=generator))
    optimizer = SGD(net.parameters(), lr=0.1)
    with Monitor(net, optimizer, {"w": ROWS}, every=1) as monitor:
        copy.deepcopy(optimizer).step()
        assert monitor.run.steps.tolist() == []


@pytest.mark.parametrize(
    ("spheres", "says"),
    [
        (None, "give an audit"),
        ({"x": ROWS}, "the model has no parameter 'x'"),
        ({"w": VectorAxes((5,))}, "names an axis"),
        ({"w": 3}, "write a Sphere or VectorAxes"),
        ({torch.ones(2): ROWS}, "the optimizer moves none"),
    ],
)
def test_what_cannot_be_watched(spheres, says):
    net = Weights(w=torch.ones(2, 2))
    with pytest.raises(MonitorError, match=says):
        Monitor(net, SGD(net.parameters(), lr=0.1), spheres)


def test_options_out_of_range():
    net = Weights(w=torch.ones(2, 2))
    for options in ({"every": 0}, {"start": -1}):
        with pytest.raises(ValueError, match="at least"):
            Monitor(net, SGD(net.parameters(), lr=0.1), {"w": ROWS}, **options)


def test_copies_live_for_one_step_only(generator):
    net = Weights(w=torch.randn(4, 3, generator=generator))
    optimizer = SGD(net.parameters(), lr=0.1)
    with Monitor(net, optimizer, {"w": ROWS}, every=2) as monitor:
        for number in range(4):
            monitor._look_before(optimizer, (), {})
            assert (monitor._sampler._before is not None) == (number % 2 == 0)
            monitor._look_after(optimizer, (), {})
            assert monitor._sampler._before is None


def test_a_group_with_a_name_does_not_rename_the_optimizer(generator):
    make = lambda p: SGD([{"params": p, "name": "body"}], lr=0.1)  # noqa: E731
    run = watched(make, tangent_noise(generator), 1).run
    assert run.optimizer["name"] == "SGD"
    assert run.optimizer["groups"][0]["name"] == "body"


def test_tied_weights_go_by_each_of_their_names():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(3, 4))
    net[1].weight = net[0].weight
    optimizer = SGD(net.parameters(), lr=0.1)
    with Monitor(net, optimizer, {"1.weight": ROWS}) as monitor:
        assert list(monitor.run.layers) == ["0.weight"]
    with pytest.raises(MonitorError, match=r"did you mean '1\.weight'"):
        Monitor(net, optimizer, {"1.wight": ROWS})


def test_the_screen_reads_the_last_sample_only(generator, monkeypatch):
    monitor = watched(lambda p: SGD(p, lr=0.1), tangent_noise(generator), 3)
    read, whole = [], Run.series
    monkeypatch.setattr(
        Run, "series", lambda run, *names: (read.append(len(run.samples)), whole(run, *names))[1]
    )
    assert f"{monitor.run.samples[-1].values[0, 0, 0]:.3g}" in str(monitor)
    assert set(read) == {1}
