"""Speed of the probes against scikit-learn and torch.optim.LBFGS, in one run. Ratios are ours / peer.

One penalty, the path of eight penalties for one class per clip and for several labels per clip, k-NN
predictions, and on a GPU every measure of geometry against the same on the CPU. On the path, every peer
starts each fit from the last one, from the strongest penalty to the weakest, and is given the loosest of its
tolerances at which every objective is within a thousandth of the minimum. On a CPU the seconds are CPU time,
which other programs disturb less.
"""

import functools
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from measuring import (
    add_device_option,
    best_times,
    option_parser,
    processor_time,
    progress_bar,
    record,
    report,
    timed,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from act.geometry import geometry
from act.probes import PENALTIES, KNNProbe
from act.solver import linear_path

PEER_STEPS = 200  # of scikit-learn at one penalty
MOST_STEPS = 2000  # of the peers at each penalty of the path
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)  # on the gradient of the mean loss
CLOSE = 1e-3  # relative distance from the minimum


# ---- data ------------------------------------------------------------------------------------------


def embeddings(n, dim, classes, seed):
    """Correlated embeddings (n, dim) of Gaussian classes, a tenth of the labels wrong, float32."""
    g = torch.Generator().manual_seed(0)
    spread = torch.arange(1, dim + 1) ** -0.7
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    centres = torch.randn(classes, dim, generator=g) * spread
    g.manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    X = (0.8 * centres[y] + torch.randn(n, dim, generator=g) * spread) @ rotation
    wrong = torch.rand(n, generator=g) < 0.1
    return X, torch.where(wrong, torch.randint(classes, (n,), generator=g), y)


def tags_of(y, labels):
    """Multi-hot rows (N, L): each class is a fixed set of about a fifth of the labels."""
    g = torch.Generator().manual_seed(2)
    classes = int(y.max()) + 1
    sets = torch.rand(classes, labels, generator=g) < 0.2
    label = torch.arange(labels)
    sets[label % classes, label] = True  # every label occurs
    return sets[y].float()


def standardised(X):
    """Z-scored embeddings, as every solver gets them."""
    return (X - X.mean(0)) / X.std(0, correction=0)


# ---- a path of penalties, three ways; each returns weights and intercepts of every penalty ---------


def our_path(z, y, Cs):
    path = linear_path(z, y, Cs)
    return list(zip(path.coef, path.intercept))


def torch_path(z, y, Cs, tolerance):
    """torch.optim.LBFGS with autograd; all labels of a multi-label task are one problem."""
    multilabel = y.ndim == 2
    outputs = y.shape[1] if multilabel else int(y.max()) + 1
    weight = torch.zeros(outputs, z.shape[1], dtype=z.dtype, device=z.device, requires_grad=True)
    bias = torch.zeros(outputs, dtype=z.dtype, device=z.device, requires_grad=True)
    fits = []
    for C in sorted(Cs):
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=MOST_STEPS,
            history_size=20,
            tolerance_grad=tolerance,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            logits = torch.addmm(bias, z, weight.T)
            if multilabel:
                loss = F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(z)
            else:
                loss = F.cross_entropy(logits, y)
            objective = loss + weight.square().sum() / (2 * C * len(z))
            objective.backward()
            return objective

        optimizer.step(closure)
        fits.append((weight.detach().clone(), bias.detach().clone()))
    return fits


def sklearn_path(z, y, Cs, tolerance):
    """scikit-learn's LogisticRegression(warm_start=True); a model for each label of a multi-label task."""
    columns = [y] if y.ndim == 1 else list(y.T)
    fits = []
    models = [LogisticRegression(warm_start=True, max_iter=MOST_STEPS, tol=tolerance) for _ in columns]
    for C in sorted(Cs):
        for model, column in zip(models, columns):
            model.set_params(C=C).fit(z, column)
        weight = np.concatenate([model.coef_ for model in models])
        bias = np.concatenate([model.intercept_ for model in models])
        fits.append((torch.from_numpy(weight), torch.from_numpy(bias)))
    return fits


def objectives(fits, z, y, Cs):
    """C times the summed loss plus half the squared norm of the weights, for every penalty, in float64."""
    z, y = z.cpu().double(), y.cpu()
    values = []
    for C, (weight, bias) in zip(sorted(Cs), fits):
        weight, bias = weight.cpu().double(), bias.cpu().double()
        logits = torch.addmm(bias, z, weight.T)
        if y.ndim == 2:
            loss = F.binary_cross_entropy_with_logits(logits, y.double(), reduction="sum")
        else:
            loss = F.cross_entropy(logits, y, reduction="sum")
        values.append(float(C * loss + weight.square().sum() / 2))
    return np.array(values)


def loosest(path, measure):
    """The loosest tolerance at which a peer is close enough to the minimum, and its distance there."""
    for tolerance in TOLERANCES:
        excess = measure(path(tolerance))
        if excess <= CLOSE:
            break
    return tolerance, excess


# ---- records --------------------------------------------------------------------------------------

in_seconds = functools.partial(record, unit="s", higher_is_better=False)


def best_of(work, device, repeats):
    """The best time of one work, and its last result."""
    best, results = best_times({"": work}, repeats, device, processor_time)
    return best[""], results[""]


def single_records(o, bar):
    """One penalty, C = 1, against scikit-learn's LogisticRegression."""
    X, y = embeddings(o.train, o.dim, o.classes, seed=1)
    z = standardised(X)
    device_z, device_y = z.to(o.device), y.to(o.device)
    ours, path = best_of(lambda: linear_path(device_z, device_y, [1.0]), o.device, o.repeats)
    bar.update()
    regression = LogisticRegression(max_iter=PEER_STEPS)
    peer, model = timed(lambda: regression.fit(z.numpy(), y.numpy()), clock=processor_time)
    bar.update()
    fit = [(torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_))]
    yield in_seconds(
        f"linear/{o.train}x{o.dim}x{o.classes}",
        o.device,
        ours,
        peer,
        f"scikit-learn LogisticRegression(max_iter={PEER_STEPS}), cpu",
        objective=float(path.objective[0]),
        peer_objective=float(objectives(fit, z, y, [1.0])[0]),
        steps=int(path.n_iter[0]),
    )


def path_records(o, bar, multilabel):
    """The path against the warm-started peers, all of them on the same z-scored embeddings."""
    X, y = embeddings(o.train, o.dim, o.classes, seed=1)
    z = standardised(X)
    if multilabel:
        y = tags_of(y, o.labels)
    device_z, device_y = z.to(o.device), y.to(o.device)
    array_z, array_y = z.numpy(), y.numpy()
    exact = linear_path(device_z.double(), device_y, PENALTIES, max_iter=MOST_STEPS, tol=1e-9)
    minimum = objectives(list(zip(exact.coef, exact.intercept)), z, y, PENALTIES)

    def excess(fits):
        return float((objectives(fits, z, y, PENALTIES) / minimum - 1).max())

    peers = {
        "torch.optim.LBFGS": lambda tolerance: torch_path(device_z, device_y, PENALTIES, tolerance),
        "scikit-learn": lambda tolerance: sklearn_path(array_z, array_y, PENALTIES, tolerance),
    }
    tolerances, distances = {}, {}
    for name, path in peers.items():
        tolerances[name], distances[name] = loosest(path, excess)
        bar.update()
    works = {"ours": lambda: our_path(device_z, device_y, PENALTIES)}
    for name, path in peers.items():
        works[name] = lambda path=path, tolerance=tolerances[name]: path(tolerance)
    best, results = best_times(works, o.repeats, o.device, processor_time)
    bar.update()
    kind = f"multi/{o.train}x{o.dim}x{o.labels}" if multilabel else f"{o.train}x{o.dim}x{o.classes}"
    for name in peers:
        yield in_seconds(
            f"path{len(PENALTIES)}/{kind}",
            o.device,
            best["ours"],
            best[name],
            f"{name}, warm-started, tolerance {tolerances[name]:g}",
            excess=excess(results["ours"]),
            peer_excess=distances[name],
            Cs=PENALTIES,
        )


def knn_records(o, bar):
    """k-NN predictions against KNeighborsClassifier, equal votes on both sides."""
    X, y = embeddings(o.train, o.dim, o.classes, seed=1)
    queries, _ = embeddings(o.queries, o.dim, o.classes, seed=2)
    probe = KNNProbe(temperature=None).fit(X.to(o.device), y)
    peer = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(X.numpy(), y.numpy())
    device_queries = queries.to(o.device)
    ours, found = best_of(lambda: probe.predict(device_queries), o.device, o.repeats)
    bar.update()
    theirs, expected = best_of(lambda: peer.predict(queries.numpy()), "cpu", o.repeats)
    bar.update()
    agreement = float((found.cpu().numpy() == expected).mean())
    yield in_seconds(
        f"knn/{o.train}x{o.queries}x{o.dim}",
        o.device,
        ours,
        theirs,
        "scikit-learn KNeighborsClassifier(cosine, brute), cpu",
        agreement=agreement,
    )


def geometry_records(o, bar):
    """Every measure of geometry on the device; on a GPU against the CPU with all of its threads."""
    X, y = embeddings(o.clips, o.dim, o.classes, seed=1)
    device_X, device_y = X.to(o.device), y.to(o.device)
    geometry(device_X[:1000], device_y[:1000])  # the first call on a GPU is slower
    ours, found = best_of(lambda: geometry(device_X, device_y), o.device, o.repeats)
    bar.update()
    name = f"geometry/{o.clips}x{o.dim}x{o.classes}"
    if o.device == "cpu":
        yield in_seconds(name, o.device, ours, ours, "the same on the cpu", difference=0.0)
        return
    theirs, expected = timed(lambda: geometry(X, y))
    difference = float((found - expected).abs().max())
    yield in_seconds(
        name,
        o.device,
        ours,
        theirs,
        f"the same on the cpu, {torch.get_num_threads()} threads",
        difference=difference,
    )


def options():
    parser = option_parser(__doc__)
    sizes = dict(train=20000, queries=5000, clips=50000, dim=768, classes=50, labels=40, repeats=2)
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default: {value})")
    add_device_option(parser)
    parser.add_argument("--only", choices=("linear", "path", "knn", "geometry"))
    return parser.parse_args()


PARTS = {
    "linear": [(2, single_records)],  # how many timings, and what yields the records
    "path": [
        (3, functools.partial(path_records, multilabel=False)),
        (3, functools.partial(path_records, multilabel=True)),
    ],
    "knn": [(2, knn_records)],
    "geometry": [(1, geometry_records)],
}


def chosen_parts(o):
    """The parts to measure; geometry on a CPU, which has nothing to be compared with, only if asked for."""
    names = [o.only] if o.only else list(PARTS)
    if o.device == "cpu" and o.only is None:
        names.remove("geometry")
    return [part for name in names for part in PARTS[name]]


def main():
    o = options()
    warnings.simplefilter("ignore", ConvergenceWarning)
    parts = chosen_parts(o)
    timings = sum(count for count, _ in parts)
    with progress_bar(timings, "timings") as bar:
        records = (r for _, measure in parts for r in measure(o, bar))
        report(records, o.json, end="\n")


if __name__ == "__main__":
    main()
