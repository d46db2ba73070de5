"""Files made to harm: each is refused with a clear error or read as what it says, and nothing in it is run.

Mutations start from good files. Whatever comes of one, it must be a model or a ValueError (or
FileNotFoundError), soon, within a bounded amount of memory.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpt2rs
from golden_cases import CASES
from gpt2rs.checkpoints import open_checkpoint
from gpt2rs.formats.pickled import PickleReader
from gpt2rs.tokenizer import load_tokenizer
from torch_files import LEGACY_MAGIC as LEGACY
from torch_files import Call, Pickled, global_name, pickled, plain, save, save_zip

SHAKESPEARE = Path(__file__).parents[2] / "python" / "gpt2rs" / "models" / "shakespeare"
CONFIG = {"vocab_size": 5, "n_positions": 4, "n_embd": 4, "n_layer": 0, "n_head": 2}
STATE = {
    "wte.weight": np.arange(20, dtype=np.float32).reshape(5, 4),
    "wpe.weight": np.ones((4, 4), np.float32),
    "ln_f.weight": np.ones(4, np.float32),
}
# Every file of a test lies in a folder that hypothesis uses again for its next example.
many = settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=2000)


def survives(path: Path, config: Any = None) -> bool:
    """Whether a model came of it; anything but a model or a clear refusal is an error."""
    try:
        gpt2rs.GPT2.from_pretrained(path, config=config)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        assert len(str(error)) < 2000
        return False
    return True


# ---- code in pickles


def payloads(witness: Path) -> dict[str, bytes]:
    """Pickles that would write the witness if anything in them were run."""
    command = f"touch {witness}"
    code = f"open({str(witness)!r}, 'w')"

    class Reduced:
        def __reduce__(self) -> tuple[Any, ...]:
            return eval, (code,)

    system = global_name("posix system") + plain((command,)) + b"R"
    made = {
        f"python's own, protocol {protocol}": pickle.dumps({"model": Reduced()}, protocol)
        for protocol in range(6)
    }
    return made | {
        "os.system": pickled(Call("os system", (command,))),
        "posix.system": b"\x80\x02" + system + b".",
        "builtins.eval": pickled(Call("builtins eval", (code,))),
        "builtins.getattr": pickled(Call("builtins getattr", ("os", "system"))),
        "torch's own loader": pickled(Call("torch.storage _load_from_bytes", (code,))),
        "a module path in the name": pickled(Call("torch._utils os.system", (command,))),
        "dotted name": pickled(Call("torch serialization.os.system", (command,))),
        "OBJ": b"\x80\x02(" + global_name("os system") + plain(command) + b"o.",
        "INST": b"(" + plain(command) + b"ios\nsystem\n.",
        "NEWOBJ": b"\x80\x02" + global_name("subprocess Popen") + plain((command,)) + b"\x81.",
        "STACK_GLOBAL": b"\x80\x04" + plain("os") + plain("system") + b"\x93" + plain((command,)) + b"R.",
        "EXT1": b"\x80\x02\x82\x01.",
        "behind a storage": b"\x80\x02("
        + plain("storage")
        + system
        + plain("0")
        + plain("cpu")
        + plain(1)
        + b"tQ.",
        "in BUILD": b"\x80\x02}" + b"}(" + plain("__setstate__") + system + b"ub.",
        "a name as an argument": pickled(Call("collections OrderedDict", ([],)))[:-1] + system + b".",
    }


@pytest.mark.parametrize("name", payloads(Path("witness")))
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(name: str, form: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    content = payloads(witness)[name]
    path = tmp_path / "pytorch_model.bin"
    if form == "zip":
        save_zip(path, {"data.pkl": content}, {})
    else:
        path.write_bytes(pickled(LEGACY) + pickled(1001) + content + pickled([]))
    with pytest.raises(ValueError, match="malformed or unsafe pickle") as caught:
        open_checkpoint(path, config=CONFIG)
    assert str(path) in str(caught.value)
    time.sleep(0.01)
    assert not witness.exists()


def test_the_payloads_would_work(tmp_path: Path) -> None:
    """The test above means something: Python's unpickler does run them."""
    witness = tmp_path / "witness"
    for name in ("os.system", "posix.system", "builtins.eval", "OBJ", "INST", "python's own, protocol 2"):
        code = f"import pickle; pickle.loads(bytes.fromhex({payloads(witness)[name].hex()!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert witness.exists(), name
        witness.unlink()


# ---- pickles that would take all memory, all time, or the stack


BOMBS: dict[str, bytes] = {
    "a memo far away": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a string of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "bytes of 16 EB": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "a huge integer": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "an integer of 255 bytes": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "a decimal integer": b"I" + b"9" * 100_000 + b"\n.",
    "a deep tuple as a key": b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns.",
    "a deep tuple": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "a deep list": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dict in itself": b"\x80\x02}q\x00" + plain("model") + b"h\x00s.",
    "doubling": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 100_000 + b".",
    "doubling in a list": b"\x80\x02](" + b"N" * 1000 + b"eq\x00" + b"(" + b"h\x00" * 100_000 + b"t.",
    "a million dicts": b"\x80\x02" + b"}" * 1_000_000 + b".",
    "a million marks": b"\x80\x02" + b"(" * 1_000_000 + b"t.",
    "more than the limit": b"\x80\x02" + b"}" * (3 << 20) + b".",
    "an endless line": b"\x80\x02c" + b"a" * 1_000_000,
    "no end": b"\x80\x02" + b"N" * 1_000_000,
    "a deep storage id": b"\x80\x02)" + b"\x85" * 300_000 + b"Q.",
    "a deep tuple of keys": b"\x80\x02(" + plain("storage") + b")" + b"\x85" * 300_000 + b"tQ.",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_pickle_bombs(name: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    if form == "zip":
        save_zip(path, {"data.pkl": BOMBS[name]}, {})
    else:
        path.write_bytes(pickled(LEGACY) + pickled(1001) + BOMBS[name] * 2 + pickled([]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    assert not survives(path, CONFIG)
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10


# ---- mutated files


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A few bits flipped, bytes set to extremes, pieces cut out, doubled or moved."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice([1, 2, 4, 8, 50]))
        match draw.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at:end] = bytes([draw.choice([0, 0x7F, 0x80, 0xFF])]) * (end - at)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4:
                data[at:end] = draw.randbytes(end - at)
            case _:
                del data[at:]
    return bytes(data)


seeds = st.integers(0, 2**64 - 1).map(random.Random)


@given(draw=seeds, legacy=st.booleans())
@many
def test_mutated_pickles(draw: random.Random, legacy: bool, tmp_path: Path) -> None:
    saved = Pickled(STATE, legacy=legacy)
    path = tmp_path / "pytorch_model.bin"
    if legacy:
        save(path, STATE, legacy=True)
        path.write_bytes(mutated(path.read_bytes(), draw))
    else:
        save_zip(path, {"data.pkl": mutated(saved.bytes, draw), "byteorder": b"little"}, saved.storages)
    survives(path, CONFIG)


@given(draw=seeds)
@many
def test_mutated_archives(draw: random.Random, tmp_path: Path) -> None:
    path = save(tmp_path / "pytorch_model.bin", STATE)
    path.write_bytes(mutated(path.read_bytes(), draw))
    survives(path, CONFIG)


@given(draw=seeds)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=2000)
def test_mutated_directories(draw: random.Random, tmp_path: Path) -> None:
    """The same, where it hurts: in the directory at the end of the archive."""
    path = save(tmp_path / "pytorch_model.bin", STATE)
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    path.write_bytes(content[:start] + mutated(content[start:], draw))
    survives(path, CONFIG)


@given(
    seed=st.integers(0, 11),
    value=st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 20240326, 7, 1 << 20]),
    length=st.integers(0, 1100),
)
@many
def test_mutated_llmc_headers(seed: int, value: int, length: int, tmp_path: Path) -> None:
    header = [20240326, 3, 4, 5, 1, 2, 4, 8, 0, 0, 0, 0]
    header[seed] = value
    content = struct.pack("<12i", *header).ljust(1024, b"\0") + bytes(4 * (32 + 16 + 192 + 52 + 8))
    path = tmp_path / "model.bin"
    path.write_bytes(content[: len(content) - length] if length < 1000 else content)
    survives(path, CONFIG)


@given(draw=seeds)
@many
def test_mutated_safetensors(draw: random.Random, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(mutated(safetensors.numpy.save(STATE), draw))
    survives(path, CONFIG)


JSON_PIECES = [
    "{",
    "}",
    "[",
    "]",
    '"',
    "null",
    "1e999",
    "NaN",
    "-1",
    '"../x"',
    "0",
    ",",
    ":",
    "\\ud800",
    "\x00",
    "é",
]


def mutated_text(text: str, draw: random.Random) -> bytes:
    """Pieces of JSON put in or over the text."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(JSON_PIECES) + text[at + draw.randrange(6) :]
    return mutated(text.encode(), draw) if draw.random() < 0.3 else text.encode()


@given(draw=seeds)
@many
def test_mutated_indexes_and_configs(draw: random.Random, tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model-00001-of-00001.bin", STATE)
    index = json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(STATE, "pytorch_model-00001-of-00001.bin")}
    )
    config = json.dumps(CONFIG)
    which = draw.randrange(3)
    (tmp_path / "config.json").write_bytes(mutated_text(config, draw) if which else config.encode())
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(
        mutated_text(index, draw) if which < 2 else index.encode()
    )
    survives(tmp_path)


@given(draw=seeds)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=5000)
def test_mutated_vocabularies(draw: random.Random, tmp_path: Path) -> None:
    vocab = (SHAKESPEARE / "vocab.json").read_text(encoding="utf-8")
    merges = (SHAKESPEARE / "merges.txt").read_text(encoding="utf-8")
    which = draw.randrange(3)
    (tmp_path / "vocab.json").write_bytes(mutated_text(vocab, draw) if which else vocab.encode())
    (tmp_path / "merges.txt").write_bytes(mutated_text(merges, draw) if which < 2 else merges.encode())
    try:
        encoding = load_tokenizer(tmp_path, 1024)
    except (ValueError, FileNotFoundError) as error:
        assert "vocab.json" in str(error) or "merges.txt" in str(error)
        return
    assert encoding is not None
    text = "Thou art ¿ \x00 日 a\n\n  b"
    assert encoding.decode(encoding.encode(text, disallowed_special=())) == text


@pytest.mark.parametrize("name", ["pytorch_bin", "nanogpt_ckpt", "textbook_pth", "llmc_fp32", "llmc_bf16"])
def test_cut_off_files(name: str, tmp_path: Path) -> None:
    """A download that stopped: whatever its length, it is refused."""
    for file in CASES[name].iterdir():
        if file.suffix != ".npz":
            shutil.copy(file, tmp_path)
    weights = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    content = weights.read_bytes()
    assert survives(tmp_path)
    for length in [
        0,
        1,
        3,
        4,
        15,
        100,
        1023,
        1024,
        *range(2000, len(content), len(content) // 40),
        len(content) - 1,
    ]:
        weights.write_bytes(content[:length])
        assert not survives(tmp_path), length


# ---- shapes of files that the mutations hardly reach


def zip_with(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    """An archive whose end record, at the given place, was changed."""
    save(path, STATE)
    content = bytearray(path.read_bytes())
    change(content, content.rindex(b"PK\x05\x06"))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("field", "value"), [(12, 0xFFFFFFFE), (12, 0), (16, 0xFFFFFFFE), (16, 0)])
def test_directories_that_lie(field: int, value: int, tmp_path: Path) -> None:
    def change(content: bytearray, end: int) -> None:
        struct.pack_into("<I", content, end + field, value)

    assert not survives(zip_with(tmp_path / "a.pt", change), CONFIG)


def test_wide_end_records_that_lie(tmp_path: Path) -> None:
    for offset in (0, 1 << 20, (1 << 64) - 1):
        for size, start in ((0, 0), ((1 << 64) - 1, 0), (46, (1 << 64) - 1)):
            save(tmp_path / "a.pt", STATE)
            content = (tmp_path / "a.pt").read_bytes()
            end = content.rindex(b"PK\x05\x06")
            wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, size, start)
            locator = b"PK\x06\x07" + struct.pack("<IQI", 0, offset or end, 1)
            (tmp_path / "a.pt").write_bytes(content[:end] + wide + locator + content[end:])
            assert not survives(tmp_path / "a.pt", CONFIG)


def test_a_wide_end_record_is_read(tmp_path: Path) -> None:
    """What archives over 4 GB have: sizes and offsets in 64 bits."""
    saved = Pickled(STATE)
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name, content in {
            "data.pkl": saved.bytes,
            **{f"data/{k}": v.tobytes() for k, v in saved.storages.items()},
        }.items():
            with archive.open(zipfile.ZipInfo(f"archive/{name}"), "w", force_zip64=True) as entry:
                entry.write(content)
    content = (tmp_path / "a.pt").read_bytes()
    end = content.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack_from("<HII", content, end + 10)
    wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
    short = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "a.pt").write_bytes(content[:end] + wide + locator + short)
    assert survives(tmp_path / "a.pt", CONFIG)


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    saved = Pickled(STATE)
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for _ in range(2):
            with pytest.warns(UserWarning, match="Duplicate") if archive.namelist() else nullcontext():
                archive.writestr("archive/data.pkl", saved.bytes)
    with pytest.raises(ValueError, match=r"two entries are called 'archive/data\.pkl'"):
        open_checkpoint(tmp_path / "a.pt", config=CONFIG)


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pytorch_model.bin")
    assert not survives(tmp_path / "pytorch_model.bin", CONFIG)
    assert not survives(tmp_path, CONFIG)


def test_a_sparse_file_of_a_terabyte(tmp_path: Path) -> None:
    for start in (
        b"PK\x03\x04",
        pickled(LEGACY),
        struct.pack("<8i", 20240326, 3, 4, 5, 1, 2, 4, 8),
        b"\0" * 8 + b"{",
    ):
        with (tmp_path / "model.bin").open("wb") as file:
            file.write(start)
            try:
                file.truncate(1 << 40)
            except OSError:
                pytest.skip("this file system has no sparse files of that size")
        assert not survives(tmp_path / "model.bin", CONFIG)


@pytest.mark.parametrize("key", ["x" * 1000, "0/../../etc", ""])
def test_storage_keys_are_only_names_of_entries(key: str, tmp_path: Path) -> None:
    saved = Pickled(STATE)
    content = saved.bytes.replace(plain("0"), plain(key))
    save_zip(tmp_path / "a.pt", {"data.pkl": content}, saved.storages)
    assert not survives(tmp_path / "a.pt", CONFIG)


@given(data=st.binary(max_size=200))
@settings(max_examples=1000)
def test_any_bytes_as_a_pickle(data: bytes) -> None:
    reader = PickleReader(data, {"collections OrderedDict": dict}, lambda identity: None, "file")
    try:
        reader.load()
    except ValueError as error:
        assert str(error).startswith("file: malformed or unsafe pickle: ")


def test_instructions_agree_with_pythons_own() -> None:
    """Plain data in every protocol that this reader knows is what Python's unpickler makes of it."""
    value = {
        "a": [1, -1, 255, 256, 65536, -(2**31), 2**40, -(2**100)],
        "b": (1.5, None, True, False, ("x", "é" * 300)),
    }
    value["c"] = {"deep": {"er": [[], {}, ()]}, 3: "three", "again": value["a"], "bytes": b"\x00\xff" * 200}
    for protocol in (3, 4, 5):
        content = pickle.dumps(value, protocol)
        assert PickleReader(content, {}, lambda identity: None, "file").load() == value
