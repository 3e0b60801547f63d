"""Exponential moving averages of a network's weights.

`EMA` follows one average with one of three profiles. `PostHocEMA` follows two power-function
averages, from whose snapshots `reconstruct` makes the average of any width after training.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Profile = Literal["constant", "warmup", "power"]
PROFILES: tuple[Profile, ...] = get_args(Profile)

TRACKED_WIDTHS = (0.05, 0.10)  # EDM2's: others between and around follow well from these


class EMA:
    """Averages a network's parameters over training; buffers are copied as they are.

    The decay at update s, counted from 1, is
    `constant`: decay;
    `warmup`: min(decay, 1 - (1 + s/inv_gamma)^-power), so that early samples do not show the
    initial weights;
    `power`: (1 - 1/s)^(g + 1), with g such that the average has the relative width `width`:
    its span grows with training, and nothing is left of the initial weights.

    Args:
        model: the network to follow. Not a DDP wrapper: pass the module inside it.
        decay: of `constant`, and the ceiling of `warmup`, in [0, 1).
        profile: one of the three.
        update_every: optimiser steps from one update to the next.
        inv_gamma: of `warmup`, above 0.
        power: of `warmup`, above 0; 2/3 for a million steps and more, 3/4 for fewer.
        width: of `power`, the standard deviation of the average over the time trained so far,
            between 0 and 0.28.

    Raises:
        ValueError: an unknown profile or a number out of its range.

    Reference: `warmup`: Katherine Crowson's EMAWarmup; `power`: Karras et al., EDM2
        (2312.02696), section 3.1.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        profile: Profile = "warmup",
        update_every: int = 1,
        inv_gamma: float = 1.0,
        power: float = 0.75,
        width: float = 0.10,
    ) -> None:
        if profile not in PROFILES:
            raise ValueError(
                f"profile must be one of {', '.join(PROFILES)}, got {profile!r}. "
                "Choose one of these."
            )
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}. 0.999 is a usual value.")
        if update_every < 1 or inv_gamma <= 0 or power <= 0:
            raise ValueError(
                "update_every, inv_gamma and power must be above 0, got "
                f"{update_every}, {inv_gamma} and {power}. 1, 1 and 0.75 are usual."
            )
        self.exponent = width_to_exponent(width) if profile == "power" else 0.0
        self.profile: Profile = profile
        self.max_decay = decay
        self.update_every = update_every
        self.inv_gamma, self.power = inv_gamma, power
        self.num_updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, update: int) -> float:
        """The share that the average keeps at an update, counted from 1."""
        match self.profile:
            case "constant":
                return self.max_decay
            case "warmup":
                return min(self.max_decay, 1 - (1 + update / self.inv_gamma) ** -self.power)
            case "power":
                return (1 - 1 / update) ** (self.exponent + 1)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average one optimiser step: ema = d ema + (1 - d) weights."""
        self.num_updates += 1
        if self.num_updates % self.update_every:
            return
        decay = self.decay_at(self.num_updates // self.update_every)
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore  (no public name)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def load(self, weights: Mapping[str, Tensor], num_updates: int) -> None:
        """Continues from saved averages and the number of optimiser steps behind them."""
        self.model.load_state_dict(weights)
        self.num_updates = num_updates


class Snapshot(NamedTuple):
    """An average as it was: after so many updates, with this width."""

    num_updates: int
    width: float
    weights: Mapping[str, Tensor]


class PostHocEMA:
    """Two power-function averages, to be saved now and then and combined after training.

    Args:
        model: the network to follow.
        widths: relative widths of the two.

    Raises:
        ValueError: a width out of range, or two that are equal.

    Reference: Karras et al., EDM2 (2312.02696), section 3.1.
    """

    def __init__(self, model: nn.Module, widths: tuple[float, float] = TRACKED_WIDTHS) -> None:
        if widths[0] == widths[1]:
            raise ValueError(f"The two widths must differ, got {widths}. 0.05 and 0.1 are usual.")
        self.widths = widths
        self.averages = [EMA(model, profile="power", width=width) for width in widths]

    def update(self, model: nn.Module) -> None:
        """Moves both averages one optimiser step."""
        for average in self.averages:
            average.update(model)

    def snapshots(self) -> list[Snapshot]:
        """Copies of both averages as they are now."""
        return [
            Snapshot(
                average.num_updates,
                width,
                {name: value.clone() for name, value in average.model.state_dict().items()},
            )
            for average, width in zip(self.averages, self.widths, strict=True)
        ]


def reconstruct(
    snapshots: Sequence[Snapshot], width: float, num_updates: int | None = None
) -> dict[str, Tensor]:
    """The average of another width, as the best combination of snapshots of two.

    The combination's profile over training time is the least-squares fit to the profile asked
    for; with a few dozen snapshots it is within a per cent of the average tracked from the start.

    Args:
        snapshots: of all times, of a `PostHocEMA`.
        width: the relative width wanted.
        num_updates: where in training, with a snapshot there: without, nothing is known of the
            latest weights, which count most. At the last snapshot when not given.

    Raises:
        ValueError: no snapshots, one before the first update, or a last one that is not that of
            num_updates; a width out of range.

    Reference: Karras et al., EDM2 (2312.02696), section 3.1 and appendix C.
    """
    snapshots = sorted(snapshots, key=lambda s: s.num_updates)
    latest = snapshots[-1].num_updates if snapshots else 0
    end = latest if num_updates is None else num_updates
    if not snapshots or snapshots[0].num_updates < 1 or latest != end:
        raise ValueError(
            f"Reconstruction at update {end} needs snapshots of updates 1..{end}, the last of them "
            f"at {end}, got {[s.num_updates for s in snapshots][-8:]}. Pass those that were taken "
            "until then, or ask for the update of the last one."
        )
    mixture = mixing_weights([(s.num_updates, s.width) for s in snapshots], end, width)
    names = snapshots[0].weights.keys()
    result: dict[str, Tensor] = {}
    for name in names:
        values = [s.weights[name] for s in snapshots]
        if not values[0].is_floating_point():
            result[name] = values[-1].clone()
            continue
        total = torch.zeros_like(values[0], dtype=torch.float64)
        for share, value in zip(mixture, values, strict=True):
            total += share * value
        result[name] = total.to(values[0].dtype)
    return result


def mixing_weights(
    tracked: Sequence[tuple[int, float]], num_updates: int, width: float
) -> list[float]:
    """How much of each tracked (updates, width) makes the average (num_updates, width).

    Solves A x = b, A and b the inner products of the profiles (g + 1) s^g / t^(g + 1) over time s.

    Raises:
        ValueError: a width out of range.

    Reference: Karras et al., EDM2 (2312.02696), appendix C.
    """
    profiles = [(updates, width_to_exponent(w)) for updates, w in tracked]
    wanted = (num_updates, width_to_exponent(width))
    gram = [[_inner_product(p, q) for q in profiles] for p in profiles]
    right = [[_inner_product(p, wanted)] for p in profiles]
    matrix = torch.tensor(gram, dtype=torch.float64)
    solution = torch.linalg.lstsq(
        matrix, torch.tensor(right, dtype=torch.float64), driver="gelsd"
    ).solution
    return solution[:, 0].tolist()


def width_to_exponent(width: float) -> float:
    """g of the profile s^g whose standard deviation over its span is `width`.

    width^2 = (g + 1) / ((g + 2)^2 (g + 3)), solved for its largest root.

    Raises:
        ValueError: a width that no g above 0 has.

    Reference: Karras et al., EDM2 (2312.02696), appendix C.
    """
    limit = math.sqrt(1 / 12)  # g = 0, the plain mean
    if not 0 < width < limit:
        raise ValueError(
            f"width must be between 0 and {limit:.2f}, got {width}. 0.1 is a usual value."
        )
    low, high = 0.0, 2 / width  # width is below 1/(g + 2) for every g
    for _ in range(200):
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _inner_product(p: tuple[int, float], q: tuple[int, float]) -> float:
    """The integral of two profiles' product over the time both cover."""
    (t_p, g_p), (t_q, g_q) = p, q
    t_min = min(t_p, t_q)
    # t_min^(g_p + g_q + 1) / (t_p^(g_p + 1) t_q^(g_q + 1)), without overflow
    size = (t_min / t_p) ** (g_p + 1) * (t_min / t_q) ** (g_q + 1) / t_min
    return (g_p + 1) * (g_q + 1) / (g_p + g_q + 1) * size
