"""The kernel distance (KID): unbiased at any number of samples, and an error with it."""

from dataclasses import dataclass

import numpy as np

GROUPS = 20  # of the samples, that are left out in turn
BLOCK = 1024  # rows whose kernel is held in memory at once


@dataclass(frozen=True)
class KernelDistance:
    """The squared maximum mean discrepancy; its standard error holds the reference fixed."""

    value: float  # below 0 where chance took away more than there is
    error: float
    real_count: int
    generated_count: int


def kernel_distance(
    real: np.ndarray, generated: np.ndarray, max_items: int = 10_000, seed: int = 0
) -> KernelDistance | None:
    """The unbiased squared MMD with the kernel (x . y / d + 1)^3; None for fewer than 40 samples.

    All pairs are taken, where others draw subsets again and again: the same on average, and no
    chance beside that of the samples. The error is that of leaving out one group after another,
    and rather too large where the distance is about 0.

    Args:
        real: features [M, d].
        generated: features [N, d], in any order.
        max_items: of each side, drawn at random where there are more: the cost is its square.
        seed: of the draw and of the groups.

    Reference: Binkowski et al. (1801.01401), eq. 4 and section 4; Efron and Stein (1981).
    """
    if len(generated) < 2 * GROUPS or len(real) < 2:
        return None
    rng = np.random.Generator(np.random.Philox(key=seed))
    x = real[rng.permutation(len(real))[:max_items]].astype(np.float64)
    y = generated[rng.permutation(len(generated))[:max_items]].astype(np.float64)
    # Sums of the kernel between groups: whatever is left out follows from them.
    bounds = np.linspace(0, len(y), GROUPS + 1).astype(int)
    among = _sum_kernel(y, y, bounds, bounds)
    np.fill_diagonal(among, among.diagonal() - _sum_by_group(_kernel_of_itself(y), bounds))
    across = _sum_kernel(y, x, bounds, np.array([0, len(x)]))[:, 0]
    whole = np.array([0, len(x)])
    among_real = _sum_kernel(x, x, whole, whole).item() - _kernel_of_itself(x).sum()
    among_real /= len(x) * (len(x) - 1)

    def distance(chosen: np.ndarray) -> float:
        n = np.diff(bounds)[chosen].sum()
        pairs = among[np.ix_(chosen, chosen)].sum() / (n * (n - 1))
        return float(among_real + pairs - 2 * across[chosen].sum() / (n * len(x)))

    groups = np.arange(GROUPS)
    without = np.array([distance(np.delete(groups, k)) for k in groups])
    variance = (GROUPS - 1) / GROUPS * np.square(without - without.mean()).sum()
    return KernelDistance(distance(groups), float(np.sqrt(variance)), len(x), len(y))


def _kernel_of_itself(x: np.ndarray) -> np.ndarray:
    return np.power(np.square(x).sum(1) / x.shape[1] + 1, 3)


def _sum_kernel(x: np.ndarray, y: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Sums of the kernel over the blocks between these bounds of x and of y, which end both."""
    of_rows = np.empty((len(x), len(columns) - 1))
    for start in range(0, len(x), BLOCK):
        kernel = x[start : start + BLOCK] @ y.T
        kernel /= x.shape[1]
        kernel += 1
        kernel *= np.square(kernel)
        of_rows[start : start + BLOCK] = np.add.reduceat(kernel, columns[:-1], axis=1)
    return np.add.reduceat(of_rows, rows[:-1], axis=0)


def _sum_by_group(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, bounds[:-1])
