"""The Inception Score: how sure a classifier is of each sample, and how varied they are."""

import numpy as np


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean divergence of p(class | sample) from p(class), over all samples at once.

    1 where the classifier sees no difference, the number of classes at most.

    Args:
        logits: [N, classes] of the samples.

    Reference: Salimans et al. (1606.03498), section 4.
    """
    x = logits.astype(np.float64)
    log_p = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
    log_mean = np.logaddexp.reduce(log_p, axis=0) - np.log(len(x))
    return float(np.exp((np.exp(log_p) * (log_p - log_mean)).sum(1).mean()))
