"""The step `tune`: searches, trains the best again with other seeds, and says what that shows.

The config as it is competes as trial 0 and is always among the finalists. What the seeds allow to
be said is in `verdict.py`; what is kept, so that the same command continues, in `records.py`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.cluster import connect
from pipeline.errors import ConfigError, TrainingError
from pipeline.fid_validation import SPLIT, check_validation_count
from pipeline.tune.proposer import Proposal, Proposer
from pipeline.tune.records import Entry, Records, Result, Rung
from pipeline.tune.scheduling import concurrency, run_trials
from pipeline.tune.scoring import metric_name, trial_protocol
from pipeline.tune.space import refusal
from pipeline.tune.trial import rung_steps, trial_config, trial_key
from pipeline.tune.verdict import RULE, Verdict, judge, spread
from pipeline.workflow import StepContext

RESULT, TABLE, PAGE = "tune.json", "trials.csv", "tune.html"
SEED = "-seed"  # in the names of a finalist's trainings


def tune(context: StepContext) -> dict[str, Any]:
    """Runs the experiment, or what is left of it, and writes its result and its page.

    Returns:
        What was found, with `overrides`: those of the recommended config.

    Raises:
        ConfigError: the section is at odds with others, or nothing in the space is feasible.
        DataError: too few validation images for the score.
        TrainingError: every trial failed.
        ClusterError: Ray lost the work.
    """
    config = context.config
    if faults := config.faults_of_tune():
        raise ConfigError("\n  ".join([f"{config.name} cannot be tuned:", *faults]))
    if config.tune.metric == "fid":
        num_features = context.inputs["features"]["metrics"]["num_features"]
        counts = context.inputs["reference"]["metrics"]["counts"]
        check_validation_count(num_features, counts[SPLIT], "tune.metric = fid")
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
            self.config.tune.space, self.config.tune.searcher, self.config.tune.seed, self._refusal
        )
        for entry in self.records.entries():  # a kill may have come before they were deleted
            if self.records.result(entry) is not None:
                self.records.drop_checkpoints(entry)

    def search(self) -> None:
        """Runs what is left of the proposals, continuing those that were begun first."""
        known = {entry.name: entry for entry in self.records.entries() if SEED not in entry.name}
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
        numbers = [n for n in range(total) if _name(n) not in known]
        # Before Ray Tune starts, so that a space without anything feasible is said at once.
        ahead = [entry for n in numbers[:2] if (entry := self._propose(n)) is not None]
        waiting += ahead
        later = iter(numbers[2:] if len(ahead) == len(numbers[:2]) else [])

        def source() -> Entry | None:
            if waiting:
                return waiting.pop(0)
            number = next(later, None)
            return None if number is None else self._propose(number)

        def on_end(entry: Entry, result: Result) -> None:
            done[entry.name] = result
            if entry.number > 0:
                self.proposer.tell(entry.number, result.value, result.by_images)
            self._tell(entry, result, len(done), total)

        if done:
            self.context.note(f"{len(done):,} of {total:,} trials are there already")
        self.context.progress(len(done), total, "trials")
        self._run(source, on_end, total - len(done), rung_steps(self.config), done)
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
        finished = []
        for entry in self.records.entries():
            result = self.records.result(entry)
            if SEED not in entry.name and result is not None and result.value is not None:
                finished.append((result.value, entry.number, entry))
        ranked = [entry for _, _, entry in sorted(finished)]
        default = [entry for entry in ranked if entry.number == 0]
        others = [entry for entry in ranked if entry.number > 0]
        return default + others[: self.config.tune.num_finalists]

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
        for entry in entries:
            self.records.drop_checkpoints(entry)
        scores = {
            finalist.number: [
                value
                for entry in entries
                if entry.number == finalist.number
                and SEED in entry.name
                and (value := results[entry.name].value) is not None
            ]
            for finalist in finalists
        }
        scores = {number: values for number, values in scores.items() if values}
        if not scores:
            raise TrainingError(
                "No finalist could be trained again with another seed. See the reasons in the "
                "notes, and run the command again with another tune.seed."
            )
        verdict = judge(scores)
        refused = Counter[str]()
        for entry in entries:
            refused.update(entry.refused)
        outcomes = Counter(results[e.name].outcome for e in entries if SEED not in e.name)
        by_number = {entry.number: entry for entry in entries if SEED not in entry.name}
        seconds = [r for result in results.values() for r in result.rungs]
        return {
            "name": self.config.name,
            "metric": self.metric,
            "protocol": trial_protocol(trial_config(self.config, []), self.context.inputs),
            "rule": RULE,
            "verdict": _verdict_json(verdict),
            "recommended": verdict.recommended,
            "overrides": list(by_number[verdict.recommended].overrides),
            "finalists": [
                {"number": number, "scores": values, **asdict(spread(values))}
                for number, values in sorted(scores.items(), key=_mean)
            ],
            "trials": [
                {**asdict(entry), **asdict(results[entry.name])} for entry in entries
            ],
            "rungs": rung_steps(self.config),
            "refused": dict(refused.most_common()),
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
        source: Any,
        on_end: Any,
        count: int,
        rungs: Sequence[int],
        replayed: Mapping[str, Result],
    ) -> None:
        if count < 1:
            return
        run_trials(
            self.config,
            self.context.storage,
            self.context.inputs,
            self.records,
            source,
            on_end,
            count=count,
            at_a_time=self.at_a_time,
            rungs=rungs,
            replayed=replayed,
        )

    def _propose(self, number: int) -> Entry | None:
        if number == 0:
            proposal: Proposal | None = Proposal(0, {}, [])
        else:
            proposal = self.proposer.ask(number)
        if proposal is None:
            self.context.note(f"the space holds nothing new after {number} trials")
            return None
        key = trial_key(trial_config(self.config, proposal.overrides), self.context.inputs)
        return Entry(
            _name(number), number, proposal.choice, proposal.overrides, key, proposal.refused
        )

    def _seeded(self, finalist: Entry, name: str, k: int) -> Entry:
        overrides = [*finalist.overrides, f"train.seed={self.config.train.seed + k}"]
        key = trial_key(trial_config(self.config, overrides), self.context.inputs)
        return Entry(name, finalist.number, finalist.choice, overrides, key)

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


def summarise(document: Mapping[str, Any]) -> str:
    """What an experiment shows, in one sentence."""
    means = {finalist["number"]: finalist for finalist in document["finalists"]}
    number, verdict = document["recommended"], document["verdict"]
    name = "the config as it is" if number == 0 else f"trial {number:04d}"
    score = f"{document['metric']} {means[number]['mean']:.4g} ± {means[number]['std']:.2g}"
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
