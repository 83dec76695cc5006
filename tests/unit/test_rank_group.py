"""A process group meets where it is told to, and listens nowhere else."""

import os
import socket
import subprocess
import sys

_MEET = """
import sys, psutil, torch, torch.distributed as dist
from rlhf_ray.roles.rank_group import Rank, join_group
rank, port = int(sys.argv[1]), int(sys.argv[2])
join_group(Rank(rank, 2, "127.0.0.1", port), on_gpu=False)
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
listening = {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
dist.barrier()
print(total.item(), *sorted(listening))
"""


def test_ranks_meet_and_listen_on_loopback_only():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _MEET, str(rank), port], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [output.splitlines()[-1] for output in outputs] == ["3.0 127.0.0.1"] * 2
