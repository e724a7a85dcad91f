#!/bin/sh
# Ray on machines that you start by hand. Ray and selfplay[cluster] are installed in the same versions on all of them, and the
# storage of the runs is mounted under the same path.
#   first machine:   HEAD=10.0.0.1 configs/deploy/ray-nodes.sh head     then: selfplay serve --config my.yaml
#   other machines:  HEAD=10.0.0.1 configs/deploy/ray-nodes.sh node
# Whoever reaches Ray's ports may run any program as this user: HEAD is an address of a private network.
set -eu
: "${HEAD:?the address of the first machine in the private network}"
PORT=${PORT:-6379}
export RAY_USAGE_STATS_ENABLED=0
case "${1:-}" in
head) exec ray start --head --node-ip-address="$HEAD" --port="$PORT" --include-dashboard=false ;;
node) exec ray start --address="$HEAD:$PORT" ;;
*)
    echo "usage: HEAD=address $0 head|node" >&2
    exit 2
    ;;
esac
