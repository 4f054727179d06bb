"""A small vision transformer and two sets of images to train it on, for the examples beside it."""

import argparse
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FASHION = Path("/usr/share/datasets/fashion-mnist")


class Attention(nn.Module):
    """Softmax self-attention with one packed projection, as ViTs have it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,N,C] -> [B,N,C]."""
        batch, tokens, dim = x.shape
        packed = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        y = F.scaled_dot_product_attention(*packed.permute(2, 0, 3, 1, 4).unbind(0))
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))


class Feed(nn.Sequential):
    """The feed-forward layer of a transformer: linear, GELU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class Block(nn.Module):
    """feed: makes the feed-forward layer of a width."""

    def __init__(self, dim: int, heads: int, feed: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), feed(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Square grey images [B,S,S] -> 10 logits; tokens are square patches and a class token."""

    def __init__(
        self,
        size: int,
        patch: int,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        feed: Callable[[int], nn.Module] = Feed,
    ) -> None:
        super().__init__()
        self.patch, self.side = patch, size // patch
        self.embed = nn.Linear(patch * patch, dim)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, self.side**2 + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, feed) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        batch, side, patch = images.shape[0], self.side, self.patch
        patches = images.view(batch, side, patch, side, patch).permute(0, 1, 3, 2, 4)
        tokens = self.embed(patches.reshape(batch, side * side, patch * patch))
        tokens = torch.cat((self.cls.expand(batch, -1, -1), tokens), 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


@dataclass(frozen=True, slots=True)
class Data:
    """Images fp32 [n,S,S] about zero and labels [n], for training and for the table."""

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    patch: int
    batch: int


def digits() -> Data:
    """scikit-learn's 1797 digits of 8 x 8: 1437 to train on, 360 to test on, by a fixed draw."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(
            "--data digits needs scikit-learn: pip install 'ridgeline[examples]'"
        ) from None
    found = load_digits()
    images, labels = torch.tensor(found.images).float() / 16 - 0.3, torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Data("digits", images[train], labels[train], images[test], labels[test], 2, 96)


def fashion(folder: Path) -> Data:
    """Fashion-MNIST: 60000 images of 28 x 28 to train on, 10000 to test on."""

    def read(name: str) -> Tensor:
        path = folder / f"{name}.gz"
        if not path.exists():
            raise SystemExit(
                f"no {path}: install Debian's package dataset-fashion-mnist (apt install"
                " dataset-fashion-mnist), or name the folder of the four idx.gz files with"
                " --fashion-path, or run with --data digits"
            )
        raw = bytearray(gzip.decompress(path.read_bytes()))
        return torch.frombuffer(raw, dtype=torch.uint8)

    def pair(part: str) -> tuple[Tensor, Tensor]:
        images = read(f"{part}-images-idx3-ubyte")[16:].view(-1, 28, 28).float() / 255 - 0.286
        return images / 0.353, read(f"{part}-labels-idx1-ubyte")[8:].long()

    return Data("Fashion-MNIST", *pair("train"), *pair("t10k"), 7, 128)


def batches(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch, shuffled; half of the batches are moved by up to a pixel."""
    for chosen in torch.randperm(len(data.images)).split(data.batch):
        images = data.images[chosen]
        if torch.rand(()) < 0.5:
            images = images.roll(torch.randint(-1, 2, (2,)).tolist(), (1, 2))
        yield images, data.labels[chosen]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which sets, and where Fashion-MNIST lies."""
    parser.add_argument("--data", choices=("digits", "fashion", "both"), default="both")
    parser.add_argument("--fashion-path", type=Path, default=FASHION, help="the four idx.gz files")


def chosen(options: argparse.Namespace) -> list[Data]:
    """The sets that were asked for."""
    loaders = {"digits": digits, "fashion": lambda: fashion(options.fashion_path)}
    return [load() for name, load in loaders.items() if options.data in (name, "both")]
