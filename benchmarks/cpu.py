"""Everything that is measured on a CPU, one after another: attention, append, compression, a model end to end.

    python benchmarks/cpu.py

The tables come as they are measured, all goals in one table at the end. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Goal, show_goals

PARTS = ("cpu_attention.py", "cpu_compress.py", "cpu_model.py")


def main() -> int:
    """Run the parts, each in a process of its own, so that none inherits the memory of another."""
    helps = ", ".join(f"python benchmarks/{part} --help" for part in PARTS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Each part has options of its own: {helps}",
    )
    parser.parse_args()
    here, goals = Path(__file__).resolve().parent, []
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            print(f"\n== {part}", flush=True)
            written = Path(folder) / f"{part}.json"
            command = [sys.executable, str(here / part), "--json", str(written)]
            if status := subprocess.run(command, check=False).returncode:
                return status
            goals += [Goal(**goal) for goal in json.loads(written.read_text())["goals"]]
    print(flush=True)
    show_goals(goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
