"""Addresses of this machine, and how other machines see it."""

import ipaddress
import socket

import psutil

from data_prep.errors import UserError


def own_address(seen_by: str = "10.255.255.255") -> str:
    """This machine's address as another machine sees it (its name may resolve to loopback)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((seen_by, 1))  # sends nothing; only chooses the interface
        return str(probe.getsockname()[0])


def interface_towards(host: str) -> str:
    """The network interface through which this machine reaches a host."""
    own = own_address(host)
    for name, addresses in psutil.net_if_addrs().items():
        if own in {each.address for each in addresses}:
            return str(name)
    raise UserError(f"no network interface of this machine has its address {own}")


def is_loopback(address: str) -> bool:
    """Whether it leads back to the machine that uses it."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return address == "localhost"
