"""A claim: what the paper says, the statements it is made of, and how they are shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onsphere.report.document import Figure, Outcome, Section, Table
from onsphere.studies.claims.plan import Plan, Results
from onsphere.studies.claims.statement import Decisions, Statement, open_of, shown
from onsphere.studies.engine.job import Cell

Outcomes = Mapping[str, Outcome]
"""What came out, by the name of the statement."""


@dataclass(frozen=True)
class Details:
    """What a claim shows beside its statements: numbers, pictures, and how they were made."""

    findings: Sequence[str] = ()
    conditions: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Args:
        name: on the command line.
        title: a few words.
        statement: the claim as a sentence, with its source.
        prediction: what theory says should be measured.
        statements: what is decided.
        advice: says in one plain sentence what the outcomes mean for somebody's training.
        details: turns records into pictures and tables.
        drawn: cells that these need and no statement does.
        own_spheres: it speaks of weights that each live on spheres of their own, and makes no
            sense in a network without.
    """

    name: str
    title: str
    statement: str
    prediction: str
    statements: tuple[Statement, ...]
    advice: Callable[[Outcomes], str]
    details: Callable[[Plan, Results], Details]
    drawn: Callable[[Plan], list[Cell]] = lambda _: []
    own_spheres: bool = False

    def cells(self, plan: Plan, decisions: Decisions | None = None, look: int = 0) -> list[Cell]:
        """Return what a look needs: the seeds of every comparison that is open, each cell once.

        Args:
            plan: how large.
            decisions: those of earlier looks.
            look: which look, counted from 0.
        """
        cells = [
            cell
            for one, method in open_of(self.statements, plan, decisions or {})
            for seed in one.seeds(plan, look)
            for cell in one.cells(plan, method, seed)
        ]
        return list({cell.key: cell for cell in [*cells, *self.drawn(plan)]}.values())

    def section(self, plan: Plan, results: Results, decisions: Decisions, command: str) -> Section:
        """Return the claim's section of the report, from records alone."""
        statements = [shown(one, plan, decisions) for one in self.statements if one.methods(plan)]
        details = self.details(plan, results)
        return Section(
            name=self.name,
            title=self.title,
            statement=self.statement,
            prediction=self.prediction,
            statements=statements,
            advice=self.advice({one.name: one.outcome for one in statements}),
            findings=details.findings,
            conditions=details.conditions,
            figures=details.figures,
            tables=details.tables,
            command=command,
        )
