# syntax=docker/dockerfile:1
# The server with its dependencies, for a GPU, in Ray's pods (serve_configs/kuberay) or alone:
#   docker build -t slora .
#   docker run --gpus all --network host --shm-size 8g -v slora-cache:/cache slora
# For the CPU, without CUDA's libraries:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu --build-arg CONSTRAINTS=constraints-cpu.txt -t slora:cpu .
#   docker run --network host --shm-size 2g -v slora-cache:/cache slora:cpu serve run serve_configs/slora.yaml
ARG PYTHON=3.12.12-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints-cpu.txt ./
ARG TORCH_INDEX=https://pypi.org/simple
# An empty file: the newest versions that pyproject.toml allows.
ARG CONSTRAINTS=/dev/null
# What changes seldom first: torch and the other dependencies are a layer of their own.
RUN pip install --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple -c "${CONSTRAINTS}" 'torch>=2.11' \
    && mkdir app && touch app/__init__.py README.md LICENSE \
    && pip install -c "${CONSTRAINTS}" '.[demo]' && pip uninstall --yes slora
COPY LICENSE README.md ./
COPY app app
COPY slora_core slora_core
COPY kernels kernels
RUN pip install --no-deps .

FROM python:${PYTHON} AS server
# Triton compiles the launchers of its kernels with the system's compiler; KubeRay's own probes, where
# a pod has none, and its init container call wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc=4:12.2.* libc6-dev=2.36-* wget=1.21.* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 slora \
    && install --directory --owner slora --group slora /cache
COPY --from=build /opt/venv /opt/venv
WORKDIR /home/slora/server
COPY --chown=slora:slora serve_configs serve_configs
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/cache/huggingface \
    SLORA_CACHE=/cache/slora \
    TRITON_CACHE_DIR=/cache/triton \
    PYTHONUNBUFFERED=1
USER 1000:1000
VOLUME /cache
EXPOSE 8000
# A path in the config starts here, where `serve run` is called.
CMD ["serve", "run", "serve_configs/one_gpu.yaml"]
