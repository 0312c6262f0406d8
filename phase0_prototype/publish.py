"""From a training run to the model that the project ships: `python -m phase0_prototype.publish build/titan-tiny`.

Writes bfloat16 safetensors, config, tokenizer, the training log, the loss curve, the held-out text, `quality.json` with
the measured losses, and the model card that quotes them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from phase0_prototype import corpus
from phase0_prototype.hub import SHIPPED
from phase0_prototype.llm import LLM
from phase0_prototype.pretrain import SHAPE
from phase0_prototype.quality import held_out_loss, read_held_out, write_held_out

QUICK_TOKENS = 24_000  # what the test measures again, in seconds

CARD = """\
---
license: apache-2.0
library_name: titaninfer
---
# titan-tiny

A Llama of {parameters:.2f} M parameters that writes Python. The project trained it from nothing on the text of Python's
standard library, so that every phase of the course runs on real text with no download.

| | |
|---|---|
| shape | hidden 256, 8 layers, 4 heads of 64 (2 for keys), feed-forward 640, tied, context 1,024 |
| tokenizer | byte-level BPE, 4,096 ids (0-15 special: 0 ends a file, others are for later) |
| trained on | {tokens:.1f} M tokens ({epochs:.1f} epochs), Python {python} standard library, held-out files left out |
| held-out loss | **{nats:.3f} nats/token**, {bits:.3f} bits/byte over {count:,} tokens (float32, windows of 1,023) |
| file | bfloat16 safetensors, {megabytes:.1f} MB |

Held out are the files whose path hashes to one of 5 in 100 (`corpus.is_held_out`); their text is
`../held_out.jsonl.gz`. The figures are in `quality.json`, which this card is generated from, and
`tests/test_shipped_model.py` measures them again. The loss over the run is in `training_log.jsonl`:

![loss](loss.svg)

Make it again: `python -m phase0_prototype.pretrain --tokens {tokens_exact}`, then
`python -m phase0_prototype.publish build/titan-tiny`.

It knows the shape of Python and the library's habits, not what is true: expect plausible code, wrong often.
The text that it learned from, and the held-out files shipped with it, are the Python Software Foundation's, under the
PSF License Version 2 (https://docs.python.org/3/license.html), copyright 2001 Python Software Foundation.
"""


def publish(run: Path, out: Path) -> None:
    """Write everything that ships from the run's `state.pt`, `tokenizer.json` and `log.jsonl`.

    Raises:
        FileNotFoundError: the run has not saved a state yet.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in state["model"].items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(run / "tokenizer.json", out / "tokenizer.json")
    shutil.copy(run / "log.jsonl", out / "training_log.jsonl")
    _write_json(out / "config.json", config_json())
    _write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1})
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": corpus.END_OF_TEXT,
            "eos_token": corpus.END_OF_TEXT,
            "pad_token": "<|pad|>",
            "model_max_length": SHAPE["max_position_embeddings"],
        },
    )
    write_held_out(corpus.documents(held_out=True))
    documents = read_held_out()
    llm = LLM(str(out), dtype="float32", device="cpu", use="phase0=solution")
    whole = held_out_loss(llm, documents, progress=True)
    quick = held_out_loss(llm, documents, max_tokens=QUICK_TOKENS)
    parameters = sum(t.numel() for t in weights.values())
    corpus_tokens = sum(map(len, corpus.encode_documents(_tokenizer(run), list(corpus.documents(held_out=False)))))
    quality = {
        "held_out_nats_per_token": round(whole.nats_per_token, 4),
        "held_out_bits_per_byte": round(whole.bits_per_byte, 5),
        "held_out_tokens": whole.tokens,
        "quick_nats_per_token": round(quick.nats_per_token, 4),
        "quick_tokens": quick.tokens,
        "training_tokens": state["seen"],
        "parameters": parameters,
    }
    _write_json(out / "quality.json", quality)
    loss_curve(run / "log.jsonl", out / "loss.svg")
    (out / "README.md").write_text(
        CARD.format(
            parameters=parameters / 1e6,
            tokens=state["seen"] / 1e6,
            tokens_exact=state["seen"],
            epochs=state["seen"] / corpus_tokens,
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            nats=quality["held_out_nats_per_token"],
            bits=quality["held_out_bits_per_byte"],
            count=whole.tokens,
            megabytes=(out / "model.safetensors").stat().st_size / 1e6,
        )
    )
    print(json.dumps(quality, indent=1))


def config_json() -> dict[str, Any]:
    """The model's config.json."""
    shape = {k: v for k, v in SHAPE.items() if k != "rope_theta"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "bfloat16",
        "rope_theta": SHAPE["rope_theta"],
        **shape,
    }


def loss_curve(log: Path, out: Path) -> None:
    """Training loss (smoothed) and held-out loss over tokens, as SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    tokens = [line["tokens"] / 1e6 for line in lines]
    smooth: list[float] = []
    for line in lines:
        smooth.append(line["loss"] if not smooth else 0.9 * smooth[-1] + 0.1 * line["loss"])
    held = [(line["tokens"] / 1e6, line["held_out"]) for line in lines if "held_out" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.plot(tokens, smooth, color="#0072B2", label="training (smoothed)")
    if held:
        axes.plot(*zip(*held, strict=True), color="#D55E00", marker="o", markersize=3, label="held out (sample)")
    axes.set(xlabel="million tokens", ylabel="nats per token", ylim=(1.5, 5))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


def _tokenizer(run: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(run / "tokenizer.json"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Command line of the publisher."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("build/titan-tiny"))
    parser.add_argument("--out", type=Path, default=SHIPPED["titan-tiny"])
    args = parser.parse_args()
    publish(args.run, args.out)


if __name__ == "__main__":
    main()
