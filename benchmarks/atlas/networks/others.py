"""Networks of tables, graphs, points and states."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.atlas.networks.inputs import Example, generator, normal, tokens


def mlp() -> Example:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    ), (normal(8, 16),)  # fmt: skip


class _GraphConv(nn.Module):
    """Graph convolution: every node adds what its neighbours send, in the symmetric norm."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = torch.ones(len(x)).index_add(0, target, torch.ones(len(target)))
        sent = self.linear(x) / degree.sqrt()[:, None]
        return torch.index_add(sent, 0, target, sent[source]) / degree.sqrt()[:, None]


class _GCN(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1, self.norm1 = _GraphConv(16, width), nn.BatchNorm1d(width)
        self.conv2, self.norm2 = _GraphConv(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x, edges)))
        return self.head(F.relu(self.norm2(self.conv2(y, edges))))


def _graph(nodes: int = 20, links: int = 60) -> tuple[Tensor, Tensor]:
    return normal(nodes, 16), torch.randint(0, nodes, (2, links), generator=generator())


def gcn() -> Example:
    return _GCN(), _graph()


class _GAT(nn.Module):
    """Graph attention: a softmax over the edges that end at a node."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(16, width, bias=False)
        self.source = nn.Parameter(normal(heads, width // heads))
        self.target = nn.Parameter(normal(heads, width // heads).flip(0))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        y = self.linear(x).unflatten(-1, self.source.shape)
        score = (y * self.source).sum(-1)[source] + (y * self.target).sum(-1)[target]
        weight = F.leaky_relu(score, 0.2).exp()
        total = torch.zeros(len(x), weight.shape[1]).index_add(0, target, weight)
        share = weight / (total[target] + 1e-16)
        sent = torch.zeros_like(y).index_add(0, target, share[..., None] * y[source])
        return self.head(F.elu(sent.flatten(1)))


def gat() -> Example:
    return _GAT(), _graph()


class _PointNet(nn.Module):
    """A network of point clouds: one perceptron for all points, then their maximum."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.points = nn.Sequential(
            nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Conv1d(width, 2 * width, 1), nn.BatchNorm1d(2 * width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Linear(2 * width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).amax(dim=-1))


def pointnet() -> Example:
    return _PointNet(), (normal(4, 3, 20),)


class _DLRM(nn.Module):
    """A recommender: embeddings of categories, a perceptron of numbers, and all their products."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50, width, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        x = self.bottom(numbers)
        found = [table(c[:, None]) for table, c in zip(self.tables, categories, strict=True)]
        each = torch.stack([x, *found], dim=1)
        products = each @ each.transpose(1, 2)
        row, column = torch.tril_indices(4, 4, offset=-1)
        return self.top(torch.cat([x, products[:, row, column]], dim=1))


def dlrm() -> Example:
    categories = torch.randint(0, 50, (3, 8), generator=generator())
    return _DLRM(), (normal(8, 8), categories)


class _TwoTowers(nn.Module):
    """A retrieval network: two encoders, unit vectors, a learned temperature."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(392, width, bias=False),
        )  # fmt: skip
        self.text = nn.EmbeddingBag(64, width, mode="mean")
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        one, two = F.normalize(self.image(image), dim=-1), F.normalize(self.text(ids), dim=-1)
        return self.temperature.exp() * one @ two.T


def two_towers() -> Example:
    return _TwoTowers(), (normal(4, 3, 16, 16), tokens(4))


class _NeRF(nn.Module):
    """A radiance field: sines of a position, a perceptron with a skip, density and colour."""

    def __init__(self, width: int = 48, bands: int = 4) -> None:
        super().__init__()
        self.bands, entering = bands, 3 + 6 * bands
        self.first = nn.Sequential(
            nn.Linear(entering, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Linear(width + entering, width), nn.ReLU())
        self.density, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.colour = nn.Sequential(nn.Linear(width + 3, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, position: Tensor, direction: Tensor) -> Tensor:
        waves = [f(2.0**k * position) for k in range(self.bands) for f in (torch.sin, torch.cos)]
        x = torch.cat([position, *waves], dim=-1)
        y = self.second(torch.cat([self.first(x), x], dim=-1))
        seen = torch.cat([self.feature(y), direction], dim=-1)
        return torch.cat([self.colour(seen).sigmoid(), F.relu(self.density(y))], dim=-1)


def nerf() -> Example:
    return _NeRF(), (normal(16, 3), F.normalize(normal(16, 3).flip(0), dim=-1))


class _Siren(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.out(x)


def siren() -> Example:
    return _Siren(), (normal(16, 2),)


class _ActorCritic(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.policy, self.value = (
            nn.Sequential(
                nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                nn.Linear(width, n),
            )
            for n in (3, 1)
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x).log_softmax(-1), self.value(x)


def actor_critic() -> Example:
    return _ActorCritic(), (normal(8, 8),)
