#!/bin/bash
# A fine-tuning run over several nodes by SLURM. The number of nodes and GPUs is said here, or to sbatch:
#
#   sbatch scripts/slurm.sh configs/nft_stitched_sd35m.yaml                                  16 GPUs, four nodes of four
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm.sh configs/draft1_stitched_sd35m.yaml
#   sbatch --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 scripts/slurm.sh configs/nft_sd35m.yaml --model.lr 1e-4
#
# Whatever follows the configuration is handed to `stitchvm fit`. RUN is the run's folder (by default runs/ and the name
# of the configuration); if it has checkpoints, the job goes on from the last one, so that a job that was preempted,
# requeued or ran into its time limit is sent off again with the same command. See docs/multi_node.md.
#SBATCH --job-name=stitchvm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

config=${1:?usage: sbatch scripts/slurm.sh CONFIG [--KEY VALUE ...]}
shift
nodes=${SLURM_NNODES:?this script is for sbatch; on one machine run stitchvm fit}
devices=${SLURM_NTASKS_PER_NODE:?say the GPUs of a node with --ntasks-per-node, one task each}
run=${RUN:-runs/$(basename "$config" .yaml)}

# a configuration that shards keeps its strategy, over as many GPUs as there are; any other runs with DDP
if grep -q ModelParallelStrategy "$config"; then
    strategy=(--trainer.strategy.init_args.data_parallel_size "$((nodes * devices))")
else
    strategy=(--trainer.strategy ddp)
fi
last=()
if [[ -e $run/checkpoints/last.ckpt ]]; then
    last=(--ckpt_path last)
fi

# one process per task; each finds its rank in SLURM's variables
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${STITCHVM:-stitchvm} fit --config "$config" \
    --trainer.num_nodes "$nodes" --trainer.devices "$devices" "${strategy[@]}" \
    --trainer.default_root_dir "$run" "${last[@]}" "$@"
