"""Run the suite and keep its counts: passed, failed and skipped tests, as unittest counted them, and what failed."""

from __future__ import annotations

import json
import os
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run() -> int:
    """Run all tests, or those of the modules that the command line names; return the exit code."""
    sys.path.insert(0, str(ROOT))
    suite = (
        unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
        if sys.argv[1:]
        else unittest.defaultTestLoader.discover(str(ROOT / "tests"), top_level_dir=str(ROOT))
    )
    result = unittest.TextTestRunner(verbosity=2 if sys.argv[1:] else 1).run(suite)
    # A test whose subtests failed in several places is one failed test.
    broken = {case.id().partition(" ")[0] for case, _ in result.failures + result.errors}
    failed, skipped = len(broken) + len(result.unexpectedSuccesses), len(result.skipped)
    for case, reason in result.skipped:
        print(f"skipped: {case.id()}: {reason}")
    with open(os.environ["EMBEDGEN_TEST_COUNTS"], "a", encoding="ascii") as counts:
        faults = [
            f"{case.id()} ({sys.platform}, Python {sys.version.split()[0]})\n{trace}"
            for case, trace in result.failures + result.errors
        ]
        print(json.dumps([[result.testsRun - failed - skipped, failed, skipped], faults]), file=counts)
    forbidden = skipped and os.environ.get("EMBEDGEN_TEST_NO_SKIPS") == "1"
    if os.name == "nt":
        from tests.support import SKIPPED_ON_WINDOWS

        forbidden = not SKIPPED_ON_WINDOWS.keys() >= {reason for _, reason in result.skipped}
    if forbidden:
        print("What was skipped may not be skipped in this run.")
    return 1 if failed or forbidden or not result.testsRun else 0


def sum_up(path: str, other_failures: bool) -> int:
    """Print once more what failed, and the sum of all runs' counts on one line; return the exit code."""
    runs = [json.loads(line) for line in Path(path).read_text("ascii").splitlines()]
    passed, failed, skipped = (sum(column) for column in zip(*(counts for counts, _ in runs)))
    for fault in [fault for _, faults in runs for fault in faults]:
        print(f"*** {fault}")
    if other_failures:
        print("A step failed; see the lines that begin with ***.")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or other_failures else 0


if __name__ == "__main__":
    sys.exit(sum_up(sys.argv[2], sys.argv[3] != "0") if sys.argv[1:2] == ["--sum"] else run())
