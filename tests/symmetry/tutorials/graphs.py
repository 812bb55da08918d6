"""Graph networks, sets and point clouds, without a library for graphs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.tutorials.case import Case, call, chain, trade

NODES = 7


def graph() -> Tensor:
    """A ring with chords: source and target of every edge."""
    ring = torch.arange(NODES)
    source = torch.cat([ring, ring, ring[:4]])
    target = torch.cat([(ring + 1) % NODES, (ring - 1) % NODES, (ring[:4] + 3) % NODES])
    return torch.stack([source, target])


class GCNConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        n = x.size(0)
        loops = torch.arange(n, device=x.device).repeat(2, 1)
        row, col = torch.cat([edge_index, loops], dim=1)
        deg = x.new_zeros(n).scatter_add_(0, col, x.new_ones(col.size(0)))
        deg_inv_sqrt = deg.pow(-0.5)
        deg_inv_sqrt[deg_inv_sqrt == float("inf")] = 0
        norm = deg_inv_sqrt[row] * deg_inv_sqrt[col]
        x = self.lin(x)
        out = torch.zeros_like(x)
        out.index_add_(0, col, norm.view(-1, 1) * x[row])
        return out + self.bias


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(5, 6), GCNConv(6, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.relu(self.conv1(x, edge_index))
        x = F.dropout(x, p=0.5, training=self.training)
        return F.log_softmax(self.conv2(x, edge_index), dim=1)


def segment_softmax(scores: Tensor, index: Tensor, size: int) -> Tensor:
    index = index.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    top = scores.new_full((size, *scores.shape[1:]), float("-inf"))
    top = top.scatter_reduce(0, index, scores, reduce="amax", include_self=False)
    weights = torch.exp(scores - top.gather(0, index))
    total = scores.new_zeros((size, *scores.shape[1:])).scatter_add_(0, index, weights)
    return weights / (total.gather(0, index) + 1e-16)


class GATConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, heads: int) -> None:
        super().__init__()
        self.heads, self.outputs = heads, outputs
        self.W = nn.Linear(inputs, heads * outputs, bias=False)
        self.a_source = nn.Parameter(torch.empty(1, heads, outputs))
        self.a_target = nn.Parameter(torch.empty(1, heads, outputs))
        self.bias = nn.Parameter(torch.zeros(heads * outputs))
        nn.init.xavier_uniform_(self.a_source)
        nn.init.xavier_uniform_(self.a_target)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        n = x.size(0)
        h = self.W(x).view(n, self.heads, self.outputs)
        source, target = edge_index
        scores = (h * self.a_source).sum(-1)[source] + (h * self.a_target).sum(-1)[target]
        weights = segment_softmax(F.leaky_relu(scores, 0.2), target, n)
        out = torch.zeros_like(h).index_add_(0, target, weights.unsqueeze(-1) * h[source])
        return out.flatten(1) + self.bias


class GAT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GATConv(5, 3, 2), GATConv(6, 3, 1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, edge_index)), edge_index)


class MessagePassing(nn.Module):
    """Messages through matrices that a network makes from the edges, a GRU, a gated sum."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.lin0 = nn.Linear(5, width)
        self.edges = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, width * width))
        self.root = nn.Parameter(torch.randn(width, width) * 0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.gru = nn.GRU(width, width)
        self.gate = nn.Linear(width, 1)
        self.lin1, self.lin2 = nn.Linear(width, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> Tensor:
        out = F.relu(self.lin0(x))
        h = out.unsqueeze(0)
        source, target = edge_index
        for _ in range(2):
            matrices = self.edges(edge_attr).view(-1, self.width, self.width)
            messages = torch.bmm(out[source].unsqueeze(1), matrices).squeeze(1)
            total = torch.zeros_like(out)
            total.scatter_add_(0, target.unsqueeze(1).expand_as(messages), messages)
            count = torch.bincount(target, minlength=x.size(0)).clamp(min=1)
            m = F.relu(total / count.unsqueeze(1) + out @ self.root + self.bias)
            out, h = self.gru(m.unsqueeze(0), h)
            out = out.squeeze(0)
        graphs = int(batch.max()) + 1
        weights = segment_softmax(self.gate(out), batch, graphs)
        pooled = out.new_zeros(graphs, self.width).index_add_(0, batch, weights * out)
        return self.lin2(F.relu(self.lin1(pooled))).view(-1)


class SAGEConv(nn.Module):
    """Mean of the neighbours beside the node itself, made a unit vector."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin_l = nn.Linear(inputs, outputs)
        self.lin_r = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        total = torch.zeros(x.size(0), x.size(1), dtype=x.dtype).index_add(0, target, x[source])
        count = torch.zeros(x.size(0)).index_add(0, target, torch.ones(len(target)))
        mean = total / count.clamp(min=1).unsqueeze(-1)
        return F.normalize(self.lin_l(mean) + self.lin_r(x), p=2.0, dim=-1)


class LinkPredictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = SAGEConv(5, 6), SAGEConv(6, 4)

    def forward(self, x: Tensor, edge_index: Tensor, asked: Tensor) -> Tensor:
        z = self.conv2(self.conv1(x, edge_index).relu(), edge_index)
        return (z[asked[0]] * z[asked[1]]).sum(dim=-1)


class GINConv(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(
            nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.mlp((1 + self.eps) * x + torch.sparse.mm(adjacency, x))


class GIN(nn.Module):
    """Jumping knowledge: what every layer says, summed over nodes and put side by side."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.conv1, self.conv2 = GINConv(4, width), GINConv(width, width)
        self.lin = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        ones = torch.ones(edge_index.size(1), dtype=x.dtype)
        size = (x.size(0), x.size(0))
        adjacency = torch.sparse_coo_tensor(edge_index.flip(0), ones, size, check_invariants=False)
        h1 = self.conv1(x, adjacency).relu()
        h2 = self.conv2(h1, adjacency).relu()
        return self.lin(torch.cat([h1.sum(0), h2.sum(0)], dim=-1))


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5))
        self.rho = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, sets: Tensor, sizes: Tensor) -> Tensor:
        inside = torch.arange(sets.size(1))[None, :] < sizes[:, None]
        h = self.phi(sets).masked_fill(~inside.unsqueeze(-1), 0.0)
        return self.rho(h.sum(dim=1) / sizes.unsqueeze(-1))


class TNet(nn.Module):
    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.k = k
        self.conv, self.bn1 = nn.Conv1d(k, 6, 1), nn.BatchNorm1d(6)
        self.fc1, self.bn2 = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.fc2 = nn.Linear(5, k * k)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(x)))
        x = torch.max(x, 2, keepdim=True)[0].view(x.size(0), -1)
        x = self.fc2(F.relu(self.bn2(self.fc1(x))))
        identity = torch.eye(self.k).flatten().view(1, -1).repeat(x.size(0), 1)
        return (x + identity).view(-1, self.k, self.k)


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stn = TNet()
        self.conv1, self.bn1 = nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)
        self.conv2, self.bn2 = nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        turn = self.stn(x)
        x = torch.bmm(x.transpose(2, 1), turn).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.max(self.bn2(self.conv2(x)), 2)[0]
        return F.log_softmax(self.fc(x), dim=1), turn


CASES = (
    Case(
        "graph convolution",
        GCN,
        lambda: call(torch.randn(NODES, 5), graph()),
        symmetries=(trade("conv1.lin.weight conv1.bias", "conv2.lin.weight"),),
        mode="train",
    ),
    Case(
        "graph attention",
        GAT,
        lambda: call(torch.randn(NODES, 5), graph()),
        symmetries=(
            trade("first.W.weight first.bias", "first.a_source first.a_target second.W.weight"),
        ),
        note="the last layer's scores are pinned with its output",
    ),
    Case(
        "messages through edge matrices",
        MessagePassing,
        lambda: call(
            torch.randn(NODES, 5), graph(), torch.randn(18, 2), torch.tensor([0, 0, 0, 1, 1, 1, 1])
        ),
        symmetries=(
            trade("edges.0.*", "edges.2.weight"),
            trade("edges.2.* root bias", "gru.weight_ih_l0"),
            trade("lin1.*", "lin2.weight"),
        ),
        inert=("gate.bias",),
    ),
    Case(
        "link prediction on unit vectors",
        LinkPredictor,
        lambda: call(torch.randn(NODES, 5), graph(), torch.tensor([[0, 1, 2, 5], [3, 4, 6, 6]])),
        symmetries=(
            trade("conv1.lin_l.* conv1.lin_r.weight"),
            trade("conv2.lin_l.* conv2.lin_r.weight"),
        ),
    ),
    Case(
        "graph isomorphism network",
        GIN,
        lambda: call(torch.randn(NODES, 4), graph()),
        symmetries=(
            trade("conv1.mlp.0.weight"),
            trade("conv2.mlp.0.weight"),
            trade("conv1.mlp.1.*", "conv1.mlp.3.weight"),
            trade("conv2.mlp.1.*", "conv2.mlp.3.weight"),
            trade("conv1.mlp.3.* conv2.mlp.3.*", "lin.weight"),
        ),
        spheres=("conv1.mlp.0.weight", "conv2.mlp.0.weight"),
        inert=("conv1.mlp.0.bias", "conv2.mlp.0.bias"),
        granularity={"conv1.mlp.0.weight": "per row", "conv2.mlp.0.weight": "per row"},
        mode="train",
    ),
    Case(
        "sets of different sizes",
        DeepSets,
        lambda: call(torch.randn(3, 5, 3), torch.tensor([5, 2, 3])),
        symmetries=chain("phi.0 phi.2 rho.0 rho.2"),
    ),
    Case(
        "point cloud",
        PointNet,
        lambda: call(torch.randn(5, 3, 6)),
        symmetries=(
            trade("stn.conv.weight"),
            trade("stn.bn1.*"),
            trade("stn.fc1.weight"),
            trade("stn.bn2.*", "stn.fc2.weight"),
            trade("conv1.weight"),
            trade("bn1.*"),
            trade("conv2.weight"),
            trade("bn2.*", "fc.weight"),
        ),
        spheres=("stn.conv.weight", "stn.fc1.weight", "conv1.weight", "conv2.weight"),
        inert=("stn.conv.bias", "stn.fc1.bias", "conv1.bias", "conv2.bias"),
        granularity={"conv1.weight": "per filter", "stn.fc1.weight": "per row"},
        mode="train",
    ),
)
