"""The rows of the table that are several projections, or none, with what they are instead."""

from onsphere.norms.row import Composite

_ROWS = (
    Composite(
        key="brn",
        name="batch renormalization",
        module="onsphere.norms.BatchRenorm",
        eps=1e-5,
        scale_unit="none",
        why="BatchNorm, then corrected towards the running statistics. Within the limits of the "
        "correction the output is that of the running statistics, so a filter's scale counts. "
        "The correction is constant to the gradient, which stays orthogonal to each filter all "
        "the same: norms grow as on a sphere. With r_max = 1 and d_max = 0 it is BatchNorm.",
        source="Ioffe 2017, arXiv 1702.03275",
    ),
    Composite(
        key="grn",
        name="global response normalization",
        module="onsphere.norms.GlobalResponseNorm",
        scale_unit="none",
        needs_space=True,
        why="The norms of channels are divided by their mean, and multiply the input: the output "
        "grows as the input does (degree 1), so there is no sphere.",
        source="Woo et al. 2023, ConvNeXt V2, arXiv 2301.00808",
    ),
    Composite(
        key="qk",
        name="QK-norm",
        module="onsphere.norms.QKNorm",
        eps=1e-6,
        scale_unit="group",
        scale_with_bias=True,
        why="Two projections, of queries and of keys, one vector per head: each head of each of "
        "the two maps has a sphere, weight and bias together.",
        source="Henry et al. 2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv 2302.05442",
    ),
    Composite(
        key="cos",
        name="cosine normalization",
        module="onsphere.norms.CosineLinear",
        eps=1e-12,
        scale_unit="filter",
        why="Two projections, of each row of the weight and of each input.",
        source="Luo et al. 2018, arXiv 1702.05870",
    ),
    Composite(
        key="switch",
        name="switchable normalization",
        module="onsphere.norms.SwitchableNorm",
        eps=1e-5,
        scale_unit="layer",
        scale_with_bias=True,
        shifts=("layer bias",),
        needs_space=True,
        why="Mean and variance are learned mixtures of those of InstanceNorm, LayerNorm and "
        "BatchNorm: the length of no one vector divides, and what all three forget is forgotten.",
        source="Luo et al. 2019, arXiv 1806.10779",
    ),
    Composite(
        key="evo",
        name="EvoNorm-S0",
        module="onsphere.norms.EvoNormS0",
        eps=1e-5,
        scale_unit="none",
        needs_space=True,
        why="A gate sigmoid(v x) beside the division: it sees the scale, so there is no sphere. "
        "The layer trades its scale with v.",
        source="Liu et al. 2020, arXiv 2004.02967",
    ),
    Composite(
        key="dora",
        name="direction of DoRA",
        module="onsphere.norms.dora",
        scale_unit="filter",
        why="Weight normalization of W + BA, each row of which has a sphere. What is trained has "
        "none: W is frozen, and A and B trade their scales.",
        source="Liu et al. 2024, arXiv 2402.09353",
    ),
    Composite(
        key="dyt",
        name="dynamic tanh",
        module="onsphere.norms.DynamicTanh",
        scale_unit="none",
        why="No statistics: tanh(alpha x) sees the scale, so there is no sphere. The layer trades "
        "its scale with alpha.",
        source="Zhu et al. 2025, arXiv 2503.10622",
    ),
    Composite(
        key="lrn",
        name="local response normalization",
        module="torch.nn.LocalResponseNorm",
        scale_unit="none",
        why="The constant k = 1 in (k + alpha mean x^2)^beta is no eps but as large as the rest, "
        "and beta = 3/4 is no root: no degree, so there is no sphere.",
        source="Krizhevsky et al. 2012, NeurIPS, ImageNet Classification; sec. 3.3",
    ),
    Composite(
        key="robust",
        name="RobustNorm",
        module="onsphere.norms.RobustNorm",
        eps=1e-5,
        scale_unit="none",
        shifts=("bias",),
        why="Centred, then divided by range^0.2: the output grows with the weight (degree 0.8), "
        "so there is no sphere. Only the shift is forgotten.",
        source="Awais et al. 2020, arXiv 2006.11007",
    ),
)

COMPOSITES: dict[str, Composite] = {row.key: row for row in _ROWS}
"""Methods that are several projections, or none, by key, in the order of the table."""
