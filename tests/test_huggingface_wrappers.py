"""Models inside wrappers, and models that are spread: what runs inside is compressed as it is by itself."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_cases import METHODS, SCORER, prompts
from letters import letters
from torch import nn

import headkv
from headkv._wrappers import unwrapped
from headkv.heads import HeadProfile
from headkv.models.tiny import FAMILIES, tiny_model

ADA = METHODS["AdaKV"]
LENGTH: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    torch.manual_seed(0)
    shape = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**shape)).eval()
    with torch.no_grad():  # fresh adapters change nothing
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return wrapped


def mixed(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    shape = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": True}
    return peft.get_peft_model(model, peft.LoraConfig(**shape), mixed=True).eval()


def prompt_tuning(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    ).eval()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_before(model: Any) -> Any:
    """Compiled, and called, without hooks."""
    model.compile(backend="eager")
    model(**prompts(1))
    return model


def accelerated(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model)


@contextmanager
def group() -> Iterator[None]:
    """A process group of one, as a trainer makes it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "peft": lora,
    "the tuner of peft": lambda model: lora(model).base_model,
    "peft, mixed": mixed,
    "peft, prompt tuning": prompt_tuning,
    "torch.compile": compiled,
    "torch.compile in place": compiled_before,
    "torch.compile of peft": lambda model: compiled(lora(model)),
    "accelerate": accelerated,
    "DataParallel": nn.DataParallel,
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "rust"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_full_cache_changes_nothing(name: str, backend: str) -> None:
    """`generate`, where the wrapper has one, and a forward call, which some wrappers send past the model's own hooks."""
    model, inputs = WRAPPERS[name](tiny_model("llama")), prompts(1)
    with torch.no_grad():
        want = model(**inputs).logits
        tokens = model.generate(**inputs, **LENGTH) if hasattr(model, "generate") else None
        with headkv.compress(model, headkv.FullCache(), backend=backend) as session:
            out = model(**inputs)
            assert out.past_key_values is session.cache and session.cache.seen == want.shape[1]
            torch.testing.assert_close(out.logits, want, rtol=1e-4, atol=1e-4)
            if tokens is not None:
                assert torch.equal(model.generate(**inputs, **LENGTH), tokens)


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_inside_is_compressed(name: str) -> None:
    """By the wrapper, and by a cache for the wrapper, alike."""
    model, inputs = WRAPPERS[name](tiny_model("llama")), prompts(1)
    with torch.no_grad():
        with headkv.compress(model, ADA) as session:
            model(**inputs)
        want = session.cache.lengths()
        assert float(want.float().mean()) == session.cache.seen // 2
        cache = headkv.RaggedCache.for_model(model, ADA)
        model(**inputs, past_key_values=cache)
    assert torch.equal(cache.lengths(), want)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_inside_the_block(name: str) -> None:
    """compress(model), and only then the wrapper, which is what is called."""
    model, inputs = tiny_model("llama"), prompts(1)
    with headkv.compress(model, ADA) as session, torch.no_grad():
        wrapped = WRAPPERS[name](model)
        session._cache = None  # one wrapper calls the model while it is made
        wrapped(**inputs)
        assert float(session.cache.lengths().float().mean()) == session.cache.seen // 2
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["peft", "torch.compile"])
def test_drafts_chunks_and_own_caches(name: str) -> None:
    model, inputs = WRAPPERS[name](tiny_model("llama")), prompts(1)
    with headkv.compress(model, ADA) as session:
        want = model.generate(**inputs, **LENGTH)
        lengths = session.cache.lengths()
        for option in ({"prompt_lookup_num_tokens": 6}, {"prefill_chunk_size": 9}, {"past_key_values": None}):
            assert torch.equal(model.generate(**inputs, **LENGTH, **option), want), option
            assert torch.equal(session.cache.lengths(), lengths), option


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "FullyShardedDataParallel", "all at once"])
def test_distributed_wrappers(wrap: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    inputs = prompts(1)
    with group(), torch.no_grad():
        model = tiny_model("llama")
        if wrap == "all at once":
            model = compiled(nn.parallel.DistributedDataParallel(lora(model)))
        elif wrap == "DistributedDataParallel":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        with headkv.compress(model, ADA) as session:
            model(**inputs)
    assert float(session.cache.lengths().float().mean()) == 30


def test_our_pipeline_over_a_wrapper() -> None:
    """headkv.pipeline reads and answers with what it is given, adapters and all."""
    model, tokenizer = tiny_model("llama"), letters()
    answers = []
    for given in (lora(model), lora(tiny_model("llama")).merge_and_unload()):
        pipe = headkv.pipeline(given, tokenizer, device="cpu", max_new_tokens=6)
        answers.append(
            pipe("the quick brown fox jumps", question="who?", method=headkv.StreamingLLM(9))["answer"]
        )
    assert answers[0] == answers[1]


def test_profiles_look_inside() -> None:
    profile = HeadProfile(model="tiny", kind="gate", heads="kv", scores=torch.rand(4, 2))
    for wrap in (compiled, nn.DataParallel):
        with pytest.raises(ValueError, match="profile must fit the model, 3 layers"):
            profile.check_model(wrap(tiny_model("llama")))
        with pytest.raises(ValueError, match="profile must fit the model, 3 layers"):
            headkv.compress(wrap(tiny_model("llama")), headkv.DuoAttention(profile=profile))


class Mine(nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.language = model


def several(model: Any) -> Any:
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    return wrapped


def prefix_tuning(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    wrapped = peft.get_peft_model(
        model, peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    ).eval()
    with headkv.compress(wrapped, ADA):
        wrapped.generate(**prompts(1), **LENGTH)


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a wrapper nobody knows": (Mine, TypeError, "model must be a transformers model, got Mine; pass the one inside it, .language"),
    "copies on several devices": (several, ValueError, "DataParallel over 2 devices"),
    "no model": (lambda model: model.lm_head, TypeError, "model must be a transformers model, got Linear"),
    "keys and values that peft learned": (prefix_tuning, ValueError, "got a filled"),
}  # fmt: skip


@pytest.mark.parametrize("wrap, error, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(wrap: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        headkv.compress(wrap(tiny_model("llama")), ADA)


def test_a_graph_of_what_runs_inside() -> None:
    """`cuda_graph` speaks of the model inside: here of its device."""
    with pytest.raises(ValueError, match="a CUDA graph needs a model on one CUDA device, got one on cpu"):
        headkv.compress(compiled(tiny_model("llama")), ADA, cuda_graph=True)
    assert unwrapped(compiled(model := tiny_model("llama"))) is model


# -- models that are spread ---------------------------------------------------------------------------------------------

PARTS = [
    "model.embed_tokens",
    "model.rotary_emb",
    "model.norm",
    "lm_head",
    *(f"model.layers.{i}" for i in range(3)),
]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "drafts": {"prompt_lookup_num_tokens": 5},
    "chunks": {"prefill_chunk_size": 9},
}
MODEL = headkv.AdaKV(budget=20, scope="model")


def on_disk(model: Any, folder: Path) -> Any:
    """The last layer is read from a file for each call."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    places = dict.fromkeys(PARTS, "cpu") | {"model.layers.2": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def all_on_disk(model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def in_memory(model: Any, folder: Path) -> Any:
    """Weights are a copy that comes with each call; the model's own are on no device."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu")


def loaded(model: Any, folder: Path) -> Any:
    """As `from_pretrained` spreads it."""
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    model.save_pretrained(folder / "tiny")
    places = dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"}
    return (
        type(model).from_pretrained(folder / "tiny", device_map=places, offload_folder=folder / "off").eval()
    )


SPREAD = {
    "a layer on disk": on_disk,
    "all on disk": all_on_disk,
    "in memory": in_memory,
    "from_pretrained": loaded,
}


@pytest.mark.parametrize("name", ["FullCache", "AdaKV", "DuoAttention", "model"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", SPREAD)
def test_spread_models(spread: str, way: str, name: str, tmp_path: Path) -> None:
    """Tokens and what is stored are those of the model in one piece; batches are padded on the left."""
    method = {**METHODS, "model": MODEL}[name]
    if way == "drafts" and name == "model":
        pytest.skip("a method that decides once the prompt is read refuses drafts")
    inputs = prompts(1 if way == "drafts" else 3)
    whole = tiny_model("llama")
    with headkv.compress(whole, method) as session:
        want = whole.generate(**inputs, **LENGTH, **WAYS[way])
    lengths = session.cache.lengths()
    model = SPREAD[spread](tiny_model("llama"), tmp_path)
    if way == "drafts" and model.device.type == "meta":
        pytest.skip("transformers sends drafts to the model's own device, and this model has none")
    with headkv.compress(model, method) as session:
        got = model.generate(**inputs, **LENGTH, **WAYS[way])
    assert torch.equal(got, want)
    assert torch.equal(session.cache.lengths(), lengths)


def test_weights_that_are_on_disk(tmp_path: Path) -> None:
    """A method that looks at them is told that they are not there."""
    method = headkv.CriticalKV(20, scorer=SCORER)
    model = all_on_disk(tiny_model("llama"), tmp_path)
    message = "needs the output projection of the model's attention"
    with headkv.compress(model, method), pytest.raises(ValueError, match=message):
        model(**prompts(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_spread_families(family: str, tmp_path: Path) -> None:
    whole, inputs = tiny_model(family), prompts()
    with headkv.compress(whole, ADA):
        want = whole.generate(**inputs, **LENGTH)
    model = all_on_disk(tiny_model(family), tmp_path)
    with headkv.compress(model, ADA):
        assert torch.equal(model.generate(**inputs, **LENGTH), want)


def test_a_spread_model_without_our_cache(tmp_path: Path) -> None:
    """Its attention may stay "headkv": padding goes on to sdpa, wherever the layer is."""
    whole, inputs = tiny_model("llama"), prompts()
    want = whole.generate(**inputs, **LENGTH)
    model = on_disk(tiny_model("llama"), tmp_path)
    headkv.RaggedCache.for_model(model, ADA)
    assert torch.equal(model.generate(**inputs, **LENGTH), want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["FullCache", "AdaKV", "DuoAttention", "RazorAttention", "model"])
@pytest.mark.parametrize("way", WAYS)
def test_two_gpus(way: str, name: str) -> None:
    """Each layer's rows lie where the layer is."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; torch sees {torch.cuda.device_count()}")
    method = {**METHODS, "model": MODEL}[name]
    if way == "drafts" and name == "model":
        pytest.skip("a method that decides once the prompt is read refuses drafts")
    inputs = {key: x.cuda() for key, x in prompts(1 if way == "drafts" else 3).items()}
    whole = tiny_model("llama").cuda()
    with headkv.compress(whole, method) as session:
        want = whole.generate(**inputs, **LENGTH, **WAYS[way])
    lengths = session.cache.lengths()
    places = dict.fromkeys(PARTS, 0) | {"model.layers.1": 1, "model.norm": 1}
    model = accelerate.dispatch_model(tiny_model("llama"), places)
    with headkv.compress(model, method) as session:
        got = model.generate(**inputs, **LENGTH, **WAYS[way])
    assert torch.equal(got, want)
    assert torch.equal(session.cache.lengths(), lengths)
    assert [layer.filled().device.index for layer in session.cache.layers] == [0, 1, 0]
    assert int(torch.stack([layer.filled().length.sum().cpu() for layer in session.cache.layers]).min()) > 0
