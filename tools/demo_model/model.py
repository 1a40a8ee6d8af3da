"""The network: Whisper's architecture at a small size, over a compact vocabulary.

Token ids here are compact (see `vocabulary.TokenIds`): the last row of the embedding stands for
every id of Whisper's vocabulary that training never shows.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

ENCODER_POSITIONS = 1500
DECODER_POSITIONS = 448


@dataclass(frozen=True)
class Shape:
    """Heads are always 64 wide, as in every Whisper model."""

    width: int = 128
    encoder_layers: int = 4
    decoder_layers: int = 4
    tokens: int = 1213

    @property
    def heads(self) -> int:
        return self.width // 64


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's fixed encoder positions."""
    step = math.log(10000) / (width // 2 - 1)
    rates = torch.exp(-step * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SelfAttention(nn.Module):
    def __init__(self, shape: Shape, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = shape.heads, causal
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        if self.causal:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # on CPUs with bfloat16, 1.25 times faster than the fused function
            y = (q * 0.125 @ k.transpose(-1, -2)).softmax(-1, dtype=q.dtype) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class CrossAttention(nn.Module):
    """Attention from text to sound; also returns its log weights [batch, heads, text, sound]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q = nn.Linear(shape.width, shape.width)
        self.kv = nn.Linear(shape.width, 2 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.heads, 64).transpose(1, 2)
        k, v = self.kv(sound).view(batch, -1, 2, self.heads, 64).permute(2, 0, 3, 1, 4)
        log_weights = (q @ k.transpose(-1, -2) * 0.125).float().log_softmax(-1)
        y = log_weights.exp().to(v.dtype) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width)), log_weights


class FeedForward(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width)
        self.attention = SelfAttention(shape, causal=False)
        self.forward_norm = nn.LayerNorm(shape.width)
        self.feed_forward = FeedForward(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.forward_norm(x))


class DecoderLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width)
        self.attention = SelfAttention(shape, causal=True)
        self.cross_norm = nn.LayerNorm(shape.width)
        self.cross = CrossAttention(shape)
        self.forward_norm = nn.LayerNorm(shape.width)
        self.feed_forward = FeedForward(shape.width)

    def forward(self, x: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x))
        y, log_weights = self.cross(self.cross_norm(x), sound)
        x = x + y
        return x + self.feed_forward(self.forward_norm(x)), log_weights


class Encoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(80, shape.width, 3, padding=1)
        self.conv2 = nn.Conv1d(shape.width, shape.width, 3, stride=2, padding=1)
        self.register_buffer(
            "positions", sinusoids(ENCODER_POSITIONS, shape.width), persistent=False
        )
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.encoder_layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, mel: Tensor, first_positions: Tensor) -> Tensor:
        """`mel` is [batch, 80, frames]; a window may start at any of the 1500 positions."""
        x = functional.gelu(self.conv2(functional.gelu(self.conv1(mel)))).transpose(1, 2)
        x = x + self.positions[first_positions[:, None] + torch.arange(x.shape[1])]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(shape.tokens, shape.width) * 0.02)
        self.positions = nn.Parameter(torch.randn(DECODER_POSITIONS, shape.width) * 0.02)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.decoder_layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor, sound: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last hidden states and each layer's log cross-attention."""
        x = self.embedding[tokens] + self.positions[: tokens.shape[1]]
        attentions = []
        for layer in self.layers:
            x, log_weights = layer(x, sound)
            attentions.append(log_weights)
        return self.norm(x), attentions


class DemoModel(nn.Module):
    """Whisper plus a CTC head on the encoder, which only training uses."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        self.ctc = nn.Linear(shape.width, shape.width + 1)

    def ctc_logits(self, sound: Tensor) -> Tensor:
        """Logits over compact ids, the blank last.

        The head shares the decoder's embedding, so that what the encoder makes of a word is close
        to the word's token: cross-attention then finds spoken words by likeness.
        """
        projected = self.ctc(sound)
        tokens = projected[..., :-1] @ self.decoder.embedding[:-1].T
        return torch.cat([tokens, projected[..., -1:]], dim=-1).float()

    def logits(self, hidden: Tensor, unused_tokens: int) -> Tensor:
        """Logits over compact ids; the shared one counts for all `unused_tokens`."""
        logits = hidden @ self.decoder.embedding.T
        count = torch.zeros(self.shape.tokens)
        count[-1] = math.log(unused_tokens)
        return logits.float() + count


def save(model: DemoModel, file: Path, **more: object) -> None:
    """Writes the weights as float16 with the shape, first to a file beside it, then in place."""
    state = {name: value.half() for name, value in model.state_dict().items()}
    partial = file.with_suffix(".partial")
    torch.save({"shape": asdict(model.shape), "model": state, **more}, partial)
    partial.replace(file)


def load(file: Path) -> DemoModel:
    checkpoint = torch.load(file)
    model = DemoModel(Shape(**checkpoint["shape"]))
    model.load_state_dict({name: v.float() for name, v in checkpoint["model"].items()})
    return model
