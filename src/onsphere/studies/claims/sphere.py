"""Claim `sphere`: every normalization puts its vectors on a sphere, with the lemma's Jacobian."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onsphere.geometry import SphereMap, VectorAxes, normalize, spectrum
from onsphere.norms import ActivationNorm, SpectralSphere
from onsphere.norms.weight import WeightSphere
from onsphere.report.document import Figure, Outcome, Panel, Reference, Series, Table
from onsphere.report.number import number
from onsphere.studies.claims.base import Claim, Details, Outcomes
from onsphere.studies.claims.plan import Plan, Results, label, on_trained, worst
from onsphere.studies.claims.statement import Statement
from onsphere.studies.engine.job import Cell, Config, Inputs, Task
from onsphere.studies.engine.job import Outcome as Found
from onsphere.studies.setup.network import Network
from onsphere.studies.setup.training import Training, restore

_IMAGES = 4  # images in the batch: keeps BatchNorm's vectors short enough for a dense Jacobian
_LARGEST = 600  # entries of the longest vector whose Jacobian is measured,
_LARGEST_OF_ALL = 1500  # also of a network whose vectors are all longer
_DRAWN = 160  # entries of the longest vector whose spectrum is drawn
_VECTORS = 2  # vectors per layer whose Jacobian is measured
_RADIUS, _SPECTRUM, _SHORTFALL = 1e-10, 1e-8, 1e-10  # thresholds, in float64


def measure(config: Config, inputs: Inputs) -> Found:
    """Compare lengths and Jacobians of a trained network's norms with the lemma, in float64."""
    settings = Training(**config["training"])
    model = restore(settings, inputs).double()
    sites = _sites(model, inputs.images.train_x[:_IMAGES].double())
    sizes = [_Site(module, z, eps=None).size for module, z in sites]
    drawn = max((n for n in sizes if n <= _DRAWN), default=min(sizes))
    layers = [
        _measure_layer(module, z, index + 1, curve=size == drawn, dense=_is_dense(size, sizes))
        for index, ((module, z), size) in enumerate(zip(sites, sizes, strict=True))
    ]
    return Found({"layers": layers})


def _is_dense(size: int, sizes: Sequence[int]) -> bool:
    """Return whether a dense Jacobian is measured: of short vectors, and of the shortest ones."""
    return size <= _LARGEST or (size == min(sizes) and size <= _LARGEST_OF_ALL)


def _sites(model: Network, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Return every normalization with the tensor that reaches it."""
    assert model.method is not None
    if model.method.normalizes == "weight":
        projections = [m for m in model.modules() if isinstance(m, WeightSphere | SpectralSphere)]
        weights = [weight.detach() for weight, _ in model.hidden_weights().values()]
        return list(zip(projections, weights, strict=True))
    met: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        norm.register_forward_pre_hook(lambda module, args: met.append((module, args[0].detach())))
        for norm in model.norms
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return met


class _Site:
    """One normalization without its learned gain, as a function of its vectors."""

    def __init__(self, module: nn.Module, z: Tensor, eps: float | None) -> None:
        """Take the module apart; ``eps=None`` keeps the real one."""
        self.module, self.shape = copy.deepcopy(module), z.shape
        if isinstance(self.module, ActivationNorm):
            self._strip_activation(self.module, z, eps)
        else:
            assert isinstance(self.module, WeightSphere | SpectralSphere)
            self.module.eval()
            row = self.module.method
            self.axes = row.vector_axes(z.ndim)
            eps = (row.eps or 0.0) if eps is None else 0.0
            self.map = row.sphere_map(self.axes.gather(z).shape[-1], eps)
        self.size = self.vectors(z)[0].numel()

    def _strip_activation(self, module: ActivationNorm, z: Tensor, eps: float | None) -> None:
        module.train()
        module.weight, module.bias = None, None
        if eps is not None:
            module.eps = eps
        trailing = len(module.size) if module.method.affine == "element" else None
        self.axes = module.method.vector_axes(z.ndim, module.num_groups, trailing)
        size = self.axes.gather(z).shape[-1]
        self.map = module.method.sphere_map(size, module.eps_for(z))

    def vectors(self, z: Tensor) -> Tensor:
        """Return the vectors (one matrix, for the spectral sphere) of a tensor."""
        if self.map.norm == "spectral":
            return z.flatten(1)[None]
        gathered = self.axes.gather(z)
        return gathered.reshape(-1, gathered.shape[-1])

    def __call__(self, vectors: Tensor) -> Tensor:
        """Run the real module on vectors."""
        spectral = self.map.norm == "spectral"
        z = vectors.reshape(self.shape) if spectral else self.axes.scatter(vectors, self.shape)
        if isinstance(self.module, WeightSphere) and self.module.method.affine == "length":
            lengths = z.new_ones([n if axis == 0 else 1 for axis, n in enumerate(z.shape)])
            return self.vectors(self.module(lengths, z))
        return self.vectors(self.module(z))


def _measure_layer(
    module: nn.Module, z: Tensor, index: int, *, curve: bool, dense: bool
) -> dict[str, Any]:
    exact, real = _Site(module, z, eps=1e-30), _Site(module, z, eps=None)
    if isinstance(exact.module, SpectralSphere):
        _converge(exact.module, z)
        _converge(real.module, z)
    vectors = exact.vectors(z)
    result: dict[str, Any] = {
        "layer": index,
        "vectors": vectors.shape[0],
        "entries": vectors[0].numel(),
        "raw_lengths": _few(_lengths(vectors, exact.map) / exact.map.radius),
        "lengths": _few(_lengths(exact(vectors), exact.map) / exact.map.radius),
        "radius_error": float(
            (_lengths(exact(vectors), exact.map) / exact.map.radius - 1).abs().max()
        ),
        "eps_error": _relative(real(vectors), normalize(vectors, real.map)),
        "eps_shrink": float((1 - _lengths(real(vectors), real.map) / real.map.radius).max()),
    }
    if dense:
        result |= _measure_spectrum(real, vectors, curve)
    return result


def _measure_spectrum(site: _Site, vectors: Tensor, curve: bool) -> dict[str, Any]:
    """Singular values of autograd's Jacobian against the closed form, at the real eps."""
    errors, drawn = [], {}
    for index in range(min(_VECTORS, vectors.shape[0])):

        def output(vector: Tensor, index: int = index) -> Tensor:
            moved = vectors.clone()
            moved[index] = vector
            return site(moved)[index].flatten()

        jacobian = torch.autograd.functional.jacobian(output, vectors[index].clone())  # type: ignore[no-untyped-call]
        measured = torch.linalg.svdvals(jacobian.flatten(1))
        predicted = spectrum(vectors[index], site.map).expand()
        errors.append(float((measured - predicted).abs().max() / predicted.max()))
        if curve and index == 0:
            drawn = {"measured": _few(measured), "predicted": _few(predicted)}
            drawn["position"] = _few(torch.arange(1.0, len(measured) + 1))
    return {"spectrum_error": max(errors), "curve": drawn}


@torch.no_grad()
def _converge(module: nn.Module, z: Tensor) -> None:
    """Run the power iteration to the leading singular vectors, which training only follows."""
    assert isinstance(module, SpectralSphere)
    u, _, vh = torch.linalg.svd(z.flatten(1))
    sign = torch.sign(torch.dot(u[:, 0], module._u))
    module._u.copy_(sign * u[:, 0])
    module._v.copy_(sign * vh[0])


def _lengths(vectors: Tensor, map: SphereMap) -> Tensor:
    centered = vectors - vectors.mean(-1, keepdim=True) if map.centered else vectors
    if map.norm == "spectral":
        return torch.linalg.matrix_norm(centered, ord=2).flatten()
    return VectorAxes(index=(0,)).norms(centered).flatten()


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _few(values: Tensor, most: int = 60) -> list[float]:
    """At most ``most`` values, first and last among them."""
    keep = torch.linspace(0, len(values) - 1, min(most, len(values))).round().long()
    return [float(v) for v in values[keep]]


MEASURE = Task("sphere.measure", 3, measure)


def _cells(plan: Plan, method: str, seed: int) -> list[Cell]:
    return [on_trained(plan, MEASURE, method, seed, cost=0.1)]


def _largest(what: str) -> Callable[[Sequence[Sequence[dict[str, Any]]]], list[float | None]]:
    """Return the largest deviation over layers that have one, for every seed; ``None`` if none."""

    def values(records: Sequence[Sequence[dict[str, Any]]]) -> list[float | None]:
        found = [[x[what] for x in own["layers"] if what in x] for (own,) in records]
        return [worst(some) if some else None for some in found]

    return values


def _identity(name: str, hypothesis: str, quantity: str, margin: float, what: str) -> Statement:
    return Statement(
        name=name,
        hypothesis=hypothesis,
        quantity=quantity,
        margin=margin,
        methods=lambda plan: plan.normalized,
        cells=_cells,
        values=_largest(what),
        kind="identity",
        basis="proved",
    )


def _details(plan: Plan, results: Results) -> Details:
    layers = {
        (method, seed): results[_cells(plan, method, seed)[0].key]["layers"]
        for method in plan.normalized
        for seed in plan.exact_seeds
    }
    rows, panels = [], []
    for method in plan.normalized:
        own = [layer for (key, _), found in layers.items() if key == method for layer in found]
        spectra = [layer["spectrum_error"] for layer in own if "spectrum_error" in layer]
        rows.append(
            (
                label(method),
                sum(layer["vectors"] for layer in own),
                worst([layer["radius_error"] for layer in own]),
                worst([layer["eps_shrink"] for layer in own]),
                worst([layer["eps_error"] for layer in own]),
                worst(spectra) if spectra else None,
            )
        )
        drawn = [x["curve"] for x in layers[method, plan.seeds[0]] if x.get("curve")]
        panels += [_spectrum_panel(method, curve) for curve in drawn[:1]]
    return Details(
        findings=[
            f"{sum(row[1] for row in rows):,} vectors were measured. At its real eps the most "
            f"affected one is {number(worst([row[3] for row in rows]), 3)} short of its sphere.",
        ],
        conditions=[
            "networks trained with a cosine schedule, measured in float64 with the learned gain "
            "and shift taken off",
            f"BatchNorm over {_IMAGES} images; Jacobians of vectors up to {_LARGEST} entries, "
            f"or of the shortest up to {_LARGEST_OF_ALL}",
            "spectral normalization with its power iteration run to convergence: during training "
            "it only follows the leading singular value",
        ],
        figures=[
            _length_figure(plan, layers),
            Figure(
                "sphere-spectrum",
                "Singular values of each normalization's Jacobian",
                "One vector of a trained network. Dashed: the closed form of the lemma (one value "
                "r/ℓ, the radial direction and the mean removed). Points: the singular values "
                "of autograd's Jacobian of the real module.",
                panels,
            ),
        ],
        tables=[
            Table(
                "Deviation from the lemma, largest over layers, vectors and seeds",
                (
                    "method",
                    "vectors",
                    "length, eps → 0",
                    "shortfall at real eps",
                    "error of predicted shortfall",
                    "spectrum",
                ),
                rows,
                "Lengths relative to the radius; the spectrum relative to its largest value.",
            )
        ],
    )


def _advice(outcomes: Outcomes) -> str:
    if all(outcome == Outcome.HOLDS for outcome in outcomes.values()):
        return (
            "Whatever length a vector has before a normalization, behind it only its direction is "
            "left: all that your normalized layers learn, they learn as directions."
        )
    return "Something here is not as the lemma says: do not build on it before you know why."


def _spectrum_panel(method: str, curve: dict[str, list[float]]) -> Panel:
    x = curve["position"]
    return Panel(
        label(method),
        "index",
        "singular value",
        [
            Series("measured", x, curve["measured"], style="points"),
            Series("predicted", x, curve["predicted"], dashed=True),
        ],
    )


def _length_figure(plan: Plan, layers: dict[tuple[str, int], list[dict[str, Any]]]) -> Figure:
    panels = []
    for method in plan.normalized:
        found = layers[method, plan.seeds[0]]
        series = [
            Series(
                f"layer {layer['layer']}",
                layer["raw_lengths"],
                layer["lengths"],
                style="points",
            )
            for layer in found
        ]
        panels.append(
            Panel(
                label(method),
                "length before / radius",
                "length after / radius",
                series,
                x_scale="log",
                references=[Reference("horizontal", 1.0, "the sphere")],
                y_limits=(0.0, 1.5),
            )
        )
    return Figure(
        "sphere-lengths",
        "Whatever length a vector arrives with, it leaves on the sphere",
        "Each point is one vector (activation or weight) of a trained network: its centred length "
        "before the normalization against its length behind it, over the radius.",
        panels,
    )


CLAIM = Claim(
    name="sphere",
    title="Normalization is a projection onto a sphere",
    statement="Most normalization methods can be read as normalizing pre-activations or weights "
    "onto a sphere (Sun et al. 2020, lemma and section on methods).",
    prediction="Let c be the vector x, centred where the method centres, and ℓ = √(|c|²+eps). N(x) "
    "has length r·|c|/ℓ, the radius r exactly at eps = 0. Its Jacobian has the singular value r/ℓ "
    "on the tangent space, 0 (at eps = 0) radially and 0 along the mean.",
    statements=(
        _identity(
            "lengths",
            "Every normalized vector lies on its sphere.",
            "largest deviation of a vector's length from the predicted radius, relative, in "
            "float64 at eps → 0",
            _RADIUS,
            "radius_error",
        ),
        _identity(
            "spectrum",
            "A normalization passes changes of direction on, all equally strongly, and removes "
            "changes of length.",
            "largest deviation of the Jacobian's singular values from the closed form, relative to "
            "the largest",
            _SPECTRUM,
            "spectrum_error",
        ),
        _identity(
            "eps",
            "What eps takes away from the sphere is what the lemma with eps says.",
            "largest deviation of the normalized vectors at their real eps from the lemma with "
            "eps, relative",
            _SHORTFALL,
            "eps_error",
        ),
    ),
    advice=_advice,
    details=_details,
)
