"""What an audit found, in one frozen object that prints, saves and feeds an optimizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onsphere import geometry
from onsphere._utils.files import write_whole
from onsphere.symmetry.angular_updates import weight_reports
from onsphere.symmetry.claims import WeightReport
from onsphere.symmetry.embeddings import embeddings_and_heads
from onsphere.symmetry.rendering import advice, serialize, text
from onsphere.symmetry.result import AuditResult

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Audit(AuditResult):
    """Which weights of a model live on spheres, and what else can change without effect.

    What was found is in the attributes of :class:`~onsphere.symmetry.result.AuditResult`; here is
    what one does with it.
    """

    def __str__(self) -> str:
        return text.rendered(self)

    def advice(self) -> list[str]:
        """Say in plain words what to do with this model, a sentence or two each."""
        return advice.of_model(self)

    def advice_on(self, name: str) -> str:
        """Say in plain words what to do with one weight."""
        return advice.of_weight(self, name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return serialize.plain(self)

    def to_json(self, path: str | Path) -> Path:
        """Write the audit to a file that :meth:`from_json` reads back; return the path.

        The file is written whole or not at all.
        """
        text = json.dumps(self.to_dict(), indent=1)
        write_whole(Path(path), (text + "\n").encode())
        return Path(path)

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
