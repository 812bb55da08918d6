"""What the atlas audits: architectures of libraries by name, and networks of this package."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.atlas.networks import ABOUT
from benchmarks.atlas.timm_networks import LARGER, NETWORKS

LIBRARIES = ("timm", "transformers", "torchvision", "plain PyTorch")
"""In the order of the page."""

TRANSFORMERS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2",
    "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "mpt", "falcon", "codegen",
    "cohere", "cohere2", "olmo", "olmo2", "stablelm", "starcoder2", "granite", "glm", "glm4",
    "nemotron", "smollm3", "exaone4", "helium", "persimmon", "biogpt", "xglm", "ctrl",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3",
    "mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "rwkv", "jamba", "zamba2",
    "t5", "mt5", "longt5", "bart", "mbart", "pegasus", "m2m_100", "marian", "blenderbot", "led",
    "bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "modernbert", "mpnet",
    "xlm-roberta", "camembert", "squeezebert", "mobilebert", "convbert", "funnel", "longformer",
    "big_bird", "nystromformer", "fnet", "ibert", "esm", "xlnet", "layoutlm",
    "vit", "deit", "beit", "dinov2", "swin", "swinv2", "convnext", "convnextv2", "resnet",
    "regnet", "mobilenet_v2", "mobilevit", "poolformer", "levit", "cvt", "pvt", "segformer",
    "efficientnet", "focalnet", "hiera", "vit_mae",
    "clip", "siglip", "whisper", "wav2vec2", "hubert", "wavlm", "sew",
    "audio-spectrogram-transformer",
)  # fmt: skip
"""``model_type`` of each architecture of transformers."""

TORCHVISION = (
    "alexnet", "vgg11", "vgg11_bn", "googlenet", "inception_v3", "resnet18", "resnext50_32x4d",
    "wide_resnet50_2", "densenet121", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf",
    "convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t",
    "fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
    "r3d_18", "r2plus1d_18", "s3d", "mvit_v1_b", "swin3d_t",
)  # fmt: skip
"""Names of models of torchvision: networks for images, for masks, for video."""


@dataclass(frozen=True)
class Entry:
    """One architecture of the atlas.

    Args:
        origin: one of :data:`LIBRARIES`.
        name: as the library names it.
        exact: the command that audits it without memory; none where it is small anyway.
        certified: the commands that audit it with certificates, the first that works counts.
        about: what it is, in a few words.
    """

    origin: str
    name: str
    exact: str | None
    certified: tuple[str, ...]
    about: str = ""

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.origin}:{self.name}"


def entries() -> Iterator[Entry]:
    """Yield all of them in the order of the page."""
    for library, names in (
        ("timm", sorted(NETWORKS + LARGER)),
        ("torchvision", sorted(TORCHVISION)),
    ):
        for name in names:
            target = f"onsphere audit {library}:{name}"
            certified = (f"{target} --input 4x3x96x96", target) if library == "timm" else (target,)
            yield Entry(library, name, f"{target} --full", certified)
    for name in sorted(TRANSFORMERS):
        target = f"onsphere audit hf:{name}"
        yield Entry("transformers", name, target, (f"{target} --shrink",))
    for name, about in ABOUT.items():
        target = f"onsphere audit benchmarks.atlas.networks:{name}"
        yield Entry("plain PyTorch", name, None, (target,), about)
