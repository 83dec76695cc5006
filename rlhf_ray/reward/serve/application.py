"""The two deployments of the service: replicas that score, and the monitor that they report to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.tracing_utils import is_tracing_enabled
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from rlhf_ray.config.serving import ServedModelSettings, ServiceSettings, check_shares
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.serve.audit import AuditLog, AuditRecord
from rlhf_ray.reward.serve.auth import Callers, read_callers
from rlhf_ray.reward.serve.batcher import MicroBatcher
from rlhf_ray.reward.serve.engine import RewardEngine
from rlhf_ray.reward.serve.exposition import merge_expositions
from rlhf_ray.reward.serve.following import Follower
from rlhf_ray.reward.serve.front import MIDDLEWARE, MIDDLEWARE_VARIABLE, Front, Fronted, put_in_front
from rlhf_ray.reward.serve.monitor import ServiceMonitor
from rlhf_ray.reward.serve.observations import Observer
from rlhf_ray.reward.serve.orders import ClusterStore
from rlhf_ray.reward.serve.page import page_routes
from rlhf_ray.reward.serve.probes import probe_routes
from rlhf_ray.reward.serve.scorer_process import ScorerProcess
from rlhf_ray.reward.serve.traffic import Beat, ModelOrder
from rlhf_ray.reward.serve.wire import add_routes
from rlhf_ray.runtime.actor_group import environment

BEAT_S = 1.0
_MONITOR_TIMEOUT_S = 5.0
_FIRST_ORDER_TIMEOUT_S = 120.0
_PROBE_TIMEOUT_S = 20.0
_MOST_AUDIT_RECORDS, _MOST_AUDIT_TOKENS = 100_000, 2_000_000
"""That wait for the disk: some 80 MB."""
_AUDIT_PAUSE_S = 5.0
"""Before a log that could not be written is opened again."""

_SERVE_ENVIRONMENT = {
    MIDDLEWARE_VARIABLE: MIDDLEWARE,
    # One loop for Serve's part of a request and ours: nothing of ours holds it up, and a hop to another thread and
    # back costs more than the request.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}

logger = logging.getLogger(__name__)


class Replica:
    """One process of the service.

    Args:
        settings: everything but the models.
        monitor: what it reports to, and learns from which models to serve.
    """

    # Serve awaits constructors.
    async def __init__(self, settings: Mapping[str, Any], monitor: DeploymentHandle) -> None:  # type: ignore[misc]
        self._settings = ServiceSettings.model_validate(settings)
        self._monitor = monitor
        self._id = serve.get_replica_context().replica_id.unique_id
        self._began = time.monotonic()
        self._process = process = ScorerProcess(self._settings.scorer)
        self._observer = Observer(self._settings.candidates, self._settings.scorer.batch_invariant)
        self._audit: AuditQueue | None = None
        audit = self._settings.audit
        if audit.enabled and audit.folder:
            lost = self._observer.metrics.audit_lost.inc
            folder = Path(audit.folder)
            self._audit = AuditQueue(lambda: AuditLog(folder, audit, self._id), lost)
            self._observer.audit = self._audit.put
        if is_tracing_enabled():
            from rlhf_ray.reward.serve.traces import record_parts

            self._observer.trace = record_parts
        self._batcher = MicroBatcher(
            self._settings.batching, lambda model, texts: process.score(model.key, texts), self._observer.batch
        )
        self._engine = RewardEngine(
            self._settings.scorer, self._settings.limits, process, self._batcher, self._observer
        )
        endpoint, unusable = self._settings.endpoint, self._observer.metrics.counters["token_file_errors"].inc
        callers = Callers(partial(read_callers, endpoint, await _host_of_serve()), endpoint.token_file, unusable)
        self._front = Front(self._observer, callers, self._settings.limits)
        put_in_front(self._front)
        order = await asyncio.wait_for(monitor.order.remote(), _FIRST_ORDER_TIMEOUT_S)
        self._follower = Follower(self._engine)
        await self._follower.begin(order)
        self._beats = asyncio.get_running_loop().create_task(self._beat())

    def __serve_build_asgi_app__(self) -> Fronted:
        """The application; Serve calls it once the models are loaded."""
        app = FastAPI(title="rlhf_ray reward service", docs_url=None, redoc_url=None)
        add_routes(app, self._engine, self._engine.tokenizing, self._settings.limits, self._settings.batching)
        app.include_router(probe_routes(self._engine.check_ready))
        app.include_router(self._operations())
        app.include_router(page_routes())
        # Where Serve's own proxy is in front of the replica, nobody else looks at its requests.
        return Fronted(app, self._front)

    async def __del__(self) -> None:
        """Serve calls it when the replica stops, after the last answer."""
        self._beats.cancel()
        await self._batcher.close()
        if self._audit is not None:
            await self._audit.close()

    async def check_health(self) -> None:
        """Serve replaces a replica whose models no longer score."""
        await self._engine.probe(_PROBE_TIMEOUT_S)

    def _exposition(self) -> bytes:
        try:
            self._engine.check_ready()
        except ApiError:
            ready = False
        else:
            ready = True
        return self._observer.exposition(ready, self._engine.queued_requests, self._process.restarts)

    def _operations(self) -> APIRouter:
        router = APIRouter()

        @router.get("/health", tags=["operations"])
        async def health() -> Response:
            """Whether this replica scores: a sentence goes through every model."""
            await self._engine.probe(_PROBE_TIMEOUT_S)
            return JSONResponse({"status": "ok"})

        @router.get("/health/ready", tags=["operations"])
        async def ready() -> Response:
            """As `/health`, and the models are those that were ordered."""
            await self._engine.probe(_PROBE_TIMEOUT_S)
            return JSONResponse({"status": "ok", "follows_order": self._follower.is_up_to_date})

        @router.get("/metrics", tags=["operations"])
        async def metrics() -> Response:
            """Metrics of all replicas and the monitor for Prometheus; of this one alone while the monitor does not
            answer."""
            own = {self._id: self._exposition()}
            try:
                own = {**await self._ask(self._monitor.expositions.remote()), **own}
            except ApiError:
                logger.warning("metrics of the other replicas are missing")
            merged = merge_expositions(own)
            return Response(merged, media_type="text/plain; version=0.0.4; charset=utf-8")

        @router.get("/v1/service", tags=["operations"])
        async def status() -> Response:
            """Models, traffic, drift and candidates of the whole service; what the page shows."""
            return JSONResponse(await self._ask(self._monitor.status.remote()))

        return router

    async def _ask(self, call: Any) -> Any:
        """An answer of the monitor.

        Raises:
            ApiError: there is none in time.
        """
        try:
            return await asyncio.wait_for(call, _MONITOR_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("the monitor does not answer (%s)", type(error).__name__)
            raise ApiError(ErrorType.UNAVAILABLE, "the monitor does not answer", retry_after_s=1) from None

    async def _beat(self) -> None:
        """Report each second, and follow the monitor's order; both go on whatever happens to the monitor, or here."""
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                beat = self._report()
                order = await asyncio.wait_for(self._monitor.beat.remote(beat), _MONITOR_TIMEOUT_S)
                self._follower.told(order)
            except (TimeoutError, RayError, RayServeException) as error:
                logger.warning("the monitor does not answer (%s); serving on", type(error).__name__)
            except Exception:
                logger.exception("nothing was reported to the monitor; serving on")

    def _report(self) -> Beat:
        return Beat(
            replica=self._id,
            order=self._follower.followed,
            models=self._follower.models(),
            load_failure=self._follower.failure,
            queued=self._engine.queued_requests,
            age_s=time.monotonic() - self._began,
            traffic=self._observer.take(),
            exposition=self._exposition(),
            audit=self._audit.head if self._audit is not None else None,
        )


async def _host_of_serve() -> str:
    """Where the Serve of this cluster listens: a configuration that is deployed later does not move it."""
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    return str((await controller.get_http_config.remote()).host)


class AuditQueue:
    """Scores on their way to the log, which is written beside the event loop. After an error the log is opened anew,
    behind what is whole of it: a disk that was full is not full for ever.

    Args:
        open_log: of this replica.
        lost: told how many scores could not be written.

    Raises:
        BadInput, OSError: the log cannot be opened at the start.
    """

    def __init__(self, open_log: Callable[[], AuditLog], lost: Callable[[int], None]) -> None:
        self._open_log = open_log
        self._lost = lost
        self._log: AuditLog | None = open_log()
        self._open_again_at = 0.0
        self._records: list[AuditRecord] = []
        self._num_tokens = 0
        self._writing: asyncio.Task[None] | None = None
        self.head = self._log.head

    def put(self, records: Sequence[AuditRecord]) -> None:
        """Take scores; they are on the disk a moment later."""
        if len(self._records) > _MOST_AUDIT_RECORDS or self._num_tokens > _MOST_AUDIT_TOKENS:
            self._lost(len(records))  # the disk does not answer, and memory is not for them
            return
        self._records.extend(records)
        self._num_tokens += sum(len(record.token_ids) for record in records)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def close(self) -> None:
        """Write what is left."""
        if self._writing is not None:
            await self._writing
        if self._log is not None:
            self._log.close()

    async def _write(self) -> None:
        while self._records:
            records, self._records, self._num_tokens = self._records, [], 0
            if time.monotonic() < self._open_again_at:
                self._lost(len(records))
                continue
            try:
                await asyncio.to_thread(self._append, records)
            except (OSError, ValueError, BadInput) as error:
                # A full disk stops the log, not the service; the metric says so.
                logger.error("%d scores are missing in the audit log: %s", len(records), error)
                self._lost(len(records))
                self._log, self._open_again_at = None, time.monotonic() + _AUDIT_PAUSE_S

    def _append(self, records: Sequence[AuditRecord]) -> None:
        if self._log is None:
            self._log = self._open_log()
        self._log.append(records)
        self.head = self._log.head


class Monitor:
    """The process that knows the service as a whole. Its models are its `user_config`: to change them is a light
    update, which restarts nothing."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        own = ServiceSettings.model_validate(settings)
        store = ClusterStore(serve.get_replica_context().app_name)
        self._monitor = ServiceMonitor(own.candidates, own.drift, store)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Order models; Serve calls it at the start, and when they change. Models that cannot share the traffic are not
        ordered: those that were go on.

        Raises:
            ValueError: there were none.
        """
        try:
            models = [ServedModelSettings.model_validate(model) for model in user_config["models"]]
            check_shares(models)
        except ValueError as error:
            if not self._monitor.order.models:
                raise
            self._monitor.refuse(str(error))
        else:
            self._monitor.configure(models, user_config)

    async def order_models(self, models: Sequence[ServedModelSettings]) -> None:
        """Order other models than those of the configuration, or read the same directories again."""
        self._monitor.order_models(models)

    async def settings(self) -> Mapping[str, Any]:
        """What the service was deployed with."""
        return self._settings

    async def beat(self, beat: Beat) -> ModelOrder:
        """Record a replica's report, and say which models it should have."""
        return self._monitor.beat(beat)

    async def order(self) -> ModelOrder:
        """The models that replicas should have."""
        return self._monitor.order

    async def expositions(self) -> dict[str, bytes]:
        """The metrics of all replicas, as of their last beat, and the monitor's own."""
        return self._monitor.expositions()

    async def status(self) -> dict[str, Any]:
        """Everything that the page shows."""
        return self._monitor.status()


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application from its arguments in a Serve config file; its models are the monitor's `user_config` there.

    Args:
        args: `service` (`ServiceSettings`).
    """
    return application(ServiceSettings.model_validate(args["service"]), ())


def application(service: ServiceSettings, models: Sequence[ServedModelSettings]) -> serve.Application:
    """Replicas and monitor, ready for `serve.run`."""
    plain = service.model_dump(mode="json")
    monitor = serve.deployment(Monitor).options(
        name="monitor",
        # The time makes it another configuration than that of any deployment before, whose orders are over.
        user_config={"models": [model.model_dump(mode="json") for model in models], "deployed_at": time.time()},
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
    )
    scaling, scorer = service.scaling, service.scorer
    grows = scaling.max_replicas > scaling.min_replicas
    replica = serve.deployment(serve.ingress()(Replica)).options(
        name="replica",
        # Ours is the limit that answers in each protocol's words; Serve's lie behind it and are never reached.
        max_ongoing_requests=4 * service.limits.max_queued_requests + 64,
        max_queued_requests=service.limits.max_queued_requests,
        graceful_shutdown_timeout_s=service.endpoint.drain_timeout_s,
        health_check_period_s=10.0,
        health_check_timeout_s=_PROBE_TIMEOUT_S + 10.0,
        # The replica itself asks for nothing; its scoring process takes what the bundle holds.
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": {**environment(scorer), **_SERVE_ENVIRONMENT}}},
        placement_group_bundles=[{"CPU": scorer.cpus, **({"GPU": scorer.gpus} if scorer.gpus else {})}],
        **(
            {
                "autoscaling_config": {
                    "min_replicas": scaling.min_replicas,
                    "max_replicas": scaling.max_replicas,
                    "target_ongoing_requests": scaling.target_ongoing_requests,
                }
            }
            if grows
            else {"num_replicas": scaling.min_replicas}
        ),
    )
    return replica.bind(plain, monitor.bind(plain))
