"""The dry runs shown in docs/launch.md.

    python -m tests.tpu_scripts.document            writes them into the document
    python -m tests.tpu_scripts.document --check    fails if the document shows something else

A block begins with `<!-- shown: COMMAND -->` and ends with `<!-- end -->`; what stands between is
what COMMAND prints with the example settings, for commit 0123456789ab of a user at /home/me.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tpu_scripts.stand_ins import ROOT, SETTINGS, Machine

DOCUMENT = ROOT / "docs" / "launch.md"
_BLOCK = re.compile(r"(<!-- shown: ([^\n]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def rendered(text: str) -> str:
    """The document with every block as its command prints it today."""
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder))
        environment = {**machine.environment(), "XDG_CACHE_HOME": "/home/me/.cache"}

        def block(match: re.Match[str]) -> str:
            script, *words = shlex.split(match[2])
            assert "--dry-run" in words, f"{match[2]}: only dry runs are shown"
            output = subprocess.run(
                [ROOT / script, *words, "--settings", SETTINGS],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            return f"{match[1]}```console\n$ {match[2]}\n{output}```\n{match[3]}"

        return _BLOCK.sub(block, text)


def main() -> int:
    """Write or check; the exit code."""
    text = DOCUMENT.read_text(encoding="utf-8")
    new = rendered(text)
    if sys.argv[1:] == ["--check"]:
        if new != text:
            print("docs/launch.md is not up to date: run python -m tests.tpu_scripts.document")
        return int(new != text)
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
