# Image of jaxvid; docs/container.md shows how to build and run it.
#
# BASE is a Debian or Ubuntu image with Python 3.11 or 3.12 and its module venv.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
# cpu, cuda12 or cuda13. The CUDA wheels of JAX depend on wheels that contain CUDA and cuDNN in the
# right versions, so the base image is the same. An image with CUDA would contain it twice.
ARG ACCELERATOR=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python3 -m venv /opt/jaxvid
COPY requirements.txt requirements-dev.txt ./
RUN /opt/jaxvid/bin/pip install -r requirements.txt && \
    if [ "${ACCELERATOR}" != cpu ]; then \
        /opt/jaxvid/bin/pip install -r requirements.txt "jax[${ACCELERATOR}]"; \
    fi
COPY . .
# Optional packages, which pyproject.toml lists. requirements-dev.txt has the versions for `serve`.
ARG EXTRAS=serve
RUN /opt/jaxvid/bin/pip install -c requirements-dev.txt ".[${EXTRAS}]"

FROM ${BASE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="jaxvid" \
      org.opencontainers.image.description="The video transformers STAM and XViT in JAX" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin jaxvid && \
    install -d -m 1777 /cache
COPY --from=build /opt/jaxvid /opt/jaxvid
# Only /cache (downloaded models, compiled programs) and /tmp are written to, by any user.
ENV PATH=/opt/jaxvid/bin:$PATH \
    HOME=/tmp \
    JAXVID_CACHE=/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache
USER 10001:10001
WORKDIR /work
EXPOSE 7860
# A model is compiled at the start, which may take minutes.
HEALTHCHECK --interval=15s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 7860, timeout=4); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["jaxvid"]
CMD ["serve", "--host", "0.0.0.0", "--model", "/model"]
