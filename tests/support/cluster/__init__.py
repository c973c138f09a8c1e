"""Nodes in miniature: machines with their own address, processes and ssh server, on one machine."""
