"""The main table of the README and the home page, from the committed Tables 2 and 3: no number is typed."""

import re

import pandas as pd

from act.analysis import side_of_zero
from act.report import number_text

SINGLE, MULTI = "table_2_single_label", "table_3_multi_label"
FINE_TUNED = {SINGLE: "vanilla", MULTI: "bce"}  # the paper's baseline in each table
CONTRASTIVE = {SINGLE: "contrastive", MULTI: "jaccard"}  # what the paper proposes
HEAD = [
    "task",
    "classes",
    "encoder",
    "frozen linear",
    "frozen k-NN",
    "fine-tuned own head",
    "fine-tuned linear",
    "fine-tuned k-NN",
    "contrastive linear",
    "contrastive k-NN",
]
LINEAR = ["frozen linear", "fine-tuned own head", "fine-tuned linear", "contrastive linear"]
NEIGHBOURS = ["frozen k-NN", "fine-tuned k-NN", "contrastive k-NN"]
PROBES = dict(linear="Linear probe", knn="k-NN probe")
RIVALS = {  # with what contrastive tuning is compared below the table
    "fine-tuning": FINE_TUNED,
    "LP-FT": {SINGLE: "lp-ft", MULTI: "lp-ft bce"},
}
SIDES = dict(
    above="contrastive tuning is ahead on",
    below="{rival} is ahead on",
    around="no difference is detected on",
)


def _score(long, method, probe):
    """Mean and half-width of the interval, in percent; None where it was not measured."""
    rows = long[(long.method == method) & (long.probe == probe)]
    if rows.empty or pd.isna(rows.iloc[0]["mean"]):
        return None
    row = rows.iloc[0]
    return 100 * row["mean"], 100 * row.ci95


def _scores(long, table):
    """The scores of one task and encoder, by column."""
    fine_tuned, contrastive = FINE_TUNED[table], CONTRASTIVE[table]
    return {
        "frozen linear": _score(long, "frozen", "linear"),
        "frozen k-NN": _score(long, "frozen", "knn"),
        "fine-tuned own head": _score(long, fine_tuned, "head"),
        "fine-tuned linear": _score(long, fine_tuned, "linear"),
        "fine-tuned k-NN": _score(long, fine_tuned, "knn"),
        "contrastive linear": _score(long, contrastive, "linear"),
        "contrastive k-NN": _score(long, contrastive, "knn"),
    }


def _best(scores, columns):
    """The columns with the highest score, as it is printed."""
    means = {column: round(scores[column][0], 1) for column in columns if scores[column]}
    return [column for column, mean in means.items() if mean == max(means.values())]


def _cells(scores):
    """The scores of a row as text; the best linear classifier and the best k-NN probe are bold."""
    bold = _best(scores, LINEAR) + _best(scores, NEIGHBOURS)
    cells = []
    for column, score in scores.items():
        if score is None:
            cells.append("not measured")
            continue
        mean, half = score
        text = f"{mean:.1f}" if pd.isna(half) else f"{mean:.1f} ± {half:.1f}"
        cells.append(f"**{text}**" if column in bold else text)
    return cells


def _classes(task, long):
    """The number of classes of a task as text: by its records, or by the name of a rendered task; else empty."""
    counts = long.classes.dropna()
    named = re.search(r"^words.*-(\d+)$", task)
    if len(counts):
        return f"{counts.iloc[0]:.0f}"
    return named[1] if named else ""


def _tuned_rows(long, table):
    """The tasks and encoders of a table on which both methods were tuned, each with its part of the table."""
    for names, part in long.groupby(["task", "backbone"], sort=False):
        measured = set(part[part["mean"].notna()].method)
        if {FINE_TUNED[table], CONTRASTIVE[table]} <= measured:
            yield names, part


def _where(rows):
    """Tasks with the difference in points, as a list in words."""
    named = [f"{row.task} ({number_text(100 * row.difference, sign=True)})" for row in rows.itertuples()]
    return ", ".join(named)


def _sentence(probe, rival, rows):
    """On which tasks contrastive tuning lies above or below a rival, and on which neither can be told."""
    parts = []
    sides = pd.Series([side_of_zero(row.low, row.high) for row in rows.itertuples()], index=rows.index)
    for side, words in SIDES.items():
        named = rows[sides == side]
        if len(named):
            parts.append(f"{words.format(rival=rival)} {_where(named)}")
    return f"{PROBES[probe]}: {'; '.join(parts)}."


def _against(rival, differences):
    """The sentences of both probes on one rival; empty where nothing was compared with it."""
    rows = differences[differences.rival == rival]
    sentences = [
        _sentence(probe, rival, rows[rows.probe == probe]) for probe in PROBES if (rows.probe == probe).any()
    ]
    return " ".join([f"**Against {rival}.**", *sentences]) if sentences else ""


def _paired(folder, table):
    """The paired differences of contrastive tuning from its rivals; none where they are not committed."""
    path = folder / f"{table}_paired.csv"
    if not path.exists():
        return pd.DataFrame(columns=["task", "probe", "difference", "low", "high", "rival"])
    rivals = {methods[table]: rival for rival, methods in RIVALS.items()}
    rows = pd.read_csv(path)
    rows = rows[(rows.method == CONTRASTIVE[table]) & rows.other.isin(rivals)]
    return rows.assign(rival=rows.other.map(rivals))


def main_table(folder):
    """The main table as Markdown with the sentences below it.

    Parameters
    ----------
    folder : Path
        The results of a profile.

    Returns
    -------
    str
        Empty if the folder has neither table.
    """
    rows, paired = [], []
    for table in (SINGLE, MULTI):
        path = folder / f"{table}.csv"
        if not path.exists():
            continue
        long = pd.read_csv(path)
        for (task, backbone), part in _tuned_rows(long, table):
            rows.append([task, _classes(task, part), backbone, *_cells(_scores(part, table))])
        paired.append(_paired(folder, table))
    if not rows:
        return ""
    lines = [HEAD, [":--", "--:", ":--"] + ["--:"] * 7, *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    differences = pd.concat(paired)
    paragraphs = [text, *(_against(rival, differences) for rival in RIVALS)]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
