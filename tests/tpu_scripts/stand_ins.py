"""A machine on which `gcloud`, `kubectl`, `xpk`, `docker` and `gsutil` only record their calls.

The stand-ins come first on PATH. Each appends its words, separated by NUL, to one file. What they
print and end with is given as rules; `gcloud ... ssh` and `scp` can be let through to folders that
play the hosts, so that what is sent there really runs.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "tpu_scripts" / "settings.example.env"
CLOUD = ("gcloud", "kubectl", "xpk", "docker", "gsutil")
COMMIT = "0123456789ab"

_RECORDER = r"""#!/usr/bin/env bash
shopt -s nullglob
name="${0##*/}"
printf '%s\0' "$(($# + 1))" "$name" "$@" >> "$STAND_INS/calls"
for rule in "$STAND_INS/rules"/*; do
  { read -r pattern; read -r code; read -r times; answer="$(cat)"; } < "$rule"
  [[ "$name $*" =~ $pattern ]] || continue
  if ((times == 1)); then rm "$rule"; fi
  [[ -z $answer ]] || printf '%s\n' "$answer"
  exit "$code"
done
case "$name $*" in
  gcloud*' scp '*)
    for host in "$STAND_INS"/hosts/*/; do cp "$5" "$host"; done ;;
  gcloud*' ssh '*)
    result=0
    for host in "$STAND_INS"/hosts/*/; do
      for word in "$@"; do
        [[ $word == --command=* ]] || continue
        (cd "$host" && HOME="${host%/}" bash -c "${word#--command=}") || result=$?
      done
    done
    exit "$result" ;;
esac
"""

_GIT = r"""#!/usr/bin/env bash
case "$1" in
  rev-parse) echo COMMIT ;;
  status) cat "$STAND_INS/changed" 2> /dev/null || true ;;
  archive)
    shopt -s nullglob
    printf '%s\0' "$(($# + 1))" git "$@" >> "$STAND_INS/calls"
    for word in "$@"; do
      [[ $word == --output=* ]] || continue
      (cd "$STAND_INS/code" && tar -czf "${word#--output=}" --files-from /dev/null -- *)
    done ;;
esac
""".replace("COMMIT", COMMIT)

_JAXMODS = r"""#!/usr/bin/env bash
if [[ $1 == list ]]; then
  printf '[\n {\n  "recipe": "fgclip/base_stage2"\n },\n {\n  "recipe": "fgclip/tiny"\n }\n]\n'
else
  printf '%s\0' "$(($# + 1))" jaxmods "$@" >> "$STAND_INS/calls"
  exit "${PREFLIGHT_CODE:-0}"
fi
"""


class Machine:
    """A folder with the stand-ins and a home. `run` runs a script of `tpu_scripts/` on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self._rules = 0
        for name in ("bin", "rules", "home", "hosts", "code"):
            (folder / name).mkdir()
        for name in CLOUD:
            self.program(name, _RECORDER)
        self.program("git", _GIT)
        self.program("jaxmods", _JAXMODS)
        self.answer("gcloud storage buckets describe", "True")
        self.answer("gcloud .* queued-resources describe", "ACTIVE")

    def program(self, name: str, text: str) -> None:
        """Put an executable on PATH."""
        path = self.bin / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def answer(self, pattern: str, text: str = "", *, code: int = 0, once: bool = False) -> None:
        """What calls that match the regular expression print and end with; later rules win."""
        self._rules += 1
        path = self.folder / "rules" / f"{1000 - self._rules:04d}"
        path.write_text(f"{pattern}\n{code}\n{int(once)}\n{text}", encoding="utf-8")

    def environment(self) -> dict[str, str]:
        """Environment of the scripts: nothing of the caller's but the system's programs."""
        return {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "XDG_CACHE_HOME": str(self.folder / "home" / ".cache"),
            "STAND_INS": str(self.folder),
        }

    def run(
        self, script: str, *words: str, settings: Path | None = SETTINGS, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `tpu_scripts/<script>.sh` without a terminal."""
        chosen = ["--settings", str(settings), "--poll-seconds=0"] if settings else []
        split = words.index("--") if "--" in words else len(words)
        return subprocess.run(
            [f"{ROOT}/tpu_scripts/{script}.sh", *words[:split], *chosen, *words[split:]],
            env={**self.environment(), **variables},
            cwd=self.folder / "home",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def run_in_terminal(self, answer: str, script: str, *words: str) -> int:
        """The same with a terminal as standard input, on which `answer` is typed."""
        ours, theirs = pty.openpty()
        try:
            os.write(ours, f"{answer}\n".encode())
            return subprocess.run(
                [f"{ROOT}/tpu_scripts/{script}.sh", *words, "--settings", str(SETTINGS)],
                env=self.environment(),
                stdin=theirs,
                capture_output=True,
                timeout=60,
                check=False,
            ).returncode
        finally:
            os.close(ours)
            os.close(theirs)

    def calls(self, *, forget: bool = True) -> list[list[str]]:
        """What was called since the last time, each as its words."""
        path = self.folder / "calls"
        words = path.read_bytes().decode().split("\0")[:-1] if path.exists() else []
        found = []
        while words:
            count = int(words[0])
            found.append(words[1 : count + 1])
            words = words[count + 1 :]
        if forget:
            path.unlink(missing_ok=True)
        return found


def printed(dry_run: str, *, conditional: bool) -> list[list[str]]:
    """Commands that a dry run shows, as their words.

    Args:
      conditional: whether to include those that stand under `# only if ...`.
    """
    joined = re.sub(r" \\\n\s*", " ", dry_run)
    found = []
    for line in joined.splitlines():
        if line.startswith("#") or (line.startswith(" ") and not conditional):
            continue
        words = shlex.split(line)
        if len(words) > 2 and words[-2] == "<":
            words = words[:-2]
        if words[0] in (*CLOUD, "git", "jaxmods"):
            found.append(words)
    return found
