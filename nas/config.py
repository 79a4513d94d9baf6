"""The configuration of a run: typed, validated, and exactly what a recipe file holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nas.errors import UserMistake, first_line, nearest

__all__ = ["SearchConfig", "TrainingOptions", "load_recipe", "parse_count", "parse_duration", "to_yaml"]

Scalar = bool | int | float | str | None
MAX_RECIPE_BYTES = 1_000_000


def parse_duration(value: object) -> float:
    """Seconds from a number or a text such as ``90``, ``90s``, ``3m``, ``1h30m``. Raises ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    else:
        text = str(value).strip().lower()
        parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text)
        if not text or parts is None:
            raise ValueError(f"{value!r} is not a duration; write seconds or 90s, 3m, 1h30m")
        hours, minutes, rest = (float(part or 0) for part in parts.groups())
        seconds = hours * 3600 + minutes * 60 + rest
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{value!r} must be a positive, finite duration")
    return seconds


def parse_count(value: object) -> int:
    """An integer from a number or a text such as ``25000000``, ``25M``, ``1.3G``, ``800k``. Raises ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        count = float(value)
    else:
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)", str(value).strip())
        if parts is None:
            raise ValueError(f"{value!r} is not a count; write 800k, 25M or 1.3G")
        count = float(parts[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[parts[2].lower()]
    if not 1 <= count < 2**62:
        raise ValueError(f"{value!r} must be at least 1")
    return round(count)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class TrainingOptions(_Model):
    """How a candidate is trained; ``None`` takes the task's own default."""

    batch_size: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    optimizer: str = "adamw"
    amp: Literal["auto", "off", "bf16"] = "auto"
    train_fraction: float = Field(1.0, gt=0, le=1)


class SearchConfig(_Model):
    """Everything that decides the outcome of a search. Every field is a flag of ``nas search`` or a recipe key."""

    version: Literal[1] = 1
    space: str = Field(description="search space: name, name:scale, module:ATTRIBUTE or file.py:ATTRIBUTE")
    task: str | None = Field(None, description="task; the space's own by default")
    data: str | None = Field(None, description="data set of the task; its embedded data by default")
    task_options: dict[str, Scalar] = Field(default_factory=dict, description="further options of the task")
    evaluator: str = Field(
        "train", description="'train', or module:function / file.py:function of an architecture"
    )
    objectives: list[str] | None = Field(
        None, description="'name:maximize' or 'name:minimize'; the task's metric and latency_ms by default"
    )
    controller: str = Field("tpe", description="what proposes architectures")
    controller_options: dict[str, Scalar] = Field(default_factory=dict)
    device: str = Field("cpu", description="where candidates train: cpu, cuda, cuda:1")
    target: str | None = Field(
        None,
        description="where latency counts: cpu:1, cuda+bf16, {device: cpu, threads: 1}; by default the device",
    )
    trials: int = Field(30, ge=1, le=1_000_000)
    time_budget: float | None = Field(None, description="seconds, or 90s, 3m, 1h; no new candidate after it")
    epochs: int | None = Field(None, ge=1)
    training: TrainingOptions = Field(default_factory=lambda: TrainingOptions.model_validate({}))
    pruner: Literal["median", "successive_halving", "asha", "hyperband", "none"] = "median"
    latency_budget: float | None = Field(
        None, gt=0, description="milliseconds; a slower candidate is not trained"
    )
    params_budget: int | None = Field(None, description="a number, or 800k, 25M")
    macs_budget: int | None = Field(None, description="a number, or 80M, 1.3G")
    seed: int = Field(0, ge=0, lt=2**32)
    workers: int | None = Field(
        None, ge=1, le=4096, description="candidates at a time; as many as cores, at most 4, on a CPU"
    )
    trial_timeout: float | None = Field(3600.0, description="seconds a candidate may take")
    memory_limit: int | None = Field(
        None, description="bytes a candidate may hold; an equal share of the memory by default"
    )
    retries: int = Field(
        2, ge=0, le=100, description="how often a candidate killed from outside is tried again"
    )
    published: bool = Field(True, description="evaluate the baseline and the published variants first")
    storage: str | None = Field(None, description="another Optuna storage: a database URL or journal:FILE")
    join: str | None = Field(
        None, max_length=200, description="name of a study in the storage that several drivers share"
    )
    lease: float = Field(
        60.0,
        ge=1,
        le=86400,
        description="after so many seconds of silence others take over what a driver ran",
    )
    ray: str | None = Field(
        None, description="run candidates on a Ray cluster: auto, local, HOST:PORT or ray://HOST:PORT"
    )
    cpus_per_trial: float = Field(1.0, gt=0, le=4096, description="with ray: processors of a candidate")
    gpus_per_trial: float = Field(
        0.0,
        ge=0,
        le=64,
        description="with ray: GPUs of a candidate, below 1 for a share; 1 on CUDA by default",
    )
    ray_runtime_env: dict[str, Any] | None = Field(
        None,
        description="with ray: what its nodes need, as in Ray's documentation: working_dir, pip, env_vars",
    )
    keep_weights: Literal["all", "front"] = "all"

    @field_validator("time_budget", "trial_timeout", "lease", mode="before")
    @classmethod
    def _duration(cls, value: object) -> float | None:
        return None if value is None else parse_duration(value)

    @field_validator("params_budget", "macs_budget", "memory_limit", mode="before")
    @classmethod
    def _count(cls, value: object) -> int | None:
        return None if value is None else parse_count(value)

    @field_validator("target", mode="before")
    @classmethod
    def _target_of_fields(cls, value: Any) -> Any:
        """A recipe may give the parts of a target by name: {device: cpu, threads: 1, batch: 8}."""
        if not isinstance(value, Mapping):
            return value
        from nas.latency.target import Target

        try:
            return str(Target.parse(value))
        except UserMistake as mistake:
            raise ValueError(str(mistake).removeprefix("target: ")) from None

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, value: list[str] | None) -> list[str] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("needs at least one objective, such as 'accuracy:maximize'")
        for text in value:
            name, _, direction = text.partition(":")
            if not name or direction not in ("maximize", "minimize"):
                raise ValueError(f"{text!r} must be 'name:maximize' or 'name:minimize'")
        if len({text.partition(":")[0] for text in value}) < len(value):
            raise ValueError("names an objective twice")
        return value

    @model_validator(mode="after")
    def _check_text(self) -> SearchConfig:
        for name in (
            "space",
            "task",
            "data",
            "evaluator",
            "controller",
            "device",
            "target",
            "storage",
            "join",
            "ray",
        ):
            text = getattr(self, name)
            if text is not None and (not text.strip() or any(ord(char) < 32 for char in text)):
                raise ValueError(f"{name}: {text!r} is empty or holds control characters")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], origin: str = "configuration") -> SearchConfig:
        """A configuration from plain values; raises UserMistake in one line, naming the key and the way out."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UserMistake(f"{origin}: {_first_problem(error)}") from None

    def dump(self) -> dict[str, Any]:
        """JSON values of every field, defaults included."""
        return self.model_dump(mode="json")


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model: type[BaseModel] = TrainingOptions if path.startswith("training.") else SearchConfig
        known = list(model.model_fields)
        return f"unknown key {path!r}{nearest(path.split('.')[-1], known)}; known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{path} is required"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path or 'values'}: {message[0].lower()}{message[1:]}" + (
        "" if first["type"] == "value_error" else f", got {first['input']!r}"[:200]
    )


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases: nested aliases expand exponentially, and a recipe needs none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases are not allowed in a recipe", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


def load_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe file, not yet validated. Raises UserMistake naming the file and the line."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UserMistake(
                f"--recipe {path}: larger than {MAX_RECIPE_BYTES} bytes; a recipe is a short YAML mapping"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserMistake(f"--recipe {path}: not UTF-8 text; give a YAML file") from None
    except OSError as error:
        raise UserMistake(
            f"--recipe {path}: cannot be read ({error.strerror}); give the path of a YAML file"
        ) from None
    try:
        data = yaml.load(text, Loader=_PlainLoader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserMistake(f"--recipe {path}{where}: {problem}") from None
    except RecursionError:
        raise UserMistake(f"--recipe {path}: nested too deeply; a recipe is a flat YAML mapping") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserMistake(
            f"--recipe {path}: must be a YAML mapping of keys to values, such as 'space: efficient_transformer'"
        )
    return data


def to_yaml(config: SearchConfig) -> str:
    """The resolved configuration as a recipe file."""
    return yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True)
