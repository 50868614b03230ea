"""Durable state of the cluster: what only a master knows."""
