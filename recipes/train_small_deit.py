"""Train a small DeiT in some minutes, so that recipes/compress_deit.py can be tried without any download.

    python recipes/train_small_deit.py                       # scikit-learn's digits, about three minutes on one core
    python recipes/train_small_deit.py --data cifar10 --data-root DIR --epochs 30

Writes small_deit.safetensors (with its checksum) and small_deit.json, which says what it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch

from nas.errors import mistakes_end
from nas.tasks import make_task
from nas.training import Progress, TrainConfig, train
from nas.weights import load_tensors, load_weights, save_weights

SHAPE = {"embed_dim": 96, "depth": 6, "num_heads": 3}


def build(channels: int, classes: int, size: int) -> torch.nn.Module:
    """timm's DeiT, small: 16 patches of pictures of 8 pixels, 49 or 64 of those of 28 or 32."""
    patch = 2 if size <= 16 else 4 if size <= 32 else size // 8
    shape: dict[str, Any] = {**SHAPE, "patch_size": patch, "img_size": size}
    return timm.create_model("deit_tiny_patch16_224", in_chans=channels, num_classes=classes, **shape)


def load(weights: str | Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model in a file of ``main``, and what is written beside it; of another file, timm's DeiT-S with as many
    classes as the file has, and its size."""
    weights = Path(weights)
    note = weights.with_suffix(".json")
    if note.exists():
        about = json.loads(note.read_text())
        model = build(about["channels"], about["classes"], about["size"])
    else:
        about = {"size": 224, "data": None}
        classes = len(load_tensors(weights)[0]["head.weight"])
        model = timm.create_model("deit_small_patch16_224", num_classes=classes)
    load_weights(model, weights)
    return model, about


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="digits", help="digits, cifar10, mnist, or a folder of class folders"
    )
    parser.add_argument("--data-root", help="where data sets lie")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("small_deit.safetensors"))
    arguments = parser.parse_args()
    with mistakes_end(parser):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Train, test, write."""
    task = make_task("image_classification", data=arguments.data, data_root=arguments.data_root)
    wanted: Any = task.signature
    torch.manual_seed(arguments.seed)
    model = build(wanted.channels, wanted.classes, wanted.height)
    config = TrainConfig(arguments.epochs, task.default_batch_size, 1e-3, seed=arguments.seed)

    def report(progress: Progress) -> bool:
        accuracy = progress.metrics.get("accuracy", float("nan"))
        print(
            f"epoch {progress.epoch}/{progress.epochs}: loss {progress.train_loss:.3f}, accuracy {accuracy:.4f}"
        )
        return False

    train(model, task, config, arguments.device, report=report)
    metrics = task.evaluate(model, "test", torch.device(arguments.device))
    save_weights(model, arguments.out)
    about = {
        "data": arguments.data,
        "channels": wanted.channels,
        "classes": wanted.classes,
        "size": wanted.height,
        "test": metrics,
        "epochs": arguments.epochs,
        "seed": arguments.seed,
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"test accuracy {metrics['accuracy']:.4f}; written: {arguments.out}")


if __name__ == "__main__":
    main()
