"""A loss: the squared Jaccard index as target weights."""

from act.losses import register_loss


@register_loss("squared-jaccard")
def squared_jaccard(y):
    """Weights (N, N) of multi-hot labels (N, C)."""
    shared = y @ y.T
    size = y.sum(1)
    union = size[:, None] + size - shared
    squared = (shared / union.clamp_min(1)).square()
    squared.fill_diagonal_(0)
    return squared / squared.sum(1, keepdim=True).clamp_min(1e-8)
