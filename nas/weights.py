"""Weights as safetensors: written whole or not at all, checked before they are believed, never half-loaded.

A flipped byte in the payload of a safetensors file loads without a word, so every file gets a SHA-256: returned for
the record of the trial, and written beside the file as ``NAME.safetensors.sha256`` in the format of ``sha256sum``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nas.errors import UserMistake
from nas.files import CorruptFile, WriteFailed, atomic_path, atomic_write_text, sha256_file

__all__ = ["load_tensors", "load_weights", "save_tensors", "save_weights", "sidecar"]

logger = logging.getLogger(__name__)

_SHARED = "nas.shared"
_SHOWN = 3


def save_weights(
    model: nn.Module | Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> str:
    """Write the weights of a model, or a state dict, from any device.

    Tensors under several names (tied embeddings) are stored once.

    Args:
        model: a module (one wrapped by ``torch.compile`` is unwrapped) or its state dict.
        path: the file, replaced atomically; its sidecar is written after it.
        metadata: texts kept in the file's header.

    Returns:
        SHA-256 of the file, 64 hex digits.

    Raises:
        WriteFailed: disk full, directory gone, ...; what stood there before is untouched.
        UserMistake: an entry of the state dict is not a tensor with data.
    """
    path = Path(path)
    state = _state(model)
    # Without a sidecar a file is loaded by the checksum of its record; with a stale one it would be refused. So the
    # old sidecar goes first, and a writer that is killed in between does no harm.
    sidecar(path).unlink(missing_ok=True)
    digest = save_tensors(state, path, metadata)
    atomic_write_text(sidecar(path), f"{digest}  {path.name}\n")
    return digest


def load_weights(model: nn.Module, path: str | Path, sha256: str | None = None) -> dict[str, str]:
    """Load weights into ``model``, all or nothing, and return the metadata of the file.

    Args:
        model: on any device; names and shapes must be those of the file exactly.
        path: a safetensors file.
        sha256: the checksum in the record; ``None`` takes the one of the sidecar. Without either the file is loaded
            unchecked, with a warning in the log.

    Raises:
        CorruptFile: the file is cut short or does not match its checksum.
        UserMistake: names or shapes differ (the message says which), or there is no such file.
    """
    path = Path(path)
    if sha256 is None:
        sha256 = _read_sidecar(path)
        if sha256 is None:
            logger.warning("%s has no checksum beside it and is loaded unchecked", path)
    state, metadata = load_tensors(path, sha256)
    own = _unwrapped(model).state_dict()
    _require_fit(path, own, state)
    _unwrapped(model).load_state_dict(state, strict=True)
    return metadata


def save_tensors(
    state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> str:
    """``save_weights`` of a state dict, without the sidecar: for callers that keep the checksum themselves."""
    path = Path(path)
    tensors, shared = _independent(state)
    header = {"format": "pt", **(metadata or {})}
    if shared:
        header[_SHARED] = json.dumps(shared, sort_keys=True)
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:
            raise WriteFailed(path, None, str(error)) from error
        # Taken from the file and not from memory: what will be read is what counts.
        return sha256_file(temporary)


def load_tensors(path: str | Path, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file, checked against ``sha256`` if it is given."""
    path = Path(path)
    if not path.is_file():
        raise UserMistake(f"weights {path}: no such file")
    if sha256 is not None and sha256_file(path) != sha256.lower():
        raise CorruptFile(path, f"its SHA-256 is not {sha256[:12]}..., the one recorded when it was written")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise CorruptFile(path, f"not a whole safetensors file ({error})") from None
    for name, kept in _shared_names(path, metadata).items():
        if kept not in state:
            raise CorruptFile(path, f"{name!r} refers to {kept!r}, which it does not hold")
        state[name] = state[kept]
    metadata.pop(_SHARED, None)
    return state, metadata


def sidecar(path: str | Path) -> Path:
    """Where the checksum of ``path`` is written: ``NAME.sha256`` beside it."""
    path = Path(path)
    return path.with_name(path.name + ".sha256")


def _read_sidecar(path: Path) -> str | None:
    place = sidecar(path)
    try:
        words = place.read_text(encoding="ascii").split()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        words = []
    if not words or len(words[0]) != 64:
        raise CorruptFile(place, "it does not start with a SHA-256 of 64 hex digits")
    return words[0]


def _unwrapped(model: nn.Module) -> nn.Module:
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def _state(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return _unwrapped(model).state_dict() if isinstance(model, nn.Module) else model


def _independent(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors of which no two share memory, and the names left out with the name kept instead."""
    tensors: dict[str, Tensor] = {}
    shared = _aliases(state)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.device.type == "meta":
            raise UserMistake(f"weights: {name!r} is {_kind(value)}; only tensors with data can be saved")
        if name in shared:
            continue
        tensor = value.detach().to("cpu").contiguous()
        # A view of something larger would be refused, or would write more than itself.
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        tensors[name] = tensor
    return _without_overlaps(tensors), shared


def _without_overlaps(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen and tensor.numel():
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(place)
    return tensors


def _kind(value: object) -> str:
    return "on the meta device" if isinstance(value, Tensor) else f"of type {type(value).__name__}"


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> earlier name of the very same tensor."""
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.device.type == "meta" or value.numel() == 0:
            continue
        storage = value.untyped_storage().data_ptr()
        place = (
            value.device,
            storage,
            value.storage_offset(),
            tuple(value.shape),
            value.stride(),
            value.dtype,
        )
        if place in first:
            found[name] = first[place]
        else:
            first[place] = name
    return found


def _shared_names(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    if _SHARED not in metadata:
        return {}
    try:
        shared = json.loads(metadata[_SHARED])
        return {str(name): str(kept) for name, kept in shared.items()}
    except (ValueError, AttributeError, RecursionError):
        raise CorruptFile(path, "its table of shared tensors is not JSON") from None


def _require_fit(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises UserMistake with everything that keeps ``state`` from being loaded into a model with state ``own``."""
    complaints = []
    if missing := [name for name in own if name not in state]:
        complaints.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected := [name for name in state if name not in own]:
        complaints.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    both = [name for name in own if name in state]
    if other := [name for name in both if own[name].shape != state[name].shape]:
        texts = [f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}" for name in other]
        complaints.append(f"{len(other)} of another shape ({_some(texts)})")
    if kinds := [name for name in both if own[name].is_floating_point() != state[name].is_floating_point()]:
        complaints.append(f"{len(kinds)} of another kind of number ({_some(kinds)})")
    if not complaints:
        for name, kept in _aliases(own).items():
            if not torch.equal(state[name], state[kept]):
                complaints.append(f"{name} and {kept} are one tensor in the model but differ in the file")
    if complaints:
        raise UserMistake(
            f"weights {path} do not fit the model: {'; '.join(complaints)}; build the model from the architecture "
            "that was saved with them"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
