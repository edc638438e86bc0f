# An image with llmtrain installed.
#   docker build -t llmtrain .                                                      CUDA (default)
#   docker build -t llmtrain:cpu --build-arg BASE=python:3.11-slim --build-arg TORCH_INDEX=URL .     CPU; URL is the
#                                                         package index of PyTorch's CPU builds (without it: the CUDA build)
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" -e HOME=/work -v "$PWD:/work" llmtrain llmtrain run CONFIG --gpus 8
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/llmtrain
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY launcher launcher
COPY llmtrain llmtrain
COPY configs configs
# A base that already carries torch keeps it.
ARG TORCH_INDEX=
RUN python -c "import torch" 2>/dev/null || pip install torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt && pip install -c /tmp/constraints.txt .

# Not root: run folders on shared disks belong to the user. --user (above) makes them yours.
RUN useradd --create-home trainer
USER trainer
WORKDIR /work
CMD ["llmtrain", "--help"]
