# shellcheck shell=bash
# What the scripts of this folder share: refusals of one line, help, launcher flags. Sourced by each of them.

fail() {
  echo "error: $*" >&2
  exit 2
}

# The comment on top of the script.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# need_count NAME VALUE [LEAST]
need_count() {
  [[ "$2" =~ ^[1-9][0-9]{0,8}$ && "$2" -ge "${3:-1}" ]] || fail "$1 $2: expected a number, ${3:-1} or more"
}

# Takes the launcher's flags out of a command line: sets ranks and hostfile, and flags to all the rest.
parse_flags() {
  ranks='' hostfile='' flags=()
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --ranks=* | --hostfile=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
      --ranks | --hostfile)
        [ -n "${2:-}" ] || fail "$1: expected a value after it"
        printf -v "${1#--}" %s "$2"
        shift 2 ;;
      *) flags+=("$1"); shift ;;
    esac
  done
  [ ${#flags[@]} -gt 0 ] || fail "no flags; $0 --help lists them"
  [ -z "$ranks" ] || need_count --ranks "$ranks"
  [ -z "$hostfile" ] || [ -f "$hostfile" ] || fail "--hostfile $hostfile: no such file; it holds a line for each host"
}

# Prints a command, then becomes it.
run() {
  command -v "$1" > /dev/null || fail "$1: not found; activate the environment that holds the project"
  echo "+$(printf ' %q' "$@")"
  exec "$@"
}
