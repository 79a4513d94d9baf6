#!/bin/bash
# A search on the nodes of a Slurm allocation; further arguments are those of 'nas search':
#   sbatch --nodes 5 --time 8:00:00 recipes/cluster/slurm.sh --recipe recipes/cifar10.yaml --out runs/cifar10
# The first node carries the driver, Ray's head and the target (--target ray:target/...): latency counts there, and
# no candidate trains there. --out must be on a disk that survives the job; the same line goes on where it was
# stopped, and so does a job that ran out of time: it is put back into the queue.
#SBATCH --job-name=nas-search
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

if (( SLURM_JOB_NUM_NODES < 2 )); then
    echo "slurm.sh: --nodes=${SLURM_JOB_NUM_NODES} must be at least 2: the first is the target, the others train" >&2
    exit 2
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Jobs that share a node must not share a port.
port=$(( 20000 + SLURM_JOB_ID % 10000 ))
address="$head:$port"
export RAY_USAGE_STATS_ENABLED=0

steps=()
search=""
out_of_time=0
parked=0

leave() {
    # Ray ends with the steps that hold it.
    (( ${#steps[@]} == 0 )) || kill -TERM "${steps[@]}" 2>/dev/null || true
    wait
}
trap leave EXIT
park() {
    # Once: the second signal would end the search at once.
    [[ -z $search ]] || (( parked++ )) || kill -TERM "$search"
}
# Parks the running candidates; what was finished is recorded already.
trap 'out_of_time=1; park' USR1

start() {
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" ray start --block --disable-usage-stats "$@" &
    steps+=($!)
}

# No CPU is offered, so nothing trains there.
start "$head" --head --port="$port" --num-cpus=0 --num-gpus=0 --resources='{"target": 1}'
for attempt in {1..60}; do
    ray health-check --address "$address" >/dev/null 2>&1 && break
    if (( attempt == 60 )); then
        echo "slurm.sh: Ray did not start on $head within two minutes; see the messages above" >&2
        exit 1
    fi
    sleep 2
done
for node in "${nodes[@]:1}"; do
    # Offers what Slurm gave this job, not all that the machine has.
    start "$node" --address="$address" --num-cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}"
done
python -c '
import sys, time, ray
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
for _ in range(120):
    if sum(node["Alive"] for node in ray.nodes()) == int(sys.argv[2]):
        break
    time.sleep(1)
else:
    sys.exit("slurm.sh: not all nodes joined Ray within two minutes; see the messages above")
' "$address" "${#nodes[@]}"

code=0
if (( ! out_of_time )); then
    nas search --target ray:target/cpu:1 "$@" --ray "$address" &
    search=$!
    # The signal may have come before the trap knew whom to park.
    (( ! out_of_time )) || park
fi
# A signal ends 'wait' early.
while [[ -n $search ]] && kill -0 "$search" 2>/dev/null; do
    wait "$search" && code=0 || code=$?
done
if (( out_of_time )); then
    echo "slurm.sh: out of time; job $SLURM_JOB_ID goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
