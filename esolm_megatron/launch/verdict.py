"""Why the ranks of a start ended, from what they left behind: ended.json, each rank's last words, and what srun saw."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from esolm_megatron.launch.executor import Machine
from esolm_megatron.launch.record import Cause
from esolm_megatron.train import ending
from esolm_megatron.train.ending import Ending

_DEAD = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+)$", re.MULTILINE)
_CONSEQUENCE = re.compile(
    r"onnection (was )?(closed|reset|refused)|roken pipe|closed by peer|remote process|[Tt]imed out|DistNetworkError"
)
_NODE_FAILURE = re.compile(r"(?i)node failure")
_OUT_OF_MEMORY = re.compile(r"(?i)out.?of.?memory|can('|no)t allocate memory")
_DIFFERS = re.compile(r"ranks? ([\d, ]+?) differ")


def marker(run_dir: Path) -> dict[str, Any]:
    """ended.json; empty where there is none."""
    return ending.read(run_dir) or {}


def failures(logs: Path) -> list[dict[str, Any]]:
    """Last words of the ranks that had an error, in the order of time."""
    found = [json.loads(path.read_text()) for path in logs.glob("failed_rank_*.json")]
    return sorted(found, key=lambda words: words["time"])


def dead_ranks(logs: Path) -> list[tuple[str, str, str]]:
    """(node, ranks, what became of them) as srun saw it, in the order of time."""
    path = logs / "rank.txt"
    return _DEAD.findall(path.read_text(errors="replace")) if path.exists() else []


def cause(run_dir: Path, logs: Path, machine: Machine, status: int, step: int) -> Cause:
    """How a start ended that began at checkpoint `step`; status: srun's."""
    said, words, dead = marker(run_dir), failures(logs), dead_ranks(logs)
    how = str(said.get("how", "running")).upper()
    known = Ending[how] if how in Ending.__members__ else None
    if known in (Ending.FINISHED, Ending.STOPPED):
        return Cause(known, said.get("detail", ""))
    bad = [w for w in words if w["code"] == Ending.BAD_CONFIG]
    if bad:
        return Cause(Ending.BAD_CONFIG, _line(bad[0]), hopeless=True)
    fresh = step == 0 and not (run_dir / "metrics.jsonl").exists()  # never a step made: the next start meets the same
    for text in [*map(_line, words), *(f"rank {r} on {node}: {what}" for node, r, what in dead)]:
        if _OUT_OF_MEMORY.search(text):
            more = "; lower train.micro_batch_size or raise parallel.recompute: esolm plan" if fresh else ""
            return Cause(Ending.FAILED, text + more, hopeless=fresh)
    if known == Ending.BAD_NUMBERS:
        return Cause(known, said.get("detail", ""), hopeless=True)
    if known == Ending.CORRUPTED:
        odd = {int(r) for listed in _DIFFERS.findall(said["detail"]) for r in listed.split(",")}
        return Cause(known, said["detail"], tuple(sorted({machine.host_of(r) for r in odd})))
    if known == Ending.HUNG:
        return Cause(known, said["detail"])
    if status == Ending.HUNG or any(f"exit code {int(Ending.HUNG)}" in what for _, _, what in dead):
        return Cause(Ending.HUNG, ending.LOCKED)  # no rank could say so itself
    first = [w for w in words if not _CONSEQUENCE.search(w["error"])]
    if first:
        return Cause(Ending.FAILED, _line(first[0]))
    if dead and all(f"exit code {int(Ending.STOPPED)}" in what for _, _, what in dead[:1]):
        return Cause(Ending.STOPPED, "a signal came before the first step")
    spoke = {w["rank"] for w in words}
    for node, ranks, what in dead:  # those that had last words died of the silent one
        if "exit code" not in what and not (ranks.isdigit() and int(ranks) in spoke):
            return Cause(Ending.KILLED, f"rank {ranks} on {node}: {what}")
    if machine.told:
        return Cause(Ending.STOPPED, f"{machine.told} came, and the ranks had no time to save")
    log = logs / "rank.txt"
    if log.exists() and _NODE_FAILURE.search(log.read_text(errors="replace")):
        return Cause(Ending.KILLED, "a node failed")
    if words:
        return Cause(Ending.FAILED, _line(words[0]))
    told = f"rank {dead[0][1]} on {dead[0][0]}: {dead[0][2]}" if dead else f"srun ended with {status}"
    return Cause(Ending.FAILED, f"{told}; see {logs}")


def _line(words: dict[str, Any]) -> str:
    return f"rank {words['rank']} on {words['host']}: {words['error']}"
