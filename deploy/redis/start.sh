#!/bin/sh
# Starts Redis with redis.conf and what the environment adds. The password goes through a file that
# only this container sees, so no list of processes shows it.
set -eu
umask 077
password=${REDIS_PASSWORD:-}
[ ! -r /run/secrets/redis_password ] || password=$(cat /run/secrets/redis_password)
{
  cat /etc/whisper/redis.conf
  echo "maxmemory ${REDIS_MAXMEMORY:-512mb}"
  # In double quotes Redis takes \ and " as special.
  [ -z "$password" ] || printf 'requirepass "%s"\n' "$(printf %s "$password" | sed 's/[\\"]/\\&/g')"
  # Without a password every address but loopback is refused, unless this is off.
  [ -n "$password" ] || echo "protected-mode no"
} >/tmp/redis.conf
exec /etc/whisper/mend.sh redis-check-aof /data redis-server /tmp/redis.conf
