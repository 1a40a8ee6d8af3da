#!/bin/sh
# Is Redis ready? While it loads its file it answers, but not with PONG.
set -eu
REDISCLI_AUTH=${REDIS_PASSWORD:-}
[ ! -r /run/secrets/redis_password ] || REDISCLI_AUTH=$(cat /run/secrets/redis_password)
[ -z "$REDISCLI_AUTH" ] || export REDISCLI_AUTH
[ "$(redis-cli ping)" = PONG ]
