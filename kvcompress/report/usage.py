"""How to run an output, in code that can be pasted; the same on the page and in the card."""

from __future__ import annotations

#: What stands for the output's directory until it is known, in the card and on the page.
PLACE = "OUT"
#: What stands for the original model where it has no hub id.
ORIGINAL = "ORIGINAL_MODEL"


def python_usage(*, maps_only: bool, base: str | None, repository: str | None = None) -> str:
    """Return Python that loads and runs an output, from its directory or from its repository on the hub."""
    base = base or ORIGINAL
    lines = ["import kvcompress"]
    lines += ["from huggingface_hub import snapshot_download"] if repository else []
    lines += [f"from transformers import {'AutoModelForCausalLM, ' if maps_only else ''}AutoTokenizer", ""]
    lines += [f'directory = snapshot_download("{repository}")' if repository else f'directory = "{PLACE}"']
    if maps_only:
        lines += [
            f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")',
            "model = kvcompress.attach(model, directory)",
            f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
        ]
    else:
        lines += ["model = kvcompress.load(directory)", "tokenizer = AutoTokenizer.from_pretrained(directory)"]
    lines += [
        "",
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=100)  # with the compressed cache",
        "print(tokenizer.decode(output[0]))",
    ]
    return "\n".join(lines)


def shell_usage(*, form: str, maps_only: bool, base: str | None) -> str:
    """Return commands that run and measure an output."""
    needs_base = base is None and (maps_only or form == "folded")
    flag = f" --base {ORIGINAL}" if needs_base else ""
    return "\n".join(
        [
            f'kvcompress generate {PLACE} --prompt "Once upon a time"{flag if maps_only else ""}',
            f"kvcompress eval {PLACE} --text FILE{flag}",
        ]
    )


def loading_note(*, form: str, maps_only: bool) -> str:
    """Return what else a reader must know: what the directory holds and what plain transformers makes of it."""
    if form == "folded":
        return "The weights are folded: k_proj and v_proj are smaller, so it needs kvcompress to run or be exported."
    if maps_only:
        return (
            "The output holds the maps only; they are attached to the original model, whose weights stay as they are."
        )
    return "The directory also loads in plain transformers, uncompressed."
