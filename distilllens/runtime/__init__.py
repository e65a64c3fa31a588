"""Processes and the machine: groups, signals, locks, faults, folders that appear whole."""
