# Settings of CUDA, torch and NCCL for a run on GPUs; source it before the launcher. What is set already stays.
#   source examples/gpu_environment.sh
#   deepspeed --num_gpus 8 examples/train.py --recipe RECIPE.yaml
# The deepspeed launcher hands NCCL_* on to other nodes. The rest goes into the file .deepspeed_env of the folder that it is
# started in, a NAME=VALUE a line:
#   bash -c 'source examples/gpu_environment.sh && env | grep -E "^(CUDA_DEVICE|PYTORCH_ALLOC|OMP_NUM)"' >.deepspeed_env

# One hardware queue: kernels start in the order of their launch. Megatron-Core launches the messages of tensor and
# sequence parallelism before the matrix product that they overlap with, and relies on it (up to Hopper; Blackwell needs
# nothing). Without it results are right, but messages may wait behind products: Megatron-Core's layers warn, and
# Megatron-LM's own trainer refuses tensor and context parallelism. With ZeRO 3 and neither of them leave it unset: gathers
# of weights then overlap better.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-1}"

# Blocks of memory that grow: sequences of changing length and the gathers of ZeRO 3 otherwise fragment the allocator's.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# A line for every error of NCCL. Which network card it takes is the site's to say: NCCL_SOCKET_IFNAME, NCCL_IB_HCA.
# Torch's defaults serve: a failed collective ends its process (TORCH_NCCL_ASYNC_ERROR_HANDLING=3), and a flight recorder
# keeps the last 2,000 collectives (TORCH_FR_BUFFER_SIZE). Torch writes them down at the group's timeout, here 2 x
# training.hang_timeout + 60 s; the run's own watchdog ends a hang before that.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# CPU threads of a rank, for Adam on the host (deepspeed.offload_optimizer); torchrun would set one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
