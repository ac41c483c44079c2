"""Mistral checkpoints without weights: a configuration, and a tekken vocabulary that mistral-common ships.

Example:

    headless = Headless(build_checkpoint(tmp_path, "v13"))

The vocabulary is shortened, and marked as one of the versions whose formats differ: v3 as shipped, v11 with `[ARGS]`
and a grammar, v13 with `[THINK]` as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 2000
"""Pieces of text; bytes come first, so that any text can be written."""
SPECIAL_TOKENS = 100
VERSIONS = ("v3", "v11", "v13")
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY + SPECIAL_TOKENS,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_checkpoint(folder: Path, version: str) -> Path:
    """Write the checkpoint into `folder` and return it."""
    import mistral_common
    from mistral_common.tokens.tokenizers.base import SpecialTokens
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    shipped = Path(mistral_common.__file__).parent / "data/tekken_240911.json"
    tekken: dict[str, Any] = json.loads(shipped.read_text())
    tekken.pop("image")
    tekken["vocab"] = tekken["vocab"][:VOCABULARY]
    tekken["config"] |= {
        "version": version,
        "num_vocab_tokens": VOCABULARY,
        "default_vocab_size": VOCABULARY + SPECIAL_TOKENS,
        "default_num_special_tokens": SPECIAL_TOKENS,
    }
    names = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    if version != "v3":
        names += [SpecialTokens.args, SpecialTokens.call_id]
    if version == "v13":
        names += [SpecialTokens.begin_think, SpecialTokens.end_think]
    tekken["special_tokens"] = [
        {"rank": rank, "token_str": str(getattr(name, "value", name)), "is_control": True}
        for rank, name in enumerate(names)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(tekken))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
