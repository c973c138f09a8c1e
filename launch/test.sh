#!/usr/bin/env bash
# Lint, types and all tests; installs the project first if it isn't.
#
#   ./launch/test.sh [pytest arguments ...]
set -euo pipefail

case ${1:-} in -h | --help) sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
# shellcheck source=launch/install.sh
source "$(dirname "$0")/install.sh"
install_project dev
cd "$REPOSITORY"

ruff check .
ruff format --check .
mypy
if command -v shellcheck > /dev/null; then
  shellcheck --external-sources launch/*.sh .ci/run
else
  echo "skipped: shellcheck is not installed (Debian package shellcheck)"
fi
exec python -m pytest -rs "$@"
