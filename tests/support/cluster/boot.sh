#!/usr/bin/env bash
# Boots a network switch and, plugged into it, nodes with an ssh server each: boot.sh switch NODES.
#
# To be run as the first process of new network, mount and process namespaces. Nothing changes outside of them: keys
# and configurations lie in a tmpfs. When the switch ends, the kernel ends every node, with all that runs there.
set -euo pipefail

configure() {
  mount -t tmpfs -o mode=755 tmpfs /run # sshd trusts no directory that all may write to
  mkdir /run/sshd
  ssh-keygen -q -t ed25519 -N '' -f /run/user_key
  echo '127.0.0.1 localhost' > /run/hosts
  printf '%s\n' 'IdentityFile /run/user_key' 'UserKnownHostsFile /run/known_hosts' 'LogLevel ERROR' > /run/ssh_config
  printf '%s\n' 'AuthorizedKeysFile /run/user_key.pub' 'PermitRootLogin yes' 'LogLevel ERROR' > /run/sshd_config
  for number in $(seq "$1"); do
    ssh-keygen -q -t ed25519 -N '' -f "/run/host_key_$number"
    echo "10.0.0.$number node$number" >> /run/hosts
    echo "node$number $(cat "/run/host_key_$number.pub")" >> /run/known_hosts
  done
}

switch() {
  configure "$1"
  ip link add bridge type bridge
  ip link set bridge up
  exec 9< /proc/self/ns/net # nodes plug their cables in here
  for number in $(seq "$1"); do
    unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc bash "$0" node "$number" &
  done
  for number in $(seq "$1"); do
    timeout 20 bash -c "until [ -s /run/sshd_$number.pid ]; do sleep 0.02; done"
  done
  echo up
  read -r _ || true # until the test closes its end of the pipe, or is killed
}

node() {
  hostname "node$1"
  sed "s/.* node$1$/127.0.1.1 node$1/" /run/hosts > "/run/hosts_$1" # as Debian's installer does
  mount --bind "/run/hosts_$1" /etc/hosts
  mount --bind /run/ssh_config /etc/ssh/ssh_config
  ip link set lo up
  ip link add eth0 type veth peer name "node$1" netns /proc/self/fd/9
  ip address add "10.0.0.$1/24" dev eth0
  ip link set eth0 up
  nsenter --net=/proc/self/fd/9 ip link set "node$1" master bridge up
  exec 9<&-
  exec /usr/sbin/sshd -D -e -f /run/sshd_config -h "/run/host_key_$1" -o "PidFile=/run/sshd_$1.pid"
}

"$@"
