"""Numbered parts: each is done once, by whoever comes to it, and only for the evaluation that they belong to."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from esolm_megatron.config import ConfigError
from esolm_megatron.evaluation.shares import shared


class Squares:
    """Counts who did what; dies at a part."""

    def __init__(self, count=7, dies_at=None):
        self.count, self.tokens, self.dies_at, self.done = count, count, dies_at, []

    def prepare(self):
        self.prepared = getattr(self, "prepared", 0) + 1

    def part(self, number):
        if number == self.dies_at:
            raise KeyboardInterrupt
        self.done.append(number)
        return {"square": [number**2], "float": number / 3}


WANTED = [{"square": [n**2], "float": n / 3} for n in range(7)]


def test_without_a_folder_it_is_done_here():
    told = []
    assert shared(Squares(), progress=lambda *x: told.append(x)) == WANTED
    assert told == [(n, 7) for n in range(7)]
    with pytest.raises(ConfigError, match="give out=FOLDER"):
        shared(Squares(), size=2)


def test_what_is_done_is_not_done_again(tmp_path):
    first = Squares(dies_at=4)
    with pytest.raises(KeyboardInterrupt):
        shared(first, tmp_path, {"seed": 1})
    assert first.done == [0, 1, 2, 3]
    (tmp_path / "parts" / "0000005.json.77.new").write_text("{half of")  # as a kill leaves it
    (tmp_path / "parts" / "0000002.json").write_text("[cut")
    with pytest.raises(ConfigError, match="0000002.json: is not whole .*; delete it"):
        shared(Squares(), tmp_path, {"seed": 1})
    (tmp_path / "parts" / "0000002.json").unlink()
    for number in (4, 5, 6):
        (tmp_path / "parts" / f"{number:07}.json").unlink()
    second, told = Squares(), []
    assert shared(second, tmp_path, {"seed": 1}, progress=lambda *x: told.append(x)) == WANTED
    assert second.done == [2, 4, 5, 6]
    assert (told[0], told[-1]) == ((3, 7), (7, 7))
    third = Squares(dies_at=0)
    assert shared(third, tmp_path, {"seed": 1}) == WANTED
    assert (second.prepared, hasattr(third, "prepared")) == (1, False), "nothing is prepared for nothing"
    for settings, said in (
        ({"seed": 2}, "seed = 1, now 2"),
        ({"seed": 1, "orders": 3}, "orders = None, now 3"),
        ({}, "seed = 1, now None"),
    ):
        with pytest.raises(ConfigError, match=said):
            shared(Squares(), tmp_path, settings)


def test_processes_share_and_the_first_puts_together(tmp_path):
    jobs = [Squares(), Squares(), Squares()]
    with ThreadPoolExecutor(3) as pool:
        works = [pool.submit(shared, jobs[rank], tmp_path, {"seed": 1}, rank=rank, size=3) for rank in range(3)]
        found = [work.result(timeout=60) for work in works[::-1]]  # the first waits for the others
    assert [job.done for job in jobs] == [[0, 3, 6], [1, 4], [2, 5]]
    assert found == [None, None, WANTED]
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 1}
    assert shared(Squares(dies_at=0), tmp_path, {"seed": 1}, rank=0, size=2) == WANTED, "another number of processes"


def test_many_begin_at_once(tmp_path):
    for number in range(20):
        with ThreadPoolExecutor(8) as pool:
            works = [pool.submit(shared, Squares(), tmp_path / str(number), {"seed": 1}) for _ in range(8)]
            assert [work.result(timeout=60) for work in works] == [WANTED] * 8, "each does what it does not find"
