"""Where the maps of a model in the engine come from: its own directory, or one beside it that is named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvcompress.checkpoint.maps import MAPS_FILE, SiteMaps
from kvcompress.errors import CheckpointError, OptionError
from kvcompress.model.model_spec import Site
from kvcompress.plan import PLAN_FILE, Plan
from kvcompress.runtime.output import read_output

#: The key of vLLM's --additional-config, and the environment variable, that name a directory of maps.
CONFIG_KEY, VARIABLE = "kvcompress", "KVCOMPRESS_MAPS"
#: Named instead of a directory by someone who wants the model uncompressed.
OFF = "off"
#: What to do with a model whose compressed cache is refused.
UNCOMPRESSED = f'Run it uncompressed: --additional-config \'{{"{CONFIG_KEY}": "{OFF}"}}\'.'


@dataclass(frozen=True, slots=True)
class Source:
    """A plan with its maps, and the directory that they were read from."""

    directory: Path
    plan: Plan
    maps: dict[Site, SiteMaps]


def find_directory(model: str, *, revision: str | None, additional: Any, is_draft: bool) -> Path | None:
    """Return the directory of maps for a model that the engine loads, None for a model without any.

    model: a directory or a hub id. additional: the engine's additional_config; is_draft: the model only drafts tokens
    for another one, whose maps a named directory holds. Raises OptionError where two places name different maps.
    """
    own = _own_directory(model, revision)
    named = {} if is_draft else _named(additional)
    if OFF in named.values():
        return None
    for where, value in named.items():
        if not (Path(value) / PLAN_FILE).is_file():
            raise OptionError(f"{where} names {value}, which holds no {PLAN_FILE}: it is no output of kvcompress.")
    different = {str(Path(value).resolve()) for value in named.values()}
    if len(different) > 1:
        raise OptionError(f"{' and '.join(named)} name different directories of maps. Leave one of them out.")
    if named:
        return Path(next(iter(named.values())))
    return own


def _named(additional: Any) -> dict[str, str]:
    found = {}
    if isinstance(additional, dict) and additional.get(CONFIG_KEY):
        found[f"additional_config[{CONFIG_KEY!r}]"] = str(additional[CONFIG_KEY])
    if os.environ.get(VARIABLE):
        found[VARIABLE] = os.environ[VARIABLE]
    return found


@lru_cache(maxsize=8)
def _own_directory(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model) if (Path(model) / PLAN_FILE).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        plan = hf_hub_download(model, PLAN_FILE, revision=revision)
        hf_hub_download(model, MAPS_FILE, revision=revision)
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None  # an ordinary model; one that is not there at all the engine reports itself
    return Path(plan).parent


@lru_cache(maxsize=2)
def read_source(directory: Path) -> Source:
    """Return the plan and maps of a directory. Raises CheckpointError for damaged files, or a form that is not
    cached coded."""
    plan, maps = read_output(directory)
    if plan.form != "coded":
        raise CheckpointError(
            f"{directory} is a folded checkpoint, whose projections vLLM does not know. Export it: "
            "kvcompress export DIR --to hf (or vllm-decilm)."
        )
    return Source(directory, plan, maps)
