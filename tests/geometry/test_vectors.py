"""Layouts: gather and scatter are inverse, and lengths agree with an explicit loop."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onsphere.geometry import Sphere, VectorAxes

CASES = [
    # axes, shape, expected shape of gather
    (VectorAxes(), (4, 3, 2), (24,)),
    (VectorAxes(), (), (1,)),
    (VectorAxes(index=(0,)), (4, 3, 2, 2), (4, 12)),
    (VectorAxes(index=(1,)), (4, 3, 2, 2), (3, 16)),
    (VectorAxes(index=(0, 1)), (4, 3, 2, 2), (4, 3, 4)),
    (VectorAxes(index=(-1,)), (4, 3), (3, 4)),
    (VectorAxes(index=(0,), pieces=((1, 3),)), (2, 6, 5), (2, 3, 10)),
    (VectorAxes(pieces=((0, 2),)), (6, 4), (2, 12)),
    (VectorAxes(pieces=((-1, 2),)), (3, 4), (2, 6)),
    (VectorAxes(strided=((0, 2, 3),)), (12, 5), (2, 3, 10)),
    (VectorAxes(index=(0,), strided=((-1, 1, 2),)), (3, 6), (3, 1, 2, 3)),
    (VectorAxes(pieces=((0, 2),), strided=((1, 3, 1),)), (4, 6), (2, 3, 1, 4)),
    (VectorAxes(index=(0, 1)), (2, 3), (2, 3, 1)),
    (VectorAxes(index=(0,)), (0, 3), (0, 3)),
]


@pytest.mark.parametrize(("axes", "shape", "expected"), CASES, ids=str)
def test_gather_and_scatter(axes, shape, expected, generator):
    x = torch.randn(shape, generator=generator)
    vectors = axes.gather(x)
    assert vectors.shape == expected
    assert torch.equal(axes.scatter(vectors, shape), x)
    assert torch.equal(axes.norms(x).flatten(), vectors.norm(dim=-1).flatten()) or torch.allclose(
        axes.norms(x).flatten(), vectors.norm(dim=-1).flatten()
    )
    assert axes.count(shape) == vectors[..., 0].numel()


@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_any_layout_round_trips(data, shape, seed):
    index = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    rest = [a for a in range(len(shape)) if a not in index]
    cut = {
        a: data.draw(st.sampled_from([d for d in (1, 2, 3, 4) if shape[a] % d == 0]))
        for a in rest
        if data.draw(st.booleans())
    }
    axes = VectorAxes(tuple(index), tuple(cut.items()))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x.transpose(0, -1).contiguous().transpose(0, -1)  # not contiguous
    assert torch.equal(axes.scatter(axes.gather(x), shape), x)
    view, inside = axes.split(x)
    assert view.data_ptr() == x.data_ptr()
    assert torch.allclose(
        (view / axes.norms(x)).square().sum(inside) if inside else (view / axes.norms(x)).square(),
        torch.ones(()),
        atol=1e-5,
    )


def test_group_norm_layout_against_a_loop(generator):
    x = torch.randn(2, 6, 3, generator=generator)
    vectors = VectorAxes(index=(0,), pieces=((1, 2),)).gather(x)
    for n, g in itertools.product(range(2), range(2)):
        assert torch.equal(vectors[n, g], x[n, 3 * g : 3 * g + 3].flatten())


def test_pairs_of_rows_in_heads_against_a_loop(generator):
    x = torch.randn(12, 3, generator=generator)
    vectors = VectorAxes(strided=((0, 2, 3),)).gather(x)  # two heads of six rows
    for head, row in itertools.product(range(2), range(3)):
        first = 6 * head + row
        assert torch.equal(vectors[head, row], torch.stack([x[first], x[first + 3]]).flatten())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VectorAxes(index=(0, 0)), "named twice"),
        (lambda: VectorAxes(index=(0,), pieces=((0, 2),)), "named twice"),
        (lambda: VectorAxes(pieces=((0, 0),)), "at least one piece"),
        (lambda: VectorAxes(index=(0,), strided=((0, 2, 2),)), "named twice"),
        (lambda: VectorAxes(strided=((0, 2, 0),)), "a step of at least 1"),
        (lambda: VectorAxes(strided=((0, 2, 2),)).gather(torch.zeros(6, 3)), "2 vectors each"),
        (lambda: VectorAxes(index=(2,)).gather(torch.zeros(3, 3)), "does not have"),
        (lambda: VectorAxes(index=(1, -1)).gather(torch.zeros(3, 3)), "names an axis twice"),
        (lambda: VectorAxes(pieces=((0, 2),)).gather(torch.zeros(3, 3)), "do not divide"),
        (lambda: Sphere(radius=0.0), "positive and finite"),
        (lambda: Sphere(radius=float("nan")), "positive and finite"),
    ],
)
def test_bad_layouts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_descriptions_are_plain_values():
    sphere = Sphere(VectorAxes((0,)), 1.0)
    assert copy.deepcopy(sphere) == sphere == eval(repr(sphere))
    assert len({sphere, Sphere(VectorAxes((0,)), 1.0)}) == 1


def test_a_plain_optimizer_with_a_sphere_in_a_group_loads_as_weights_only(tmp_path):
    sphere = Sphere(VectorAxes((0,), ((1, 2),)), radius=2.0, invariant=False)
    weight = torch.nn.Parameter(torch.eye(4))
    optimizer = torch.optim.AdamW([{"params": [weight], "sphere": sphere}])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(state)
    loaded = optimizer.param_groups[0]["sphere"]
    assert loaded == sphere
    assert loaded.invariant is False
