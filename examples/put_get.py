"""Put and get numpy arrays: start `kvstore up`, then run this with the node's address it prints."""

import sys

import numpy as np
from kvstore_client import CacheSpec, Client

if len(sys.argv) != 2:
    sys.stderr.write(f"usage: python {sys.argv[0]} ADDRESS, as `kvstore up` prints it\n")
    sys.exit(2)
arrays = np.random.default_rng(0).random((16, 64, 1024))  # 16 blocks of 512 KiB
with Client.connect(sys.argv[1]) as client:
    ns = client.open_namespace(CacheSpec.raw("put-get", block_bytes=arrays[0].nbytes))
    keys = ns.keys(range(16 * 64))  # one for every 64 tokens of a prompt
    print("stored:", ns.put(keys, arrays).stored)
    with ns.read(keys) as read:  # pinned until here ends, and not copied
        blocks = [read.array(i, np.float64, (64, 1024)) for i in range(read.count)]
        print("found:", read.count, "equal:", all(map(np.array_equal, blocks, arrays)))
