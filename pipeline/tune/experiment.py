"""The step `tune`: searches, trains the best again with other seeds, and says what that shows.

The config as it is competes as trial 0 and is always among the finalists. What the seeds allow to
be said is in `verdict.py`; what is kept, so that the same command continues, in `records.py`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from pipeline.cluster import connect
from pipeline.errors import ClusterError, ConfigError, DataError, EvaluationError, TrainingError
from pipeline.fid_validation import SPLIT, check_few
from pipeline.protocol import differences
from pipeline.scores import show_number
from pipeline.tune.proposer import Proposal, Proposer
from pipeline.tune.records import SEED, Entry, Records, Result, Rung
from pipeline.tune.scheduling import OnEnd, Source, concurrency, run_trials
from pipeline.tune.scoring import metric_name, trial_protocol
from pipeline.tune.space import refusal
from pipeline.tune.trial import rung_steps, trial_config, trial_key
from pipeline.tune.verdict import RULE, Verdict, judge, spread
from pipeline.workflow import StepContext

RESULT, TABLE, PAGE = "tune.json", "trials.csv", "tune.html"
ATTEMPTS = 3  # at trials that Ray lost without a word


def tune(context: StepContext) -> dict[str, Any]:
    """Runs the experiment, or what is left of it, and writes its result and its page.

    Returns:
        What was found, with `overrides`: those of the recommended config.

    Raises:
        ConfigError: the section is at odds with others, or nothing in the space is feasible.
        DataError: too few validation images for the score.
        EvaluationError: the search was begun under another protocol.
        TrainingError: every trial failed.
        ClusterError: Ray lost the work.
    """
    config = context.config
    if faults := config.faults_of_tune():
        raise ConfigError("\n  ".join([f"{config.name} cannot be tuned:", *faults]))
    _check_counts(context)
    with connect(config) as nodes:  # the one that the workflow has started
        experiment = _Experiment(context, concurrency(config, nodes))
        experiment.search()
        finalists = experiment.find_finalists()
        experiment.train_again(finalists)
    document = experiment.describe(finalists)
    from pipeline.report.tune_page import make_page, make_table  # matplotlib: only here

    context.write_artifact(RESULT, json.dumps(document, indent=1).encode())
    context.write_artifact(TABLE, make_table(document).encode())
    context.write_artifact(PAGE, make_page(document, config, context.storage).encode())
    context.note(summarise(document))
    return {
        name: document[name]
        for name in ("metric", "verdict", "recommended", "overrides", "counts", "cost")
    }


class _Experiment:
    """The trials of one experiment, as far as they are known."""

    def __init__(self, context: StepContext, at_a_time: int) -> None:
        self.context, self.config, self.at_a_time = context, context.config, at_a_time
        self.records = Records(context.storage, context.directory)
        self.metric = metric_name(self.config, context.inputs)
        self.proposer = Proposer(
            self.config.tune.space,
            self.config.tune.searcher,
            self.config.tune.seed,
            self._refusal,
            self._key,
        )
        self._check_protocol()
        results = self.records.results()  # a kill may have come before they were deleted
        self.records.drop_checkpoints(e for e in self.records.entries() if e.name in results)

    def search(self) -> None:
        """Runs what is left of the proposals, continuing those that were begun first."""
        known = {entry.name: entry for entry in self.records.entries() if not entry.is_seeded}
        results = {name: self.records.result(entry) for name, entry in known.items()}
        waiting: list[Entry] = []
        for name, entry in known.items():
            result = results[name]
            if result is None:
                waiting.append(entry)
            if entry.number > 0:
                proposal = Proposal(entry.number, entry.choice, entry.overrides)
                if result is None:
                    self.proposer.ask_again(proposal)
                else:
                    self.proposer.know(proposal, result.value, result.by_images)
        done = {name: result for name, result in results.items() if result is not None}
        total = self.config.tune.num_trials
        later = [n for n in range(total) if _name(n) not in known]
        if exhausted := self.records.exhaustion():
            later.clear()
            self._note_exhaustion(exhausted)

        def propose() -> Entry | None:
            if (entry := self._propose(later.pop(0))) is None:
                later.clear()
            return entry

        # Before Ray Tune starts, so that a space without anything feasible is said at once, and
        # none starts for one without anything new. No more: what waits is to be learned from first.
        while later and (later[0] <= 1 or not waiting):
            if (entry := propose()) is not None:
                waiting.append(entry)

        def source() -> Entry | None:
            if waiting:
                return waiting.pop(0)
            return propose() if later else None

        def on_end(entry: Entry, result: Result) -> None:
            done[entry.name] = result
            if entry.number > 0:
                self.proposer.tell(entry.number, result.value, result.by_images)
            self._tell(entry, result, len(done), total)

        if done:
            self.context.note(f"{len(done):,} of {total:,} trials are there already")
        self.context.progress(len(done), total, "trials")
        self._run(source, on_end, len(waiting) + len(later), rung_steps(self.config), done)
        if not any(result.outcome == "finished" for result in done.values()):
            reasons = Counter(
                result.reason.splitlines()[-1] for result in done.values() if result.reason
            )
            said = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            for entry in self.records.entries():
                self.records.forget(entry)
            raise TrainingError(
                f"None of {len(done)} trials was trained to its end: {said}. Mend the cause, or "
                "change the section tune, and run the command again: it tries them anew."
            )

    def find_finalists(self) -> list[Entry]:
        """The config as it is, where it can be trained, and the trials with the lowest scores."""
        results = self.records.results()
        searched = [e for e in self.records.entries() if not e.is_seeded and e.name in results]
        default = [e for e in searched if e.number == 0 and results[e.name].outcome != "failed"]
        finished = [
            (value, entry.number, entry)
            for entry in searched
            if entry.number > 0 and (value := results[entry.name].value) is not None
        ]
        return (
            default + [entry for _, _, entry in sorted(finished)][: self.config.tune.num_finalists]
        )

    def train_again(self, finalists: Sequence[Entry]) -> None:
        """Trains each finalist with seeds that the search has not seen."""
        known = {entry.name: entry for entry in self.records.entries()}
        entries = []
        for entry in finalists:
            for k in range(1, self.config.tune.num_seeds + 1):
                name = f"{entry.name}{SEED}{k}"
                entries.append(known.get(name) or self._seeded(entry, name, k))
        waiting = [entry for entry in entries if self.records.result(entry) is None]
        total = len(entries)
        done = total - len(waiting)

        def on_end(entry: Entry, result: Result) -> None:
            nonlocal done
            done += 1
            self._tell(entry, result, done, total)

        count, queue = len(waiting), list(waiting)
        if queue:
            self.context.note(
                f"trained again, with {self.config.tune.num_seeds} other seeds each: "
                + ", ".join("as configured" if e.number == 0 else e.name for e in finalists)
            )
        self._run(
            lambda: queue.pop(0) if queue else None, on_end, count, [self.config.trial_steps], {}
        )

    def describe(self, finalists: Sequence[Entry]) -> dict[str, Any]:
        """All that was found, as JSON."""
        entries, results = self.records.entries(), self.records.results()
        self.records.drop_checkpoints(entries, is_last=True)
        seeded = {
            finalist.number: [
                results[entry.name]
                for entry in entries
                if entry.number == finalist.number and entry.is_seeded
            ]
            for finalist in finalists
        }
        scores = {
            number: values
            for number, found in seeded.items()
            if (values := [result.value for result in found if result.value is not None])
        }
        failed = {number: sum(r.value is None for r in seeded[number]) for number in scores}
        if not scores:
            for entry in entries:
                if entry.is_seeded:
                    self.records.forget(entry)
            raise TrainingError(
                "No finalist could be trained again with another seed; the notes say why. Lower "
                "train.learning_rate, or the upper end of its range, and run the command again: it "
                "tries them anew."
            )
        verdict = judge(scores, unsure=[number for number, count in failed.items() if count])
        exhausted = self.records.exhaustion()
        refused = Counter[str](exhausted["refused"] if exhausted else {})
        for entry in entries:
            refused.update(entry.refused)
        outcomes = Counter(results[e.name].outcome for e in entries if not e.is_seeded)
        by_number = {entry.number: entry for entry in entries if not entry.is_seeded}
        seconds = [r for result in results.values() for r in result.rungs]
        return {
            "name": self.config.name,
            "metric": self.metric,
            "protocol": self._protocol(),
            "rule": RULE,
            "verdict": _verdict_json(verdict),
            "recommended": verdict.recommended,
            "overrides": list(by_number[verdict.recommended].overrides),
            "finalists": [
                {"number": number, "scores": values, "failed": failed[number],
                 **asdict(spread(values))}
                for number, values in sorted(scores.items(), key=_mean)
            ],
            "trials": [
                {**asdict(entry), **asdict(results[entry.name])} for entry in entries
            ],
            "rungs": rung_steps(self.config),
            "full_steps": self.config.train.num_steps,
            "refused": dict(refused.most_common()),
            "exhausted": exhausted,
            "counts": {"trials": sum(outcomes.values()), **outcomes},
            "cost": {
                "images": sum(r.rungs[-1].images_seen for r in results.values() if r.rungs),
                "train_s": sum(rung.train_s for rung in seconds),
                "score_s": sum(rung.score_s for rung in seconds),
                "trial_s": sum(result.seconds for result in results.values()),
                "at_a_time": self.at_a_time,
            },
        }  # fmt: skip

    def _run(
        self,
        source: Source,
        on_end: OnEnd,
        count: int,
        rungs: Sequence[int],
        replayed: dict[str, Result],
    ) -> None:
        """Runs what a source gives, and again what Ray lost of it on the way."""
        attempts = 0
        given: list[Entry] = []

        def give() -> Entry | None:
            if (entry := source()) is not None:
                given.append(entry)
            return entry

        while count > 0:
            run_trials(
                self.config,
                self.context.storage,
                self.context.inputs,
                self.records,
                give,
                on_end,
                count=count,
                at_a_time=self.at_a_time,
                rungs=rungs,
                replayed=replayed,
            )
            results, attempts = self.records.results(), attempts + 1
            lost = [entry for entry in given if entry.name not in results]
            if lost and attempts == ATTEMPTS:
                raise ClusterError(
                    f"Ray lost {len(lost)} trials {ATTEMPTS} times without a word, the first "
                    f"{lost[0].name}. Look at its logs, and run the same command again."
                )
            count, source, given = len(lost), partial(_next_of, lost), []

    def _propose(self, number: int) -> Entry | None:
        if number == 0:
            proposal: Proposal | None = Proposal(0, {}, [])
        else:
            proposal = self.proposer.ask(number)
        if proposal is None:
            found = self.records.keep_exhaustion(
                number, self.config.tune.num_trials, self.proposer.exhausted_by
            )
            self._note_exhaustion(found)
            return None
        key = self._key(proposal.overrides)
        return Entry(
            _name(number), number, proposal.choice, proposal.overrides, key, proposal.refused
        )

    def _note_exhaustion(self, found: Mapping[str, Any]) -> None:
        self.context.note(
            f"the space holds nothing new after {found['num_trials']} of {found['asked_for']} "
            f"trials: {sum(found['refused'].values())} draws in a row were refused"
        )

    def _seeded(self, finalist: Entry, name: str, k: int) -> Entry:
        """A finalist, trained and scored with noise of its own; all finalists with the same."""
        overrides = [
            *finalist.overrides,
            f"train.seed={self.config.train.seed + k}",
            f"evaluate.seed={self.config.evaluate.seed + k}",
        ]
        return Entry(name, finalist.number, finalist.choice, overrides, self._key(overrides))

    def _key(self, overrides: Sequence[str]) -> str:
        return trial_key(trial_config(self.config, overrides), self.context.inputs)

    def _protocol(self) -> dict[str, Any]:
        """Of all scores: that of a trial, and the seeds that those of finalists have instead."""
        protocol = trial_protocol(trial_config(self.config, []), self.context.inputs)
        seeds = [self.config.evaluate.seed + k for k in range(1, self.config.tune.num_seeds + 1)]
        return json.loads(json.dumps(protocol | {"finalist_seeds": seeds}))

    def _check_protocol(self) -> None:
        """Scores under two protocols would not compare: other versions may make another."""
        protocol = self._protocol()
        begun = self.records.keep_protocol(protocol)
        if differing := differences(begun, protocol):
            raise EvaluationError(
                f"This search was begun under another protocol, and its scores would not compare "
                f"({', '.join(differing)}). Bring back the versions that it was begun with, or set "
                "another tune.seed to begin anew."
            )

    def _refusal(self, overrides: Sequence[str]) -> str | None:
        return refusal(self.config, overrides, self.config.tune.max_signal_left)

    def _tell(self, entry: Entry, result: Result, done: int, total: int) -> None:
        what = "as configured" if entry.number == 0 else ", ".join(entry.overrides)
        last: Rung | None = result.rungs[-1] if result.rungs else None
        match result.outcome:
            case "finished":
                said = f"{self.metric} {last and last.value:.4g}"
            case "stopped":
                said = f"stopped at {last and last.images_seen:,} images, {last and last.value:.4g}"
            case "failed":
                said = f"failed: {result.reason.splitlines()[-1]}"
        self.context.note(f"trial {entry.name} ({what}): {said}")
        self.context.progress(done, total, "trials")


def _check_counts(context: StepContext) -> None:
    """Refuses a score of fewer images or samples than it is said to have, or needs."""
    config, counts = context.config, context.inputs["preprocess"]["metrics"]["counts"]
    num_samples = config.tune.num_samples
    if config.tune.metric != "fid":
        if counts[SPLIT] < num_samples:
            raise DataError(
                f"tune.metric = {config.tune.metric} scores tune.num_samples = {num_samples} "
                f"validation images, and there are {counts[SPLIT]}. Lower it, or raise "
                "data.validation_fraction."
            )
        return
    num_features = context.inputs["features"]["metrics"]["num_features"]
    check_few(
        num_features,
        counts[SPLIT],
        num_samples,
        wanted_by="tune.metric = fid",
        samples="tune.num_samples",
        instead='set tune.metric = "bits_per_dim"',
    )


def _next_of(entries: list[Entry]) -> Entry | None:
    return entries.pop(0) if entries else None


def summarise(document: Mapping[str, Any]) -> str:
    """What an experiment shows, in one sentence."""
    means = {finalist["number"]: finalist for finalist in document["finalists"]}
    number, verdict = document["recommended"], document["verdict"]
    name = "the config as it is" if number == 0 else f"trial {number:04d}"
    mean, std = (show_number(means[number][key]) for key in ("mean", "std"))
    score = f"{document['metric']} {mean} ± {std}"
    if verdict["kind"] == "best":
        return f"best beyond the spread of {means[number]['count']} seeds: {name} ({score})"
    if verdict["kind"] == "unopposed":
        return f"only {name} was trained to the end, so there is nothing to compare ({score})"
    tied = ", ".join("as configured" if n == 0 else f"{n:04d}" for n in verdict["tied"])
    return (
        f"not distinguishable within the spread over seeds: {tied}; recommended: {name} ({score})"
    )


def _mean(item: tuple[int, Sequence[float]]) -> float:
    return sum(item[1]) / len(item[1])


def _name(number: int) -> str:
    return f"{number:04d}"


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    """With finite intervals: JSON has no infinity."""
    return asdict(verdict) | {
        "intervals": {
            str(number): [None if abs(end) == float("inf") else end for end in ends]
            for number, ends in verdict.intervals.items()
        }
    }
