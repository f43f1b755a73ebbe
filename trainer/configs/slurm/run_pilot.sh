#!/usr/bin/env bash
#SBATCH --job-name=pilot
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=16
#SBATCH --mem=120G
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Two minutes before the time limit, SIGTERM makes the trainer save a checkpoint; a requeued job goes
# on from it, because --resume starts from the beginning where there is none.
# Effective batch = microbatch x grad_accum_steps x processes: 4 x 8 x 4 = 128 with the printed config.
set -euo pipefail
config=${1:-pilot_config.yaml}
name=${2:-pilot_01}
srun modelops train "$config" --run-name "$name" --processes "${SLURM_GPUS_ON_NODE:-4}" --resume
