"""What each operation does to what is added to its inputs.

A shift passes where sums do, is forgotten where something constant is taken away
(:mod:`~onsphere.symmetry.exact.shifts.centring`), and becomes another one (``W @ v``) behind a
product with weights (:mod:`~onsphere.symmetry.exact.shifts.products`). What is not listed must not
be moved: fewer symmetries, and never too many. To teach an operation, add it to the table at the
end, and a case to ``tests/symmetry/shifts``. Operations that only move entries need none: theirs
stand in :mod:`onsphere.symmetry.exact.rules.rearrangements`.
"""

from collections.abc import Sequence

from onsphere.symmetry.exact.operation import Operation
from onsphere.symmetry.exact.overloads import flat_tensors
from onsphere.symmetry.exact.rules.rearrangements import MOVES
from onsphere.symmetry.exact.rules.table import RULES, empty, makes
from onsphere.symmetry.exact.rules.taught import entry_of
from onsphere.symmetry.exact.shifts.centring import (
    attention,
    averages,
    batch_norm,
    centres,
    group_norm,
    layer_norm,
    pools,
    spreads,
)
from onsphere.symmetry.exact.shifts.choices import (
    concatenates,
    embedding,
    gather,
    index,
    index_select,
    masks,
    pads,
    stacks,
    where,
)
from onsphere.symmetry.exact.shifts.patterns import (
    adds,
    copies,
    fills,
    forbids,
    ignores,
    negates,
    passes,
)
from onsphere.symmetry.exact.shifts.products import (
    adds_product,
    convolution,
    divides,
    linear,
    matrix_product,
    multiplies,
)
from onsphere.symmetry.exact.shifts.tensor_shift import (
    TensorShift,
)
from onsphere.symmetry.exact.shifts.tracker import ShiftRule, ShiftTracker


def shifts_of(op: Operation, run: ShiftTracker) -> TensorShift | Sequence[TensorShift]:
    """Return what is added to the results of an operation."""
    rule, move = entry_of(SHIFT_RULES, op.name), MOVES.get(op.name)
    if rule is None and move is not None:
        first = flat_tensors(op.first)[0]
        shift = run.read(first)
        return [
            shift.moved(first.ndim, lambda a, i=i: move(op, a, i))  # type: ignore[misc]
            for i in range(len(flat_tensors(op.result)))
        ]
    return forbids(op, run) if rule is None else rule(op, run)


# --- the table ---------------------------------------------------------------------------------

SHIFT_RULES: dict[str, ShiftRule] = {}

_TABLE: list[tuple[ShiftRule, str]] = [
    (passes, """
        clone contiguous detach alias lift_fresh lift lift_fresh_copy positive expand expand_copy
        _to_copy to type_as
    """),
    (negates, "neg negative"),
    (adds, "add sub rsub"),
    (copies, "copy"),
    (fills, "fill"),
    (forbids, "view_as_real"),  # a real amount goes to one of two entries
    (multiplies, "mul multiply"),
    (divides, "div divide true_divide"),
    (adds_product, "addcmul"),
    (matrix_product("self", "mat2", ("ab", "bc", "ac")), "mm"),
    (matrix_product("self", "mat2", ("nab", "nbc", "nac")), "bmm"),
    (matrix_product("self", "vec", ("ab", "b", "a")), "mv"),
    (matrix_product("mat1", "mat2", ("ab", "bc", "ac")), "addmm"),
    (matrix_product("batch1", "batch2", ("nab", "nbc", "nac")), "baddbmm"),
    (matrix_product("mat", "vec", ("ab", "b", "a")), "addmv"),
    (linear, "linear mkldnn_linear"),
    (convolution, """
        convolution convolution_overrideable mkldnn_convolution _slow_conv2d_forward thnn_conv2d
        _conv_depthwise2d slow_conv3d_forward _convolution
    """),
    (embedding, "embedding"),
    (index_select, "index_select"),
    (index, "index"),
    (gather, "gather take_along_dim"),
    (centres, "_softmax _log_softmax _safe_softmax"),
    (layer_norm, "native_layer_norm"),
    (group_norm, "native_group_norm"),
    (batch_norm, """
        native_batch_norm _native_batch_norm_legit cudnn_batch_norm
        _native_batch_norm_legit_no_training _batch_norm_with_update
        _batch_norm_no_update miopen_batch_norm batch_norm
    """),
    (spreads, "var std var_mean std_mean"),
    (averages, "mean sum amax amin logsumexp"),
    (pools(1), "max_pool1d avg_pool1d adaptive_avg_pool1d upsample_linear1d upsample_nearest1d"),
    (pools(2), """
        max_pool2d max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d
        mkldnn_adaptive_avg_pool2d adaptive_max_pool2d upsample_bilinear2d upsample_nearest2d
        _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa reflection_pad2d
        _upsample_nearest_exact2d replication_pad2d
    """),
    (pools(3), """
        max_pool3d max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d upsample_trilinear3d
        upsample_nearest3d reflection_pad3d replication_pad3d adaptive_max_pool3d
    """),
    (pools(1), "reflection_pad1d replication_pad1d _upsample_nearest_exact1d"),
    (attention, """
        scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable
    """),
    (concatenates, "cat concat"),
    (stacks, "stack"),
    (pads, "constant_pad_nd"),
    (where, "where"),
    (masks, "masked_fill"),
]  # fmt: skip
for _rule, _names in _TABLE:
    for _name in _names.split():
        SHIFT_RULES[f"aten::{_name}"] = _rule
for _name, _of_units in RULES.items():  # zeros_like and the like, and what is overwritten
    if _of_units in (empty, makes) or _name in ("aten::full_like", "aten::new_full"):
        SHIFT_RULES.setdefault(_name, ignores)
