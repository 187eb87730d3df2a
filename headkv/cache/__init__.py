"""The ragged cache: `RaggedLayer` stores one layer, `layout` says where its rows lie; a `MixedLayer` has several."""

from headkv.cache.mixed import MixedLayer, MixedSnapshot
from headkv.cache.ragged import RaggedLayer
from headkv.cache.rows import LayerSnapshot, Row, Rows

__all__ = ["LayerSnapshot", "MixedLayer", "MixedSnapshot", "RaggedLayer", "Row", "Rows"]
