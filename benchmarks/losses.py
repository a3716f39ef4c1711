"""Time and peak memory of the contrastive losses, forward and backward, against pytorch-metric-learning and the dense form.

    python benchmarks/losses.py --n 512 2048 8192 32768 65536 --json losses.json
    python benchmarks/losses.py --device cuda --n 8192
    python benchmarks/losses.py --n 512 2048 --old /path/to/an/older/checkout

On a GPU the record `loss/memory/65536x256x527` is the memory of one large batch, against a limit of 2 GiB. With `--old` the
losses of an older checkout are a further contender. Every contender runs in a fresh process of its own, on the same embeddings; a peer that would need more memory than is free is
not run, and its ratio is null. pytorch-metric-learning has no multi-label SupCon: beside `jaccard` it runs its
single-label loss, which is less work, on one label of each clip.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import torch

PML, DENSE = "pytorch-metric-learning SupConLoss", "dense form"
NEEDED_MATRICES = {"ours": 0, PML: 13, DENSE: 9}     # (N, N) float32 matrices at the peak, rounded up: what to refuse to start
TEMPERATURE, SECONDS, MOST_REPEATS = .1, 4., 5
LARGE = dict(n=65536, dim=256, classes=527)          # a batch of AudioSet's labels
LIMIT = 2.                                           # GiB for it


def batch(n, dim, classes, device):
    """Random embeddings (n, dim) and label sets (n, classes): one label each, and 1 % of all others."""
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(n, classes, generator=g) < .01).float()
    y[torch.arange(n), torch.randint(0, classes, (n,), generator=g)] = 1
    return torch.randn(n, dim, generator=g).to(device).requires_grad_(), y.to(device)


def loss_of(contender, kind):
    """(z, multi-hot labels) -> scalar; supcon sees one label of each clip."""
    if contender == PML:
        from pytorch_metric_learning.losses import SupConLoss
        theirs = SupConLoss(temperature=TEMPERATURE)
        return lambda z, y: theirs(z, y.argmax(1))
    from act.losses import contrastive_loss
    return lambda z, y: contrastive_loss(z, y.argmax(1) if kind == "supcon" else y, kind, TEMPERATURE, dense=contender == DENSE)


def synchronize(device):
    if device == "cuda": torch.cuda.synchronize()


def step(loss, z, y, device):
    """Seconds of one forward and backward pass."""
    z.grad = None
    synchronize(device)
    start = time.perf_counter()
    loss(z, y).backward()
    synchronize(device)
    return time.perf_counter() - start


def resident(field):
    """VmRSS (memory in use) or VmHWM (its peak) of this process, in bytes."""
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(field)))


def extra_peak(run, device):
    """Bytes that `run()` needs at its peak beyond what is in use before; and what it returns."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, out = torch.cuda.memory_allocated(), run()
        return torch.cuda.max_memory_allocated() - before, out
    with open("/proc/self/clear_refs", "w") as f: f.write("5")           # Linux: the peak begins anew; ru_maxrss would keep an older one
    before, out = resident("VmRSS"), run()
    return resident("VmHWM") - before, out


def measure(contender, kind, n, dim, classes, device):
    """Extra bytes of the first pass; best seconds of a few."""
    loss, (z, y) = loss_of(contender, kind), batch(n, dim, classes, device)
    step(loss, *batch(64, dim, classes, device), device)             # libraries load and threads start outside the measurement
    extra, first = extra_peak(lambda: step(loss, z, y, device), device)
    more = min(MOST_REPEATS, int(SECONDS / first))
    return {"bytes": extra, "seconds": min([first] + [step(loss, z, y, device) for _ in range(more)])}


def matmul_rate(n, dim, device):
    """Multiply-adds per second of the matrix product z z^T in blocks of 1024 rows: the speed limit of an exact loss."""
    z = torch.randn(n, dim, device=device)
    block, best = z[:1024], float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        block @ z.T
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return len(block) * n * dim / best


def free_bytes(device):
    if device == "cuda": return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_own_process(contender, kind, n, args, folder=None):
    """`measure` in a fresh interpreter, or None if the contender would not fit; `act` from `folder` if one is given."""
    if NEEDED_MATRICES[contender] * n * n * 4 > free_bytes(args.device): return None
    command = [sys.executable, __file__, "--contender", contender, "--kinds", kind, "--n", str(n), "--dim", str(args.dim),
               "--classes", str(args.classes), "--device", args.device]
    env = os.environ if folder is None else {**os.environ, "PYTHONPATH": os.path.abspath(folder)}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout.splitlines()[-1])


def record(name, device, ours, peer, peer_name, unit, higher_is_better=False):
    return {"name": name, "device": device, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ours / peer if peer else None,
            "unit": unit, "higher_is_better": higher_is_better}


def compared(kind, n, args):
    """Records of one kind and size against both peers, and of its share of the matrix product's rate; its bytes."""
    ours, device = in_own_process("ours", kind, n, args), device_name(args.device)
    for peer, suffix in ((PML, ""), (DENSE, "/dense")):
        theirs = in_own_process(peer, kind, n, args) or {}
        for name, field, unit, scale in (("memory", "bytes", "MB", 1e6), ("time", "seconds", "s", 1.)):
            value = theirs.get(field)
            yield record(f"{name}/{kind}/{n}{suffix}", device, ours[field] / scale, value and value / scale, peer, unit)
    if args.old:
        old = in_own_process("ours", kind, n, args, args.old)
        for name, field, unit, scale in (("memory", "bytes", "MB", 1e6), ("time", "seconds", "s", 1.)):
            yield record(f"{name}/{kind}/{n}/old", device, ours[field] / scale, old[field] / scale, args.old, unit)
    products = 4 * args.dim + (args.classes if kind != "supcon" else 0)           # three for the gradient, one for W z, one for W
    yield record(f"rate/{kind}/{n}", device, n * n * products / ours["seconds"] / 1e9, matmul_rate(n, args.dim, args.device) / 1e9,
                 "matrix product z z^T", "G multiply-adds/s", True)


def large_batch(args):
    """The memory of a large batch against its limit."""
    n, dim, classes = LARGE.values()
    sizes = argparse.Namespace(**{**vars(args), "dim": dim, "classes": classes})
    needed = in_own_process("ours", "jaccard", n, sizes)["bytes"] / 2**30
    return record(f"loss/memory/{n}x{dim}x{classes}", device_name(args.device), needed, LIMIT, "limit", "GiB")


def growth(records, kind, sizes, device):
    """Memory per clip at the largest size against that at the smallest: at most 1 if memory is linear."""
    mb = {n: next(r["ours"] for r in records if r["name"] == f"memory/{kind}/{n}") for n in sizes}
    small, large = min(sizes), max(sizes)
    return record(f"memory-growth/{kind}/{large}", device, mb[large] / large * 1e3, mb[small] / small * 1e3, f"itself at N = {small}", "kB per clip")


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def show(r):
    peer, ratio = ("not run (memory)", "-") if r["peer"] is None else (f"{r['peer']:.3g}", f"{r['ratio']:.3f}")
    print(f"{r['name']:<28}{r['ours']:>10.3g}{peer:>18}{ratio:>9}  {r['unit']:<18}{r['peer_name']}", flush=True)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, nargs="+", default=[512, 2048, 8192, 32768], help="batch sizes")
    p.add_argument("--kinds", nargs="+", default=["supcon", "jaccard"], help="losses, by their name in act.losses.LOSSES")
    p.add_argument("--dim", type=int, default=128, help="size of an embedding")
    p.add_argument("--classes", type=int, default=200, help="number of labels")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--old", help="a checkout of an older revision, to be compared with")
    p.add_argument("--json", help="write the records to this file")
    p.add_argument("--contender", help=argparse.SUPPRESS)
    return p.parse_args()


def main():
    args = parse()
    if args.contender: return print(json.dumps(measure(args.contender, args.kinds[0], args.n[0], args.dim, args.classes, args.device)))
    records = []
    print(f"{'name':<28}{'ours':>10}{'peer':>18}{'ratio':>9}  unit")
    for kind in args.kinds:
        for n in args.n:
            for r in compared(kind, n, args):
                records.append(r)
                show(r)
        if len(args.n) > 1:
            records.append(growth(records, kind, [n for n in args.n if n >= 8192] or args.n, device_name(args.device)))
            show(records[-1])
    if args.device == "cuda":
        records.append(large_batch(args))
        show(records[-1])
    if args.json:
        with open(args.json, "w") as f: json.dump(records, f, indent=1)


if __name__ == "__main__": main()
