"""Reading a run without owning it: for reports, exports and a look at one trial, also while a search is running."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.config import SearchConfig
from nas.errors import UserMistake
from nas.recorded import read_recorded
from nas.resolve import objectives_of
from nas.run_directory import RunDirectory
from nas.storage import DamagedStorage
from nas.study import StoredTrial, Study
from spaces import get_space

if TYPE_CHECKING:
    from nas.report.data import RunReport

__all__ = ["ReadRun", "newest_run", "read_run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadRun:
    """A run as it is on disk."""

    directory: RunDirectory
    config: SearchConfig
    study: Study
    facts: dict[str, Any]

    def report(self) -> RunReport:
        """The report of what is there now."""
        from nas.conclude import build_report

        return build_report(self.study, self.config, self.facts)

    def trial(self, number: int) -> StoredTrial:
        """One trial. Raises UserMistake naming those there are."""
        trials = {trial.number: trial for trial in self.study.trials()}
        if number not in trials:
            known = f"0 to {max(trials)}" if trials else "none yet"
            raise UserMistake(f"trial {number}: not in {self.directory.path}; its trials: {known}")
        return trials[number]


def read_run(path: str | Path) -> ReadRun:
    """Open a run for reading. What is damaged is taken from its copies, or left out, with a warning in the log.

    Raises UserMistake when it is not a run or when nothing of it can be read.
    """
    run = RunDirectory.existing(Path(path))
    recorded = read_recorded(run)
    config, facts = recorded.config, recorded.facts or {}
    for damaged, why in recorded.damage.items():
        logger.warning("%s is damaged: %s; 'nas doctor --repair %s' mends it", damaged, why, path)
    if recorded.edited:
        edited = "; ".join(recorded.edited.values())
        logger.warning("%s is not what the run was started with and is not believed: %s", run.recipe, edited)
    space = get_space(config.space, task=config.task)
    try:
        study = Study.read(run, space, objectives_of(config, facts.get("objective")), config.dump(), facts)
    except DamagedStorage as error:
        raise UserMistake(f"{error}; 'nas resume {path}' or 'nas doctor --repair {path}' mends it") from None
    return ReadRun(run, config, study, facts)


def newest_run(parent: Path = Path("runs")) -> Path:
    """The run directory below ``parent`` that was started last. Raises UserMistake if there is none."""
    found = [path.parent for path in parent.glob("*/recipe.yaml")] if parent.is_dir() else []
    if not found:
        raise UserMistake(f"no run below {parent}/; give the run directory")
    return max(found, key=lambda path: (path / "recipe.yaml").stat().st_mtime)
