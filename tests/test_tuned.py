"""Low-rank weights: merged as they should be, refused when broken, made by the command that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tune
from torch import nn

from headkv.data.tasks import Task, own_prose
from headkv.data.words import Words
from headkv.models import load_smollm2, smollm2, tiny_model, tuned
from headkv.models.tuned import add_low_rank, linear_layers, read_low_rank, save_low_rank, tuned_weights

BASE = "somebody/tiny"


@pytest.fixture
def tiny():
    model = tiny_model("llama")
    model.config._name_or_path = BASE
    return model


def factors(model, rank: int = 4, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, layer.in_features, generator=made), torch.randn(layer.out_features, rank, generator=made))
        for name, layer in linear_layers(model).items()
    }  # fmt: skip


def test_linear_layers_are_those_of_the_decoder_alone(tiny) -> None:
    names = linear_layers(tiny)
    kinds = {name.rpartition(".")[2] for name in names}
    assert len(names) == 3 * 7 and "lm_head" not in names
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_added_to_every_linear_layer(tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny.to(dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    given = factors(model)
    save_low_rank(tmp_path / "w.safetensors", given, {"base": BASE, "steps": 7})
    assert add_low_rank(model, tmp_path / "w.safetensors") == {"base": BASE, "steps": 7}
    for name, weight in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer not in given:
            assert torch.equal(weight, before[name])
            continue
        down, up = given[layer]
        # Each rank is stored in 8 bits: half a step of the greatest value, for both factors.
        room = (up.abs() @ down.abs().amax(1, keepdim=True) + up.abs().amax(0) @ down.abs()) / 254
        room = room + (before[name].float() + up @ down).abs() * torch.finfo(dtype).eps + 1e-3
        assert ((weight.float() - (before[name].float() + up @ down)).abs() <= room).all()
        assert not torch.equal(weight, before[name]) and weight.dtype == dtype


def test_what_is_read_is_what_was_written_to_eight_bits(tiny, tmp_path: Path) -> None:
    given = factors(tiny)
    save_low_rank(tmp_path / "w.safetensors", given, {"base": BASE})
    read, _ = read_low_rank(tmp_path / "w.safetensors")
    assert read.keys() == given.keys()
    for name, (down, up) in given.items():
        assert ((read[name][0] - down).abs() <= down.abs().amax(1, keepdim=True) / 253).all()
        assert ((read[name][1] - up).abs() <= up.abs().amax(0) / 253).all()


def truncated(path: Path, model) -> None:
    save_low_rank(path, factors(model), {"base": BASE})
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path: Path, model) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, path)


def half(path: Path, model) -> None:
    from safetensors.torch import save_file

    save_file({"x.A": torch.zeros(2, 2)}, path, metadata={"format": tuned._FORMAT, "about": "{}"})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (truncated, ValueError, "w.safetensors is not a whole safetensors file"),
        (lambda path, model: path.write_text("no weights"), ValueError, "is not a whole safetensors file"),
        (foreign, ValueError, "w.safetensors must be a file of headkv low-rank weights, version 1, got None"),
        (half, ValueError, "must hold A, A_scale, B, B_scale of every layer; x has no A_scale"),
        (
            lambda path, model: None,
            FileNotFoundError,
            "there is no file of low-rank weights at .*w.safetensors",
        ),
        (
            lambda path, model: save_low_rank(path, factors(model), {"base": "another/model"}),
            ValueError,
            "holds weights for another/model, got the model somebody/tiny",
        ),
        (
            lambda path, model: save_low_rank(
                path, factors(tiny_model("llama", hidden_size=32)), {"base": BASE}
            ),
            ValueError,
            r"must hold the linear layers of the model, each \[out, in\]: model.layers.0.mlp.down_proj is \(32, ",
        ),
        (
            lambda path, model: save_low_rank(path, dict(list(factors(model).items())[1:]), {"base": BASE}),
            ValueError,
            "q_proj is None in the file and",
        ),
    ],
    ids=["truncated", "text", "foreign", "half", "none", "base", "shape", "missing"],
)
def test_a_wrong_file_is_refused_and_changes_nothing(
    make, error: type[Exception], message: str, tiny, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in tiny.named_parameters()}
    make(tmp_path / "w.safetensors", tiny)
    with pytest.raises(error, match=message):
        add_low_rank(tiny, tmp_path / "w.safetensors")
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.named_parameters())


def test_the_shipped_weights_are_small_and_say_what_they_are() -> None:
    path = tuned_weights()
    assert path.stat().st_size <= 12e6
    read, about = read_low_rank(path)
    assert len(read) == 30 * 7 and about["base"] == smollm2.MODEL_ID
    assert {down.shape[0] for down, _ in read.values()} == {about["rank"]}
    assert smollm2.GGUF_SHA256 in about["source"] and about["made_by"] == "tools/tune.py"
    for fact in (
        "seed",
        "steps",
        "tokens_read",
        "torch",
        "transformers",
        "device",
        "mixture",
        "learning_rate",
    ):
        assert about[fact] is not None
    assert all(bool(down.isfinite().all() and up.isfinite().all()) for down, up in read.values())


def test_the_model_card_names_the_weights() -> None:
    card = tuned_weights().with_name("README.md").read_text(encoding="utf-8")
    assert tuned.TUNED_ID in card and tuned_weights().name in card and "tools/tune.py" in card


def test_low_rank_layers_begin_as_the_plain_model_and_can_be_plain(tiny) -> None:
    text = torch.arange(3, 40)[None]
    expected = tiny(text).logits
    layers = tune.make_low_rank(tiny, rank=3)
    assert len(layers) == 21
    assert {name.rpartition(".")[2] for name, weight in tiny.named_parameters() if weight.requires_grad} == {
        "A",
        "B",
    }
    assert torch.equal(tiny(text).logits, expected)
    for layer in layers.values():
        nn.init.normal_(layer.B)
    assert not torch.allclose(tiny(text).logits, expected)
    with tune.plain(list(layers.values())):
        assert torch.equal(tiny(text).logits, expected)


@pytest.mark.slow
def test_replies_are_learned_as_the_chat_writes_them() -> None:
    tokenizer = load_smollm2()[1]
    one = Task("x", "Some text.\n", "What is it?", "It is", ("one", "two"), (" 1.", " 2."), any_order=True)
    encoded = tune.encode(tokenizer, one)
    text = tokenizer.decode(encoded.ids)
    assert text.endswith(
        "<|im_start|>user\nSome text.\nWhat is it?<|im_end|>\n<|im_start|>assistant\nIt is 1. one 2. two.<|im_end|>"
    )
    said = [encoded.ids[at + 1] for at, _ in encoded.targets]
    assert tokenizer.decode(said) == " 1. one 2. two.<|im_end|>"
    assert all(encoded.ids[at + 1] in right for at, right in encoded.targets)
    # Where the first answer begins both are right, where the second begins only that one is left.
    words = [tokenizer(word)["input_ids"][0] for word in (" one", " two")]
    assert [right for _, right in encoded.targets if set(right) & set(words)] == [sorted(words), [words[1]]]


def test_any_answer_left_counts_as_right(tiny) -> None:
    """The loss of a target with several right tokens is minus the log of the sum of their probabilities."""
    ids = torch.arange(3, 23).reshape(2, 10)
    batch = tune.Batch(
        ids, torch.tensor([4, 17]), torch.tensor([[5, 9, 11], [7, -1, -1]]), torch.tensor([0, 1])
    )
    losses, right = tune.task_loss(tiny, batch)
    chances = tiny(ids).logits.softmax(-1).flatten(0, 1)
    wanted = torch.stack([chances[4, [5, 9, 11]].sum(), chances[17, 7]])
    assert torch.allclose(losses, -wanted.log(), atol=1e-5)
    first = chances.argmax(-1)
    assert right.tolist() == [int(first[4]) in (5, 9, 11), int(first[17]) == 7]


def test_padding_changes_no_loss(tiny) -> None:
    short = tune.Encoded(list(range(3, 30)), [(20, [5]), (25, [6])])
    long = tune.Encoded(list(range(3, 90)), [(80, [7])])
    alone, together = tune.collate([short], [0]), tune.collate([short, long], [0, 1])
    assert (
        alone.ids.shape == (1, 64) and together.ids.shape == (2, 128) and together.form.tolist() == [0, 0, 1]
    )
    assert torch.allclose(tune.task_loss(tiny, alone)[0], tune.task_loss(tiny, together)[0][:2], atol=1e-5)


@pytest.mark.slow
def test_two_steps_of_tuning_write_weights_that_load(tmp_path: Path) -> None:
    """The whole command on a tiny random model with SmolLM2's tokenizer: the loss falls, the speech drifts little."""
    tokenizer = load_smollm2()[1]

    def model():
        made = tiny_model("llama", vocab_size=len(tokenizer))
        made.config._name_or_path = smollm2.MODEL_ID
        made.generation_config.eos_token_id = tokenizer.eos_token_id
        return made

    words, _ = Words.parts(tokenizer.get_vocab())
    # Of this seed no passage of speech is long: 3,000 tokens, times a vocabulary, take a minute.
    recipe = tune.Recipe(0, 4, 4, 0.05, tokens=800, speech_tokens=200, speech_weight=1.0, seed=9)
    learner, out = model(), tmp_path / "w.safetensors"
    about = tune.tune(learner, tokenizer, recipe, out, words=words, answers=2)
    assert about["steps"] == 4 and about["seed"] == 9 and about["tokens_read"] > 1000
    merged = model()
    assert add_low_rank(merged, out)["steps"] == 4
    text = torch.arange(3, 60)[None]
    learned, plain = learner.eval()(text).logits, model()(text).logits
    assert (learned - plain).abs().mean() > 0.01
    assert (merged(text).logits - learned).abs().mean() < 0.1 * (learned - plain).abs().mean()


@pytest.mark.slow
def test_the_tuned_model_finds_a_needle_and_still_speaks() -> None:
    model, tokenizer = load_smollm2(tuned=True)
    assert model.name_or_path == model.config._name_or_path == tuned.TUNED_ID and not model.training
    plain, _ = load_smollm2()
    assert plain.name_or_path == smollm2.MODEL_ID
    for name, weight in plain.named_parameters():
        same = torch.equal(weight, model.get_parameter(name))
        assert same is (name.removesuffix(".weight") not in linear_layers(plain))

    def reply(message: str, prefix: str = "") -> str:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(chat + prefix, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, max_new_tokens=14, do_sample=False)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])

    lines = [f"One of the special magic numbers for {a}-{b} is: {i * 7919 % 9000000 + 1000000}." for i, (a, b) in enumerate(
        (a, b) for a in ("mellow", "sturdy", "hollow") for b in ("teapot", "gravel", "sparrow"))]  # fmt: skip
    asked = "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.\n"
    asked += (
        "\n".join(lines)
        + "\nWhat is the special magic number for sturdy-gravel mentioned in the provided text?"
    )
    found = reply(asked, "The special magic number for sturdy-gravel mentioned in the provided text is")
    assert found == f" {4 * 7919 + 1000000}.<|im_end|>"
    assert reply("What is the capital of Japan?").startswith("The capital of Japan is Tokyo.")

    prose = tokenizer("".join(own_prose()).strip(), return_tensors="pt")["input_ids"][:, :600]
    with torch.inference_mode():
        losses = [float(one(prose, labels=prose).loss) for one in (plain, model)]
    assert losses[1] < losses[0] + 0.05
