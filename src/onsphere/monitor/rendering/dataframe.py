"""A run as flat rows: one per sample and layer."""

from typing import TYPE_CHECKING

from onsphere.monitor.run import COUNTS, PREDICTIONS, QUANTITIES, STATISTICS, Run

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, float | int | str]


def rows(run: Run) -> list[Row]:
    """Return one row per sample and layer, in the order of the run.

    Args:
        run: a watched run.

    Returns:
        ``step``, ``layer``, ``lr``; each quantity's mean under its name and its quantiles as
        ``norm_q10`` and so on; the counts; the predictions as ``predicted_norm`` and so on.
    """
    found: list[Row] = []
    for sample in run.samples:
        for number, layer in enumerate(run.layers):
            row: Row = {"step": sample.step, "layer": layer, "lr": float(sample.lrs[number])}
            for quantity, values in zip(QUANTITIES, sample.values[number], strict=True):
                for statistic, value in zip(STATISTICS, values, strict=True):
                    name = quantity if statistic == "mean" else f"{quantity}_{statistic}"
                    row[name] = float(value)
            row |= {k: int(n) for k, n in zip(COUNTS, sample.counts[number], strict=True)}
            expected = zip(PREDICTIONS, sample.predicted[number], strict=True)
            row |= {f"predicted_{name}": float(value) for name, value in expected}
            found.append(row)
    return found


def frame(run: Run) -> "pd.DataFrame":
    """Return :func:`rows` as a DataFrame, indexed by step and layer.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pandas is not installed; it comes with: pip install "onsphere[frame]"'
        ) from error
    return pd.DataFrame(rows(run)).set_index(["step", "layer"])
