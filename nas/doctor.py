"""What is installed, which devices there are, what would fail and how to mend it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from nas.config import SearchConfig, to_yaml
from nas.errors import UserMistake, first_line
from nas.files import CorruptFile, atomic_write_text, read_record, sha256_file
from nas.recorded import put_back, read_recorded
from nas.resolve import objectives_of
from nas.run_directory import RunDirectory
from nas.storage import keep_copy
from nas.stored import read_identity
from nas.study import Study
from spaces import get_space

__all__ = ["Finding", "examine", "repair"]

DISTRIBUTION = "nas-toolkit"
_MODULES = {"psycopg2-binary": "psycopg2", "scikit-learn": "sklearn", "pyyaml": "yaml", "pillow": "PIL"}


@dataclass(frozen=True)
class Finding:
    """One fact: ``ok``, ``missing`` (something optional is not there) or ``broken`` (something will fail)."""

    status: Literal["ok", "missing", "broken"]
    subject: str
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at the interpreter, the packages, the devices, the memory, the disk."""
    return [_python(), *_packages(), *_devices(), _memory(), _disk(), _sqlite()]


def _python() -> Finding:
    return Finding("ok", "python", ".".join(map(str, sys.version_info[:3])))


def _packages() -> list[Finding]:
    findings = []
    try:
        declared = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return [Finding("broken", DISTRIBUTION, "is not installed", "pip install -e . in the checkout")]
    for text in declared:
        requirement, _, marker = text.partition(";")
        name = _name_of(requirement)
        extra = marker.split("extra ==")[1].strip(" '\"") if "extra ==" in marker else None
        if extra in ("all", "test"):
            continue
        findings.append(_package(name, extra))
    return findings


def _name_of(requirement: str) -> str:
    end = next(
        (i for i, char in enumerate(requirement) if not (char.isalnum() or char in "-_.")), len(requirement)
    )
    return requirement[:end].lower()


def _package(name: str, extra: str | None) -> Finding:
    install = f"pip install 'nas-toolkit[{extra}]'" if extra else f"pip install {name}"
    try:
        found = version(name)
    except PackageNotFoundError:
        status: Literal["missing", "broken"] = "missing" if extra else "broken"
        return Finding(status, name, "not installed" + (f" (extra {extra})" if extra else ""), install)
    try:
        importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # whatever an import can raise is what the user would meet
        reason = f"{found} does not import: {type(error).__name__}: {first_line(error)}"
        return Finding("broken", name, reason, f"{install} --upgrade --force-reinstall")
    return Finding("ok", name, found)


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings = [Finding("ok", "cpu", f"{cores} cores usable, torch uses {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            f"torch is built for CUDA {built}, but sees no device"
            if built
            else "this torch is built without CUDA"
        )
        remedy = "check the driver with nvidia-smi" if built else "install a CUDA build of torch"
        return [*findings, Finding("missing", "cuda", f"{why}; --gpu will not work", remedy)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        findings.append(
            Finding("ok", f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        )
    return findings


def _memory() -> Finding:
    import psutil

    available = psutil.virtual_memory().available / 2**30
    if available < 2:
        return Finding(
            "broken", "memory", f"{available:.1f} GiB available", "close programs, or use --workers 1"
        )
    return Finding("ok", "memory", f"{available:.1f} GiB available")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    try:
        with tempfile.TemporaryFile(dir="."):
            pass
    except OSError as error:
        return Finding(
            "broken",
            "disk",
            f"the current directory cannot be written ({error.strerror})",
            "give --out elsewhere",
        )
    if free < 1:
        return Finding("broken", "disk", f"{free:.2f} GiB free here", "free space, or give --out elsewhere")
    return Finding("ok", "disk", f"{free:.0f} GiB free here")


def _sqlite() -> Finding:
    import sqlite3

    return Finding("ok", "sqlite", sqlite3.sqlite_version)


def repair(path: Path) -> list[str]:
    """Mend a run directory: what was done, one line each; empty when nothing was wrong.

    The study is built again from what is whole of it and of the sealed records under ``trials/``; damaged records and
    facts are written anew; an edited or unreadable recipe is replaced by the one the study was started with. Damaged
    files are kept under another name. Damaged weights are named; they cannot be mended.
    Raises UserMistake when the directory holds too little to mend.
    """
    if not path.is_dir():
        raise UserMistake(f"--repair {path}: not a directory; give a run directory")
    run = RunDirectory.existing(path)
    run.acquire()
    try:
        recorded = read_recorded(run)
        url = Study.url(run, recorded.config.storage)
        identity = (
            None if recorded.config.join else read_identity(run, url)
        )  # a shared one is of its first driver
        config = recorded.config if identity is None else SearchConfig.parse(identity["config"])
        done = put_back(run, replace(recorded, config=config))
        if (recorded.edited or config != recorded.config) and run.recipe not in recorded.damage:
            kept = keep_copy(run.recipe)
            atomic_write_text(run.recipe, to_yaml(config))
            done.append(
                f"{run.recipe} had been edited and was written anew, the old one is kept as {kept.name}"
            )
        space = get_space(config.space, task=config.task)
        study, mended = Study.open(run, space, objectives_of(config, None), config.dump(), recorded.facts)
        return [*done, *mended, *_finalists(run), *_weights(study)]
    finally:
        run.release()


def _finalists(run: RunDirectory) -> list[str]:
    try:
        read_record(run.finalists)
    except FileNotFoundError:
        return []
    except CorruptFile as error:
        kept = keep_copy(run.finalists)
        return [
            f"{error}; it is kept as {kept.name}, and 'nas resume {run.path}' measures the finalists again"
        ]
    return []


def _weights(study: Study) -> list[str]:
    lines = []
    for trial in study.trials():
        file = study.run.trial(trial.number) / "weights.safetensors"
        wanted = trial.result.weights_sha256 if trial.result else None
        if wanted is not None and file.exists() and sha256_file(file) != wanted:
            lines.append(f"{file} is damaged and cannot be mended; only another run can train it again")
    return lines
