# shellcheck shell=bash
# Puts the project and what it needs into an environment, once. Sourced by quickstart.sh, test.sh and .ci/run:
#
#   install_project EXTRA      EXTRA is demo or dev, see pyproject.toml
#
# Inside an active virtual or conda environment it uses that one and keeps the torch that is there. Otherwise it
# makes .venv and installs the versions of .ci/constraints.txt, the ones the tests passed with.

# shellcheck source=launch/shell/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

find_environment() {
  ENVIRONMENT=${VIRTUAL_ENV:-}
  # conda's base is active by itself; nobody chose it
  [ "${CONDA_DEFAULT_ENV:-base}" = base ] || ENVIRONMENT=${ENVIRONMENT:-$CONDA_PREFIX}
  if [ -n "$ENVIRONMENT" ]; then
    echo "using the active environment $ENVIRONMENT"
    return
  fi
  ENVIRONMENT=$REPOSITORY/.venv
  [ ! -x "$ENVIRONMENT/bin/python" ] || return 0
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$python is not Python 3.11 or newer; set PYTHON to one that is"
  "$python" -m venv "$ENVIRONMENT" ||
    fail "$python cannot make virtual environments; install its venv package, or activate an environment"
}

# The versions to hold to: the tested ones, or in somebody's own environment just the torch that is there.
write_constraints() {
  local own_torch
  own_torch=$(python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
  if [ "$ENVIRONMENT" != "$REPOSITORY/.venv" ] && [ -n "$own_torch" ]; then
    echo "torch==$own_torch"
  else
    cat "$REPOSITORY/.ci/constraints.txt"
  fi
}

install_project() {
  local extra=$1 wanted stamp
  find_environment
  export PATH="$ENVIRONMENT/bin:$PATH"
  wanted=$REPOSITORY:$(cat "$REPOSITORY/pyproject.toml" "$REPOSITORY/.ci/constraints.txt" | cksum)
  for stamp in "$ENVIRONMENT/.tablefree-dev" "$ENVIRONMENT/.tablefree-$extra"; do # dev holds what demo needs
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
  done
  python -m pip --version > /dev/null 2>&1 || python -m ensurepip > /dev/null 2>&1 ||
    fail "$ENVIRONMENT has no pip; install it there (python -m ensurepip, or uv pip install pip), or remove a .venv"
  echo "installing into $ENVIRONMENT (a few minutes, once)"
  write_constraints > "$ENVIRONMENT/.tablefree-constraints"
  python -m pip install --quiet --disable-pip-version-check --constraint "$ENVIRONMENT/.tablefree-constraints" \
    --editable "${REPOSITORY}[$extra]" > "$ENVIRONMENT/.tablefree-log" 2>&1 || {
    tail -n 20 "$ENVIRONMENT/.tablefree-log" >&2
    fail "installation failed; the whole log is $ENVIRONMENT/.tablefree-log"
  }
  echo "$wanted" > "$stamp"
}
