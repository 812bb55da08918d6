"""From families of parts to calls of the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from onsphere.geometry import Sphere
from onsphere.optim.kernels import ops
from onsphere.optim.kernels.cpu.loader import allowed, library
from onsphere.optim.kernels.layout import layout_of
from onsphere.optim.kernels.triton import launch
from onsphere.optim.updates.geodesic import Plan, StepOptions, limits_of
from onsphere.optim.updates.per_coordinate import PerCoordinateUpdate
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.torch_optim import BaseStep
from onsphere.optim.updates.types import Family, Part

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_LR_MODE = {"rate": 0, "angle": 1, "relative": 2, "hard": 3, "rotate": 4}
_LINEAR, _DIAGONAL, _RESTORE = range(3)


def takes(parts: Sequence[Part], sphere: Sphere) -> bool:
    """Whether the kernels know the device, dtype and memory layout of a family."""
    if sphere.centered:
        return False
    dtype = parts[0].point.dtype
    return all(
        known(part.point, sphere, dtype)
        and all(x is None or x.dtype == dtype for x in (part.slope, part.momentum, part.moment))
        and all(x is None or _like(x, part.point) for x in (part.momentum, part.moment))
        for part in parts
    )


def known(point: Tensor, sphere: Sphere, dtype: torch.dtype) -> bool:
    """Whether there are kernels for one tensor's device, dtype and memory layout."""
    device = point.device
    if device.type == "cpu" and not launch.interpreted:
        if library() is None:
            return False
    elif not (allowed() and launch.present(device)):
        return False
    if type(point) not in (Tensor, torch.nn.Parameter):
        return False
    if point.dtype != dtype or dtype not in _DTYPES or point.is_neg():
        return False
    layout = layout_of(tuple(point.shape), point.stride(), sphere.axes)
    if layout is None:
        return False
    return launch.takes(layout) or (device.type == "cpu" and not launch.interpreted)


def step(families: Sequence[Family], sphere: Sphere, options: StepOptions) -> list[int] | Tensor:
    """Move families of one part each; return how many vectors of each stayed where they were.

    These counts are numbers on the CPU, and a tensor that nobody waits for on other devices.
    """
    parts = [family.parts[0] for family in families]
    seconds = [family.moment for family in families if family.moment is not None]
    radii = [family.radius for family in families]
    points, slopes, momenta, moments = _columns(parts)
    references = [family.reference for family in families]
    arguments, settings = (
        _arguments(parts, options, references),
        _settings(parts, options),
    )
    layouts = layouts_of(points, sphere)
    _check_numbers([*radii, *seconds], layouts)
    return _listed(
        _step()(points, slopes, momenta, moments, radii, seconds, layouts, arguments, settings)
    )


def _check_numbers(numbers: Sequence[Tensor], layouts: Sequence[int]) -> None:
    """Raise unless there is one float32 per vector: the kernels read memory and ask nothing."""
    vectors = [layouts[i] * layouts[i + 2] for i in range(0, len(layouts), 4)]
    for number, x in enumerate(numbers):
        wanted = vectors[number % len(vectors)]
        if x.dtype != torch.float32 or x.numel() != wanted or not x.is_contiguous():
            raise RuntimeError(
                f"what vectors own must be {wanted} contiguous numbers in float32, got "
                f"{x.numel()} in {x.dtype}; do not change an optimizer's state or its spheres by "
                "hand: load_state_dict converts a state, add_param_group takes other spheres"
            )


def _listed(counts: Tensor) -> list[int] | Tensor:
    return counts.tolist() if counts.device.type == "cpu" else counts


def _step() -> Callable[..., Tensor]:
    return ops.step if torch.compiler.is_compiling() else ops.step_eagerly


def reduce(parts: Sequence[Part], sphere: Sphere, options: StepOptions) -> list[Tensor]:
    """Return the sums over each vector of every part."""
    columns, layouts = _columns(parts), layouts_of([p.point for p in parts], sphere)
    numbers = ops.reduce(
        *columns,
        layouts,
        _arguments(parts, options),
        _settings(parts, options),
    )
    if isinstance(parts[0].update, PerCoordinateUpdate):
        return [pad(n[:, :5], (0, 1)) for n in numbers]  # the kernels know no centred spheres
    if options.ascend:  # the plan expects the slope that it descends
        for n in numbers:
            n[:, 1].neg_()
            n[:, 4].neg_()
    return numbers


def apply(parts: Sequence[Part], sphere: Sphere, options: StepOptions, plan: Plan) -> None:
    """Follow a plan for all parts of one family."""
    width = ops.COEFFICIENTS - plan.coefficients.shape[1]
    coefficients = pad(plan.coefficients, (0, width)).clone()
    if options.ascend and not isinstance(parts[0].update, PerCoordinateUpdate):
        coefficients[:, 1].neg_()
        coefficients[:, 4].neg_()
    coefficients[:, 0] = torch.where(plan.sound, coefficients[:, 0], torch.nan)
    columns, layouts = _columns(parts), layouts_of([p.point for p in parts], sphere)
    arguments, settings = (
        _arguments(parts, options),
        _settings(parts, options),
    )
    ops.apply(*columns, [coefficients] * len(parts), layouts, arguments, settings)


def restore(
    points: Sequence[Tensor],
    radii: Sequence[Tensor],
    sphere: Sphere,
    *,
    brake: bool,
    growth: float,
) -> list[int] | Tensor:
    """Scale vectors to their radii, or no further than the brake lets them grow; count as step."""
    settings = restore_settings(points[0].dtype, sphere, brake=brake, growth=growth)
    layouts = layouts_of(points, sphere)
    _check_numbers(radii, layouts)
    arguments = [0.0] * (8 * len(points))
    return _listed(_step()(points, [], [], [], radii, [], layouts, arguments, settings))


def restore_settings(
    dtype: torch.dtype, sphere: Sphere, *, brake: bool, growth: float
) -> list[float]:
    """Return the numbers that all tensors of a restoration share."""
    settings = [0, 0, growth, limits_of(dtype).close, 0, _RESTORE, _DTYPES[dtype]]
    return [*settings, 0, 0, int(brake), int(sphere.centered), 0]


def finite(tensors: Sequence[Tensor]) -> bool | None:
    """Whether all squares of all entries are finite, or ``None`` when the kernels cannot tell."""
    dtype, whole = tensors[0].dtype, Sphere()
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None  # torch has one launch for that, and the answer waits for the device anyway
    if not all(known(tensor, whole, dtype) for tensor in tensors):
        return None
    settings = restore_settings(dtype, whole, brake=False, growth=0.0)
    layouts, arguments = layouts_of(tensors, whole), [0.0] * (8 * len(tensors))
    numbers = ops.reduce(tensors, [], [], [], layouts, arguments, settings)
    return bool(torch.cat(numbers)[:, 0].isfinite().all())


def _columns(
    parts: Sequence[Part],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    slopes = [
        p.slope if _like(p.slope, p.point) else torch.empty_like(p.point).copy_(p.slope)
        for p in parts
    ]
    momenta = [part.momentum for part in parts if part.momentum is not None]
    moments = [part.moment for part in parts if part.moment is not None]
    return [part.point for part in parts], slopes, momenta, moments


def _like(x: Tensor, point: Tensor) -> bool:
    return x.stride() == point.stride() and not x.is_neg()  # memory holds the negative of those


def layouts_of(points: Sequence[Tensor], sphere: Sphere) -> list[int]:
    """Return four integers per tensor: where its vectors lie in memory."""
    found: list[int] = []
    for point in points:
        layout = layout_of(tuple(point.shape), point.stride(), sphere.axes)
        assert layout is not None
        found += layout
    return found


def _arguments(
    parts: Sequence[Part], options: StepOptions, references: Sequence[float] = ()
) -> list[float]:
    """Return eight numbers per part: seven of its update, and the reference of its length."""
    numbers: list[float] = []
    for part, reference in zip(parts, references or [1.0] * len(parts), strict=True):
        numbers += *arguments_of(part.update, options), reference
    return numbers


def arguments_of(
    update: PerVectorUpdate | PerCoordinateUpdate, options: StepOptions | BaseStep
) -> tuple[float, ...]:
    """Return the seven numbers of an update."""
    mine = update.arguments
    if options.ascend and isinstance(update, PerCoordinateUpdate):
        return (mine[0], -mine[1], *mine[2:])
    return mine


def _settings(parts: Sequence[Part], options: StepOptions) -> list[float]:
    return settings_of(parts[0].update, parts[0].point.dtype, options)


def settings_of(
    update: PerVectorUpdate | PerCoordinateUpdate,
    dtype: torch.dtype,
    options: StepOptions | BaseStep,
) -> list[float]:
    """Return the numbers that all tensors of a call share."""
    kind = _DIAGONAL if isinstance(update, PerCoordinateUpdate) else _LINEAR
    limits = limits_of(dtype)
    if isinstance(options, BaseStep):
        way = _LR_MODE[options.mode]
        numbers = [options.lr, 0.0, options.decay, limits.close, limits.floor]
        return [*numbers, kind, _DTYPES[dtype], way, 0, 0, 0, options.ascend]
    return [
        *(float(options.lr), options.radius or 0.0, 0.0, limits.close, limits.floor),
        *(kind, _DTYPES[dtype], _LR_MODE[options.lr_mode], options.retraction == "exponential"),
        *(0, 0, options.ascend),
    ]
