"""``nas compress``: a model in, a smaller and really faster one out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from nas.errors import UserMistake, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.result import CompressionResult

__all__ = ["register"]

_IMAGES = "image_classification"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compress")(compress)


def compress(
    model: str = typer.Option(
        ...,
        help="timm:NAME, an architecture.json or its directory, RUN#TRIAL, module:function, or a directory that "
        "--out was written to.",
    ),
    passes: list[str] = typer.Option(
        [],
        "--pass",
        metavar="PASS",
        help="name or name:option=value,...; again for the next one. Left out, all names are said.",
    ),
    weights: Path | None = typer.Option(
        None, help="A checkpoint for the model: .safetensors, or a state dict."
    ),
    pretrained: bool = typer.Option(False, "--pretrained", help="Let timm download its published weights."),
    task: str = typer.Option(_IMAGES, help="Task of --data: what it is learned and judged as."),
    data: str | None = typer.Option(
        None,
        help="What to train and judge on: digits, cifar10, a folder; with --task click_through_rate also "
        "generated-clicks.",
    ),
    data_root: str | None = typer.Option(None, help="Where data sets lie."),
    size: str | None = typer.Option(None, help="Size of the input: 224 (default: the model's own)."),
    target: str = typer.Option("cpu:1", help=escape("DEVICE[:THREADS][+bf16|+fp16][+RUNTIME][@BATCH].")),
    budget: str | None = typer.Option(None, help="latency=0.6, latency=8ms, macs=0.5, params=2e6."),
    epochs: int | None = typer.Option(
        None, min=0, help="For every pass that trains and was not told its own."
    ),
    seed: int = typer.Option(0, min=0, help="Of everything random."),
    measure_seconds: float = typer.Option(20.0, min=0, help="Of the last measurement; 0 measures nothing."),
    out: Path | None = typer.Option(None, help="Write the bundle (weights, ONNX, latency card) here."),
    onnx: bool = typer.Option(True, "--onnx/--no-onnx", help="With --out: also an ONNX file."),
) -> None:
    """Run passes over a model, measure before, between and after, and write the result."""
    from rich.console import Console
    from rich.text import Text

    from compress import compress as run
    from compress.result import check_empty

    console = Console(highlight=False)
    if not passes:
        from compress import list_passes

        raise UserMistake(f"--pass: give at least one of {', '.join(list_passes())}")
    if out is not None:
        check_empty(out)
    source, inputs, origin = _load(model, size, pretrained=pretrained, weights=weights)
    lesson = _task(task, data, data_root, inputs)
    if lesson is not None:
        _fit(source, lesson, origin, console)
    if weights is not None:
        _read_weights(source, weights)
    result = run(
        source,
        passes,
        train=lesson,
        target=target,
        budget=budget,
        seed=seed,
        epochs=epochs,
        example=inputs if lesson is None else None,
        origin=origin,
        measure_seconds=measure_seconds,
        savable=out is not None,
        report=lambda line: console.print(Text(line, style="dim"), soft_wrap=True),
    )
    _print(console, result)
    if out is not None:
        place = result.export(out) if onnx else result.save(out)
        console.print(Text(f"written: {place}"), soft_wrap=True)


def _print(console: Any, result: CompressionResult) -> None:
    from rich.text import Text

    console.print(result.report())
    for step in result.steps:
        if step.uncounted:
            line = f"{step.name}: not in its MACs: {', '.join(step.uncounted)}"
            console.print(Text(line, style="yellow"), soft_wrap=True)
        for reason in (step.latency or {}).get("reasons", ()):
            console.print(Text(f"{step.name}: {reason}", style="yellow"), soft_wrap=True)


def _load(
    text: str, size: str | None, *, pretrained: bool, weights: Path | None
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any] | None]:
    """The model, inputs of one call with one sample, and its origin where the model itself does not tell it."""
    import torch

    from nas.sources import load_source

    if pretrained and (weights is not None or not text.startswith("timm:")):
        raise UserMistake("--pretrained: is for timm:NAME, and not together with --weights")
    if (Path(text) / "compressed.json").is_file():
        return _load_compressed(text, size)
    source = load_source(text, size=size)
    if source.model is None:
        raise UserMistake(
            f"--model {text}: an ONNX file cannot be compressed; give the model that it was made from"
        )
    inputs = tuple(source.make_inputs(1, torch.Generator().manual_seed(0)))
    model = _downloaded(text.removeprefix("timm:"), source.model) if pretrained else source.model
    return model, inputs, source.origin


def _load_compressed(
    text: str, size: str | None
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any] | None]:
    from compress import load

    if size is not None:
        raise UserMistake(f"--size: model {text} was compressed for its own size; leave --size out")
    try:
        found = load(text)
    except UserMistake as mistake:
        raise UserMistake(
            f"--model {text}: {mistake}; what this option cannot load, a module:function can: it returns "
            "(compress.load(...).model, inputs)"
        ) from None
    return found.model, found.example, found.origin


def _fit(model: Any, task: Any, origin: dict[str, Any] | None, console: Any) -> None:
    """A classifier for the classes of the data; of other data than pictures, the model's very features."""
    from rich.text import Text

    made_for = (origin or {}).get("signature")
    if made_for is not None and task.name != _IMAGES and not _same_signature(made_for, task.signature):
        raise UserMistake(
            f"--data: the model was made for other features or vocabularies than those of this {task.name} data; give "
            "the data that it was searched for"
        )
    for note in task.describe().get("notes", ()):
        console.print(Text(f"--data: {note}", style="dim"), soft_wrap=True)
    own, classes = getattr(model, "num_classes", None), getattr(task.signature, "classes", None)
    if classes is not None and isinstance(own, int) and own != classes and hasattr(model, "reset_classifier"):
        model.reset_classifier(classes)
        line = f"the classifier was made anew: {classes} classes in the data, {own} in the model"
        console.print(Text(line, style="yellow"), soft_wrap=True)


def _same_signature(described: dict[str, Any], signature: Any) -> bool:
    from nas.export import read_signature

    return bool(read_signature(described, Path("architecture.json")) == signature)


def _downloaded(name: str, model: nn.Module) -> nn.Module:
    import timm

    try:
        made: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # every layer of the download raises kinds of its own
        reason = first_line(error, 160)
        raise UserMistake(
            f"--pretrained: the weights of {name} cannot be had ({reason}); give --weights FILE instead"
        ) from None
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if any(value.shape != shapes.get(key) for key, value in made.state_dict().items()):
        raise UserMistake(f"--pretrained: the weights of {name} are for its own size; leave --size out")
    model.load_state_dict(made.state_dict())
    return model


def _read_weights(model: nn.Module, path: Path) -> None:
    if path.suffix == ".safetensors":
        from nas.weights import load_weights

        load_weights(model, path)
        return
    import torch

    if not path.is_file():
        raise UserMistake(f"--weights {path}: there is no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise kinds of their own
        raise UserMistake(
            f"--weights {path}: cannot be read as a state dict ({type(error).__name__}); .safetensors is safest"
        ) from None
    found: Any = state.get("model", state.get("state_dict", state)) if isinstance(state, dict) else state
    try:
        model.load_state_dict(found)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserMistake(f"--weights {path}: does not fit the model: {reason}") from None


def _task(name: str, data: str | None, root: str | None, inputs: tuple[Tensor, ...]) -> Any:
    """The task, its pictures as large, and with as many channels, as the model takes them."""
    if data is None:
        if name != _IMAGES:
            raise UserMistake(f"--task {name}: is what --data is learned as; give --data too")
        return None
    from nas.tasks import make_task
    from nas.tasks._click_data import GENERATED
    from nas.tasks.text_data import GRAMMAR

    home = {GENERATED: "click_through_rate", GRAMMAR: "translation"}.get(data)
    if home is not None and name == _IMAGES:
        raise UserMistake(f"--data {data}: belongs to --task {home}; give that too")
    options: dict[str, Any] = {"data": data, "data_root": root}
    if name == _IMAGES:
        if len(inputs) != 1 or inputs[0].dim() != 4:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise UserMistake(
                f"--task {name}: needs a model of pictures, this one takes {shapes}; give --task"
            )
        options |= {"image_size": list(inputs[0].shape[2:]), "channels": int(inputs[0].shape[1])}
    return make_task(name, **options)
