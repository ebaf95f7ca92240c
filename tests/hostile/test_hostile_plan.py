"""Numbers of kv_plan.json that nobody could have meant, files of other outputs, and links that lead out of one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import kvcompress
from kvcompress.errors import CheckpointError
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import PLAN_FILE, Plan
from kvcompress.runtime.output import read_output

MAPS = "kv_maps.safetensors"


@pytest.fixture(scope="module")
def pristine(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An output by its seed and options; never write to it."""
    made: dict[str, Path] = {}

    def make(seed: int = 0, **options: Any) -> Path:
        key = repr((seed, options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("pristine") / "out"
            chosen = {"metric": "weights", "policy": "uniform", "recent": 4, "keep": 0.5, "ranks_only": True} | options
            compress(tiny_checkpoint("llama-gqa", seed=seed), made[key], CompressOptions(**chosen))
        return made[key]

    return make


@pytest.fixture
def output(pristine: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(pristine(), tmp_path / "out")
    return tmp_path / "out"


def refusal(directory: Path) -> str:
    """Return the message with which an output is refused, at once and in one line."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        read_output(directory)
    assert time.perf_counter() - started < 2
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((directory / PLAN_FILE).read_text())
    change(document)
    (directory / PLAN_FILE).write_text(json.dumps(document))


def site(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda d: d["sites"][2].update({name: value})


#: Damage -> how it is done, and words of the refusal: another check must not stand for the one that is meant.
NUMBERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a count of 10^9": (site("bits", [[8, 10**9]]), "sites[2].bits[0][1] must be a number from 0"),
    "a count of 2^63": (site("bits", [[8, 2**63]]), "beyond any size"),
    "a count below zero": (site("bits", [[8, -1]]), "sites[2].bits[0][1] must be a number from 0"),
    "a count that is no number": (site("bits", [[8, None]]), "sites[2].bits[0][1] must be a whole number"),
    "more components than numbers": (site("bits", [[8, 17]]), "keep 17 components of 16"),
    "bits that no level has": (site("bits", [[7, 4]]), "sites[2].bits[0][0] must be one of"),
    "bits that rise": (site("bits", [[2, 4], [8, 4]]), "sites[2].bits must be falling"),
    "a list as a part": (site("part", []), "sites[2].part must be one of"),
    "a part that is none": (site("part", "query"), "sites[2].part must be one of"),
    "an object as a layer": (site("layer", {}), "sites[2].layer must be a whole number"),
    "a layer far away": (site("layer", 10**12), "sites[2].layer must be a number from 0"),
    "a width of 2^40": (site("width", 2**40), "sites[2].width must be a number from 1"),
    "a width of zero": (site("width", 0), "sites[2].width must be a number from 1"),
    "blocks that do not divide": (site("block_width", 5), "block_width 5 does not divide"),
    "blocks of another width": (
        site("block_width", 16),
        "the maps of layers.1.key keep 8 of 16 numbers in blocks of 8",
    ),
    "a loss that is no number": (site("predicted_loss", "much"), "sites[2].predicted_loss must be a number"),
    "a turn of 2^50": (site("turn", 2**50), "sites[2].turn must be a number from 1"),
    "a turn of three tokens": (site("turn", 3), "turn must be 1 or a power of two"),
    "rotated, in words": (site("rotated", "yes"), "sites[2].rotated must be true or false"),
    "a basis of a megabyte": (site("basis", "x" * 10**6), "sites[2].basis must be a length"),
    "a window of 2^62": (lambda d: d.update(recent=2**62), "beyond any size"),
    "sinks below zero": (lambda d: d.update(sinks=-1), "sinks must be a number from 0"),
    "sinks as a truth": (lambda d: d.update(sinks=True), "sinks must be a whole number"),
    "options as a list": (lambda d: d.update(options=[]), "options must be an object"),
    "an option of another kind": (lambda d: d["options"].update(keep="half"), "options.keep must be a number"),
    "texts that are no list": (lambda d: d["calibration"].update(sources=7), "calibration.sources must be a list"),
    "a site twice": (lambda d: d["sites"].append(d["sites"][0]), "each a different one"),
    "no site": (lambda d: d.update(sites=[]), "sites must be some"),
    "a site less": (lambda d: d["sites"].pop(), "bytes_per_token is not what the sites come to"),
    "bytes that are not the sites'": (
        lambda d: d["bytes_per_token"].update(compressed=1),
        "bytes_per_token is not what the sites come to",
    ),
    "a share that is not the sites'": (lambda d: d.update(keep=0.01), "keep is 0.01, the sites come to"),
    "a dtype as a list": (lambda d: d.update(dtype=[]), "dtype must be a text"),
    "a form that is none": (lambda d: d.update(form="solid"), "form must be one of coded, folded"),
    "a file elsewhere": (lambda d: d["files"].update({"../x.safetensors": "0"}), "outside of it"),
    "a file of a name too long": (lambda d: d["files"].update({"x" * 300: "0"}), "names a file 'xxx"),
    "a file of no name": (lambda d: d["files"].update({"": "0"}), "with which it was written"),
    "a file that is missing": (lambda d: d["files"].update({"x.safetensors": "0"}), "has no x.safetensors"),
}


@pytest.mark.parametrize("damage", NUMBERS)
def test_numbers_of_the_plan(output: Path, damage: str) -> None:
    change, words = NUMBERS[damage]
    edit(output, change)
    assert words in refusal(output)


def test_a_plan_of_a_gigabyte(output: Path) -> None:
    with (output / PLAN_FILE).open("ab") as file:
        file.truncate(10**9)
    assert "1,000,000,000 bytes" in refusal(output)


def test_maps_larger_than_the_plan_allows(output: Path) -> None:
    """Refused by the size of the file, before its tensors are read."""
    with (output / MAPS).open("ab") as file:
        file.truncate(10**12)
    assert "1,000,000,000,000 bytes" in refusal(output)


@pytest.mark.parametrize("options", [{}, {"ranks_only": False}, {"keep": 1.0}], ids=["ranks", "bits", "exact"])
def test_what_the_plan_allows_is_what_maps_have(pristine: Any, options: dict[str, Any]) -> None:
    directory = pristine(**options)
    n_bytes = sum(t.nbytes for t in load_file(directory / MAPS).values())
    assert Plan.load(directory).most_maps_bytes == n_bytes


def test_nothing_is_expanded_on_the_way(output: Path) -> None:
    """The whole of load, in a process that may have 4 GB of addresses."""
    edit(output, NUMBERS["a count of 10^9"][0])
    code = (
        "import resource, sys, kvcompress, kvcompress.errors, kvcompress.runtime.load\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 10**9\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "try: kvcompress.load(sys.argv[1])\n"
        "except kvcompress.errors.CheckpointError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, output], capture_output=True, text=True, timeout=500)
    assert "sites[2].bits[0][1]" in done.stdout, done.stderr


class TestMixed:
    def test_maps_of_another_model_of_the_same_shape(self, output: Path, pristine: Callable[..., Path]) -> None:
        """Equal in every size: only the fingerprints tell."""
        shutil.copy(pristine(seed=1) / MAPS, output / MAPS)
        assert "files of different outputs are mixed" in refusal(output)

    def test_weights_of_another_model_of_the_same_shape(self, output: Path, pristine: Callable[..., Path]) -> None:
        shutil.copy(pristine(seed=1) / "model.safetensors", output)
        assert "model.safetensors is not the file" in refusal(output)

    def test_weights_of_another_fold(self, pristine: Callable[..., Path], tmp_path: Path) -> None:
        folded = {"key_basis": "frequency", "folded": True}
        shutil.copytree(pristine(**folded), tmp_path / "out")
        shutil.copy(pristine(seed=1, **folded) / "model.safetensors", tmp_path / "out")
        with pytest.raises(CheckpointError, match="files of different outputs are mixed"):
            kvcompress.load(tmp_path / "out")

    def test_a_plan_of_another_output(self, output: Path, pristine: Callable[..., Path]) -> None:
        shutil.copy(pristine(seed=1) / PLAN_FILE, output)
        refusal(output)

    def test_an_output_from_before_fingerprints_loads(self, output: Path) -> None:
        edit(output, lambda d: d.pop("files"))
        assert Plan.load(output).files == {}
        read_output(output)


class TestLinks:
    @pytest.mark.parametrize("name", [MAPS, PLAN_FILE, "report.json", "tokenizer.json", "notes.txt"])
    def test_a_link_that_leads_out(self, output: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "elsewhere").write_text("secret")
        if (output / name).exists():
            shutil.move(output / name, tmp_path / "elsewhere")
        (output / name).symlink_to(tmp_path / "elsewhere")
        assert "outside of" in refusal(output) and "secret" not in refusal(output)

    def test_a_directory_that_leads_out(self, output: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (output / "more").symlink_to(tmp_path / "elsewhere")
        assert "outside of" in refusal(output)

    def test_links_within_and_the_hubs_own(self, output: Path, tmp_path: Path) -> None:
        (output / MAPS).rename(output / "stored")
        (output / MAPS).symlink_to("stored")
        read_output(output)
        blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1f"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for file in output.iterdir():
            if not file.is_symlink():
                shutil.copy(file, blobs / file.name)
                (snapshot / (MAPS if file.name == "stored" else file.name)).symlink_to(blobs / file.name)
        read_output(snapshot)

    def test_links_in_a_circle(self, output: Path) -> None:
        (output / "loop").symlink_to("loop")
        refusal(output)


def test_map_tensors_of_another_type(output: Path) -> None:
    """Numbers that compare equal, and then index nothing."""
    tensors = load_file(output / MAPS)
    tensors["layers.1.key.bits"] = tensors["layers.1.key.bits"].float()
    save_file(tensors, output / MAPS, metadata={"format": "pt"})
    assert "bits of layers.1.key is stored as float32" in refusal(output)


def test_a_rotation_of_more_channels_than_a_head_has(output: Path) -> None:
    def widen(document: dict[str, Any]) -> None:
        document["rotations"][0]["frequencies"] *= 3

    edit(output, widen)
    with pytest.raises(CheckpointError, match=r"turns channels up to 24 of layers.0.key, whose heads have 8"):
        kvcompress.load(output)
