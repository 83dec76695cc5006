"""First on the path of every process of `bench.one_gpu`: each is a host of its own to NCCL.

NCCL refuses two members of a group on one GPU, which it tells by host and bus together; members on different hosts
speak over sockets, here those of the loopback.
"""

import os

os.environ["NCCL_HOSTID"] = f"process-{os.getpid()}"
