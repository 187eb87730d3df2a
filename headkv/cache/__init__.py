"""The ragged cache: `RaggedLayer` stores one layer, `layout` says where its rows lie."""

from headkv.cache.ragged import RaggedLayer
from headkv.cache.rows import LayerSnapshot, Row, Rows

__all__ = ["LayerSnapshot", "RaggedLayer", "Row", "Rows"]
