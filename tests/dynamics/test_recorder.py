"""The recorder against geometry in float64, on real optimizers."""

import math

import pytest
import torch

from onsphere import geometry
from onsphere.dynamics import NormRecorder
from onsphere.geometry import VectorAxes

LAYOUTS = [VectorAxes(), VectorAxes((0,)), VectorAxes((1,)), VectorAxes(pieces=((0, 2),))]
OPTIMIZERS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator)


def vectors(x, axes):
    return torch.atleast_2d(axes.gather(x.detach().double())).flatten(0, -2)


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_every_quantity_of_every_vector(axes, make, generator):
    w = torch.nn.Parameter(draw(generator, 4, 3, 2))
    optimizer = make([w], lr=0.1)
    recorder = NormRecorder(optimizer, {"w": (w, axes)}, per_vector=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(3):
        w.grad = draw(generator, 4, 3, 2)
        p = vectors(w, axes)
        optimizer.step()
        scheduler.step()
        q, g = vectors(w, axes), vectors(w.grad, axes)
        expected = {
            "norm": p.norm(dim=1),
            "gradient_square": g.square().sum(1),
            "effective_lr": 0.1 * 0.5**step / p.square().sum(1),
            "rotation": geometry.distance(geometry.to_sphere(p), q),
            "radial": torch.cosine_similarity(p, q - p, dim=1),
        }
        got = recorder.series("w")
        assert got["step"].tolist() == list(range(step + 1))
        for name, values in expected.items():
            torch.testing.assert_close(got[name][step], values, rtol=1e-10, atol=1e-12)


def test_the_mean_leaves_dead_vectors_out():
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    optimizer = torch.optim.SGD([w], lr=0.5)
    recorder = NormRecorder(optimizer, {"w": (w, VectorAxes((0,)))})
    w.grad = torch.tensor([[-8.0, 6.0], [1.0, 0.0]])
    optimizer.step()
    got = {name: values.item() for name, values in recorder.series("w").items()}
    assert got["norm"] == 2.5
    assert got["effective_lr"] == pytest.approx(0.02)
    assert got["rotation"] == pytest.approx(math.pi / 4)


@pytest.mark.parametrize("angle", [1e-7, 1e-4, 3.0])
def test_small_rotations_keep_their_digits(angle):
    w = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=1.0)
    recorder = NormRecorder(optimizer, {"w": (w, VectorAxes())})
    w.grad = torch.tensor([1 - math.cos(angle), -math.sin(angle)], dtype=torch.float64)
    optimizer.step()
    assert recorder.series("w")["rotation"].item() == pytest.approx(angle, rel=1e-9)


def test_no_gradient_and_no_update():
    w = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([w], lr=0.5)
    recorder = NormRecorder(optimizer, {"w": (w, VectorAxes((0,)))})
    optimizer.step()
    got = recorder.series("w")
    assert got["gradient_square"].isnan().all()
    assert got["rotation"].item() == got["radial"].item() == 0


def test_sampling_detaching_and_nothing_recorded(generator):
    w = torch.nn.Parameter(draw(generator, 2, 3))
    optimizer = torch.optim.SGD([w], lr=0.1)
    with NormRecorder(
        optimizer, {"w": (w, VectorAxes((0,)))}, every=3, per_vector=True
    ) as recorder:
        assert recorder.series("w")["norm"].shape == (0, 2)
        for _ in range(7):
            w.grad = draw(generator, 2, 3)
            optimizer.step()
    optimizer.step()
    recorder.detach()
    assert recorder.series("w")["step"].tolist() == [0, 3, 6]
    assert recorder.names == ("w",)
    with pytest.raises(KeyError, match="there is w"):
        recorder.series("v")


@pytest.mark.parametrize(
    ("tensor", "axes", "every", "says"),
    [
        ("other", VectorAxes(), 1, "not among the optimizer's parameters"),
        ("w", VectorAxes((4,)), 1, "names an axis"),
        ("w", VectorAxes(), 0, "at least 1"),
    ],
)
def test_refused(tensor, axes, every, says):
    tensors = {"w": torch.nn.Parameter(torch.ones(2)), "other": torch.ones(2)}
    optimizer = torch.optim.SGD([tensors["w"]], lr=0.1)
    with pytest.raises(ValueError, match=says):
        NormRecorder(optimizer, {"w": (tensors[tensor], axes)}, every=every)
