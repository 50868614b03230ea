"""Protocol of kvstore: the Master, Node and Admin services and their generated stubs."""

PROTOCOL_VERSION = 1
"""Version of the wire protocol; peers of another version are refused at hello."""
