"""What an audit found, in one frozen object that prints, saves and feeds an optimizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from onsphere import geometry
from onsphere._utils.files import write_whole
from onsphere._utils.warning import warn
from onsphere.errors import choice
from onsphere.symmetry import gauge
from onsphere.symmetry.angular_updates import weight_reports
from onsphere.symmetry.claims import WeightReport
from onsphere.symmetry.embeddings import embeddings_and_heads
from onsphere.symmetry.gauge import FixedScales, Granularity
from onsphere.symmetry.rendering import advice, text
from onsphere.symmetry.rendering import json as audit_json
from onsphere.symmetry.result import AuditResult

if TYPE_CHECKING:
    import pandas as pd

Fix = Literal["maximal"]
"""Which weights are put on spheres beside those with a sphere of their own."""


@dataclass(frozen=True)
class Audit(AuditResult):
    """Which weights of a model live on spheres, and what else can change without effect.

    What was found is in the attributes of :class:`~onsphere.symmetry.result.AuditResult`; here is
    what one does with it.
    """

    def __str__(self) -> str:
        return text.rendered(self)

    def __repr__(self) -> str:
        return f"<Audit of {text.headline(self)}; print() shows all>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def advice(self) -> list[str]:
        """Say in plain words what to do with this model, a sentence or two each."""
        return advice.of_model(self)

    def advice_on(self, name: str) -> str:
        """Say in plain words what to do with one weight."""
        return advice.of_weight(self, name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return audit_json.plain(self)

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

        It holds no inputs, so ``canonicalize(model, audit, args)`` needs them, and
        ``on_sphere(optimizer, audit)`` does not know the model.

        Raises:
            ArchiveError: the file holds something else, or another version's audit.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, audit_json.ArchiveError) as error:
            raise audit_json.ArchiveError(f"{path} does not hold an audit: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Audit":
        """Undo :meth:`to_dict`.

        Raises:
            ArchiveError: the data is something else, or another version's audit.
        """
        fields = audit_json.fields_of(data)
        try:
            return cls(**fields)
        except TypeError as error:
            raise audit_json.ArchiveError(f"this is no audit: {error}") from error

    def fixed_scales(self, model: nn.Module, *, granularity: Granularity = "tensor") -> FixedScales:
        """Choose a largest set of weights whose norms can be held without losing a function.

        With ``granularity="tensor"`` it is the norm of each whole weight (spheres of their own stay
        as fine as they are), which fixes all symmetries of whole weights. With ``"vector"`` it is
        the norm of every row, column, head or pair of rows, as finely as loses nothing, which fixes
        those of each channel, too: queries against keys by pair of rows, ``up`` against ``down`` by
        hidden unit, a gain against what reads it by column.

        Embeddings and heads are held only where no other weight fixes a scale; so are vectors,
        before them. A weight that is 0 has no norm to hold, and carries no scale. Printed, it says
        how many scale symmetries that fixes and who carries the rest.

        Args:
            model: the audited model, or one with the same parameters.
            granularity: ``"tensor"`` or ``"vector"``.

        Raises:
            ValueError: the model lacks a parameter of this audit, or another ``granularity``.

        Example:
            >>> import onsphere as osp
            >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> audit = osp.audit(net, torch.ones(2, 3))
            >>> print(audit.fixed_scales(net))
            1 weight is held at its norm, which fixes 1 of 1 scale symmetries: 0.weight
            2 weights carry the scales: 0.bias, 2.weight
            >>> print(audit.fixed_scales(net, granularity="vector"))
            1 weight is held at the norms of its vectors, which fixes 8 of 8 scale symmetries
            - per row: 0.weight
            2 weights carry the scales: 0.bias, 2.weight
        """
        choice("granularity", granularity, get_args(Granularity))
        frozen = [n for n, p in self.parameters_of(model).items() if not p.requires_grad]
        owned = self.parameters_of(model)
        return gauge.fixed_scales(
            self,
            frozen=frozen,
            last=self._kept_off(model),
            never=[n for n, p in owned.items() if p.is_complex()],  # which optimizers refuse
            zeros=[n for n, p in owned.items() if not p.is_meta and not bool(p.detach().any())],
            granularity=granularity,
            has_zero_vector=lambda name, axes: _has_zero_vector(owned[name], axes),
        )

    def _kept_off(self, model: nn.Module) -> set[str]:
        """Return the embeddings and heads: those of the audited run, and what modules declare."""
        if self.embeddings_and_heads is None:  # an earlier version's file
            return embeddings_and_heads(model, self.inputs)
        return {*self.embeddings_and_heads, *embeddings_and_heads(model)}

    def spheres_of(
        self,
        model: nn.Module,
        *,
        embeddings: bool = False,
        fix: Fix | None = None,
        granularity: Granularity = "tensor",
    ) -> dict[nn.Parameter, geometry.Sphere]:
        """Return the parameters on spheres of their own, as an optimizer takes them.

        Args:
            model: the audited model, or one with the same parameters.
            embeddings: put embedding tables and the head on spheres too, where they are.
            fix: ``"maximal"``: the weights of :meth:`fixed_scales`, so that no scale symmetry is
                left.
            granularity: how finely ``fix`` holds norms: of whole weights (``"tensor"``), or of
                rows, columns and heads (``"vector"``).

        Returns:
            Parameter -> the product of spheres it lives on; radii are the present norms. Where
            there is none, a warning says what was found instead.

        Raises:
            ValueError: the model lacks a parameter of this audit, or an unknown ``fix``.
        """
        return self._spheres_of(model, embeddings=embeddings, fix=fix, granularity=granularity)

    def _spheres_of(
        self,
        model: nn.Module,
        *,
        embeddings: bool,
        fix: Fix | None = None,
        granularity: Granularity = "tensor",
    ) -> dict[nn.Parameter, geometry.Sphere]:
        owned = self.parameters_of(model)
        if fix is not None:
            choice("fix", fix, get_args(Fix))
        choice("granularity", granularity, get_args(Granularity))
        if granularity != "tensor" and fix is None:
            raise ValueError(
                f'granularity={granularity!r} says how finely fix="maximal" holds norms; give that '
                "as well (weights on spheres of their own are always divided as finely as they are)"
            )
        on_spheres = {n: s for n, s in self.own_spheres().items() if not owned[n].is_complex()}
        if fix:
            held = self.fixed_scales(model, granularity=granularity).held
            if not held:
                warn(advice.without_spheres(self))
            return {
                owned[n]: geometry.Sphere(
                    axes, invariant=n in on_spheres and on_spheres[n].axes == axes
                )
                for n, axes in held.items()
            }
        skipped = set() if embeddings or not on_spheres else self._kept_off(model)
        if on_spheres.keys() <= skipped:
            warn(advice.without_spheres(self, skipped))
        return {
            owned[n]: geometry.Sphere(s.axes) for n, s in on_spheres.items() if n not in skipped
        }

    def spheres_of_audited(self) -> dict[nn.Parameter, geometry.Sphere]:
        """Return :meth:`spheres_of` of the very model that was audited.

        Raises:
            ValueError: this audit does not hold it any more: it was read from a file, or the model
                is gone.
        """
        model = None if self.inputs is None else self.inputs.model()
        if model is None:
            raise ValueError(
                "this audit does not know its model any more (it was read from a file, or the "
                "model is gone); give audit.spheres_of(model)"
            )
        return self._spheres_of(model, embeddings=False)

    def param_groups(
        self,
        model: nn.Module,
        *,
        weight_decay: float | None = None,
        decay_vectors: bool = False,
        embeddings: bool = False,
        fix: Fix | None = None,
        granularity: Granularity = "tensor",
    ) -> list[dict[str, Any]]:
        """Return groups ready for an optimizer: spheres, the rest with and without decay.

        Args:
            model: the audited model, or one with the same parameters.
            weight_decay: decay of matrices that are not on spheres. Without, their groups do not
                name one, so that the optimizer's own holds.
            decay_vectors: decay vectors (gains, biases) as well; they get none otherwise.
                Weights on spheres never get any.
            embeddings: put embedding tables and the head on spheres too, where they are.
            fix: ``"maximal"``: put a largest set of weights on spheres whose norms can be held
                without losing a function (:meth:`fixed_scales`): of weights that trade scales, too.
            granularity: how finely ``fix`` holds norms: of whole weights (``"tensor"``), or of
                rows, columns and heads (``"vector"``).

        Returns:
            One group per kind of sphere with ``"sphere"`` set, then at most two without; every
            trainable parameter is in exactly one. Where no weight is on a sphere, a warning says
            what was found instead.

        Raises:
            ValueError: the model lacks a parameter of this audit.

        Example:
            >>> import onsphere as osp
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            >>> groups = osp.audit(net, torch.eye(3)).param_groups(net)
            >>> optimizer = osp.optim.SphereSGD(groups, lr=0.1, weight_decay=5e-4)
            >>> [(g["names"], g["weight_decay"]) for g in optimizer.param_groups][:2]
            [(['0.weight'], 0.0), (['2.weight'], 0.0005)]
        """
        spheres = self._spheres_of(model, embeddings=embeddings, fix=fix, granularity=granularity)
        groups: dict[Any, dict[str, Any]] = {}
        for name, p in self.parameters_of(model).items():
            if not p.requires_grad:
                continue
            sphere = spheres.get(p)
            decays = sphere is None and (decay_vectors or p.ndim > 1)
            invariant = sphere is not None and sphere.invariant
            decay = weight_decay if decays else 0.0
            group = groups.setdefault(
                (sphere, decays, invariant),
                {"params": [], "names": [], "sphere": sphere} | _option(decay),
            )
            group["params"].append(p)
            group["names"].append(name)
        return [groups[key] for key in sorted(groups, key=lambda k: (k[0] is None, not k[1]))]

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


def _has_zero_vector(p: nn.Parameter, axes: geometry.VectorAxes) -> bool:
    if p.is_meta:
        return False
    held = p.detach()
    whole = held.full_tensor() if hasattr(held, "full_tensor") else held  # sharded ones
    return not bool(axes.norms(whole).all())


def _option(decay: float | None) -> dict[str, float]:
    """Return the weight decay of a group; nothing where the optimizer's own shall hold."""
    return {} if decay is None else {"weight_decay": decay}
