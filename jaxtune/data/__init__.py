"""Data: what the model sees. `load` goes from a config to batches; nothing here imports transformers or datasets by itself."""

from jaxtune.data.batch import Batch

__all__ = ["Batch", "Data", "Source", "load"]


def __getattr__(name: str):
    if name in ("Data", "load"):
        from jaxtune.data import prepare

        return getattr(prepare, name)
    if name == "Source":
        from jaxtune.data.source import Source

        return Source
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
