#!/bin/sh
# Starts Prometheus with the API key that it scrapes the API with, in a file that only this container
# sees. Without AUTH=keys there is none, and the file is empty.
set -eu
umask 077
key=${PROMETHEUS_API_KEY:-}
[ ! -r /run/secrets/prometheus_api_key ] || key=$(cat /run/secrets/prometheus_api_key)
printf %s "$key" >/tmp/api_key
unset PROMETHEUS_API_KEY
exec /bin/prometheus "$@"
