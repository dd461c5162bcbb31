"""How much one thing says about another, in nats."""

import numpy as np


def normalized_mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """Mutual information of two labellings, divided by the mean of their entropies.

    Args:
        first, second: (N,), labels of the same N things.

    Returns:
        0 if they say nothing of each other, 1 if each follows from the other; 1, too, if both know one label.
    """
    table = np.zeros((len(np.unique(first)), len(np.unique(second))))
    np.add.at(table, (np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]), 1)
    joint = table / len(first)
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    entropies = [-np.sum(p * np.log(p)) for p in (rows, columns)]
    if sum(entropies) == 0:
        return 1.0
    known = joint > 0
    information = np.sum(joint[known] * np.log(joint[known] / np.outer(rows, columns)[known]))
    return float(2 * information / sum(entropies))
