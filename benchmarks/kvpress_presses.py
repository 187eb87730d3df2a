"""What kvpress's own presses keep of prompts, and how likely its cache makes an answer: written to a file.

Run by `beside_kvpress.py`, in an environment of kvpress's own, where headkv need not be. A folder holds `model` and
`prompts.pt`: of each prompt its tokens `ids` `[1, n]`, what is fed after it, `tokens` `[1, m]`, and the `answer`
`[1, a]`. The prompt is read once; every press is then given what its hook would be given.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import kvpress
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

AT_ONCE = "AdaKV, question at once"


def presses(ratio: float) -> dict[str, Any]:
    """kvpress's presses with its defaults, window 64 and kernel 5, but for a pyramid that is none with that window."""
    snap = kvpress.SnapKVPress
    return {
        "StreamingLLM": kvpress.StreamingLLMPress(ratio),
        "SnapKV": snap(ratio),
        "PyramidKV": kvpress.PyramidKVPress(ratio),
        "PyramidKV, window 4": kvpress.PyramidKVPress(ratio, window_size=4),
        "AdaKV": kvpress.AdaKVPress(snap(ratio)),
        AT_ONCE: kvpress.AdaKVPress(snap(ratio)),
        "CriticalKV": kvpress.CriticalKVPress(snap(ratio)),
        "CriticalAdaKV": kvpress.CriticalAdaKVPress(snap(ratio)),
        "ExpectedAttention": kvpress.ExpectedAttentionPress(ratio),
        "KeyDiff": kvpress.KeyDiffPress(ratio),
    }


class Recorder(kvpress.BasePress):
    """Keeps all, and what the hook of each layer was given."""

    def compress(self, *given: Any) -> tuple[Tensor, Tensor]:
        vars(self).setdefault("given", []).append(given)
        return given[2], given[3]


def kept_mask(module: Any, before: Tensor, after: Tensor) -> Tensor:
    """Which of the keys `[1, H, n, D]` a press left, `[H, n]` bool: the rest are masked, or not there."""
    mask = torch.ones(before.shape[1:3], dtype=torch.bool)
    if module.masked_key_indices is not None:
        mask[module.masked_key_indices[1], module.masked_key_indices[2]] = False
        return mask
    odd = (
        2 * torch.arange(before.shape[3]) ** 3 + 1
    )  # bits as a whole number: equal keys, and no others, are found
    names = [(x[0].contiguous().view(torch.int32).long() * odd).sum(-1) for x in (before, after)]
    return torch.stack([torch.isin(*row) for row in zip(*names, strict=True)])


@torch.no_grad()
def answered(model: Any, cache: Any, n: int, prompt: dict[str, Tensor], step: int) -> tuple[bool, float]:
    """Whether each token of the answer is the first choice, and its nats a token; `step` tokens are fed at a time."""
    fed, answer = torch.cat([prompt["tokens"], prompt["answer"][:, :-1]], 1), prompt["answer"]
    logits = []
    for i in range(0, fed.shape[1], step):
        ids = fed[:, i : i + step]
        where = torch.arange(n + i, n + i + ids.shape[1])[None]
        logits.append(model(ids, past_key_values=cache, position_ids=where).logits[0])
    logs = torch.cat(logits)[-answer.shape[1] :].float().log_softmax(-1)
    right = bool((logs.argmax(-1) == answer[0]).all())
    return right, float(logs.gather(-1, answer[0, :, None]).mean())


@torch.no_grad()
def pressed(
    model: Any, prompt: dict[str, Tensor], shares: list[float]
) -> dict[tuple[str, float], dict[str, Any]]:
    """By press and share: `kept` `[L, H, n]` bool, and `right` and `nats`, or the `error` that kvpress raised."""
    ids = prompt["ids"]
    attentions = [layer.self_attn for layer in model.model.layers]
    recorder, done = Recorder(), {}
    with recorder(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
    for share in shares:
        for name, press in presses(1 - share).items():
            press.post_init_from_model(model)
            cache, kept = DynamicCache(), []
            for i, (module, hidden, keys, values, weights, kwargs) in enumerate(recorder.given):
                module.masked_key_indices = None
                left = press.compress(module, hidden, keys.clone(), values.clone(), weights, kwargs)
                cache.update(*left, i)
                kept.append(kept_mask(module, keys, left[0]))
            gone = all(x.masked_key_indices is None for x in attentions)
            alike = name == AT_ONCE or (gone and len({int(x[0].sum()) for x in kept}) == 1)
            found: dict[str, Any] = {"kept": torch.stack(kept)}
            try:
                step = prompt["tokens"].shape[1] + prompt["answer"].shape[1] if alike else 1
                found["right"], found["nats"] = answered(model, cache, ids.shape[1], prompt, step)
            except ValueError as error:  # no key that all queries look away from
                found["error"] = str(error)
            done[name, share] = found
    for attention in attentions:
        attention.masked_key_indices = None
    return done


def main(folder: Path, shares: list[float]) -> None:
    """Every press over every prompt."""
    torch.set_num_threads(1)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    prompts, done, begin = torch.load(folder / "prompts.pt"), [], time.monotonic()
    for prompt in prompts:
        done.append(pressed(model, prompt, shares))
        print(f"kvpress: prompt {len(done)} of {len(prompts)}, {time.monotonic() - begin:.0f} s", flush=True)
    torch.save(done, folder / "pressed.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [float(share) for share in sys.argv[2:]])
