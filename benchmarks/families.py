"""Tiny models of many `transformers` families, built from their configs; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A tiny model of one family with inputs.

    Args:
        name: name of the family.
        design: what is special about its normalization.
        build: makes the model (in evaluation mode) and its keyword inputs.
        output: picks the tensors to keep fixed.
    """

    name: str
    design: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    output: Callable[[Any], Any] = lambda result: logits(result)


def logits(result: Any) -> Tensor:
    """Pick the logits, or else the last hidden state."""
    for key in ("logits", "last_hidden_state"):
        if key in result:
            return result[key]
    raise KeyError(f"no logits among {list(result)}")


def _tokens(length: int = 7, vocabulary: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, vocabulary, (2, length), generator=generator)


def _pixels(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _model(config: str, head: str, inputs: dict[str, Any], **changes: Any) -> Callable[[], Any]:
    def build() -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, config)(**changes)
        made._attn_implementation = "eager"
        made._experts_implementation = "eager"
        return getattr(transformers, head)(made).eval(), dict(inputs)

    return build


def _decoder(kind: str, head: str = "", **changes: Any) -> Callable[[], Any]:
    head = head or f"{kind}ForCausalLM"
    inputs = {"input_ids": _tokens(), "use_cache": False}
    return _model(f"{kind}Config", head, inputs, **{**SMALL, "head_dim": 8, **changes})


def _encoder(kind: str, head: str = "", **changes: Any) -> Callable[[], Any]:
    head = head or f"{kind}ForMaskedLM"
    return _model(f"{kind}Config", head, {"input_ids": _tokens()}, **{**SMALL, **changes})


_GQA = {"num_key_value_heads": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SEQ2SEQ = {"input_ids": _tokens(), "decoder_input_ids": _tokens(5), "use_cache": False}
_BART = {
    "vocab_size": 48,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
}
_T5 = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 3),
    "conv_stride": (3, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}
_WAVE = {"input_values": torch.randn(1, 400, generator=torch.Generator().manual_seed(1))}
_PIXELS = {"pixel_values": _pixels()}

FAMILIES: tuple[Family, ...] = (
    Family("llama", "RMSNorm, gated MLP", _decoder("Llama", **_GQA)),
    Family("llama-tied", "tied head", _decoder("Llama", tie_word_embeddings=True)),
    Family("mistral", "sliding window", _decoder("Mistral", **_GQA)),
    Family("qwen2", "bias on q, k, v", _decoder("Qwen2", **_GQA)),
    Family("qwen3", "QK-norm", _decoder("Qwen3", **_GQA)),
    Family("olmo", "LayerNorm without gain", _decoder("Olmo")),
    Family("olmo2", "post-norm, QK-norm", _decoder("Olmo2")),
    Family("gemma", "gain stored as 1 + w", _decoder("Gemma", **_GQA)),
    Family("gemma2", "pre- and post-norm, soft caps", _decoder("Gemma2", **_GQA)),
    Family("gemma3", "QK-norm with 1 + w", _decoder("Gemma3Text", "Gemma3ForCausalLM", **_GQA)),
    Family("phi", "parallel block", _decoder("Phi")),
    Family("phi3", "fused qkv and gate_up", _decoder("Phi3")),
    Family("gpt2", "LayerNorm, learned positions", _model(
        "GPT2Config", "GPT2LMHeadModel", {"input_ids": _tokens(), "use_cache": False},
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16)),
    Family("gpt-neox", "parallel residual", _decoder("GPTNeoX", max_position_embeddings=32)),
    Family("gptj", "parallel, one norm", _model(
        "GPTJConfig", "GPTJForCausalLM", {"input_ids": _tokens(), "use_cache": False},
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16, rotary_dim=4)),
    Family("opt", "pre-norm, ReLU", _model(
        "OPTConfig", "OPTForCausalLM", {"input_ids": _tokens(), "use_cache": False},
        vocab_size=48, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=32)),
    Family("bloom", "embedding norm, ALiBi", _model(
        "BloomConfig", "BloomForCausalLM", {"input_ids": _tokens(), "use_cache": False},
        vocab_size=48, hidden_size=32, n_layer=2, n_head=4)),
    Family("mpt", "ALiBi, no biases", _model(
        "MptConfig", "MptForCausalLM", {"input_ids": _tokens(), "use_cache": False},
        vocab_size=48, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)),
    Family("falcon", "parallel, multi-query", _model(
        "FalconConfig", "FalconForCausalLM", {"input_ids": _tokens(), "use_cache": False},
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    Family("cohere", "parallel, LayerNorm", _decoder("Cohere", **_GQA)),
    Family("stablelm", "partial rotary, LayerNorm", _decoder("StableLm", num_key_value_heads=4)),
    Family("granite", "scalar multipliers", _decoder("Granite", **_GQA)),
    Family("glm4", "sandwich norms", _decoder("Glm4", **_GQA)),
    Family("nemotron", "LayerNorm 1 + w, squared ReLU", _decoder("Nemotron", **_GQA)),
    Family("mixtral", "mixture of experts", _decoder(
        "Mixtral", **_GQA, num_local_experts=4, num_experts_per_tok=2)),
    Family("qwen3-moe", "experts, QK-norm", _decoder("Qwen3Moe", **_GQA, **_MOE)),
    Family("olmoe", "experts, QK-norm over all heads", _decoder(
        "Olmoe", num_experts=4, num_experts_per_tok=2)),
    Family("mamba", "state space", _model(
        "MambaConfig", "MambaForCausalLM", {"input_ids": _tokens(), "use_cache": False},
        vocab_size=48, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4)),
    Family("t5", "encoder-decoder, RMSNorm", _model(
        "T5Config", "T5ForConditionalGeneration", _SEQ2SEQ, **_T5)),
    Family("t5-gated", "gated MLP, untied", _model(
        "T5Config", "T5ForConditionalGeneration", _SEQ2SEQ, **_T5,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    Family("bart", "encoder-decoder, post-norm", _model(
        "BartConfig", "BartForConditionalGeneration", _SEQ2SEQ, **_BART)),
    Family("bert", "post-norm", _encoder("Bert")),
    Family("roberta", "padding_idx in positions", _encoder("Roberta", max_position_embeddings=32)),
    Family("distilbert", "post-norm", _model(
        "DistilBertConfig", "DistilBertForMaskedLM", {"input_ids": _tokens()},
        vocab_size=48, dim=32, n_layers=2, n_heads=4, hidden_dim=48)),
    Family("albert", "one layer reused", _encoder("Albert", embedding_size=16)),
    Family("electra", "embedding projection", _encoder("Electra", embedding_size=16)),
    Family("deberta-v2", "disentangled attention", _encoder(
        "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"])),
    Family("modernbert", "pre-norm, gated MLP", _encoder("ModernBert")),
    Family("vit", "pre-norm vision", _model(
        "ViTConfig", "ViTForImageClassification", _PIXELS, **_VIT)),
    Family("dinov2", "layer scale", _model(
        "Dinov2Config", "Dinov2ForImageClassification", _PIXELS, **_VIT)),
    Family("swin", "shifted windows", _model(
        "SwinConfig", "SwinForImageClassification", _PIXELS, image_size=32, patch_size=4,
        embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)),
    Family("convnext", "depthwise, LayerNorm", _model(
        "ConvNextConfig", "ConvNextForImageClassification", _PIXELS,
        hidden_sizes=[16, 24], depths=[1, 1], num_stages=2, image_size=32)),
    Family("convnext-v2", "global response norm", _model(
        "ConvNextV2Config", "ConvNextV2ForImageClassification", _PIXELS,
        hidden_sizes=[16, 24], depths=[1, 1], num_stages=2, image_size=32)),
    Family("resnet", "BatchNorm", _model(
        "ResNetConfig", "ResNetForImageClassification", _PIXELS,
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1])),
    Family("mobilenet-v2", "BatchNorm, ReLU6", _model(
        "MobileNetV2Config", "MobileNetV2ForImageClassification", {"pixel_values": _pixels(96, 4)},
        image_size=96, depth_multiplier=0.35)),
    Family("wav2vec2", "group norm, weight norm", _model(
        "Wav2Vec2Config", "Wav2Vec2ForCTC", _WAVE, **_SPEECH)),
    Family("whisper", "speech encoder-decoder", _model(
        "WhisperConfig", "WhisperForConditionalGeneration",
        {"input_features": torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(1)),
         "decoder_input_ids": _tokens(5)[:1], "use_cache": False},
        vocab_size=48, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=20, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)),
    Family("clip", "two towers, normalized embeddings", _model(
        "CLIPConfig", "CLIPModel", {"input_ids": _tokens(), **_PIXELS},
        text_config={"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48,
                     "num_hidden_layers": 2, "num_attention_heads": 4,
                     "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config=_VIT, projection_dim=16), lambda result: result.logits_per_image),
)  # fmt: skip
