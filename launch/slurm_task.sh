#!/usr/bin/env bash
# What launch/slurm.sbatch runs on each node: its command, with all the node's GPUs. Under SLURM, JAX takes a process for one of
# several on its node, and gives it one GPU.
set -euo pipefail
if [[ -z ${JAX_LOCAL_DEVICE_IDS:-} ]]; then
    # SLURM sets CUDA_VISIBLE_DEVICES to what this job has of the node; JAX counts within it.
    gpus=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd , -)} || gpus=
    if [[ -n $gpus ]]; then
        commas=${gpus//[!,]/}
        JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 "${#commas}")
        export JAX_LOCAL_DEVICE_IDS
    fi
fi
exec "$@"
