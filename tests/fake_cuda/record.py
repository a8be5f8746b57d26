"""Write `counts.json` and `kernels.json` anew from what runs now: `python -m tests.fake_cuda.record`."""

from __future__ import annotations

import sys

from tests.fake_cuda import launch, records


def main() -> int:
    """0 when both files are written, 2 when this machine cannot run the cases, 1 when a case fails."""
    reason = launch.missing() or launch.missing_triton()
    if reason:
        print(f"nothing is recorded: {reason}", file=sys.stderr)
        return 2
    cases = launch.run("run_models") | launch.run("run_engines")
    failed = {name: found for name, found in cases.items() if "error" in found or found["wrong"]}
    for name, found in failed.items():
        print(f"{name}: {found.get('error') or found['wrong']}", file=sys.stderr)
    if failed:
        return 1
    records.write(records.COUNTS, {name: found["counts"] for name, found in cases.items()})
    records.write(records.KERNELS, launch.run("run_kernels", shim=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
