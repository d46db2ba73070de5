"""Several threads, processes after fork, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gpt2rs
from golden_cases import CASES

THREADS = 8


def work(model: gpt2rs.GPT2, number: int) -> list[Any]:
    """A bit of everything, different for each number."""
    prompt = np.random.default_rng(number).integers(1, 512, 3 + 9 * number).tolist()
    session = model.session()
    session.prefill(prompt)
    fork = session.fork()
    return [
        model.generate(prompt, max_new_tokens=10, logprobs=True),
        model.generate(
            [prompt, prompt[:2]], max_new_tokens=6, temperature=1.2, seed=number, num_return_sequences=2
        ),
        session.decode(5),
        fork.decode(5, top_k=5, seed=number),
        model.logits(prompt).tobytes(),
        model.score(prompt).logprobs.tobytes(),
    ]


def test_threads_get_their_serial_answers(plain: gpt2rs.GPT2) -> None:
    serial = [work(plain, number) for number in range(THREADS)]
    together = threading.Barrier(THREADS)

    def repeat(number: int) -> list[list[Any]]:
        together.wait()
        return [work(plain, number) for _ in range(3)]

    with ThreadPoolExecutor(THREADS) as pool:
        for number, answers in enumerate(pool.map(repeat, range(THREADS))):
            assert answers == [serial[number]] * 3


def test_other_threads_run_while_the_model_computes() -> None:
    """The GIL is free during a call: a thread that counts goes on while another one computes."""
    model = gpt2rs.GPT2.from_config(
        {"n_layer": 2, "n_head": 4, "n_embd": 512, "n_positions": 1024, "vocab_size": 1000}
    )
    computing, done = threading.Event(), threading.Event()

    def compute() -> None:
        computing.set()
        model.hidden_states([1] * 1000)
        done.set()

    thread = threading.Thread(target=compute)
    # Were the GIL kept, this thread would stand still until the end, whatever the interval.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        thread.start()
        computing.wait()
        turns = 0
        while not done.is_set():
            turns += 1
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert turns > 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use() -> None:
    model = gpt2rs.GPT2.from_pretrained(CASES["plain"], n_threads=2)
    session = model.session()
    session.prefill([1, 2, 3])
    wanted = model.generate([1, 2, 3], max_new_tokens=20).tokens
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # Nothing of pytest may run on in the child, whatever happens.
        status = 1
        try:
            answers = (model.generate([1, 2, 3], max_new_tokens=20).tokens, session.decode(20))
            status = 0 if answers == (wanted, wanted) else 2
        finally:
            os.write(writing, bytes([status]))
            os._exit(status)
    os.close(writing)
    try:
        assert model.generate([1, 2, 3], max_new_tokens=20).tokens == wanted
        assert os.read(reading, 1) == b"\0"
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


INTERRUPTED = """
import os, signal, threading, time
import numpy as np, gpt2rs

model = gpt2rs.GPT2.from_config("gpt2", dtype="bfloat16")
prompt = np.random.default_rng(0).integers(0, 50257, 1000).tolist()
wanted = model.generate(prompt[:8], max_new_tokens=4).tokens
session = model.session()
session.prefill(prompt[:8])
sent = []

def interrupt():
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

delays = []
for delay in (0.02, 0.05, 0.1):
    timer = threading.Timer(delay, interrupt)
    timer.start()
    try:
        while True:  # a fast machine is through before the signal, and begins again
            model.session().prefill(prompt)
    except KeyboardInterrupt:
        delays.append(time.perf_counter() - sent.pop())
    timer.join()
assert model.generate(prompt[:8], max_new_tokens=4).tokens == wanted
assert session.decode(4) == wanted
print(max(delays))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_stops_a_prefill() -> None:
    run = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    # 0.2 s is what is promised of a quiet machine; another process may hold this one's processor for a while.
    assert float(run.stdout) < 0.2 * 5
