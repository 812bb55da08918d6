"""Random weights near those of a model: what stays, and how far the rest moves."""

import torch
from torch import Tensor

from onsphere.symmetry.numeric.random_weights import RandomWeights


def _state() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    numbers = torch.randn(90, 100, generator=g, dtype=torch.float64)
    return {
        "small": numbers[:20, :30].clone(),
        "large": numbers.clone(),
        "positive": numbers[0].abs() + 0.5,
        "many positive": numbers.abs() + 0.5,
        "negative": -numbers[1].abs() - 0.5,
        "zeros of a weight": (numbers[2].abs() - 0.5).clamp_min(0.0),
        "some zeros": (numbers[2].abs() - 0.5).clamp_min(0.0),
        "many zeros": -(numbers.abs() - 0.5).clamp_min(0.0),
        "zeros": torch.zeros(40, dtype=torch.float64),
        "tiny": torch.full((30,), 1e-6, dtype=torch.float64),
        "many tiny": torch.full((90, 100), 1e-6, dtype=torch.float64),
        "mask": torch.tensor([0.0, -torch.inf], dtype=torch.float64),
        "kept": torch.ones(4, dtype=torch.float64),
        "empty": torch.empty(0, 3, dtype=torch.float64),
        "number": torch.tensor(2.0, dtype=torch.float64),
        "complex": torch.ones(3, dtype=torch.complex128),
    }


def _drawn(**how: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = _state()
    weights = RandomWeights(
        state, set(state) - {"kept"}, torch.Generator().manual_seed(1), ["some zeros", "many zeros"]
    )
    return state, weights.draw(**{"noise": 0.4, **how})  # type: ignore[arg-type]


def test_one_sign_stays_and_all_else_moves() -> None:
    state, drawn = _drawn()
    assert bool((drawn["positive"] > 0).all() and (drawn["many positive"] > 0).all())
    assert bool((drawn["negative"] < 0).all())
    assert bool((drawn["some zeros"] > 0).all() and (drawn["many zeros"] < 0).all())
    either = drawn["zeros of a weight"][state["zeros of a weight"] == 0]
    assert bool((either > 0).any() and (either < 0).any())
    assert drawn["kept"] is state["kept"]
    assert torch.equal(drawn["mask"], state["mask"])
    assert torch.equal(drawn["complex"], state["complex"])
    for name in ("small", "large", "positive", "zeros", "tiny", "number"):
        assert bool((drawn[name] != state[name]).all()), name
        assert drawn[name].shape == state[name].shape


def test_weights_drawn_together_have_memory_of_their_own() -> None:
    _, drawn = _drawn()
    before = drawn["positive"].clone()
    drawn["negative"].zero_()
    assert torch.equal(drawn["positive"], before)


def test_sizes_are_those_asked_for() -> None:
    state, drawn = _drawn(size=3.0, vectors=0.2)
    for name, factor in (("small", 3.0), ("large", 3.0), ("positive", 0.2)):
        ratio = float(drawn[name].abs().mean() / state[name].abs().mean())
        assert 0.8 * factor < ratio < 1.4 * factor, name
    _, drawn = _drawn(least=0.1)
    assert all(0.05 < float(drawn[n].abs().mean()) < 0.2 for n in ("tiny", "many tiny"))


def test_anew_a_matrix_keeps_its_mean_and_spread_alone() -> None:
    state, drawn = _drawn(anew=True)
    for name in ("small", "large"):
        pair = torch.stack([state[name].flatten(), drawn[name].flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.15
        assert abs(float(drawn[name].std() / state[name].std()) - 1) < 0.15
    assert bool((drawn["many positive"] > 0).all())
