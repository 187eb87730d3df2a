"""Triton kernels for attention over a ragged KV cache: `ragged_decode`, `ragged_step`,
`ragged_extend`, `ragged_append`.

They run compiled on a CUDA device, and on a CPU in Triton's interpreter when `TRITON_INTERPRET=1` was set
before Triton was first imported. Nothing here waits for the device: lengths are read where they are, so all
can be captured in a CUDA graph.
"""

from headkv_kernels.append import ragged_append
from headkv_kernels.decode import DecodeConfig, new_ticket, ragged_decode, ragged_step
from headkv_kernels.extend import ExtendConfig, ragged_extend
from headkv_kernels.rows import Rows

__all__ = [
    "DecodeConfig",
    "ExtendConfig",
    "Rows",
    "new_ticket",
    "ragged_append",
    "ragged_decode",
    "ragged_extend",
    "ragged_step",
]
