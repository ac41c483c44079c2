# Targets: `cuda` (the default), `cpu`, and `gateway`, which has no engine and serves models elsewhere. `make image` names
# the version and the commit.
#
# BASE_IMAGE may be any Debian or Ubuntu with Python 3.11 or newer: CUDA's libraries are wheels in the lock, so that a
# driver on the host is all that a GPU needs. nvidia/cuda:13.2.0-devel-ubuntu24.04 brings nvcc besides, for kernels that
# FlashInfer compiles on the spot, and suits a Jetson with JetPack 7.2 or newer.
ARG BASE_IMAGE=python:3.12.13-slim-trixie


FROM ${BASE_IMAGE} AS base

RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.* \
    && { python3 -c 'import ensurepip' || apt-get install --yes --no-install-recommends python3-venv=3.1*; } \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir /cache /data /models \
    && chown 10001:10001 /cache /data /models

# The root file system may be read-only: what is written goes to these volumes and to /tmp. Libraries put their caches
# into HOME; only torch's compiler would take /tmp, and compile again after every restart. USER is for libraries that
# ask for a name, which a bare number hasn't.
ENV PATH=/opt/shannon/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    USER=shannon \
    HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    SHANNON_CONFIG=/etc/shannon/demo.yaml \
    SHANNON_HOST=0.0.0.0 \
    SHANNON_MODEL_CACHE=/models \
    SHANNON_PORT=8080
VOLUME ["/cache", "/data", "/models"]
WORKDIR /data
EXPOSE 8080

HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python3", "-c", "\
from http.client import HTTPConnection; import os; \
gateway = HTTPConnection('127.0.0.1', os.environ['SHANNON_PORT'], timeout=4); \
gateway.request('GET', '/health'); \
raise SystemExit(gateway.getresponse().status != 200)"]

# Without -g: SIGTERM is for the gateway, which lets streams finish; vLLM's processes would die of it at once.
ENTRYPOINT ["tini", "--", "shannon"]
CMD ["serve"]

LABEL org.opencontainers.image.title="Shannon Gateway" \
    org.opencontainers.image.description="An OpenAI-compatible gateway with a vLLM engine inside the same process" \
    org.opencontainers.image.licenses="Apache-2.0"


FROM base AS environment

ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/shannon
WORKDIR /build


# The product, laid out as in the image. What builds it comes from a lock as well.
FROM environment AS package

COPY requirements-cpu.lock ./
RUN --mount=type=cache,target=/cache/.cache/pip \
    sed -n '/^setuptools==/,/[^\\]$/p' requirements-cpu.lock > build.lock \
    && pip install --no-deps --require-hashes --requirement build.lock
COPY LICENSE README.md pyproject.toml ./
COPY engine engine
COPY gateway gateway
RUN pip install --no-deps --no-index --no-build-isolation --no-cache-dir --prefix /package/opt/shannon .
COPY configs /package/etc/shannon


FROM environment AS gateway-environment

COPY requirements-gateway.lock ./
RUN --mount=type=cache,target=/cache/.cache/pip \
    pip install --no-deps --require-hashes --requirement requirements-gateway.lock


# As in the Makefile: torch for the CPU is not on PyPI, and not in the lock.
FROM environment AS cpu-environment

ARG TORCH_CPU=2.13.0+cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/cache/.cache/pip \
    pip install --no-deps --index-url ${TORCH_CPU_INDEX} torch==${TORCH_CPU}
COPY requirements-cpu.lock ./
RUN --mount=type=cache,target=/cache/.cache/pip \
    pip install --no-deps --require-hashes --requirement requirements-cpu.lock


FROM environment AS cuda-environment

COPY requirements-cuda.lock ./
RUN --mount=type=cache,target=/cache/.cache/pip \
    pip install --no-deps --require-hashes --requirement requirements-cuda.lock


FROM base AS gateway

COPY --from=gateway-environment /opt/shannon /opt/shannon
COPY --from=package /package /
ARG REVISION=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.revision=${REVISION} \
    org.opencontainers.image.version=${VERSION}
ENV SHANNON_CONFIG=/etc/shannon/remote.yaml
USER 10001:10001


# Triton and torch compile at run time.
FROM base AS engine

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:1* libnuma1=2.0.* \
    && rm -rf /var/lib/apt/lists/*


FROM engine AS cpu

COPY --from=cpu-environment /opt/shannon /opt/shannon
COPY --from=package /package /
ARG REVISION=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.revision=${REVISION} \
    org.opencontainers.image.version=${VERSION}
USER 10001:10001


FROM engine AS cuda

COPY --from=cuda-environment /opt/shannon /opt/shannon
COPY --from=package /package /
ARG REVISION=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.revision=${REVISION} \
    org.opencontainers.image.version=${VERSION}
USER 10001:10001
