"""Everything that is measured on a CPU, one after another: attention, append, compression, a model end to end.

python benchmarks/cpu.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PARTS = ("cpu_attention.py", "cpu_compress.py", "cpu_model.py")


def main() -> int:
    """Run the parts, each in a process of its own, so that none inherits the memory of another."""
    if set(sys.argv[1:]) & {"-h", "--help"}:
        print(__doc__)
        print(
            "Each part has options of its own: "
            + ", ".join(f"python benchmarks/{part} --help" for part in PARTS)
        )
        return 0
    here = Path(__file__).resolve().parent
    for part in PARTS:
        print(f"\n== {part}", flush=True)
        status = subprocess.run([sys.executable, str(here / part)], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
