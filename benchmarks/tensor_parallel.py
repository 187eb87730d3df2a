"""A decoder on one GPU and on several that share its heads (tensor parallel): step times, bytes a rank, throughput.

    PYTHONPATH=.:kernels torchrun --standalone --nproc-per-node 2 benchmarks/tensor_parallel.py [--json FILE]
    ... benchmarks/tensor_parallel.py --small         # over gloo on CPUs, a tiny shape: whether all of it works

Llama-3.1-8B's shape, random weights made on each device by one seed. First every rank runs the whole model by itself
(rank 0's figures are "1 GPU"), then transformers' `tp_plan` shares it out. Where time and memory alone are measured the
caches are filled with noise, a layer's heads sharing `--share` of the context by a Dirichlet draw; "heads in order" is
`balanced_order` of that draw. It checks itself: four layers in float32 must give the same tokens on all ranks as on one
GPU, and AdaKV the same budgets, up to what rounding moves.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from measure import Goal, add_json, finish
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig, tensor_parallel

import headkv
from headkv.cache import RaggedLayer
from headkv.heads import RankLoads, balanced_order
from headkv.scorers import SnapKVScorer

SEED = 0


@dataclass(frozen=True)
class Size:
    """What is run."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    vocabulary: int
    context: int
    cache_bytes: float
    new_tokens: int
    dtype: torch.dtype


LLAMA = Size(32, 32, 8, 128, 14336, 128256, 32768, 40e9, 24, torch.bfloat16)
SMALL = Size(4, 8, 4, 16, 256, 512, 512, 4e6, 4, torch.float32)


class Bench:
    """One rank of the measurement: `device`, `rank` of `ranks`, `size` and what was found so far."""

    def __init__(self, size: Size, share: float) -> None:
        self.size, self.share = size, share
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        cuda = dist.get_backend() == "nccl"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        self.mesh = dist.init_device_mesh(self.device.type, (self.ranks,), mesh_dim_names=("tp",))
        self.unit = "GPUs" if cuda else "processes"

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def say(self, *words: Any) -> None:
        """From the first rank."""
        if self.rank == 0:
            print(*words, flush=True)

    def model(self, layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
        """Random weights, the same on every rank."""
        size = self.size
        config = LlamaConfig(
            hidden_size=size.heads * size.dim,
            intermediate_size=size.inner,
            num_hidden_layers=layers,
            vocab_size=size.vocabulary,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=140_000,
            rope_theta=5e5,
            attn_implementation="sdpa",
        )
        torch.manual_seed(SEED)
        torch.set_default_dtype(dtype)
        with self.device:
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        return model.eval()

    def share_out(self, model: LlamaForCausalLM) -> None:
        """Leave this rank's part of `model` here, by transformers' plan."""
        apply: Callable[..., Any] = tensor_parallel.apply_tensor_parallelism
        if "tp_plan" in inspect.signature(apply).parameters:
            plan = model._resolve_parallel_plans(DistributedConfig(tp_size=self.ranks))[0]
            apply(model, self.mesh, plan)
        else:
            apply(model, self.mesh)
        for parameter in model.parameters():  # a part may be a view of the whole
            if isinstance(parameter.data, DTensor):
                own = parameter.data.to_local().clone()
                parameter.data = DTensor.from_local(own, self.mesh, parameter.data.placements)
        self.free()

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def seconds(self, step: Callable[[], object], rounds: int = 12, warm: int = 4) -> float:
        """Median of a step that all ranks begin together, the host's time included."""
        times = []
        for turn in range(rounds + warm):
            dist.barrier()
            self.wait()
            begin = time.perf_counter()
            step()
            self.wait()
            if turn >= warm:
                times.append(time.perf_counter() - begin)
        return median(times)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    # -- caches of noise ----------------------------------------------------------------------------------------------

    def draw(self, batch: int, share: float) -> Tensor:
        """Entries of each head `[L, B, H]`, the same on every rank."""
        size, generator = self.size, torch.Generator().manual_seed(SEED)
        if share == 1:
            return torch.full((size.layers, batch, size.kv_heads), size.context)
        parts = torch.empty(size.layers, 1, size.kv_heads).exponential_(generator=generator)
        parts = (parts / parts.sum(2, keepdim=True)).expand(-1, batch, -1)
        return (parts * size.kv_heads * share * size.context).long().clamp(1, size.context)

    def ragged(self, model: LlamaForCausalLM, lengths: Tensor) -> headkv.RaggedCache:
        """As if every head `[L, B, heads of this rank]` had kept so many of the context."""
        cache, size = headkv.RaggedCache.for_model(model, headkv.FullCache()), self.size
        for layer, sequences in zip(cache.layers, lengths, strict=True):
            rows = [[tuple(self.noise(int(n), size.dim)) for n in heads] for heads in sequences]
            positions = [
                [torch.arange(size.context - int(n), size.context) for n in heads] for heads in sequences
            ]
            layer.ragged = RaggedLayer.from_rows(rows, positions=positions, headroom=256)
            layer.is_initialized = True
        return cache

    def dense(self, model: LlamaForCausalLM, batch: int, heads: int) -> DynamicCache:
        """transformers' full cache."""
        cache = DynamicCache(config=model.config)
        for i in range(self.size.layers):
            cache.update(*self.noise(batch, heads, self.size.context, self.size.dim), i)
        return cache

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(2, *shape, device=self.device, dtype=self.size.dtype)

    # -- what is measured ---------------------------------------------------------------------------------------------

    def steps(self, model: LlamaForCausalLM, shared: bool) -> list[dict[str, Any]]:
        """Decode steps of one sequence."""
        heads = self.size.kv_heads // (self.ranks if shared else 1)
        token = torch.full((1, 1), 5, device=self.device)
        lengths, rows = self.draw(1, self.share), []

        def row(name: str, step: Callable[[], object], nbytes: float) -> None:
            took = self.seconds(step)
            each = self.everyones(nbytes) if shared else [nbytes]
            where = {self.unit: self.ranks if shared else 1, "cache": name}
            even = f"{max(each) * len(each) / sum(each):.3f}"
            rows.append(
                where
                | {"ms a step": round(1e3 * took, 2), "cache, MB a rank": megabytes(each), "uneven": even}
            )
            self.say(*rows[-1].values())

        model.set_attn_implementation("sdpa")
        full = self.dense(model, 1, heads)
        nbytes = 2.0 * heads * self.size.context * self.size.dim * self.size.layers * self.size.dtype.itemsize
        row("DynamicCache, sdpa", partial(model, token, past_key_values=full), nbytes)
        del full
        self.free()
        kinds: list[tuple[str, Tensor]] = [(f"headkv, {self.share:.0%}", lengths)]
        if shared:
            order = balanced_order(lengths[:, 0], self.ranks)
            kinds.append((f"headkv, {self.share:.0%}, heads in order", lengths.gather(2, order[:, None])))
        for name, every in kinds:
            ragged = self.ragged(model, self.own(every, shared))
            row(name, partial(model, token, past_key_values=ragged), ragged.nbytes)
            if self.cuda:
                graph = headkv.DecodeGraph(model, ragged)
                row(f"{name}, CUDA graph", partial(graph.step, token), ragged.nbytes)
                del graph
            del ragged
            self.free()
        return rows

    def own(self, every: Tensor, shared: bool) -> Tensor:
        return every.chunk(self.ranks, 2)[self.rank] if shared else every

    def everyones(self, number: float) -> list[float]:
        mine = torch.tensor(
            [float(number)], device=self.device, dtype=torch.float64 if not self.cuda else None
        )
        every = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(every, mine)
        return [float(x) for x in every]

    def prefills(self, model: LlamaForCausalLM, shared: bool) -> list[dict[str, Any]]:
        """A prompt of the whole context, compressed while it is read: what meeting costs."""
        ids = torch.randint(5, self.size.vocabulary, (1, self.size.context), device=self.device)
        ids, rows = self.same(ids), []
        for method in (headkv.FullCache(), self.adakv(), headkv.AdaKV(self.share, scope="model")):

            def read(method: Any = method) -> None:
                cache = headkv.RaggedCache.for_model(model, method)
                model(ids, past_key_values=cache, logits_to_keep=1)
                cache.finalize_prefill()

            took = self.seconds(read, rounds=1, warm=1)
            name = type(method).__name__ + (", all layers" if getattr(method, "scope", "") == "model" else "")
            where = {self.unit: self.ranks if shared else 1, "prompt": self.size.context}
            rows.append(where | {"method": name, "s": round(took, 3)})
            self.say(*rows[-1].values())
            self.free()
        return rows

    def adakv(self) -> headkv.AdaKV:
        window = 32 if self.size.context > 1000 else 8
        return headkv.AdaKV(self.share, scorer=SnapKVScorer(window=window))

    def same(self, tensor: Tensor) -> Tensor:
        """The first rank's on all."""
        dist.broadcast(tensor, 0)
        return tensor

    def throughput(self, model: LlamaForCausalLM, shared: bool) -> list[dict[str, Any]]:
        """Tokens a second of `generate` for as many sequences as `cache_bytes` a rank hold."""
        size, rows = self.size, []
        heads = size.kv_heads // (self.ranks if shared else 1)
        whole = 2 * size.layers * heads * size.context * size.dim * size.dtype.itemsize
        per = {"DynamicCache, sdpa": whole, "headkv, all": whole}
        drawn = self.draw(1, self.share)
        if shared:  # heads in order, as one would deploy it
            drawn = drawn.gather(2, balanced_order(drawn[:, 0], self.ranks)[:, None])
            fullest = float(RankLoads.of(drawn[:, 0], self.ranks).totals.max())
        else:
            fullest = float(drawn.sum())
        head_room = 256 * heads * size.layers
        per[f"headkv, {self.share:.0%}"] = int(
            (fullest + head_room) * 2 * size.dim * size.dtype.itemsize * 1.02
        )
        for name, nbytes in per.items():
            batch = max(1, int(size.cache_bytes // nbytes))
            ids = torch.full((batch, size.context + 1), 5, device=self.device)
            ask: dict[str, Any] = {"max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens}
            ask |= {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
            if name.startswith("Dynamic"):
                model.set_attn_implementation("sdpa")
                cache: Any = self.dense(model, batch, heads)
                held = float(whole * batch)
                took = self.once(model, ids, cache, ask)
            else:
                lengths = self.draw(batch, 1) if name.endswith("all") else drawn.expand(-1, batch, -1)
                cache = self.ragged(model, self.own(lengths, shared))
                held = float(cache.nbytes)
                with headkv.compress(model, headkv.FullCache(), cuda_graph=self.cuda):
                    took = self.once(model, ids, cache, ask)
            where = {self.unit: self.ranks if shared else 1, "cache": name, "sequences": batch}
            each = self.everyones(held) if shared else [held]
            rows.append(
                where
                | {
                    "tokens a second": round(batch * size.new_tokens / took, 1),
                    "cache, MB a rank": megabytes(each),
                }
            )
            self.say(*rows[-1].values())
            del cache
            self.free()
        return rows

    def once(self, model: Any, ids: Tensor, cache: Any, ask: dict[str, Any]) -> float:
        """Seconds of one `generate`; a few tokens first compile what it needs, and are forgotten."""
        few = {"max_new_tokens": 4, "min_new_tokens": 4}
        model.generate(ids, past_key_values=cache, **{**ask, **few})
        cache.crop(-4)
        dist.barrier()
        self.wait()
        begin = time.perf_counter()
        model.generate(ids, past_key_values=cache, **ask)
        self.wait()
        return time.perf_counter() - begin

    # -- whether it is the same ---------------------------------------------------------------------------------------

    def answers(self, model: LlamaForCausalLM) -> tuple[list[int], Tensor]:
        """Tokens behind a compressed prompt, and what each head keeps `[L, heads]`."""
        n = min(4096, self.size.context)
        ids = torch.randint(5, self.size.vocabulary, (1, n), generator=torch.Generator().manual_seed(1))
        ask: dict[str, Any] = {
            "max_new_tokens": 16,
            "min_new_tokens": 16,
            "do_sample": False,
            "pad_token_id": 0,
        }
        with headkv.compress(model, self.adakv()) as session:
            tokens = model.generate(ids.to(self.device), **ask)
        return tokens[0, n:].tolist(), session.cache.lengths()[:, 0]

    def check(self) -> list[Goal]:
        """Four layers in float32: by one GPU, then by all."""
        model = self.model(min(4, self.size.layers), torch.float32)
        tokens, lengths = self.answers(model)
        self.share_out(model)
        again, own = self.answers(model)
        every = [torch.empty_like(own).to(self.device) for _ in range(self.ranks)]
        dist.all_gather(every, own.contiguous().to(self.device))
        moved = int((torch.cat(every, 1).cpu() - lengths).abs().max())
        share = moved / float(lengths.double().mean())
        equal = sum(a == b for a, b in zip(tokens, again, strict=True))
        return [
            Goal(
                "tokens as on one, float32",
                f"{len(tokens)} of {len(tokens)}",
                str(equal),
                equal == len(tokens),
            ),
            Goal(
                "entries that a head's budget moves by", "at most 1%", f"{moved} ({share:.2%})", share <= 0.01
            ),
        ]


def megabytes(each: list[float]) -> str:
    """Of every rank."""
    return " + ".join(f"{x / 1e6:.1f}" for x in each)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny shape on CPUs, over gloo")
    parser.add_argument("--share", type=float, default=0.2, help="of the cache to keep (default: 0.2)")
    add_json(parser)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun, see --help")
    if not options.small and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        parser.error(f"needs a GPU a process, torch sees {torch.cuda.device_count()}; or --small")
    if not options.small:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if options.small else "nccl")
    begin = time.perf_counter()
    with torch.inference_mode():
        bench = Bench(SMALL if options.small else LLAMA, options.share)
        goals = bench.check()
        for goal in goals:
            bench.say(f"{goal.figure}: {goal.measured}, wanted {goal.wanted}")
        bench.free()
        name = torch.cuda.get_device_name() if bench.cuda else "CPU"
        where = f"{bench.ranks} x {name}, torch {torch.__version__}"
        titles = (
            f"One decode step, {where}",
            "Prefill",
            f"generate at {bench.size.cache_bytes / 1e9:g} GB of cache a rank",
        )
        tables: dict[str, list[dict[str, Any]]] = {title: [] for title in titles}
        model = bench.model(bench.size.layers, bench.size.dtype)
        for shared in (False, True):
            if shared:
                bench.share_out(model)
            for title, measure in zip(titles, (bench.steps, bench.prefills, bench.throughput), strict=True):
                tables[title] += measure(model, shared)
                bench.say(f"{time.perf_counter() - begin:.0f} s so far")
    if bench.rank == 0:
        finish(options.json, tables, goals)
    dist.destroy_process_group()
    if not all(goal.met for goal in goals):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
