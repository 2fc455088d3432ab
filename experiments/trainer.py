"""Train one network with one loss: batches, epochs, checkpoints from which a run goes on exactly."""

import argparse
import json
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Sampler
from tqdm import tqdm

import zipfls_cuda as zls

from .common import Place, UsageError, atomic_file
from .data import Data, DataError, Split
from .methods import Method, teacher_of, wants
from .model import attach_votes, make_loss, make_network


class Loader:
    """Shuffled, augmented and normalised batches of this process.

    One generator draws order and augmentation of whole batches in every process, and each takes
    every `processes`-th image of them: what is drawn does not depend on how many there are, and the
    generator's state is all a checkpoint must hold. An incomplete last batch is left out.

    `wanted` is what a method takes: two views of each image come one batch after the other, and so do
    images and their partners of the same class.
    """

    def __init__(self, data: Data, batch_size: int, seed: int, place: Place, wanted: frozenset = frozenset()):
        self.images = data.train.images.to(place.device)
        self.labels = data.train.labels.to(place.device)
        whole = min(batch_size, len(self.labels))
        self.batch_size = whole - whole % place.processes
        if not self.batch_size:
            raise DataError(f"{whole} training images are too few for {place.processes} processes")
        self.place, self.augmentation = place, data.distortions or Crops(data.mirror)
        self.generator = torch.Generator().manual_seed(seed)
        self.mean, self.std = (x.to(place.device) for x in data.mean_and_std)
        self.views = 2 if "logits_a" in wanted else 1
        self.pairs: Sampler | None = None
        if "partner_logits" in wanted:
            options = {"generator": self.generator, "num_replicas": 1, "rank": 0}
            self.pairs = zls.methods.PairSampler(self.labels, self.batch_size, **options)

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield images (n, channels, H, W) float32, or (2 n, ...), labels and indices (n,) int64."""
        for batch in self.batches():
            drawn = [self.draw(index) for index in batch]
            images, index = torch.cat([images for images, _ in drawn]), drawn[0][1]
            yield normalise(images, self.mean, self.std), self.labels[index], index

    def batches(self) -> Iterator[list[torch.Tensor]]:
        """Indices (batch_size,) of the images of each batch, and of what comes after them."""
        if self.pairs:
            whole = (batch for batch in self.pairs if len(batch) == 2 * self.batch_size)
            yield from (list(torch.tensor(batch).chunk(2)) for batch in whole)
            return
        order = torch.randperm(len(self.labels), generator=self.generator)
        for index in order[: len(self) * self.batch_size].view(len(self), self.batch_size):
            yield [index] * self.views

    def draw(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's images of a batch, augmented, and their indices."""
        mine = slice(self.place.rank, None, self.place.processes)
        drawn = self.augmentation.draw(self.batch_size, self.images.shape[1:], self.generator)
        index, *drawn = (x[mine].to(self.place.device) for x in (index, *drawn))
        return self.augmentation.apply(self.images[index], *drawn), index


@dataclass
class Crops:
    """Images padded by an eighth and cut at random, flipped at random where that keeps the class."""

    mirror: bool

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """What is random about `count` images of a shape: corners (count, 2) int64, flips (count,) bool."""
        corner = torch.randint(2 * (shape[-1] // 8) + 1, (2, count), generator=generator)
        return corner.T, (torch.rand(count, generator=generator) < 0.5) & self.mirror

    def apply(self, images: torch.Tensor, corner: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
        """Crop images (n, channels, size, size) uint8 as drawn."""
        return crop(images, corner.T, mirror, images.shape[-1] // 8)


def crop(images: torch.Tensor, corner: torch.Tensor, mirror: torch.Tensor, margin: int) -> torch.Tensor:
    """Pad images by `margin`, cut each at its own corner, and flip those marked.

    Args:
        images: (n, channels, size, size) uint8.
        corner: (2, n) int64, row and column from 0 to 2 * margin.
        mirror: (n,) bool.
    """
    size = images.shape[-1]
    padded = F.pad(images, (margin,) * 4)
    along = torch.arange(size, device=images.device)
    row = corner[0, :, None] + along
    column = corner[1, :, None] + torch.where(mirror[:, None], along.flip(0), along)
    n = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[n, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Bytes to floats of mean 0 and deviation 1, channels last in memory."""
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


class Trainer:
    """A network, the loss it is trained with, and all that a checkpoint must hold of them."""

    def __init__(self, loss: str, seed: int, data: Data, args: argparse.Namespace, place: Place):
        self.place, self.amp = place, args.amp
        wanted = frozenset(wants(loss))
        self.loader = Loader(data, args.batch_size, seed, place, wanted)
        self.num_classes = len(data.classes)
        torch.manual_seed(seed)  # equal seeds, equal weights, whatever the loss
        shape = data.train.images.shape[1:]
        net = make_network(args, shape[0], self.num_classes)
        self.net = net.to(place.device, memory_format=torch.channels_last)
        self.method = Method(loss, net, data, args, place) if wanted else None
        if self.method is None:
            self.criterion = make_loss(loss, args, self.num_classes).to(place.device)
        if loss == "zipf" and args.ranking == "votes":
            self.criterion.votes = attach_votes(net, args, torch.randn(2, *shape, device=place.device))
        self.model = self.method or (nn.parallel.DistributedDataParallel(net) if place.processes > 1 else net)
        trained = self.method.outputs if self.method else net
        torch.manual_seed(seed + place.rank)  # the random laws draw from here
        self.optimizer = torch.optim.SGD(
            trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
        )
        self.steps = args.epochs * len(self.loader)
        warmup = min(1, args.epochs / 5) * len(self.loader)

        def rate(step: int) -> float:
            """Linear warm-up, then half a cosine down to zero."""
            return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=args.amp == "fp16")

    def autocast(self) -> torch.autocast:
        """The mixed precision of --amp: none, bf16 or fp16."""
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.place.device.type, dtype, enabled=self.amp != "none")

    def train_epoch(self, bar: tqdm) -> dict[str, float]:
        """Pass over the training set once; returns mean objective, cross-entropy and accuracy."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        self.model.train()
        if self.method:
            self.method.begin_epoch(self.scheduler.last_epoch // len(self.loader))
        for images, labels, index in self.loader:
            logits, loss = self.step(images, labels, index)
            self.scheduler.step()
            with torch.no_grad():
                cross_entropy = F.cross_entropy(logits.float(), labels, reduction="sum")
                correct = (logits.argmax(1) == labels).sum()
                sums += torch.stack([loss * len(labels), cross_entropy, correct])
            bar.update()
        if self.method:
            self.method.end_epoch()
        means = self.place.sum(sums) / (len(self.loader) * self.loader.batch_size)
        names = "train_loss", "train_cross_entropy", "train_accuracy"
        return dict(zip(names, means.tolist(), strict=True))

    def step(self, images, labels, index) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on a batch of the loader; returns its logits (n, C) and the loss."""
        with self.autocast():
            if self.method:
                logits, loss = self.method.step(images, labels, index)
            else:
                logits = self.model(images)
                loss = self.criterion(logits, labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return logits, loss

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) float32 in eval mode of images (N, channels, size, size) uint8."""
        self.net.eval()
        logits = [torch.empty(0, self.num_classes, device=self.place.device)]
        for batch in images.split(500):
            batch = normalise(batch.to(self.place.device), self.loader.mean, self.loader.std)
            with self.autocast():
                logits.append(self.net(batch).float())
        return torch.cat(logits)

    def evaluate(self, test: Split) -> dict[str, float]:
        """Cross-entropy, accuracy and calibration error on a test set, which the processes share out.

        The expected calibration error is that of Guo et al. (ICML 2017): the mean distance, weighted by
        count, of accuracy and confidence in 15 equal bins of the confidence.
        """
        if self.place.processes > 1:  # each has seen other batches: the first one's averages count
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)
        mine = slice(self.place.rank, None, self.place.processes)
        logits = self.predict(test.images[mine])
        labels = test.labels[mine].to(logits.device)
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum").double()
        confidence = logits.softmax(1).amax(1).double()
        correct = logits.argmax(1) == labels  # not the softmax's, whose largest may be rounded alike
        excess = confidence.new_zeros(15)
        excess.index_add_(0, (15 * confidence).ceil().long().clamp(1, 15) - 1, confidence - correct.double())
        sums = self.place.sum(torch.cat([torch.stack([cross_entropy, correct.sum()]), excess])) / len(test)
        values = [*sums[:2].tolist(), sums[2:].abs().sum().item()]
        names = "test_cross_entropy", "test_accuracy", "test_calibration_error"
        return dict(zip(names, values, strict=True))

    def parts(self) -> dict:
        """What has a state_dict of its own."""
        names = "net", "optimizer", "scheduler", "scaler"
        return {name: getattr(self, name) for name in names} | (
            {"method": self.method} if self.method else {}
        )

    def state_dict(self) -> dict:
        """All that the rest of the run depends on; a call that all processes make together."""
        random = [torch.get_rng_state()]
        if self.place.device.type == "cuda":
            random.append(torch.cuda.get_rng_state())
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"random": self.of_all(random), "order": self.loader.generator.get_state()}
        if self.method:  # whose criterion may keep what its own process saw
            state["criterion"] = self.of_all(self.method.criterion.state_dict())
        return state

    def of_all(self, mine: object) -> list:
        """What each process has, by rank."""
        if self.place.processes == 1:
            return [mine]
        found = [None] * self.place.processes
        dist.all_gather_object(found, mine)
        return found

    def load_state_dict(self, state: dict) -> None:
        """Go back to where state_dict was called."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        if self.method:
            self.method.criterion.load_state_dict(state["criterion"][self.place.rank])
        self.loader.generator.set_state(state["order"])
        random = state["random"][self.place.rank]
        torch.set_rng_state(random[0])
        if self.place.device.type == "cuda" and len(random) > 1:
            torch.cuda.set_rng_state(random[1])


@dataclass
class Run:
    """One trained network and what was measured on it."""

    loss: str
    seed: int
    history: list[dict]  # one record per epoch
    spectrum: list[float]  # C mean probabilities, sorted, highest first
    alpha: float  # exponent of the Zipf law fitted to them
    intercept: float  # log probability of that law at rank 1
    digest: str = ""  # of the files that the data was made from
    probe: float | None = None  # accuracy of a linear probe on held-out classes, where the data has some


def by_loss(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each loss, in the order in which the losses were named."""
    losses = dict.fromkeys(run.loss for run in runs)
    return {loss: [run for run in runs if run.loss == loss] for loss in losses}


def file_of(loss: str, seed: int, args: argparse.Namespace) -> Path:
    """The checkpoint of a run; its log is beside it."""
    return args.out / (f"{loss}.pt" if len(args.seed) == 1 else f"{loss}-seed{seed}.pt")


def prepare(loss: str, seed: int, data: Data, args: argparse.Namespace, place: Place):
    """Make what trains a network; with --resume go back to its checkpoint, if it has one.

    Returns:
        The Trainer, and the records of the epochs that are done.
    """
    trainer, checkpoint = Trainer(loss, seed, data, args, place), file_of(loss, seed, args)
    if args.resume and checkpoint.exists():
        return trainer, load_checkpoint(checkpoint, trainer, describe(args, data, place))
    return trainer, []


def train(loss: str, seed: int, data: Data, args: argparse.Namespace, place: Place) -> Run:
    """Train one network, or finish what a checkpoint began."""
    if data.held_out:
        from .probe import linear_probe  # its scikit-learn is missed before the training, not after
    trainer, history = prepare(loss, seed, data, args, place)
    checkpoint, settings = file_of(loss, seed, args), describe(args, data, place)
    name, log = checkpoint.stem, checkpoint.with_suffix(".jsonl")
    if history:
        place.first(lambda: write_log(log, history))
    elif teacher := teacher_of(loss):
        state = torch.load(file_of(teacher, seed, args), map_location=place.device, weights_only=True)
        trainer.method.learn_from(state["trainer"]["net"])
    bar = tqdm(
        desc=name,
        total=trainer.steps,
        initial=len(history) * len(trainer.loader),
        unit="batch",
        leave=False,
        disable=True if place.rank else None,  # None: only where there is a terminal
    )
    with bar:
        for epoch in range(len(history) + 1, args.epochs + 1):
            record = {"loss": loss, "seed": seed, "epoch": epoch}
            record["lr"] = trainer.scheduler.get_last_lr()[0]
            start = time.perf_counter()
            record |= trainer.train_epoch(bar)
            record["train_seconds"] = time.perf_counter() - start
            if not math.isfinite(record["train_loss"]):
                raise FloatingPointError(f"the loss {name} became {record['train_loss']}")
            record |= trainer.evaluate(data.test)
            history.append(record)
            state = {"settings": settings, "history": history, "trainer": trainer.state_dict()}
            place.first(lambda state=state: write_checkpoint(checkpoint, state))
            place.first(lambda: write_log(log, history))
            if place.rank == 0:
                tqdm.write(
                    f"{name:<5} epoch {epoch:>{len(str(args.epochs))}}/{args.epochs}"
                    f"  train {record['train_loss']:.4f} ({record['train_accuracy']:7.2%})"
                    f"  test {record['test_cross_entropy']:.4f} ({record['test_accuracy']:7.2%})"
                    f"  {record['train_seconds']:.1f} s"
                )
    probabilities = trainer.predict(data.test.images).softmax(1)  # (M, C)
    alpha, intercept = zls.fit_zipf(probabilities)
    spectrum = probabilities.double().sort(1, descending=True).values.mean(0)
    probe = linear_probe(trainer.net, trainer.predict, *data.held_out) if data.held_out else None
    return Run(loss, seed, history, spectrum.tolist(), float(alpha), float(intercept), data.digest, probe)


class CheckpointError(UsageError):
    """A checkpoint cannot be resumed from."""

    option = "--resume"


def describe(args: argparse.Namespace, data: Data, place: Place) -> dict:
    """All that decides the outcome of a run but loss and seed: checkpoints must agree on it."""
    free = {"cache", "data", "device", "loss", "out", "preset", "resume", "seed", "skip_bad_images", "fonts"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["data"] = zlib.crc32(data.train.labels.numpy(), zlib.crc32(data.train.images.numpy()))
    settings["processes"] = place.processes
    return settings


def write_checkpoint(path: Path, state: dict) -> None:
    """Write all that the rest of a run depends on."""
    with atomic_file(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path, trainer: Trainer, settings: dict) -> list[dict]:
    """Bring the trainer back to where the checkpoint was written; returns the epochs so far."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, history = state["settings"], state["history"]
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"{path} is not a checkpoint of this script: {error}") from error
    for name in settings | saved:
        if settings.get(name) != saved.get(name):
            values = f" ({saved.get(name)} there, {settings.get(name)} here)"
            option = name if name == "processes" else "--" + name.replace("_", "-")
            raise CheckpointError(f"{path} was made with another {option}{'' if name == 'data' else values}")
    trainer.load_state_dict(state["trainer"])
    return history


def write_log(path: Path, history: list[dict]) -> None:
    """Write one JSON line per epoch: the epochs of the checkpoint, no more and no fewer."""
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in history)
