"""The command line, through processes of its own: what a shell user sees."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import gpt2rs
from golden_cases import CASES
from gpt2rs.bench import Work, decode_bytes, prefill_flops

COMMAND = [sys.executable, "-m", "gpt2rs.cli"]
# Long enough that nobody waits for its end: every token past the context recomputes the whole window.
ENDLESS = [
    "generate",
    "--context-overflow",
    "slide",
    "--max-new-tokens",
    "100000",
    "--eos-token-id",
    "none",
    "ROMEO:",
]
PROMPT = "ROMEO:\nWhat light"


def run(
    *arguments: str | bytes, given: str | bytes | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end; `given` is what standard input holds."""
    data = given.encode() if isinstance(given, str) else given
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=b"" if data is None else data,
        capture_output=True,
        env={**os.environ, **(env or {})},
        timeout=300,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def output(*arguments: str | bytes, given: str | bytes | None = None) -> str:
    """What a run that goes well prints, and nothing on stderr."""
    done = run(*arguments, given=given)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def error(*arguments: str | bytes, given: str | bytes | None = None) -> str:
    """The one line of a run that fails by its user's mistake."""
    done = run(*arguments, given=given)
    assert done.returncode == 1
    assert done.stderr.startswith("gpt2rs: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def ended(text: str) -> str:
    """A text as it is printed: with a newline at its end."""
    return text if text.endswith("\n") else text + "\n"


def test_help_names_the_commands_and_options() -> None:
    top = output("--help")
    for command in ("generate", "info", "score", "compare", "bench"):
        assert command in top
        assert output(command, "--help")


def test_every_setting_is_an_option() -> None:
    shown = run("generate", "--help", env={"COLUMNS": "200"}).stdout
    missing = [
        name for name in gpt2rs.Settings.__dataclass_fields__ if f"--{name.replace('_', '-')}" not in shown
    ]
    assert missing == []


def test_version() -> None:
    assert output("--version") == f"gpt2rs {gpt2rs.__version__}\n"


def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "gpt2rs", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"gpt2rs {gpt2rs.__version__}\n", "")


def test_help_loads_no_tokenizer_and_no_hub() -> None:
    code = "import sys, gpt2rs.cli; print('tiktoken' in sys.modules, 'huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


class TestGenerate:
    def test_prompt_as_an_argument(self, shakespeare: gpt2rs.GPT2) -> None:
        expected = shakespeare.generate(PROMPT, max_new_tokens=20).text
        assert output("generate", "--max-new-tokens", "20", PROMPT) == ended(expected)

    @pytest.mark.parametrize("arguments", [[], ["-"]])
    @pytest.mark.parametrize("ending", ["", "\n"])
    def test_prompt_from_standard_input(
        self, shakespeare: gpt2rs.GPT2, arguments: list[str], ending: str
    ) -> None:
        expected = shakespeare.generate(PROMPT, max_new_tokens=12).text
        assert output("generate", "--max-new-tokens", "12", *arguments, given=PROMPT + ending) == ended(
            expected
        )

    def test_only_one_newline_is_taken_off(self, shakespeare: gpt2rs.GPT2) -> None:
        expected = shakespeare.generate("ROMEO:\n", max_new_tokens=12).text
        assert output("generate", "--max-new-tokens", "12", given="ROMEO:\n\n") == ended(expected)

    @pytest.mark.parametrize("name", ["--tokens", "--ids"])
    def test_prompt_as_ids(self, shakespeare: gpt2rs.GPT2, name: str) -> None:
        assert shakespeare.tokenizer is not None
        ids = shakespeare.tokenizer.encode(PROMPT)
        expected = shakespeare.generate(PROMPT, max_new_tokens=12).text
        assert output("generate", "--max-new-tokens", "12", name, ",".join(map(str, ids))) == ended(expected)

    def test_prompt_asked_for_on_a_terminal(self, shakespeare: gpt2rs.GPT2) -> None:
        terminal, theirs = pty.openpty()
        with subprocess.Popen(
            [*COMMAND, "generate", "--max-new-tokens", "12"],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stderr is not None
            assert process.stderr.read(len("Prompt: ")) == b"Prompt: "
            os.write(terminal, b"ROMEO:\n")
            shown, _ = process.communicate(timeout=300)
        os.close(theirs)
        os.close(terminal)
        assert process.returncode == 0
        assert shown.decode() == ended(shakespeare.generate("ROMEO:", max_new_tokens=12).text)

    def test_echo(self, shakespeare: gpt2rs.GPT2) -> None:
        expected = ended(PROMPT + shakespeare.generate(PROMPT, max_new_tokens=12).text)
        assert output("generate", "--echo", "--max-new-tokens", "12", PROMPT) == expected
        assert shakespeare.tokenizer is not None
        ids = " ".join(map(str, shakespeare.tokenizer.encode(PROMPT)))
        assert output("generate", "--echo", "--max-new-tokens", "12", "--tokens", ids) == expected

    @pytest.mark.parametrize(
        ("flags", "settings"),
        [
            (["--max-new-tokens", "7"], {"max_new_tokens": 7}),
            (["--stop", "zzz", "--stop", "e"], {"stop": ["zzz", "e"]}),
            (["--eos-token-id", "199,7"], {"eos_token_id": [199, 7]}),
            (["--repetition-penalty", "1.6"], {"repetition_penalty": 1.6}),
            (["--presence-penalty", "3"], {"presence_penalty": 3.0}),
            (["--frequency-penalty", "2.5"], {"frequency_penalty": 2.5}),
            (["--no-repeat-ngram-size", "1"], {"no_repeat_ngram_size": 1}),
            (["--temperature", "1.5", "--seed", "3"], {"temperature": 1.5, "seed": 3}),
            (["--do-sample", "--seed", "4"], {"do_sample": True, "seed": 4}),
            (["--top-k", "40", "--seed", "5"], {"top_k": 40, "seed": 5}),
            (["--top-p", "0.9", "--seed", "6"], {"top_p": 0.9, "seed": 6}),
            (["--min-p", "0.05", "--seed", "7"], {"min_p": 0.05, "seed": 7}),
            (["--typical-p", "0.8", "--seed", "8"], {"typical_p": 0.8, "seed": 8}),
            (["--epsilon-cutoff", "0.001", "--seed", "9"], {"epsilon_cutoff": 0.001, "seed": 9}),
            (["--eta-cutoff", "0.001", "--seed", "10"], {"eta_cutoff": 0.001, "seed": 10}),
        ],
        ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
    )
    def test_a_setting_is_the_python_setting(
        self, shakespeare: gpt2rs.GPT2, flags: list[str], settings: dict[str, Any]
    ) -> None:
        length = [] if "max_new_tokens" in settings else ["--max-new-tokens", "24"]
        result = shakespeare.generate(PROMPT, **{"max_new_tokens": 24, **settings})
        assert result.tokens != shakespeare.generate(PROMPT, max_new_tokens=24).tokens, (
            "the setting must show"
        )
        shown = json.loads(output("generate", "--json", *length, *flags, PROMPT))
        assert shown["tokens"] == result.tokens
        assert shown["text"] == result.text
        assert shown["finish_reason"] == result.finish_reason
        assert shown.get("seed") == result.seed

    def test_settings_of_single_tokens(self, shakespeare: gpt2rs.GPT2) -> None:
        first, second = shakespeare.generate(PROMPT, max_new_tokens=2).tokens
        for flags, settings in (
            (["--suppress-tokens", f"{first} {second}"], {"suppress_tokens": [first, second]}),
            (["--logit-bias", f"{first}=-50", "--logit-bias", "9=inf"], None),
            (
                ["--logit-bias", f"{first}=-inf", "--logit-bias", "9=0.5"],
                {"logit_bias": {first: -math.inf, 9: 0.5}},
            ),
            (
                ["--bad-words-ids", f"{first},{second}", "--bad-words-ids", "5"],
                {"bad_words_ids": [[first, second], [5]]},
            ),
        ):
            if settings is None:
                assert "logit_bias" in error("generate", *flags, PROMPT)
                continue
            shown = json.loads(output("generate", "--json", "--max-new-tokens", "8", *flags, PROMPT))
            assert shown["tokens"][:2] != [first, second]
            assert shown["tokens"] == shakespeare.generate(PROMPT, max_new_tokens=8, **settings).tokens

    def test_end_of_text_and_how_to_put_it_off(self, shakespeare: gpt2rs.GPT2) -> None:
        tokens = shakespeare.generate(PROMPT, max_new_tokens=6).tokens
        eos = str(tokens[3])
        shown = json.loads(
            output("generate", "--json", "--max-new-tokens", "6", "--eos-token-id", eos, PROMPT)
        )
        assert shown["finish_reason"] == "eos"
        assert shown["tokens"] == tokens[: tokens.index(tokens[3]) + 1]
        flags = ["--max-new-tokens", "6", "--min-new-tokens", "6", "--eos-token-id", eos]
        assert len(json.loads(output("generate", "--json", *flags, PROMPT))["tokens"]) == 6

    def test_several_texts(self, shakespeare: gpt2rs.GPT2) -> None:
        settings: dict[str, Any] = {"max_new_tokens": 12, "top_k": 50, "seed": 2, "num_return_sequences": 3}
        results = shakespeare.generate(PROMPT, **settings)
        flags = ["--max-new-tokens", "12", "--top-k", "50", "--seed", "2"]
        expected = "---\n".join(result.text + "\n" for result in results)
        assert output("generate", *flags, "--n", "3", PROMPT) == expected
        lines = output("generate", *flags, "--json", "--num-return-sequences", "3", PROMPT).splitlines()
        assert [json.loads(line)["tokens"] for line in lines] == [result.tokens for result in results]

    def test_json_holds_what_was_asked_for(self, shakespeare: gpt2rs.GPT2) -> None:
        flags = ["--max-new-tokens", "5", "--json", "--echo", "--top-logprobs", "3"]
        shown = json.loads(output("generate", *flags, PROMPT))
        result = shakespeare.generate(PROMPT, max_new_tokens=5, top_logprobs=3)
        assert result.top_logprobs is not None
        assert shown == {
            "prompt": PROMPT,
            "text": result.text,
            "tokens": result.tokens,
            "finish_reason": "length",
            "logprobs": result.logprobs,
            "top_logprobs": [[list(pair) for pair in top.items()] for top in result.top_logprobs],
        }

    def test_stats_go_to_stderr(self, shakespeare: gpt2rs.GPT2) -> None:
        done = run("generate", "--stats", "--max-new-tokens", "12", PROMPT)
        assert done.returncode == 0
        assert done.stdout == ended(shakespeare.generate(PROMPT, max_new_tokens=12).text)
        assert [line.split()[0] for line in done.stderr.splitlines()] == ["load", "prompt", "first", "decode"]
        assert "11 tokens" in done.stderr

    def test_several_tokens_a_pass(self, shakespeare: gpt2rs.GPT2) -> None:
        flags = [
            "--max-new-tokens",
            "90",
            "--prompt-lookup-num-tokens",
            "6",
            "--max-matching-ngram-size",
            "3",
        ]
        result = shakespeare.generate(
            PROMPT, max_new_tokens=90, prompt_lookup_num_tokens=6, max_matching_ngram_size=3
        )
        counts = result.speculation
        assert counts is not None
        assert counts.accepted > 0
        done = run("generate", "--stats", *flags, PROMPT)
        assert done.stdout == ended(shakespeare.generate(PROMPT, max_new_tokens=90).text)
        assert f"proposed {counts.proposed} tokens, {counts.accepted} accepted (" in done.stderr
        shown = json.loads(output("generate", "--json", *flags, PROMPT))
        assert shown["speculation"] == {
            "proposed": counts.proposed,
            "accepted": counts.accepted,
            "passes": counts.passes,
        }
        flags = ["--assistant-model", "shakespeare", "--num-assistant-tokens", "4", "--max-new-tokens", "9"]
        shown = json.loads(output("generate", "--json", *flags, PROMPT))
        assert shown["tokens"] == shakespeare.generate(PROMPT, max_new_tokens=9).tokens
        assert shown["speculation"]["passes"] == 8

    def test_no_tokenizer_means_ids_in_and_out(self, plain: gpt2rs.GPT2) -> None:
        tokens = plain.generate([5, 6, 7], max_new_tokens=6, eos_token_id=None).tokens
        flags = ["--model", str(CASES["plain"]), "--max-new-tokens", "6", "--eos-token-id", "none"]
        assert output("generate", *flags, "--tokens", "5,6,7").split() == list(map(str, tokens))
        shown = json.loads(output("generate", *flags, "--json", "--tokens", "5,6,7"))
        assert (shown["text"], shown["tokens"]) == (None, tokens)
        assert "tokenizer" in error("generate", *flags, "some text")

    def test_model_options(self, shakespeare: gpt2rs.GPT2, tmp_path: Path) -> None:
        shakespeare.save_pretrained(tmp_path)
        expected = (
            gpt2rs.GPT2.from_pretrained(tmp_path, dtype="float32").generate(PROMPT, max_new_tokens=9).text
        )
        flags = ["--max-new-tokens", "9", "--dtype", "float32", "--kv-dtype", "float32", "--n-threads", "1"]
        assert output("generate", "-m", str(tmp_path), *flags, PROMPT) == ended(expected)
        (tmp_path / "config.json").rename(tmp_path / "shape.json")
        assert "config" in error("generate", "-m", str(tmp_path), *flags, PROMPT)
        config = str(tmp_path / "shape.json")
        assert output("generate", "-m", str(tmp_path), "--config", config, *flags, PROMPT) == ended(expected)


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["generate", "--temperature", "-1", "x"], "temperature"),
            (["generate", "--top-p", "1.5", "x"], "top_p"),
            (["generate", "--context-overflow", "wrap", "x"], "context_overflow"),
            (["generate", "--max-new-tokens", "5000", "x"], "max_new_tokens"),
            (["generate", "--n", "2", "x"], "num_return_sequences"),
            (["generate", "--prompt-lookup-num-tokens", "0", "x"], "prompt_lookup_num_tokens"),
            (["generate", "--assistant-model", str(CASES["plain"]), "x"], "assistant_model"),
            (["generate", "--dtype", "int3", "x"], "int3"),
            (["generate", "--device", "abacus", "x"], "abacus"),
            (["generate", "--n-threads", "0", "x"], "n_threads"),
            (["generate", "--tokens", "5,1024"], "1024"),
            (["generate", "--model", "./no/such/folder", "x"], "no/such/folder"),
            (["generate", ""], "empty"),
            (["generate"], "empty"),
            (["generate", b"\xff\xfe"], "UTF-8"),
            (["info", "./no/such/folder"], "no/such/folder"),
            (["score", "./no/such/file"], "no/such/file"),
            (["compare", "./no/such/file"], "no/such/file"),
            (["compare", "-", "--variants", "float32,int2"], "variant is 'int2'"),
            (["bench", "--model", "./no/such/folder"], "no/such/folder"),
        ],
    )
    def test_one_line_names_the_culprit(self, arguments: list[str | bytes], named: str) -> None:
        assert named in error(*arguments)

    def test_standard_input_that_is_not_text(self) -> None:
        assert "standard input is not UTF-8" in error("generate", given=b"abc\xff")
        assert "at byte 3" in error("score", "-", given=b"abc\xff")

    def test_an_unfinished_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(
            (CASES["plain"] / "model.safetensors").read_bytes()[:5000]
        )
        (tmp_path / "config.json").write_bytes((CASES["plain"] / "config.json").read_bytes())
        assert "model.safetensors" in error("generate", "--model", str(tmp_path), "--tokens", "1")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["no-such-command"],
            ["generate", "--no-such-option"],
            ["generate", "--max-new-tokens", "many", "x"],
            ["generate", "--tokens", "5,x"],
            ["generate", "--tokens", "5", "x"],
            ["generate", "--logit-bias", "5", "x"],
            ["generate", "--logprobs", "x"],
            ["bench", "--threads", "0"],
            ["score"],
            ["compare"],
        ],
    )
    def test_wrong_usage(self, arguments: list[str]) -> None:
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "Traceback" not in done.stderr

    def test_the_traceback_is_there_when_asked_for(self) -> None:
        done = run("generate", "--temperature", "-1", "x", env={"GPT2RS_DEBUG": "1"})
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert "temperature" in done.stderr

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
    def test_a_full_disk(self) -> None:
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [*COMMAND, "generate", "--max-new-tokens", "4", "ROMEO:"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=300,
                check=False,
            )
        assert done.returncode == 1
        assert done.stderr.startswith("gpt2rs: error: ")
        assert done.stderr.count("\n") == 1


class TestEndings:
    """What happens on the way to an end that is far away."""

    def start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*COMMAND, *ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        assert process.stdout is not None
        # The first bytes are here while nearly all of the text is still to come: it streams.
        assert process.stdout.read(1)
        assert process.poll() is None
        return process

    def test_a_reader_that_leaves(self) -> None:
        process = self.start()
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=120) == 141
        assert process.stderr.read() == b""

    def test_control_c(self) -> None:
        process = self.start()
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=120)
        assert (process.returncode, complaint) == (130, b"")

    def test_head(self) -> None:
        line = f"{sys.executable} -m gpt2rs.cli {' '.join(ENDLESS)} | head -n 1"
        done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=300, check=True)
        assert done.stdout.count(b"\n") == 1
        assert done.stderr == b""


class TestInfo:
    def test_json(self, shakespeare: gpt2rs.GPT2) -> None:
        facts = json.loads(output("info", "--json"))
        config = shakespeare.config
        assert facts["config"]["n_embd"] == config.n_embd == 192
        assert facts["num_parameters"] == shakespeare.num_parameters()
        assert (
            facts["num_parameters_lm_head"] == shakespeare.num_parameters() + config.n_vocab * config.n_embd
        )
        assert facts["memory_footprint"][shakespeare.dtype] == shakespeare.memory_footprint()
        assert facts["kv_cache_per_token"] == {"float32": 6 * 2 * 192 * 4, "bfloat16": 6 * 2 * 192 * 2}
        assert facts["stored_dtype"] == "bfloat16"
        assert facts["tokenizer"]["n_tokens"] == 1024

    def test_page(self) -> None:
        page = output("info", str(CASES["untied_relu_layer_scaled"]))
        assert 'activation_function = "relu"' in page
        assert "none: token ids only" in page


class TestScore:
    TEXT = "But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n"

    def test_file_and_standard_input(self, shakespeare: gpt2rs.GPT2, tmp_path: Path) -> None:
        file = tmp_path / "text"
        file.write_text(self.TEXT)
        shown = json.loads(output("score", "--json", str(file)))
        result = shakespeare.score(self.TEXT)
        assert shown["tokens"] == len(result.tokens)
        assert shown["perplexity"] == result.perplexity
        assert bits_per_byte(shakespeare, self.TEXT) == pytest.approx(shown["bits_per_byte"], rel=1e-6)
        page = output("score", "-", given=self.TEXT)
        assert f"{result.perplexity:.4f}" in page
        assert len(page.splitlines()) == 3

    def test_stride(self, shakespeare: gpt2rs.GPT2) -> None:
        text = self.TEXT * 12
        near = json.loads(output("score", "--json", "--stride", "16", "-", given=text))
        assert near["perplexity"] == shakespeare.score(text, stride=16).perplexity
        assert near["perplexity"] != shakespeare.score(text).perplexity
        assert "stride" in error("score", "--stride", "0", "-", given=text)


def bits_per_byte(model: gpt2rs.GPT2, text: str) -> float:
    """Bits per byte from the scores of the tokens, by hand."""
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(text)
    bits = sum(-float(logprob) / math.log(2) for logprob in model.score(tokens).logprobs)
    return bits / sum(len(model.tokenizer.decode_single_token_bytes(token)) for token in tokens[1:])


class TestCompare:
    TEXT = "But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n" * 3

    def test_json(self, tmp_path: Path) -> None:
        file = tmp_path / "text"
        file.write_text(self.TEXT)
        flags = ["--variants", "float32, bfloat16,float32/kv=bfloat16", "--stride", "64", "--json"]
        results = gpt2rs.compare(
            "shakespeare", self.TEXT, ["float32", "bfloat16", "float32/kv=bfloat16"], stride=64
        )
        assert json.loads(output("compare", str(file), *flags)) == [asdict(result) for result in results]

    def test_table(self) -> None:
        page = output("compare", "-", "--variants", "float32,bfloat16", given=self.TEXT)
        title, empty, head, *rows = page.splitlines()
        results = gpt2rs.compare("shakespeare", self.TEXT, ["float32", "bfloat16"])
        assert title.startswith(f"shakespeare, {results[0].n_positions} positions")
        assert empty == ""
        assert head.split("  ")[0] == "weights"
        assert len({len(line) for line in (head, *rows)}) == 1
        for row, result in zip(rows, results, strict=True):
            name, megabytes, perplexity, *_, share, percent = row.split()
            assert (name, percent) == (result.variant, "%")
            assert float(megabytes) == pytest.approx(result.weight_bytes / 1e6, abs=0.005)
            assert float(perplexity) == pytest.approx(result.perplexity, abs=5e-5)
            assert f"{result.mean_kl:.2e}" in row
            assert f"{result.max_kl:.2e}" in row
            assert float(share) == pytest.approx(100 * result.same_top, abs=0.005)


class TestBench:
    def test_json(self) -> None:
        flags = ["--model", "shakespeare", "--threads", "1", "--quick", "--json"]
        report = json.loads(output("bench", *flags))
        figures = report["figures"]
        assert [figure["dtype"] for figure in figures] == ["float32"] * 4 + ["bfloat16"] * 4
        for figure in figures:
            assert figure["n_threads"] == 1
            for of in ("tokens_per_second", "rate", "share_of_limit"):
                spread = figure[of]
                assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert {limit["unit"] for limit in report["limits"]} == {"GB/s", "GFLOP/s"}
        assert report["isa"] in ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16")

    def test_table(self) -> None:
        table = output("bench", "--model", str(CASES["plain"]), "--dtype", "float32", "--quick").splitlines()
        assert "median (minimum, maximum)" in table[0]
        assert any(
            line.startswith("float32") and "prefill 128" in line and "GFLOP/s" in line for line in table
        )
        assert any("read bandwidth" in line for line in table)

    def test_bytes_of_a_step_are_the_matrices_and_the_cache(self) -> None:
        gpt2 = gpt2rs.Config.preset("gpt2")
        # 124,439,808 parameters less 1024 x 768 position embeddings.
        assert decode_bytes(gpt2, "float32", "float32", 0) == 4 * 123_653_376
        cache = decode_bytes(gpt2, "bfloat16", "float32", 100, 8) - decode_bytes(
            gpt2, "bfloat16", "float32", 0, 8
        )
        assert cache == 8 * 100 * 12 * 2 * 768 * 4

    def test_flops_of_a_prefill_are_those_of_its_products(self) -> None:
        gpt2 = gpt2rs.Config.preset("gpt2")
        products = [(768, 3 * 768), (768, 768), (768, 4 * 768), (4 * 768, 768)]
        n = 5
        flops = 12 * sum(2 * n * k * m for k, m in products) + 2 * 768 * 50257
        # Row i attends to i + 1 positions, in 12 heads of 64: one product with the keys, one with the values.
        flops += 12 * sum(2 * 2 * 12 * 64 * (i + 1) for i in range(n))
        assert prefill_flops(gpt2, n) == flops

    @pytest.mark.parametrize("n_ctx", [16, 17, 40, 128, 256, 1024, 2048])
    @pytest.mark.parametrize("quick", [False, True])
    def test_work_fits_the_context(self, n_ctx: int, quick: bool) -> None:
        work = Work.of(n_ctx, quick=quick)
        assert all(size >= 1 for size in work)
        assert work.short + 1 + max(work.n_short, work.n_batch) <= n_ctx
        assert work.long + 1 + work.n_long <= n_ctx
        assert work.prefill <= n_ctx

    def test_work_is_the_published_one_for_gpt2(self) -> None:
        assert Work.of(1024, quick=False) == (32, 896, 128, 64, 64, 512)
        with pytest.raises(ValueError, match="n_ctx"):
            Work.of(15, quick=False)
