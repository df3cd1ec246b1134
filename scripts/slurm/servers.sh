# The servers of a heterogeneous job. Sourced by train_with_servers.sbatch after common.sh.
# shellcheck shell=bash disable=SC2154 # variables of common.sh, and of recipe_values.py

declare -A urls=()  # by kind of server, separated by blanks
server_overrides=() # of the recipe: the addresses of the servers
hint="sbatch --nodes N ... : --nodes N ... : --nodes N ... train_with_servers.sbatch"

# Check the variables, and find the address of each server.
require_servers() {
    local kind group=0
    read -r -a SERVERS <<<"${SERVERS:-rollout teacher}"
    [ "${SLURM_HET_SIZE:-1}" -eq $((${#SERVERS[@]} + 1)) ] ||
        fail "SERVERS = ${SERVERS[*]}: needs $((${#SERVERS[@]} + 1)) components, this job has ${SLURM_HET_SIZE:-1}: $hint"
    for kind in "${SERVERS[@]}"; do
        group=$((group + 1))
        case "$kind" in
            rollout) find_servers "$kind" $group "${ROLLOUT_PORT:-$((30000 + SLURM_JOB_ID % 1000))}" --vllm_server_urls ;;
            teacher) find_servers "$kind" $group "${TEACHER_PORT:-$((31000 + SLURM_JOB_ID % 1000))}" --teacher_model_server ;;
            *) fail "SERVERS = ${SERVERS[*]}: must be rollout, teacher, or both" ;;
        esac
    done
    if [ -n "${urls[teacher]:-}" ]; then
        [ -n "${TEACHER_SERVER:-}${TEACHER_MODEL:-}" ] || fail "TEACHER_MODEL is not set: name the model of the teacher servers"
    fi
}

# Set the addresses of the servers of a component: one server for each task, with ports that are unique in the job.
find_servers() {
    local kind="$1" group="$2" port="$3" key="$4" node address i
    local list="SLURM_JOB_NODELIST_HET_GROUP_$group" per_node="SLURM_NTASKS_PER_NODE_HET_GROUP_$group"
    [ -z "${urls[$kind]:-}" ] || fail "SERVERS = ${SERVERS[*]}: must name each kind once"
    for node in $(scontrol show hostnames "${!list}"); do
        address="$(node_address "$node")"
        for ((i = 0; i < ${!per_node:-1}; i++)); do
            urls[$kind]+="${urls[$kind]:+ }http://$address:$port"
            port=$((port + 1))
        done
    done
    server_overrides+=("$key" "[${urls[$kind]// /, }]")
}

start_servers() {
    local kind group=0
    local rollout="${ROLLOUT_SERVER:-$(vllm_serve "$rollout_options")}" teacher="${TEACHER_SERVER:-}"
    [ -n "$teacher" ] || teacher="$(vllm_serve "$(printf %q "${TEACHER_MODEL:-}") $teacher_options")"
    for kind in "${SERVERS[@]}"; do
        group=$((group + 1))
        case "$kind" in
            rollout) start_component "$kind" $group "$rollout ${ROLLOUT_ARGS:-}" ;;
            teacher) start_component "$kind" $group "$teacher ${TEACHER_ARGS:-}" ;;
        esac
    done
}

# Print a command, of which each task replaces the number of its GPUs.
vllm_serve() {
    # shellcheck disable=SC2016
    echo "${VLLM:-vllm} serve $1"' ${gpus:+--tensor-parallel-size ${#gpus[@]}}'
}

# Start the servers of a component, which end together.
start_component() {
    local kind="$1" group="$2" per_node="SLURM_NTASKS_PER_NODE_HET_GROUP_$2" nodes="SLURM_JOB_NUM_NODES_HET_GROUP_$2"
    local port="${urls[$kind]%% *}"
    local new_weights=0
    [ "$kind" != rollout ] || new_weights=1 # the routes that load them are in vLLM's development mode
    # shellcheck disable=SC2016,SC2086 # the variables are those of the task
    SERVER="$3" FIRST_PORT="${port##*:}" VLLM_SERVER_DEV_MODE=$new_weights VLLM_ALLOW_RUNTIME_LORA_UPDATING=$new_weights \
        srun --het-group="$group" --nodes="${!nodes}" --ntasks=$((${!nodes} * ${!per_node:-1})) --ntasks-per-node="${!per_node:-1}" \
        --distribution=block --kill-on-bad-exit=1 --cpu-bind=none --open-mode=append --output="$LOG_DIR/${kind}_%t.log" \
        ${SRUN_ARGS:-} bash -c '
            IFS=, read -r -a gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
            eval "exec $SERVER --host 0.0.0.0 --port $((FIRST_PORT + SLURM_PROCID))"' server &
    pids["$kind"]=$!
}

# Wait until all servers answer; end the job where one ends, or takes too long.
wait_until_ready() {
    local deadline=$((SECONDS + ${READY_WITHIN_S:-1800})) kind url
    for kind in "${SERVERS[@]}"; do
        for url in ${urls[$kind]}; do
            until is_ready "${url#http://}"; do
                ! $is_stopping || stop_before_training
                require_running
                if [ $SECONDS -ge $deadline ]; then
                    stop_servers
                    fail "$kind server $url: not ready after ${READY_WITHIN_S:-1800} s (READY_WITHIN_S); see $LOG_DIR/${kind}_*.log" "$unavailable"
                fi
                pause
            done
        done
    done
    echo "job $SLURM_JOB_ID: the servers are ready: ${urls[*]}"
}

is_ready() {
    # shellcheck disable=SC2016
    timeout 5 bash -c 'exec 3<>"/dev/tcp/$1/$2" && printf "GET /health HTTP/1.0\r\nHost: %s\r\n\r\n" "$1" >&3 &&
        read -r _ status _ <&3 && [ "$status" = 200 ]' health "${1%:*}" "${1##*:}" 2>/dev/null
}

require_running() {
    local kind code=0
    for kind in "${SERVERS[@]}"; do
        is_running "$kind" && continue
        wait "${pids[$kind]}" || code=$?
        stop_servers
        fail "the $kind servers have ended with exit code $code before they were ready; see $LOG_DIR/${kind}_*.log" "$unavailable"
    done
}

# Let the training save and end, where servers have ended first, and end the servers.
end_together() {
    if [ "$ended" != training ]; then
        echo "job $SLURM_JOB_ID: the $ended servers have ended; stopping the training; see $LOG_DIR/${ended}_*.log" >&2
        is_stopping=true
        kill -USR1 "${pids[training]}" 2>/dev/null || true
        wait_for_end training "${STOP_WITHIN_S:-900}" || kill -TERM "${pids[training]}"
    fi
    stop_servers
}

stop_servers() {
    local kind
    for kind in "${SERVERS[@]}"; do
        ! is_running "$kind" || kill -TERM "${pids[$kind]}"
    done
    for kind in "${SERVERS[@]}"; do
        wait_for_end "$kind" 60 || kill -KILL "${pids[$kind]}"
    done
}
