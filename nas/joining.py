"""Several drivers on one study, through a database on a server or Optuna's journal file.

Every change is made while the study is locked for all machines (the study's row, or the journal's lock), so each
architecture is reserved by one driver alone, and the total of trials is kept. Each reservation has a claim of its own;
when another driver takes a trial over it gets another one, and a result that comes with the former claim is refused.
The lock is held for milliseconds, never while a candidate runs.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nas.drivers import Pulse
from nas.errors import RunStopped, UserMistake
from nas.files import seal
from nas.mending import mend_files
from nas.neighbours import Neighbours, has_weights
from nas.records import StoredTrial, TrialResult
from nas.shared import Lease, agree, require_shareable, require_shared
from nas.shared_view import SharedView
from nas.storage import stop_on_error
from nas.stored import OPTUNA_STATES, StoredStudy, make_identity
from nas.study import MAX_INTERRUPTIONS, KeyTaken, StudyFull, TakenOver

if TYPE_CHECKING:
    from nas.ledger import Ledger
    from nas.pareto import Direction
    from nas.run_directory import RunDirectory
    from spaces import Architecture, SearchSpace

__all__ = ["JoinedStudy"]


class JoinedStudy(SharedView):
    """A study that other drivers work on too; each has a run directory of its own for its files.

    What the storage holds is the truth; a run directory holds the records and the weights of what ran there.
    """

    # -- opening -------------------------------------------------------------------------------------------------------

    @classmethod
    def begin(
        cls,
        run: RunDirectory,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> tuple[JoinedStudy, dict[str, Any]]:
        """Make the study ``config["join"]``, or join it if somebody has made it; and the facts of this run directory.

        Raises UserMistake when the study there is of another space or other objectives.
        """
        run.require_lock()
        url = require_shareable(config.get("storage"))
        with stop_on_error(f"--storage: the study {config['join']!r}"):
            stored = StoredStudy(run, url, reading=False, name=str(config["join"]))
            if stored.broken:
                raise UserMistake(f"--storage: {stored.broken}; give another")
            token, driver = uuid.uuid4().hex, uuid.uuid4().hex
            wanted = make_identity(space, objectives, config, facts, token)
            try:
                identity = agree(stored, run, space, objectives, wanted)
                known = {**identity["facts"], "environment": facts.get("environment")}
                own = {**facts, **known, "run": identity["run"], "driver": driver}
                return cls._enter(run, space, objectives, stored, identity, own, config), own
            except BaseException:
                stored.close()
                raise

    @classmethod
    def reopen(
        cls,
        run: RunDirectory,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        config: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
    ) -> tuple[JoinedStudy, list[str]]:
        """Join again with a run directory that has been part of it, and what had to be mended, one line each.

        Raises UserMistake when the study is gone, is another one, or is damaged.
        """
        run.require_lock()
        name, url = str(config["join"]), require_shareable(config.get("storage"))
        with stop_on_error(f"the study {name!r} that is shared by {run.path}"):
            stored = StoredStudy(run, url, reading=False, name=name)
            try:
                if stored.broken or stored.identity is None:
                    why = stored.broken or f"there is no study {name!r}"
                    raise UserMistake(
                        f"--storage: {why}; restore it from its backup, or start another run with --out"
                    )
                own = {"run": stored.identity["run"], **(facts or {})}
                wanted = make_identity(space, objectives, config, own, str(own["run"]))
                require_shared(stored.identity, name)
                stored.require_same(wanted, run, space.name)
                study = cls._enter(run, space, objectives, stored, stored.identity, own, config)
            except BaseException:
                stored.close()
                raise
            here = [trial for trial in study.trials() if run.trial(trial.number).is_dir()]
            return study, mend_files(study._records, here)

    @classmethod
    def _enter(
        cls,
        run: RunDirectory,
        space: SearchSpace,
        objectives: Sequence[tuple[str, Direction]],
        stored: StoredStudy,
        identity: Mapping[str, Any],
        facts: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> JoinedStudy:
        driver = str(facts.get("driver") or uuid.uuid4().hex)
        study = cls(run, space, objectives, stored, identity, driver)
        study._steady(lambda: study._sign_on(int(config["trials"])))
        pulse = Pulse(study._beat, study._lease, int(study._entry["beat"]))
        run.on_release(stored.close)
        run.on_release(pulse.stop)
        pulse.start()
        return study

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Nothing but the total is taken from a driver that resumes: the study stays what it was begun as."""
        self._steady(lambda: self._ask_for(int(config["trials"])))

    # -- what other drivers leave --------------------------------------------------------------------------------------

    def take_over(self) -> StoredTrial | None:
        for number in sorted(self._unfinished - self._held.keys()):
            trial, lease = self._trials[number], self._leases.get(number)
            if trial.state == "waiting" or (lease is not None and self._is_dead(lease)):
                taken = self._take(trial, lease)
                if taken is not None:
                    return taken
        return None

    def _is_dead(self, lease: Lease) -> bool:
        # What has our own name and is not held was left by the driver that had this directory before.
        return lease.driver == self._driver or self._watch.lapsed(lease.driver)

    def _take(self, trial: StoredTrial, lease: Lease | None) -> StoredTrial | None:
        """Make a trial that nobody works on ours; None when another was faster or its result turned out to be there."""
        mine = Lease(self._driver, uuid.uuid4().hex)
        count = trial.interruptions + (trial.state == "running")

        def claim() -> bool:
            with self._exclusively() as ledger:
                self._absorb(ledger.rows(self._last_id, [trial.trial_id]))
                now, holder = self._trials[trial.number], self._leases.get(trial.number)
                if holder == mine:  # an earlier attempt has reached the server after all
                    return True
                if now.result is not None or now.state != trial.state or holder != lease:
                    return False
                attributes = {"lease": vars(mine), "interruptions": count}
                if now.state == "running":
                    ledger.update(trial.trial_id, attributes, "WAITING")
                    attributes = {}
                return ledger.update(trial.trial_id, attributes, "RUNNING")

        if not self._steady(claim):
            return None
        taken = self._hold(replace(trial, state="running", interruptions=count), mine)
        with stop_on_error(self._where):
            self._records.write_suggestion(taken)
        return self._finish_if_known(taken, lease)

    def _finish_if_known(self, taken: StoredTrial, before: Lease | None) -> StoredTrial | None:
        result = (
            self._saved_result(taken)
            or self._left.get(taken.number)
            or self._neighbours().result(taken, before)
        )
        if result is None and taken.interruptions >= MAX_INTERRUPTIONS:
            reason = f"the driver died {taken.interruptions} times while this candidate ran"
            result = TrialResult("failed", failure={"kind": "interrupted", "reason": reason, "log_tail": ""})
        if result is None:
            return taken
        with contextlib.suppress(TakenOver):
            self._news.append(self.record(taken, result))
        return None

    def _neighbours(self) -> Neighbours:
        attributes = self._steady(lambda: self._ledger_here().study_attributes())
        return Neighbours(attributes, self._driver, self.token)

    def gather(self) -> None:
        others = [
            trial
            for trial in self.trials()
            if trial.result is not None
            and trial.result.weights_sha256 is not None
            and not has_weights(self.run.trial(trial.number), trial.result.weights_sha256)
        ]
        neighbours = self._neighbours() if others else None
        for trial in others:
            assert neighbours is not None  # there are others
            with contextlib.suppress(OSError):  # the report says then that they are not here
                self._records.write_suggestion(trial)
                folder = self.run.trial(trial.number)
                neighbours.fetch_weights(trial, self._leases.get(trial.number), folder)

    # -- writing -------------------------------------------------------------------------------------------------------

    def suggest(
        self, architecture: Architecture, *, name: str | None = None, seed: int | Callable[[int], int] = 0
    ) -> StoredTrial:
        mine = Lease(self._driver, uuid.uuid4().hex)

        def reserve() -> StoredTrial:
            with self._exclusively() as ledger:
                self._absorb(ledger.rows(self._last_id, self._open_ids()))
                trial = self._new_trial(architecture, name, seed)
                known = self._keys.get(trial.key)
                if known is not None:
                    if self._leases.get(known) == mine:  # an earlier attempt has reached the server after all
                        return self._trials[known]
                    raise KeyTaken(f"trial {known} is of the same architecture")
                if self.size >= self._total:
                    raise StudyFull(f"all {self._total} trials are reserved")
                attributes = {"nas": seal(trial.suggestion(self.token).to_dict()), "lease": vars(mine)}
                trial_id, number = ledger.create("RUNNING", trial.architecture, attributes)
                if number != trial.number:
                    raise RunStopped(f"{self._where}: another program has added trials to it")
            return replace(trial, trial_id=trial_id)

        trial = self._steady(reserve)
        if trial.number == self._count:
            self._count += 1
        self._last_id = max(self._last_id, trial.trial_id)
        self._hold(trial, mine)
        with stop_on_error(self._where):
            self._records.write_suggestion(trial)
        return trial

    def _hold(self, trial: StoredTrial, lease: Lease) -> StoredTrial:
        self._held[trial.number] = self._leases[trial.number] = lease
        return self._remember(trial)

    def record(self, trial: StoredTrial, result: TrialResult) -> StoredTrial:
        values = self._finite(result.values) if result.state == "complete" else None
        sealed = seal({**result.to_dict(), "key": trial.key})
        self._records.sweep(trial.number)
        with stop_on_error(self._where):
            saved = self._saved_result(trial)
            if saved is None or not saved.same_as(result):
                self._records.write_result(trial, result)

        def write(ledger: Ledger) -> None:
            ledger.update(trial.trial_id, {"result": sealed}, OPTUNA_STATES[result.state], values)

        try:
            self._change(trial, write, result)
        except TakenOver:
            self._put_aside(trial.number)
            raise
        return self._remember(trial.finished(result))

    def park(self, trial: StoredTrial) -> StoredTrial:
        result = self._saved_result(trial)
        try:
            if result is not None:
                return self.record(trial, result)
            self._records.sweep(trial.number)
            self._change(trial, lambda ledger: ledger.update(trial.trial_id, {}, "WAITING"), None)
        except TakenOver:
            return self._trials[trial.number]
        return self._remember(replace(trial, state="waiting"))

    def claim(self, trial: StoredTrial) -> StoredTrial:
        taken = self._take(trial, self._leases.get(trial.number))
        if taken is None:
            raise TakenOver(f"trial {trial.number} was taken by another driver")
        return taken

    def recover(self) -> list[StoredTrial]:
        """Nothing: ``take_over`` finds what the driver before has left here as well as what others leave."""
        return []

    def _change(
        self, trial: StoredTrial, write: Callable[[Ledger], object], result: TrialResult | None
    ) -> None:
        """Change a trial that we hold, and give it back. Raises TakenOver when it is no longer ours."""
        mine = self._held.get(trial.number)

        def change() -> bool:
            with self._exclusively() as ledger:
                self._absorb(ledger.rows(self._last_id, [trial.trial_id]))
                now = self._trials[trial.number]
                if mine is None or self._leases.get(trial.number) != mine:
                    return False
                if now.result is not None:  # an earlier attempt has reached the server after all
                    return result is not None and now.result.same_as(result)
                if result is not None or now.state == "running":
                    write(ledger)
                return True

        done = self._steady(change)
        self._held.pop(trial.number, None)
        if not done:
            raise TakenOver(f"trial {trial.number} was taken over by another driver")

    def _put_aside(self, number: int) -> None:
        """A late result stays readable, but is not taken for the trial's."""
        path = self._records.result_path(number)
        with contextlib.suppress(OSError):
            os.replace(path, path.with_name("result.refused.json"))
