"""Trains and measures the small classifiers of `--features classifier-28` and `classifier-emoji`.

    python bench/classifiers.py classifier-28 fashion-mnist
    python bench/classifiers.py classifier-emoji emoji-32

`emoji-32` is the folder that `undiffuse data build emoji --labels both` makes. Only the train split is trained on.
Writes the weights, their sha256 in `undiffuse/quality/feature/classifier.py`, the JSON beside this script and the table
of docs/benchmarks.md.
"""

import argparse
import re
import time
from datetime import date
from pathlib import Path

import torch
from machine import keep, kept, machine, publish
from torch import Tensor, nn

from undiffuse.data.format.emoji import CATEGORIES
from undiffuse.data.order import order
from undiffuse.data.source import ArraySource, open_source
from undiffuse.key import Key
from undiffuse.machine import disk, log
from undiffuse.machine.tensorfile import write_weights
from undiffuse.quality.feature import base, classifier

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent
SIZES = {"classifier-28": (28, 1), "classifier-emoji": (32, 3)}
EPOCHS = {"classifier-28": 12, "classifier-emoji": 60}
BATCH, RATE, DECAY, SMOOTHING, DROPOUT, SHIFT = 128, 4e-3, 0.05, 0.05, 0.2, 2


def augmented(images: Tensor, key: Key) -> Tensor:
    """Mirrored or not, and moved by up to two pixels each way, the edge repeated."""
    (b, _, h, w), keys = images.shape, key.rows(len(images))
    dy, dx = (keys.fold(name).integers(2 * SHIFT + 1) - SHIFT for name in ("down", "right"))
    rows = (torch.arange(h) + dy[:, None]).clamp(0, h - 1)
    columns = (torch.arange(w) + dx[:, None]).clamp(0, w - 1)
    columns = torch.where(keys.fold("mirror").integers(2)[:, None] == 1, w - 1 - columns, columns)
    return images.permute(0, 2, 3, 1)[torch.arange(b)[:, None, None], rows[:, :, None], columns[:, None]].movedim(3, 1)


def train(source: ArraySource, classes: int, epochs: int, seed: int) -> classifier.Network:
    """AdamW with one cycle of the rate; batches, augmentation and first weights follow from the seed."""
    key = Key(seed).fold("classifier")
    torch.manual_seed(key.fold("weights").integer())  # dropout draws from it too
    network = classifier.Network(source.image_shape[0], classes, nn.BatchNorm2d).to(memory_format=torch.channels_last)
    steps = epochs * (len(source) // BATCH)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    with log.progress(steps, "training", True) as bar:
        for step in range(steps):
            index = order(seed, len(source), torch.arange(step * BATCH, (step + 1) * BATCH))
            images, labels = source.gather(index)
            pool = network(augmented(images, key.fold("augment", step))).pool
            logits = network.head(nn.functional.dropout(pool, DROPOUT))
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            bar.advance(1)
    return network.eval()


def folded(network: classifier.Network) -> dict[str, Tensor]:
    """The weights without the norms, in float16: each norm is a scale and a shift after its convolution."""
    tensors = {"head.weight": network.head.weight, "head.bias": network.head.bias}
    for number, (conv, norm) in enumerate(zip(network.convs, network.norms, strict=True)):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        tensors[f"convs.{number}.weight"] = conv.weight * scale[:, None, None, None]
        tensors[f"convs.{number}.bias"] = (conv.bias - norm.running_mean) * scale + norm.bias
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}


@torch.inference_mode()
def measured(network: classifier.Network, source: ArraySource, categories: int | None) -> dict[str, object]:
    """Top-1 accuracy; with `categories`, also of the style and of the category, each by its summed probability."""
    logits = torch.cat([network(source.gather(part)[0]).logits for part in torch.arange(len(source)).split(500)])
    labels = source.every_label()
    found = {"images": len(source), "accuracy": float((logits.argmax(1) == labels).double().mean())}
    if categories:
        joint = logits.double().softmax(1).unflatten(1, (-1, categories))  # styles × categories
        for name, p, of in (
            ("style", joint.sum(2), labels // categories),
            ("category", joint.sum(1), labels % categories),
        ):
            found[f"{name}_accuracy"] = float((p.argmax(1) == of).double().mean())
    return found


def table(result: dict) -> str:
    """The generated block of docs/benchmarks.md."""
    lines = [
        "| `--features` | trained on | images | weights | classes | accuracy on the test split | epochs | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        test = row["test"]
        parts = [what for what in ("style", "category") if f"{what}_accuracy" in test]
        more = "".join(f"; {what} {100 * test[f'{what}_accuracy']:.2f} %" for what in parts)
        lines.append(
            f"| `{name}` | {row['data']} | {row['train_images']:,} | {row['parameters']:,} | {row['classes']} "
            f"| {100 * test['accuracy']:.2f} % of {test['images']:,}{more} | {row['epochs']} | {row['seconds']:,} |"
        )
    for name, row in result.items():
        ran = row["machine"]
        made = f"torch {ran['torch']}, {row['date']}; made by `{row['command']}`. {row.get('note', '')}".rstrip()
        threads = f"{ran['threads']} thread{'s' if ran['threads'] > 1 else ''}"
        lines += ["", f"`{name}`: {ran['processor']}, {threads}, {made}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SIZES))
    parser.add_argument("data", help="fashion-mnist, or the folder of the emoji set")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", help="anything a reader must know; kept from the last time unless given")
    given = parser.parse_args()
    (size, channels), epochs = SIZES[given.name], given.epochs or EPOCHS[given.name]
    source, test = (open_source(given.data, size, channels, split=split) for split in ("train", "test"))
    started = time.monotonic()
    network = train(source, len(source.classes), epochs, given.seed)
    seconds, tensors = round(time.monotonic() - started), folded(network)
    categories = len(CATEGORIES) if given.name == "classifier-emoji" else None
    meta = {"name": given.name, "classes": list(source.classes), "train": source.fingerprint(), "epochs": epochs,
            "seed": given.seed}  # fmt: skip
    path = classifier.path_of(given.name)
    path.parent.mkdir(exist_ok=True)
    write_weights(path, tensors, meta)
    target = HERE / "classifiers.json"
    result = kept(target)
    options = "".join(f" --{what} {getattr(given, what)}" for what in ("epochs", "seed") if getattr(given, what))
    row = {
        "command": f"python bench/classifiers.py {given.name} {Path(given.data).name}{options}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "seed": given.seed,
        "note": given.note or result.get(given.name, {}).get("note", ""),
        "data": "Fashion-MNIST" if categories is None else "the emoji set",
        "fingerprints": {"train": source.fingerprint(), "test": test.fingerprint()},
        "train_images": len(source),
        "classes": len(source.classes),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": path.stat().st_size,
        "epochs": epochs,
        "batch": BATCH,
        "seconds": seconds,
        "sha256": base.hash_of_file(path),
        "before_folding": measured(network, test, categories),
        "test": measured(classifier.network_of(path)[0], test, categories),
    }
    result = {name: row if name == given.name else result[name] for name in SIZES if name in {*result, given.name}}
    keep(target, result)
    pin(given.name, row["sha256"])
    publish("benchmarks.md", "classifiers", table(result))


def pin(name: str, sha256: str) -> None:
    """Writes the new sha256 where the extractor expects it."""
    path = Path(classifier.__file__)
    text, cls = path.read_text(), base.FEATURES.find(name).__name__
    new, count = re.subn(rf'(class {cls}\(.*?sha256: ClassVar\[str\] = ")[^"]*', rf"\g<1>{sha256}", text, flags=re.S)
    assert count == 1
    disk.write_atomic(path, new.encode())


if __name__ == "__main__":
    main()
