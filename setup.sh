#!/usr/bin/env bash
# Makes .venv and installs the project into it: `bash setup.sh [EXTRA]` (test, demo, tpu, ...).
# Does nothing when the same extra of the same pyproject.toml is installed already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

extra="${1:-}"
python=""
for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
  [ -n "$candidate" ] || continue
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "setup.sh: expected Python 3.11 or newer on PATH, found none; install it, or set PYTHON=/path/to/python3.11" >&2
  exit 1
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=".venv/installed-${extra:-base}"
want="$(cksum < pyproject.toml)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
  echo "Installing jaxmods${extra:+[$extra]} into .venv (the first time takes a few minutes) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" \
    2> >(grep -v "Location 'file:" >&2 || true)
  echo "$want" > "$stamp"
fi
