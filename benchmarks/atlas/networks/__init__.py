"""Networks that people write themselves, in plain PyTorch: ``onsphere audit`` takes them by name.

Each function takes nothing and returns a module and its inputs.
"""

from benchmarks.atlas.networks.images import (
    conv_vae,
    dcgan_generator,
    diffusion_unet,
    dit,
    dqn,
    spectral_critic,
    unet,
)
from benchmarks.atlas.networks.others import (
    actor_critic,
    dlrm,
    gat,
    gcn,
    mlp,
    nerf,
    pointnet,
    siren,
    two_towers,
)
from benchmarks.atlas.networks.sequences import (
    gru,
    lstm,
    nanogpt,
    speedrun_gpt,
    torch_transformer,
    wavenet,
)

__all__ = [
    "ABOUT",
    "actor_critic",
    "conv_vae",
    "dcgan_generator",
    "diffusion_unet",
    "dit",
    "dlrm",
    "dqn",
    "gat",
    "gcn",
    "gru",
    "lstm",
    "mlp",
    "nanogpt",
    "nerf",
    "pointnet",
    "siren",
    "spectral_critic",
    "speedrun_gpt",
    "torch_transformer",
    "two_towers",
    "unet",
    "wavenet",
]

ABOUT = {
    "nanogpt": "small GPT, LayerNorm, fused qkv, tied head",
    "speedrun_gpt": "GPT of speedruns: RMSNorm without gains, QK-norm, squared ReLU",
    "torch_transformer": "nn.TransformerEncoder, post-norm",
    "lstm": "language model with nn.LSTM",
    "gru": "language model with nn.GRU",
    "mlp": "perceptron with ReLU",
    "unet": "U-Net for masks, BatchNorm",
    "diffusion_unet": "U-Net for diffusion, GroupNorm, the time as scale and shift",
    "dit": "diffusion transformer, adaptive LayerNorm",
    "conv_vae": "variational autoencoder, BatchNorm",
    "dcgan_generator": "DCGAN's generator, BatchNorm",
    "spectral_critic": "critic with spectral norm",
    "wavenet": "gated convolutions over time, weight norm",
    "gcn": "graph convolution, BatchNorm and LayerNorm",
    "gat": "graph attention",
    "pointnet": "point clouds, BatchNorm",
    "dlrm": "recommender, embeddings and their products",
    "two_towers": "retrieval: unit vectors and a temperature",
    "nerf": "radiance field",
    "siren": "perceptron with sines",
    "actor_critic": "policy and value with tanh",
    "dqn": "Q-network of Atari games",
}
"""Each of them, in a few words."""
