"""Why a start ended, from the words that ranks, srun and the marker left; each case was seen on a cluster, or must be foreseen."""

from types import SimpleNamespace

import pytest

from esolm_megatron.launch import verdict
from esolm_megatron.launch.record import Record, failure_file, fruitless, starts
from esolm_megatron.train.ending import Ending, mark, mark_running, write_json

PEER = "RuntimeError: Connection closed by peer [127.0.0.1]:4242"


def judged(tmp_path, *, words=(), srun="", how=None, told="", step=0):
    """The cause, from (rank, code, error) of ranks that spoke, srun's words, and how ended.json says it ended."""
    logs = tmp_path / "logs" / "1.0"
    for number, (rank, code, error) in enumerate(words):
        write_json(
            failure_file(logs, rank), {"rank": rank, "host": f"n{rank}", "code": code, "error": error, "time": number}
        )
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "rank.txt").write_text(srun)
    mark(tmp_path, how, 7, "rank 1 differs from ranks 0, 2") if how is not None else mark_running(tmp_path, 7)
    return verdict.cause(tmp_path, logs, SimpleNamespace(told=told, host_of="abc".__getitem__), 1, step)


def test_the_dead_rank_is_the_cause_and_not_its_peers(tmp_path):
    srun = "srun: error: n0: task 0: Exited with exit code 1\nsrun: error: n1: task 1: Killed\n"
    found = judged(tmp_path, words=[(0, 1, PEER)], srun=srun)
    assert (found.ending, found.detail) == (Ending.KILLED, "rank 1 on n1: Killed")


def test_the_rank_that_failed_is_the_cause_and_not_those_that_srun_killed(tmp_path):
    srun = "srun: error: n2: task 2: Exited with exit code 1\nsrun: error: n0: tasks 0-1: Killed\n"
    found = judged(tmp_path, words=[(0, 1, PEER), (2, 1, "ZeroDivisionError: x")], srun=srun, how=Ending.FAILED)
    assert (found.ending, found.hopeless, found.detail) == (Ending.FAILED, False, "rank 2 on n2: ZeroDivisionError: x")


@pytest.mark.parametrize("made_a_step", [False, True])
def test_out_of_memory_is_hopeless_only_before_the_first_step(tmp_path, made_a_step):
    if made_a_step:
        (tmp_path / "metrics.jsonl").write_text("{}\n")
    found = judged(tmp_path, words=[(1, 1, "OutOfMemoryError: CUDA out of memory"), (0, 1, PEER)])
    assert (found.ending, found.hopeless) == (Ending.FAILED, not made_a_step)
    assert ("micro_batch_size" in found.detail) is not made_a_step


def test_bad_input_is_hopeless(tmp_path):
    found = judged(tmp_path, words=[(0, 1, PEER), (1, 2, "data.path = x: is gone")])
    assert (found.ending, found.hopeless, found.detail) == (
        Ending.BAD_CONFIG,
        True,
        "rank 1 on n1: data.path = x: is gone",
    )


def test_a_rank_with_other_weights_costs_its_node(tmp_path):
    found = judged(tmp_path, how=Ending.CORRUPTED)
    assert (found.ending, found.nodes) == (Ending.CORRUPTED, ("b",))


@pytest.mark.parametrize("how", [Ending.FINISHED, Ending.STOPPED, Ending.HUNG, Ending.BAD_NUMBERS])
def test_the_marker_is_believed(tmp_path, how):
    found = judged(tmp_path, how=how, srun="srun: error: n0: task 0: Exited with exit code 80\n")
    assert (found.ending, found.hopeless) == (how, how == Ending.BAD_NUMBERS)


def test_a_hang_that_no_rank_could_write_down_is_known_by_its_exit_code(tmp_path):
    srun = "srun: error: n1: task 3: Exited with exit code 80\nsrun: error: n0: tasks 0-2: Killed\n"
    found = judged(tmp_path, srun=srun)
    assert (found.ending, "stacks_rank" in found.detail) == (Ending.HUNG, True)


def test_a_signal_before_the_first_step_is_no_failure(tmp_path):
    assert judged(tmp_path, srun="srun: error: n0: task 0: Exited with exit code 75\n").ending == Ending.STOPPED
    assert judged(tmp_path, told="SIGTERM").ending == Ending.STOPPED


def test_only_failures_without_a_new_checkpoint_are_counted(tmp_path):
    record = Record(tmp_path)

    def start(number, step, how):
        record.write("start", launch="001", attempt=f"1.{number}", step=step, nodes=["n1"])
        if how == "preempted":
            record.write("signal", attempt=f"1.{number}", signal="SIGTERM")
        elif how != "lost":
            record.write("end", attempt=f"1.{number}", how=how, detail="", again=True)

    for number, (step, how) in enumerate([(0, "killed"), (0, "failed"), (40, "hung"), (40, "preempted"), (40, "lost")]):
        start(number, step, how)
    assert fruitless(starts(record.events()), 40) == 2, "hung and lost; those at step 0 brought a checkpoint"
    assert fruitless(starts(record.events()), 80) == 0
    start(5, 40, "killed")
    assert fruitless(starts(record.events()), 40) == 3
    record.write("end", attempt="1.5", how="killed", detail="gave up", again=False)
    start(6, 40, "killed")
    assert fruitless(starts(record.events()), 40) == 1, "someone has started it again after it gave up"
    (tmp_path / "jobs.jsonl").open("a").write('{"event": "en')
    assert len(starts(record.events())) == 7, "a line that a crash cut off is left out"
