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
mypy
if command -v shellcheck > /dev/null; then
  shellcheck --external-sources launch/*.sh launch/shell/*.sh .ci/run
else
  echo "skipped: shellcheck is not installed (Debian package shellcheck)"
fi
# side by side, one more than there are cores, up to 8: many tests wait for processes to start and to end
exec python -m pytest -rs -n "$(($(nproc) < 8 ? $(nproc) + 1 : 8))" --dist loadfile "$@"
