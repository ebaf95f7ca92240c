"""publish(): an output as a repository of the Hugging Face hub, its maps alone or everything.

What leaves the machine says nothing of where texts and models lay on it: absolute paths become names, and the plan's
source becomes the hub id of the original model, so that `kvcompress.load` finds it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from kvcompress.checkpoint.maps import MAPS_FILE
from kvcompress.documents import DocumentError, read_json, read_text
from kvcompress.errors import KVCompressError, OptionError, OutputError
from kvcompress.evaluations import EVALUATIONS_FILE, read_evaluations
from kvcompress.plan import PLAN_FILE, REPORT_FILE, Plan
from kvcompress.report.card import CARD_FILE, MOST_CARD_BYTES, is_generated, model_card, with_measured
from kvcompress.report.healing import HEALING_FILE, read_healing
from kvcompress.report.source import hub_id, without_local_paths

_OWN_FILES = (MAPS_FILE, PLAN_FILE, REPORT_FILE, EVALUATIONS_FILE, HEALING_FILE, CARD_FILE)


@dataclass(frozen=True, slots=True)
class Published:
    """Where an output went, and the bytes of each file that was sent."""

    url: str
    private: bool
    files: dict[str, int]


def publish(
    output: Path, repository: str, *, base: str | None = None, everything: bool = False, private: bool = False
) -> Published:
    """Upload an output to ORG/NAME, made if it does not exist, in one commit, and return what was sent.

    base: the hub id of the original model, needed for maps of a model that was compressed from a local directory.
    everything: the weights and the tokenizer too. private: refuses a repository that exists and is public.
    Raises OptionError where something must be chosen first, OutputError where the hub refuses or is out of reach.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    contents = repository_contents(output, repository, base=base, everything=everything)
    if not get_token():
        raise OptionError("there is no Hugging Face token. Run 'hf auth login', or set HF_TOKEN to one that may write.")
    api = HfApi(library_name="kvcompress")
    with _explained(repository):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        is_private = bool(api.repo_info(repository).private)
        if private and not is_private:
            raise OptionError(
                f"{repository} exists and is public, so nothing was sent. Leave out --private, or rename."
            )
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=c) for name, c in contents.items()]
        api.create_commit(repository, operations, commit_message="Upload a compressed KV cache with kvcompress")
    sizes = {n: len(c) if isinstance(c, bytes) else c.stat().st_size for n, c in contents.items()}
    return Published(str(url), is_private, sizes)


def repository_contents(
    output: Path, repository: str, *, base: str | None, everything: bool
) -> dict[str, Path | bytes]:
    """Return what a repository shall hold: files as they are, or their text where it is rewritten for others."""
    plan = Plan.load(output)
    for name, given in (("the repository", repository), ("--base", base)):
        _check_repository(name, given)
    base = base or hub_id(plan.source)
    if plan.form == "folded" and not everything:
        raise OptionError("a folded checkpoint does nothing without its own weights. Send them too, with --all.")
    if base is None and not everything:
        raise OptionError(
            f"{output} was made from a local directory, so that nobody could find the model its maps belong to. "
            "Name that model's repository with --base ORG/NAME."
        )
    files = sorted(p for p in output.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(output)))
    names = [str(p.relative_to(output)) for p in files]
    contents: dict[str, Path | bytes] = {n: output / n for n in names if everything or n in _OWN_FILES}
    if MAPS_FILE not in contents:
        raise OutputError(f"{output} has no {MAPS_FILE}, so that there is nothing to send. Compress again.")
    options = plan.options | {"maps_only": bool(plan.options.get("maps_only")) or not everything}
    public = replace(plan, options=options, source=base or Path(plan.source).name)
    for name in (PLAN_FILE, REPORT_FILE):
        if name in contents:
            contents[name] = _public_json(output / name, public, sent=contents)
    if HEALING_FILE in contents:
        contents[HEALING_FILE] = _without_paths(output / HEALING_FILE)
    contents[CARD_FILE] = _public_card(output, public, repository)
    return contents


def _public_json(file: Path, public: Plan, *, sent: Container[str]) -> bytes:
    try:
        document = read_json(file) | {"options": public.options}
    except (DocumentError, OSError) as error:
        raise OutputError(f"{file} is damaged ({error}). Compress again.") from error
    document |= {key: public.source for key in ("source", "model") if key in document}
    if "files" in document:
        document["files"] = {name: digest for name, digest in public.files.items() if name in sent}
    return (json.dumps(without_local_paths(document), indent=1) + "\n").encode()


def _without_paths(file: Path) -> bytes:
    try:
        return (json.dumps(without_local_paths(read_json(file)), indent=1) + "\n").encode()
    except (DocumentError, OSError) as error:
        raise OutputError(f"{file} is damaged ({error}). Heal again.") from error


def _public_card(output: Path, public: Plan, repository: str) -> bytes:
    """Return the card for the repository; one that was rewritten by hand is sent as it is."""
    file = output / CARD_FILE
    if file.is_file() and not is_generated(text := _card_text(file)):
        return text.encode()
    card = model_card(public, file, repository=repository, healing=without_local_paths(read_healing(output)))
    return with_measured(card, read_evaluations(output)).encode()


def _card_text(file: Path) -> str:
    try:
        return read_text(file, most=MOST_CARD_BYTES)
    except (DocumentError, OSError) as error:
        raise OutputError(f"{file} is no card that can be sent ({error}).") from error


def _check_repository(name: str, given: str | None) -> None:
    if given is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", given, re.ASCII):
        raise OptionError(f"{name} must be ORG/NAME, found '{given}'.")


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one clear OutputError."""
    try:
        yield
    except KVCompressError:
        raise
    except Exception as error:  # also what the HTTP library below it raises, which differs between versions
        raise OutputError(f"the hub did not take {repository}: {_first_line(error)}") from error


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
