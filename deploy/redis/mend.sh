#!/bin/sh
# mend.sh CHECK FOLDER COMMAND...
# Mends the append-only file below FOLDER where a full disk has broken it, then becomes COMMAND, a
# Redis. CHECK is redis-check-aof, or a link of that name to the server.
#
# A Redis whose disk was full leaves a hole of zeros in its file, and does not start on it: since
# version 7 it opens the file that a rewrite begins without O_APPEND (openNewIncrAofForAppend in its
# src/aof.c), so what follows a write that it took back stands too far behind. Without the zeros all
# is there. Where the disk was full again before the next rewrite, Redis took back too much, by as
# many bytes as the holes have: the last commands before that are torn, and go with the zeros.
set -eu
export LC_ALL=C PATH="$PATH:/usr/bin:/bin"
check=$1 folder=$2/appendonlydir
shift 2

# How far into standard input the first command behind zeros is; nothing if there is none. Nobody who
# submits can forge one: what is kept of theirs is JSON, which escapes NUL and line ends, or has none.
next_command() {
  tr '\000\012\015' '\012@@' |
    awk 'at && /^\*[0-9]+@@\$[0-9]+@@/ { print at; exit } { at += length($0) + 1 }'
}

no_zeros() {
  tr -d '\000' | wc -c
}

# FILE becomes its first GOOD bytes and what is in FILE.rest.GOOD; again, if it was interrupted.
join() { # FILE GOOD
  dd if=/dev/null of="$1" bs=1 seek="$2" count=0 2>/dev/null
  cat "$1.rest.$2" >>"$1"
  sync
  rm "$1.rest.$2"
}

remove() { # FILE FROM BYTES
  torn=$(tail -c "+$(($2 + 1))" "$1" | head -c "$3" | no_zeros)
  tail -c "+$(($2 + $3 + 1))" "$1" >"$1.new"
  sync
  mv "$1.new" "$1.rest.$2"
  join "$1" "$2"
  echo "mend.sh: took $3 bytes out of $1 at $2: $(($3 - torn)) zeros, $((torn)) of torn commands"
}

mend() { # FILE
  for rest in "$1".rest.*; do
    [ ! -e "$rest" ] || join "$1" "${rest##*.}"
  done
  until said=$("$check" "$1" 2>&1); do
    good=$(echo "$said" | sed -n 's/.*ok_up_to=\([0-9]*\).*/\1/p')
    rest=$(($(wc -c <"$1") - ${good:?"$said"}))
    bytes=$(tail -c "$rest" "$1" | next_command)
    if [ -z "$bytes" ]; then
      case $(tail -c "$rest" "$1" | no_zeros):$1:$said in
        0:*) ;;
        *:"$last":*) return 0 ;; # Redis itself cuts a torn end of its last file, or says what it is
        *EOF* | *"Expected to read"* | *"got: 0d00"*) tail -c "$rest" "$1" >"$1.torn" ;;
        *)
          echo "mend.sh: $1 is broken at $good, and not by a full disk: $said" >&2
          echo 'See "Redis does not start" in DEPLOYMENT.md.' >&2
          exit 1
          ;;
      esac
      bytes=$rest
    fi
    remove "$1" "$good" "$bytes"
  done
}

rm -f "$folder"/../temp-rewriteaof-*.aof # of rewrites whose Redis has died
if [ -e "$folder/appendonly.aof.manifest" ]; then
  names=$(sed -n 's/^file \([^ ]*\) .*type i.*/\1/p' "$folder/appendonly.aof.manifest")
  last=$folder/$(echo "$names" | tail -n 1)
  for name in $names; do mend "$folder/$name"; done
fi
exec "$@"
