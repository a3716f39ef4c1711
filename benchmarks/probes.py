"""Speed of the probes against scikit-learn: one penalty, a path of eight, and k-NN. Ratios are ours / peer: smaller is better."""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from act.probes import PENALTIES, KNNProbe, linear_path

PEER_STEPS = 200


def embeddings(n, dim, classes, seed):
    """Correlated embeddings (n, dim) of Gaussian classes, a tenth of the labels wrong, float32."""
    g, spread = torch.Generator().manual_seed(0), torch.arange(1, dim + 1) ** -.7
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    centres = torch.randn(classes, dim, generator=g) * spread
    g.manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    X = (.8 * centres[y] + torch.randn(n, dim, generator=g) * spread) @ rotation
    return X, torch.where(torch.rand(n, generator=g) < .1, torch.randint(classes, (n,), generator=g), y)


def seconds(work, device, repeats=1):
    """Best wall time of some repeats, and the last result."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        if device.startswith("cuda"): torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def record(name, device, ours, peer, peer_name, **more):
    return dict(name=name, device=device, ours=ours, peer=peer, peer_name=peer_name, ratio=ours / peer, unit="s", higher_is_better=False, **more)


def linear_records(o, bar):
    """One penalty against LogisticRegression, and the path against one penalty; in one run, on the same z-scored embeddings."""
    X, y = embeddings(o.train, o.dim, o.classes, seed=1)
    x = StandardScaler().fit_transform(X.numpy())
    size, z, ids = f"{o.train}x{o.dim}x{o.classes}", torch.from_numpy(x).to(o.device), y.to(o.device)
    fit = lambda Cs: (lambda: linear_path(z, ids, Cs))
    one, found = seconds(fit([1.]), o.device, o.repeats); bar.update()
    path, _ = seconds(fit(PENALTIES), o.device, o.repeats); bar.update()
    peer, model = seconds(lambda: LogisticRegression(max_iter=PEER_STEPS).fit(x, y.numpy()), "cpu"); bar.update()
    loss = -model.predict_log_proba(x)[np.arange(len(y)), y].sum() + np.square(model.coef_).sum() / 2
    return [record(f"linear/{size}", o.device, one, peer, f"scikit-learn LogisticRegression(max_iter={PEER_STEPS}), cpu",
                   objective=float(found.objective[0]), peer_objective=float(loss), steps=int(found.n_iter[0])),
            record(f"path{len(PENALTIES)}/{size}", o.device, path, one, "one penalty, C = 1", Cs=PENALTIES)]


def knn_record(o, bar):
    """k-NN predictions against KNeighborsClassifier, equal votes on both sides."""
    (X, y), (Q, _) = embeddings(o.train, o.dim, o.classes, seed=1), embeddings(o.queries, o.dim, o.classes, seed=2)
    probe = KNNProbe(temperature=None).fit(X.to(o.device), y)
    queries, theirs = Q.to(o.device), KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(X.numpy(), y.numpy())
    ours, found = seconds(lambda: probe.predict(queries), o.device, o.repeats); bar.update()
    peer, expected = seconds(lambda: theirs.predict(Q.numpy()), "cpu", o.repeats); bar.update()
    agreement = float((found.cpu().numpy() == expected).mean())
    return record(f"knn/{o.train}x{o.queries}x{o.dim}", o.device, ours, peer, "scikit-learn KNeighborsClassifier(cosine, brute), cpu", agreement=agreement)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, value in (("train", 20000), ("queries", 5000), ("dim", 768), ("classes", 50), ("repeats", 2)): parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("linear", "knn"))
    parser.add_argument("--json", type=Path, help="write the records here")
    o = parser.parse_args()
    with tqdm(total=5 if not o.only else {"linear": 3, "knn": 2}[o.only], file=sys.stdout, ncols=80, desc="timings") as bar:
        records = (linear_records(o, bar) if o.only != "knn" else []) + ([knn_record(o, bar)] if o.only != "linear" else [])
    print(f"{'record':<24}{'ours':>10}{'peer':>10}{'ratio':>8}  peer")
    for r in records: print(f"{r['name']:<24}{r['ours']:>8.2f} s{r['peer']:>8.2f} s{r['ratio']:>8.3f}  {r['peer_name']}")
    if o.json: o.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__": main()
