"""What a command says while it works."""

from __future__ import annotations

import logging
import time

from rich.console import Console

from lowrank_lab.process import progress


def test_long_work_without_a_line_is_named(monkeypatch, caplog):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    with progress.never_silent(), progress.doing("calibration"), progress.doing("reading texts"):
        time.sleep(0.3)
    assert "reading texts: 0 s so far" in caplog.text
    assert "calibration" not in caplog.text  # the innermost work is what takes the time
    caplog.clear()
    time.sleep(0.1)
    assert caplog.text == ""  # nothing is told of work that is over


def test_the_time_left_of_a_grid_is_that_of_the_cells_to_compute(monkeypatch, caplog):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    with progress.grid(3):
        for seconds in (60, 120, 30):
            now += seconds
            progress.cell_done()
    assert caplog.messages == ["grid: cell 1/3, about 0:02:00 left", "grid: cell 2/3, about 0:01:30 left"]


def test_the_bar_of_a_grid_names_the_cell(monkeypatch):
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    console = Console(force_terminal=True, width=120, record=True, quiet=True)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with progress.grid(2):
        progress.cell_starts("svdllm ratio=0.6 tiny-llama wikitext2")
        with progress.doing("model loading"):
            [grid, loading] = progress._bars.tasks
            assert (grid.description, grid.total) == ("svdllm ratio=0.6 tiny-llama wikitext2", 2)
            assert loading.description == "model loading"
        progress.cell_done()
        assert progress._bars.tasks[0].completed == 1


def test_a_grid_counts_what_it_computes_and_repeats_no_command(lab):
    lab.cli("method=dense")
    done = lab.cli("-m", "method=dense,svd", "ratio=0.8,0.6")
    assert "4 cells, 2 finished already" in done.stderr
    assert "grid: cell 1/2, about" in done.stderr and "cell 2/" not in done.stderr
    assert "loading tiny-llama" in done.stderr
    assert "calibration.samples" not in done.stderr
