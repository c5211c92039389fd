#!/usr/bin/env bash
# Installs the peers that side_by_side.py runs: torch, transformers, TRL, peft, and llama.cpp with its bench tools.
#   VENV=.venv-baselines MODELS=models scripts/baselines/setup.sh       (about 6 minutes and 5 GB; safe to run again)
set -euo pipefail
cd "$(dirname "$0")/../.."
VENV=${VENV:-.venv-baselines}
MODELS=${MODELS:-models}
py="$VENV/bin/python"

[ -x "$py" ] || python3 -m venv "$VENV"
"$py" -c 'import torch, trl, peft, datasets, gguf' 2>/dev/null ||
    "$py" -m pip install -q torch==2.15.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2 datasets==5.2.0 gguf==0.19.0

# llama.cpp from the source package of its Python binding, for this CPU, with llama-batched-bench and llama-quantize.
bin=$("$py" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/bin
[ -x "$bin/llama-batched-bench" ] ||
    CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_TOOLS_INSTALL=ON -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF -DCMAKE_INSTALL_RPATH=$ORIGIN/../lib' \
        "$py" -m pip install -q --no-binary llama-cpp-python llama-cpp-python==0.3.36

# One set of weights for all: the GGUF that fetch_smollm2 downloads, widened to F32 and BF16, and as a Hugging Face folder.
[ -e "$MODELS/smollm2" ] || scripts/fetch_smollm2
q4=$(find "$MODELS/smollm2" -name '*.gguf' | head -1)
mkdir -p "$MODELS/smollm2-gguf"
for type in F32 BF16; do
    out="$MODELS/smollm2-gguf/smollm2-135m-$type.gguf"
    [ -f "$out" ] || "$bin/llama-quantize" --allow-requantize "$q4" "$out" "$type" "$(nproc)" >/dev/null 2>&1
done
[ -d "$MODELS/smollm2-hf-f32" ] || "$py" - "$q4" "$MODELS/smollm2-hf-f32" <<'P'
import os, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file = os.path.split(sys.argv[1])
for cls, more in ((AutoModelForCausalLM, {"dtype": torch.float32}), (AutoTokenizer, {})):
    cls.from_pretrained(folder, gguf_file=file, **more).save_pretrained(sys.argv[2])
P
echo "ready: VENV=$VENV MODELS=$MODELS"
