"""Data: what the model sees. `load` goes from a config to batches; transformers and datasets are imported only when needed."""

from typing import TYPE_CHECKING, Any

from jaxtune.data.batch import Batch

if TYPE_CHECKING:
    from jaxtune.data.prepare import Data, load, total_steps
    from jaxtune.data.source import Source

__all__ = ["Batch", "Data", "Source", "load", "total_steps"]


def __getattr__(name: str) -> Any:
    if name in ("Data", "load", "total_steps"):
        from jaxtune.data import prepare

        return getattr(prepare, name)
    if name == "Source":
        from jaxtune.data.source import Source

        return Source
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
