"""Ask and tell over Optuna: what to try next, given what is known. No Ray here.

Proposal n is drawn by a sampler seeded with (seed, n), given what is known when it is asked for. So
an experiment which is continued goes on as it would have, as far as its trials end in the same
order: what was proposed and found is told again, and no state is unpickled.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.errors import ConfigError
from pipeline.loader import keyed_seed
from pipeline.settings import SpaceConfig
from pipeline.tune.space import draw, to_overrides

MAX_REFUSALS = 200  # in a row, before a space is taken for one without feasible choices
NUM_STARTUP = 8  # random proposals before TPE has something to go by
EXPLORED_EVERY = 4  # one in so many is random: TPE may settle on the first schedule that does well
MAX_LEARNED = 20  # refusals, of which TPE learns nothing, before a proposal is drawn at random

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Proposal:
    """Something to try; JSON.

    Args:
        number: 0 is the config as it is.
        choice: by name of the parameter; empty for the config as it is.
        overrides: the same, as `--set` takes it.
        refused: what was drawn before it and refused, counted by reason.
    """

    number: int
    choice: Mapping[str, Any]
    overrides: Sequence[str]
    refused: Mapping[str, int] = field(default_factory=dict)


Kind = Literal["tpe", "random"]
Refusal = Callable[[Sequence[str]], str | None]


class Proposer:
    """Proposes choices, one at a time, and learns from what came of them.

    Args:
        space: that is searched.
        searcher: how.
        seed: of the draws.
        refuse: why overrides are not worth a trial; None where they are.
        identify: the same for overrides that make the same trial, whatever they say.
        draw: a choice from a trial of Optuna's; of `space` where not given.
    """

    def __init__(
        self,
        space: SpaceConfig,
        searcher: Kind,
        seed: int,
        refuse: Refusal = lambda overrides: None,
        identify: Callable[[Sequence[str]], Hashable] = tuple,
        draw: Callable[[Any, SpaceConfig], dict[str, Any]] = draw,
    ) -> None:
        self._space, self._kind, self._seed = space, searcher, seed
        self._refuse, self._identify, self._draw = refuse, identify, draw
        self._study = optuna.create_study(direction="minimize")
        self._asked: dict[int, optuna.Trial] = {}
        self._seen: set[Hashable] = {identify(())}  # the config as it is
        self._num_found = 0
        self.exhausted_by: Mapping[str, int] = {}  # draws refused in vain, counted by reason

    def ask(self, number: int) -> Proposal | None:
        """The next proposal; None where nothing new is left, and `exhausted_by` says why.

        Raises:
            ConfigError: nothing that was drawn is feasible.
        """
        refused = Counter[str]()
        while sum(refused.values()) < MAX_REFUSALS:
            self._study.sampler = self._sampler(number, sum(refused.values()))
            trial = self._study.ask()
            choice = self._draw(trial, self._space)
            overrides = to_overrides(choice)
            reason = self._refuse(overrides)
            if reason is None and self._identify(overrides) in self._seen:
                reason = "the config as it is, or proposed before"
            if reason is None:
                self._asked[number] = trial
                self._seen.add(self._identify(overrides))
                self._num_found += 1
                return Proposal(number, choice, overrides, dict(refused))
            self._study.tell(trial, state=TrialState.FAIL)
            refused[reason] += 1
        if self._num_found:
            self.exhausted_by = dict(refused)
            return None
        reasons = "; ".join(f"{count} x {reason}" for reason, count in refused.most_common())
        raise ConfigError(
            f"None of {MAX_REFUSALS} proposals drawn from tune.space can be trained: {reasons}. "
            "Widen or move the ranges."
        )

    def ask_again(self, proposal: Proposal) -> None:
        """Takes up a proposal of an earlier process whose outcome is not known yet."""
        self._remember(proposal)
        self._study.enqueue_trial(dict(proposal.choice))
        trial = self._study.ask()
        self._draw(trial, self._space)
        self._asked[proposal.number] = trial

    def know(self, proposal: Proposal, value: float | None, rungs: Mapping[int, float]) -> None:
        """Learns what came of a proposal of an earlier process; as `tell`."""
        self._remember(proposal)
        trial = _Replay(proposal.choice)
        self._draw(trial, self._space)
        state = _state(value, rungs)
        self._study.add_trial(
            create_trial(
                state=state,
                value=value,
                params=dict(proposal.choice) if state != TrialState.FAIL else {},
                distributions=trial.distributions if state != TrialState.FAIL else {},
                intermediate_values=dict(rungs),
            )
        )

    def tell(self, number: int, value: float | None, rungs: Mapping[int, float]) -> None:
        """Learns what came of a proposal.

        Args:
            number: of the proposal.
            value: of the whole trial; None where it failed or was stopped.
            rungs: scores on the way, by images seen; none for a failed one.
        """
        trial = self._asked.pop(number)
        for images, score in sorted(rungs.items()):
            trial.report(score, images)
        self._study.tell(trial, value, state=_state(value, rungs))

    @property
    def trials(self) -> list[FrozenTrial]:
        """All that Optuna knows."""
        return self._study.get_trials(deepcopy=False)

    def _remember(self, proposal: Proposal) -> None:
        self._seen.add(self._identify(proposal.overrides))
        self._num_found += 1

    def _sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        seed = keyed_seed("tune", self._seed, number, attempt) % 2**32
        explores = number % EXPLORED_EVERY == 0 or attempt >= MAX_LEARNED
        if self._kind == "random" or explores:
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # A group for each schedule, whose parameters depend on each other; trials that run
            # are taken for bad ones, so that those beside them look elsewhere.
            return optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=NUM_STARTUP,
                multivariate=True,
                group=True,
                constant_liar=True,
            )


def _state(value: float | None, rungs: Mapping[int, float]) -> TrialState:
    if value is not None:
        return TrialState.COMPLETE
    return TrialState.PRUNED if rungs else TrialState.FAIL


class _Replay:
    """Draws what was drawn before, and keeps the distributions that it came from."""

    def __init__(self, choice: Mapping[str, Any]) -> None:
        self._choice = choice
        self.distributions: dict[str, BaseDistribution] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any:
        self.distributions[name] = optuna.distributions.CategoricalDistribution(choices)
        return self._choice[name]

    def suggest_float(self, name: str, low: float, high: float, /, *, log: bool = False) -> float:
        self.distributions[name] = optuna.distributions.FloatDistribution(low, high, log=log)
        return self._choice[name]
