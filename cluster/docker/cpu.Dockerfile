# The CPU image: everything of `make env`, from the same lock. For trying a cluster out; see docs/cluster.md.
#
#   docker build -f cluster/docker/cpu.Dockerfile -t rlhf-ray:cpu .
FROM python:3.11-slim-bookworm

# The engines compile small kernels when they start; KubeRay's probes use wget. Versions are those of the distribution.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

WORKDIR /opt/rlhf-ray
ENV UV_NO_CACHE=1 UV_SYSTEM_PYTHON=1
COPY requirements/cpu.lock requirements/
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --no-deps --torch-backend=cpu -r requirements/cpu.lock

COPY pyproject.toml README.md ./
COPY rlhf_ray rlhf_ray
RUN uv pip install --no-deps .

# Nothing runs as root; what is on shared volumes must be this user's.
USER 1000
WORKDIR /home/ray
