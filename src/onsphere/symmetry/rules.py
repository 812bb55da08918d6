"""One rule per operation: how the units of its inputs give the unit of its result.

The table at the end is the whole knowledge of dimensional analysis. Most operations follow one of
five patterns; the others have a function of their own in :mod:`onsphere.symmetry.normalizing` or
here. To teach a new operation, add one entry (or call :func:`register_rule`) and one test case.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from onsphere.symmetry import normalizing
from onsphere.symmetry.operation import (
    LARGEST_EPS,
    Operation,
    Rule,
    flat_tensors,
    is_free_number,
)
from onsphere.symmetry.units import ANY, ZERO, Unit

HALF = Fraction(1, 2)


# --- the five patterns -------------------------------------------------------------------------


def passes(op: Operation) -> Unit:
    """Keep the unit of the first argument: rearranging, averaging, selecting, ReLU."""
    return op.unit(next(iter(flat_tensors(op.first)), None), keep_eps=True)


def reduces(op: Operation) -> Unit:
    """Keep the unit of the first argument, but mix entries: 0-or-1 becomes something between."""
    unit = passes(op)
    return Unit(unit.terms, unit.free, eps=unit.eps)


def multiplies(op: Operation) -> Unit:
    """Add the units of all tensors: products of any kind."""
    total = ZERO
    for tensor in op.tensors():
        total = total + op.unit(tensor)
    return total


def equates(op: Operation) -> Unit:
    """Demand equal units of all tensors and numbers: sums, concatenations, choices."""
    return op.equal(*op.tensors(), *_numbers(op))


def pins(op: Operation) -> Unit:
    """Demand unit 0 of all tensors: functions that know a scale, such as exp."""
    return op.dimensionless(*op.tensors())


def ignores(_: Operation) -> Unit:
    """Give unit 0 whatever comes in: signs, indices, shapes, random numbers."""
    return ZERO


def empty(_: Operation) -> Unit:
    """Give any unit: zeros, and memory about to be filled."""
    return ANY


# --- operations with a rule of their own -------------------------------------------------------


def add(op: Operation) -> Unit:
    """Add with equal units; a small constant may turn out to be an eps."""
    self, other = op["self"], op["other"]
    if op.small(other) and isinstance(self, Tensor):
        return op.with_eps(op.unit(self), other)
    if op.small(self) and isinstance(other, Tensor):
        return op.with_eps(op.unit(other), self)
    common = op.equal(self, other)
    if op.name in ("aten::sub", "aten::rsub") and not isinstance(other, Tensor):
        unit = op.unit(self)
        return Unit(unit.terms, unit.free, unit.binary and other == 1)
    return common


def hypot(op: Operation) -> Unit:
    """Join the legs of a right triangle; the square of a small constant one may be an eps."""
    self, other = op["self"], op["other"]
    eps = op.small(other, LARGEST_EPS**0.5)
    return op.with_eps(op.unit(self), other) if eps else op.equal(self, other)


def mul(op: Operation) -> Unit:
    """Multiply; 0-or-1 times an infinity holds only 0 and infinities."""
    left, right = op.unit(op["self"]), op.unit(op["other"])
    if left.guard and right.guard:
        return both(op)
    if isinstance(op["self"], Tensor) and isinstance(op["other"], int | float):
        vanishes = op["other"] == 0 or left.free or (right.free and left.binary)
        return ANY if vanishes else Unit(left.terms)
    return left + right


def div(op: Operation) -> Unit:
    """Divide; an eps in the denominator is one. Rounded quotients need equal units."""
    top, bottom = op["self"], op["other"]
    if op["rounding_mode"] is not None or op.name == "aten::floor_divide":
        op.equal(top, bottom)
        return ZERO
    below = op.unit(bottom, keep_eps=True)
    return op.unit(top) - (ZERO if below.free else below)


def power(op: Operation) -> Unit:
    """Multiply the unit by a constant exponent; a root or an inverse may hold an eps."""
    exponent = op["exponent"]
    if not isinstance(exponent, int | float) or not isinstance(op["self"], Tensor):
        return op.dimensionless(*op.tensors())
    if exponent == 0:
        return ZERO
    rational = Fraction(exponent).limit_denominator(1000)
    if abs(float(rational) - exponent) > 1e-12:
        return op.dimensionless(*op.tensors())
    return op.unit(op["self"], keep_eps=exponent < 1) * rational


def root(exponent: Fraction | int) -> Rule:
    """Return the rule of a fixed power."""

    def rule(op: Operation) -> Unit:
        return op.unit(op["self"], keep_eps=exponent < 1) * exponent

    return rule


def clamp(op: Operation) -> Unit:
    """Clamp at 0 or at nothing: keeps the unit. At a small number: maybe an eps. Else equal."""
    low, high = op["min"], op["max"]
    if high is None and op.small(low):
        return op.with_eps(op.unit(op["self"]), low)
    return op.equal(op["self"], low, high)


def where(op: Operation) -> Unit:
    """Choose between two values of equal units; a guard that never acts chooses only one."""
    if op["self"] is None:
        return ZERO
    chosen = op.settled(op["condition"])
    if chosen is not None:
        return op.unit(op["self"] if chosen else op["other"])
    return op.equal(op["self"], op["other"])


def fill(op: Operation) -> Unit:
    """Write a constant over part of a tensor; a guard that never acts writes nothing."""
    if op.settled(op["mask"]) is False:
        return op.unit(op["self"])
    return op.equal(op["self"], op["value"])


def full(op: Operation) -> Unit:
    """Make a constant."""
    return op.unit(op["fill_value"] if op.has("fill_value") else op["value"])


def pad(op: Operation) -> Unit:
    """Pad with a constant: 0 fits any unit."""
    return op.equal(op["self"], op["value"])


def cast(op: Operation) -> Unit:
    """Change dtype or device; booleans become numbers 0 and 1."""
    self: Tensor = op["self"]
    if self.dtype == torch.bool:
        return Unit(binary=True)
    if not (op.result.is_floating_point() or op.result.is_complex()):
        return op.dimensionless(self)
    return op.unit(self, keep_eps=True)


def copy(op: Operation) -> Unit:
    """Copy: the unit of the source."""
    return op.unit(op["src"], keep_eps=True)


def bias_product(*factors: str) -> Rule:
    """Return the rule of ``self + product of factors``, as in addmm."""

    def rule(op: Operation) -> Unit:
        product = ZERO
        for name in factors:
            product = product + op.unit(op[name])
        return product if op["beta"] == 0 else op.equal(op["self"], product)

    return rule


def addcdiv(op: Operation) -> Unit:
    """Add a quotient."""
    return op.equal(op["self"], op.unit(op["tensor1"]) - op.unit(op["tensor2"], keep_eps=True))


def convolution(op: Operation) -> Unit:
    """Multiply input and weight, add the bias."""
    product = op.unit(op["input"] if op.has("input") else op["self"]) + op.unit(op["weight"])
    return product if op["bias"] is None else op.equal(product, op["bias"])


def attention(op: Operation) -> tuple[Unit, ...]:
    """Softmax attention: scores have unit 0, the result has the values' unit."""
    op.dimensionless(op.unit(op["query"]) + op.unit(op["key"]))
    for name in ("attn_mask", "attn_bias"):
        if isinstance(op[name], Tensor):
            op.dimensionless(op[name])
    values = op.unit(op["value"])
    return (values, *(ZERO for _ in range(15)))


def product_reduce(op: Operation) -> Unit:
    """Multiply entries together: the unit times their number."""
    self: Tensor = op["self"]
    count = self.shape[op["dim"]] if op["dim"] is not None else self.numel()
    return op.unit(self) * int(count)


def first_of(rule: Rule) -> Rule:
    """Return a rule whose first result follows ``rule`` and whose others are indices or counts."""

    def several(op: Operation) -> tuple[Unit, ...]:
        unit = rule(op)
        return (unit if isinstance(unit, Unit) else unit[0], *(ZERO for _ in range(7)))

    return several


def compare(op: Operation) -> Unit:
    """Compare values of equal units: true or false. With 0 or infinity it makes a guard."""
    self, other = op["self"], op["other"]
    op.equal(self, other)
    return Unit(guard=self is other or (not isinstance(other, Tensor) and is_free_number(other)))


def both(op: Operation) -> Unit:
    """Join conditions; two guards make one."""
    masks = flat_tensors([op["self"], op["other"]])
    return Unit(guard=all(op.ledger.read(m).guard for m in masks))


def item(op: Operation) -> Unit:
    """Turn a tensor into a Python number, which carries no unit: it must be 0."""
    return op.dimensionless(op["self"]) if op["self"].is_floating_point() else ZERO


def leaky(op: Operation) -> Unit:
    """Scale negative entries by a weight of unit 0."""
    op.dimensionless(op["weight"])
    return op.unit(op["self"])


def hardtanh(op: Operation) -> Unit:
    """Clamp between two numbers."""
    return op.equal(op["self"], op["min_val"], op["max_val"])


def threshold(op: Operation) -> Unit:
    """Replace what lies below a number."""
    return op.equal(op["self"], op["threshold"], op["value"])


def vector_norm(op: Operation) -> Unit:
    """Take a norm: the unit itself, except for the count of non-zeros."""
    order = op["ord"] if op.has("ord") else op["p"]
    if order == 0:
        return ZERO
    return op.unit(op["self"], keep_eps=False)


def lerp(op: Operation) -> Unit:
    """Mix two values of equal units with a weight of unit 0."""
    op.dimensionless(op["weight"])
    return op.equal(op["self"], op["end"])


def polar(op: Operation) -> Unit:
    """Join a length with an angle."""
    op.dimensionless(op["angle"])
    return op.unit(op["abs"])


def index_add(op: Operation) -> Unit:
    """Write or add a source into part of a tensor."""
    if op["reduce"] in ("multiply", "prod"):
        return op.dimensionless(*op.tensors())
    for name in ("source", "src", "values", "value"):
        if op.has(name):
            return op.equal(op["self"], op[name])
    return op.equal(op["self"])


def squared_difference(op: Operation) -> Unit:
    """Compare prediction and target by their squared difference."""
    return op.equal(op["self"], op["target"]) * 2


def linear_solve(op: Operation) -> tuple[Unit, ...]:
    """Solve ``A X = B``."""
    below = op.unit(op["A"])
    return (op.unit(op["B"]) - below, below, ZERO, ZERO)


def svd(op: Operation) -> tuple[Unit, ...]:
    """Split into rotations and singular values."""
    return (ZERO, op.unit(op["A"]), ZERO)


def inverse(op: Operation) -> tuple[Unit, ...]:
    """Invert a matrix."""
    return (op.unit(op["A"]) * -1, ZERO)


def _numbers(op: Operation) -> list[Any]:
    return [op[n] for n in ("other", "value") if op.has(n) and isinstance(op[n], int | float)]


# --- the table ---------------------------------------------------------------------------------

RULES: dict[str, Rule] = {}


def register_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of an operation, given by its qualified name without overload.

    Args:
        names: for example ``"mylib::my_op"``. An in-place variant (``"aten::relu_"``) shares the
            rule of the name without the trailing underscore.

    Returns:
        A decorator for a function from :class:`~onsphere.symmetry.operation.Operation` to a unit
        (or a tuple of units, one per result).

    Example:
        >>> @register_rule("mylib::rotate")
        ... def rotate(op):
        ...     return op.unit(op["x"])
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name if "::" in name else f"aten::{name}"] = rule
        return rule

    return register


def rule_of(name: str) -> Rule | None:
    """Return the rule of an operation, also for its in-place variant, or ``None``."""
    rule = RULES.get(name)
    if rule is None and name.endswith("_") and not name.endswith("__"):
        rule = RULES.get(name.removesuffix("_"))
    return rule


_TABLE: list[tuple[Rule, str]] = [
    (
        passes,
        "view _unsafe_view reshape _reshape_alias permute transpose t expand squeeze unsqueeze",
    ),
    (passes, "slice select narrow split split_with_sizes unbind chunk unsafe_split unsafe_chunk"),
    (passes, "split_copy split_with_sizes_copy unbind_copy view_copy expand_copy permute_copy"),
    (passes, "unsafe_split_with_sizes as_strided unfold diagonal alias detach clone contiguous"),
    (passes, "lift_fresh lift lift_fresh_copy numpy_T mT movedim flip roll rot90 repeat tile"),
    (passes, "repeat_interleave tril triu diag diag_embed block_diag index gather index_select"),
    (passes, "take take_along_dim masked_select flatten unflatten"),
    (passes, "amax amin max_unpool2d max_unpool3d"),
    (passes, "relu leaky_relu rrelu_with_noise abs neg negative positive real imag conj _conj"),
    (passes, "view_as_real view_as_complex resolve_conj resolve_neg _conj_physical _neg_view"),
    (passes, "conj_physical im2col pixel_shuffle"),
    (passes, "pixel_unshuffle channel_shuffle native_channel_shuffle"),
    (passes, ""),
    (passes, "upsample_nearest1d upsample_nearest2d upsample_nearest3d"),
    (passes, "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"),
    (passes, ""),
    (passes, "reflection_pad1d reflection_pad2d"),
    (passes, "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"),
    (passes, "fft_fftshift nan_to_num"),
    (passes, "embedding max_pool2d max_pool1d max_pool3d"),
    (passes, "_to_dense to_dense set_ _nested_view_from_buffer squeeze_copy diagonal_copy"),
    (passes, "slice_copy select_copy transpose_copy"),
    (reduces, "sum mean nansum cumsum trace nanmean dropout feature_dropout col2im"),
    (reduces, "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d"),
    (reduces, "_adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d upsample_linear1d"),
    (reduces, "upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d"),
    (reduces, "upsample_bicubic2d _upsample_bicubic2d_aa _fft_r2c _fft_c2r _fft_c2c std"),
    (reduces, "linalg_matrix_norm _pdist_forward segment_reduce linalg_svdvals"),
    (reduces, "_linalg_eigvals"),
    (
        first_of(passes),
        "max_pool2d_with_indices max_pool3d_with_indices sort topk median nanmedian",
    ),
    (first_of(passes), "mode kthvalue cummax cummin adaptive_max_pool2d adaptive_max_pool3d"),
    (first_of(passes), "native_dropout fractional_max_pool2d _embedding_bag nll_loss_forward"),
    (first_of(passes), "nll_loss2d_forward _fused_dropout"),
    (
        multiplies,
        "mm bmm mv dot vdot matmul outer linalg_vecdot _grouped_mm kron cross linalg_cross",
    ),
    (equates, "cat stack hstack vstack maximum minimum max min fmax fmin complex"),
    (equates, "masked_scatter dist _cdist_forward clamp_min_tensor fmod remainder"),
    (equates, "aminmax"),
    (pins, "exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh asin acos atan asinh"),
    (pins, "acosh atanh erf erfc erfinv sigmoid log_sigmoid_forward silu gelu mish elu celu"),
    (
        pins,
        "softplus hardswish hardsigmoid hardshrink softshrink _softmax _log_softmax _safe_softmax",
    ),
    (pins, "logsumexp glu floor ceil round trunc frac lgamma digamma i0 special_i0 sinc xlogy"),
    (pins, "logaddexp logaddexp2 binary_cross_entropy binary_cross_entropy_with_logits kl_div"),
    (
        pins,
        "smooth_l1_loss huber_loss cumprod logit _ctc_loss linalg_matrix_exp _thnn_fused_lstm_cell",
    ),
    (pins, "mkldnn_rnn_layer _thnn_fused_gru_cell linalg_householder_product bernoulli poisson"),
    (pins, "multinomial histc bincount selu soft_margin_loss multi_margin_loss"),
    (
        ignores,
        "sign signbit sgn argmax argmin argsort isnan isinf isfinite isposinf isneginf nonzero",
    ),
    (
        ignores,
        "count_nonzero angle ones ones_like rand randn randint rand_like randn_like randint_like",
    ),
    (
        ignores,
        "arange linspace logspace eye scalar_tensor randperm uniform normal exponential random",
    ),
    (ignores, "logical_not logical_or logical_xor any all bitwise_or"),
    (ignores, "bitwise_not bitwise_xor searchsorted bucketize one_hot _unique2 unique_consecutive"),
    (ignores, "sym_size sym_numel sym_stride sym_storage_offset is_same_size _assert_async"),
    (
        ignores,
        "_assert_tensor_metadata _assert_scalar geometric tril_indices triu_indices hash_tensor",
    ),
    (ignores, "bartlett_window hann_window hamming_window blackman_window"),
    (
        empty,
        "zeros zeros_like new_zeros empty empty_like new_empty empty_strided new_empty_strided",
    ),
    (empty, "zero _efficientzerotensor resize"),
    (full, "full full_like new_full fill"),
    (fill, "masked_fill index_fill"),
    (add, "add sub rsub"),
    (hypot, "hypot"),
    (mul, "mul multiply"),
    (div, "div divide true_divide floor_divide"),
    (power, "pow float_power"),
    (root(HALF), "sqrt"),
    (root(-HALF), "rsqrt"),
    (root(Fraction(-1)), "reciprocal"),
    (root(2), "square var"),
    (product_reduce, "prod"),
    (clamp, "clamp clamp_min clamp_max clip"),
    (where, "where"),
    (pad, "constant_pad_nd pad"),
    (cast, "_to_copy to type_as"),
    (copy, "copy"),
    (bias_product("mat1", "mat2"), "addmm"),
    (bias_product("batch1", "batch2"), "baddbmm addbmm"),
    (bias_product("mat", "vec"), "addmv"),
    (bias_product("vec1", "vec2"), "addr"),
    (bias_product("tensor1", "tensor2"), "addcmul"),
    (addcdiv, "addcdiv"),
    (convolution, "convolution conv1d conv2d conv3d convolution_overrideable mkldnn_convolution"),
    (convolution, "linear mkldnn_linear _slow_conv2d_forward thnn_conv2d _conv_depthwise2d"),
    (convolution, "slow_conv3d_forward slow_conv_transpose2d _convolution"),
    (attention, "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu"),
    (attention, "_scaled_dot_product_attention_math _scaled_dot_product_flash_attention"),
    (attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    (attention, "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward"),
    (compare, "eq ne lt le gt ge isclose equal atan2"),
    (both, "logical_and bitwise_and __and__"),
    (item, "_local_scalar_dense is_nonzero"),
    (leaky, "_prelu_kernel prelu"),
    (hardtanh, "hardtanh"),
    (threshold, "threshold"),
    (vector_norm, "linalg_vector_norm norm"),
    (polar, "polar"),
    (lerp, "lerp"),
    (
        index_add,
        "index_put _index_put_impl _unsafe_index_put index_add index_copy scatter scatter_add",
    ),
    (index_add, "scatter_reduce select_scatter slice_scatter diagonal_scatter index_reduce put"),
    (squared_difference, "mse_loss"),
    (linear_solve, "_linalg_solve_ex"),
    (svd, "_linalg_svd"),
    (inverse, "linalg_inv_ex"),
    (normalizing.var_mean, "var_mean"),
    (normalizing.std_mean, "std_mean"),
    (normalizing.layer_norm, "native_layer_norm"),
    (normalizing.rms_norm, "_fused_rms_norm rms_norm"),
    (normalizing.group_norm, "native_group_norm"),
    (normalizing.batch_norm, "native_batch_norm _native_batch_norm_legit cudnn_batch_norm"),
    (normalizing.batch_norm, "_native_batch_norm_legit_no_training _batch_norm_with_update"),
    (normalizing.batch_norm, "_batch_norm_no_update miopen_batch_norm batch_norm"),
    (normalizing.weight_norm, "_weight_norm_interface _weight_norm"),
    (normalizing.grid_sample, "grid_sampler_2d grid_sampler_3d grid_sampler"),
]
for _rule, _names in _TABLE:
    register_rule(*_names.split())(_rule)
