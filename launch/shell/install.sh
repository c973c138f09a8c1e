# shellcheck shell=bash
# Puts the project and what it needs into an environment, once. Sourced by quickstart.sh, test.sh
# and .ci/run:
#
#   install_project EXTRA      EXTRA is demo or dev, see pyproject.toml
#
# Inside an active virtual or conda environment it uses that one and keeps the torch that is there.
# Otherwise it makes .venv and installs the versions of .ci/constraints.txt, the ones the tests
# passed with.

# shellcheck source=launch/shell/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Sets ENVIRONMENT to the active one, or to .venv, which it makes if it is not there.
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
    fail "$python cannot make virtual environments; install its venv package, or activate" \
      "an environment"
}

need_pip() {
  python -m pip --version > /dev/null 2>&1 || python -m ensurepip > /dev/null 2>&1 ||
    fail "$ENVIRONMENT has no pip; install it there (python -m ensurepip, or uv pip install pip)," \
      "or remove a .venv"
}

# The versions to hold to: the tested ones, or in somebody's own environment just the torch there.
write_constraints() {
  local own_torch version='from importlib.metadata import version; print(version("torch"))'
  own_torch=$(python -c "$version" 2>/dev/null || true)
  if [ "$ENVIRONMENT" != "$REPOSITORY/.venv" ] && [ -n "$own_torch" ]; then
    echo "torch==$own_torch"
  else
    cat "$REPOSITORY/.ci/constraints.txt"
  fi
}

# Whether this checkout, with what it needs today, was installed here. A stamp says so; dev holds
# what demo needs.
is_installed() { # EXTRA WANTED
  local stamp
  for stamp in "$ENVIRONMENT/.tablefree-dev" "$ENVIRONMENT/.tablefree-$1"; do
    [ "$(cat "$stamp" 2>/dev/null)" != "$2" ] || return 0
  done
  return 1
}

install_project() { # EXTRA
  local extra=$1 needs wanted log
  find_environment
  export PATH="$ENVIRONMENT/bin:$PATH"
  needs=$(cat "$REPOSITORY/pyproject.toml" "$REPOSITORY/.ci/constraints.txt" | cksum)
  wanted=$REPOSITORY:$needs
  is_installed "$extra" "$wanted" && return
  need_pip
  echo "installing into $ENVIRONMENT (a few minutes, once)"
  write_constraints > "$ENVIRONMENT/.tablefree-constraints"
  log=$ENVIRONMENT/.tablefree-log
  python -m pip install --quiet --disable-pip-version-check \
    --constraint "$ENVIRONMENT/.tablefree-constraints" \
    --editable "${REPOSITORY}[$extra]" > "$log" 2>&1 || {
    tail -n 20 "$log" >&2
    fail "installation failed; the whole log is $log"
  }
  echo "$wanted" > "$ENVIRONMENT/.tablefree-$extra"
}
