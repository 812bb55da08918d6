"""One rule per operation: how the units of its inputs give the unit of its result.

The table at the end is the whole knowledge of dimensional analysis. Most operations follow one of
ten patterns; the others have a function of their own in
:mod:`onsphere.symmetry.exact.rules.arithmetic` or
:mod:`onsphere.symmetry.exact.rules.normalization`. To teach a new operation, add one entry and one
test case. What is not PyTorch's own is taught by
:func:`~onsphere.symmetry.exact.rules.taught.register_rule`.
"""

from fractions import Fraction
from typing import Any

from onsphere.symmetry.exact.operation import Operation, Rule
from onsphere.symmetry.exact.overloads import flat_tensors
from onsphere.symmetry.exact.rules import arithmetic, normalization
from onsphere.symmetry.exact.rules.taught import TAUGHT, TaughtRule, entry_of
from onsphere.symmetry.exact.units.linear_forms import ANY, ZERO, Unit

_HALF = Fraction(1, 2)


# --- the ten patterns --------------------------------------------------------------------------


def passes(op: Operation) -> Unit:
    """Keep the unit of the first argument: rearranging, averaging, selecting, ReLU."""
    return op.unit(next(iter(flat_tensors(op.first)), None), keep_eps=True)


def same(op: Operation) -> Unit:
    """Keep everything that is known: the result is the same tensor."""
    return op.ledger.read(op["self"])


def bends(op: Operation) -> Unit:
    """Keep the unit of the first argument; a constant added before is where the bend lies."""
    return op.unit(next(iter(flat_tensors(op.first)), None))


def reduces(op: Operation) -> Unit:
    """Keep the unit of the first argument, but mix entries: 0-or-1 becomes something between."""
    unit = passes(op)
    return Unit(unit.terms, unit.free, eps=unit.eps, fields=unit.fields)


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


def ignores(op: Operation) -> Unit:
    """Give unit 0 whatever comes in: signs, indices, angles. A constant added before counts."""
    for tensor in op.tensors():
        op.unit(tensor)
    return ZERO


def makes(_: Operation) -> Unit:
    """Give unit 0: constants and random numbers, which depend on no value."""
    return ZERO


def empty(_: Operation) -> Unit:
    """Give any unit: zeros, and memory about to be filled."""
    return ANY


def _numbers(op: Operation) -> list[Any]:
    return [op[n] for n in ("other", "value") if op.has(n) and isinstance(op[n], int | float)]


# --- the table ---------------------------------------------------------------------------------

RULES: dict[str, Rule] = {}


def rule_of(name: str) -> Rule | TaughtRule | None:
    """Return the rule of an operation, also for its in-place variant, or ``None``."""
    return TAUGHT[name] or entry_of(RULES, name)


_TABLE: list[tuple[Rule, str]] = [
    (passes, """
        view _unsafe_view reshape _reshape_alias permute transpose t expand squeeze
        unsqueeze slice select narrow split split_with_sizes unbind chunk unsafe_split
        unsafe_chunk split_copy split_with_sizes_copy unbind_copy view_copy expand_copy
        permute_copy unsafe_split_with_sizes as_strided unfold diagonal
        clone contiguous lift_fresh lift lift_fresh_copy numpy_T mT movedim flip roll
        rot90 repeat tile repeat_interleave tril triu diag diag_embed index
        gather index_select take take_along_dim masked_select flatten unflatten amax
        amin max_unpool2d max_unpool3d abs neg negative
        positive real imag conj _conj view_as_real view_as_complex resolve_conj
        resolve_neg _conj_physical _neg_view conj_physical im2col pixel_shuffle
        pixel_unshuffle channel_shuffle native_channel_shuffle upsample_nearest1d
        upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d reflection_pad1d
        reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d fft_fftshift embedding max_pool2d max_pool1d
        max_pool3d _to_dense to_dense set_ _nested_view_from_buffer squeeze_copy
        diagonal_copy slice_copy select_copy transpose_copy resize
        leaky_relu_backward embedding_dense_backward max_pool2d_with_indices_backward
        slice_backward select_backward unfold_backward
        affine_grid_generator _to_sparse to_sparse _coalesced coalesce _values values
    """),
    (same, "detach alias"),
    (bends, "relu leaky_relu rrelu_with_noise rrelu_with_noise_functional"),
    (reduces, """
        sum mean nansum cumsum trace nanmean dropout feature_dropout col2im avg_pool1d
        avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d
        _adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d upsample_linear1d
        upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
        upsample_bicubic2d _upsample_bicubic2d_aa _fft_r2c _fft_c2r _fft_c2c std
        linalg_matrix_norm _pdist_forward segment_reduce linalg_svdvals _linalg_eigvals
    """),
    (arithmetic.first_of(passes), """
        max_pool2d_with_indices max_pool3d_with_indices sort topk median nanmedian mode
        kthvalue cummax cummin adaptive_max_pool2d adaptive_max_pool3d native_dropout
        fractional_max_pool2d _fused_dropout _pack_padded_sequence unique_consecutive
        _unique2 unique_dim
    """),
    (multiplies, """
        mm _sparse_mm bmm mv dot vdot matmul outer linalg_vecdot _grouped_mm kron cross
        linalg_cross
    """),
    (equates, """
        cat stack hstack vstack block_diag cartesian_prod minimum min fmin complex
        masked_scatter _cdist_forward fmod remainder aminmax
    """),
    (pins, """
        exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh asin acos atan
        asinh acosh atanh erf erfc erfinv sigmoid log_sigmoid_forward silu gelu mish elu
        celu softplus hardswish hardsigmoid hardshrink softshrink _softmax _log_softmax
        _safe_softmax logsumexp glu floor ceil round trunc frac lgamma digamma i0
        special_i0 sinc xlogy logaddexp logaddexp2 kl_div smooth_l1_loss huber_loss cumprod logit
        _ctc_loss linalg_matrix_exp _thnn_fused_lstm_cell mkldnn_rnn_layer
        _thnn_fused_gru_cell linalg_householder_product poisson multinomial
        histc bincount vander logspace selu soft_margin_loss multi_margin_loss erfcx special_erfcx
    """),
    (ignores, """
        sign signbit sgn argmax argmin argsort isnan isinf isfinite isposinf isneginf
        nonzero count_nonzero angle logical_not logical_or logical_xor any all
        bitwise_or bitwise_not bitwise_xor one_hot _assert_async _assert_scalar
        hash_tensor
    """),
    (makes, """
        ones ones_like new_ones rand rand_like randn randn_like randint randint_like
        randperm random uniform normal_functional exponential geometric cauchy
        log_normal arange range eye scalar_tensor tril_indices
        triu_indices bartlett_window hann_window hamming_window blackman_window
        kaiser_window sym_size sym_numel sym_stride sym_storage_offset
        is_same_size _assert_tensor_metadata fft_fftfreq fft_rfftfreq
    """),
    (empty, """
        zeros zeros_like new_zeros empty empty_like new_empty empty_strided
        new_empty_strided zero _efficientzerotensor empty_permuted new_empty_permuted
    """),
    (arithmetic.full, "full full_like new_full fill"),
    (arithmetic.fill, "masked_fill index_fill fill_diagonal"),
    (arithmetic.add, "add sub rsub"),
    (arithmetic.hypot, "hypot"),
    (arithmetic.mul, "mul multiply"),
    (arithmetic.div, "div divide true_divide floor_divide"),
    (arithmetic.power, "pow float_power"),
    (arithmetic.root(_HALF), "sqrt"),
    (arithmetic.root(-_HALF), "rsqrt"),
    (arithmetic.root(Fraction(-1)), "reciprocal"),
    (arithmetic.root(2), "square var"),
    (arithmetic.product_reduce, "prod"),
    (arithmetic.clamp, "clamp clamp_min clamp_max clip"),
    (arithmetic.maximum, "maximum max fmax"),
    (arithmetic.where, "where"),
    (arithmetic.pad, "constant_pad_nd pad"),
    (arithmetic.replace, "nan_to_num"),
    (arithmetic.distance, "dist"),
    (arithmetic.between, "linspace"),
    (arithmetic.cast, "_to_copy to type_as"),
    (arithmetic.copy, "copy"),
    (arithmetic.bias_product("mat1", "mat2"), "addmm _sparse_addmm"),
    (arithmetic.bias_product("batch1", "batch2"), "baddbmm addbmm"),
    (arithmetic.bias_product("mat", "vec"), "addmv"),
    (arithmetic.bias_product("vec1", "vec2"), "addr"),
    (arithmetic.bias_product("tensor1", "tensor2"), "addcmul"),
    (arithmetic.addcdiv, "addcdiv"),
    (arithmetic.convolution, """
        convolution conv1d conv2d conv3d convolution_overrideable mkldnn_convolution
        linear mkldnn_linear _slow_conv2d_forward thnn_conv2d _conv_depthwise2d
        slow_conv3d_forward slow_conv_transpose2d _convolution
    """),
    (arithmetic.attention, """
        scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable _flash_attention_forward
    """),
    (arithmetic.compare, "eq ne lt le gt ge isclose equal atan2 arctan2"),
    (arithmetic.bins, "searchsorted bucketize"),
    (arithmetic.draw, "bernoulli normal"),
    (arithmetic.both, "logical_and bitwise_and __and__"),
    (arithmetic.item, "_local_scalar_dense is_nonzero"),
    (arithmetic.leaky, "_prelu_kernel prelu"),
    (arithmetic.hardtanh, "hardtanh"),
    (arithmetic.threshold, "threshold"),
    (arithmetic.vector_norm, "linalg_vector_norm norm"),
    (arithmetic.polar, "polar"),
    (arithmetic.lerp, "lerp"),
    (arithmetic.index_add, """
        index_put _index_put_impl _unsafe_index_put index_add index_copy scatter
        scatter_add scatter_reduce select_scatter slice_scatter diagonal_scatter
        index_reduce put
    """),
    (arithmetic.bent_backward, "threshold_backward"),
    (arithmetic.pinned_backward, """
        tanh_backward sigmoid_backward silu_backward gelu_backward elu_backward
        softplus_backward _softmax_backward_data _log_softmax_backward_data mish_backward
        hardswish_backward hardsigmoid_backward log_sigmoid_backward
    """),
    (arithmetic.convolution_backward, "convolution_backward"),
    (arithmetic.squared_difference, "mse_loss"),
    (arithmetic.nll_loss, "nll_loss_forward nll_loss2d_forward nll_loss nll_loss2d"),
    (arithmetic.cross_entropy, "binary_cross_entropy binary_cross_entropy_with_logits"),
    (arithmetic.pad_packed, "_pad_packed_sequence"),
    (arithmetic.embedding_bag, "_embedding_bag _embedding_bag_forward_only"),
    (arithmetic.linear_solve, "_linalg_solve_ex"),
    (arithmetic.svd, "_linalg_svd"),
    (arithmetic.inverse, "linalg_inv_ex"),
    (normalization.var_mean, "var_mean"),
    (normalization.std_mean, "std_mean"),
    (normalization.layer_norm, "native_layer_norm"),
    (normalization.rms_norm, "_fused_rms_norm rms_norm"),
    (normalization.group_norm, "native_group_norm"),
    (normalization.batch_norm, """
        native_batch_norm _native_batch_norm_legit cudnn_batch_norm
        _native_batch_norm_legit_no_training _batch_norm_with_update
        _batch_norm_no_update miopen_batch_norm batch_norm
    """),
    (normalization.weight_norm, "_weight_norm_interface _weight_norm"),
    (normalization.grid_sample, "grid_sampler_2d grid_sampler_3d grid_sampler"),
]  # fmt: skip
RULES |= {f"aten::{name}": rule for rule, names in _TABLE for name in names.split()}
