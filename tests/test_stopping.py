"""A signal that a library loses, or turns into another error, still stops the work."""

import os
import signal
import sys

import pytest

from lowrank_lab.process import progress, stopping


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(stopping, "_received", None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the handler sets it
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stopping.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def lose(number: signal.Signals) -> None:
    """Do as a library that catches everything."""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_loop_finds_a_lost_signal(installed, number, status):
    tracked = iter(progress.track([1, 2, 3], "test", "items"))
    next(tracked)
    lose(number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        next(tracked)
    assert stopping.exit_status(stopped.value) == status


def test_an_error_that_follows_a_signal_is_the_signal(installed):
    def fail() -> None:
        with stopping.heeded():
            raise AttributeError("what a broken state brings about")

    with pytest.raises(AttributeError):
        fail()
    lose(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        fail()


def test_a_signal_in_a_destructor_leaves_no_traceback(installed, capsys):
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    Dying()
    with pytest.raises(KeyboardInterrupt):
        stopping.check()
    assert os.environ["HYDRA_FULL_ERROR"] == "1"
    assert "Traceback" not in capsys.readouterr().err
