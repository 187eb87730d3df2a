"""The ragged cache: `RaggedLayer` stores one layer, `layout` says where its rows lie."""

from headkv.cache.ragged import LayerSnapshot, RaggedLayer, Row

__all__ = ["LayerSnapshot", "RaggedLayer", "Row"]
