"""Two programs do the same work in turns, on one machine and in one run, and must come to the same result.

Every contender is a process of its own, which imports only what it needs and whose peak memory is its own. They step
one after the other, so that only one computes at a time and both meet the same machine; a time is the median over
rounds behind a warm-up step, and the warm-up step's results are what is compared, with the losses of all steps where a
row says so. The same run measures what the machine can do at most: the speed of large float32 matrix products.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llava.files import write_json

THREADS = 2
LOSS_TOLERANCE = 1e-5  # of the larger of 1 and the loss
GRADIENT_TOLERANCE = 1e-4  # of the largest gradient
GEMM_SIZE = 2048


class Contender(Protocol):
    """What a process does."""

    def step(self) -> dict[str, Any]:
        """Do the work once; the results that are compared: ``loss`` (float), ``gradients`` (name -> tensor), others
        (answers, ...) anything that can be compared with ``==``."""


Maker = Callable[[], Contender]  # picklable: a function of a module, or functools.partial of one


@dataclass(frozen=True)
class Row:
    """A line of the table: two contenders by name, and what the work is worth."""

    work: str
    against: str
    ours: str
    theirs: str
    flops: float  # useful operations of one step of ours (benchmarks/flops.py)
    same_as: str = ""  # whose results ours must be; by default theirs
    follow: bool = False  # the losses of all timed steps must be the same, too


class Timing(NamedTuple):
    """A timed step."""

    clock: float  # seconds
    processor: float  # seconds of all threads, idle loops included
    loss: float | None


class InProcess:
    """A contender in this process."""

    def __init__(self, make: Maker, threads: int | None = None) -> None:
        self.contender = make()

    def ask(self, what: str) -> Any:
        """``first`` -> results, ``step`` -> ``Timing``, ``peak`` -> bytes."""
        if what == "peak":
            return peak_memory()
        clock, processor = time.perf_counter(), time.process_time()
        results = self.contender.step()
        if what == "first":
            return plain(results)
        return Timing(time.perf_counter() - clock, time.process_time() - processor, results.get("loss"))

    def close(self) -> None:
        pass


class Worker:
    """A contender in a process of its own."""

    def __init__(self, make: Maker, threads: int = THREADS) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, threads), daemon=True)
        self.process.start()
        other.close()
        self._answer()  # built

    def ask(self, what: str) -> Any:
        self.pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            failed, answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"a contender died with exit code {self.process.exitcode}") from None
        if failed:
            raise RuntimeError(f"a contender failed:\n{answer}")
        return answer

    def close(self) -> None:
        self.pipe.close()  # its next receive ends it
        self.process.join()


def _serve(pipe: Any, make: Maker, threads: int) -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")  # deprecations of the libraries' own making
    torch.set_num_threads(threads)
    try:
        here = InProcess(make)
        pipe.send((False, None))
        while True:
            pipe.send((False, here.ask(pipe.recv())))
    except (EOFError, BrokenPipeError):  # the parent has closed its end
        pass
    except BaseException:
        pipe.send((True, traceback.format_exc()))


def plain(results: dict[str, Any]) -> dict[str, Any]:
    """Tensors as arrays, which travel through a pipe without shared memory."""
    return {
        key: {name: tensor.numpy() for name, tensor in value.items()} if key == "gradients" else value
        for key, value in results.items()
    }


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux's ``VmHWM``: ``ru_maxrss`` starts with what the parent had when it started the process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How far results are apart, as multiples of what is allowed; more than 1 is a disagreement."""
    import numpy as np

    apart: dict[str, float] = {}
    if ours.keys() != theirs.keys():
        raise ValueError(f"results {sorted(ours)} and {sorted(theirs)} cannot be compared")
    for key, mine in ours.items():
        other = theirs[key]
        if key in ("loss", "later losses"):
            off = np.abs(np.subtract(mine, other)) / np.maximum(1.0, np.abs(other))
            apart[key] = float(off.max()) / LOSS_TOLERANCE
        elif key == "gradients":
            if mine.keys() != other.keys():
                raise ValueError(f"gradients of different tensors: {sorted(mine.keys() ^ other.keys())[:4]}")
            largest = max(float(np.abs(g).max()) for g in other.values())
            worst = max(float(np.abs(mine[name] - other[name]).max()) for name in other)
            apart[key] = worst / largest / GRADIENT_TOLERANCE if largest else math.inf
        else:
            apart[key] = 0.0 if mine == other else math.inf
        if math.isnan(apart[key]):
            apart[key] = math.inf
    return apart


class MatrixProducts:
    """The machine's own speed: square float32 matrix products."""

    def __init__(self) -> None:
        import torch

        self.a, self.b = torch.randn(2, GEMM_SIZE, GEMM_SIZE)

    def step(self) -> dict[str, Any]:
        self.a @ self.b
        return {}


def run(
    contenders: dict[str, Maker],
    rows: Sequence[Row],
    rounds: int,
    threads: int = THREADS,
    in_process: bool = False,
) -> list[dict[str, Any]]:
    """Let all contenders of ``rows`` step in turns; one record a row (see ``table``)."""
    start = InProcess if in_process else Worker
    used = [name for name in contenders if any(name in (row.ours, row.theirs, row.same_as) for row in rows)]
    running: dict[str, Any] = {}
    try:
        for name in used:
            running[name] = start(contenders[name], threads)
        results = {name: running[name].ask("first") for name in used}
        products = running["matrix products"] = start(MatrixProducts, threads)
        products.ask("first")
        speeds: dict[str, list[float]] = {name: [] for name in used}
        times: dict[str, list[Timing]] = {name: [] for name in used}
        for number in range(rounds):
            for name in used:
                # Beside every step, since a shared machine's speed changes from one minute to the next.
                speeds[name].append(2 * GEMM_SIZE**3 / statistics.median(products.ask("step").clock for _ in range(5)))
                times[name].append(running[name].ask("step"))
            shown = ", ".join(f"{name} {times[name][-1].clock:.2f} s" for name in used)
            print(f"round {number + 1}/{rounds}: {shown}", file=sys.stderr, flush=True)
        peaks = {name: running[name].ask("peak") for name in used}
    finally:
        for worker in running.values():
            worker.close()
    conditions = {
        "matmul_flops": statistics.median(speed for name in used for speed in speeds[name]),
        "machine": machine(threads),
        "versions": {name: version_of(name) for name in ("torch", "transformers", "peft", "trl")},
    }
    return [_record(row, times, peaks, results) | _speed(row, times, speeds) | conditions for row in rows]


def _record(
    row: Row,
    times: dict[str, list[Timing]],
    peaks: dict[str, int],
    results: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Seconds are medians [ours, theirs]."""
    clock, processor = (
        [statistics.median(t[i] for t in times[name]) for name in (row.ours, row.theirs)] for i in (0, 1)
    )
    peak_bytes = [peaks[row.ours], peaks[row.theirs]]
    mine, other = (
        results[name] | ({"later losses": [t.loss for t in times[name]]} if row.follow else {})
        for name in (row.ours, row.same_as or row.theirs)
    )
    apart = differences(mine, other)
    return {
        "work": row.work,
        "against": row.against,
        "ratio": clock[1] / clock[0],
        "memory_ratio": peak_bytes[0] / peak_bytes[1],
        "agrees": all(value <= 1 for value in apart.values()),
        "apart": apart,
        "loss": results[row.ours].get("loss"),
        "seconds": clock,
        "processor_seconds": processor,
        "all_seconds": [[t.clock for t in times[name]] for name in (row.ours, row.theirs)],
        "peak_bytes": peak_bytes,
    }


def _speed(row: Row, times: dict[str, list[Timing]], speeds: dict[str, list[float]]) -> dict[str, Any]:
    """How much of the matrix products' speed, measured right before each step, our steps turn into useful work."""
    shares = [row.flops / t.clock / speed for t, speed in zip(times[row.ours], speeds[row.ours], strict=True)]
    return {"useful_flops": row.flops, "share_of_matmul": statistics.median(shares)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: seconds and MB of ours / theirs; a time ratio above 1 and a memory ratio below 1 are in our favour."""
    lines = [
        "| work | against | seconds ours / theirs | times faster | peak MB ours / theirs | memory | agrees "
        "| of matmul |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for r in records:
        mine, other = r["peak_bytes"]
        apart = ", ".join(f"{key} {value:.2g}" for key, value in r["apart"].items())
        lines.append(
            f"| {r['work']} | {r['against']} | {r['seconds'][0]:.2f} / {r['seconds'][1]:.2f} | {r['ratio']:.2f} | "
            f"{mine / 1e6:,.0f} / {other / 1e6:,.0f} | {r['memory_ratio']:.2f} | "
            f"{'yes' if r['agrees'] else 'NO'} ({apart}) | {r['share_of_matmul']:.0%} |"
        )
    return "\n".join(lines)


NOTES = f"""
agrees: how far results are apart as a share of what is allowed (losses {LOSS_TOLERANCE:g} of max(1, loss), gradients
{GRADIENT_TOLERANCE:g} of the largest one, anything else equal). of matmul: useful operations of our step a second over
those of {GEMM_SIZE}^3 float32 matrix products right before it (median of five). Useful are two operations a
multiply-add of: linear layers (LoRA included), attention where the mask lets through, the head where a label is
predicted, tower and connector once a picture, forward and the gradient products that what trains needs; nothing is
counted twice for being recomputed.
"""


def machine(threads: int) -> str:
    """The processor and what of it is used."""
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else None
    return f"{found[1] if found else platform.processor()}, {threads} of {os.cpu_count()} threads, float32"


def version_of(name: str) -> str | None:
    """Of an installed package."""
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def options(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="steps a contender is timed")
    parser.add_argument("--threads", type=int, default=THREADS, help="of every contender")
    parser.add_argument("--json", type=Path, help="file for the table's rows")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to see whether everything runs")
    parser.add_argument("--only", default="", help="rows whose work contains this")
    return parser


def report(records: Sequence[dict[str, Any]], json_file: Path | None) -> int:
    """Print the table, write the rows; exit code 1 where results do not agree."""
    print(table(records))
    print(NOTES)
    if records:
        peak = records[0]["matmul_flops"]
        print(f"{records[0]['machine']}; matrix products {peak / 1e9:,.0f} GFLOP/s")
    if json_file is not None:
        write_json(json_file, list(records))
    return 0 if all(record["agrees"] for record in records) else 1
