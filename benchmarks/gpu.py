"""Everything that a GPU has to tell, in one go under 8 minutes; started by benchmarks/gpu.sh.

    python -m benchmarks.gpu [--output DIR] [--only STEP ...]
    python -m benchmarks.gpu --smoke          # the same steps at tiny sizes on the CPU

Each step is a process of its own with a timeout. One that fails or runs out of time is a row of the table that says so,
and the others go on. The table is printed last. DIR receives it as gpu.md and gpu.json, and the output of each step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 465.0  # seconds of all steps together
SMOKE_LIMIT = 200.0  # seconds of a step at tiny sizes, which takes about 10 on an idle machine
GRACE = 5.0  # seconds that a step which ran out of time has to end what it has started
PACKAGES = ["torch", "triton", "deepspeed", "megatron-core", "transformers"]
PACKAGES += ["flash-attn", "liger-kernel", "cut-cross-entropy"]  # optional
Rows = list[tuple[str, str]]
"""(what was measured, the figure), each a row of the table."""


@dataclass(frozen=True)
class Step:
    """One process and how its output becomes rows.

    Attributes:
        command: arguments of this interpreter.
        timeout: seconds; the step has less where less of the budget is left.
        read: output, perhaps cut off -> rows; raises where what it looks for is not there.
    """

    name: str
    command: list[str]
    timeout: float
    read: Callable[[str], Rows]


def last_json(output: str) -> Any:
    """The last JSON object that a benchmark has printed on a line of its own; a traceback may follow it."""
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


def tests_rows(output: str) -> Rows:
    """Count the tests by outcome and name the failed ones, also for a pytest that was ended before its summary."""
    ended = re.findall(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", output, re.MULTILINE)
    if not ended:
        raise ValueError("no test has ended")
    counts = Counter(how.lower() for _, how in ended)
    failed = [(f"test {how.lower()}", name) for name, how in ended if how in ("FAILED", "ERROR")]
    return [("tests", ", ".join(f"{number} {how}" for how, number in counts.items())), *failed]


def loss_rows(output: str) -> Rows:
    """Each loss with its time, rate and memory, or why it was left out."""
    found = last_json(output)
    rows = [
        (
            f"loss: {name}",
            f"{1e3 * own['seconds']:.2f} ms, {own['tflops']:.3g} TFLOP/s of 6 T V H, {own['ratio']:.2f} times the"
            f" products alone, {own['gib']:.2f} GiB",
        )
        for name, own in found["losses"].items()
    ]
    return rows + [(f"loss: {name}", f"left out: {reason}") for name, reason in found["left_out"].items()]


def layer_rows(output: str) -> Rows:
    """The layer as it is and compiled."""
    rows = []
    for name, own in last_json(output).items():
        figure = own
        if isinstance(own, dict):
            figure = f"{1e3 * own['seconds']:.2f} ms, {own['tflops']:.3g} TFLOP/s, {own['gib']:.1f} GiB"
        rows.append((f"layer: {name}", str(figure)))
    return rows


def training_rows(name: str) -> Callable[[str], Rows]:
    """Reader of a training step's figures."""

    def read(output: str) -> Rows:
        own = last_json(output)
        parts = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in own["parts"].items())
        return [
            (f"{name}: step", f"{1e3 * own['seconds']:.1f} ms ({parts}), micro-batches of {own['micro_batch']}"),
            (f"{name}: tokens/s", f"{own['tokens_per_second']:,.0f}"),
            (f"{name}: utilisation", f"{100 * own['utilisation']:.1f} % of the peak, {own['tflops']:.3g} TFLOP/s"),
            (f"{name}: peak memory", f"{own['peak_gib']:.2f} GiB, planned {own['planned_gib']:.2f}"),
        ]

    return read


def steps_of(smoke: bool) -> list[Step]:
    """The steps in their order: what is short and decides most comes first."""
    if smoke:
        tiny = ["--samples", "2", "--length", "16"]
        loss = "--tokens 64 --hidden 32 --vocabulary 500 --rounds 2 --dtype fp32 --json --candidates fused naive Liger"
        nano = ["--preset", "minicpm-nano", *tiny]
        return [
            Step("tests", ["-m", "pytest", "-vv", "tests/methods/test_decay_statistics.py"], SMOKE_LIMIT, tests_rows),
            Step("loss", ["-m", "benchmarks.fused_loss", *loss.split()], SMOKE_LIMIT, loss_rows),
            Step(
                "layer", ["-m", "benchmarks.gpu_layer", *nano, "--rounds", "2", "--no-compile"], SMOKE_LIMIT, layer_rows
            ),
            Step("nano", ["-m", "benchmarks.gpu_training", *nano, "--steps", "2"], SMOKE_LIMIT, training_rows("nano")),
        ]
    loss = "--device cuda --tokens 32768 --hidden 2304 --vocabulary 122753 --rounds 7 --json --candidates"
    peers = ["fused", "fused, mean outside", "naive", "Liger", "cut-cross-entropy cce", "torch linear_cross_entropy"]
    names = ("triton", "attention", "device", "labels", "generation", "memory", "zero_stages", "resume")
    tests = ["-m", "pytest", "-vv", "-rs", "--tb=short", "--device", "cuda"]
    tests += [f"tests/cuda/test_{name}.py" for name in names]  # resume last: it starts nine processes
    train = ["-m", "benchmarks.gpu_training", "--device", "cuda", "--preset"]
    return [
        Step("0.1B", [*train, "windtunnel-0.1b", "--steps", "20"], 75, training_rows("0.1B")),
        Step("2.4B", [*train, "minicpm-2.4b", "--steps", "8"], 100, training_rows("2.4B")),
        Step("loss", ["-m", "benchmarks.fused_loss", *loss.split(), *peers], 90, loss_rows),
        Step("layer", ["-m", "benchmarks.gpu_layer", "--device", "cuda"], 75, layer_rows),
        Step("tests", tests, 240, tests_rows),
    ]


def run(step: Step, seconds: float, log: Path) -> tuple[Rows, str]:
    """The rows of a step and how it ended: "ok", or what went wrong."""
    if seconds < 5:
        return [], "left out: the budget was spent"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ending = "ok"
        try:
            status = process.wait(seconds)
            if status:
                ending = f"exit status {status}: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            ending = f"ran past {seconds:.0f} s: {_last_line(log)}"
            # lets pytest end the ranks that it has started in sessions of their own
            _end(process, signal.SIGINT, GRACE)
        finally:
            _end(process, signal.SIGKILL, None)
    try:
        rows = step.read(log.read_text(errors="replace"))
    except (ValueError, LookupError, TypeError) as error:
        rows = []
        ending = f"output not understood ({error}): {_last_line(log)}" if ending == "ok" else ending
    return rows, ending


def _end(process: subprocess.Popen[bytes], number: signal.Signals, patience: float | None) -> None:
    """Send a signal to a process and all in its session, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"


def environment() -> Rows:
    """Versions, the card as its driver knows it, and what of the environment changes results."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    rows = [("versions", f"Python {sys.version.split()[0]}, {', '.join(versions)}"), ("card", _card())]
    settings = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS")
    given = [f"{name}={os.environ[name]}" for name in settings if name in os.environ]
    return [*rows, ("environment", " ".join(given) or "nothing set")]


def _card() -> str:
    query = "name,memory.total,driver_version,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none that nvidia-smi knows"
    return done.stdout.strip().replace("\n", "; ") or "none that nvidia-smi knows"


def table(rows: Rows) -> Iterator[str]:
    """Markdown."""
    yield "| what | figure |"
    yield "| --- | --- |"
    for what, figure in rows:
        yield f"| {what} | {figure.replace('|', '/')} |"


def main() -> int:
    """Run the steps and print the table; status 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: whether the steps work at all")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the table and all output go")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    given = parser.parse_args()
    if given.smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    steps = [step for step in steps_of(given.smoke) if not given.only or step.name in given.only]
    if not steps:
        parser.error(f"--only: choose of {', '.join(step.name for step in steps_of(given.smoke))}")
    began = time.monotonic()
    rows, endings = environment(), {}
    print("\n".join(f"{what}: {figure}" for what, figure in rows), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for step in steps:
            started = time.monotonic()
            left = min(step.timeout, BUDGET - (started - began))
            log = Path(scratch) / f"{step.name}.log"
            log.touch()
            found, ending = run(step, left, log)
            endings[step.name] = ending
            took = time.monotonic() - started
            print(f"== {step.name}: {ending} ({took:.0f} s)", flush=True)
            rows += found if ending == "ok" else [*found, (step.name, ending)]
            if given.output is not None:
                given.output.mkdir(parents=True, exist_ok=True)
                shutil.copy(log, given.output)
    rows.append(("all steps", f"{time.monotonic() - began:.0f} s"))
    lines = "\n".join(table(rows))
    print(f"\n{lines}")
    if given.output is not None:
        (given.output / "gpu.md").write_text(f"{lines}\n", encoding="utf-8")
        (given.output / "gpu.json").write_text(json.dumps({"rows": rows, "steps": endings}, indent=1), encoding="utf-8")
    return int(any(ending != "ok" for ending in endings.values()))


if __name__ == "__main__":
    sys.exit(main())
