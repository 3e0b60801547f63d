"""What a choice becomes, and what is refused before it costs a trial."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from pipeline.config import load_config, override_config
from pipeline.errors import ConfigError
from pipeline.models import make_diffusion
from pipeline.settings import SpaceConfig
from pipeline.tune.proposer import (
    EXPLORED_EVERY,
    MAX_LEARNED,
    MAX_REFUSALS,
    Proposal,
    Proposer,
)
from pipeline.tune.space import draw, refusal, to_overrides

LINEAR, OPTIONS = "diffusion.schedule=linear", "diffusion.schedule_options"
EVERYTHING = SpaceConfig(
    schedule=("linear", "cosine", "sigmoid", "sqrt"),
    objective=("pred_v", "pred_noise", "pred_x0"),
    weighting=("uniform", "min_snr"),
    zero_terminal_snr=(False, True),
    learning_rate=(1e-4, 1e-2),
)


class Fixed:
    """Draws the given schedule, and the lowest of everything else or its middle."""

    def __init__(self, schedule: str, share: float = 0.0) -> None:
        self.schedule, self.share = schedule, share

    def suggest_categorical(self, name: str, choices: Any, /) -> Any:
        return self.schedule if name == "schedule" else choices[0]

    def suggest_float(self, name: str, low: float, high: float, /, *, log: bool = False) -> float:
        ratio = (high / low) if log else 1.0
        return low * ratio**self.share if log else low + (high - low) * self.share


@pytest.mark.parametrize("schedule", EVERYTHING.schedule)
def test_every_choice_can_be_given_on_the_command_line(tiny_config: Path, schedule: str) -> None:
    overrides = to_overrides(draw(Fixed(schedule, 0.5), EVERYTHING))
    typed = shlex.split(" ".join(shlex.quote(text) for text in overrides))
    by_hand = load_config(tiny_config, typed)
    assert by_hand == override_config(load_config(tiny_config), overrides)
    assert by_hand.diffusion.schedule == schedule
    assert by_hand.diffusion.schedule_options
    assert by_hand.train.learning_rate == pytest.approx(1e-3)
    make_diffusion(by_hand)


def test_a_choice_draws_the_parameters_of_its_schedule_alone() -> None:
    choice = draw(Fixed("linear"), SpaceConfig())
    assert choice == {"schedule": "linear", "linear.beta_start": 1e-5, "linear.ratio": 10.0}
    assert to_overrides(choice) == [
        "diffusion.schedule=linear",
        "diffusion.schedule_options={beta_start = 1e-05, beta_end = 0.0001}",
    ]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["diffusion.schedule=cosine"], None),
        ([LINEAR, f"{OPTIONS}={{beta_start = 0.5, beta_end = 0.9}}"],
         "a beta outside (0, 1)"),
        ([LINEAR, f"{OPTIONS}={{beta_start = 1e-6, beta_end = 1e-5}}"],
         "more than 0.01 of the signal left at the last step"),
        (["diffusion.schedule=sqrt", "diffusion.schedule_options={s = 0.5}"],
         "s of sqrt not below 1/T"),
        (["diffusion.schedule=sigmoid", "diffusion.schedule_options={start = 1.0, end = 1.0}"],
         "scales that are not finite"),
        (["diffusion.objective=pred_noise", "diffusion.zero_terminal_snr=true"],
         "an objective that the schedule does not allow"),
        (["diffusion.schedule_options={s = nan}"], "no valid config"),
    ],
)  # fmt: skip
def test_what_makes_no_schedule_is_refused_by_reason(
    tiny_config: Path, overrides: list[str], reason: str | None
) -> None:
    found = refusal(load_config(tiny_config), overrides, max_signal_left=0.01)
    assert (found or "").startswith(reason or "")
    assert (found is None) == (reason is None)


def test_a_space_without_anything_feasible_ends(tiny_config: Path) -> None:
    config = load_config(
        tiny_config, ['tune.space.schedule=["linear"]', "tune.space.linear.beta_start=[0.5, 0.9]"]
    )
    proposer = Proposer(
        config.tune.space, "tpe", 0, lambda overrides: refusal(config, overrides, 0.01)
    )
    with pytest.raises(ConfigError, match=rf"None of {MAX_REFUSALS} .* {MAX_REFUSALS} x a beta"):
        proposer.ask(1)


def test_a_finite_space_is_gone_through_once() -> None:
    proposer = Proposer(SpaceConfig(schedule=(), weighting=("uniform", "min_snr")), "random", 0)
    first, second = proposer.ask(1), proposer.ask(2)
    assert first is not None
    assert second is not None
    assert {first.overrides[0], second.overrides[0]} == {
        "diffusion.weighting=uniform", "diffusion.weighting=min_snr"
    }  # fmt: skip
    assert proposer.ask(3) is None


def test_what_makes_the_same_trial_as_the_config_is_not_proposed() -> None:
    space = SpaceConfig(schedule=(), weighting=("uniform", "min_snr"))

    def identify(overrides: Sequence[str]) -> str:  # of a config with uniform weighting
        return "min_snr" if "min_snr" in str(overrides) else "uniform"

    proposer = Proposer(space, "random", 0, identify=identify)
    found = proposer.ask(1)
    assert found is not None
    assert found.overrides == ["diffusion.weighting=min_snr"]
    assert proposer.ask(2) is None


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_a_continued_search_goes_on_as_it_would_have(searcher: Any) -> None:
    def value(proposal: Proposal) -> float:
        return len(proposal.overrides[1]) + proposal.choice.get("learning_rate", 0)

    whole = Proposer(EVERYTHING, searcher, 3)
    proposals = []
    for number in range(1, 15):
        proposal = whole.ask(number)
        assert proposal is not None
        proposals.append(proposal)
        if number < 13:
            whole.tell(number, value(proposal) if number % 3 else None, {64: value(proposal)})

    again = Proposer(EVERYTHING, searcher, 3)
    for proposal in proposals[:12]:
        known = value(proposal) if proposal.number % 3 else None
        again.know(proposal, known, {64: value(proposal)})
    again.ask_again(proposals[12])
    assert again.ask(14) == proposals[13]
    again.tell(13, None, {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.metric=loss", "cannot choose between schedules"),
        ("tune.metric=speed", "must be one of fid, bits_per_dim"),
        ("tune.space.linear.beta_start=[1e-2, 1e-4]", "low < high"),
        ("tune.space.cosine.s=[0.0, 0.1]", "must begin above 0"),
        ("tune.space.linear.ratio=[0.5, 10]", "must be above 1"),
        ("tune.space.linear.beta_stat=[1e-4, 1e-2]", "Did you mean 'beta_start'"),
        ('tune.space.schedule=["liner"]', "tune.space.schedule"),
        ('tune.space.weighting=["snr", "snr"]', "names a value twice"),
        ("tune.space.schedule=[]", "nothing is searched"),
        ("tune.num_seeds=1", "tune.num_seeds"),
    ],
)
def test_a_wrong_setting_is_said(tiny_config: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config(tiny_config, [override])


def test_what_spans_sections_is_said_where_a_search_is_wanted(tiny_config: Path) -> None:
    few = ["tune.num_samples=8", "tune.grace_images=10", "tune.num_steps=101"]
    load_config(tiny_config, few)
    with pytest.raises(ConfigError, match="has 3 faults") as caught:
        load_config(tiny_config, [*few, "tune.enabled=true"])
    for name in ("num_samples", "grace_images", "num_steps"):
        assert f"tune.{name} must" in str(caught.value)


def test_what_is_refused_again_and_again_is_left_to_chance() -> None:
    proposer = Proposer(EVERYTHING, "tpe", 0)

    def is_random(number: int, attempt: int) -> bool:
        return isinstance(proposer._sampler(number, attempt), optuna.samplers.RandomSampler)

    assert [is_random(1, 0), is_random(1, MAX_LEARNED - 1)] == [False, False]
    assert [is_random(1, MAX_LEARNED), is_random(EXPLORED_EVERY, 0)] == [True, True]
