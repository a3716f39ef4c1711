"""A row of Table 2: the task, the encoder, the method and the loss of this package."""

from act.paper import PlannedRow, named_method, register_rows


def tones_row(trials=(), **options):
    """What `act.paper.compare_rows` needs for the row."""
    methods = {
        "frozen": named_method("frozen"),
        "two-layer": ("two-layer", {}),
        "squared-jaccard": ("contrastive", dict(loss="squared-jaccard")),
    }
    yield PlannedRow("tones-4", "band-energy", methods, [dict(passes=4, lr=1e-2, batch=24)])


register_rows("table_2", "tones", tones_row)
