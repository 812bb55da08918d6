"""Unit vectors and losses: metric learning, contrast, self-distillation."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.tutorials.case import Case, call, chain, tokens, trade


class Siamese(nn.Module):
    """Two pictures through one network; near if they show the same."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.fc = nn.Linear(4 * 3 * 3, 5)

    def embed(self, x: Tensor) -> Tensor:
        return F.normalize(self.fc(self.net(x)), p=2, dim=1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 1 - (self.embed(a) * self.embed(b)).sum(dim=1)


class PairClassifier(nn.Module):
    """The difference of two embeddings decides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
        self.fc = nn.Linear(4, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(torch.abs(self.embed(a) - self.embed(b))))


class TripletLoss(nn.Module):
    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
        self.loss = nn.TripletMarginLoss(margin=margin)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return self.loss(self.embed(anchor), self.embed(positive), self.embed(negative))


class CosineClassifier(nn.Module):
    """Directions of classes against the direction of the picture."""

    def __init__(self, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, width))
        self.weight = nn.Parameter(torch.randn(classes, width))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.features(x), dim=-1)
        return self.scale * F.linear(x, F.normalize(self.weight, dim=-1))


class ArcFace(nn.Module):
    """An angle is added to the right class before the softmax; the loss comes out."""

    def __init__(self, width: int = 6, classes: int = 5, s: float = 8.0, m: float = 0.5) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(7, 8, bias=False), nn.BatchNorm1d(8), nn.PReLU(8), nn.Linear(8, width)
        )
        self.weight = nn.Parameter(torch.empty(classes, width))
        nn.init.xavier_uniform_(self.weight)
        self.s, self.cos_m, self.sin_m = s, math.cos(m), math.sin(m)
        self.th, self.mm = math.cos(math.pi - m), math.sin(math.pi - m) * m

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(self.backbone(x)), F.normalize(self.weight))
        sine = torch.sqrt((1.0 - torch.pow(cosine, 2)).clamp(0, 1))
        phi = cosine * self.cos_m - sine * self.sin_m
        phi = torch.where(cosine > self.th, phi, cosine - self.mm)
        one_hot = torch.zeros(cosine.size(), device=x.device)
        one_hot.scatter_(1, label.view(-1, 1).long(), 1)
        output = (one_hot * phi) + ((1.0 - one_hot) * cosine)
        return F.cross_entropy(output * self.s, label)


class SimCLR(nn.Module):
    """Two views of each picture have to find each other in the batch."""

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.projection = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
        self.temperature = temperature

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        z = F.normalize(self.projection(self.encoder(torch.cat([one, two], dim=0))), dim=1)
        similarity = torch.matmul(z, z.T)
        labels = torch.cat([torch.arange(len(one)) for _ in range(2)], dim=0)
        labels = (labels.unsqueeze(0) == labels.unsqueeze(1)).float()
        mask = torch.eye(labels.shape[0], dtype=torch.bool)
        labels = labels[~mask].view(labels.shape[0], -1)
        similarity = similarity[~mask].view(similarity.shape[0], -1)
        positives = similarity[labels.bool()].view(labels.shape[0], -1)
        negatives = similarity[~labels.bool()].view(similarity.shape[0], -1)
        logits = torch.cat([positives, negatives], dim=1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long))


class BYOL(nn.Module):
    """A student predicts a slowly moving teacher, through which no gradient goes."""

    def __init__(self, tau: float = 0.99) -> None:
        super().__init__()
        self.online = nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 4)
        )
        self.predictor = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
        self.target = copy.deepcopy(self.online)
        for p in self.target.parameters():
            p.requires_grad = False
        self.tau = tau

    @torch.no_grad()
    def update(self) -> None:
        for slow, p in zip(self.target.parameters(), self.online.parameters(), strict=True):
            slow.data = slow.data * self.tau + p.data * (1 - self.tau)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        p = F.normalize(self.predictor(self.online(one)), dim=-1)
        with torch.no_grad():
            z = F.normalize(self.target(two), dim=-1)
        return (2 - 2 * (p * z.detach()).sum(dim=-1)).mean()


class Distilled(nn.Module):
    """Cross entropy with class weights, and what a frozen teacher says, softened."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        self.teacher = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        self.register_buffer("class_weight", torch.tensor([1.0, 2.0, 0.5]), persistent=False)

    def forward(self, x: Tensor, y: Tensor, T: float = 2.0, alpha: float = 0.5) -> Tensor:
        logits = self.student(x)
        with torch.no_grad():
            soft = F.softmax(self.teacher(x) / T, dim=-1)
        hard = F.cross_entropy(logits, y, weight=self.class_weight, label_smoothing=0.1)
        kl = F.kl_div(F.log_softmax(logits / T, dim=-1), soft, reduction="batchmean")
        return alpha * hard + (1 - alpha) * T * T * kl


CASES = (
    Case(
        "siamese, unit vectors",
        Siamese,
        lambda: call(torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)),
        symmetries=(trade("net.0.*", "fc.weight"), trade("fc.*")),
    ),
    Case(
        "pair classifier",
        PairClassifier,
        lambda: call(torch.randn(3, 5), torch.randn(3, 5)),
        symmetries=(trade("embed.0.*", "embed.2.weight"), trade("embed.2.weight", "fc.weight")),
        inert=("embed.2.bias",),
        note="the bias of the embedding is the same in both and cancels",
    ),
    Case(
        "triplet loss",
        TripletLoss,
        lambda: call(torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5)),
        symmetries=(trade("embed.0.*", "embed.2.weight"),),
        inert=("embed.2.bias",),
        mode="train",
        note="the margin is a length",
    ),
    Case(
        "cosine classifier",
        CosineClassifier,
        lambda: call(torch.randn(4, 5)),
        symmetries=(
            trade("features.0.*", "features.2.weight"),
            trade("features.2.*"),
            trade("weight"),
        ),
        spheres=("weight",),
        granularity={"weight": "per row"},
    ),
    Case(
        "additive angular margin",
        ArcFace,
        lambda: call(torch.randn(6, 7), torch.tensor([0, 1, 2, 3, 4, 1])),
        symmetries=(
            trade("backbone.0.weight"),
            trade("backbone.1.*", "backbone.3.weight"),
            trade("backbone.3.*"),
            trade("weight"),
        ),
        spheres=("backbone.0.weight", "weight"),
        granularity={"backbone.0.weight": "per row", "weight": "per row"},
        mode="train",
        note="slopes of PReLU are numbers",
    ),
    Case(
        "contrastive loss of two views",
        SimCLR,
        lambda: call(torch.randn(4, 6), torch.randn(4, 6)),
        symmetries=(
            *chain("encoder.0 encoder.2 projection.0 projection.2"),
            trade("projection.2.weight"),
        ),
        spheres=("projection.2.weight",),
        granularity={"projection.2.weight": "whole tensor"},
        mode="train",
    ),
    Case(
        "student and slow teacher",
        BYOL,
        lambda: call(torch.randn(6, 5), torch.randn(6, 5)),
        symmetries=(
            trade("online.0.weight"),
            *chain("online.1 online.3 predictor.0 predictor.2"),
            trade("predictor.2.*"),
            trade("target.0.weight"),
            trade("target.1.*", "target.3.weight"),
            trade("target.3.*"),
        ),
        spheres=("online.0.weight", "target.0.weight"),
        inert=("online.0.bias", "target.0.bias"),
        mode="train",
        note="no gradient reaches the teacher, and yet its direction decides",
    ),
    Case(
        "distillation with class weights",
        Distilled,
        lambda: call(torch.randn(4, 5), tokens(4, among=3)),
        symmetries=(
            trade("student.0.*", "student.2.weight"),
            trade("teacher.0.*", "teacher.2.weight"),
        ),
        mode="train",
    ),
)
