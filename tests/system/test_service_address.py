"""A Serve that runs already keeps its address, whatever the configuration of a service says."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import serve

from rlhf_ray.config.serving import EndpointSettings, ServedModelSettings, ServedScorerSettings, ServiceSettings
from rlhf_ray.reward.serve.application import application
from rlhf_ray.reward.serve.auth import TOKEN_VARIABLE
from tests.system.test_serving import free_port


@pytest.mark.usefixtures("local_ray")
def test_without_a_token_nothing_is_served_where_others_can_reach_it(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    service = ServiceSettings(endpoint=EndpointSettings(host="127.0.0.1"), scorer=ServedScorerSettings(cpus=0.5))
    models = [ServedModelSettings(name="main", path=str(tiny / "reward_model"))]
    serve.start(http_options={"host": "0.0.0.0", "port": free_port()})
    try:
        with pytest.raises(RuntimeError):
            serve.run(application(service, models), name="open", route_prefix="/")
        message = serve.status().applications["open"].deployments["replica"].message
        assert "'0.0.0.0' can be reached from other machines and there is no token" in message
    finally:
        serve.shutdown()
