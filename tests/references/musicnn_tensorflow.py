"""Run musicnn's published TensorFlow graphs and record what they compute, for test_backbones.py.

TensorFlow does not belong into the environment of act. Once, in another one:
    pip install tensorflow-cpu && pip download --no-deps musicnn==0.1.0 && unzip musicnn-0.1.0-*.whl
    python tests/references/musicnn_tensorflow.py musicnn tests/references/musicnn_tensorflow.npz
Recorded with tensorflow-cpu 2.21.0.
"""

import sys

import numpy as np
import tensorflow.compat.v1 as tf

OUTPUTS = {
    "MSD_vgg": "model/batch_normalization_5/cond/Merge:0",  # (B, F, 6, 128)
    "MSD_musicnn": "model/dropout_1/cond/Merge:0",
}  # (B, 200), dropout off


def run(folder, name, log_mels):
    graph = tf.MetaGraphDef()
    with open(f"{folder}/{name}/.meta", "rb") as file:
        graph.ParseFromString(file.read())
    for node in graph.graph_def.node:
        node.attr.pop("_output_shapes", None)  # stale ones stop the import
    with tf.Graph().as_default(), tf.Session() as session:
        tf.train.import_meta_graph(graph).restore(session, f"{folder}/{name}/")
        return session.run(OUTPUTS[name], {"model/Placeholder:0": log_mels, "model/Placeholder_2:0": False})


if __name__ == "__main__":
    folder, target = sys.argv[1:]
    log_mels = (2 * np.random.default_rng(0).random((2, 187, 96))).astype(np.float32)
    np.savez_compressed(
        target, **{name: run(folder, name, log_mels).reshape(2, -1)[:, :2000] for name in OUTPUTS}
    )
