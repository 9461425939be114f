#!/usr/bin/env bash
#SBATCH --job-name=lampctl
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lampctl-%j.log
#SBATCH --signal=B:TERM@120
# Slurm tells this shell two minutes before the wall, or when the job is preempted; the shell tells lampctl, which keeps
# what it has and ends with 75; the job then queues again and goes on.
set -uo pipefail

lampctl run facebook/opt-2.7b --sparsity 0.8 --run-dir "$SLURM_SUBMIT_DIR/runs/opt-2.7b-s80" --max-runtime 3h50m &
child=$!
trap 'kill -TERM "$child"' TERM INT

wait "$child"
code=$?
# A trapped signal ends `wait` before the child has ended.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done

case $code in
    75 | 137 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
    *) exit "$code" ;;
esac
