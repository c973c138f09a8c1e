#!/usr/bin/env bash
# Lint, types and all tests; installs the project first if it isn't.
#
#   ./launch/test.sh [pytest arguments ...]
set -euo pipefail

# shellcheck source=launch/shell/install.sh
source "$(dirname "$0")/shell/install.sh"
case ${1:-} in -h | --help) usage; exit 0 ;; esac
install_project dev
cd "$REPOSITORY"

ruff check .
ruff format --check .
if command -v shellcheck > /dev/null; then
  shellcheck --external-sources launch/*.sh launch/*.slurm launch/shell/*.sh .ci/run
else
  echo "skipped: shellcheck is not installed (Debian package shellcheck)"
fi

# Types are checked beside the tests, which wait for processes much of the time; what mypy finds is
# told last.
types=$(mktemp)
mypy > "$types" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2> /dev/null || true; rm -f "$types"' EXIT

# Side by side, twice as many as there are cores, up to 8: many tests wait for processes to start
# and to end. With more, those of low priority, such as exports beside a run, get no time.
cores=$(nproc)
workers=$((cores < 4 ? 2 * cores : 8))
status=0
python -m pytest -rs -n "$workers" --dist loadfile "$@" || status=$?

wait "$mypy" || status=$((status > 0 ? status : 1))
cat "$types"
exit "$status"
