"""Protocol of kvstore: the Master, Node and Admin services and their generated stubs."""
