"""Two steps with stub roles, whose generators share two GPUs with the policy's ranks: numbers that Ray counts.

Arguments: folder for the run and for what the roles write down.
"""

import sys
from pathlib import Path

from ray.cluster_utils import Cluster

from bench.stub_inputs import stub_inputs
from bench.stubs import StubSettings, stub_classes
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.ppo.loop import run_roles
from tests.conftest import REPOSITORY

SHARED = (
    *("generator.sleep=true", "generator.gpus=1", "policy.learner.gpus=1"),
    *("generator.replicas=2", "policy.learner.replicas=2", "steps=2", "evaluation={prompts: null, judge: none}"),
)


def main(folder: Path) -> None:
    facts = folder / "facts"
    facts.mkdir()
    node = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        own = (f"cluster.address={cluster.address}", f"paths.runs={folder / 'runs'}")
        config = load_config(PPOConfig, REPOSITORY / "configs" / "tiny" / "ppo.yaml", [*SHARED, *own])
        stub = StubSettings(facts=facts)
        run_roles(config, stub_inputs(config, stub, num_prompts=64, num_held_out=0), stub_classes(stub))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
