#!/usr/bin/env bash
# Runs a command again until it succeeds, at most so many times:
#
#   ray job submit --address http://HEAD:8265 --working-dir . -- \
#     bash cluster/retry.sh 5 rlhf-ray ppo configs/node-8gpu/ppo.yaml paths.data=/abs paths.runs=/abs --resume
#
# `ray job submit` itself tries once. Not tried again: a command that was asked to stop (SIGTERM, SIGINT), which Ray
# sends to this script and to the command alike, and bad input (exit status 2), which trying again does not mend.
set -uo pipefail

if (($# < 2)); then
  echo "usage: retry.sh ATTEMPTS COMMAND [ARGUMENT]..." >&2
  exit 2
fi
attempts=$1
shift
delay_s=${RETRY_DELAY_S:-10}

stopped=
trap 'stopped=yes' TERM INT
for ((attempt = 1; ; attempt++)); do
  status=0
  "$@" || status=$?
  if ((status == 0 || status == 2 || attempt >= attempts)) || [[ -n $stopped ]]; then
    exit "$status"
  fi
  echo "attempt $attempt of $attempts ended with status $status; again in $delay_s s" >&2
  for ((waited = 0; waited < delay_s; waited++)); do
    sleep 1
    [[ -z $stopped ]] || exit "$status"
  done
done
