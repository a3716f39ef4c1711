"""A method: fine-tuning with a classifier of two layers."""

from torch import nn

from act.tuning import register_method


@register_method("two-layer", loss="classification")
def two_layer(context):
    """The head, from embeddings (B, D) to logits (B, C)."""
    return nn.Sequential(
        nn.LayerNorm(context.dim),
        nn.Linear(context.dim, context.dim),
        nn.GELU(),
        nn.Linear(context.dim, context.n_classes),
    )
