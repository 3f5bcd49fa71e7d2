#!/usr/bin/env bash
# Runs a command in a container on this TPU VM, and starts it again as medllm's exit codes ask (docs/launch.md):
#   run_on_host.sh IMAGE MAX_RESTARTS GRACE_SECONDS COMMAND...
set -euo pipefail
if (($# < 4)); then
  echo "usage: run_on_host.sh IMAGE MAX_RESTARTS GRACE_SECONDS COMMAND..." >&2
  exit 2
fi
image=$1 max_restarts=$2 grace=$3
shift 3

# A name with a registry's host in it: pulled as the service account of this VM.
host=${image%%/*}
if [[ $host == *.* ]]; then
  gcloud auth configure-docker "$host" --quiet
fi

stopped=
# The container gets SIGTERM, and SIGKILL after the grace.
trap 'stopped=1; docker stop --time "$grace" medllm >/dev/null || true' TERM INT

restarts=0
while true; do
  code=0
  docker run --rm --name medllm --privileged --network host "$image" "$@" &
  wait $! || code=$?
  if [[ $stopped ]]; then # the signal ended the wait, and the container ended in the trap
    code=0
    wait $! || code=$?
    echo "told to end; the run ended with exit code $code"
    exit "$code"
  fi
  case $code in
    0) exit 0 ;;
    2 | 125 | 126 | 127)
      echo "exit code $code: the input, the image or its name is wrong; starting it again would not help" >&2
      exit "$code"
      ;;
    42) echo "preempted after saving: starting again" ;;
    *)
      if ((restarts == max_restarts)); then
        echo "exit code $code after $restarts restarts: giving up" >&2
        exit "$code"
      fi
      restarts=$((restarts + 1))
      echo "exit code $code: restart $restarts of $max_restarts"
      ;;
  esac
  sleep "${PAUSE_SECONDS:-10}"
done
