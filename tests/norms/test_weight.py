"""Weight norms: torch's numbers and state dicts where torch has them, the lemma everywhere."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

from onsphere.geometry import SphereMap, normalize
from onsphere.norms import METHODS, parametrize

LAYERS = {
    "linear": lambda: nn.Linear(5, 4, dtype=torch.float64),
    "conv": lambda: nn.Conv2d(3, 4, 3, dtype=torch.float64),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, dtype=torch.float64),
}
TORCH = {"wn": parametrizations.weight_norm, "sn": parametrizations.spectral_norm}
KEYS = tuple(key for key, row in METHODS.items() if row.normalizes == "weight")


def layer(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LAYERS[kind]()


def rows(weight, kind):
    return weight.movedim(1 if kind == "transposed" else 0, 0).flatten(1)


def inputs(module, generator):
    shape = (2, 5) if isinstance(module, nn.Linear) else (2, 3, 6, 6)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("key", TORCH)
def test_equals_torch(key, kind, generator):
    # torch's weight_norm takes rows along axis 0 whatever the layer
    options = {"dim": 1} if (key, kind) == ("wn", "transposed") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ours = parametrize(layer(kind), key)
        torch.manual_seed(1)
        theirs = TORCH[key](layer(kind), **options)
    x = inputs(theirs, generator)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for training in (True, True, False):
        outputs = []
        for module in (ours, theirs):
            y = module.train(training)(x)
            grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
            outputs.append([y, *grads])
        for a, b in zip(*outputs, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("key", ["wn", "cwn", "ws"])
def test_rows_are_projected_as_the_lemma_says(key, kind):
    module = parametrize(layer(kind), key)
    raw = rows(layer(kind).weight, kind)
    n = raw.shape[1]
    centered = key != "wn"
    length = 1.0 if key != "ws" else n**0.5
    expected = normalize(raw, SphereMap(centered, length, eps=1e-5 * n if key == "ws" else 0.0))
    if key != "ws":
        c = raw - raw.mean(1, keepdim=True) if centered else raw
        expected = expected * c.norm(dim=1, keepdim=True)
    assert torch.allclose(rows(module.weight, kind), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_spectral_norm_reaches_the_spectral_sphere(kind):
    module = parametrize(layer(kind), "sn", n_power_iterations=200)
    largest = torch.linalg.matrix_norm(rows(module.weight, kind), ord=2)
    assert largest.item() == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("key", KEYS)
def test_weight_is_invariant_to_the_scale_of_what_is_stored(key, generator):
    module = parametrize(layer("conv"), key, eps=0.0).eval()
    before = module.weight.clone()
    store = module.parametrizations.weight
    with torch.no_grad():
        getattr(store, "original1", getattr(store, "original", None)).mul_(7.0)
    assert torch.allclose(module.weight, before, rtol=1e-12)


@pytest.mark.parametrize("key", KEYS)
def test_second_derivatives(key, generator):
    """PyTorch's own fused weight norm fails this on the CPU (2.13)."""
    module = parametrize(layer("linear"), key).eval()
    x = inputs(module, generator)
    names, values = zip(*module.named_parameters(), strict=True)

    def output(*values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(output, values)


@pytest.mark.parametrize("key", KEYS)
def test_survives_deepcopy_and_removal(key):
    module = copy.deepcopy(parametrize(layer("linear"), key)).eval()
    projected = module.weight.detach().clone()
    assert torch.equal(remove_parametrizations(module, "weight").weight, projected)


def test_half_precision_rows_have_their_length_to_rounding(generator):
    module = parametrize(nn.Linear(999, 8, dtype=torch.bfloat16), "cwn")
    store = module.parametrizations.weight
    lengths = module.weight.float().norm(dim=1)
    assert torch.allclose(lengths, store.original0.float().flatten(), rtol=2e-3)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("key", "eps"), [("demod", 1e-8), ("ngpt", 0.0)])
def test_rows_of_unit_length(key, eps, kind):
    module = parametrize(layer(kind), key)
    raw = rows(layer(kind).weight, kind)
    expected = raw / (raw.square().sum(1, keepdim=True) + eps).sqrt()
    assert torch.allclose(rows(module.weight, kind), expected, rtol=1e-12)


def test_ngpt_normalizes_along_the_embedding_on_either_side():
    """Of a matrix that writes into the embedding, columns are the vectors."""
    out = parametrize(nn.Linear(5, 4), "ngpt", dim=1)
    assert torch.allclose(out.weight.norm(dim=0), torch.ones(5))


def test_negative_axes_count_from_the_end():
    assert parametrize(nn.Linear(3, 2), "wn", dim=-1).weight.shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parametrize(nn.Linear(2, 2), "bn"), "ActivationNorm"),
        (lambda: parametrize(nn.Linear(2, 2), "wn", "kernel"), "no parameter 'kernel'"),
        (lambda: parametrize(nn.Linear(2, 2), "wn", "bias"), "has 1 axes"),
        (lambda: parametrize(nn.Linear(2, 2), "sn", n_power_iterations=0), "at least 1"),
        (lambda: parametrize(nn.Linear(2, 2), "nope"), "unknown normalization method"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("key", "old"),
    [("wn", torch.nn.utils.weight_norm), ("sn", torch.nn.utils.spectral_norm)],
)
def test_loads_what_pytorchs_older_hooks_saved(key, old, inside, generator):
    def layer():
        made = torch.nn.Linear(5, 7)
        return torch.nn.Sequential(made) if inside else made

    before, after = layer(), layer()
    old(before[0] if inside else before)
    parametrize(after[0] if inside else after, key)
    saved = before.state_dict()
    assert str(after.load_state_dict(saved)) == "<All keys matched successfully>"
    assert any(name.endswith("weight_v") for name in saved)  # the caller's dict is not touched
    x = torch.randn(3, 5, generator=generator)
    torch.testing.assert_close(after.eval()(x), before.eval()(x), rtol=1e-5, atol=1e-6)
