"""Language models and text classifiers, as tutorials write them."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.tutorials.case import Case, call, tokens, trade


class PositionalEncoding(nn.Module):
    """Sines and cosines, written once and kept as a buffer."""

    def __init__(self, width: int, dropout: float = 0.1, longest: int = 32) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        place = torch.arange(longest).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        pe = torch.zeros(longest, 1, width)
        pe[:, 0, 0::2] = torch.sin(place * rate)
        pe[:, 0, 1::2] = torch.cos(place * rate)
        self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.pe[: x.size(0)])


class WordModel(nn.Module):
    """A causal language model from nn.TransformerEncoder; time comes first."""

    def __init__(self, vocabulary: int = 11, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.width = width
        self.positions = PositionalEncoding(width)
        layer = nn.TransformerEncoderLayer(width, 2, 12, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.embedding = nn.Embedding(vocabulary, width)
        self.decoder = nn.Linear(width, vocabulary)
        self.reset()

    def reset(self) -> None:
        self.embedding.weight.data.uniform_(-0.1, 0.1)
        self.decoder.bias.data.zero_()
        self.decoder.weight.data.uniform_(-0.1, 0.1)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids) * math.sqrt(self.width)
        x = self.positions(x)
        if mask is None:
            mask = nn.Transformer.generate_square_subsequent_mask(len(ids)).to(ids.device)
        return self.decoder(self.encoder(x, mask))


class NewsClassifier(nn.Module):
    """Bags of words of different lengths, one after the other, and where each begins."""

    def __init__(self, vocabulary: int = 20, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocabulary, width, sparse=False)
        self.fc = nn.Linear(width, classes)
        self.init_weights()

    def init_weights(self) -> None:
        self.embedding.weight.data.uniform_(-0.5, 0.5)
        self.fc.weight.data.uniform_(-0.5, 0.5)
        self.fc.bias.data.zero_()

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.fc(self.embedding(text, offsets))


class NameClassifier(nn.Module):
    """A recurrent cell written by hand: letters and memory side by side."""

    def __init__(self, letters: int = 7, hidden: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.i2h = nn.Linear(letters + hidden, hidden)
        self.i2o = nn.Linear(letters + hidden, classes)
        self.softmax = nn.LogSoftmax(dim=1)

    def step(self, letter: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((letter, hidden), 1)
        return self.softmax(self.i2o(both)), self.i2h(both)

    def forward(self, line: Tensor) -> Tensor:
        hidden = torch.zeros(line.size(1), self.hidden_size)
        for i in range(line.size(0)):
            output, hidden = self.step(line[i], hidden)
        return output


class Tagger(nn.Module):
    """An LSTM reads one sentence and names the part of speech of every word."""

    def __init__(self, words: int = 9, tags: int = 3, width: int = 6, hidden: int = 5) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden)
        self.hidden2tag = nn.Linear(hidden, tags)

    def forward(self, sentence: Tensor) -> Tensor:
        embeds = self.word_embeddings(sentence)
        out, _ = self.lstm(embeds.view(len(sentence), 1, -1))
        return F.log_softmax(self.hidden2tag(out.view(len(sentence), -1)), dim=1)


class NGram(nn.Module):
    def __init__(self, words: int = 12, width: int = 5, context: int = 2) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(words, width)
        self.linear1 = nn.Linear(context * width, 8)
        self.linear2 = nn.Linear(8, words)

    def forward(self, context: Tensor) -> Tensor:
        embeds = self.embeddings(context).view((1, -1))
        out = F.relu(self.linear1(embeds))
        return F.log_softmax(self.linear2(out), dim=1)


class SkipGram(nn.Module):
    """Word vectors from negative samples; the loss is what comes out."""

    def __init__(self, words: int = 15, width: int = 6) -> None:
        super().__init__()
        self.center = nn.Embedding(words, width)
        self.outside = nn.Embedding(words, width)

    def forward(self, center: Tensor, outside: Tensor, negatives: Tensor) -> Tensor:
        v, u = self.center(center), self.outside(outside)
        n = self.outside(negatives).neg()
        positive = F.logsigmoid((u * v).sum(1))
        negative = F.logsigmoid(torch.bmm(n, v.unsqueeze(2)).squeeze(2)).sum(1)
        return -(positive + negative).mean()


class BagOfContext(nn.Module):
    """CBOW: the words around one predict it, with one table for reading and a layer for saying."""

    def __init__(self, words: int = 13, width: int = 6) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(words, width, padding_idx=0)
        self.out = nn.Linear(width, words, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        total = self.embeddings(context).sum(dim=1)
        count = (context != 0).sum(dim=1, keepdim=True).clamp(min=1)
        return self.out(total / count)


class Encoder(nn.Module):
    def __init__(self, words: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gru(self.dropout(self.embedding(x)))


class Bahdanau(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.Wa = nn.Linear(hidden, hidden)
        self.Ua = nn.Linear(hidden, hidden)
        self.Va = nn.Linear(hidden, 1)

    def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.Va(torch.tanh(self.Wa(query) + self.Ua(keys)))
        weights = F.softmax(scores.squeeze(2).unsqueeze(1), dim=-1)
        return torch.bmm(weights, keys), weights


class AttentionDecoder(nn.Module):
    """Says one word after the other; without a target it takes its own best guess."""

    def __init__(self, hidden: int, words: int, longest: int = 4) -> None:
        super().__init__()
        self.longest = longest
        self.embedding = nn.Embedding(words, hidden)
        self.attention = Bahdanau(hidden)
        self.gru = nn.GRU(2 * hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, words)

    def forward(self, read: Tensor, hidden: Tensor, target: Tensor | None = None) -> Tensor:
        word = torch.empty(read.size(0), 1, dtype=torch.long, device=read.device).fill_(0)
        said = []
        for i in range(self.longest):
            context, _ = self.attention(hidden.permute(1, 0, 2), read)
            both = torch.cat((self.embedding(word), context), dim=2)
            out, hidden = self.gru(both, hidden)
            logits = self.out(out)
            said.append(logits)
            if target is not None:
                word = target[:, i].unsqueeze(1)
            else:
                word = logits.topk(1)[1].squeeze(-1).detach()
        return F.log_softmax(torch.cat(said, dim=1), dim=-1)


class Translator(nn.Module):
    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.encoder = Encoder(9, hidden)
        self.decoder = AttentionDecoder(hidden, 10)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return self.decoder(*self.encoder(x), target)


class PackedSentiment(nn.Module):
    """A bidirectional LSTM over sentences of different lengths, packed and padded again."""

    def __init__(self, words: int = 12, width: int = 5, hidden: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.rnn = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.fc1 = nn.Linear(4 * hidden, 6)
        self.fc2 = nn.Linear(6, 2)

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(text), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        out, (hidden, _) = self.rnn(packed)
        out, sizes = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        mean = out.sum(dim=1) / sizes.unsqueeze(1)
        last = torch.cat((hidden[-2], hidden[-1]), dim=1)
        return self.fc2(F.relu(self.fc1(torch.cat((mean, last), dim=1))))


def _layer(i: int, after: str) -> tuple[dict[str, int], ...]:
    """Symmetries of a post-norm layer, without what comes from before; ``after`` reads it."""
    name = f"encoder.layers.{i}."
    shrinking, growing = after.split("|")
    return (
        trade(f"{name}norm1.* {name}linear2.*", f"{name}linear1.weight"),
        trade(f"{name}linear1.*", f"{name}linear2.weight"),
        trade(f"{name}norm2.* {growing}", shrinking),
    )


_NEXT = "encoder.layers.1.self_attn.in_proj_weight|encoder.layers.1.self_attn.out_proj.*"
_FIRST = "encoder.layers.0.self_attn."

CASES = (
    Case(
        "word language model",
        WordModel,
        lambda: call(tokens(6, 3, among=11)),
        symmetries=(
            trade(
                f"embedding.weight positions.pe {_FIRST}out_proj.*", f"{_FIRST}in_proj_weight"
            ),
            *_layer(0, _NEXT),
            *_layer(1, "decoder.weight|"),
        ),
        mode="train",
        note="one fused projection of queries and keys: its scores pin it to what it reads",
    ),
    Case(
        "news classifier",
        NewsClassifier,
        lambda: call(tokens(10, among=20), torch.tensor([0, 3, 7])),
        symmetries=(trade("embedding.weight", "fc.weight"),),
        mode="train",
    ),
    Case(
        "names by letters",
        NameClassifier,
        lambda: call(F.one_hot(tokens(5, 2, among=7), 7).float()),
        note="letters of size 1 stand beside the memory and pin it",
    ),
    Case(
        "part-of-speech tagger",
        Tagger,
        lambda: call(tokens(5, among=9)),
        symmetries=(trade("word_embeddings.weight", "lstm.weight_ih_l0"),),
        mode="train",
    ),
    Case(
        "n-gram model",
        NGram,
        lambda: call(tokens(2, among=12)),
        symmetries=(
            trade("embeddings.weight", "linear1.weight"),
            trade("linear1.*", "linear2.weight"),
        ),
    ),
    Case(
        "skip-gram with negative samples",
        SkipGram,
        lambda: call(tokens(4, among=15), tokens(4, among=15), tokens(4, 3, among=15)),
        symmetries=(trade("center.weight", "outside.weight"),),
        mode="train",
    ),
    Case(
        "continuous bag of words",
        BagOfContext,
        lambda: call(tokens(4, 5, among=13)),
        symmetries=(trade("embeddings.weight", "out.weight"),),
    ),
    Case(
        "translation with attention, taught",
        Translator,
        lambda: call(tokens(2, 5, among=9), tokens(2, 4, among=10)),
        symmetries=(trade("encoder.embedding.weight", "encoder.gru.weight_ih_l0"),),
        inert=("decoder.attention.Va.bias",),
        mode="train",
        note="the decoder's table stands beside the encoder's states, which tanh pins",
    ),
    Case(
        "translation with attention, greedy",
        Translator,
        lambda: call(tokens(2, 5, among=9)),
        symmetries=(trade("encoder.embedding.weight", "encoder.gru.weight_ih_l0"),),
        inert=("decoder.attention.Va.bias",),
    ),
    Case(
        "sentiment of packed sentences",
        PackedSentiment,
        lambda: call(1 + tokens(3, 6, among=11), torch.tensor([4, 6, 2])),
        symmetries=(
            trade("embedding.weight", "rnn.weight_ih_l0 rnn.weight_ih_l0_reverse"),
            trade("fc1.*", "fc2.weight"),
        ),
    ),
)  # fmt: skip
