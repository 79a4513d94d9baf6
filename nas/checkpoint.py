"""The state of a training on disk after each epoch, so that an interrupted one goes on as if it had not been."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from nas.errors import UserMistake
from nas.files import CorruptFile, read_record, sweep_temporary, write_record
from nas.weights import load_tensors, save_tensors

if TYPE_CHECKING:
    from nas.training import TrainConfig

__all__ = ["Checkpoints", "Training"]

logger = logging.getLogger(__name__)

_KEPT_CHECKPOINTS = 2


class Training(Protocol):
    """What of a training is kept."""

    model: nn.Module
    optimizer: Optimizer


class Checkpoints:
    """Model, optimiser and history after an epoch: tensors as safetensors, the rest as a sealed record beside them.

    The record is written last and holds the checksum of the tensors, so that a checkpoint counts only when whole.
    Raises UserMistake when the directory holds another training, which is not to be overwritten.
    """

    def __init__(self, directory: Path, config: TrainConfig):
        self._directory = directory
        self._config = asdict(config)
        directory.mkdir(parents=True, exist_ok=True)
        sweep_temporary(directory)

    def save(self, run: Training, history: list[dict[str, Any]]) -> None:
        """Write the state after ``len(history)`` epochs and remove all but the last two."""
        record, weights = self._paths(len(history))
        tensors, scalars = _packed(run.optimizer)
        tensors.update({f"model.{name}": value for name, value in run.model.state_dict().items()})
        digest = save_tensors(tensors, weights)
        write_record(
            record, {"config": self._config, "history": history, "optimizer": scalars, "tensors": digest}
        )
        kept = {path.name for epochs in self._saved()[:_KEPT_CHECKPOINTS] for path in self._paths(epochs)}
        for path in self._directory.glob("epoch-*"):
            if path.name not in kept:
                path.unlink()

    def restore(self, run: Training) -> list[dict[str, Any]]:
        """Put the newest whole state of the same training into ``run``; returns its history, empty without one."""
        for epochs in self._saved():
            try:
                return self._load(run, *self._paths(epochs))
            except (CorruptFile, OSError) as error:
                logger.warning("the checkpoint after epoch %d is discarded: %s", epochs, error)
                for path in self._paths(epochs):
                    path.unlink(missing_ok=True)
        return []

    def _load(self, run: Training, record: Path, weights: Path) -> list[dict[str, Any]]:
        saved = read_record(record)
        if other := [name for name, value in self._config.items() if saved["config"].get(name) != value]:
            raise UserMistake(
                f"checkpoint {record} is of a training with another {', '.join(other)}; remove it or choose another "
                "place"
            )
        if not weights.exists():
            raise CorruptFile(weights, "it is missing")
        tensors, _ = load_tensors(weights, saved["tensors"])
        model = {
            name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")
        }
        own = run.model.state_dict()
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in model.items()}:
            raise UserMistake(f"checkpoint {weights} is of another model; remove it or choose another place")
        _unpack(run.optimizer, tensors, saved["optimizer"])
        run.model.load_state_dict(model)
        history: list[dict[str, Any]] = saved["history"]
        return history

    def _saved(self) -> list[int]:
        """Epochs after which a record was written, newest first."""
        names = [path.stem.removeprefix("epoch-") for path in self._directory.glob("epoch-*.json")]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _paths(self, epochs: int) -> tuple[Path, Path]:
        stem = f"epoch-{epochs:04d}"
        return self._directory / f"{stem}.json", self._directory / f"{stem}.safetensors"


def _packed(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """State of an optimiser as named tensors, and as JSON what is no tensor; ``_unpack`` is the inverse.

    Both hold ``state.INDEX.NAME`` for each parameter and ``group.INDEX.NAME``, where some optimisers count steps.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    saved = optimizer.state_dict()
    groups = dict(enumerate(saved["param_groups"]))
    for kind, entries in (("state", saved["state"]), ("group", groups)):
        for index, values in entries.items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{index}.{name}"] = value
                elif isinstance(value, (bool, int, float, str, type(None))):
                    scalars.setdefault(f"{kind}.{index}", {})[name] = value
    return tensors, scalars


def _unpack(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, Any]]
) -> None:
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    flat = [(place, name, value) for place, values in scalars.items() for name, value in values.items()]
    flat += [(*name.rpartition(".")[::2], value) for name, value in tensors.items()]
    for place, name, value in flat:
        kind, _, index = place.partition(".")
        if kind == "state":
            state.setdefault(int(index), {})[name] = value
        elif kind == "group":
            groups[int(index)][name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
