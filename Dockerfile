# stm with everything that it needs, in the versions of requirements.lock: no GPU, no network and no mounted checkout are needed to run the demo.
#
#   docker build --tag stm .
#   alias instm='docker run --rm --shm-size=8g --volume "$PWD:/study" --user "$(id -u):$(id -g)" stm'   # with GPUs: also --gpus all
#   instm stm init demo --config demo && cd demo && instm snakemake --cores 2                           # the demo
#   instm stm init my-study                                                                             # a study of your own
#   docker build --build-arg JAVA=1 --tag stm .                                                         # with the metrics of captions
#
# CPU or CUDA: the lock's torch is PyPI's standard build, which contains CUDA and also runs without a GPU; the image takes about 7 GB. Loading processes
# pass batches through /dev/shm, of which a container has 64 MB by default: hence --shm-size (docs/cluster.md). `compile: true` needs a C compiler: gcc.
# In a cluster without Docker: apptainer build stm.sif docker-daemon://stm:latest

FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/stm
# The packages first: they are installed again only if the lock changes.
COPY requirements.lock /source/
RUN /opt/stm/bin/pip install --require-hashes --requirement /source/requirements.lock
COPY . /source
RUN /opt/stm/bin/pip install --no-deps --no-build-isolation /source

FROM python:3.11.13-slim-bookworm
ARG JAVA=0
# Debian removes old versions of a package from its mirrors, so a pinned one would soon not install.
# hadolint ignore=DL3008
RUN if [ "$JAVA" = 1 ]; then \
      apt-get update && apt-get install --yes --no-install-recommends default-jre-headless && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /opt/stm /opt/stm
RUN useradd --create-home --uid 1000 stm && mkdir /study && chown stm /study
ENV PATH=/opt/stm/bin:$PATH HF_HOME=/study/.hf MPLCONFIGDIR=/tmp/matplotlib XDG_CACHE_HOME=/tmp/cache
USER 1000
WORKDIR /study
CMD ["stm", "--help"]
