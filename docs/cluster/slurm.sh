#!/bin/bash
# Train on two to four machines with Slurm; see docs/scaling.md.
#
#     sbatch docs/cluster/slurm.sh
#
# Replace the number of GPUs, the paths and the time. The batch size must be divisible by the number
# of GPUs for every number of machines.
#SBATCH --job-name=jaxvid
#SBATCH --nodes=2-4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=jaxvid-%j.txt
#SBATCH --open-mode=append
# Slurm requeues the job if a machine fails or if another job preempts it.
#SBATCH --requeue
# 5 minutes before the time limit, the processes receive SIGTERM and save a checkpoint.
#SBATCH --signal=TERM@300

# Without --kill-on-bad-exit=0, Slurm could kill the other processes before they have reported the
# failure.
srun --kill-on-bad-exit=0 python main.py --config configs/xvit_k600.py \
    --config.data.source=pack --config.data.folder=/shared/k600_pack --workdir /shared/runs/k600
code=$?

# 143: a signal stopped the processes, which saved a checkpoint. 2: invalid input, or a process was
# lost: requeue at most 10 times.
if [ "$code" = 143 ] || { [ "$code" = 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
