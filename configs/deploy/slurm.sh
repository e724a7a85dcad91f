#!/bin/bash
# Slurm: a service on two machines. Submit it in the folder that has my.yaml, on storage that all machines have:
#   sbatch configs/deploy/slurm.sh my.yaml
# At its time limit the job is put back into the queue, and the same command goes on with the round.
#SBATCH --job-name=selfplay
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
config=${1:?the configuration}
export RAY_USAGE_STATS_ENABLED=0
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" --overlap hostname --ip-address | cut -d ' ' -f 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs of one machine do not meet
export RAY_ADDRESS="$head:$port"

srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" --overlap \
    ray start --head --node-ip-address="$head" --port="$port" --num-gpus="$SLURM_GPUS_PER_NODE" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --include-dashboard=false --block &
until ray status >/dev/null 2>&1; do sleep 2; done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others)); then
    srun --nodes="$others" --ntasks="$others" --exclude="${hosts[0]}" --overlap \
        ray start --address="$RAY_ADDRESS" --num-gpus="$SLURM_GPUS_PER_NODE" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
fi

# Fifteen minutes before the limit Slurm sends SIGTERM here: the service ends its shard or saves the trainer.
ended=0
selfplay serve --config "$config" &
service=$!
trap 'kill -TERM "$service"; ended=1' TERM
wait "$service" || true
if ((ended)); then
    wait "$service" || true
    scontrol requeue "$SLURM_JOB_ID"
fi
