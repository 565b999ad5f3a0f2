#!/bin/sh
# The rows of a recipe prepared on every machine of a hostfile, by Ray; run it on the first one. Ray is started on each
# over ssh with as many processors as its line has slots, and ends with this command. Each machine needs this package
# with its extra `ray` at the same path; OUT must lie on storage that all of them share, at the same path too. The bytes
# that come out are those of one process; the same command again goes on from the last finished part. Whoever reaches an
# open Ray can run anything on it: so there is a password for this one run, in a file beside OUT that only you can read.
#
# usage: deploy/prepare-ray.sh RECIPE OUT [KEY=VALUE]...
# settings: HOSTFILE=deploy/hostfile, PORT=6379, BIN=.venv/bin, RAY_OPTIONS= (more for `ray start`)
set -eu
recipe=$1
out=$2
shift 2
hostfile=${HOSTFILE:-deploy/hostfile}
port=${PORT:-6379}
bin=${BIN:-.venv/bin}
directory=$(pwd)
head=
sessions=
count=0
slots=0
token=$(realpath -m "$out").ray-token
log=$(realpath -m "$out").ray-log # what Ray says on all machines
mkdir -p "$(dirname "$token")"
(umask 077 && "$bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
trap 'kill $sessions 2>/dev/null || true; wait; rm -f "$token"' EXIT
trap 'exit 130' INT TERM
lines=$(sed 's/#.*//' "$hostfile" | awk 'NF { sub("slots=", "", $2); print $1 ":" $2 }')
for line in $lines; do
  host=${line%:*}
  if [ -z "$head" ]; then
    head=$host
    role="--head --port=$port --include-dashboard=false"
  else
    role="--address=$head:$port"
  fi
  # Ray ends there when the session does: -tt hangs up on the shell there, which ends what it started.
  ssh -tt "$host" "cd '$directory' && export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH='$token' && {
    trap 'kill \$ray; wait \$ray' HUP INT TERM
    $bin/ray start $role --node-ip-address=$host --num-cpus=${line#*:} --block --disable-usage-stats ${RAY_OPTIONS:-} &
    ray=\$!
    wait \$ray; }" </dev/null >>"$log" 2>&1 &
  sessions="$sessions $!"
  count=$((count + 1))
  slots=$((slots + ${line#*:}))
  [ "$count" -gt 1 ] || sleep 5 # the others need the first one
done
"$bin/python" - "$head:$port" "$count" "$log" <<'PYTHON'
import sys, time
import ray

address, count = sys.argv[1], int(sys.argv[2])
deadline = time.monotonic() + 120
while True:
    try:
        ray.init(address, log_to_driver=False, configure_logging=False)
        alive = sum(node["Alive"] for node in ray.nodes())
        ray.shutdown()
    except ConnectionError:
        alive = 0
    if alive >= count:
        break
    if time.monotonic() > deadline:
        sys.exit(f"error: {alive} of {count} machines joined Ray at {address} within 120 s; see {sys.argv[3]}")
    time.sleep(1)
PYTHON
echo "  Ray on $count machines, $slots processors"
RAY_ADDRESS="$head:$port" "$bin/pingjia" data prepare "$recipe" --out "$out" \
  prepare.engine=ray "prepare.processes=$slots" "$@"
