# The whole of hbp, with the torch that the package index serves (the CUDA build on most):
#   docker build -t hbp .        docker run --rm -v "$PWD:/runs" hbp plan --help
#   docker run --rm --gpus all --ipc host -v "$PWD:/runs" --entrypoint torchrun hbp \
#       --nproc-per-node 8 -m hbp train mine.yaml
# The base image needs no CUDA: torch's wheels bring it, the driver comes from the host. --ipc host: NCCL and the data
# workers need more shared memory than a container has by itself. A CPU build, where an index has one, is far smaller:
#   docker build -t hbp:cpu --build-arg TORCH_INDEX=URL .
# model.compile needs a C compiler at run time, and so does Triton: `--build-arg BUILD=gcc` adds one.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md constraints-cpu.txt ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ARG BUILD=
RUN if [ -n "$BUILD" ]; then apt-get update && apt-get install -y --no-install-recommends $BUILD libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi
# torch alone first: the layer that is large and seldom changes
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} "$TORCH"
COPY --from=wheel /dist /dist
RUN wheel=$(echo /dist/*.whl) && pip install --no-cache-dir "$wheel[all]" "$TORCH" && hbp --version
WORKDIR /runs
ENV HBP_CACHE=/runs/.cache/hbp
ENTRYPOINT ["hbp"]
CMD ["--help"]
