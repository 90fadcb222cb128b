"""Small random transformers models of other habits than a Llama's: windows, an encoder, pictures."""

from __future__ import annotations

from typing import Any

import torch
from models.tiny import SIZES
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE, VISION_START, VISION_END, VIDEO = 96, 95, 94, 93
"""Tokens in whose place the features of a picture stand, and its brackets (Qwen2-VL's)."""

WIDE: dict[str, Any] = {"initializer_range": 0.2}


def gemma3() -> Any:
    """A layer with a window of 16 tokens, and one without; norms of queries and keys."""
    torch.manual_seed(1)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "num_hidden_layers": 2}
    config = Gemma3TextConfig(**SIZES, **WIDE, **kinds, max_position_embeddings=512, attn_implementation="sdpa")
    return Gemma3ForCausalLM(config).eval()


def bart() -> Any:
    """An encoder, and a decoder of one layer that attends to it."""
    torch.manual_seed(1)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 256, "vocab_size": 97}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, **tokens, init_std=0.4)).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def _text() -> dict[str, Any]:
    return {**SIZES, **WIDE, "num_hidden_layers": 1, "max_position_embeddings": 512}


def llava() -> Any:
    """A Llama that sees pictures of 16 x 16 as 4 tokens each, by CLIP."""
    torch.manual_seed(1)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32}  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **_text()},
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return _sharp(LlavaForConditionalGeneration(config).eval())


def qwen2_vl() -> Any:
    """Positions of three parts: time, height and width of what a token shows."""
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={**_text(), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return _sharp(Qwen2VLForConditionalGeneration(config).eval())


def _sharp(model: Any) -> Any:
    """A picture's tower has an initialisation of its own; of its language model attention is to be far from uniform."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed_tokens" not in name:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return model
