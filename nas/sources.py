"""Models by the text that names them, with inputs to call them: what ``nas measure`` and ``nas profile`` take."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserMistake, first_line, nearest
from nas.exported_program import as_module, load_program
from nas.source_inputs import Extent, MakeInputs, Slot, at_size, drawing, inputs_of, range_of
from spaces.loading import cause_of, load_object

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FORMS", "Source", "load_source"]

FORMS = (
    "timm:NAME, an architecture.json or the directory of 'nas export', RUN#TRIAL or RUN/trials/TRIAL, "
    "a torch.export file (.pt2), an ONNX file (.onnx), module:function or file.py:function"
)
"""What may stand for a model, for messages and help texts."""

_SEED = 0
_BUNDLE = "compressed.json"


@dataclass(frozen=True)
class Source:
    """A model and how to call it.

    Attributes:
        name: the text that named it.
        model: on the CPU, in evaluation mode; None for an ONNX file, which only some runtimes can run.
        onnx: that file; None for all others.
        key: 16 hex digits: the architecture's key where it has one, otherwise a hash of ``name`` and the shapes of
            the parameters. Inputs are not in it.
        make_inputs: ``make_inputs(batch, generator)`` draws the arguments of one call, on the CPU, from a CPU
            generator; see ``nas.source_inputs.MakeInputs``. With a distribution of lengths each call draws one.
        origin: of one of our own architectures, what ``compress.origins`` needs to build it again; None for others,
            which tell it themselves.
    """

    name: str
    model: nn.Module | None
    onnx: Path | None
    key: str
    make_inputs: MakeInputs
    origin: dict[str, Any] | None = None


def load_source(text: str, *, size: str | None = None) -> Source:
    """The model that ``text`` names, in one of ``FORMS``.

    Weights are random, from a fixed seed, except those of an export and of a function's model; latency does not depend
    on them. A ``.pt2`` file and a function are code that runs: load only what you trust.

    Args:
        size: ``224`` (a square image, or a length), ``224x192`` (height and width) or ``16-128`` (a length drawn
            uniformly for each call); None is what the model was made for.

    Raises:
        UserMistake: nothing of that name, a file that cannot be read, a missing package, a size that does not fit.
    """
    extent = None if size is None else Extent.parse(size)
    return _loader(text)(text, extent)


def _loader(text: str) -> Callable[[str, Extent | None], Source]:
    path = Path(text)
    if text.startswith("timm:"):
        return _from_timm
    if path.suffix.lower() == ".onnx":
        return _from_onnx
    if path.suffix.lower() == ".pt2":
        return _from_exported_program
    if _run_and_number(text) is not None:
        return _from_trial
    if path.suffix.lower() == ".json" or path.is_dir():
        return _from_description
    if ":" in text:
        return _from_function
    hint = ""
    if re.fullmatch(r"[A-Za-z0-9_.]+", text):
        import timm

        hint = f" (did you mean 'timm:{text}'?)" if timm.is_model(text) else ""
    raise UserMistake(f"model {text!r}: names no model{hint}; allowed: {FORMS}")


def _structure_key(name: str, model: nn.Module) -> str:
    return _digest([name, [[key, list(value.shape)] for key, value in model.named_parameters()]])


def _digest(facts: object) -> str:
    return blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def _same_weights() -> Iterator[None]:
    """Random weights that are the same each time, without a trace in the caller's generator."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


# -- timm --------------------------------------------------------------------------------------------------------------


def _from_timm(text: str, extent: Extent | None) -> Source:
    import timm
    import torch

    name = text.removeprefix("timm:")
    if not timm.is_model(name):
        raise UserMistake(
            f"model {text!r}: timm {timm.__version__} has no model {name!r}{nearest(name, timm.list_models())}; "
            "timm.list_models() names all"
        )
    at = None if extent is None else extent.image(text)
    asked = "" if extent is None else f"--size {extent.text}: "
    try:
        with _same_weights():
            model: Any = timm.create_model(name, pretrained=False)
            usual = tuple(model.pretrained_cfg["input_size"])
            channels, wanted = usual[0], at or usual[1:]
            if wanted != usual[1:]:
                model = _timm_at(text, name, wanted, fixed=bool(model.pretrained_cfg.get("fixed_input_size")))
                _try_size(text, model.eval(), (channels, *wanted), usual[1:], asked)
    except UserMistake:
        raise
    except (RuntimeError, ValueError, AssertionError, KeyError) as error:
        raise UserMistake(f"{asked}model {text!r}: timm cannot build it: {cause_of(error)}") from error
    slot = Slot(torch.float32, (None, channels, *wanted), (None, channels, *wanted))
    return Source(text, model.eval(), None, _structure_key(text, model), drawing(text, [slot], None))


def _timm_at(text: str, name: str, size: tuple[int, int], *, fixed: bool) -> Any:
    """The model for another image size; those without positions do not need to be told."""
    import timm

    try:
        return timm.create_model(name, pretrained=False, img_size=size)
    except TypeError:
        if fixed:
            raise UserMistake(f"--size {size[0]}x{size[1]}: model {text!r} has one input size only") from None
    return timm.create_model(name, pretrained=False)


def _try_size(
    text: str, model: nn.Module, shape: tuple[int, ...], usual: tuple[int, ...], asked: str
) -> None:
    """Most models are built for any size and refuse, by an assertion, when they are called."""
    import torch

    try:
        with torch.inference_mode():
            model(torch.zeros(1, *shape))
    except Exception as error:
        raise UserMistake(
            f"{asked}model {text!r} does not take such images ({first_line(error, 200)}); "
            f"give another size, or leave it out for {'x'.join(map(str, usual))}"
        ) from None


# -- our own architectures ---------------------------------------------------------------------------------------------


def _from_description(text: str, extent: Extent | None) -> Source:
    """An ``architecture.json``, of ``nas export`` or written by hand, or its directory."""
    from nas.files import CorruptFile

    try:
        return _described(text, _description_path(text), extent)
    except CorruptFile as error:
        raise UserMistake(f"model {text!r}: {error}; write it again, or take it from a copy") from None
    except OSError as error:
        raise UserMistake(f"model {text!r}: cannot be read ({error.strerror or error})") from None


def _description_path(text: str) -> Path:
    directory = Path(text) if Path(text).is_dir() else Path(text).parent
    path = directory / "architecture.json" if Path(text).is_dir() else Path(text)
    if path.is_file() and path.name != _BUNDLE:
        return path
    if (directory / _BUNDLE).is_file():
        onnx = directory / "model.onnx"
        file = f"{onnx} with a --target such as cpu:1+onnxruntime, or " if onnx.is_file() else ""
        raise UserMistake(
            f"model {text!r}: is a bundle of 'nas compress'; give {file}a FILE.py:FUNCTION that returns "
            f"(compress.load({str(directory)!r}).model, inputs)"
        )
    why = "holds no architecture.json" if Path(text).is_dir() else "there is no such file"
    hint = "; a run's trial is RUN#NUMBER" if (Path(text) / "trials").is_dir() else ""
    raise UserMistake(f"model {text!r}: {why}{hint}; allowed: {FORMS}")


def _described(text: str, path: Path, extent: Extent | None) -> Source:
    from nas.export import FORMAT, load_model, read_signature
    from nas.files import read_json, unseal
    from spaces import get_space

    described = read_json(path)
    if isinstance(described, dict) and "sha256" in described:
        described = unseal(described, path)
    needed = ("space", "architecture", "signature")
    if not isinstance(described, dict) or any(not described.get(name) for name in needed):
        of_trial = isinstance(described, dict) and "run" in described and "number" in described
        hint = f"; this one is of trial {described['number']} of a run: give RUN#NUMBER" if of_trial else ""
        raise UserMistake(f"model {text!r}: {path} must hold an object with {', '.join(needed)}{hint}")
    if described.get("format", FORMAT) != FORMAT:
        raise UserMistake(f"model {text!r}: {path} has format {described['format']!r}; known: {FORMAT}")
    space = get_space(described["space"], task=described.get("scale_task"))
    architecture = space.canonical(described["architecture"])
    try:
        plain = read_signature(described["signature"], path)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserMistake(f"model {text!r}: {path}: signature: {first_line(error, 200)}") from None
    signature = at_size(text, plain, extent)
    if extent is None and (path.parent / "weights.safetensors").exists() and path.name == "architecture.json":
        model = load_model(path.parent)
    else:
        model = _build(space, architecture, signature)
    origin = _origin(described["space"], described.get("scale_task"), architecture, signature)
    return Source(text, model, None, space.key(architecture), inputs_of(text, signature, extent), origin)


def _origin(
    space: str | None, task: str | None, architecture: Mapping[str, Any], signature: Any
) -> dict[str, Any]:
    from nas.export import describe_signature

    return {
        "kind": "space",
        "space": space,
        "task": task,
        "architecture": dict(architecture),
        "signature": describe_signature(signature),
    }


def _run_and_number(text: str) -> tuple[Path, int] | None:
    from nas.run_directory import RunDirectory

    run, mark, number = text.rpartition("#")
    if mark and run and number.isdecimal():
        return Path(run), int(number)
    path = Path(text)
    if path.name == "architecture.json":  # a run's own record lacks what the run knows
        path = path.resolve().parent
        if not RunDirectory(path.parent.parent).holds_run():
            return None
    if path.name.isdecimal() and path.parent.name == "trials":
        return path.parent.parent, int(path.name)
    return None


def _from_trial(text: str, extent: Extent | None) -> Source:
    from nas.export import read_signature
    from nas.reader import read_run

    found = _run_and_number(text)
    assert found is not None  # _loader has looked
    directory, number = found
    run = read_run(directory)
    trial = run.trial(number)
    if (described := run.facts.get("signature")) is None:
        raise UserMistake(
            f"model {text!r}: the run evaluates a function (--evaluator); its trials have no model"
        )
    signature = at_size(text, read_signature(described, directory), extent)
    model = _build(run.study.space, trial.architecture, signature)
    task = run.config.task or run.study.space.task
    origin = _origin(run.config.space, task, trial.architecture, signature)
    return Source(text, model, None, trial.key, inputs_of(text, signature, extent), origin)


def _build(space: Any, architecture: Mapping[str, Any], signature: Any) -> nn.Module:
    with _same_weights():
        model: nn.Module = space.build(architecture, signature)
    return model.eval()


# -- files -------------------------------------------------------------------------------------------------------------


def _from_exported_program(text: str, extent: Extent | None) -> Source:
    """A file of ``torch.export.save``."""
    import torch

    if not Path(text).is_file():
        raise UserMistake(f"model {text!r}: there is no such file")
    program = load_program(text)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    metas = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs if name in nodes]
    arguments, keywords = program.example_inputs or ((), {})
    if keywords or any(not isinstance(meta, torch.Tensor) for meta in metas):
        raise UserMistake(
            f"model {text!r}: some arguments are given by name or are no tensors; export it without"
        )
    examples = list(arguments) if len(arguments) == len(metas) else [None] * len(metas)
    slots = []
    for meta, example in zip(metas, examples, strict=True):
        declared = tuple(size if isinstance(size, int) else None for size in meta.shape)
        usual = declared if example is None else tuple(example.shape)
        ids = torch.arange(2) if example is None and not meta.dtype.is_floating_point else None
        ranges = [range_of(size, program.range_constraints) for size in meta.shape]
        slots.append(Slot(meta.dtype, declared, usual, ids if example is None else example.detach(), ranges))
    model = as_module(program)
    return Source(text, model, None, _structure_key(text, model), drawing(text, slots, extent))


def _from_onnx(text: str, extent: Extent | None) -> Source:
    import numpy as np
    import torch

    path = Path(text)
    if not path.is_file():
        raise UserMistake(f"model {text!r}: there is no such file")
    try:
        import onnx
    except ImportError:
        raise UserMistake(f"model {text!r}: needs onnx; pip install 'nas-toolkit[export]'") from None
    try:
        graph = onnx.load(text, load_external_data=False).graph
    except Exception as error:
        raise UserMistake(f"model {text!r}: onnx cannot read it: {cause_of(error)}") from error
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    rows = {  # the sizes of the vocabularies that ids are looked up in
        node.input[1]: constants[node.input[0]][0]
        for node in graph.node
        if node.op_type == "Gather" and constants.get(node.input[0])
    }
    slots = []
    for value in graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        declared = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        dtype = torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))).dtype
        ids = None if dtype.is_floating_point else torch.arange(rows.get(value.name, 2)).to(dtype)
        slots.append(Slot(dtype, declared, declared, ids))
    facts = [[node.op_type for node in graph.node], list(constants.values()), [s.declared for s in slots]]
    return Source(text, None, path, _digest([path.name, *facts]), drawing(text, slots, extent))


# -- functions ---------------------------------------------------------------------------------------------------------


def _from_function(text: str, extent: Extent | None) -> Source:
    """A function without arguments (or a class) that gives a module, or a module and its inputs."""
    import torch
    from torch.nn.parameter import is_lazy

    found = load_object(text)
    try:
        with _same_weights():
            made = found() if callable(found) and not isinstance(found, torch.nn.Module) else found
    except Exception as error:
        raise UserMistake(f"model {text!r}: {cause_of(error)}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    if not isinstance(model, torch.nn.Module):
        raise UserMistake(
            f"model {text!r}: must return a torch.nn.Module or (module, inputs), not {type(made).__name__}"
        )
    if inputs is None:
        inputs = _usual_image(text, model, extent)
    if not isinstance(inputs, (tuple, list)) or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise UserMistake(f"model {text!r}: its inputs must be a tuple of tensors, one for each argument")
    tensors = [*model.parameters(), *model.buffers()]
    if any(x.is_meta or is_lazy(x) for x in (*tensors, *inputs)):
        raise UserMistake(
            f"model {text!r}: some tensors hold no values yet (meta device, or lazy layers before their first call); "
            "return it with values, after a call"
        )
    slots = [Slot(x.dtype, (None,) * x.dim(), tuple(x.shape), x.detach().cpu()) for x in inputs]
    return Source(text, model.cpu().eval(), None, _structure_key(text, model), drawing(text, slots, extent))


def _usual_image(text: str, model: nn.Module, extent: Extent | None) -> tuple[Tensor, ...]:
    import torch

    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or "input_size" not in config:
        raise UserMistake(
            f"model {text!r}: returns a module without inputs; return (module, inputs), a tuple of tensors"
        )
    size = tuple(config["input_size"])
    if extent is not None:
        size = (size[0], *extent.image(text))
    return (torch.randn(1, *size, generator=torch.Generator().manual_seed(_SEED)),)
