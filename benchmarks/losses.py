"""Time and peak memory of the contrastive losses, forward and backward, against pytorch-metric-learning and
the dense form.

    python benchmarks/losses.py --n 512 2048 8192 32768 65536 --json losses.json
    python benchmarks/losses.py --device cuda --n 8192
    python benchmarks/losses.py --n 512 2048 --old /path/to/an/older/checkout

On a GPU the record `loss/memory/65536x256x527` is the memory of one large batch, against a limit of 2 GiB.
With `--old` the losses of an older checkout are a further contender. Every contender runs in a fresh process
of its own, on the same embeddings; a peer that would need more memory than is free is not run, and its ratio
is null. pytorch-metric-learning has no multi-label SupCon: beside `jaccard` it runs its single-label loss,
which is less work, on one label of each clip.
"""

import os

import torch
from measuring import (
    add_device_option,
    answer,
    checkout,
    device_name,
    in_new_process,
    option_parser,
    record,
    report,
    status_bytes,
    timed,
)

PML = "pytorch-metric-learning SupConLoss"
DENSE = "dense form"
NEEDED_MATRICES = {"ours": 0, PML: 13, DENSE: 9}  # (N, N) float32 at the peak, rounded up: what to refuse
MEASURES = (
    ("memory", "bytes", "MB", 1e6),
    ("time", "seconds", "s", 1.0),
)  # name, field, unit, what a unit is
TEMPERATURE = 0.1
SECONDS = 4.0
MOST_REPEATS = 5
LARGE = dict(n=65536, dim=256, classes=527)  # a batch of AudioSet's labels
LIMIT = 2.0  # GiB for it


# ---- in a process of its own ------------------------------------------------------------------------


def batch(n, dim, classes, device):
    """Random embeddings (n, dim) and label sets (n, classes): one label each, and 1 % of all others."""
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(n, classes, generator=g) < 0.01).float()
    y[torch.arange(n), torch.randint(0, classes, (n,), generator=g)] = 1
    z = torch.randn(n, dim, generator=g)
    return z.to(device).requires_grad_(), y.to(device)


def loss_of(contender, kind):
    """(z, multi-hot labels) -> scalar; supcon sees one label of each clip."""
    if contender == PML:
        from pytorch_metric_learning.losses import SupConLoss

        theirs = SupConLoss(temperature=TEMPERATURE)
        return lambda z, y: theirs(z, y.argmax(1))
    from act.losses import contrastive_loss

    def loss(z, y):
        labels = y.argmax(1) if kind == "supcon" else y
        return contrastive_loss(z, labels, kind, TEMPERATURE, dense=contender == DENSE)

    return loss


def step(loss, z, y, device):
    """Seconds of one forward and backward pass."""
    z.grad = None
    seconds, _ = timed(lambda: loss(z, y).backward(), device)
    return seconds


def extra_peak(run, device):
    """Bytes that `run()` needs at its peak beyond what is in use before; and what it returns."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return torch.cuda.max_memory_allocated() - before, result
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: the peak begins anew; ru_maxrss would keep an older one
    before = status_bytes("VmRSS")
    result = run()
    return status_bytes("VmHWM") - before, result


def measure(contender, kind, n, dim, classes, device):
    """Extra bytes of the first pass; best seconds of a few."""
    loss = loss_of(contender, kind)
    z, y = batch(n, dim, classes, device)
    step(loss, *batch(64, dim, classes, device), device)  # libraries load and threads start
    extra, first = extra_peak(lambda: step(loss, z, y, device), device)
    more = min(MOST_REPEATS, int(SECONDS / first))
    others = [step(loss, z, y, device) for _ in range(more)]
    return {"bytes": extra, "seconds": min([first, *others])}


def in_own_process(contender, kind, n, dim, classes, device, folder=None):
    """`measure` in a new process, or None if the contender would not fit; `act` from `folder` if one is
    given."""
    if NEEDED_MATRICES[contender] * n * n * 4 > free_bytes(device):
        return None
    return in_new_process(measure, contender, kind, n, dim, classes, device, checkout=folder)


def free_bytes(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- records ----------------------------------------------------------------------------------------


def product_rate(n, dim, device):
    """Multiply-adds per second of z z^T in blocks of 1024 rows: the speed limit of an exact loss."""
    z = torch.randn(n, dim, device=device)
    block = z[:1024]
    best = min(timed(lambda: block @ z.T, device)[0] for _ in range(10))
    return len(block) * n * dim / best


def name_of(device):
    """The GPU, or the threads of the CPU."""
    return device_name(device, cpu=f"cpu, {torch.get_num_threads()} threads")


def against(ours, theirs, peer, case, suffix, device):
    """The memory and the time record of one contender; theirs is None if it was not run."""
    for name, field, unit, scale in MEASURES:
        value = theirs and theirs[field] / scale
        yield record(
            f"{name}/{case}{suffix}", device, ours[field] / scale, value, peer, unit, higher_is_better=False
        )


def compared(kind, n, args):
    """Records of one kind and size against both peers, and of its share of the matrix product's rate."""
    device = name_of(args.device)
    case = f"{kind}/{n}"
    size = n, args.dim, args.classes, args.device
    ours = in_own_process("ours", kind, *size)
    for peer, suffix in ((PML, ""), (DENSE, "/dense")):
        theirs = in_own_process(peer, kind, *size)
        yield from against(ours, theirs, peer, case, suffix, device)
    if args.old:
        old = in_own_process("ours", kind, *size, args.old)
        yield from against(ours, old, args.old, case, "/old", device)
    products = 4 * args.dim  # three for the gradient, one for W z
    if kind != "supcon":
        products += args.classes  # one for W
    rate = n * n * products / ours["seconds"] / 1e9
    limit = product_rate(n, args.dim, args.device) / 1e9
    yield record(f"rate/{case}", device, rate, limit, "matrix product z z^T", "G multiply-adds/s")


def large_batch(args):
    """The memory of a large batch against its limit."""
    needed = in_own_process("ours", "jaccard", **LARGE, device=args.device)["bytes"] / 2**30
    size = "x".join(map(str, LARGE.values()))
    device = name_of(args.device)
    return record(f"loss/memory/{size}", device, needed, LIMIT, "limit", "GiB", higher_is_better=False)


def growth(megabytes, kind, device):
    """Memory per clip at the largest size against that at the smallest: at most 1 if memory is linear."""
    small, large = min(megabytes), max(megabytes)
    return record(
        name=f"memory-growth/{kind}/{large}",
        device=device,
        ours=megabytes[large] / large * 1e3,
        peer=megabytes[small] / small * 1e3,
        peer_name=f"itself at N = {small}",
        unit="kB per clip",
        higher_is_better=False,
    )


def all_records(args):
    """The records of every kind and size."""
    for kind in args.kinds:
        megabytes = {}
        for n in args.n:
            for r in compared(kind, n, args):
                if r["name"] == f"memory/{kind}/{n}":
                    megabytes[n] = r["ours"]
                yield r
        if len(args.n) > 1:
            large = {n: value for n, value in megabytes.items() if n >= 8192}
            yield growth(large or megabytes, kind, name_of(args.device))
    if args.device == "cuda":
        yield large_batch(args)


def parse():
    p = option_parser(__doc__)
    p.add_argument("--n", type=int, nargs="+", default=[512, 2048, 8192, 32768], help="batch sizes")
    p.add_argument(
        "--kinds", nargs="+", default=["supcon", "jaccard"], help="losses, by their name in act.losses.LOSSES"
    )
    p.add_argument("--dim", type=int, default=128, help="size of an embedding")
    p.add_argument("--classes", type=int, default=200, help="number of labels")
    add_device_option(p, choices=["cpu", "cuda"])
    p.add_argument("--old", type=checkout, help="a checkout of an older revision, to be compared with")
    return p.parse_args()


def main():
    args = parse()
    if args.child:
        return answer(args.child, measure)
    report(all_records(args), args.json)


if __name__ == "__main__":
    main()
