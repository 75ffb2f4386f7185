"""Reference models in plain PyTorch, written from the papers.

They check the JAX models, and `flax_to_onnx.py` exports them to ONNX.
Parameter names equal those of the released checkpoints, so that `load_state_dict(strict=True)`
loads them. Axis letters: jaxvid/models/layers.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from jaxvid.errors import InputError
from jaxvid.models import ModelConfig, family_of
from jaxvid.models.stam import STAMConfig
from jaxvid.models.xvit import XViTConfig

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Apply attention over axis `n` of `(rows, n, d)`: softmax(q·kᵀ / √e)·v."""
    # To (rows k n e), where axis k is the heads.
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def attend_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Apply the same attention with PyTorch's `scaled_dot_product_attention`."""
    # To (rows k n e), where axis k is the heads.
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """Self-attention. The module `mixing` may mix the keys and values of several frames."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool,
        mixing: nn.Module | None = None,
        attend: Attend = attend,
    ):
        super().__init__()
        self.heads, self.mixing, self.attend = heads, mixing, attend
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, num_queries: int | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.mixing is not None:
            k, v = self.mixing(k, v)
        return self.proj(self.attend(q[:, :num_queries], k, v, self.heads))


class Mlp(nn.Module):
    """Two Linear layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, hidden: int, attention: Attention, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn, self.mlp = attention, Mlp(width, hidden)

    def forward(self, x: torch.Tensor, num_queries: int | None = None) -> torch.Tensor:
        x = x[:, :num_queries] + self.attn(self.norm1(x), num_queries)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patch embedding by a strided convolution: `(rows, c, h, w)` → `(rows, n, d)`."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ImageViT(nn.Module):
    """The image ViT that STAM and XViT apply to each frame.

    Attributes:
        last_queries: Number of tokens that the last block computes: 1 (the class token, the only
            one that is used) or None (all, as in the original implementations).
    """

    last_queries: int | None = None

    def __init__(self, cfg: ModelConfig, eps: float, make_attention: Callable[[int], Attention]):
        super().__init__()
        n = (cfg.image_size // cfg.patch_size) ** 2 + 1
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, n, cfg.width))
        hidden = cfg.mlp_ratio * cfg.width
        self.blocks = nn.ModuleList(
            Block(cfg.width, hidden, make_attention(i), eps) for i in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.width, eps=eps)

    def embed(self, video: torch.Tensor) -> torch.Tensor:
        """Return the tokens before the first block: `(b, t, h, w, c)` → `(b·t, n, d)`."""
        frames = video.flatten(0, 1).permute(0, 3, 1, 2)  # (b·t c h w)
        grid = [size // self.patch_embed.proj.stride[0] for size in frames.shape[2:]]
        x = self.patch_embed(frames)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        pos_embed = self.pos_embed
        if grid != [side, side]:
            patches = pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
            patches = patches.permute(0, 2, 3, 1).flatten(1, 2)
            pos_embed = torch.cat([pos_embed[:, :1], patches], dim=1)
        return x + pos_embed

    def frame_features(self, video: torch.Tensor, record: list | None = None) -> torch.Tensor:
        """Return the class tokens `(b, t, d)`; append the output of each block to `record`."""
        x = self.embed(video)
        for i, block in enumerate(self.blocks, 1):
            x = block(x, self.last_queries if i == len(self.blocks) else None)
            if record is not None:
                record.append(x)
        return self.norm(x)[:, 0].unflatten(0, video.shape[:2])


class Aggregate(nn.Module):
    """STAM's transformer over frames, made of PyTorch's own layers."""

    def __init__(self, cfg: STAMConfig):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.num_frames + 1, cfg.width))
        layer = nn.TransformerEncoderLayer(
            cfg.width, cfg.temporal_heads, cfg.temporal_mlp, dropout=cfg.dropout, batch_first=True
        )
        self.transformer_enc = nn.TransformerEncoder(
            layer, cfg.temporal_depth, norm=nn.LayerNorm(cfg.width), enable_nested_tensor=False
        )

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.cls_token.expand(frames.shape[0], -1, -1), frames], dim=1)
        return self.transformer_enc(x + self.pos_embed)[:, 0]


class STAM(ImageViT):
    """STAM. `aggregate` is None if the aggregator is the mean, which has no weights."""

    def __init__(self, cfg: STAMConfig, attend: Attend = attend):
        def make_attention(_: int) -> Attention:
            return Attention(cfg.width, cfg.heads, bias=True, attend=attend)

        super().__init__(cfg, 1e-5, make_attention)
        self.aggregate = Aggregate(cfg) if cfg.aggregator == "transformer" else None
        self.head = nn.Linear(cfg.width, cfg.num_classes)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        frames = self.frame_features(video)
        return self.head(frames.mean(1) if self.aggregate is None else self.aggregate(frames))


class Mixing(nn.Module):
    """Space-time mixing of keys and values; see `jaxvid.models.space_time_mixing`.

    Args:
        cfg: The model config.
        index: Index of the block.
    """

    def __init__(self, cfg: XViTConfig, index: int):
        super().__init__()
        shifts = index in cfg.shift_blocks or not cfg.shift_blocks
        self.shift_keys = shifts and cfg.shift in ("both", "keys")
        self.shift_values = shifts and cfg.shift in ("both", "values")
        self.segment, self.summary_tokens = cfg.shift_segment, cfg.summary_tokens
        self.groups = cfg.heads if cfg.shift_per_head else 1
        self.fold = cfg.width // self.groups // cfg.shift_div

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = []
        for x, shifts in ((k, self.shift_keys), (v, self.shift_values)):
            parts = [self.shift(x) if shifts else x]
            if self.summary_tokens:
                parts.append(self.summarize(x))
            mixed.append(torch.cat(parts, dim=1))
        return mixed[0], mixed[1]

    def shift(self, x: torch.Tensor) -> torch.Tensor:
        """Take some channels of `(b·t, n, d)` from the next and the previous frame."""
        # To (b·segments t n groups channels).
        x = x.unflatten(0, (-1, self.segment)).unflatten(-1, (self.groups, -1))
        following = F.pad(x[:, 1:, ..., : self.fold], (0, 0) * 3 + (0, 1))
        previous = F.pad(x[:, :-1, ..., self.fold : 2 * self.fold], (0, 0) * 3 + (1, 0))
        shifted = torch.cat([following, previous, x[..., 2 * self.fold :]], dim=-1)
        return shifted.flatten(-2).flatten(0, 1)

    def summarize(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean patch tokens of the frames of the segment: `(b·t, segment, d)`."""
        means = x[:, 1:].mean(dim=1).unflatten(0, (-1, 1, self.segment))
        return means.expand(-1, self.segment, -1, -1).flatten(0, 1)


class XViTBackbone(ImageViT):
    """The image ViT with a temporal embedding and space-time mixing."""

    def __init__(self, cfg: XViTConfig, attend: Attend):
        mixes = cfg.shift != "none" or cfg.summary_tokens

        def make_attention(index: int) -> Attention:
            mixing = Mixing(cfg, index) if mixes else None
            return Attention(cfg.width, cfg.heads, bias=True, mixing=mixing, attend=attend)

        super().__init__(cfg, 1e-6, make_attention)
        if cfg.temporal_embedding_frames:
            shape = (1, cfg.temporal_embedding_frames, 1, cfg.width)
            self.temp_embed = nn.Parameter(torch.zeros(shape))

    def embed(self, video: torch.Tensor) -> torch.Tensor:
        x = super().embed(video)
        if not hasattr(self, "temp_embed"):
            return x
        repeats = video.shape[1] // self.temp_embed.shape[1]
        x = x.unflatten(0, video.shape[:2])  # (b t n d)
        return (x + self.temp_embed.repeat(1, repeats, 1, 1)).flatten(0, 1)


class Consensus(nn.Module):
    """XViT's head: temporal attention over the frames' class tokens, and a classifier."""

    def __init__(self, cfg: XViTConfig):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.temporal_encoder = nn.ModuleList(
            Block(
                cfg.width,
                cfg.mlp_ratio * cfg.width,
                Attention(cfg.width, cfg.heads, bias=False),
                1e-5,
            )
            for _ in range(cfg.head_depth)
        )
        self.mlp_head = nn.Sequential(
            nn.LayerNorm(cfg.width),
            nn.Linear(cfg.width, cfg.width),
            nn.GELU(),
            nn.Dropout(cfg.dropout),
            nn.Linear(cfg.width, cfg.num_classes),
        )

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.cls_token.expand(frames.shape[0], -1, -1), frames], dim=1)
        for block in self.temporal_encoder:
            x = block(x)
        return self.mlp_head(x[:, 0])


class XViT(nn.Module):
    """XViT. The layer `new_fc` is in all checkpoints, but only the head `mean` uses it."""

    def __init__(self, cfg: XViTConfig, attend: Attend = attend):
        super().__init__()
        self.base_model = XViTBackbone(cfg, attend)
        self.dropout = nn.Dropout(cfg.dropout)
        self.new_fc = nn.Linear(cfg.width, cfg.num_classes)
        self.consensus = Consensus(cfg) if cfg.head == "attention" else None

    def frame_features(self, video: torch.Tensor, record: list | None = None) -> torch.Tensor:
        """Return the class tokens `(b, t, d)`; append the output of each block to `record`."""
        return self.base_model.frame_features(video, record)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        frames = self.dropout(self.frame_features(video))
        return self.new_fc(frames.mean(1)) if self.consensus is None else self.consensus(frames)


# Family → function `(config, attend)` that returns a module.
REFERENCES = {"stam": STAM, "xvit": XViT}


def build_reference(config: ModelConfig, *, fused: bool = False) -> nn.Module:
    """Return the PyTorch model of a config, in evaluation mode.

    Args:
        config: The model config.
        fused: Use PyTorch's fused attention kernel (`attend_fused`) instead of `attend`.

    Raises:
        InputError: The family has no reference.
    """
    family = family_of(config)
    if family.name not in REFERENCES:
        raise InputError(f"{config.name}: the family {family.name} has no PyTorch reference")
    return REFERENCES[family.name](config, attend_fused if fused else attend).eval()
