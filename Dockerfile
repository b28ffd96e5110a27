# An image with rlbroker, PyTorch and the demo; each command of `rlbroker` runs in it.
#
#   docker build -t rlbroker .                                        without CUDA
#   docker build -t rlbroker:cuda --build-arg ACCELERATOR=cuda .    with CUDA: several GB
#
# pip's own settings (a mirror, a private index) reach the build as a secret, of which nothing stays in the image:
#
#   docker build --secret id=pip.conf,src="$HOME/.config/pip/pip.conf" -t rlbroker .

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PATH=/opt/rlbroker/bin:$PATH
RUN python -m venv /opt/rlbroker
WORKDIR /build
COPY pyproject.toml constraints.txt ./

# PyTorch by itself, as no other package is to be looked for in another index. The package index has CUDA builds for
# Linux; `+cpu` has the build fail where there is no such release, instead of taking gigabytes.
ARG ACCELERATOR=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    torch="$(grep '^torch==' constraints.txt)" \
    && case "$ACCELERATOR" in \
        cpu) pip install --no-deps --extra-index-url "$TORCH_INDEX" "$torch+cpu" ;; \
        cuda) pip install --no-deps "$torch" ;; \
        *) echo "ACCELERATOR must be cpu or cuda; got '$ACCELERATOR'" >&2; exit 1 ;; \
    esac

# All that rlbroker needs, before rlbroker itself, of which only an empty package is there so far: a change of the
# source installs nothing else again.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    mkdir -p src/rlbroker && touch src/rlbroker/__init__.py README.md LICENSE \
    && pip install -c constraints.txt '.[demo,metrics,report,safetensors]' \
    && pip uninstall --yes rlbroker
COPY README.md LICENSE ./
COPY src src
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-deps . && pip check

FROM ${BASE}
LABEL org.opencontainers.image.title="rlbroker" \
      org.opencontainers.image.description="The Redis-backed broker between reinforcement-learning learners and rollout workers" \
      org.opencontainers.image.licenses="Apache-2.0"
# The user has a name, as libraries ask for it; another number works too. A volume on /checkpoint is its own from the start.
RUN groupadd --gid 10001 rlbroker && useradd --uid 10001 --gid 10001 --create-home rlbroker \
    && install -d -o 10001 -g 10001 /checkpoint
# What is only kept for a while goes to /tmp, which is there also where the root file system is read-only.
ENV PATH=/opt/rlbroker/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/home/rlbroker \
    MPLBACKEND=Agg \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache
USER 10001:10001
WORKDIR /home/rlbroker
STOPSIGNAL SIGTERM
# Whether the learner or the worker of this container is well; RLBROKER_RUN says of which run.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD rlbroker check --self || exit 1
ENTRYPOINT ["rlbroker"]
CMD ["--help"]
# Last, as all above stays as it is when the source changes.
COPY --from=build /opt/rlbroker /opt/rlbroker
