"""Signals are noted while they would cost something, and heard while a library computes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from qlora_jax.training import signals
from qlora_jax.training.signals import Stopped, StopRequest

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setattr(signals, "_abandoned", False)


@pytest.fixture
def endless():
    """Work that ends with the test, or after a minute, so that a signal that is not heard fails the test."""
    end = threading.Event()
    yield lambda: end.wait(60)
    end.set()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_noted_and_the_handlers_come_back(number):
    before = [signal.getsignal(each) for each in NUMBERS]
    with StopRequest() as stop:
        stop.check()
        send(number)
        assert stop.signal == number
        with pytest.raises(Stopped, match=f"stopped by signal {number.value} "):
            stop.check()
        with pytest.raises(Stopped):
            stop.beside(lambda: pytest.fail("nothing new is begun"))
    assert [signal.getsignal(each) for each in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_work_is_left_to_itself(number, endless):
    with StopRequest() as stop:
        threading.Timer(0.2, send, [number]).start()
        with pytest.raises(Stopped) as stopped:
            stop.beside(endless)
        assert stopped.value.signal == number


def test_work_gives_what_it_gives(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def around():
        entered.append(threading.current_thread())
        yield

    with StopRequest(around) as stop:
        assert stop.beside(lambda: (threading.current_thread(), 7)) == (entered[0], 7)
        assert entered[0] is not threading.current_thread()
        with pytest.raises(KeyError, match="lost"):
            stop.beside(lambda: {}["lost"])
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("nothing was left"))
    assert signals.leave(3) == 3


def test_a_process_with_work_left_does_not_wait_for_it(monkeypatch, endless):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopRequest() as stop:
        threading.Timer(0.1, send, [signal.SIGTERM]).start()
        with pytest.raises(Stopped):
            stop.beside(endless)
    signals.leave(143)
    assert codes == [143]


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(signal.SIGHUP)
            stop.check()
            send(signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def run(code: str) -> int:
    """The return code of a process that runs the code within a StopRequest."""
    begin = "import os, signal, time\nfrom qlora_jax.training import signals\nwith signals.StopRequest() as stop:\n"
    body = "".join(f"    {line}\n" for line in code.splitlines())
    return subprocess.run([sys.executable, "-c", begin + body], stderr=subprocess.DEVNULL, timeout=60).returncode


def test_a_second_interrupt_ends_the_process():
    twice = (
        "os.kill(os.getpid(), signal.{})\ntime.sleep(2 * signals.ECHO)\nos.kill(os.getpid(), signal.{})\nos._exit(0)"
    )
    assert run(twice.format("SIGINT", "SIGINT")) == -signal.SIGINT
    assert run(twice.format("SIGTERM", "SIGINT")) == -signal.SIGINT
    # A terminal that is closed, and `timeout`, send the same signal more than once.
    assert run(twice.format("SIGHUP", "SIGHUP")) == 0
    assert run(twice.replace("2 * signals.ECHO", "0").format("SIGINT", "SIGINT")) == 0
