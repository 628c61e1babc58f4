"""`python -m tests.faults.soak --minutes N --seed S [--seeds K]`: long runs, and a table of them.

Exit status 1: something was not as it should be, or what has to be hit was hit in none of several seeds. The
folder that is named then has the plan, the promises and all logs of that seed, and `--plan` prints a seed's
plan without running it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# Before anything imports ray or grpc.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from scheduler.logs import configure_logs
from scheduler.policy.auditing.findings import Bound
from tests.faults.checks import FAIRNESS, Wrong
from tests.faults.counters import REQUIRED, Sometimes
from tests.faults.plan import Kind, plan_of
from tests.faults.run import Report, run
from tests.faults.stage import DRAWING, PLAIN

_SHORTEST_S = 60.0


def main() -> None:
    """Run one seed after the other."""
    arguments = _arguments()
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    span_s = max(_SHORTEST_S, 60 * arguments.minutes / len(seeds))
    if arguments.plan:
        for seed in seeds:
            print(f"seed {seed}, {span_s:.0f} s")
            print("\n".join(map(str, plan_of(seed, span_ms=round(1000 * span_s)))))
        return
    # Of the sweeps that this process does itself.
    configure_logs("error")
    reports = []
    for seed in seeds:
        folder = arguments.logs / f"seed-{seed}"
        try:
            report = asyncio.run(_one(seed, span_s, arguments.engine, folder))
        except (asyncio.CancelledError, KeyboardInterrupt):
            sys.exit(f"interrupted in seed {seed}; whatever it had started is ended")
        except Exception as failure:
            # Such as a service that did not come up again: a finding, and no reason to end the other seeds.
            traceback.print_exc()
            report = Report(seed=seed, findings=(Wrong(sentence=f"the run failed: {failure!r}"),))
        reports.append(report)
        for finding in report.findings:
            print(f"seed {seed}: {finding}", file=sys.stderr)
        if report.findings:
            print(f"seed {seed}: its faults, promises and logs are in {folder}", file=sys.stderr)
        print(table(reports), flush=True)
    # One seed is too short for everything that is rare.
    proves_little = len(reports) > 1 and never(reports)
    sys.exit(1 if proves_little or any(report.findings for report in reports) else 0)


async def _one(seed: int, span_s: float, engine: str, folder: Path) -> Report:
    # SIGTERM ends a run as SIGINT does: everything that was started is ended.
    main_task = asyncio.current_task()
    assert main_task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main_task.cancel)
    scene = DRAWING if engine == "diffusers" else PLAIN
    plan = plan_of(seed, span_ms=round(1000 * span_s))
    return await run(plan, seed=seed, span_s=span_s, scene=scene, keep_in=folder)


def table(reports: Sequence[Report]) -> str:
    """Return a line for each seed, what struck and what happened in all of them, and what never did."""
    lines = [
        "seed  faults  promised  ended  doubled  recovery s  standstill s  worst wait s  orphans  findings"
    ]
    lines += [
        f"{one.seed:4}  {one.faults.total():6}  {one.promised:8}  {one.ended:5}  {one.doubled:7}  "
        f"{one.recovery_s:10.1f}  {one.standstill_s:12.1f}  {one.wait_s:12.1f}  {one.orphans:7}  "
        f"{len(one.findings):8}"
        for one in reports
    ]
    faults = sum((one.faults for one in reports), Counter[Kind]())
    counters = sum((one.counters for one in reports), Counter[Sometimes]())
    refused = sum((one.refused for one in reports), Counter[str]())
    lines.append("struck: " + ", ".join(f"{kind} {faults[kind]}" for kind in Kind))
    lines.append("sometimes: " + ", ".join(f"{what} {counters[what]}" for what in Sometimes))
    cases = sum((one.cases for one in reports), Counter[Bound]())
    lines.append("cases of bounds: " + ", ".join(f"{bound} {cases[bound]}" for bound in FAIRNESS))
    lines.append("refused: " + ", ".join(f"{reason} {times}" for reason, times in sorted(refused.items())))
    if missed := never(reports):
        lines.append("never: " + ", ".join(missed))
    return "\n".join(lines)


def never(reports: Sequence[Report]) -> list[str]:
    """Return what no run proved anything of: kinds of faults, rare things, and bounds without any case."""
    return [
        *[kind for kind in Kind if not any(one.faults[kind] for one in reports)],
        *[what for what in REQUIRED if not any(one.counters[what] for one in reports)],
        *[bound for bound in FAIRNESS if not any(one.cases[bound] for one in reports)],
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of faults, of all seeds together")
    parser.add_argument("--seed", type=int, default=1, help="the first")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other")
    parser.add_argument("--engine", choices=("timed", "diffusers"), default="timed")
    parser.add_argument("--plan", action="store_true", help="print the plans and run nothing")
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path(tempfile.gettempdir()) / "darkroom-faults",
        help="where logs are kept",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
