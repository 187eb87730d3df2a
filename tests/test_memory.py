"""Memory really falls: by the operating system's figure for the process, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

LAYERS, KV_HEADS, DIM, TOKENS = 8, 4, 64, 6000
LAYER_BYTES = 2 * KV_HEADS * TOKENS * DIM * 4

SCRIPT = f"""
import json, os
import psutil, torch, headkv
from headkv.models.tiny import tiny_model

def figure(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

model = tiny_model("llama", num_hidden_layers={LAYERS}, num_attention_heads={KV_HEADS}, num_key_value_heads={KV_HEADS},
                   head_dim={DIM}, max_position_embeddings={TOKENS} + 64)
ids = torch.randint(3, 97, (1, {TOKENS}))
methods = {{"full": headkv.FullCache(), "tenth": headkv.AdaKV(budget=0.1), "model": headkv.AdaKV(budget=0.1, scope="model")}}

def prefill(tokens, method):
    cache = headkv.RaggedCache.for_model(model, method)
    with torch.inference_mode():
        model(tokens, past_key_values=cache, logits_to_keep=1)
    return cache

for name, method in methods.items():
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    prefill(ids[:, :200], method)  # what is loaded on first use, of libraries too
    before = psutil.Process().memory_info().rss
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    cache = prefill(ids, method)
    after, peak = psutil.Process().memory_info().rss, figure("VmHWM")
    print(json.dumps({{name: {{"held": after - before, "peak": peak - before, "nbytes": cache.nbytes}}}}), flush=True)
    os._exit(0)
"""


def run(script: str) -> dict[str, Any]:
    """What `script` prints, line by line, in a process where nothing else comes and goes."""
    # glibc would keep freed blocks for itself; below this threshold it gives each one back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {key: value for line in done.stdout.splitlines() for key, value in json.loads(line).items()}


@cache
def measured() -> dict[str, dict[str, int]]:
    """Of each method, in a fork of one process that has imported what all need."""
    return run(SCRIPT)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")
def test_prefill_peak_is_the_compressed_layers_and_one_full_layer():
    full, tenth = measured()["full"], measured()["tenth"]
    slack = 0.15 * LAYER_BYTES * LAYERS  # activations of one layer, the interpreter

    # what is held afterwards is what nbytes says, and nbytes is what the budget says
    for figures in (full, tenth):
        assert abs(figures["held"] - figures["nbytes"]) < 0.1 * LAYER_BYTES * LAYERS, figures
    assert LAYERS * LAYER_BYTES <= full["nbytes"] < 1.1 * LAYERS * LAYER_BYTES
    assert tenth["nbytes"] < 0.13 * LAYERS * LAYER_BYTES

    # the peak: all layers full against all layers compressed and one full
    saved = full["peak"] - tenth["peak"]
    assert saved > (LAYERS - 1) * 0.87 * LAYER_BYTES - slack, (full, tenth)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")
def test_peak_of_a_method_that_sees_the_whole_prompt():
    """The whole cache once, with what is kept and one layer that is spread out; afterwards what the budget says."""
    full, whole = measured()["full"], measured()["model"]
    everything = LAYERS * LAYER_BYTES
    assert whole["nbytes"] < 0.13 * everything and abs(whole["held"] - whole["nbytes"]) < 0.1 * everything
    assert whole["peak"] < full["peak"] + 0.13 * everything + 2 * LAYER_BYTES, (full, whole)


RESIDENT = """
import json, os, torch
from headkv.evaluation.resident import resident_bytes

before = resident_bytes()
block = torch.ones(64 << 20, dtype=torch.uint8)
held = resident_bytes() - before
del block
after = resident_bytes()
pages = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") if os.path.exists("/proc") else after
print(json.dumps({"held": held, "left": after - before, "off": after - pages}))
"""


def test_resident_bytes_are_what_the_system_says():
    """The figure of the benchmarks and of `headkv demo`: 64 MB that are written show up, and go when they are freed."""
    said = run(RESIDENT)
    assert said["held"] == pytest.approx(64 << 20, abs=4 << 20)
    assert abs(said["left"]) < 4 << 20 and abs(said["off"]) < 4 << 20
