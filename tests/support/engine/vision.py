"""A tiny vision model with random weights, in the form that vLLM loads: Idefics3 over a Llama of two layers.

Example:

    engine = EmbeddedEngine(str(build_checkpoint(tmp_path)), {"max_model_len": 2048})

Different pixels give different tokens, and the same pixels the same ones. Idefics3 is one of the architectures whose
processing needs no torchvision, which does not exist for the CPU build of torch. Larger images are split into tiles,
so the length of a prompt depends on the size of its images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGE_SIZE = 64
PATCH_SIZE = 16
SCALE_FACTOR = 2
TOKENS_PER_TILE = (IMAGE_SIZE // PATCH_SIZE // SCALE_FACTOR) ** 2
TILES = 2
"""Tiles along the longest edge of an image."""

_CHAT_TEMPLATE = """{% for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into `folder` and return it. The same folder holds the same weights every time."""
    import torch
    from transformers import AutoTokenizer, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    from engine.demo import WEIGHTS

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(TILES) for column in range(TILES)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": TILES * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
    )
    Idefics3Processor(images, tokenizer, TOKENS_PER_TILE, _CHAT_TEMPLATE).save_pretrained(folder)
    config = Idefics3Config(
        image_token_id=len(tokenizer) - len(special) + special.index("<image>"),
        pad_token_id=0,
        scale_factor=SCALE_FACTOR,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
    )
    torch.manual_seed(0)
    model: Any = Idefics3ForConditionalGeneration(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # so large that what an image says is not lost on the way to the answer
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return folder
