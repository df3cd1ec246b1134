# What the job scripts share: the variables of a job, its training step, signals and requeueing. They source this file.
#
#   RECIPE           the recipe; relative paths start at the folder of the submission
#   PYTHON           the interpreter on all nodes (python, which an active environment provides)
#   NPROC            processes on each node (one for each GPU)
#   SRUN_ARGS        further options of srun, for example --container-image and --container-mounts
#   LOG_DIR          folder of the log files (logs in output_dir)
#   MASTER_ADDR      where the nodes meet (the first node)
#   MASTER_PORT      the port there (by the job's number)
#   MAX_REQUEUES     how often a job is requeued without a new checkpoint (3)
# shellcheck shell=bash

declare -A pids=() # of srun, by part: training, rollout, teacher
ended=""           # the part that has ended first
is_stopping=false  # whether this job has received a signal to end
interrupted=75     # exit code of a run that has saved and can be continued
unavailable=69     # exit code of a run whose servers do not work

fail() {
    echo "$1" >&2
    exit "${2:-2}"
}

begin_job() {
    [ -n "${SLURM_JOB_ID:-}" ] || fail "SLURM_JOB_ID is not set: submit this script by sbatch"
    [ -n "${RECIPE:-}" ] || fail "RECIPE is not set: name the recipe, RECIPE=recipe.yaml sbatch ..."
    [ -f "$RECIPE" ] || fail "RECIPE = $RECIPE: no such file, seen from $PWD"
    PYTHON="${PYTHON:-python}"
    NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-gpu}}"
    [[ "$NPROC" =~ ^([1-9][0-9]*|gpu)$ ]] || fail "NPROC = $NPROC: must be an integer >= 1, or gpu"
    MAX_REQUEUES="${MAX_REQUEUES:-3}"
    [[ "$MAX_REQUEUES" =~ ^[0-9]+$ ]] || fail "MAX_REQUEUES = $MAX_REQUEUES: must be an integer >= 0"
    overrides=("$@")
    nodes="$SLURM_JOB_NUM_NODES"
    trap on_signal USR1 TERM
    set_environment
    read_recipe
    export LOG_DIR="${LOG_DIR:-$output_dir/logs}"
    mkdir -p "$LOG_DIR" || fail "LOG_DIR = $LOG_DIR: cannot be made"
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $RECIPE on $SLURM_JOB_NODELIST, --nproc $NPROC, logs in $LOG_DIR"
}

set_environment() {
    # Slurm does not hand sbatch's --cpus-per-task on to srun.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || set_default SRUN_CPUS_PER_TASK "$SLURM_CPUS_PER_TASK"
    # The log shows a line when it is printed.
    set_default PYTHONUNBUFFERED 1
    # NCCL says why a connection fails; its INFO messages would fill the log.
    set_default NCCL_DEBUG WARN
    # NVLink SHARP's buffers take GPU memory for each communicator, of which TP, PP, CP, EP and DP have several.
    set_default NCCL_NVLS_ENABLE 0
    # Kernels of one stream start in order, so that communication overlaps with the computation that follows it.
    set_default CUDA_DEVICE_MAX_CONNECTIONS 1
    # Transformer Engine's norms leave multiprocessors to NCCL's kernels that run beside them.
    set_default NVTE_FWD_LAYERNORM_SM_MARGIN 16
    set_default NVTE_BWD_LAYERNORM_SM_MARGIN 16
    # The processes of a node share its cores; the launcher would give each of them one thread.
    if [ "$NPROC" != gpu ] && [ -n "${SLURM_CPUS_ON_NODE:-}" ]; then
        local threads=$((SLURM_CPUS_ON_NODE / NPROC))
        set_default OMP_NUM_THREADS $((threads < 1 ? 1 : threads > 16 ? 16 : threads))
    fi
}

set_default() {
    export "$1=${!1:-$2}"
}

# Check the recipe on the first node, where the environment of the training is, and set output_dir and student_server.
read_recipe() {
    local values code=0
    # shellcheck disable=SC2086,SC2154 # SRUN_ARGS has several words; the job script sets folder
    values="$(srun ${SLURM_HET_SIZE:+--het-group=0} --nodes=1 --ntasks=1 ${SRUN_ARGS:-} \
        "$PYTHON" "$folder/recipe_values.py" "$nodes" "$NPROC" "$RECIPE" "${overrides[@]}")" || code=$?
    [ "$code" -eq 0 ] || exit "$code"
    eval "$values"
}

# Start a launcher on each node, which forwards signals to its ranks and keeps their exit code.
start_training() {
    ! $is_stopping || stop_before_training
    local command=("$PYTHON" -m megatron_gkd train "$RECIPE" "${overrides[@]}" --nproc "$NPROC")
    if [ "$nodes" -gt 1 ]; then
        command+=(--nnodes "$nodes" --rdzv "$(rendezvous)")
    fi
    # One node's end must not end the others, which save; the ranks share all cores of their node.
    # shellcheck disable=SC2016,SC2086 # the variables are those of the task
    srun ${SLURM_HET_SIZE:+--het-group=0} --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        --kill-on-bad-exit=0 --wait=0 --cpu-bind=none ${SRUN_ARGS:-} bash -c '
            if [ "$SLURM_NODEID" != 0 ]; then exec >>"$LOG_DIR/node_$SLURM_NODEID.log" 2>&1; fi
            exec "$@" --node-rank "$SLURM_NODEID"' node "${command[@]}" &
    pids[training]=$!
}

rendezvous() {
    local first
    first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    # Two jobs on one node need two ports, below those that the system gives away.
    echo "${MASTER_ADDR:-$(node_address "$first")}:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
}

# Print the address of a node: its name, or where that is no host's name, the address that Slurm uses.
node_address() {
    if getent ahosts "$1" >/dev/null; then
        echo "$1"
    else
        scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
    fi
}

# A signal before the time limit reaches this script alone. With preemption, requeueing and cancellation Slurm has sent SIGTERM to the
# ranks, too, for which this is a second signal without an effect.
on_signal() {
    is_stopping=true
    if is_running training; then
        kill -USR1 "${pids[training]}" 2>/dev/null || true # srun forwards it
    fi
}

stop_before_training() {
    stop_servers
    requeue
    exit $interrupted
}

# servers.sh replaces it.
stop_servers() {
    :
}

is_running() {
    [ -n "${pids[$1]:-}" ] && kill -0 "${pids[$1]}" 2>/dev/null
}

pause() {
    sleep 0.5 &
    wait $! || true # a signal ends the wait, not the sleep
}

# Wait until one of the named parts ends.
wait_for_first() {
    local part
    while :; do
        for part in "$@"; do
            if ! is_running "$part"; then
                # shellcheck disable=SC2034 # servers.sh uses it
                ended="$part"
                return
            fi
        done
        pause
    done
}

# Wait until a part ends, at most some seconds; return 1 if it runs then.
wait_for_end() {
    local deadline=$((SECONDS + $2))
    while is_running "$1"; do
        [ $SECONDS -lt $deadline ] || return 1
        pause
    done
}

# End the job with the exit code of the training, or requeue it.
end_job() {
    local code=0
    wait "${pids[training]}" || code=$?
    if $is_stopping && { [ $code -eq 138 ] || [ $code -eq 143 ]; }; then
        code=$interrupted # the signal came before the launcher could handle it: nothing has changed
    fi
    if [ $code -eq $unavailable ] && [ ${#pids[@]} -gt 1 ]; then
        code=$interrupted # the servers are the job's own, which starts them again
    fi
    if [ $code -eq $interrupted ]; then
        requeue
    elif [ $code -ne 0 ]; then
        echo "job $SLURM_JOB_ID: the training has ended with exit code $code; each node's output is in $LOG_DIR" >&2
    fi
    exit $code
}

requeue() {
    local state step record="$LOG_DIR/requeues"
    state="$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T | head -n 1)"
    if [ "$state" != RUNNING ]; then
        echo "job $SLURM_JOB_ID: Slurm has requeued or canceled it (${state:-unknown})"
        return
    fi
    step="$(newest_checkpoint)"
    touch "$record"
    if [ "$(grep -c "^$SLURM_JOB_ID $step " "$record")" -ge "$MAX_REQUEUES" ]; then
        echo "job $SLURM_JOB_ID: not requeued again, $MAX_REQUEUES times without a checkpoint after $step (MAX_REQUEUES)" >&2
        return
    fi
    echo "$SLURM_JOB_ID $step $(date +%FT%T)" >>"$record"
    echo "job $SLURM_JOB_ID: interrupted, newest checkpoint $step; requeueing"
    scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: cannot be requeued; submit it again to continue" >&2
}

newest_checkpoint() {
    local newest
    # Not those that were set aside, step-N.1.
    newest="$(find "$output_dir/checkpoints" -maxdepth 1 2>/dev/null | sed -n 's|.*/\(step-[0-9]*\)$|\1|p' | sort -V | tail -n 1)"
    echo "${newest:-none}"
}
