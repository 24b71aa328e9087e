# deepvit_train with the versions of requirements.lock. This file has not been built by its authors: report a fault.
#     docker build -t deepvit_train .
#     docker run --gpus all -v /data:/data:ro -v "$PWD/runs:/work/runs" deepvit_train \
#         deepvit-train data.root=/data/imagenet
FROM python:3.12-slim

# torch.compile calls a compiler (trainer.compile=true).
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# One of the packages (antlr4-python3-runtime) comes as source only; pip builds it.
COPY requirements.lock /tmp/
RUN pip install --no-cache-dir --require-hashes -r /tmp/requirements.lock

COPY . /src
# hatchling, which builds the package, is among those of the lock file.
RUN pip install --no-cache-dir --no-deps --no-build-isolation /src

RUN useradd --create-home train && mkdir -p /work/runs && chown -R train /work
USER train
WORKDIR /work
CMD ["deepvit-train", "--help"]
