"""A run with stub roles that loses a node, where the other one has no room for the role that was there.

Arguments: folder for the run, and the key of the role that takes up the node.
"""

import sys
import threading
from pathlib import Path

from ray.cluster_utils import Cluster

from bench.stub_inputs import stub_inputs
from bench.stubs import Latencies, StubSettings, stub_classes
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import RoleFailure
from rlhf_ray.ppo.loop import run_roles
from tests.conftest import REPOSITORY
from tests.system.commands import rows_of, wait_until

SETTINGS = (
    *("steps=10000", "evaluation={prompts: null, judge: none}", "tracking.progress=lines"),
    *("cluster.placement_timeout_s=10", "cluster.silent_after_s=10"),
)


def main(folder: Path, key: str) -> None:
    shape = {"object_store_memory": 80 << 20}
    head = {**shape, "num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        other = cluster.add_node(**shape, num_cpus=2, node_ip_address="127.0.0.3")
        cluster.wait_for_nodes()
        own = (f"cluster.address={cluster.address}", f"paths.runs={folder / 'runs'}", f"{key}.cpus=2")
        config = load_config(PPOConfig, REPOSITORY / "configs" / "tiny" / "ppo.yaml", [*SETTINGS, *own])
        metrics = folder / "runs" / "tiny-ppo" / "metrics.jsonl"

        def lose_the_node() -> None:
            wait_until(lambda: rows_of(metrics), 120, "the first step")
            cluster.remove_node(other, allow_graceful=False)
            (folder / "lost").touch()

        thread = threading.Thread(target=lose_the_node)
        thread.start()
        stub = StubSettings(latencies=Latencies(engine_step_s=0.002))
        run_roles(config, stub_inputs(config, stub, num_prompts=64, num_held_out=0), stub_classes(stub))
        thread.join()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except RoleFailure as failure:
        sys.exit(str(failure))
