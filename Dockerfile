# lampctl in a container: docker build -t lampctl . ; docker run -v lampctl:/work lampctl run MODEL --sparsity 0.7
#
# BASE: any image with Python 3.11 or newer and its venv module. TORCH: what pip installs; the package index's own wheel
# brings its CUDA libraries along and needs nothing but the driver of the host (docker run --gpus all).
ARG BASE=docker.io/library/python:3.12-slim

FROM ${BASE} AS builder
ARG TORCH=torch
ARG EXTRAS=[bucket]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/lampctl
# In layers of their own, the largest first, so that a change of the code installs the code alone.
RUN ["/bin/sh", "-c", "/opt/lampctl/bin/pip install \"$TORCH\""]
COPY pyproject.toml /src/
RUN python3 -c "import tomllib; p = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
    print(*p['dependencies'], *p['optional-dependencies']['bucket'], sep='\n')" > /src/requirements.txt \
    && /opt/lampctl/bin/pip install --requirement /src/requirements.txt
COPY README.md LICENSE /src/
COPY lampctl /src/lampctl
COPY pipeline /src/pipeline
COPY stages /src/stages
RUN /opt/lampctl/bin/pip install "/src${EXTRAS}"

FROM ${BASE}
LABEL org.opencontainers.image.title="lampctl" \
      org.opencontainers.image.description="Prune large transformers block by block, as a resumable job" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=builder /opt/lampctl /opt/lampctl
# A number, so that Kubernetes can see that it is not root; what it writes is readable for everybody.
RUN mkdir -p /work && chown 10001:10001 /work
ENV PATH=/opt/lampctl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/work \
    HF_HOME=/work/.cache/huggingface \
    LAMPCTL_CACHE=/work/.cache/lampctl
# Mount a volume here: what a container keeps for itself goes with it.
WORKDIR /work
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["lampctl"]
CMD ["--help"]
