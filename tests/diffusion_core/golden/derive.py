"""Golden values of the core, from the papers' equations in 50-digit decimal arithmetic.

Independent of the package and of floating point: Python's `decimal` alone, each formula
written out from the paper named beside it. `python tests/diffusion_core/golden/derive.py` writes
`values.json` beside this file; `test_golden.py` compares the core with it.
"""

import json
from decimal import Decimal as D  # noqa: N817  (it stands in every line)
from decimal import getcontext
from pathlib import Path

getcontext().prec = 50
T = 20  # training timesteps of every value below
PI = D("3.14159265358979323846264338327950288419716939937510")
BETAS = {"beta_start": D("0.002"), "beta_end": D("0.4")}  # wide, so that T = 20 reaches noise


def cos(x: D) -> D:
    """The Taylor series; arguments here are within 0..pi/2."""
    term = total = D(1)
    for k in range(1, 60):
        term *= -x * x / ((2 * k - 1) * (2 * k))
        total += term
    return total


def sigmoid(x: D) -> D:
    return 1 / (1 + (-x).exp())


def linspace(first: D, last: D, count: int) -> list[D]:
    return [first + (last - first) * i / (count - 1) for i in range(count)]


def from_abar(abar: list[D]) -> list[D]:
    """Betas of abar at 0..T (2102.09672, section 3.2): 1 - the ratio, at most 0.999."""
    return [min(1 - abar[i + 1] / abar[i], D("0.999")) for i in range(T)]


def betas(name: str) -> list[D]:
    u = [D(i) / T for i in range(T + 1)]
    first, last = BETAS.values()
    match name:
        case "linear":  # 2006.11239, section 4, without the scaling to T
            return linspace(first, last, T)
        case "scaled_linear":  # 2112.10752, public code
            return [b * b for b in linspace(first.sqrt(), last.sqrt(), T)]
        case "logistic":  # the S-curve demo
            return [sigmoid(x) * (last - first) + first for x in linspace(D(-6), D(6), T)]
        case "cosine":  # 2102.09672, eq. 17
            s = D("0.008")
            return from_abar([cos((x + s) / (1 + s) * PI / 2) ** 2 for x in u])
        case "sigmoid":  # 2212.11972, algorithm 1, start -3, end 3, tau 1
            low, high = sigmoid(D(-3)), sigmoid(D(3))
            return from_abar([(high - sigmoid(x * 6 - 3)) / (high - low) for x in u])
        case "sqrt":  # 2205.14217, appendix A
            return from_abar([1 - (x + D("0.0001")).sqrt() for x in u])
    raise KeyError(name)


def scales(name: str) -> tuple[list[D], list[D]]:
    """Signal and noise scale at 0..T-1."""
    if name == "lerp":  # 2209.03003, eq. 1
        return [1 - D(i + 1) / T for i in range(T)], [D(i + 1) / T for i in range(T)]
    if name == "linear, zero terminal SNR":  # 2305.08891, algorithm 1
        signal, _ = scales("linear")
        signal = [(x - signal[-1]) * signal[0] / (signal[0] - signal[-1]) for x in signal]
        return signal, [(1 - x * x).sqrt() for x in signal]
    signal, product = [], D(1)
    for beta in betas(name):
        product *= 1 - beta
        signal.append(product)
    return [x.sqrt() for x in signal], [(1 - x).sqrt() for x in signal]


def at(pair: tuple[list[D], list[D]], t: int) -> tuple[D, D]:
    return (D(1), D(0)) if t < 0 else (pair[0][t], pair[1][t])


def posterior(pair: tuple[list[D], list[D]], t: int, p: int) -> list[D]:
    """Coefficients of x_t and x_start, and variance, by Bayes' rule on two Gaussians.

    Prior N(a_p x_start, b_p^2) times likelihood N(alpha x_p, beta): precisions add up.
    """
    (a, b), (ap, bp) = at(pair, t), at(pair, p)
    alpha = a / ap
    beta = b * b - alpha * alpha * bp * bp
    precision = 1 / (bp * bp) + alpha * alpha / beta
    return [alpha / beta / precision, ap / (bp * bp) / precision, 1 / precision]


def weights(pair: tuple[list[D], list[D]], objective: str, weighting: str) -> list[D]:
    """The factor on the output's squared error, from that on x_start's.

    How far the implied x_start moves with the output is the derivative of its conversion.
    """
    found = []
    for t in range(T):
        a, b = at(pair, t)
        slope = {
            "pred_noise": b / a if a else None,
            "pred_x0": D(1),
            "pred_v": b / (a * a + b * b),
            "pred_flow": b / (a + b),
        }[objective]
        assert slope is not None
        snr = (a / b) ** 2
        if weighting == "vlb":
            if t == 0:
                share = 1 / (2 * posterior(pair, 1, 0)[2])
            else:
                share = (((at(pair, t - 1)[0] / at(pair, t - 1)[1]) ** 2) - snr) / 2
        else:
            share = {"uniform": 1 / slope**2, "snr": snr, "min_snr": min(snr, D(5))}[weighting]
        found.append(share * slope**2)
    return found


def timesteps(spacing: str, num_steps: int) -> list[int]:
    """2305.08891, table 2; `round` of a Fraction-like quotient is half to even in Decimal."""
    n = num_steps
    if n == 1:
        return [T - 1]
    if spacing == "leading":
        return [k * (T // n) for k in reversed(range(n))]
    if spacing == "trailing":
        return [int((D(T) * (n - k) / n).to_integral_value()) - 1 for k in range(n)]
    return [int((D(T - 1) * k / (n - 1)).to_integral_value()) for k in reversed(range(n))]


def denoise(x: D, t: int) -> D:
    """A network's word on x_start: not linear, beyond [-1, 1] at times, different at each t."""
    return D("1.3") * x - D("0.4") * x * x * x / 3 + D(t) / 50


def ddim(pair: tuple[list[D], list[D]], spacing: str, x: D, clip: bool) -> list[D]:
    """2010.02502, eq. 12 with eta 0, over 10 steps; every state. Clipping re-derives the noise."""
    states = []
    steps = timesteps(spacing, 10)
    for t, p in zip(steps, [*steps[1:], -1], strict=True):
        (a, b), (ap, bp) = at(pair, t), at(pair, p)
        x0 = denoise(x, t)
        if clip:
            x0 = max(D(-1), min(D(1), x0))
        x = ap * x0 + bp * (x - a * x0) / b
        states.append(x)
    return states


NAMES = ("linear", "scaled_linear", "cosine", "sigmoid", "sqrt", "logistic", "lerp")
OBJECTIVES = {
    "cosine": ("pred_noise", "pred_x0", "pred_v"),
    "lerp": ("pred_x0", "pred_v", "pred_flow"),
}


def derive() -> dict[str, object]:
    """Everything, as text of 25 digits."""
    pairs = {name: scales(name) for name in (*NAMES, "linear, zero terminal SNR")}
    steps = [(19, 18), (19, 10), (7, 6), (7, 2), (1, 0)]
    return {
        "scales": {name: [show(a), show(b)] for name, (a, b) in pairs.items()},
        "posteriors": {
            name: {f"{t} {p}": show(posterior(pair, t, p)) for t, p in steps}
            for name, pair in pairs.items()
        },
        "weights": {
            name: {
                f"{objective} {weighting}": show(weights(pairs[name], objective, weighting))
                for objective in objectives
                for weighting in ("uniform", "snr", "min_snr", "vlb")
            }
            for name, objectives in OBJECTIVES.items()
        },
        "timesteps": {
            f"{spacing} {n}": timesteps(spacing, n)
            for spacing in ("leading", "trailing", "linspace")
            for n in (1, 2, 3, 6, 8, 10, 13, 20)
        },
        "ddim": {
            f"{name}|{spacing}|{'clipped' if clip else 'free'}": show(
                ddim(pairs[name], spacing, D("1.7"), clip)
            )
            for name in ("linear", "cosine", "lerp", "linear, zero terminal SNR")
            for spacing in ("leading", "trailing", "linspace")
            for clip in (True, False)
        },
    }


def show(values: list[D]) -> list[str]:
    return [f"{value:.25g}" for value in values]


if __name__ == "__main__":
    path = Path(__file__).with_name("values.json")
    path.write_text(json.dumps(derive(), indent=1) + "\n")
    print(f"Wrote {path.name}")
