"""Contrastive tuning against the trainer of audiosetfit: the same encoder, clips, batch and epochs on the same device.

    python benchmarks/tuning.py [--task asc40-mini] [--clips 160] [--json FILE]

Two rates are compared, because the two trainers mean different things by an epoch. `step/...` is training clips per second
of an epoch: how fast each gets through the data. audiosetfit pairs every clip with others (its `num_iterations`, 20 where SetFit
pairs explicitly; its own default makes every pair there is), so its epoch embeds each clip many times; ours embeds two views.
`rows/...` is clips through the encoder per second, however often each comes: what the loop costs beside the encoder.
"""
import argparse
import json
import sys
import time

import numpy as np
import torch
from torch import nn

from act.backbones import load_backbone
from act.tasks import load_task
from act.tuning import TuneConfig, tune

PEER = "audiosetfit 0.1.0"


def ours(task, backbone, batch, epochs):
    """Seconds of one of our epochs, a mean over some, and rows through the encoder."""
    config = TuneConfig(passes=2 * epochs, batch=batch, augment=None, views=2)
    started = time.perf_counter()
    tuned = tune(load_backbone(backbone), task, config, progress=False, inplace=True)
    return (time.perf_counter() - started) / epochs, int(tuned.log.rows.sum()) / epochs


def peer_body(backbone, device):
    """The same encoder behind audiosetfit's interface."""
    from act.audio import collate
    from audiosetfit.encoders import AudioEncoder

    class Body(AudioEncoder):
        def __init__(self):
            nn.Module.__init__(self)
            self.net, self.rows = load_backbone(backbone), 0
            self.model_id, self.target_sr, self.embedding_dim = backbone, self.net.sample_rate, self.net.dim
            self.to(device)

        def prepare(self, waveforms):
            x, lengths = collate([torch.from_numpy(np.asarray(w)) for w in waveforms])
            return dict(x=x, lengths=lengths)

        def forward_features(self, inputs):
            self.rows += len(inputs["x"])
            return self.net(inputs["x"], inputs["lengths"])

    return Body()


def peer(task, backbone, batch, device, iterations):
    """Seconds of one of audiosetfit's epochs, and rows through the encoder."""
    from audiosetfit import AudioSetFitModel, Trainer, TrainingArguments
    rows, waves = task.indices("train"), task.waveforms(load_backbone(backbone).sample_rate)
    clips, labels = [waves[int(i)].numpy() for i in rows], task.labels[rows].tolist()
    model = AudioSetFitModel(peer_body(backbone, device), None)
    arguments = TrainingArguments(embedding_batch_size=batch // 2, num_iterations=iterations, show_progress_bar=False)
    trainer = Trainer(model, arguments)
    started = time.perf_counter()
    trainer.train_embeddings(clips, labels, arguments)
    return time.perf_counter() - started, model.model_body.rows


def record(name, device, mine, theirs):
    return dict(name=name, device=device, ours=mine, peer=theirs, peer_name=PEER, ratio=mine / theirs, unit="clips/s", higher_is_better=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="asc40-mini")
    parser.add_argument("--backbone", default="speech-embedding")
    parser.add_argument("--clips", type=int, default=160, help="training clips; all of them take long with the peer")
    parser.add_argument("--batch", type=int, default=128, help="rows through the encoder in a step")
    parser.add_argument("--iterations", type=int, default=20, help="audiosetfit's num_iterations, and our epochs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    a = parser.parse_args()
    try: import audiosetfit  # noqa: F401
    except ImportError: sys.exit("the peer is not installed: pip install --no-deps audiosetfit==0.1.0 transformers")
    whole = load_task(a.task)
    task = whole.subset(whole.indices("train")[:: max(1, len(whole.indices("train")) // a.clips)][:a.clips])
    task.waveforms(load_backbone(a.backbone).sample_rate)
    ours(task, a.backbone, a.batch, 1)                                              # warm up
    (t_ours, r_ours), (t_peer, r_peer) = ours(task, a.backbone, a.batch, a.iterations), peer(task, a.backbone, a.batch, a.device, a.iterations)
    device = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    records = [record(f"step/{a.task}/{a.backbone}", device, len(task) / t_ours, len(task) / t_peer),
               record(f"rows/{a.task}/{a.backbone}", device, r_ours / t_ours, r_peer / t_peer)]
    for r in records: print(f"{r['name']:40} ours {r['ours']:8.1f}  {PEER} {r['peer']:8.1f} clips/s  ratio {r['ratio']:.2f}")
    if a.json:
        with open(a.json, "w", encoding="utf-8") as f: json.dump(records, f, indent=1)


if __name__ == "__main__": main()
