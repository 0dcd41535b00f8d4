# The whole of hbp. CPU, as it stands:
#   docker build -t hbp .        docker run --rm -v "$PWD:/work" hbp plan --help
# GPUs: a CUDA build of torch in place of the CPU one (the base image needs no CUDA: torch's wheels bring it, the driver
# comes from the host):
#   docker build -t hbp:cuda --build-arg TORCH='torch==2.13.0' --build-arg TORCH_INDEX= .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" --entrypoint torchrun hbp:cuda \
#       --nproc-per-node 8 -m hbp train mine.yaml
# --ipc host: NCCL and the data workers need more shared memory than a container has by itself.
# model.compile needs a C compiler at run time, and so does Triton: `--build-arg BUILD=gcc` adds one.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md constraints-cpu.txt ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG BUILD=
RUN if [ -n "$BUILD" ]; then apt-get update && apt-get install -y --no-install-recommends $BUILD libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi
# torch alone first: the layer that is large and seldom changes
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} "$TORCH"
COPY --from=wheel /dist /dist
RUN wheel=$(echo /dist/*.whl) && pip install --no-cache-dir "$wheel[all]" "$TORCH" && hbp --version
WORKDIR /work
ENV HBP_CACHE=/work/.cache/hbp
ENTRYPOINT ["hbp"]
CMD ["--help"]
