"""Head profiles: their files, the published files that can be read, and the profilers on small models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headkv.heads import HeadProfile, read_duo_attention, read_headkv
from headkv.heads.induction import profile_repeats, repeat_shares
from headkv.heads.observe import Attention, observe
from headkv.models import FAMILIES, tiny_model
from headkv.models.tuned import TUNED_ID

ROOT = Path(__file__).resolve().parents[1]


def profile(heads: str = "query", **changes: object) -> HeadProfile:
    scores = torch.linspace(0.0, 1.0, 12).reshape(3, 4) / 3
    fields = {
        "model": "org/Name",
        "kind": "induction",
        "heads": heads,
        "scores": scores,
        "parameters": {"n": 3},
    }
    return HeadProfile(**{**fields, **changes})


def config(layers: int = 3, heads: int = 4, kv_heads: int = 2, name: str = "") -> SimpleNamespace:
    return SimpleNamespace(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, _name_or_path=name
    )


def test_a_saved_profile_is_loaded_to_the_bit(tmp_path: Path) -> None:
    before = profile(scores=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 1e-3)
    before.save(tmp_path / "heads.json")
    after = HeadProfile.load(tmp_path / "heads.json")
    assert torch.equal(before.scores, after.scores)
    assert dataclasses.replace(before, scores=after.scores).parameters == after.parameters
    assert (after.model, after.kind, after.heads) == ("org/Name", "induction", "query")
    assert [entry.name for entry in tmp_path.iterdir()] == ["heads.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "magic"}, "kind must be one of 'echo'"),
        ({"heads": "both"}, "heads must be one of 'query', 'kv', got 'both'"),
        ({"model": ""}, "model must be the model's id"),
        ({"scores": torch.zeros(3)}, r"scores must be \[layers, heads\], not empty, got shape \[3\]"),
        ({"scores": torch.zeros(0, 4)}, "not empty"),
        ({"scores": torch.tensor([[0.0, float("nan")]])}, "finite, got nan at layer 0, head 1"),
        ({"scores": torch.tensor([[0.0], [float("inf")]])}, "finite, got inf at layer 1, head 0"),
    ],
    ids=["kind", "heads", "model", "one-dimension", "empty", "nan", "infinite"],
)
def test_a_profile_checks_its_fields(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile(**changes)


@pytest.mark.parametrize("scores", [[[1.0]], torch.zeros(2, 2, dtype=torch.int64)], ids=["list", "ints"])
def test_scores_must_be_a_tensor_of_floats(scores: object) -> None:
    with pytest.raises(TypeError, match="scores must be a floating-point tensor"):
        profile(scores=scores)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[: len(text) // 2], "not a whole JSON file"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version must be 1, got 2"),
        (lambda text: text.replace("headkv-head-profile", "other"), "not a head profile"),
        (lambda text: "[1, 2]", "not a head profile"),
        (lambda text: text.replace('"kind": "induction"', '"kind": "x"'), "kind must be one of"),
        (lambda text: text.replace('  "kind": "induction",\n', ""), "kind missing"),
        (lambda text: text.replace("[0.0, ", "["), "rows of equal length"),
        (lambda text: text.replace("[0.0, ", "[NaN, "), "scores must be finite, got nan at layer 0, head 0"),
        (lambda text: text.replace("[0.0, ", '["a", '), "rows of equal length of numbers"),
        (
            lambda text: text.replace('"parameters": {\n    "n": 3\n  }', '"parameters": 3'),
            "parameters must be an",
        ),
        (lambda text: text.replace('"n": 3', '"n": 1e999'), "parameters must be plain JSON values"),
        (lambda text: text.replace("[0.0, ", f"[{10**400}, "), "rows of equal length of numbers"),
        (lambda text: "[" * 99_999, "not a whole JSON file"),
    ],
    ids=[
        "truncated",
        "version",
        "format",
        "array",
        "kind",
        "missing",
        "ragged",
        "nan",
        "word",
        "parameters",
        "infinite",
        "huge",
        "deep",
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, edit: object, message: str) -> None:
    path = tmp_path / "heads.json"
    profile().save(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=message) as caught:
        HeadProfile.load(path)
    assert str(path) in str(caught.value)


def test_kv_scores_reduce_the_group() -> None:
    made = profile(scores=torch.tensor([[0.1, 0.5, 0.2, 0.2]]))
    torch.testing.assert_close(made.kv_scores(2), torch.tensor([[0.5, 0.2]]))
    torch.testing.assert_close(made.kv_scores(2, "sum"), torch.tensor([[0.6, 0.4]]))
    torch.testing.assert_close(made.kv_scores(2, "mean"), torch.tensor([[0.3, 0.2]]))
    torch.testing.assert_close(made.kv_scores(1), torch.tensor([[0.5]]))
    assert torch.equal(profile("kv").kv_scores(4), profile("kv").scores)


@pytest.mark.parametrize(
    ("heads", "number", "reduce", "message"),
    [
        ("query", 3, "max", "num_kv_heads must be a divisor of 4 for this profile, got 3"),
        ("query", 0, "max", "num_kv_heads must be a divisor of 4"),
        ("kv", 2, "max", "num_kv_heads must be 4 for this profile, got 2"),
        ("query", 2, "median", "reduce must be"),
    ],
    ids=["no-divisor", "zero", "kv-profile", "reduce"],
)
def test_kv_scores_check_their_arguments(heads: str, number: int, reduce: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile(heads).kv_scores(number, reduce)


@pytest.mark.parametrize(
    ("heads", "model", "message"),
    [
        ("query", config(), None),
        ("query", config(name="elsewhere/name"), None),
        ("query", SimpleNamespace(config=config()), None),
        ("kv", config(heads=8, kv_heads=4), None),
        ("query", config(layers=4), "4 layers of 4 query heads, got one of org/Name with 3 layers of 4"),
        ("query", config(heads=8), "3 layers of 8 query heads"),
        ("kv", config(), "3 layers of 2 kv heads"),
        ("query", config(name="org/Other"), r"profile.renamed\('org/Other'\)"),
    ],
    ids=["fits", "same-name", "model", "kv-fits", "layers", "heads", "kv-heads", "other-name"],
)
def test_a_profile_knows_its_model(heads: str, model: object, message: str | None) -> None:
    if message is None:
        profile(heads).check_model(model)
    else:
        with pytest.raises(ValueError, match=message):
            profile(heads).check_model(model)
        if "renamed" in message:
            profile(heads).renamed("org/Other").check_model(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_profile_fits_a_transformers_model(family: str) -> None:
    profile().check_model(tiny_model(family))
    with pytest.raises(ValueError, match="3 layers of 2 kv heads"):
        profile("kv").check_model(tiny_model(family))


@pytest.mark.parametrize(
    "kind", ["echo", "induction", "retrieval", "gate", "gate-published", "ablation", "reconstruction"]
)
def test_shipped_profiles_are_of_smollm2(kind: str) -> None:
    shipped = HeadProfile.builtin(f"smollm2-{kind}")
    assert shipped.kind == kind.removesuffix("-published")
    shipped.check_model(config(30, 9, 3, "HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert shipped.scores.min() >= 0
    learned = kind.startswith(("gate", "ablation", "reconstruction"))
    assert shipped.heads == ("kv" if learned else "query")
    share = shipped.scores.flatten().topk(14).values.sum() / shipped.scores.sum()
    assert share > (0.3 if learned else 0.75)  # a few heads hold most of it


def test_the_tuned_model_has_every_profile_that_the_plain_one_has() -> None:
    names = {path.stem.removeprefix("smollm2-") for path in (ROOT / "headkv/heads/data").glob("*.json")}
    kinds = {name for name in names if not name.startswith("tuned-")}
    assert names - kinds == {f"tuned-{kind}" for kind in kinds}
    for kind in kinds:
        plain, tuned = (HeadProfile.builtin(f"smollm2-{name}") for name in (kind, f"tuned-{kind}"))
        assert (tuned.kind, tuned.heads) == (plain.kind, plain.heads)
        assert tuned.model == TUNED_ID and not torch.equal(tuned.scores, plain.scores)


@pytest.mark.parametrize(
    "name",
    ["HuggingFaceTB/SmolLM2-135M-Instruct", str(Path.home() / "smollm2-135m-instruct")],
    ids=["on-the-hub", "in-a-folder"],
)
@pytest.mark.parametrize(
    "kind", [*["echo", "induction", "retrieval", "retrieval-reasoning", "gate", "ablation", "reconstruction"]]
)
def test_the_profile_of_a_model_is_found_by_its_name(kind: str, name: str) -> None:
    found = HeadProfile.for_model(config(30, 9, 3, name), kind)
    assert torch.equal(found.scores, HeadProfile.builtin(f"smollm2-{kind}").scores) and found.kind == kind


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (config(30, 9, 3, "org/Other"), "gate", "shipped profile of kind 'gate', got 'org/Other'. Shipped: .*gate.* of HuggingFaceTB/SmolLM2.*HeadProfile.measure[(]model, tokenizer, 'gate'[)] measures one.*headkv profile --kind gate --model org/Other --out FILE"),
        (config(30, 9, 3), "echo", "got 'SimpleNamespace'.*--kind echo --model NAME --out FILE"),
        (tiny_model("llama"), "echo", "got 'LlamaForCausalLM'"),
        (config(30, 9, 3, "SmolLM2-135M-Instruct"), "magic", "kind must be one of 'echo', .* got 'magic'"),
        (config(12, 9, 3, "SmolLM2-135M-Instruct"), "echo", "profile must fit the model, 12 layers of 9 query heads"),
    ],
    ids=["another", "no-name", "tiny", "kind", "shape"],
)  # fmt: skip
def test_a_model_without_a_profile_is_named(model: object, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadProfile.for_model(model, kind)


@pytest.mark.parametrize("kind", ["echo", "induction"])
def test_a_profile_measures_itself(kind: str) -> None:
    model = tiny_model("llama")
    made = HeadProfile.measure(model, None, kind, num_tokens=16, repeats=3, seeds=(4,))
    wanted = dict(
        zip(("echo", "induction"), profile_repeats(model, num_tokens=16, repeats=3, seeds=(4,)), strict=True)
    )
    assert made.kind == kind and torch.equal(made.scores, wanted[kind].scores)
    assert made.parameters == wanted[kind].parameters and made.model == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("magic", {}, ValueError, "kind must be one of 'echo'"),
        ("echo", {"steps": 3}, TypeError, "options of kind 'echo' must be of num_tokens, repeats, seeds, got steps"),
        ("retrieval", {"reasoning": True}, TypeError, "options of kind 'retrieval' must be of lengths, depths, got reasoning"),
        ("gate", {"steps": True}, TypeError, "steps must be an int of at least 1, got True"),
        ("gate", {"lengths": (400.0, 500)}, TypeError, "lengths must be an int of at least 1, got 400.0"),
        ("echo", {"num_tokens": 16.0}, TypeError, r"num_tokens must be an int in \[2, 97\], got 16.0"),
        ("echo", {"num_tokens": 16, "seeds": ["1"]}, TypeError, "seeds must be an int of at least 0, got '1'"),
    ],
    ids=["kind", "option", "kinds-own", "bool", "float-length", "float", "word"],
)  # fmt: skip
def test_measuring_checks_its_arguments(
    kind: str, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HeadProfile.measure(tiny_model("llama"), None, kind, **options)


def test_a_profile_is_one_line() -> None:
    assert repr(profile()) == "HeadProfile(induction of Name: 3 x 4 query heads, scores 0 to 0.333)"
    assert (
        repr(profile("kv", model="C:\\models\\Name"))
        == "HeadProfile(induction of Name: 3 x 4 KV heads, scores 0 to 0.333)"
    )


def test_an_unknown_builtin_lists_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="name must be one of .*smollm2-induction.*, got 'nope'"):
        HeadProfile.builtin("nope")


def test_duo_attention_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.25\n0.0\t0.5\n1e-2\t1.0\n")
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256, "lr": 0.02}))
    gates = read_duo_attention(tmp_path, model="org/Name")
    assert (gates.kind, gates.heads) == ("gate", "kv")
    torch.testing.assert_close(gates.scores, torch.tensor([[1.0, 0.25], [0.0, 0.5], [0.01, 1.0]]))
    assert gates.parameters == {"source": "DuoAttention", "sinks": 128, "recent": 256}
    alone = read_duo_attention(tmp_path / "full_attention_heads.tsv", model="org/Name")
    assert torch.equal(alone.scores, gates.scores)


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ("1.0\t0.5\n0.5\n", None, "line 2: expected 2 gates, got 1"),
        ("1.0\tx\n", None, "line 1: expected numbers"),
        ("\n", None, "empty file"),
        ("1.0\tnan\n", None, "finite, got nan"),
        ("1.0\n", '{"sink_size": 4}', "sink_size and recent_size"),
        ("1.0\n", '{"sink_size": 4, "recent_size": -1}', "recent must be an int of at least 0, got -1"),
        ("1.0\n", "{", "sink_size and recent_size"),
    ],
    ids=["ragged", "word", "empty", "nan", "missing-setting", "negative-setting", "truncated-setting"],
)
def test_bad_duo_attention_files(tmp_path: Path, table: str, settings: str | None, message: str) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text(table)
    if settings is not None:
        (tmp_path / "config.json").write_text(settings)
    with pytest.raises(ValueError, match=message):
        read_duo_attention(tmp_path, model="org/Name")


def headkv_file(path: Path, **changes: object) -> Path:
    # In an order that is not that of the heads: only the keys may decide.
    data = {f"{layer}-{head}": [layer / 10, head / 10] for head in (2, 0, 1) for layer in (1, 0)}
    path.write_text(
        json.dumps({key: value for key, value in {**data, **changes}.items() if value is not None})
    )
    return path


def test_headkv_files_are_read_by_key(tmp_path: Path) -> None:
    read = read_headkv(headkv_file(tmp_path / "heads.json"), model="org/Name", num_layers=2, num_heads=3)
    assert (read.kind, read.heads, read.parameters["samples"]) == ("retrieval", "query", 2)
    torch.testing.assert_close(read.scores, torch.tensor([[0.0, 0.05, 0.1], [0.05, 0.1, 0.15]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1-2": None}, "1 are missing, such as '1-2'"),
        ({"2-0": [1.0]}, "other keys such as '2-0'"),
        ({"0-0": []}, "'0-0' must be a list of numbers, not empty"),
        ({"0-0": [True]}, "'0-0' must be a list of numbers"),
        ({"0-0": "x"}, "'0-0' must be a list of numbers"),
        ({"0-0": [0.1]}, "as many values"),
        ({"0-0": [float("nan"), 1.0]}, "finite"),
    ],
    ids=["missing", "unknown", "empty", "bool", "word", "uneven", "nan"],
)
def test_bad_headkv_files(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = headkv_file(tmp_path / "heads.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_headkv(path, model="org/Name", num_layers=2, num_heads=3)


@pytest.mark.parametrize("content", ['{"0-0": [1', "[1]"], ids=["truncated", "array"])
def test_a_headkv_file_must_be_an_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "heads.json").write_text(content)
    with pytest.raises(ValueError, match="heads.json"):
        read_headkv(tmp_path / "heads.json", model="org/Name", num_layers=1, num_heads=1)


def attention(period: int, repeats: int, offset: int, start: int = 0) -> Attention:
    """Two query heads on one KV head: the first looks at entry i - period + offset alone, the second at all."""
    total = start + period * repeats
    keys = torch.eye(total)[None, None]
    queries = torch.zeros(1, 2, total, total)
    for at in range(start + period, total):
        queries[0, 0, at, at - period + offset] = 100.0
    return Attention(0, queries, keys, 1.0, None, None)


@pytest.mark.parametrize("start", [0, 1], ids=["bare", "bos"])
@pytest.mark.parametrize("offset", [0, 1], ids=["echo", "induction"])
def test_hand_made_heads_score_one_and_zero(offset: int, start: int) -> None:
    shares = repeat_shares(attention(5, 3, offset, start), 5, start)
    assert shares[offset, 0].item() == pytest.approx(1.0)
    assert shares[1 - offset, 0].item() == pytest.approx(0.0)
    # The uniform head: of i + 1 entries, i // period (without the start) are earlier occurrences.
    rows = torch.arange(start + 5, start + 15, dtype=torch.float32)
    uniform = (torch.div(rows - start, 5, rounding_mode="floor") / (rows + 1)).mean()
    assert shares[0, 1].item() == pytest.approx(uniform.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_equal_those_of_eager_attention(family: str) -> None:
    model = tiny_model(family)
    period, total = 7, 28
    before = model.config._attn_implementation
    echo, induction = profile_repeats(model, num_tokens=period, repeats=4, seeds=[3])
    assert model.config._attn_implementation == before
    text = torch.randperm(97, generator=torch.Generator().manual_seed(3))[:period].repeat(4)
    model.set_attn_implementation("eager")
    weights = torch.stack(model(text[None], output_attentions=True).attentions)[:, 0]  # [layers, HQ, n, n]
    earlier = torch.zeros(2, total, total)
    for at in range(period, total):
        for back in range(period, at + 1, period):
            earlier[0, at, at - back] = earlier[1, at, at - back + 1] = 1
    expected = (weights[:, None] * earlier[:, None]).sum((-1, -2)) / (total - period)  # [layers, 2, HQ]
    torch.testing.assert_close(
        torch.stack([echo.scores, induction.scores], dim=1), expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 1}, r"num_tokens must be an int in \[2, 97\], got 1"),
        ({"num_tokens": 98}, r"num_tokens must be an int in \[2, 97\], got 98"),
        ({"num_tokens": 50, "repeats": 1}, "repeats must be an int of at least 2, got 1"),
        ({"num_tokens": 50, "repeats": 11}, r"repeats must be an int in \[2, 10\] .* got 11"),
        ({"num_tokens": 50, "seeds": []}, "seeds must hold at least one"),
    ],
    ids=["short", "vocabulary", "once", "too-long", "no-seeds"],
)
def test_the_echo_profiler_checks_its_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_repeats(tiny_model("llama"), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_changes_nothing_and_ends_also_after_an_error(family: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model(family)
    text = torch.arange(3, 30)[None]
    before, names = model.config._attn_implementation, set(ALL_ATTENTION_FUNCTIONS)
    expected = model(text).logits
    seen: list[int] = []
    with observe(model, lambda attention: seen.append(attention.layer_idx)):
        watched = model(text).logits
    assert torch.equal(watched, expected) and seen == [0, 1, 2]

    def fail(attention: Attention) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observe(model, fail):
        model(text)
    assert model.config._attn_implementation == before and set(ALL_ATTENTION_FUNCTIONS) == names
    assert torch.equal(model(text).logits, expected)
