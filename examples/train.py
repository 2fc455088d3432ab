"""Train a classifier with Zipf's Label Smoothing: a plain script to copy from.

    python examples/train.py                  # the handwritten digits of scikit-learn
    python examples/train.py --data FOLDER    # your images: FOLDER/train/CLASS/*, FOLDER/val/CLASS/*
    python examples/train.py --zipf-weight 0  # plain cross-entropy, for comparison

The lines marked (1) and (2) are all that differs from training with cross-entropy. docs/RECIPES.md has the
loops of timm, torchvision, Lightning and Hugging Face; experiments/ compares losses over several seeds.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import zipfls_cuda as zls


class Folder(Dataset):
    """Images of ROOT/CLASS/: pairs of (3, size, size) float32 from -1 to 1, and class."""

    def __init__(self, root: Path, size: int, classes: list[str]):
        self.size = size
        self.files = [(f, i) for i, name in enumerate(classes) for f in sorted((root / name).glob("[!.]*"))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, label = self.files[index]
        image = Image.open(file)
        if image.mode[0] in "IF":  # Pillow would clip it
            raise ValueError(f"{file} has more than 8 bits a channel: convert it first")
        image = ImageOps.fit(image.convert("RGB"), (self.size, self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1, label


def digits(size: int) -> tuple[Dataset, Dataset, int]:
    """1797 images in 10 classes, every fourth for testing."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images, labels = F.interpolate(images, size=(size, size)), torch.from_numpy(data.target)
    test = torch.arange(len(labels)) % 4 == 0
    return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test]), 10


class Net(nn.Module):
    """A small convolutional network; docs/ATTACH.md has the others that `attach` was tested with."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        layers = []
        for inputs, outputs, stride in ((channels, 32, 1), (32, 64, 2), (64, 128, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images)  # (N, 128, size/4, size/4): every position of this map votes
        return self.fc(features.mean((2, 3)))


def accuracy(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """The share of images whose class has the largest logit."""
    model.eval()
    with torch.no_grad():
        right = [model(images.to(device)).argmax(1).cpu() == labels for images, labels in loader]
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Train, and print the accuracy after every epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/ and val/CLASS/ (default: digits)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--zipf-weight", type=float, default=0.1)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.data:
        classes = sorted(f.name for f in (args.data / "train").glob("[!.]*") if f.is_dir())
        train, test = (Folder(args.data / part, args.size, classes) for part in ("train", "val"))
        if len(classes) < 2 or not len(train) or not len(test):
            parser.error(f"argument --data: {args.data} needs images in train/CLASS/ and val/CLASS/")
        channels, num_classes = 3, len(classes)
    else:
        (train, test, num_classes), channels = digits(args.size), 1
    train_loader = DataLoader(train, args.batch_size, shuffle=True)
    test_loader = DataLoader(test, args.batch_size)

    torch.manual_seed(0)
    model = Net(channels, num_classes).to(device)
    handle = zls.attach(model, feature="features", classifier="fc")  # (1)
    criterion = zls.ZipfLoss(zipf_weight=args.zipf_weight, votes=handle)  # (2)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = args.epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for images, labels in train_loader:
            loss = criterion(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch}/{args.epochs}  test accuracy {accuracy(model, test_loader, device):.2%}")


if __name__ == "__main__":
    main()
