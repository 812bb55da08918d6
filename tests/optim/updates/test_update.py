"""Steps in pure PyTorch against the geometry, vector by vector in float64."""

import functools
import math

import pytest
import torch

from onsphere import geometry
from onsphere.geometry import VectorAxes
from optim.table import LAYOUTS, OPTIMIZERS, TRAVELS, make, place

pytestmark = pytest.mark.filterwarnings("ignore:a parameter of shape:UserWarning")


def oracle(name, p, grads, lr, options, radius, count_steps=0):
    """Follow one vector with the functions of the geometry; a formula per line, no coefficients."""
    row = OPTIMIZERS[name]
    settings = row.settings
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    p = geometry.to_sphere(p, radius)
    for k, g in enumerate(grads, 1):
        project = functools.partial(geometry.tangent, p)
        if row.divides_by_moment:
            m, size = 0.9 * m + 0.1 * g, g * g
            if not row.by_coordinate:
                m, size = project(m), project(g).square().mean()
            v = 0.999 * v + 0.001 * size
            u = project((m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8))
        else:
            alpha = settings.get("momentum", 0.0)
            dampening = settings.get("dampening", 0.0) if k > 1 else 0.0
            m = project(alpha * m + (1 - dampening) * g)
            u = project(g + alpha * m) if settings.get("nesterov") else m
        q, carried = _turn(p, u, m, lr, TRAVELS[options], normed=row.divides_by_moment)
        p, m = q, m if row.by_coordinate else carried
    return p


def _turn(p, u, m, lr, options, normed):
    radius = p.norm()
    rotation, exponential = options.get("lr_mode") == "angle", "retraction" in options
    step = -lr * u
    if "lr_mode" not in options:  # rows and centred rows: the length at which torch.nn starts them
        step = step * (radius * 3**0.5) ** (1 if normed else 2)
    if rotation:
        step = -lr * radius * u / u.norm()
    if not exponential:
        if rotation:  # the projection that turns by lr
            step = step * math.tan(lr) / lr
        q = geometry.retract(p, step)
        return q, geometry.tangent(q, m)
    q = geometry.expmap(p, step)
    return q, geometry.transport(p, q, m)


@pytest.mark.parametrize("options", TRAVELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_the_geometrys(name, options, generator):
    start = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    grads = torch.randn(4, 5, 9, generator=generator, dtype=torch.float64)
    w = torch.nn.Parameter(start.clone())
    optimizer = make(name, [{"params": [w], "sphere": LAYOUTS["rows"][2]}], options, lr=0.07)
    for grad in grads:
        w.grad = grad.clone()
        optimizer.step()
    for row in range(5):
        expected = oracle(name, start[row], grads[:, row], 0.07, options, start[row].norm().item())
        torch.testing.assert_close(w[row].detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [name for name in TRAVELS if "relative" not in name])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_joint_sphere_is_one_vector(name, options, generator):
    start = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    grads = torch.randn(4, 4, 6, generator=generator, dtype=torch.float64)
    together = torch.nn.Parameter(start.clone())
    rows = LAYOUTS["rows"][2]
    one = make(name, [{"params": [together], "sphere": rows}], options, lr=0.07)
    weight, bias = (torch.nn.Parameter(x.clone()) for x in (start[:, :5], start[:, 5]))
    joint = geometry.Sphere(VectorAxes((0,)), joint=True)
    two = make(name, [{"params": [weight, bias], "sphere": joint}], options, lr=0.07)
    for grad in grads:
        together.grad, weight.grad, bias.grad = grad, grad[:, :5].clone(), grad[:, 5].clone()
        one.step()
        two.step()
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1), together, rtol=0, atol=1e-12)
    assert "radius" not in two.state[bias]


@pytest.mark.parametrize("options", TRAVELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_centred_vectors_move_in_the_hyperplane(name, options, generator):
    """A basis of the vectors without mean turns a centred sphere into an ordinary one."""
    n = 7
    basis = torch.linalg.qr(
        torch.cat([torch.ones(n, 1), torch.randn(n, n - 1, generator=generator)], 1).double()
    )[0][:, 1:]
    start = torch.randn(3, n, generator=generator, dtype=torch.float64)
    grads = torch.randn(4, 3, n, generator=generator, dtype=torch.float64)
    w, low = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start @ basis)
    first = make(name, [{"params": [w], "sphere": LAYOUTS["centred"][2]}], options, lr=0.07)
    second = make(name, [{"params": [low], "sphere": LAYOUTS["rows"][2]}], options, lr=0.07)
    for grad in grads:
        w.grad, low.grad = grad.clone(), grad @ basis
        first.step()
        second.step()
        assert w.detach().mean(1).abs().max() < 1e-14
    # A second moment is a mean over coordinates, of which the hyperplane has one less.
    if not OPTIMIZERS[name].divides_by_moment:
        torch.testing.assert_close(w.detach(), low.detach() @ basis.T, rtol=0, atol=1e-12)
    norms = (start - start.mean(1, keepdim=True)).norm(dim=1)
    torch.testing.assert_close(w.detach().norm(dim=1), norms, rtol=1e-13, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layouts_are_views_of_vectors(name, layout, generator):
    shape, memory, sphere = LAYOUTS[layout]
    if layout == "large":
        shape = (1, 500)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    grads = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    w = torch.nn.Parameter(place(start, memory))
    optimizer = make(name, [{"params": [w], "sphere": sphere}], lr=0.05)
    vectors = torch.nn.Parameter(sphere.axes.gather(start).clone())
    flat = geometry.Sphere(
        VectorAxes(tuple(range(vectors.ndim - 1))), sphere.radius, centered=sphere.centered
    )
    other = make(name, [{"params": [vectors], "sphere": flat}], lr=0.05)
    for grad in grads:
        w.grad, vectors.grad = place(grad, memory), sphere.axes.gather(grad).clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(sphere.axes.gather(w.detach()), vectors.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("retraction", ["projection", "exponential"])
def test_rotation_is_exact_in_radians(name, retraction, generator):
    start = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    w = torch.nn.Parameter(start.clone())
    group = {"params": [w], "sphere": LAYOUTS["rows"][2]}
    optimizer = make(name, [group], lr=0.3, retraction=retraction, lr_mode="angle")
    for _ in range(3):
        before = w.detach().clone()
        w.grad = torch.randn(5, 9, generator=generator, dtype=torch.float64)
        optimizer.step()
        turned = geometry.distance(before, w.detach()) / before.norm(dim=1)
        torch.testing.assert_close(turned, torch.full_like(turned, 0.3), rtol=1e-12, atol=0)
