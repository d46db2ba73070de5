"""Models from a hub, through huggingface_hub and its cache, against a server on the loopback.

Each download runs in a process of its own, since huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from golden_cases import CASES
from gpt2rs.hub import is_repo_id, needed_files
from hub_server import Hub, serving

SHAKESPEARE = Path(__file__).parents[2] / "python" / "gpt2rs" / "models" / "shakespeare"
# Prints what was opened, or the error.
PROGRAM = """
import json, sys
from gpt2rs.checkpoints import open_checkpoint
arguments = json.loads(sys.argv[1])
try:
    source = open_checkpoint(arguments.pop("name"), **arguments)
except (FileNotFoundError, RuntimeError, ValueError) as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
else:
    files = {path.name: path.stat().st_size for path in source.folder.iterdir()}
    opened = {"names": source.checkpoint.names(), "n_embd": source.config.n_embd}
    print(json.dumps({"files": files, "folder": str(source.folder), "dtype": source.stored_dtype, **opened}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    pickled = tmp_path / "pickled"
    shutil.copytree(CASES["pytorch_bin"], pickled)
    both = tmp_path / "both"
    shutil.copytree(CASES["plain"], both)
    shutil.copy(CASES["pytorch_bin"] / "pytorch_model.bin", both)
    (both / "tf_model.h5").write_bytes(b"\x89HDF")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(CASES["plain"] / "config.json", empty)
    repositories = {
        "owner/shakespeare": SHAKESPEARE,
        "owner/sharded": CASES["float16_sharded"],
        "owner/pickled": pickled,
        "both": both,
        "owner/empty": empty,
    }
    with serving(Hub(repositories, gated={"owner/gated"})) as hub:
        yield hub


@dataclass
class User:
    """Someone with a cache and a hub."""

    home: Path
    hub: Hub

    def opens(self, name: str, *, offline: bool = False, **arguments: Any) -> dict[str, Any]:
        """What PROGRAM prints."""
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))
        }
        environment |= {
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_OFFLINE": str(int(offline)),
        }
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        self.hub.requests.clear()
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps({"name": name, **arguments})],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
        result: dict[str, Any] = json.loads(ran.stdout)
        return {**result, "stderr": ran.stderr}


@pytest.fixture
def user(tmp_path: Path, hub: Hub) -> User:
    return User(tmp_path / "home", hub)


def test_download_then_cache_then_offline(user: User) -> None:
    first = user.opens("owner/shakespeare")
    assert sorted(user.hub.downloads()) == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert first["files"] == {
        path.name: path.stat().st_size for path in SHAKESPEARE.iterdir() if path.name != "training.json"
    }
    assert (first["n_embd"], first["dtype"]) == (192, "bfloat16")
    assert Path(first["folder"]).is_relative_to(user.home)
    assert "model.safetensors" in first["stderr"] or "100%" in first["stderr"], "no progress bar"

    second = user.opens("owner/shakespeare")
    assert user.hub.downloads() == []
    third = user.opens("owner/shakespeare", offline=True)
    fourth = user.opens("owner/shakespeare", local_files_only=True)
    assert user.hub.requests == []
    user.hub.broken = True
    fifth = user.opens("owner/shakespeare")
    for later in (second, third, fourth, fifth):
        assert {**later, "stderr": ""} == {**first, "stderr": ""}


def test_shards(user: User) -> None:
    opened = user.opens("owner/sharded")
    assert opened["dtype"] == "float16"
    assert len([name for name in user.hub.downloads() if name.endswith(".safetensors")]) == 5
    assert "transformer.h.3.mlp.c_proj.weight" in opened["names"]


def test_one_form_of_the_weights(user: User) -> None:
    opened = user.opens("both")
    assert sorted(opened["files"]) == ["config.json", "model.safetensors"]
    opened = user.opens("owner/pickled")
    assert sorted(opened["files"]) == ["config.json", "pytorch_model.bin"]
    assert "transformer.wte.weight" in opened["names"]


def test_a_cache_of_ones_own_and_a_revision(user: User, tmp_path: Path) -> None:
    opened = user.opens("both", cache_dir=str(tmp_path / "mine"), revision=user.hub.commit("both"))
    assert Path(opened["folder"]).is_relative_to(tmp_path / "mine")
    assert not list(user.home.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        (
            "owner/nothing",
            {},
            "FileNotFoundError",
            "no folder or file 'owner/nothing' and no model of that name at",
        ),
        ("owner/gated", {}, "RuntimeError", "owner/gated is gated: ask for access at"),
        ("owner/empty", {}, "FileNotFoundError", "has no weights: none of model.safetensors"),
        ("both", {"revision": "v9"}, "FileNotFoundError", "has no revision 'v9'"),
        (
            "both",
            {"local_files_only": True},
            "FileNotFoundError",
            "both is not in the local cache and downloads are off",
        ),
        (
            "both",
            {"offline": True},
            "FileNotFoundError",
            "both is not in the local cache and downloads are off",
        ),
    ],
)
def test_refusals(user: User, name: str, arguments: dict[str, Any], error: str, message: str) -> None:
    refused = user.opens(name, **arguments)
    assert (refused["error"], "\n" in refused["message"]) == (error, False)
    assert message in refused["message"]
    assert user.hub.downloads() == []


def test_a_hub_that_fails(user: User) -> None:
    user.hub.broken = True
    refused = user.opens("both")
    assert refused["error"] == "RuntimeError"
    assert "both is not in the local cache and http://127.0.0.1" in refused["message"]
    assert "could not be fetched: " in refused["message"]


def test_no_connection(user: User) -> None:
    user.hub.url = "http://127.0.0.1:9"
    refused = user.opens("both")
    assert refused["error"] == "RuntimeError"
    assert "could not be fetched: " in refused["message"]


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2-xl", "a/b.c_d-1"])
def test_hub_names(name: str) -> None:
    assert is_repo_id(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b/c", "/a", "a/", "-a", "a b", "a..b", "a--b", "~/a", "a\\b", "x" * 97]
)
def test_names_that_are_not_the_hubs(name: str) -> None:
    assert not is_repo_id(name)


def test_needed_files() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = [
        "README.md",
        "config.json",
        "model.safetensors.index.json",
        *shards,
        "onnx/model.onnx",
        "vocab.json",
    ]
    assert needed_files(names, "x") == ["config.json", "model.safetensors.index.json", *shards, "vocab.json"]
    with pytest.raises(FileNotFoundError, match=r"x has no config\.json"):
        needed_files(names[2:], "x")
