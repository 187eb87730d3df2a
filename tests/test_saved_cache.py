"""A compressed context as a file: all of it comes back, to the bit, or an error names the file and what is wrong."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_cases import METHODS, prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import headkv
from headkv._files import replacing
from headkv.cache import RaggedLayer, files
from headkv.heads import HeadProfile
from headkv.models.tiny import tiny_model

LENGTH: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read(model: Any, method: Any, batch: int = 3, **options: Any) -> headkv.RaggedCache:
    """A cache that has read a prompt, padded on the left, and written an answer to it."""
    cache = headkv.RaggedCache.for_model(model, method, **options)
    model.generate(**prompts(batch), past_key_values=cache, **LENGTH)
    return cache


def steps(model: Any, cache: Any, tokens: int = 3, number: int = 4) -> torch.Tensor:
    """The logits of some chunks and single tokens behind what a cache holds; the last chunk is padded."""
    ids = torch.randint(3, 97, (3, tokens), generator=torch.Generator().manual_seed(3))
    ids = ids[: cache.lengths().shape[1]]
    out = [model(ids, past_key_values=cache).logits]
    out += [model(ids[:, :1] + i, past_key_values=cache).logits for i in range(number)]
    mask = torch.ones(len(ids), cache.seen + tokens, dtype=torch.int64)
    mask[-1, cache.seen : cache.seen + 2] = 0
    return torch.cat([*out, model(ids, attention_mask=mask, past_key_values=cache).logits], 1)


def equal(one: headkv.RaggedCache, other: headkv.RaggedCache) -> bool:
    """The same contents, head room apart."""
    for a, b in zip(one.layers, other.layers, strict=True):
        x, y = a.filled(), b.filled()
        rows = [(batch, head) for batch in range(x.batch_size) for head in range(x.num_kv_heads)]
        names = [name for name, _ in x.tensors() if name not in {"keys", "values", "positions", "start"}]
        same = (
            names
            == [name for name, _ in y.tensors() if name not in {"keys", "values", "positions", "start"}],
            all(torch.equal(getattr(x, name), getattr(y, name)) for name in names),
            all(torch.equal(p, q) for r in rows for p, q in zip(x.row(*r), y.row(*r), strict=True)),
            (x.seen, x.rollback, x.dtype) == (y.seen, y.rollback, y.dtype),
        )
        if not all(same):
            return False
    return True


@pytest.mark.parametrize("family, backend", [("llama", "rust"), ("gemma2", "rust"), ("gemma2", "reference")])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_answers_to_the_bit(tmp_path: Path, method: str, family: str, backend: Any) -> None:
    """Gemma 2 has sliding layers. Enough is written for windows to be trimmed again."""
    model = tiny_model(family)
    cache = read(model, METHODS[method], backend=backend, rollback=2, headroom=3)
    cache.save(tmp_path / "cache")
    loaded = headkv.RaggedCache.load(tmp_path / "cache", model, backend=backend)
    assert equal(loaded, cache) and loaded.seen == 64
    assert torch.equal(steps(model, loaded), steps(model, cache))
    assert equal(loaded, cache)


def reordered(model: Any, cache: Any) -> None:
    cache.reorder_cache(torch.tensor([2, 0, 2]))


def cropped(model: Any, cache: Any) -> None:
    cache.crop(-3)


def second_turn(model: Any, cache: Any) -> None:
    steps(model, cache)


def beams(model: Any, cache: Any) -> None:
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("happens", [reordered, cropped, second_turn, beams])
def test_whatever_happened_before(tmp_path: Path, happens: Callable[..., None], dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    cache = read(model, METHODS["RazorAttention"], rollback=9)
    happens(model, cache)
    cache.save(tmp_path / "cache")
    loaded = headkv.RaggedCache.load(tmp_path / "cache", model)
    assert torch.equal(steps(model, loaded), steps(model, cache))


def test_the_cache_of_a_block_is_saved_and_loaded_into_another(tmp_path: Path) -> None:
    """The text goes on by `generate`, with drafts, too; a loaded cache takes another prompt once it knows a method."""
    model, inputs = tiny_model("llama"), prompts(1)
    with headkv.compress(model, METHODS["AdaKV"]) as session:
        first = model.generate(**inputs, **LENGTH)
        session.cache.save(tmp_path / "cache")
        kept = copy.deepcopy(session.cache)
        text = torch.cat([first, inputs["input_ids"][:, :9]], 1)
        want = model.generate(text, past_key_values=kept, **LENGTH)
    kept.save(tmp_path / "copy")  # a copy knows its model, too
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = headkv.RaggedCache.load(tmp_path / "cache", model, METHODS["AdaKV"])
        with headkv.compress(model, METHODS["SnapKV"]):
            assert torch.equal(model.generate(text, past_key_values=cache, **LENGTH, **options), want)
    cache.reset()
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **LENGTH), first)


PROCESS = """
import sys
import headkv
from headkv.models.tiny import tiny_model
from test_saved_cache import answered

model = tiny_model("gemma2")
print(answered(model, headkv.RaggedCache.load(sys.argv[1], model)))
"""


def answered(model: Any, cache: Any) -> str:
    """Tokens, and a sum of the bits of their logits."""
    inputs = prompts()
    text = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -7:]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 7, dtype=torch.int64)], 1)
    wanted = {**LENGTH, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(text, attention_mask=mask, past_key_values=cache, **wanted)
    return f"{out.sequences.tolist()} {torch.stack(out.logits).view(torch.int32).sum().item()}"


@pytest.mark.slow
def test_what_one_process_read_another_answers_from(tmp_path: Path, repository: Path) -> None:
    model = tiny_model("gemma2")
    cache = headkv.RaggedCache.for_model(model, METHODS["RazorAttention"])
    model(**prompts(), past_key_values=cache)
    cache.save(tmp_path / "cache")
    places = os.pathsep.join([str(repository), str(repository / "tests"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path / "cache")],
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == answered(model, cache)


def test_a_file_holds_what_is_stored_and_nothing_else(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = read(model, METHODS["SnapKV"], headroom=1000)
    cache.save(tmp_path / "cache")
    entries = int(cache.lengths().sum())
    assert entries * (2 * 16 * 4 + 4) <= (tmp_path / "cache").stat().st_size < cache.nbytes / 10
    with safe_open(tmp_path / "cache", "pt") as file:
        assert sum(file.get_tensor(f"{i}.keys").shape[0] for i in range(3)) == entries


# -- what is refused ------------------------------------------------------------------------------------------------


def waiting(model: Any) -> Any:
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"], chunked_prefill=True)
    model(**prompts(), past_key_values=cache)
    return cache


def failed(model: Any) -> Any:
    cache = read(model, METHODS["AdaKV"])
    cache.layers[0].filled().append(*[torch.zeros(3, 2, 1, 16)] * 2)
    return cache


UNSAVED = {
    "empty": (lambda model: headkv.RaggedCache.for_model(model, METHODS["AdaKV"]), "the cache is empty"),
    "waiting": (waiting, "cannot save during a chunked prefill"),
    "half a call": (failed, "an earlier forward call failed on its way"),
}


@pytest.mark.parametrize("make, message", UNSAVED.values(), ids=UNSAVED.keys())
def test_what_can_not_be_saved(tmp_path: Path, make: Callable[..., Any], message: str) -> None:
    cache = make(tiny_model("llama"))
    with pytest.raises(RuntimeError, match=message):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_a_cache_that_does_not_know_its_model_is_not_saved(tmp_path: Path) -> None:
    pickled = pickle.loads(pickle.dumps(read(tiny_model("llama"), METHODS["AdaKV"])))
    with pytest.raises(RuntimeError, match="cannot save a cache whose model is gone, or that was pickled"):
        pickled.save(tmp_path / "cache")


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "cache"
    read(tiny_model("llama"), METHODS["RazorAttention"]).save(path)
    return path


THETA = {"rope_type": "default", "rope_theta": 1234.0}
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "another family": (lambda: tiny_model("qwen3"), "type llama, got qwen3"),
    "other weights": (lambda: tiny_model("llama", seed=1), "has other weights"),
    "another dtype": (lambda: tiny_model("llama").bfloat16(), "dtype float32, got bfloat16"),
    "fewer layers": (lambda: tiny_model("llama", num_hidden_layers=2), "layers 3, got 2"),
    "other heads": (lambda: tiny_model("llama", num_key_value_heads=4), "KV heads 2, got 4"),
    "another head dim": (lambda: tiny_model("llama", head_dim=32), "head dim 16, got 32"),
    "other angles": (lambda: tiny_model("llama", rope_parameters=THETA), "rotary embedding .* got .*1234.0"),
}  # fmt: skip


@pytest.mark.parametrize("make, message", MODELS.values(), ids=MODELS.keys())
def test_another_model_is_refused(saved: Path, make: Callable[[], Any], message: str) -> None:
    model = make()
    former = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"{saved}.*{message}"):
        headkv.RaggedCache.load(saved, model)
    assert model.config._attn_implementation == former and not model._forward_pre_hooks


def test_one_weight_of_many_is_seen(saved: Path) -> None:
    """A fine-tuned model has the shape of the one that it was made from."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight *= 1.001
    with pytest.raises(ValueError, match="has other weights"):
        headkv.RaggedCache.load(saved, model)


def rewritten(path: Path, saved: Path, header: dict[str, str], **tensors: torch.Tensor) -> None:
    """The saved file with other words in its header, and other tensors."""
    with safe_open(saved, "pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        save_file({**old, **tensors}, path, metadata={**file.metadata(), **header})


def test_a_file_that_does_not_say_whose_its_parts_are_has_whole_layers(tmp_path: Path, saved: Path) -> None:
    """As the first files were."""
    path, model = tmp_path / "first", tiny_model("llama")
    with safe_open(saved, "pt") as file:
        about = json.loads(file.metadata()["about"])
    for facts in about["layers"]:
        assert facts.pop("layer") is not None and facts.pop("heads") == [0, 1]
    text = json.dumps(about)
    rewritten(path, saved, {"about": text, "sha256": files._of_text(text)})
    first, now = (headkv.RaggedCache.load(x, model) for x in (path, saved))
    for old, new in zip(first.layers, now.layers, strict=True):
        for b, h in itertools.product(range(3), range(2)):
            assert all(map(torch.equal, old.row(b, h), new.row(b, h)))


def forged(path: Path, saved: Path, name: str, tensor: torch.Tensor) -> None:
    """A file whose checksums are right though it makes no sense."""
    with safe_open(saved, "pt") as file:
        about = json.loads(file.metadata()["about"])
        layer = {n.removeprefix("0."): file.get_tensor(n) for n in file.keys() if n.startswith("0.")}  # noqa: SIM118
    about["layers"][0]["sha256"] = files._digest({**layer, name: tensor})
    text = json.dumps(about)
    rewritten(path, saved, {"about": text, "sha256": files._of_text(text)}, **{f"0.{name}": tensor})


FILES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "empty": (lambda path, saved: path.write_bytes(b""), "can not be read as a whole safetensors file"),
    "truncated": (lambda path, saved: path.write_bytes(saved.read_bytes()[:-1]), "can not be read as a whole safetensors file"),
    "text": (lambda path, saved: path.write_text("a letter " * 99), "can not be read as a whole safetensors file"),
    "a folder": (lambda path, saved: path.mkdir(), "can not be read as a whole safetensors file"),
    "other safetensors": (lambda path, saved: save_file({"x": torch.ones(2)}, path), "not a cache of headkv"),
    "newer": (lambda path, saved: rewritten(path, saved, {"version": "2"}), "version must be 1, got '2' of a newer headkv"),
    "other words": (lambda path, saved: rewritten(path, saved, {"about": "{}"}), "damaged: what its header says"),
    "another value": (lambda path, saved: rewritten(path, saved, {}, **{"1.keys": torch.zeros(3, 16)}), "damaged: layer 1"),
    "lengths past the end": (lambda path, saved: forged(path, saved, "length", torch.full((6,), 99)), "layer 0 must be made of rows that lie within it"),
    "no lengths": (lambda path, saved: forged(path, saved, "length", torch.full((6, 1), 9.0)), "layer 0 must hold"),
    "too little room": (lambda path, saved: forged(path, saved, "capacity", torch.zeros(6).long()), "layer 0 must be made of rows"),
}  # fmt: skip


@pytest.mark.parametrize("make, message", FILES.values(), ids=FILES.keys())
def test_a_bad_file_is_refused_by_name(
    tmp_path: Path, saved: Path, make: Callable[[Path, Path], Any], message: str
) -> None:
    path = tmp_path / "bad"
    make(path, saved)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        headkv.RaggedCache.load(path, tiny_model("llama"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no file of a cache at {tmp_path / 'none'}"):
        headkv.RaggedCache.load(tmp_path / "none", tiny_model("llama"))


def test_another_prompt_needs_a_method(saved: Path) -> None:
    model = tiny_model("llama")
    cache = headkv.RaggedCache.load(saved, model)
    cache.reset()
    with pytest.raises(RuntimeError, match="holds no method for another prompt"):
        model(**prompts(), past_key_values=cache)
    with pytest.raises(TypeError, match="method must be a headkv method"):
        headkv.RaggedCache.load(saved, model, 0.2)  # type: ignore[arg-type]


# -- written at once, and read whatever it is -----------------------------------------------------------------------


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "new"


def test_a_loaded_cache_keeps_nothing_of_its_file(tmp_path: Path) -> None:
    """Another program may write over it."""
    model = tiny_model("llama")
    cache = read(model, METHODS["RazorAttention"])
    cache.save(tmp_path / "cache")
    loaded = headkv.RaggedCache.load(tmp_path / "cache", model)
    size = (tmp_path / "cache").stat().st_size
    with open(tmp_path / "cache", "r+b") as file:
        file.write(b"\0" * size)
    assert equal(loaded, cache)


def damage(data: st.DataObject, whole: bytes) -> bytes:
    """Some bytes changed, and perhaps the end cut off; half of the changes are near the beginning."""
    cut = data.draw(st.integers(0, len(whole))) if data.draw(st.booleans()) else len(whole)
    damaged = bytearray(whole[:cut])
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        span = min(len(damaged), data.draw(st.sampled_from([16, 2048, len(whole)])))
        damaged[data.draw(st.integers(0, span - 1))] ^= data.draw(st.integers(1, 255))
    return bytes(damaged)


@FUZZ
@given(data=st.data())
def test_a_damaged_cache_is_refused_or_read_as_it_was(
    tmp_path: Path, saved: Path, llama: Any, data: st.DataObject
) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(damage(data, saved.read_bytes()))
    try:
        loaded = headkv.RaggedCache.load(path, llama)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert equal(loaded, headkv.RaggedCache.load(saved, llama))


@FUZZ
@given(data=st.data())
def test_a_damaged_profile_is_refused_or_is_one(tmp_path: Path, data: st.DataObject) -> None:
    """A digit of a score may become another one; what is read is a whole profile nonetheless."""
    scores = torch.arange(6.0).view(3, 2) / 7
    HeadProfile("tiny", "gate", "kv", scores, {"steps": 7, "of": [1.5, None]}).save(tmp_path / "profile")
    path = tmp_path / "damaged"
    path.write_bytes(damage(data, (tmp_path / "profile").read_bytes()))
    try:
        profile = HeadProfile.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert profile.scores.isfinite().all() and profile.scores.ndim == 2
        profile.save(tmp_path / "again")
        assert torch.equal(HeadProfile.load(tmp_path / "again").scores, profile.scores)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(
    name=st.sampled_from(["format", "version", "model", "kind", "heads", "parameters", "scores"]), value=JSON
)
def test_any_value_in_a_profile_is_refused_or_serves(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "profile"
    HeadProfile("tiny", "gate", "kv", torch.rand(3, 2)).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    try:
        profile = HeadProfile.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        profile.save(tmp_path / "again")
        assert torch.equal(HeadProfile.load(tmp_path / "again").scores, profile.scores)


@pytest.mark.parametrize("seed", range(3))
def test_layers_alone(tmp_path: Path, seed: int) -> None:
    """Of different heads, rows and widths in one file, on no model."""
    source = torch.Generator().manual_seed(seed)
    layers = []
    for batch, heads, dim in ((1, 1, 1), (2, 3, 8), (1, 5, 128)):
        rows = [
            [
                tuple(torch.randn(2, int(torch.randint(0, 9, (), generator=source)), dim, generator=source))
                for _ in range(heads)
            ]
            for _ in range(batch)
        ]
        layers.append(RaggedLayer.from_rows(rows, sinks=1, recent=2, headroom=seed))
    beside = {"0.state": torch.randn(2, 3, generator=source), "flags": torch.arange(seed).bool()}
    files.write(tmp_path / "layers", layers, {"of": "nothing"}, beside)
    said: list[Any] = []
    read, others = files.read(tmp_path / "layers", said.append, [torch.device("cpu")] * 3)
    assert beside.keys() == others.keys() and all(torch.equal(others[name], x) for name, x in beside.items())
    for got, want in zip(read, layers, strict=True):
        assert all(
            torch.equal(getattr(got, name), tensor)
            for name, tensor in want.tensors()
            if name in ("length", "capacity", "sinks", "recent")
        )
        for b in range(want.batch_size):
            assert all(
                torch.equal(x, y)
                for h in range(want.num_kv_heads)
                for x, y in zip(got.row(b, h), want.row(b, h), strict=True)
            )
    assert said[0]["of"] == "nothing"
