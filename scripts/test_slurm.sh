#!/usr/bin/env bash
# Starts a Slurm cluster of four nodes on this machine and tests the job scripts on it: bash scripts/test_slurm.sh [pytest arguments]
#
# It needs root and Debian's packages slurm-wlm and munge, which it installs where they are missing, and leaves the test out with a
# message and exit code 0 where that is impossible. The cluster has its own configuration, ports and folders, and ends with the test.
# The python of the active environment runs the tests, or that of .venv.
#
#   MEGATRON_GKD_SLURM   1: fail where the cluster cannot be started, instead of leaving the test out
set -euo pipefail
cd "$(dirname "$0")/.."

leave_out() {
    echo "Slurm: NOT TESTED: $1"
    [ "${MEGATRON_GKD_SLURM:-0}" = 1 ] && exit 1
    exit 0
}

install_packages() {
    local log="$1/apt.log" apt=(timeout 120 apt-get -o DPkg::Lock::Timeout=60 -qq)
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    command -v apt-get >/dev/null || leave_out "slurm-wlm and munge are missing, and there is no apt-get"
    export DEBIAN_FRONTEND=noninteractive
    "${apt[@]}" install -y --no-install-recommends slurm-wlm munge >"$log" 2>&1 ||
        { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends slurm-wlm munge; } >"$log" 2>&1 ||
        leave_out "slurm-wlm and munge cannot be installed: $(grep -m 1 '^E:' "$log" || tail -n 1 "$log")"
}

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

write_configuration() {
    local host node
    host="$(hostname -s)"
    cat <<END
ClusterName=megatron-gkd
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
AuthType=auth/munge
# A job that is requeued waits until its credential has expired.
AuthInfo=socket=$cluster/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmUser=root
ReturnToService=2
KillWait=30
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1
# The nodes have more cores than the machine, which they share.
SlurmdParameters=config_overrides
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool-%n
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd-%n.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd-%n.log
PartitionName=test Nodes=ALL Default=YES State=UP MaxTime=INFINITE
END
    for node in "${nodes[@]}"; do
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=8 RealMemory=1000"
    done
}

start_cluster() {
    local node
    chmod 755 "$cluster"
    mkdir "$cluster/state" "$cluster/munge"
    head -c 1024 /dev/urandom >"$cluster/munge/key"
    chmod 600 "$cluster/munge/key"
    chown -R munge "$cluster/munge"
    setpriv --reuid=munge --regid=munge --clear-groups munged --key-file="$cluster/munge/key" --socket="$cluster/munge/socket" \
        --pid-file="$cluster/munge/munged.pid" --log-file="$cluster/munge/munged.log" --seed-file="$cluster/munge/seed"
    write_configuration >"$SLURM_CONF"
    slurmctld
    for node in "${nodes[@]}"; do
        mkdir "$cluster/spool-$node"
        slurmd -N "$node"
    done
    for ((i = 0; i < 100; i++)); do
        [ "$(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l)" -lt ${#nodes[@]} ] || return 0
        sleep 0.2
    done
    return 1
}

# Runs at the end, also after a failure: nothing of the cluster is left.
stop_cluster() {
    local status=$? file pid
    if [ -e "$cluster/slurmctld.pid" ]; then
        scancel --user root 2>/dev/null || true
        for ((i = 0; i < 100; i++)); do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    for file in "$cluster"/slurmd-*.pid "$cluster/slurmctld.pid" "$cluster/munge/munged.pid"; do
        [ -e "$file" ] || continue
        pid="$(cat "$file")"
        kill "$pid" 2>/dev/null || true
        for ((i = 0; i < 50; i++)); do
            is_alive "$pid" || break
            sleep 0.1
        done
        ! is_alive "$pid" || kill -KILL "$pid"
    done
    if [ $status -ne 0 ]; then
        tail -n 5 "$cluster"/*.log >&2 2>/dev/null || true
    fi
    rm -rf "$cluster"
    exit $status
}

is_alive() {
    [ -e "/proc/$1/stat" ] && [ "$(awk '{print $3}' "/proc/$1/stat" 2>/dev/null)" != Z ]
}

python="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"
nodes=(gkd-node0 gkd-node1 gkd-node2 gkd-node3)
cluster="$(mktemp -d -t megatron-gkd-slurm.XXXXXX)"
export SLURM_CONF="$cluster/slurm.conf"
trap stop_cluster EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
[ "$(id -u)" = 0 ] || leave_out "starting a cluster needs root"
install_packages "$cluster"
start_cluster || leave_out "the cluster did not start: $(tail -n 1 "$cluster/slurmctld.log" 2>/dev/null)"
MEGATRON_GKD_SLURM_CLUSTER="$cluster" OMP_NUM_THREADS=1 "$python" -m pytest -q -rs "${@:-tests/slurm/test_on_a_cluster.py}"
