# The GPU image: CUDA 13, as torch's and vLLM's wheels of the lock are built for; see docs/cluster.md.
#
#   docker build -f cluster/docker/gpu.Dockerfile -t rlhf-ray:gpu .
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# The compiler and CUDA's headers stay: engines compile kernels when they start. KubeRay's probes use wget. Versions are
# those of the distribution.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH VIRTUAL_ENV=/opt/venv UV_NO_CACHE=1

WORKDIR /opt/rlhf-ray
COPY requirements/gpu.lock requirements/
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --no-deps --require-hashes -r requirements/gpu.lock

COPY pyproject.toml README.md ./
COPY rlhf_ray rlhf_ray
RUN uv pip install --no-deps .

# Nothing runs as root; what is on shared volumes must be this user's (`ubuntu`, who is in the image).
USER 1000
WORKDIR /home/ubuntu
