"""Processes, the device mesh, sharding rules and collectives."""
