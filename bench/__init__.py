"""Measurements: each module is a script that prints a table and writes its numbers as JSON to bench/results/."""
