"""Models of images and text in small, with their own processors: the model, and what it is given of a picture.

What a transformers does not have yet raises ImportError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForImageTextToText
from transformers.processing_utils import ProcessorMixin

from tests.tiny_models import build_tokenizer, prose

_TEXT: dict[str, Any] = {
    "vocab_size": 336, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 16}
_PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 16, "max_pixels": 4096}


def picture() -> Any:
    """Return a picture of 32 x 32 pixels."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def words() -> tuple[str, str]:
    """Return the text before and after the picture: more than the window that stays exact."""
    return prose(160), prose(120)


def tokenizer(**special: str) -> Any:
    """Return the tiny tokenizer with tokens of its own under the names that processors ask for."""
    made = build_tokenizer()
    made.add_tokens(list(special.values()), special_tokens=True)
    for name, token in special.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def processed(kind: Any, mark: str, **parts: Any) -> dict[str, Any]:
    """Return what a processor makes of words, a picture and words. Parts for videos and sound may be None."""
    before, after = words()
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda _self, _name, part: type(part)):
        processor = kind(**parts)
    return dict(processor(text=[f"{before} {mark} {after}"], images=[picture()], return_tensors="pt"))


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def _qwen_tokens() -> Any:
    return tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )


def _qwen_given(kind: Any) -> dict[str, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    parts = {"image_processor": Qwen2VLImageProcessorPil(**_PATCHES), "tokenizer": _qwen_tokens()}
    return processed(kind, "<|vision_start|><|image_pad|><|vision_end|>", **parts, video_processor=None)


def _qwen_ids() -> dict[str, int]:
    tokens = _qwen_tokens()
    names = {"image_token_id": "image_token", "video_token_id": "video_token"}
    names |= {"vision_start_token_id": "vision_start_token", "vision_end_token_id": "vision_end_token"}
    return {field: getattr(tokens, f"{name}_id") for field, name in names.items()}


def qwen2_5_vl() -> tuple[Any, dict[str, Any]]:
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=_TEXT | {"rope_parameters": rope}, vision_config=vision, **_qwen_ids())
    return built(config), _qwen_given(Qwen2_5_VLProcessor)


def qwen3_vl() -> tuple[Any, dict[str, Any]]:
    from transformers import Qwen3VLConfig
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=_TEXT | {"rope_parameters": rope}, vision_config=vision, **_qwen_ids())
    return built(config), _qwen_given(Qwen3VLProcessor)


def gemma3() -> tuple[Any, dict[str, Any]]:
    from transformers import Gemma3Config
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    tokens = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    ids = {"image_token_index": tokens.image_token_id, "boi_token_index": tokens.boi_token_id}
    ids |= {"eoi_token_index": tokens.eoi_token_id}
    config = Gemma3Config(text_config=_TEXT | _WINDOWS, vision_config=vision, mm_tokens_per_image=4, **ids)
    pictures = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    parts = {"image_processor": pictures, "tokenizer": tokens, "image_seq_length": 4}
    return built(config), processed(Gemma3Processor, "<start_of_image>", **parts)


def gemma4() -> tuple[Any, dict[str, Any]]:
    from transformers import Gemma4Config
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    tokens = tokenizer(
        image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>", video_token="<|video|>",
        audio_token="<|audio|>", boa_token="<|audio>", eoa_token="<audio|>",
    )  # fmt: skip
    text = _TEXT | _WINDOWS | {"global_head_dim": 32, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    text |= {"vocab_size_per_layer_input": 336}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2}
    config = Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=tokens.image_token_id
    )
    pictures = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    parts = {"image_processor": pictures, "tokenizer": tokens, "video_processor": None, "feature_extractor": None}
    return built(config), processed(Gemma4Processor, "<|image|>", **parts)


def mistral3() -> tuple[Any, dict[str, Any]]:
    """Pixtral's processor wants torchvision; its picture and what it writes for it do not."""
    from transformers import Mistral3Config
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    tokens = tokenizer(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "head_dim": 16, "image_size": 16, "patch_size": 4}
    text = {"model_type": "mistral", **_TEXT, "sliding_window": None}
    config = Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=tokens.image_token_id, spatial_merge_size=2
    )
    pictures = PixtralImageProcessorPil(patch_size=4, size={"longest_edge": 16})(picture(), return_tensors="pt")
    height, width = (int(n) // 8 for n in pictures["image_sizes"][0])
    rows = ["[IMG]" * width] * height
    before, after = words()
    given = dict(tokens(before + "[IMG_BREAK]".join(rows) + "[IMG_END]" + after, return_tensors="pt"))
    given.pop("token_type_ids", None)
    return built(config), given | {"pixel_values": pictures["pixel_values"], "image_sizes": pictures["image_sizes"]}


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "Gemma 3": gemma3,
    "Gemma 4": gemma4,
    "Mistral 3": mistral3,
}
