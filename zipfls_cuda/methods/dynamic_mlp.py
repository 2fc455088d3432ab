"""Dynamic MLP: a head that fuses pooled features with metadata, such as place and date of a picture."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks

KINDS = ("a", "b", "c")


class DynamicMLP(nn.Module):
    """Features (N, D) and metadata (N, K) to features (N, D): a residual whose matrices depend on the sample.

    h = location network of the metadata (N, d), g = linear(features) (N, d); then ``blocks`` blocks of widths
    d, hidden, ..., hidden, d; the result is features + LayerNorm(linear(g)). A block multiplies by a matrix M
    of each sample's own: in kind "a" g becomes ReLU(LN(g M(h))), with M linear; in "b" ReLU(LN(l(g) M(h))),
    l and M two linear layers each with a ReLU between, and then ReLU(LN(linear)); "c" is "b" with l and M of
    [g, h] both. It stands between pooling and classifier; ``zls.attach`` lets such a model vote.

    The authors train with label smoothing of 0.1 and mixup of 0.4 of images and metadata both. Weights beside
    the location network's 0.6 M, for D = 2048: 9.5 M ("a"), 6.6 M ("b"), 6.8 M ("c").

    Args:
        in_features: D.
        metadata_dim: K; 6 for what ``encode_metadata`` gives of place and date.
        d: width of g and h.
        hidden: width between blocks.
        blocks: >= 1.
        kind: "a", "b" or "c".
        width: of the location network.

    Raises:
        TypeError, ValueError: a bad argument, by name; features and metadata of other shapes.

    Example:
        >>> fuse, fc = zls.methods.DynamicMLP(512, 6), torch.nn.Linear(512, 10)
        >>> features, metadata = torch.randn(8, 512), torch.randn(8, 6)
        >>> fc(fuse(features, metadata)).shape
        torch.Size([8, 10])

    Source: Yang et al., CVPR 2022; the authors' code.
    """

    def __init__(
        self,
        in_features: int,
        metadata_dim: int,
        *,
        d: int = 256,
        hidden: int = 64,
        blocks: int = 2,
        kind: str = "c",
        width: int = 256,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "metadata_dim": metadata_dim, "d": d, "hidden": hidden}
        sizes |= {"blocks": blocks, "width": width}
        for name, x in sizes.items():
            setattr(self, name if name != "blocks" else "num_blocks", checks.count(name, x, 1))
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        pairs = [Pair(width) for _ in range(4)]
        self.location = nn.Sequential(
            nn.Linear(metadata_dim, width), nn.ReLU(), *pairs, nn.Linear(width, d, bias=False)
        )
        self.reduce = nn.Linear(in_features, d)
        widths = [d, *[hidden] * (blocks - 1), d]
        self.blocks = nn.ModuleList(Block(a, b, d, kind) for a, b in itertools.pairwise(widths))
        self.expand = nn.Linear(d, in_features)
        self.norm = nn.LayerNorm(in_features)

    def forward(self, features: Tensor, metadata: Tensor) -> Tensor:
        """Fused features (N, D)."""
        for name, x, size in (
            ("features", features, self.in_features),
            ("metadata", metadata, self.metadata_dim),
        ):
            if x.dim() != 2 or x.shape[1] != size:
                raise ValueError(f"{name} must have shape (N, {size}), got {tuple(x.shape)}")
        if len(metadata) != len(features):
            raise ValueError(
                f"metadata must have a row for each of the {len(features)} features, got {len(metadata)}"
            )
        h = self.location(metadata.to(self.reduce.weight.dtype))
        g = self.reduce(features)
        for block in self.blocks:
            g = block(g, h)
        return features + self.norm(self.expand(g))

    def extra_repr(self) -> str:
        """The settings shown by repr."""
        return f"{self.in_features}, {self.metadata_dim}, kind={self.kind!r}"


class Pair(nn.Module):
    """Two linear layers around a dropout, each with a ReLU after it, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(width, width), nn.Dropout(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.second(self.dropout(F.relu(self.first(x)))))


class Block(nn.Module):
    """g (N, n) and h (N, d) to (N, m), by a matrix (n, m) of each sample's own."""

    def __init__(self, n: int, m: int, d: int, kind: str) -> None:
        super().__init__()
        self.shape, self.kind = (n, m), kind
        if kind == "a":
            self.left, self.matrix = nn.Identity(), nn.Linear(d, n * m)
        else:
            left, right = (n, d) if kind == "b" else (n + d, n + d)
            self.left = nn.Sequential(nn.Linear(left, n), nn.ReLU(), nn.Linear(n, n))
            self.matrix = nn.Sequential(nn.Linear(right, n), nn.ReLU(), nn.Linear(n, n * m))
        self.norm = nn.LayerNorm(m)
        after = () if kind == "a" else (nn.Linear(m, m, bias=False), nn.LayerNorm(m), nn.ReLU())
        self.after = nn.Sequential(*after)

    def forward(self, g: Tensor, h: Tensor) -> Tensor:
        left, right = (g, h) if self.kind != "c" else [torch.cat([g, h], 1)] * 2
        product = self.left(left).unsqueeze(1) @ self.matrix(right).view(-1, *self.shape)  # (N, 1, m)
        return self.after(F.relu(self.norm(product.squeeze(1))))


Dates = Sequence[str | datetime.date | None]


def encode_metadata(
    lat: Tensor | Sequence[float | None] | None,
    lng: Tensor | Sequence[float | None] | None,
    date: Dates | Tensor | None,
) -> Tensor:
    """Place and date of pictures as numbers for DynamicMLP: (sin pi x, cos pi x), x each scaled to [-1, 1].

    x = (lat / 90, lng / 180, 2 day / days - 1), day of the year from 1 and days that the year has. A sample
    of which anything is missing (None, NaN) is all 0. No derivative.

    Args:
        lat, lng: (N,) degrees; both None without places.
        date: N dates, as datetime.date or text "YYYY-MM-DD" (what follows is not read); or a tensor (N,) of
            x itself. None without dates.

    Returns:
        (N, 6) float32; (N, 4) without dates, (N, 2) without places.

    Raises:
        TypeError, ValueError: a bad argument, by name; neither places nor dates.

    Example:
        >>> zls.methods.encode_metadata([0.0, None], [90.0, 0.0], ["2020-12-31", "2021-01-01"])
        tensor([[ 0.0000e+00,  1.0000e+00,  1.2246e-16,  1.0000e+00,  6.1232e-17, -1.0000e+00],
                [ 0.0000e+00,  0.0000e+00,  0.0000e+00,  0.0000e+00,  0.0000e+00,  0.0000e+00]])

    Source: Yang et al., CVPR 2022; the authors' code.
    """
    if (lat is None) != (lng is None):
        raise ValueError("lat and lng must be given together, or both be None")
    columns = {} if lat is None else {"lat": _column("lat", lat) / 90, "lng": _column("lng", lng) / 180}
    if date is not None:
        dates = date if isinstance(date, Tensor) else [_ratio(d) for d in date]
        columns["date"] = _column("date", dates)
    if not columns:
        raise ValueError("lat, lng and date must not all be None")
    lengths = {name: len(x) for name, x in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{', '.join(columns)} must have one length, got {', '.join(map(str, lengths.values()))}"
        )
    x = torch.stack(list(columns.values()), 1) * math.pi  # (N, 3) float64
    encoded = torch.cat([x.sin(), x.cos()], 1)
    return torch.where(encoded.isnan().any(1, keepdim=True), 0.0, encoded).float()


def _column(name: str, x: Tensor | Sequence[float | None]) -> Tensor:
    """(N,) float64, NaN for None."""
    if not isinstance(x, Tensor):
        x = torch.tensor([math.nan if v is None else float(v) for v in x], dtype=torch.float64)
    if x.dim() != 1:
        raise ValueError(f"{name} must have shape (N,), got {tuple(x.shape)}")
    return x.detach().double()


def _ratio(date: str | datetime.date | None) -> float:
    """2 day / days - 1; NaN for None."""
    if date is None:
        return math.nan
    if isinstance(date, str):
        try:
            date = datetime.date.fromisoformat(date[:10])
        except ValueError as error:
            raise ValueError(f"date must be YYYY-MM-DD, got {date!r}") from error
    if not isinstance(date, datetime.date):
        raise TypeError(f"date must hold dates or text YYYY-MM-DD, got {type(date).__name__}")
    days = datetime.date(date.year, 12, 31).timetuple().tm_yday
    return 2 * date.timetuple().tm_yday / days - 1
