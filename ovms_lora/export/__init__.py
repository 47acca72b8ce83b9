"""Turning a model source into a folder that the server, and a stock OVMS, can serve."""
