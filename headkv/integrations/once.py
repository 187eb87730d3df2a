"""For torch's compiler: what is asked for twice is computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass


class Once(CustomGraphPass):
    """Merges equal nodes of a graph in which nothing is written in place, as `post_grad_custom_pre_pass` gets it.

    The compiler does so by itself for graphs with gradients alone.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Leaves the first of all nodes that do the same with the same tensors."""
        seen: dict[Any, torch.fx.Node] = {}
        for node in list(graph.nodes):
            if not _is_function(node):
                continue
            first = seen.setdefault(_hashable((node.target, node.args, node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)

    def uuid(self) -> str:
        """What it does, for the compiler's cache on disk."""
        return "headkv.integrations.once, 1"


def _is_function(node: torch.fx.Node) -> bool:
    """Whether a node is a function of other nodes, by an operator of torch's own that draws and writes nothing."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    draws = torch.Tag.nondeterministic_seeded in node.target.tags
    return bool(node.all_input_nodes) and not draws and not node.target._schema.is_mutable


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _hashable(value[key])) for key in sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return type(value), value  # 1, 1.0 and True are different things to do


ONCE = Once()  # one for all: the compiler takes another one for another way to compile
