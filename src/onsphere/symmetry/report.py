"""What an audit found, in one frozen object that prints, saves and feeds an optimizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onsphere import geometry
from onsphere._torch.execution import OutputPicker, bare_name
from onsphere._torch.materialize import unwrapped
from onsphere._utils.files import write_whole
from onsphere.symmetry.angular_updates import weight_reports
from onsphere.symmetry.embeddings import embeddings_and_heads
from onsphere.symmetry.exact.trace import UnknownOp
from onsphere.symmetry.rendering import advice, serialize, text
from onsphere.symmetry.result import Kind, Leak, Limit, Rescaling, Sphere, WeightReport
from onsphere.symmetry.search.partial import Part
from onsphere.symmetry.search.shift import Shift
from onsphere.symmetry.weight_decay import shrinkable

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Inputs:
    """What a model was run on.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors to keep fixed.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: OutputPicker | None


@dataclass(frozen=True)
class Audit:
    """Which weights of a model live on spheres, and what else can change without effect.

    Args:
        model: name of the model's class.
        mode: ``"train"`` or ``"eval"``: the mode it was audited in.
        parameters: every parameter's name and shape, in the order of the model.
        spheres: weights, or sets of weights, whose scale does nothing, inert ones left out.
        rescalings: weights whose scales trade off against each other.
        shifts: directions in which a weight can move.
        inert: parameters that cannot affect the output.
        leaks: how far the real eps breaks each symmetry.
        scale_symmetries: a basis of all scale symmetries: name -> exponent.
        exact_symmetries: a basis of those that the real eps does not break either.
        followers: buffers that only estimate (running statistics in training mode), and how they
            should move along; one entry per scale symmetry.
        unknown_ops: operations that the analysis did not understand and never claims through.
        parts: intervals of weights that are on spheres, or inert, while the whole weight is not.
        unreached: parameters that this input did not reach (an expert nobody asked); no claim.
        certified: whether the claims were tested on numbers; not so for a model without memory.
        complete: whether the numeric search for further symmetries ran to its end.
        limits: what could not be seen or shown, where something could not.
        conditions: what was assumed of the inputs, in words: which others were tried, and what
            holds for those given only.
        note: how the model was built, where a reader must know (without memory, two layers of it).
        inputs: what the model was run on; not written to a file.
    """

    model: str
    mode: str
    parameters: Mapping[str, tuple[int, ...]]
    spheres: list[Sphere]
    rescalings: list[Rescaling]
    shifts: list[Shift]
    inert: list[str]
    leaks: list[Leak]
    scale_symmetries: list[dict[str, Fraction]]
    exact_symmetries: list[dict[str, Fraction]]
    followers: list[dict[str, Fraction]]
    unknown_ops: list[UnknownOp]
    unreached: list[str]
    certified: bool
    complete: bool
    parts: list[Part] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    conditions: list[str] = field(default_factory=list)
    note: str = ""
    inputs: Inputs | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return text.rendered(self)

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """What is free about the scale of each parameter."""
        alone = self.own_spheres()
        free = shrinkable(self.scale_symmetries, self.parameters)
        traded = {n for v in self.scale_symmetries for n in v}

        def kind(name: str) -> Kind:
            if name in self.inert:
                return Kind.INERT
            if name in self.unreached:
                return Kind.UNREACHED
            if name in alone:
                return Kind.SPHERE
            return Kind.SHARED if name in free else Kind.TRADED if name in traded else Kind.FIXED

        return {n: kind(n) for n in self.parameters}

    def decay_of(self, name: str) -> str:
        """Say what weight decay does to a weight: a rate schedule, a real penalty, or nothing."""
        return advice.DECAY[self.kinds[name]]

    def advice(self) -> list[str]:
        """Say in plain words what to do with this model, a sentence or two each."""
        return advice.of_model(self)

    def advice_on(self, name: str) -> str:
        """Say in plain words what to do with one weight."""
        return advice.of_weight(self, name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return serialize.plain(self)

    def to_json(self, path: str | Path) -> None:
        """Write the audit to a file that :meth:`from_json` reads back; whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1)
        write_whole(Path(path), (text + "\n").encode())

    def to_html(self, path: str | Path) -> Path:
        """Write the audit as one page that needs no network and no script.

        Args:
            path: where; an older file is replaced.

        Returns:
            The path.

        Raises:
            ModuleNotFoundError: the extra ``onsphere[study]`` is not installed.
        """
        from onsphere.report import html
        from onsphere.symmetry.rendering.html import document

        return html.write(document(self), path)

    def to_frame(
        self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> "pd.DataFrame":
        """Return one row per parameter as a pandas DataFrame.

        Args:
            model: the audited model, for the norms.
            optimizer: with gradients in ``model``, for effective rates and angular updates.

        Returns:
            Indexed by name, in the order of the model.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            ValueError: the model lacks a parameter of this audit.
        """
        from onsphere.symmetry.rendering.dataframe import frame

        return frame(self, model, optimizer)

    @classmethod
    def from_json(cls, path: str | Path) -> "Audit":
        """Read an audit that :meth:`to_json` wrote.

        Raises:
            ArchiveError: the file holds something else, or another version's audit.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, serialize.ArchiveError) as error:
            raise serialize.ArchiveError(f"{path} does not hold an audit: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Audit":
        """Undo :meth:`to_dict`.

        Raises:
            ArchiveError: the data is something else, or another version's audit.
        """
        fields = serialize.fields_of(data)
        try:
            return cls(**fields)
        except TypeError as error:
            raise serialize.ArchiveError(f"this is no audit: {error}") from error

    def own_spheres(self) -> dict[str, Sphere]:
        """Return the weights that live on a sphere without any other parameter."""
        return {
            s.names[0]: s
            for s in self.spheres
            if len(s.names) == 1 and s.names[0] in self.parameters
        }

    def spheres_of(
        self, model: nn.Module, *, embeddings: bool = False
    ) -> dict[nn.Parameter, geometry.Sphere]:
        """Return the parameters on spheres of their own, as an optimizer takes them.

        Args:
            model: the audited model, or one with the same parameters.
            embeddings: put embedding tables and the head on spheres too, where they are.

        Returns:
            Parameter -> the product of spheres it lives on; radii are the present norms.

        Raises:
            ValueError: the model lacks a parameter of this audit.
        """
        owned = self.parameters_of(model)
        on_spheres = self.own_spheres()
        skipped = (
            set() if embeddings or not on_spheres else embeddings_and_heads(model, self.inputs)
        )
        return {
            owned[n]: geometry.Sphere(s.axes) for n, s in on_spheres.items() if n not in skipped
        }

    def param_groups(
        self, model: nn.Module, *, weight_decay: float = 0.0, embeddings: bool = False
    ) -> list[dict[str, Any]]:
        """Return groups ready for an optimizer: spheres, the rest with and without decay.

        Args:
            model: the audited model, or one with the same parameters.
            weight_decay: decay of matrices that are not on spheres; vectors (gains, biases) and
                weights on spheres get none.
            embeddings: put embedding tables and the head on spheres too, where they are.

        Returns:
            One group per kind of sphere with ``"sphere"`` set, then at most two without; every
            trainable parameter is in exactly one.

        Raises:
            ValueError: the model lacks a parameter of this audit.
        """
        spheres = self.spheres_of(model, embeddings=embeddings)
        groups: dict[Any, dict[str, Any]] = {}
        for name, p in self.parameters_of(model).items():
            if not p.requires_grad:
                continue
            sphere = spheres.get(p)
            decay = weight_decay if sphere is None and p.ndim > 1 else 0.0
            group = groups.setdefault(
                (sphere, decay),
                {"params": [], "names": [], "sphere": sphere, "weight_decay": decay},
            )
            group["params"].append(p)
            group["names"].append(name)
        return sorted(groups.values(), key=lambda g: (g["sphere"] is None, -g["weight_decay"]))

    def weight_reports(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> list[WeightReport]:
        """Say for each weight how large it is, how fast it turns and what weight decay does.

        The angular update is that of the optimizer's next step, rehearsed on copies of the
        weights and of the optimizer's state: its momentum, decay and all. Nothing is changed.

        Args:
            model: the audited model; its ``.grad`` are read where they are.
            optimizer: the one that trains it.

        Returns:
            One report per parameter.

        Raises:
            ValueError: the model lacks a parameter of this audit.
        """
        return weight_reports(self, model, optimizer)

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of a model by the names they have in this audit.

        Raises:
            ValueError: the model lacks one.
        """
        found = {bare_name(n): p for n, p in unwrapped(model).named_parameters()}
        missing = [n for n in self.parameters if n not in found]
        if missing:
            raise ValueError(
                f"the model has no parameter {missing[0]!r} ({len(missing)} of "
                f"{len(self.parameters)} are missing); audit this model again"
            )
        return found
