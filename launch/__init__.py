"""Starts commands on machines, one or many, and keeps a training run going."""
