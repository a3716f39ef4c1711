"""Audio Contrastive Tuning: tune an audio encoder with a contrastive loss, then read its geometry with two probes.

The names below come from their modules when they are first used, so that ``import act`` costs nothing.
"""
__version__ = "0.2.0"

_HOMES = {
    "core": ("ActError",),
    "manifest": ("fetch", "load_manifest"),
    "tasks": ("Task", "csv_task", "folder_task", "list_tasks", "load_task", "register_task"),
    "backbones": ("Backbone", "list_backbones", "load_backbone", "register_backbone", "wrap"),
    "losses": ("ContrastiveLoss", "contrastive_loss"),
    "tuning": ("Augment", "TuneConfig", "tune"),
    "embeddings": ("embed",),
    "probes": ("KNNProbe", "LinearProbe", "dual_probe", "probe"),
    "classifier": ("AudioClassifier",),
    "study": ("Run", "Store", "compare", "execute_all"),
    "comparison": ("compare_on",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'act' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"act.{_HOME[name]}"), name)


def __dir__(): return sorted(__all__ + ["__version__"])
