#!/usr/bin/env bash
# Sets up the test environment and runs everything CI runs: lint, format, types, tests.
#   bash test.sh            everything
#   bash test.sh fast       without the long tests
#   bash test.sh -k fgclip  further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash setup.sh test
export JAX_PLATFORMS=cpu
bin=.venv/bin

select=()
if [ "${1:-}" = fast ]; then
  select=(-m "not slow")
  shift
fi

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
# Two at a time; worksteal keeps tests of one file, which share compiled programs, together.
"$bin/python" -m pytest -n 2 --dist worksteal "${select[@]}" "$@"
