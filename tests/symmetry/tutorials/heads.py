"""Recommenders, reinforcement learning, densities: what stands at the end of a network."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F

from symmetry.tutorials.case import Case, call, chain, tokens, trade


class DQN(nn.Module):
    def __init__(self, observations: int = 4, actions: int = 3) -> None:
        super().__init__()
        self.layer1 = nn.Linear(observations, 8)
        self.layer2 = nn.Linear(8, 6)
        self.layer3 = nn.Linear(6, actions)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer1(x))
        x = F.relu(self.layer2(x))
        return self.layer3(x)


class Dueling(nn.Module):
    """A value and advantages, of which only the differences count."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten())
        self.value = nn.Sequential(nn.Linear(4 * 9, 5), nn.ReLU(), nn.Linear(5, 1))
        self.advantage = nn.Sequential(nn.Linear(4 * 9, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(dim=1, keepdim=True)


class ActorCritic(nn.Module):
    """Log-probabilities of actions, the entropy, and a value of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.affine1 = nn.Linear(4, 8)
        self.action_head, self.value_head = nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.affine1(x))
        policy = Categorical(F.softmax(self.action_head(x), dim=-1))
        return policy.log_prob(action), policy.entropy(), self.value_head(x)


class PPOLoss(nn.Module):
    """A Gaussian policy with a spread of its own; the clipped surrogate comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self.log_std = nn.Parameter(torch.zeros(1, 2))
        self.critic = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 1))

    def forward(self, x: Tensor, action: Tensor, old: Tensor, returns: Tensor) -> Tensor:
        policy = Normal(self.mean(x), self.log_std.expand(len(x), 2).exp())
        value = self.critic(x).squeeze(-1)
        advantage = (returns - value).detach()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        ratio = (policy.log_prob(action).sum(-1) - old).exp()
        clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.2) * advantage
        surrogate = -torch.min(ratio * advantage, clipped).mean()
        return surrogate + 0.5 * F.mse_loss(value, returns) - 0.1 * policy.entropy().mean()


class MixtureDensity(nn.Module):
    """The likelihood of targets under a mixture of Gaussians."""

    def __init__(self, hidden: int = 6, gaussians: int = 3) -> None:
        super().__init__()
        self.z_h = nn.Sequential(nn.Linear(2, hidden), nn.ReLU())
        self.z_pi, self.z_mu = nn.Linear(hidden, gaussians), nn.Linear(hidden, gaussians)
        self.z_sigma = nn.Linear(hidden, gaussians)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.z_h(x)
        pi, mu = F.softmax(self.z_pi(h), -1), self.z_mu(h)
        sigma = torch.exp(self.z_sigma(h))
        z = (y.expand_as(mu) - mu) * torch.reciprocal(sigma)
        density = torch.exp(-0.5 * z * z) * torch.reciprocal(sigma) / math.sqrt(2 * math.pi)
        return torch.mean(-torch.log(torch.sum(density * pi, dim=1)))


class MonteCarloDropout(nn.Module):
    """Many passes with dropout on: their mean, and how much they disagree."""

    def __init__(self, passes: int = 4) -> None:
        super().__init__()
        self.fc1, self.fc2, self.passes = nn.Linear(5, 8), nn.Linear(8, 2), passes

    def once(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.relu(self.fc1(x)), p=0.3, training=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        draws = torch.stack([self.once(x) for _ in range(self.passes)])
        return draws.mean(0), draws.var(0)


class FactorizationMachine(nn.Module):
    def __init__(self, features: int = 15, width: int = 4) -> None:
        super().__init__()
        self.linear, self.embedding = nn.Embedding(features, 1), nn.Embedding(features, width)
        self.bias = nn.Parameter(torch.zeros((1,)))
        self.register_buffer("offsets", torch.tensor([0, 5, 9]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offsets
        v = self.embedding(x)
        pairs = v.sum(dim=1) ** 2 - (v**2).sum(dim=1)
        score = self.bias + self.linear(x).sum(dim=1) + 0.5 * pairs.sum(dim=1, keepdim=True)
        return torch.sigmoid(score.squeeze(1))


class MatrixFactorization(nn.Module):
    def __init__(self, users: int = 7, items: int = 9, width: int = 4) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        self.register_buffer("mean", torch.tensor(3.5), persistent=False)

    def forward(self, u: Tensor, i: Tensor) -> Tensor:
        pairs = (self.user(u) * self.item(i)).sum(-1)
        return pairs + self.user_bias(u).squeeze(-1) + self.item_bias(i).squeeze(-1) + self.mean


class DLRM(nn.Module):
    """Numbers through a network, categories through bags; all pairs of vectors side by side."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(n, width, mode="sum") for n in (6, 8))
        self.bot_l = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, width), nn.ReLU())
        self.top_l = nn.Sequential(
            nn.Linear(width + 3, 6), nn.ReLU(), nn.Linear(6, 1), nn.Sigmoid()
        )

    def forward(self, dense: Tensor, offsets: list[Tensor], indices: list[Tensor]) -> Tensor:
        x = self.bot_l(dense)
        bags = [e(i, o) for e, i, o in zip(self.emb_l, indices, offsets, strict=True)]
        T = torch.cat([x, *bags], dim=1).view(x.size(0), -1, x.size(1))
        Z = torch.bmm(T, torch.transpose(T, 1, 2))
        _, n, _ = Z.shape
        li = torch.tensor([i for i in range(n) for _ in range(i)])
        lj = torch.tensor([j for i in range(n) for j in range(i)])
        return self.top_l(torch.cat([x, Z[:, li, lj]], dim=1))


class TwoTower(nn.Module):
    """Users and items meet in an inner product; other items of the batch are the negatives."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(8, width), nn.Embedding(10, width)
        self.user_tower = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 4))
        self.item_tower = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        scores = self.user_tower(self.user(users)) @ self.item_tower(self.item(items)).t()
        return F.cross_entropy(scores, torch.arange(len(users), device=scores.device))


def _bags() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    offsets = [torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2])]
    return torch.randn(3, 5), offsets, [tokens(5, among=6), tokens(4, among=8)]


CASES = (
    Case(
        "deep Q-network",
        DQN,
        lambda: call(torch.randn(5, 4)),
        symmetries=chain("layer1 layer2 layer3"),
    ),
    Case(
        "dueling network",
        Dueling,
        lambda: call(torch.randn(3, 2, 5, 5)),
        symmetries=(
            trade("trunk.0.*", "value.0.weight advantage.0.weight"),
            trade("value.0.*", "value.2.weight"),
            trade("advantage.0.*", "advantage.2.weight"),
        ),
    ),
    Case(
        "actor and critic",
        ActorCritic,
        lambda: call(torch.randn(5, 4), tokens(5, among=2)),
        symmetries=(trade("affine1.*", "action_head.weight value_head.weight"),),
    ),
    Case(
        "clipped surrogate",
        PPOLoss,
        lambda: call(
            torch.randn(6, 4), torch.randn(6, 2), -2 - torch.rand(6), torch.randn(6)
        ),
        symmetries=(trade("critic.0.*", "critic.2.weight"),),
        mode="train",
    ),
    Case(
        "mixture density",
        MixtureDensity,
        lambda: call(torch.randn(5, 2), torch.randn(5, 1)),
        symmetries=(trade("z_h.0.*", "z_pi.weight z_mu.weight z_sigma.weight"),),
        mode="train",
    ),
    Case(
        "dropout many times",
        MonteCarloDropout,
        lambda: call(torch.randn(4, 5)),
        symmetries=(trade("fc1.*", "fc2.weight"),),
    ),
    Case(
        "factorization machine",
        FactorizationMachine,
        lambda: call(torch.stack([tokens(6, among=5), tokens(6, among=4), tokens(6, among=6)], 1)),
        note="products of one table with itself, beside numbers",
    ),
    Case(
        "matrix factorization",
        MatrixFactorization,
        lambda: call(tokens(6, among=7), tokens(6, among=9)),
        symmetries=(trade("user.weight", "item.weight"),),
    ),
    Case(
        "recommender with bags",
        DLRM,
        lambda: call(*_bags()),
        symmetries=(
            trade("bot_l.0.*", "bot_l.2.weight"),
            trade("top_l.0.*", "top_l.2.weight"),
        ),
        note="vectors and their products side by side: both must be numbers",
    ),
    Case(
        "two towers",
        TwoTower,
        lambda: call(tokens(5, among=8), tokens(5, among=10)),
        symmetries=(
            trade("user.weight", "user_tower.0.weight"),
            trade("item.weight", "item_tower.0.weight"),
            trade("user_tower.0.*", "user_tower.2.weight"),
            trade("item_tower.0.*", "item_tower.2.weight"),
            trade("user_tower.2.*", "item_tower.2.weight"),
        ),
        inert=("item_tower.2.bias",),
        mode="train",
        note="the bias of the items adds the same to all scores of a user",
    ),
)  # fmt: skip
