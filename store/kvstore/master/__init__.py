"""The master daemon: index of all nodes' blocks, membership, durable cluster state, admin."""
